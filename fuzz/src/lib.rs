//! What the targets of libFuzzer share; see docs/security.md.

#[path = "../../tests/fuzz/targets.rs"]
pub mod targets;

/// A panic that is caught is no finding; libfuzzer-sys ends the process for those that are not.
pub fn init() {
    std::panic::set_hook(Box::new(|info| eprintln!("{info}")));
}
