//! Compiles the CUDA kernels of cuda/: with nvcc, when there is one, for GPUs; with the feature `emulate` by the host's
//! C++ compiler for the emulator. Nothing is downloaded. What has not changed is not compiled again.

use std::collections::BTreeSet;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::{Command, exit};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::{env, fs};

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-changed=cuda");
    println!("cargo:rustc-check-cfg=cfg(mindskip_cuda)");
    let out = PathBuf::from(env::var_os("OUT_DIR").unwrap());
    if cfg!(feature = "cuda") {
        gpu::build(&out);
    }
    #[cfg(feature = "emulate")]
    emulate::build(&out);
}

fn fail(message: impl std::fmt::Display) -> ! {
    eprintln!("{message}");
    exit(1)
}

fn read(path: &Path) -> String {
    fs::read_to_string(path).unwrap_or_else(|e| fail(format!("{}: {e}", path.display())))
}

fn write(path: &Path, text: &str) {
    // An unchanged file keeps its time, and what is made from it stays fresh.
    if fs::read_to_string(path).is_ok_and(|old| old == text) {
        return;
    }
    fs::create_dir_all(path.parent().unwrap())
        .and_then(|()| fs::write(path, text))
        .unwrap_or_else(|e| fail(format!("{}: {e}", path.display())));
}

/// The files of a folder that end so, sorted.
fn files(folder: &str, ends: &[&str]) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).unwrap_or_else(|e| fail(format!("{folder}: {e}")));
    let mut all: Vec<_> = entries.map(|entry| entry.unwrap().path()).collect();
    all.retain(|path| path.extension().is_some_and(|x| ends.iter().any(|end| x == *end)));
    all.sort();
    all
}

fn stem(path: &Path) -> &str {
    path.file_stem().unwrap().to_str().unwrap()
}

/// Adds to `all` a file and what it includes in quotes, from beside itself or from cuda/.
fn with_includes(file: PathBuf, all: &mut BTreeSet<PathBuf>) {
    if !all.insert(file.clone()) {
        return;
    }
    for line in read(&file).lines() {
        let Some(name) = line.trim().strip_prefix("#include \"").and_then(|rest| rest.split('"').next()) else {
            continue;
        };
        let places = [file.parent().unwrap().join(name), Path::new("cuda").join(name)];
        if let Some(found) = places.into_iter().find(|place| place.exists()) {
            with_includes(found, all);
        }
    }
}

/// `command -o output source` for each source, several at a time, but for outputs that are there already. An output's
/// name holds a hash of all that it is made from. Returns the outputs; a compiler that fails ends the build with its
/// message.
fn compile(folder: &Path, end: &str, jobs: Vec<(PathBuf, Command)>, version: &str) -> Vec<PathBuf> {
    fs::create_dir_all(folder).unwrap_or_else(|e| fail(format!("{}: {e}", folder.display())));
    let outputs: Vec<PathBuf> = jobs
        .iter()
        .map(|(source, command)| {
            let mut hasher = DefaultHasher::new();
            (version, format!("{command:?}")).hash(&mut hasher);
            let mut inputs = BTreeSet::new();
            with_includes(source.clone(), &mut inputs);
            inputs.iter().for_each(|input| (input, read(input)).hash(&mut hasher));
            folder.join(format!("{}-{:016x}.{end}", stem(source), hasher.finish()))
        })
        .collect();
    let todo: Vec<_> = jobs.into_iter().zip(&outputs).filter(|(_, output)| !output.exists()).collect();
    let next = AtomicUsize::new(0);
    let todo: Vec<_> = todo.into_iter().map(std::sync::Mutex::new).collect();
    let worker = || {
        while let Some(job) = todo.get(next.fetch_add(1, Ordering::Relaxed)) {
            let ((source, command), output) = &mut *job.lock().unwrap();
            let unfinished = output.with_extension("unfinished");
            let run = command.arg("-o").arg(&unfinished).arg(&*source).output();
            let run = run.unwrap_or_else(|e| fail(format!("{command:?}: {e}")));
            if !run.status.success() {
                let text = String::from_utf8_lossy(&run.stderr);
                fail(format!("{}\n{command:?}\nfailed on {}", text, source.display()));
            }
            // What ptxas says of registers and spills.
            let said = [run.stdout, run.stderr].concat();
            fs::write(output.with_extension("log"), said)
                .and_then(|()| fs::rename(&unfinished, *output))
                .unwrap_or_else(|e| fail(format!("{}: {e}", output.display())));
        }
    };
    let workers: usize = env::var("NUM_JOBS").ok().and_then(|n| n.parse().ok()).unwrap_or(1);
    std::thread::scope(|scope| (0..workers.min(todo.len())).for_each(|_| drop(scope.spawn(worker))));
    // What earlier builds left would only grow.
    for old in fs::read_dir(folder).into_iter().flatten().flatten() {
        if !outputs.iter().any(|output| old.path().with_extension("") == output.with_extension("")) {
            let _ = fs::remove_file(old.path());
        }
    }
    outputs
}

mod gpu {
    use super::*;

    /// Where scripts/get-cuda.sh puts it. It touches build.rs, so cargo looks again.
    const FETCHED: &str = ".cuda/nvidia/cu13/bin/nvcc";

    fn find_nvcc() -> Option<PathBuf> {
        for home in ["CUDA_HOME", "CUDA_PATH"] {
            println!("cargo:rerun-if-env-changed={home}");
            let nvcc = env::var_os(home).map(|home| Path::new(&home).join("bin/nvcc"));
            if nvcc.as_ref().is_some_and(|nvcc| nvcc.exists()) {
                return nvcc;
            }
        }
        println!("cargo:rerun-if-env-changed=PATH");
        let path = env::var_os("PATH").unwrap_or_default();
        let fetched = env::current_dir().unwrap().join(FETCHED);
        env::split_paths(&path).map(|folder| folder.join("nvcc")).chain([fetched]).find(|nvcc| nvcc.exists())
    }

    /// `80;90a`: MINDSKIP_CUDA_ARCH, or that of the GPUs here, or what most have.
    fn architectures() -> Vec<String> {
        println!("cargo:rerun-if-env-changed=MINDSKIP_CUDA_ARCH");
        let asked = env::var("MINDSKIP_CUDA_ARCH").ok().filter(|list| !list.trim().is_empty());
        let list = asked.or_else(installed).unwrap_or_else(|| "80;90a".into());
        let mut all: Vec<String> = list.split([';', ',', ' ']).filter(|a| !a.is_empty()).map(str::to_owned).collect();
        let number = |a: &String| a.trim_end_matches(char::is_alphabetic).parse::<u32>();
        if let Some(bad) = all.iter().find(|a| number(a).is_err()) {
            fail(format!("MINDSKIP_CUDA_ARCH: {bad} is no architecture; 80;90a would be two"));
        }
        all.sort_by_key(|a| number(a).unwrap());
        all.dedup();
        all
    }

    fn installed() -> Option<String> {
        let run =
            Command::new("nvidia-smi").args(["--query-gpu=compute_cap", "--format=csv,noheader"]).output().ok()?;
        let text = String::from_utf8(run.stdout).ok().filter(|_| run.status.success())?;
        let all: Option<Vec<String>> = text
            .lines()
            .map(|line| {
                let number: u32 = line.trim().replace('.', "").parse().ok()?;
                // From Hopper on, some instructions are only there with an `a`.
                Some(if number >= 90 { format!("{number}a") } else { number.to_string() })
            })
            .collect();
        all.filter(|all| !all.is_empty()).map(|all| all.join(";"))
    }

    /// OUT_DIR/cuda_modules.rs: a fatbin for each file of cuda/.
    pub fn build(out: &Path) {
        let Some(nvcc) = find_nvcc() else {
            println!("cargo:warning=built without CUDA kernels: nvcc was not found; scripts/get-cuda.sh fetches it");
            return;
        };
        let run = Command::new(&nvcc).arg("--version").output();
        let run = run.unwrap_or_else(|e| fail(format!("{}: {e}", nvcc.display())));
        let version = String::from_utf8_lossy(&run.stdout).into_owned();
        if !run.status.success() {
            fail(format!("{} --version failed: {}", nvcc.display(), String::from_utf8_lossy(&run.stderr)));
        }

        let architectures = architectures();
        let mut flags: Vec<String> =
            ["-fatbin", "-std=c++17", "-O3", "-lineinfo", "-Xptxas", "-v"].map(str::to_owned).into();
        flags.extend(architectures.iter().map(|a| format!("-gencode=arch=compute_{a},code=sm_{a}")));
        // PTX for GPUs to come, of the lowest architecture; that of one with an `a` would run on no other.
        if let Some(lowest) = architectures.iter().find(|a| !a.ends_with(char::is_alphabetic)) {
            flags.push(format!("-gencode=arch=compute_{lowest},code=compute_{lowest}"));
        }
        let sources = files("cuda", &["cu"]);
        let jobs = sources.iter().map(|source| {
            let mut command = Command::new(&nvcc);
            command.args(&flags);
            (source.clone(), command)
        });
        let fatbins = compile(&out.join("fatbins"), "fatbin", jobs.collect(), &version);

        let modules: String = sources
            .iter()
            .zip(&fatbins)
            .map(|(source, fatbin)| format!("    ({:?}, include_bytes!({fatbin:?})),\n", stem(source)))
            .collect();
        let release = version.lines().find(|line| line.contains("release")).unwrap_or("").trim();
        write(
            &out.join("cuda_modules.rs"),
            &format!(
                "pub static MODULES: &[(&str, &[u8])] = &[\n{modules}];\n\
                 pub const ARCHITECTURES: &str = {:?};\npub const NVCC: &str = {release:?};\n",
                architectures.join(";")
            ),
        );
        println!("cargo:rustc-cfg=mindskip_cuda");
    }
}

#[cfg(feature = "emulate")]
mod emulate {
    use super::*;

    /// One library of the emulator, the kernels and the emulator's tests.
    pub fn build(out: &Path) {
        let sources = out.join("emulate");
        let mut kernels = Vec::new();
        for folder in ["cuda", "cuda/emulator/tests"] {
            for file in files(folder, &["cu", "cuh"]) {
                let to = sources.join(file.strip_prefix("cuda").unwrap());
                let mut text = format!("#line 1 \"{}\"\n{}\n", file.display(), rewrite(&file));
                if file.extension().is_some_and(|x| x == "cu") {
                    // A namespace for each file: on a GPU each is a module, whose names the others do not see.
                    text = format!("#include \"emulator/cuda.h\"\n#include \"kernels.h\"\nnamespace {{\n{text}}}\n");
                    let to = to.with_extension("cpp");
                    write(&to, &text);
                    kernels.push(to);
                } else {
                    write(&to, &text);
                }
            }
        }

        // See cuda/emulator/races.h.
        let races = cfg!(feature = "races");
        let mut build = cc::Build::new();
        build.cpp(true).std("c++20").opt_level(2).debug(true).warnings(false);
        let tool = build.get_compiler();
        let compiler = |kernel: bool| {
            let mut command = tool.to_command();
            command.args(["-c", "-w", "-fno-strict-aliasing", "-ffp-contract=off", "-Icuda", "-DMINDSKIP_EMULATE"]);
            if kernel {
                command.arg("-fsanitize=alignment,bounds,shift,integer-divide-by-zero");
            }
            match (races, kernel) {
                (true, true) => _ = command.arg("-fsanitize=thread"),
                (true, false) => _ = command.arg("-DEMU_RACES"),
                (false, _) => {}
            }
            command
        };
        let mut jobs: Vec<_> =
            files("cuda/emulator", &["cpp"]).into_iter().map(|file| (file, compiler(false))).collect();
        jobs.extend(kernels.into_iter().map(|kernel| (kernel, compiler(true))));
        let objects = compile(&out.join("objects"), "o", jobs, "");
        // All of it, because nothing but its own registration refers to a kernel.
        cc::Build::new().cpp(true).objects(objects).link_lib_modifier("+whole-archive").compile("mindskip_emulator");
        if races {
            println!("cargo:rustc-link-lib=tsan");
        }
    }

    /// The file's text with its __shared__ declarations turned into such as ask the emulator for memory:
    ///
    ///     extern __shared__ uint4 all[];  ->  uint4 *const all = (uint4 *)emu::dynamic_shared();
    ///     __shared__ float x[8], y;       ->  struct Shared1 { float x[8], y; }; auto &shared1 =
    ///                                         emu::static_shared<Shared1>(); auto &x = shared1.x; auto &y = shared1.y;
    ///
    /// Lines stay where they are.
    fn rewrite(file: &Path) -> String {
        const WORD: &str = "__shared__";
        let text = read(file);
        let mut out = String::new();
        let mut rest = text.as_str();
        let mut count = 0;
        while let Some(at) = next_word(rest, WORD) {
            let before = rest[..at].trim_end();
            let declaration = &rest[at + WORD.len()..];
            let end = end_of(declaration, ';').unwrap_or_else(|| fail(format!("{}: {WORD} without ;", file.display())));
            let (declaration, after) = declaration.split_at(end);
            if let Some(before) = before.strip_suffix("extern") {
                let name = name_of(declaration);
                let kind = declaration[..declaration.rfind(name).unwrap()].trim();
                let kind = kind.rfind(')').map_or(kind, |paren| kind[paren + 1..].trim()); // alignas(...)
                out += &format!("{before}{kind} *const {name} = ({kind} *)emu::dynamic_shared()");
            } else {
                count += 1;
                out += before.strip_suffix("static").unwrap_or(&rest[..at]);
                out += &format!("struct Shared{count} {{{declaration};}}; auto &shared{count} = ");
                out += &format!("emu::static_shared<Shared{count}>()");
                let mut names = declaration;
                loop {
                    let end = end_of(names, ',').unwrap_or(names.len());
                    let name = name_of(&names[..end]);
                    out += &format!("; auto &{name} = shared{count}.{name}");
                    let Some(next) = names.get(end + 1..) else { break };
                    names = next;
                }
            }
            rest = after;
        }
        out + rest
    }

    /// Where a word stands outside of comments.
    fn next_word(text: &str, word: &str) -> Option<usize> {
        let mut at = 0;
        while at < text.len() {
            let here = &text[at..];
            at += if here.starts_with("//") {
                here.find('\n').unwrap_or(here.len())
            } else if here.starts_with("/*") {
                here.find("*/").map_or(here.len(), |end| end + 2)
            } else if here.starts_with(word) {
                return Some(at);
            } else {
                here.chars().next().unwrap().len_utf8()
            };
        }
        None
    }

    /// Where a character stands outside of brackets.
    fn end_of(text: &str, wanted: char) -> Option<usize> {
        let mut depth = 0;
        let mut square = 0; // within [], < is a comparison
        text.char_indices().find_map(|(at, c)| {
            match c {
                c if c == wanted && depth == 0 => return Some(at),
                '(' | '{' => depth += 1,
                ')' | '}' => depth -= 1,
                '[' => (depth, square) = (depth + 1, square + 1),
                ']' => (depth, square) = (depth - 1, square - 1),
                '<' if square == 0 => depth += 1,
                '>' if square == 0 => depth -= 1,
                _ => {}
            }
            None
        })
    }

    /// The name that one declarator declares.
    fn name_of(declarator: &str) -> &str {
        let name = declarator[..end_of(declarator, '[').unwrap_or(declarator.len())].trim_end();
        &name[name.rfind(|c: char| !(c.is_alphanumeric() || c == '_')).map_or(0, |at| at + 1)..]
    }
}
