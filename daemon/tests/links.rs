//! One program, named after what it is called as: links make it qemu-img and its like.

use std::os::unix::fs::symlink;
use std::process::Command;

#[test]
fn a_link_is_the_tool_that_it_is_called() {
    let folder = tempfile::tempdir().expect("a folder");
    for (name, said_first) in [
        ("qemu-img", "qemu-img "),
        ("qemu-io", "qemu-io "),
        ("qemu-nbd", "qemu-nbd "),
        ("qemu-storage-daemon", "qemu-storage-daemon "),
        ("qemu-system-x86_64", "QEMU emulator version "),
        ("qmp-shell", "qmp-shell "),
    ] {
        let link = folder.path().join(name);
        symlink(env!("CARGO_BIN_EXE_underlay"), &link).expect("a link");
        let output = Command::new(&link).arg("--version").output().expect("our program");
        let said = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success() && said.starts_with(said_first), "{name}: {output:?}");
    }
}
