//! Exports that go, and limits on clients.

use std::sync::mpsc;
use std::time::Duration;

use underlay_nbd::transmission::command;
use underlay_sys::thread::block_on;

use crate::{ServerOptions, World, pattern};

#[test]
fn a_used_export_goes_only_the_hard_way() {
    let world = World::with(ServerOptions::default(), true);
    let mut client = world.client("disk").expect("connects");
    client.write(0, &pattern(4096, 3), 0).expect("written");
    let refused = world.server.remove("disk", false).expect_err("a client is connected");
    assert_eq!(refused.to_string(), "export 'id-disk' still in use");
    assert!(client.read(0, 4096).is_ok(), "a refusal changes nothing");
    let gone = world.server.remove("disk", true).expect("it is there");
    block_on(gone.wait());
    assert!(client.read(0, 4096).is_err(), "disconnected");
    assert!(world.client("disk").is_err(), "not found any more");
    let missing = world.server.remove("disk", false).err().map(|error| error.to_string());
    assert_eq!(missing.as_deref(), Some("Export 'disk' is not found"));
    world.client("ro").and_then(|mut other| other.read(0, 512)).expect("the other one lives on");
}

#[test]
fn an_unused_export_goes_at_once() {
    let world = World::new();
    let mut client = world.client("ro").expect("connects");
    block_on(world.server.remove("disk", false).expect("nobody uses it").wait());
    client.read(0, 512).expect("the other one lives on");
}

#[test]
fn stopping_frees_the_address() {
    let world = World::new();
    let mut client = world.client("disk").expect("connects");
    block_on(world.server.stop());
    assert!(client.read(0, 512).is_err(), "disconnected");
    assert!(!world.socket().exists(), "the socket is gone");
}

#[test]
fn requests_under_way_end_well_after_a_goodbye() {
    let world = World::with(ServerOptions::default(), true);
    let mut client = world.client("disk").expect("connects");
    for block in 0..64 {
        client.submit_write(block * 4096, &vec![7; 4096]).expect("queued");
    }
    client.disconnect().expect("sent");
    // The export is gone only when all of that is done.
    let gone = world.server.remove("disk", true).expect("it is there");
    block_on(gone.wait());
    let mut other = world.client("ro").expect("connects");
    // The goodbye may have met the removal half way; whole writes only.
    let bytes = other.read(0, 64 * 4096).expect("read");
    assert!(bytes.chunks(4096).all(|block| block.iter().all(|byte| *byte == block[0])));
}

#[test]
fn one_client_too_many_waits_for_its_turn() {
    let world = World::with(ServerOptions { max_connections: 1, ..ServerOptions::default() }, false);
    let first = world.client("disk").expect("connects");
    assert_eq!(first.negotiated().flags & underlay_nbd::flags::CAN_MULTI_CONN, 0);
    let (sender, receiver) = mpsc::channel();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            sender.send(world.client("disk").and_then(|mut second| second.read(0, 512))).expect("heard");
        });
        assert!(receiver.recv_timeout(Duration::from_millis(20)).is_err(), "served beside the first");
        first.disconnect().expect("sent");
        receiver.recv().expect("told").expect("served after the first");
    });
}

#[test]
fn replies_come_for_every_request_in_a_flood() {
    let world = World::with(ServerOptions::default(), true);
    let mut client = world.client("disk").expect("connects");
    let data = pattern(96 << 10, 5);
    client.write(0, &data, 0).expect("written");
    // More than may be under way, of all sizes, sent before any reply is read.
    for round in 0..2000_u32 {
        let at = u64::from(round % 64) * 1024;
        client.submit(command::READ, 0, at, u64::from(512 + round % 7 * 512), &[]).expect("queued");
    }
    let mut seen = 0;
    while client.in_flight() > 0 {
        let done = client.complete().expect("a reply");
        assert_eq!(done.error, None);
        let at = usize::try_from((done.cookie - 2) % 64 * 1024).expect("small");
        assert_eq!(done.data, data[at..at + done.data.len()], "cookie {}", done.cookie);
        seen += 1;
    }
    assert_eq!(seen, 2000);
}
