//! Block devices for tests: loop devices, which only root can make.

use std::process::Command;

/// Whether they can be made here; says so if not.
pub fn can_be_made() -> bool {
    let try_one = "f=$(mktemp) && truncate -s 1M $f && d=$(losetup -f --show $f) && losetup -d $d; s=$?; rm -f $f; exit $s";
    let made = Command::new("sh").args(["-c", try_one]).output().is_ok_and(|done| done.status.success());
    if !made {
        eprintln!("skipped: loop devices cannot be made here (root can)");
    }
    made
}
