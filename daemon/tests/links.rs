//! One program, named after what it is called as: links make it qemu-img and its like.

use std::os::unix::fs::symlink;
use std::process::Command;

#[test]
fn a_link_is_the_tool_that_it_is_called() {
    let folder = tempfile::tempdir().expect("a folder");
    for name in ["qemu-img", "qemu-io", "qemu-nbd", "qemu-storage-daemon", "qmp-shell"] {
        let link = folder.path().join(name);
        symlink(env!("CARGO_BIN_EXE_underlay"), &link).expect("a link");
        let output = Command::new(&link).arg("--version").output().expect("our program");
        let said = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success() && said.starts_with(&format!("{name} ")), "{name}: {output:?}");
    }
}
