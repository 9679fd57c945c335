#![no_main]

libfuzzer_sys::fuzz_target!(init: mindskip_fuzz::init(), |data: &[u8]| mindskip_fuzz::targets::index(data));
