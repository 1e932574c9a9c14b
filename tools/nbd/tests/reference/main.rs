//! The same command lines on our program and on qemu-nbd, with nbdinfo, nbdcopy and qemu-io as clients: the same
//! output, exit status and disk.

#[path = "../../../io/tests/reference/script.rs"]
mod script;

const NEEDED: [&str; 6] = ["qemu-img", "qemu-io", "qemu-nbd", "nbdinfo", "nbdcopy", "nbdkit"];

#[test]
fn command_lines() {
    if script::has(&NEEDED) {
        script::run(include_str!("../scripts/command_lines.txt"), "qemu-nbd", &script::example("qemu-nbd"));
    }
}

#[test]
fn serving() {
    if script::has(&NEEDED) {
        script::run(include_str!("../scripts/serving.txt"), "qemu-nbd", &script::example("qemu-nbd"));
    }
}

#[test]
fn listing() {
    if script::has(&NEEDED) {
        script::run(include_str!("../scripts/listing.txt"), "qemu-nbd", &script::example("qemu-nbd"));
    }
}
