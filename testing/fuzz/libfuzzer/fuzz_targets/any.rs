//! The target that the variable UNDERLAY_TARGET names.
#![no_main]

use std::sync::OnceLock;

use libfuzzer_sys::fuzz_target;
use underlay_fuzz::{TARGETS, Target};

fn chosen() -> &'static Target {
    static CHOSEN: OnceLock<&Target> = OnceLock::new();
    CHOSEN.get_or_init(|| {
        let name = std::env::var("UNDERLAY_TARGET").unwrap_or_default();
        let names: Vec<_> = TARGETS.iter().map(|target| target.name).collect();
        let found = TARGETS.iter().find(|target| target.name == name);
        found.unwrap_or_else(|| panic!("UNDERLAY_TARGET is one of {}", names.join(", ")))
    })
}

fuzz_target!(|data: &[u8]| (chosen().run)(data));
