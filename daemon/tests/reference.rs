//! The same QMP scripts on our daemon and on the reference's: the same replies and the same events.
//!
//! Scripts are in `tests/qmp`; [`script`] says what their lines mean. Replies are compared in their order and events in
//! theirs; how the two interleave is a matter of timing.

#[path = "../../tools/io/tests/reference/loops.rs"]
mod loops;
mod script;

use std::path::PathBuf;

use script::{is_installed, run, same};

const MONITOR: [&str; 4] = ["--chardev", "socket,id=m,path=qmp.sock", "--monitor", "m"];

/// Replies and events.
fn compare(name: &str) {
    compare_what(name, true);
}

/// Only replies: how often a job is held for a moment is nobody's business.
fn compare_replies(name: &str) {
    compare_what(name, false);
}

fn compare_what(name: &str, events: bool) {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/qmp").join(format!("{name}.qmp"));
    let script = std::fs::read_to_string(path).expect("a script");
    for needed in ["qemu-storage-daemon", "qemu-img", "qemu-io", "nbdkit"] {
        if (needed != "nbdkit" || script.contains(needed)) && !is_installed(needed) {
            println!("not compared: {needed} is not installed (Debian: qemu-utils, nbdkit)");
            return;
        }
    }
    let theirs = run("qemu-storage-daemon", &MONITOR, &script, None);
    let arguments = [&["storage-daemon"][..], &MONITOR].concat();
    let ours = run(env!("CARGO_BIN_EXE_underlay"), &arguments, &script, None);
    same(&format!("replies in {name}"), &ours.replies, &theirs.replies);
    if events {
        same(&format!("events in {name}"), &ours.events, &theirs.events);
    }
    assert!(ours.replies.len() > 5, "{name} says something");
}

#[test]
fn nodes() {
    compare("nodes");
}

#[test]
fn block_devices() {
    if loops::can_be_made() {
        compare("block_devices");
    }
}

#[test]
fn across_filters() {
    compare_replies("across_filters");
}

#[test]
fn job_leavings() {
    compare_replies("job_leavings");
}

#[test]
fn relied_on() {
    ours_alone(include_str!("qmp/relied_on.qmp"));
}

#[test]
fn names_in_full() {
    // The reference writes a name that does not lead from the overlay to the disk, and cannot open the overlay.
    ours_alone(include_str!("qmp/names_in_full.qmp"));
}

#[test]
fn past_filters() {
    compare_replies("past_filters");
}

#[test]
fn lost_target() {
    // The reference waits if it notices the loss later than the cancel.
    ours_alone(include_str!("qmp/lost_target.qmp"));
}

#[test]
fn based_later() {
    compare_replies("based_later");
}

#[test]
fn stream_keeps_bitmaps() {
    compare_replies("stream_keeps_bitmaps");
}

/// What the reference gets wrong: the script's shell commands say what is right.
fn ours_alone(script: &str) {
    let refused = refused_by_ours(script);
    assert!(refused.is_empty(), "{refused:?}");
}

/// The errors that our daemon replies to a script.
fn refused_by_ours(script: &str) -> Vec<String> {
    if !is_installed("qemu-io") {
        println!("not run: qemu-io is not installed (Debian: qemu-utils)");
        return Vec::new();
    }
    let arguments = [&["storage-daemon"][..], &MONITOR].concat();
    let heard = run(env!("CARGO_BIN_EXE_underlay"), &arguments, script, None);
    heard.replies.into_iter().filter(|reply| reply.contains("\"error\"")).collect()
}

#[test]
fn stopped_target() {
    let refused = refused_by_ours(include_str!("qmp/stopped_target.qmp"));
    let is_late = |reply: &String| reply.contains("Requests that are under way, maybe a job's, do not end");
    assert!(refused.len() <= 1 && refused.iter().all(is_late), "{refused:?}");
}

#[test]
fn wide_copy() {
    ours_alone(include_str!("qmp/wide_copy.qmp"));
}

#[test]
fn lost_server() {
    ours_alone(include_str!("qmp/lost_server.qmp"));
}

#[test]
fn exports() {
    compare("exports");
}

#[test]
fn snapshots() {
    compare("snapshots");
}

#[test]
fn create() {
    compare("create");
}

#[test]
fn job_errors() {
    compare("job_errors");
}

#[test]
fn stream() {
    compare("stream");
}

#[test]
fn commit() {
    compare("commit");
}

#[test]
fn transaction() {
    compare("transaction");
}

#[test]
fn transaction_chains() {
    compare("transaction_chains");
}

#[test]
fn drive_mirror() {
    compare("drive_mirror");
}

#[test]
fn drive_mirror_existing() {
    compare("drive_mirror_existing");
}

#[test]
fn nbd_client() {
    compare("nbd_client");
}

#[test]
fn mirror() {
    compare("mirror");
}

#[test]
fn statistics() {
    compare("statistics");
}

#[test]
fn verbs() {
    compare("verbs");
}

#[test]
fn reopen_qcow2() {
    compare("reopen_qcow2");
}

#[test]
fn reopen() {
    compare("reopen");
}

#[test]
fn copy_on_read() {
    compare("copy_on_read");
}

#[test]
fn iothread() {
    compare("iothread");
}

#[test]
fn throttle() {
    compare("throttle");
}

#[test]
fn arguments() {
    compare("arguments");
}

#[test]
fn corrupt() {
    compare("corrupt");
}

#[test]
fn pull_mode() {
    compare("pull_mode");
}

#[test]
fn incremental() {
    compare("incremental");
}

#[test]
fn filter_bitmap() {
    compare("filter_bitmap");
}

#[test]
fn export_bitmaps() {
    compare("export_bitmaps");
}

#[test]
fn backup_bitmap() {
    compare("backup_bitmap");
}

#[test]
fn backup() {
    compare("backup");
}

#[test]
fn drive_backup() {
    compare("drive_backup");
}

#[test]
fn fleecing() {
    compare("fleecing");
}

#[test]
fn bitmaps() {
    compare("bitmaps");
}

#[test]
fn backup_transaction() {
    compare("backup_transaction");
}

#[test]
fn concluded() {
    compare("concluded");
}

#[test]
fn options() {
    compare("options");
}

#[test]
fn backup_faults() {
    compare("backup_faults");
}

#[test]
fn mirror_faults() {
    compare("mirror_faults");
}

#[test]
fn error_policies() {
    compare("error_policies");
}

#[test]
fn jobs_interrupted() {
    compare("jobs_interrupted");
}

#[test]
fn taking_internal_snapshots() {
    compare("taking_internal_snapshots");
}

#[test]
fn internal_snapshots() {
    compare("internal_snapshots");
}

#[test]
fn write_threshold() {
    compare("write_threshold");
}

#[test]
fn chardevs() {
    compare("chardevs");
}

#[test]
fn experimental() {
    compare("experimental");
}

#[test]
fn mirror_places() {
    compare("mirror_places");
}

#[test]
fn opening_locked() {
    compare("opening_locked");
}
