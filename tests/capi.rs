//! The C library: its header says what it exports, and programs in C, C++ and Python tell what the engine in Rust does.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs};

use mindskip::bundle::Bundle;
use mindskip::engine::{Device, Engine, Options};
use mindskip::generate::{Finish, Turn, generate};
use mindskip::model::Routing;
use mindskip::router::{Keys, Overrides};
use mindskip::sample::{Sampler, SamplerSettings};
use mindskip::tokenizer::Tokenizer;

const PROMPTS: [&str; 3] = ["Tom had a red ball.", "Once upon a time", "The dog"];
const TOKENS: usize = 24;
const CALLBACKS: [&str; 2] = ["mindskip_on_text", "mindskip_on_event"];

/// Beside this test: cargo builds it for the dependency on mindskip-capi.
fn library(extension: &str) -> PathBuf {
    let path = env::current_exe().unwrap().with_file_name(format!("libmindskip.{extension}"));
    assert!(path.exists(), "{}", path.display());
    path
}

fn source(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(name)
}

fn read(name: &str) -> String {
    fs::read_to_string(source(name)).unwrap()
}

/// What a command prints. Panics when it fails.
fn run(command: &mut Command) -> String {
    let output = command.output().unwrap_or_else(|e| panic!("{command:?}: {e}"));
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{command:?}\n{out}{err}");
    out.into_owned()
}

/// Compiles a program with the address sanitizer, if the compiler has it, and returns what it prints.
fn compile_and_run(compiler: &str, flags: &[&str], source: &Path, library: &Path) -> String {
    let dir = tempfile::tempdir().unwrap();
    let (empty, program) = (dir.path().join("empty.c"), dir.path().join("program"));
    fs::write(&empty, "int main(void) { return 0; }\n").unwrap();
    let sanitize = "-fsanitize=address,undefined";
    let has = Command::new(compiler).arg(sanitize).arg("-o").arg(&program).arg(&empty).output().unwrap();
    let mut command = Command::new(compiler);
    if has.status.success() {
        command.args([sanitize, "-fno-sanitize-recover=all"]);
    } else {
        eprintln!("{compiler} has no address sanitizer: {} runs without", source.display());
    }
    command.args(["-Wall", "-Wextra", "-Werror", "-pedantic", "-g", "-I"]).arg(self::source("include")).args(flags);
    command.arg("-o").arg(&program).arg(source).args(["-x", "none"]).arg(library);
    run(command.args(["-lpthread", "-ldl", "-lm"]));
    let mut program = Command::new(&program);
    run(program.env("LD_LIBRARY_PATH", library.parent().unwrap()).current_dir(self::source("assets")))
}

fn stories(routed: bool) -> (Engine, Tokenizer, Vec<u32>) {
    let bundle = Bundle::embedded().unwrap();
    let (tokenizer, eos) = (bundle.tokenizer().unwrap(), bundle.eos().to_vec());
    let mut routers = bundle.routers.clone().unwrap();
    let overrides = Overrides { keys: Some(Keys::Active), threshold: Some(0.4), ..Overrides::default() };
    routers.apply(&overrides).unwrap();
    routers.keep(&[3, 5, 6]).unwrap();
    let options = Options { device: Device::Cpu, batch: 3, context: Some(128), ..Options::default() };
    let routing = routed.then(|| Routing::routers(routers));
    (Engine::new(bundle.config, bundle.weights, routing, &options).unwrap(), tokenizer, eos)
}

/// The texts behind the prompts, together.
fn texts(engine: &mut Engine, tokenizer: &Tokenizer, eos: &[u32], temperature: f32) -> Vec<String> {
    let settings = SamplerSettings { temperature, seed: 7, ..SamplerSettings::default() };
    let mut turns: Vec<_> = (0..)
        .zip(PROMPTS)
        .map(|(i, prompt)| Turn {
            sampler: Sampler::for_sequence(settings, i).unwrap(),
            max_tokens: TOKENS,
            eos: eos.to_vec(),
            ..Turn::new(engine.open().unwrap(), tokenizer.encode(prompt, true).unwrap()).unwrap()
        })
        .collect();
    engine.clear_counts().unwrap();
    let (answers, _) = generate(engine, tokenizer, &mut turns, &mut |_, _| ControlFlow::Continue(())).unwrap();
    answers.into_iter().map(|answer| answer.text).collect()
}

fn line(title: &str, prompt: &str, text: &str) -> String {
    format!("{title}: {prompt}|{text}\n")
}

/// What tests/capi/program.c is to print.
fn expected() -> String {
    let mut out = String::new();
    for (title, routed, temperature) in [("routed", true, 0.0), ("drawn", true, 0.8), ("dense", false, 0.0)] {
        let (mut engine, tokenizer, eos) = stories(routed);
        for (prompt, text) in PROMPTS.iter().zip(texts(&mut engine, &tokenizer, &eos, temperature)) {
            out += &line(title, prompt, &text);
        }
        let layers = engine.routing().map_or_else(Vec::new, |r| r.layers.clone());
        let (activity, kv) = (engine.activity().unwrap().clone(), engine.kv_usage().unwrap());
        let (capacity, third) = (activity.mean_capacity(&layers), activity.capacity(3));
        let rows = format!("{} of {} rows", kv.rows, kv.dense_rows);
        writeln!(out, "{title}: {} tokens, capacity {capacity:.6}, layer 3 {third:.6}, {rows}", activity.tokens)
            .unwrap();
    }
    let (mut engine, tokenizer, eos) = stories(false);
    for (prompt, text) in PROMPTS.iter().zip(texts(&mut engine, &tokenizer, &eos, 0.0)) {
        out += &line("steps", prompt, &text);
    }

    let (mut engine, ..) = stories(false);
    let (seq, ids) = (engine.open().unwrap(), tokenizer.encode(PROMPTS[0], true).unwrap());
    engine.prefill(&[(seq, &ids)]).unwrap();
    let logprobs = engine.logprobs(&ids[1..3]).unwrap();
    writeln!(out, "logprobs: {:.5} {:.5}", logprobs[0], logprobs[1]).unwrap();

    let ids = tokenizer.encode(PROMPTS[1], true).unwrap();
    for (title, limit, stop) in [("broken off", 5, vec![]), ("stopped", usize::MAX, vec!["Lily".into(), "ball".into()])]
    {
        let (mut engine, ..) = stories(false);
        let turn = Turn { stop, max_tokens: 100, ..Turn::new(engine.open().unwrap(), ids.clone()).unwrap() };
        let mut calls = 0;
        let mut on_text = |_, _: &str| {
            calls += 1;
            if calls == limit { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        };
        let (answers, _) = generate(&mut engine, &tokenizer, &mut [turn], &mut on_text).unwrap();
        assert!(matches!(answers[0].finish, Finish::Interrupted | Finish::Stop));
        writeln!(out, "{title}: {}", answers[0].text).unwrap();
    }
    out
}

#[test]
fn c_and_cpp_programs_tell_what_rust_tells() {
    let (expected, program) = (expected(), source("tests/capi/program.c"));
    for (compiler, flags, library) in [
        ("cc", &["-std=c11", "-D_POSIX_C_SOURCE=200809L"][..], library("so")),
        ("c++", &["-x", "c++", "-std=c++17"], library("a")),
    ] {
        assert_eq!(compile_and_run(compiler, flags, &program, &library), expected, "{compiler}");
    }
}

#[test]
fn the_example_of_the_readme_runs() {
    let readme = read("README.md");
    let code = readme.split("```c\n").nth(1).and_then(|rest| rest.split("```").next()).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("example.c");
    fs::write(&file, code).unwrap();
    let out = compile_and_run("cc", &["-std=c11"], &file, &library("so"));
    assert!(out.starts_with(" He "), "{out}");
    assert!(out.contains("of the routed layers"), "{out}");
}

#[test]
fn a_python_program_tells_what_rust_tells() {
    let Ok(found) = Command::new("python3").arg("--version").output() else {
        eprintln!("no python3: not tested");
        return;
    };
    assert!(found.status.success());
    let mut expected = String::new();
    for (title, routed) in [("routed", true), ("dense", false)] {
        let (mut engine, tokenizer, eos) = stories(routed);
        expected += &line(title, PROMPTS[0], &texts(&mut engine, &tokenizer, &eos, 0.0)[0]);
    }
    let program = source("tests/capi/program.py");
    let mut python = Command::new("python3");
    // The emulator's variables of threads must be in glibc's static block, which is small for libraries that are loaded late.
    python.env("GLIBC_TUNABLES", "glibc.rtld.optional_static_tls=65536");
    assert_eq!(run(python.arg(program).arg(library("so"))), expected);
}

/// By name: the fields of a struct, the arguments and the result of a function, the value of a constant.
type Declarations = BTreeMap<String, Vec<String>>;

/// `const char *const *stop` as `stop: *const *const c_char`.
fn field(declaration: &str) -> String {
    let spaced = declaration.replace('*', " * ");
    let mut words = spaced.split_whitespace().peekable();
    let mut is_const = words.next_if_eq(&"const").is_some();
    let mut kind = match words.next().unwrap() {
        "char" => "c_char",
        "void" => "c_void",
        "float" => "f32",
        "double" => "f64",
        "size_t" => "usize",
        "int32_t" => "i32",
        "uint32_t" => "u32",
        "uint64_t" => "u64",
        other => other,
    }
    .to_owned();
    while words.next_if_eq(&"*").is_some() {
        kind = format!("*{} {kind}", if is_const { "const" } else { "mut" });
        is_const = words.next_if_eq(&"const").is_some();
    }
    format!("{}: {kind}", words.next().unwrap())
}

fn header() -> Declarations {
    let mut text = read("include/mindskip.h");
    for callback in CALLBACKS {
        text = text.replace(&format!("(*{callback})"), callback);
    }
    let without_comments: String =
        text.split("/*").map(|part| part.split_once("*/").map_or(part, |(_, code)| code)).collect();
    let mut all = Declarations::new();
    let (mut code, mut in_cpp) = (String::new(), false);
    for line in without_comments.lines() {
        if let Some(directive) = line.strip_prefix('#') {
            in_cpp = directive.starts_with("ifdef __cplusplus") || in_cpp && !directive.starts_with("endif");
            if let Some((name, value)) = directive.strip_prefix("define ").and_then(|d| d.split_once(' ')) {
                all.insert(name.into(), vec![value.into()]);
            }
        } else if !in_cpp {
            code += line;
            code.push(' ');
        }
    }
    let mut depth = 0;
    let statements = code.split(|c| {
        depth += i32::from(c == '{') - i32::from(c == '}');
        c == ';' && depth == 0
    });
    for statement in statements.map(|s| s.trim().trim_start_matches("typedef ")) {
        if let Some(constants) = statement.strip_prefix("enum {") {
            let constants = constants.trim_end_matches('}').split(',');
            let parts = constants.map(|constant| constant.split_once('=').unwrap());
            all.extend(parts.map(|(name, value)| (name.trim().into(), vec![value.trim().into()])));
        } else if let Some((head, body)) = statement.split_once('{') {
            let fields = body.split('}').next().unwrap().split(';').filter(|f| !f.trim().is_empty());
            all.insert(head.trim().trim_start_matches("struct ").into(), fields.map(field).collect());
        } else if let Some((head, arguments)) = statement.split_once('(') {
            let head = field(head);
            let (name, result) = head.split_once(": ").unwrap();
            let arguments = arguments.trim_end_matches(')').split(',').filter(|a| *a != "void");
            all.insert(name.into(), arguments.map(field).chain([result.into()]).collect());
        }
    }
    all
}

/// The same of the library's source.
fn rust() -> Declarations {
    let mut all = Declarations::new();
    for file in fs::read_dir(source("capi/src")).unwrap() {
        let text = fs::read_to_string(file.unwrap().path()).unwrap();
        let text = text.split_whitespace().collect::<Vec<_>>().join(" ");
        let text = CALLBACKS.iter().fold(text, |text, callback| {
            let declared = format!("pub type {callback} = Option<unsafe extern \"C\" fn(");
            text.replace(&declared, &format!("extern \"C\" fn {callback}("))
        });
        let list = |text: &str| -> Vec<String> {
            text.split(',')
                .map(|part| part.trim().trim_start_matches("pub ").to_owned())
                .filter(|p| !p.is_empty())
                .collect()
        };
        for code in text.split("pub struct mindskip_").skip(1) {
            let (name, fields) = code.split_once(" {").unwrap();
            all.insert(format!("mindskip_{name}"), list(fields.split('}').next().unwrap()));
        }
        for code in text.split("pub const MINDSKIP_").skip(1) {
            let (name, rest) = code.split_once(": ").unwrap();
            let value = rest.split_once(" = ").unwrap().1.split(';').next().unwrap();
            all.insert(format!("MINDSKIP_{name}"), vec![value.into()]);
        }
        for code in text.split("extern \"C\" fn mindskip_").skip(1) {
            let (name, rest) = code.split_once('(').unwrap();
            let (arguments, rest) = rest.split_once(") -> ").unwrap();
            let result = rest.split([' ', '>']).take(if rest.starts_with('*') { 2 } else { 1 });
            let result = result.collect::<Vec<_>>().join(" ");
            all.insert(format!("mindskip_{name}"), list(arguments).into_iter().chain([result]).collect());
        }
    }
    all
}

#[test]
fn the_header_the_source_and_the_library_agree() {
    let (mut header, rust) = (header(), rust());
    let version =
        ["MAJOR", "MINOR", "PATCH"].map(|part| header.remove(&format!("MINDSKIP_VERSION_{part}")).unwrap().concat());
    assert_eq!(version.join("."), env!("CARGO_PKG_VERSION"));
    for name in header.keys().chain(rust.keys()) {
        assert_eq!(header.get(name), rust.get(name), "{name}: the header, the source");
    }

    let functions = |all: &Declarations| -> Vec<String> {
        let results = ["mindskip_status", "u32", "*const c_char"];
        let is_function = |(name, parts): &(&String, &Vec<String>)| {
            name.starts_with("mindskip_") && parts.last().is_some_and(|last| results.contains(&last.as_str()))
        };
        all.iter().filter(is_function).map(|(name, _)| name.clone()).collect()
    };
    let listed = run(Command::new("nm").args(["-D", "--defined-only", "--format=just-symbols"]).arg(library("so")));
    let mut exported: Vec<_> = listed.lines().map(str::to_owned).collect();
    exported.sort();
    assert_eq!(exported, functions(&header));
    assert!(exported.len() > 30, "{exported:?}");
}
