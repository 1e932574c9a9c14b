//! The same command lines and commands on our program and on qemu-io: the same output, exit status and disk.

mod script;

#[test]
fn commands() {
    if script::has(&["qemu-img", "qemu-io"]) {
        script::run(include_str!("../scripts/commands.txt"), "qemu-io", &script::example("qemu-io"));
    }
}

#[test]
fn command_lines() {
    if script::has(&["qemu-img", "qemu-io"]) {
        script::run(include_str!("../scripts/command_lines.txt"), "qemu-io", &script::example("qemu-io"));
    }
}

#[test]
fn images() {
    if script::has(&["qemu-img", "qemu-io"]) {
        script::run(include_str!("../scripts/images.txt"), "qemu-io", &script::example("qemu-io"));
    }
}
