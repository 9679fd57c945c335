//! Writes what the fuzzer begins with: `seeds FOLDER` makes FOLDER/TARGET/seed-0 and so on.

use std::fs;
use std::path::PathBuf;

use libfuzzer_sys as _; // what the instrumentation calls

fn main() {
    let folder = PathBuf::from(std::env::args_os().nth(1).expect("a folder"));
    for target in mindskip_fuzz::targets::TARGETS {
        let folder = folder.join(target.name);
        fs::create_dir_all(&folder).unwrap();
        for (number, seed) in (target.seeds)().into_iter().enumerate() {
            fs::write(folder.join(format!("seed-{number}")), seed).unwrap();
        }
    }
}
