//! Guests of a machine's devices, which come by exports: they wait while the machine is stopped, an error stops it, and
//! a device that goes takes them along.
//!
//! The reference has no such exports; what is expected here is what its guests would see.

mod script;

use std::os::unix::fs::symlink;

use script::{Heard, run};
use underlay_qmp::json::{self, Value};

const COMMON: &str = "machine -nodefaults -display none -chardev socket,id=m,path=qmp.sock -mon m,mode=control \
                      -pidfile pid -nbd-server addr.type=unix,addr.path=nbd.sock ";

fn heard(arguments: &str, script: &str) -> Heard {
    let tools = tempfile::tempdir().expect("a folder");
    for tool in ["qemu-img", "qemu-io"] {
        symlink(env!("CARGO_BIN_EXE_underlay"), tools.path().join(tool)).expect("a link");
    }
    let arguments = format!("{COMMON}{arguments}");
    let words: Vec<&str> = arguments.split_whitespace().collect();
    // Clients write and read `disk`; one in the background says through `done` how it went.
    let script = script.replace("GUEST", "qemu-io -f raw nbd+unix:///disk?socket=nbd.sock -c");
    run(env!("CARGO_BIN_EXE_underlay"), &words, &script, Some(tools.path()))
}

/// The replies without their commands, and the events in a few words.
fn outline(heard: &Heard) -> String {
    let replies = heard.replies.iter().filter_map(|reply| reply.lines().nth(1));
    let events = heard.events.iter().map(|event| event.trim_start_matches("}, "));
    replies.map(str::trim).chain(events).collect::<Vec<_>>().join("\n")
}

#[test]
fn an_error_stops_the_machine_and_the_request_is_tried_again() {
    let heard = heard(
        "-drive file=d.raw,format=raw,node-name=n,if=none,id=d,werror=stop -device virtio-blk,drive=d,id=v0 \
         -export nbd,id=g,node-name=v0,name=disk,writable=on",
        r#"! truncate -s 8M d.raw; mkfifo done
{"execute": "query-status"}
! GUEST 'write -P 1 0 64k'
! prlimit --pid $(cat pid) --fsize=1048576:
! (GUEST 'write -P 5 4M 64k'; echo $? > done) &
? STOP
{"execute": "query-status"}
{"execute": "cont"}
? STOP
! prlimit --pid $(cat pid) --fsize=unlimited:
{"execute": "cont"}
! test "$(timeout 60 cat done)" = 0
! GUEST 'read -P 5 4M 64k' | grep -q '^read 65536'
{"execute": "query-status"}
"#,
    );
    let error = r#""event": "BLOCK_IO_ERROR", "data": {"device": "d", "nospace": false, "node-name": "n", "qom-path": "/machine/peripheral/v0/virtio-backend", "reason": "File too large", "operation": "write", "action": "stop"}}"#;
    let (stop, resume) = (r#""event": "STOP"}"#, r#""event": "RESUME"}"#);
    assert_eq!(
        outline(&heard),
        [
            r#"{"return": {}}"#,
            r#"{"return": {"status": "running", "running": true}}"#,
            r#"{"return": {"status": "io-error", "running": false}}"#,
            r#"{"return": {}}"#,
            r#"{"return": {}}"#,
            r#"{"return": {"status": "running", "running": true}}"#,
            error,
            stop,
            resume,
            error,
            stop,
            resume,
        ]
        .join("\n")
    );
}

#[test]
fn what_a_guest_reads_is_copied() {
    let heard = heard(
        "-drive file=b.qcow2,if=virtio,copy-on-read=on,werror=report \
         -export nbd,id=g,node-name=virtio0,name=disk,writable=on",
        r#"! qemu-img create -q -f qcow2 a.qcow2 1M; qemu-io a.qcow2 -c 'write -P 7 0 1M' | grep -q '^wrote'
! qemu-img create -q -f qcow2 -b a.qcow2 -F qcow2 b.qcow2
{"execute": "query-name"}
! GUEST 'read -P 7 64k 64k' | grep -q '^read 65536'
! qemu-io -U -r b.qcow2 -c map | grep -q '64 KiB (0x10000) bytes     allocated at offset 64 KiB (0x10000)'
"#,
    );
    assert_eq!(outline(&heard), "{\"return\": {}}\n{\"return\": {}}");
}

#[test]
fn other_policies() {
    let heard = heard(
        "-blockdev file,filename=d.raw,node-name=n -device virtio-scsi,id=s -device scsi-hd,drive=n,id=h,werror=ignore \
         -export nbd,id=g,node-name=h,name=disk,writable=on",
        r#"! truncate -s 8M d.raw
{"execute": "query-name"}
! prlimit --pid $(cat pid) --fsize=1048576:
! GUEST 'write -P 5 4M 64k' | grep -q '^wrote 65536'
! GUEST 'read -P 0 4M 64k' | grep -q '^read 65536'
{"execute": "query-status"}
"#,
    );
    assert_eq!(
        outline(&heard),
        [
            r#"{"return": {}}"#,
            r#"{"return": {}}"#,
            r#"{"return": {"status": "running", "running": true}}"#,
            r#""event": "BLOCK_IO_ERROR", "data": {"device": "", "nospace": false, "node-name": "n", "qom-path": "/machine/peripheral/h", "reason": "File too large", "operation": "write", "action": "ignore"}}"#,
        ]
        .join("\n")
    );
}

#[test]
fn guests_wait_for_the_machine_and_go_with_their_device() {
    let heard = heard(
        "-S -drive file=d.qcow2,if=none,id=d -device virtio-blk,drive=d,id=v0 -device ide-cd,id=c -cdrom r.raw \
         -export nbd,id=g,node-name=v0,name=disk,writable=on",
        r#"! qemu-img create -q -f qcow2 d.qcow2 8M; truncate -s 1M r.raw; mkfifo done
{"execute": "query-name"}
! (GUEST 'write -P 5 4M 64k'; echo $? > done) &
{"execute": "block_resize", "arguments": {"device": "d", "size": 16777216}}
{"execute": "block-export-del", "arguments": {"id": "nope"}}
{"execute": "cont"}
! test "$(timeout 60 cat done)" = 0
{"execute": "blockdev-snapshot-sync", "arguments": {"device": "v0", "snapshot-file": "e.qcow2"}}
! GUEST 'write -P 6 0 64k'
! qemu-io -U -r e.qcow2 -c 'read -P 6 0 64k' | grep -q '^read 65536'
{"execute": "block-export-add", "arguments": {"type": "nbd", "id": "cd", "node-name": "ide1-cd0", "writable": true}}
{"execute": "block-export-add", "arguments": {"type": "nbd", "id": "cd", "node-name": "ide1-cd0"}}
{"execute": "eject", "arguments": {"device": "ide1-cd0"}}
{"execute": "block-export-add", "arguments": {"type": "nbd", "id": "none", "node-name": "c"}}
{"execute": "stop"}
! (GUEST 'read 0 4k' 2>/dev/null; echo $? > done) &
{"execute": "device_del", "arguments": {"id": "v0"}}
! test "$(timeout 60 cat done)" = 1
{"execute": "query-block-exports"}
"#,
    );
    let nothing = r#"{"return": {}}"#;
    let error = |text: &str| format!(r#"{{"error": {{"class": "GenericError", "desc": "{text}"}}}}"#);
    let conflict = "Permission conflict on node '#blockN': permissions 'resize' are both required by an unnamed block \
                    device (uses node '#blockN' as 'root' child) and unshared by block device 'd' (uses node \
                    '#blockN' as 'root' child).";
    assert_eq!(
        outline(&heard),
        [
            nothing.to_owned(),
            nothing.to_owned(),
            error(conflict),
            error("Export 'nope' is not found"),
            nothing.to_owned(),
            nothing.to_owned(),
            error("Cannot export read-only node as writable"),
            nothing.to_owned(),
            error("Device 'ide1-cd0' is in use by an export"),
            error("Device 'c' has no medium"),
            nothing.to_owned(),
            nothing.to_owned(),
            r##"{"return": [{"node-name": "#blockN", "shutting-down": false, "type": "nbd", "id": "cd"}]}"##
                .to_owned(),
            r#""event": "RESUME"}"#.to_owned(),
            r#""event": "STOP"}"#.to_owned(),
            r#""event": "BLOCK_EXPORT_DELETED", "data": {"id": "g"}}"#.to_owned(),
            r#""event": "DEVICE_DELETED", "data": {"path": "/machine/peripheral/v0/virtio-backend"}}"#
                .to_owned(),
            r#""event": "DEVICE_DELETED", "data": {"device": "v0", "path": "/machine/peripheral/v0"}}"#
                .to_owned(),
        ]
        .join("\n")
    );
}

/// How backup tools read a disk as it was: a filter comes to a device under its guest, and goes again.
#[test]
fn filters_come_to_a_device_and_go() {
    let heard = heard(
        "-blockdev qcow2,node-name=n0,file.driver=file,file.filename=d.qcow2 -device virtio-blk,drive=n0,id=v0 \
         -blockdev null-co,node-name=other,size=4096 -export nbd,id=g,node-name=v0,name=disk,writable=on",
        r#"! qemu-img create -q -f qcow2 d.qcow2 8M; qemu-img create -q -f qcow2 fl.qcow2 8M; qemu-img create -q -f qcow2 t.qcow2 8M
{"execute": "query-name"}
! GUEST 'write -P 1 0 8M'
{"execute": "blockdev-add", "arguments": {"driver": "qcow2", "node-name": "fl", "file": {"driver": "file", "filename": "fl.qcow2"}}}
{"execute": "blockdev-add", "arguments": {"driver": "qcow2", "node-name": "t", "file": {"driver": "file", "filename": "t.qcow2"}}}
{"execute": "blockdev-add", "arguments": {"driver": "copy-before-write", "node-name": "cbw", "file": "n0", "target": "fl"}}
{"execute": "qom-set", "arguments": {"path": "v0", "property": "drive", "value": "other"}}
{"execute": "qom-set", "arguments": {"path": "v0", "property": "drive", "value": "cbw"}}
{"execute": "blockdev-add", "arguments": {"driver": "snapshot-access", "node-name": "acc", "file": "cbw"}}
{"execute": "block-export-add", "arguments": {"type": "nbd", "id": "s", "node-name": "acc", "name": "then"}}
! GUEST 'write -P 2 1M 1M'
! qemu-io -r -f raw nbd+unix:///then?socket=nbd.sock -c 'read -P 1 0 8M' | grep -q '^read 8388608'
{"execute": "blockdev-backup", "arguments": {"device": "acc", "target": "t", "sync": "full", "job-id": "j"}}
? BLOCK_JOB_COMPLETED
{"execute": "block-export-del", "arguments": {"id": "s"}}
? BLOCK_EXPORT_DELETED
{"execute": "blockdev-del", "arguments": {"node-name": "acc"}}
{"execute": "blockdev-del", "arguments": {"node-name": "t"}}
{"execute": "blockdev-backup", "arguments": {"device": "n0", "target": "other", "sync": "none", "job-id": "k"}}
{"execute": "blockdev-add", "arguments": {"driver": "null-co", "node-name": "sink", "size": 8388608}}
{"execute": "blockdev-backup", "arguments": {"device": "n0", "target": "sink", "sync": "none", "job-id": "k"}}
{"execute": "qom-set", "arguments": {"path": "v0", "property": "drive", "value": "n0"}}
{"execute": "block-job-cancel", "arguments": {"device": "k"}}
? BLOCK_JOB_CANCELLED
{"execute": "qom-set", "arguments": {"path": "v0", "property": "drive", "value": "n0"}}
{"execute": "blockdev-del", "arguments": {"node-name": "cbw"}}
{"execute": "blockdev-del", "arguments": {"node-name": "fl"}}
! GUEST 'write -P 3 2M 1M'
! GUEST 'read -P 3 2M 1M'
! qemu-io -r t.qcow2 -c 'read -P 1 0 8M' | grep -q '^read 8388608'
"#,
    );
    let nothing = r#"{"return": {}}"#;
    let replies = outline(&heard);
    let replies: Vec<_> = replies.lines().filter(|line| !line.starts_with("\"event\"")).collect();
    let others: Vec<_> = replies.iter().filter(|reply| **reply != nothing).collect();
    assert_eq!(others.len(), 3, "{others:#?}");
    assert!(
        others[0].contains("Device '/machine/peripheral/v0/virtio-backend' is in use by an export"),
        "{others:?}"
    );
    assert!(others[1].contains("different sizes"), "{others:?}");
    assert!(
        others[2].contains("Permission conflict on node 'n0'"),
        "a job's filter is in between: {others:?}"
    );
}

#[test]
fn what_guests_do_is_counted() {
    let heard = heard(
        "-drive file=d.raw,format=raw,if=none,id=d,werror=report,stats-intervals.0=3600 -device virtio-scsi \
         -device scsi-hd,drive=d,id=h,account-failed=off -export nbd,id=g,node-name=h,name=disk,writable=on",
        r#"! truncate -s 8M d.raw
{"execute": "block-latency-histogram-set", "arguments": {"id": "h", "boundaries": [1, 3600000000000], "boundaries-flush": [3600000000000]}}
! GUEST 'write 0 64k' -c 'write 64k 64k' -c 'read 0 4k' -c 'read 0 4k' -c 'read 0 4k' -c 'discard 0 1M' -c flush
! prlimit --pid $(cat pid) --fsize=1048576:
! GUEST 'write 4M 64k' 2>/dev/null || true
{"execute": "query-blockstats"}
"#,
    );
    let Ok(Value::Object(reply)) = json::parse(heard.last.as_bytes()) else { panic!("{}", heard.last) };
    let Some(Value::List(devices)) = reply.get("return") else { panic!("{reply:?}") };
    let [Value::Object(device)] = &devices[..] else { panic!("{devices:?}") };
    let Some(Value::Object(stats)) = device.get("stats") else { panic!("{device:?}") };
    let number = |name: &str| stats.get(name).and_then(Value::as_u64).unwrap_or_else(|| panic!("{name}"));
    assert_eq!(
        (number("wr_operations"), number("wr_bytes"), number("failed_wr_operations")),
        (2, 131_072, 1)
    );
    assert_eq!((number("rd_operations"), number("rd_bytes")), (3, 12_288));
    assert_eq!((number("unmap_operations"), number("unmap_bytes")), (1, 1 << 20));
    let shown = |name: &str| stats.get(name).map(ToString::to_string).unwrap_or_default();
    let bounds = r#""boundaries": [1, 3600000000000]}"#;
    // All that was written, also what could not be.
    assert_eq!(shown("wr_latency_histogram"), format!("{{\"bins\": [0, 3, 0], {bounds}"));
    assert_eq!(shown("rd_latency_histogram"), format!("{{\"bins\": [0, 3, 0], {bounds}"));
    let flushes = number("flush_operations");
    assert!(flushes > 0);
    let all = format!("{{\"bins\": [{flushes}, 0], \"boundaries\": [3600000000000]}}");
    assert_eq!(shown("flush_latency_histogram"), all);
    let Some(Value::List(timed)) = stats.get("timed_stats") else { panic!("{stats:?}") };
    let [Value::Object(timed)] = &timed[..] else { panic!("{timed:?}") };
    let timed = |name: &str| timed.get(name).and_then(Value::as_u64).unwrap_or_else(|| panic!("{name}"));
    assert_eq!(timed("interval_length"), 3600);
    assert_eq!(timed("avg_rd_latency_ns"), number("rd_total_time_ns") / 3);
    assert_eq!(timed("avg_wr_latency_ns"), number("wr_total_time_ns") / 2);
    assert!(0 < timed("min_rd_latency_ns") && timed("min_rd_latency_ns") <= timed("avg_rd_latency_ns"));
    assert!(timed("avg_rd_latency_ns") <= timed("max_rd_latency_ns"));
}
