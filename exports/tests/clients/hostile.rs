//! Clients that do not keep to the protocol, and errors of those that do.

use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;

use underlay_nbd::transmission::command;
use underlay_nbd::{Errno, flags};

use crate::{SIZE, World, impatient, pattern};

const LENGTH: u64 = SIZE as u64;

fn fails(world: &World, export: &str, what: u16, flags: u16, offset: u64, length: u64) -> Errno {
    let mut client = world.client(export).expect("connects");
    let data =
        if what == command::WRITE { vec![1; usize::try_from(length).unwrap_or(0)] } else { Vec::new() };
    client.submit(what, flags, offset, length, &data).expect("queued");
    let error = client.complete().expect("a reply").error.expect("an error").0;
    // The connection is as good as before.
    client.read(0, 512).expect("goes on");
    error
}

#[test]
fn errors_are_those_of_qemu() {
    let world = World::new();
    let disk = |what, flags, offset, length| fails(&world, "disk", what, flags, offset, length);
    assert_eq!(disk(command::READ, 0, LENGTH, 512), Errno::EINVAL);
    assert_eq!(disk(command::READ, 0, u64::MAX, 512), Errno::EINVAL);
    assert_eq!(disk(command::READ, 0, 0, (32 << 20) + 1), Errno::EINVAL);
    assert_eq!(disk(command::WRITE, 0, LENGTH - 511, 512), Errno::EINVAL);
    assert_eq!(disk(command::WRITE_ZEROES, 0, LENGTH, 512), Errno::EINVAL);
    assert_eq!(disk(command::WRITE_ZEROES, 0, u64::MAX - 3, 4096), Errno::EINVAL);
    assert_eq!(disk(command::TRIM, 0, LENGTH, 512), Errno::EINVAL);
    assert_eq!(disk(command::BLOCK_STATUS, 0, LENGTH, 512), Errno::EINVAL);
    assert_eq!(disk(command::BLOCK_STATUS, 0, 0, 0), Errno::EINVAL);
    assert_eq!(disk(command::READ, flags::CMD_NO_HOLE, 0, 512), Errno::EINVAL);
    assert_eq!(disk(77, 0, 0, 512), Errno::EINVAL);
    assert_eq!(disk(command::WRITE_ZEROES, flags::CMD_FAST_ZERO, 0, 512), Errno::ENOTSUP);
    for what in [command::WRITE, command::WRITE_ZEROES, command::TRIM] {
        assert_eq!(fails(&world, "ro", what, 0, 0, 512), Errno::EINVAL);
    }
}

#[test]
fn noise_hurts_only_who_makes_it() {
    let world = World::with(impatient(), false);
    let mut bystander = world.client("disk").expect("connects");
    bystander.write(0, &[7; 4096], 0).expect("written");
    for seed in 1..60 {
        let mut socket = UnixStream::connect(world.socket()).expect("connects");
        let mut noise = vec![0, 0, 0, 3];
        if seed % 2 == 0 {
            // A sound EXPORT_NAME first, so that the noise is taken for requests.
            noise.extend(b"IHAVEOPT");
            noise.extend([0, 0, 0, 1, 0, 0, 0, 4]);
            noise.extend(b"disk");
        }
        if seed % 4 == 0 {
            // A sound magic number and a command as well.
            noise.extend(0x2560_9513_u32.to_be_bytes());
            noise.extend([0, 0, 0, u8::try_from(seed % 9).expect("small")]);
        }
        noise.extend(pattern(2000, seed));
        // It may have been thrown out already.
        let _ = socket.write_all(&noise);
        let _ = socket.shutdown(std::net::Shutdown::Write);
        let _ = socket.read_to_end(&mut Vec::new());
        assert_eq!(bystander.read(0, 1).expect("undisturbed").len(), 1);
    }
}

#[test]
fn who_stalls_in_the_handshake_is_dropped() {
    let world = World::with(impatient(), false);
    let mut client = world.client("disk").expect("connects");
    let mut stalled = UnixStream::connect(world.socket()).expect("connects");
    let mut greeting = Vec::new();
    stalled.read_to_end(&mut greeting).expect("closed by the server");
    assert_eq!(greeting.len(), 18);
    client.read(0, 512).expect("who is done with the handshake stays");
}

#[test]
fn a_payload_beyond_all_limits_ends_the_connection() {
    let world = World::new();
    let mut client = world.client("disk").expect("connects");
    client.submit(command::WRITE, flags::CMD_PAYLOAD_LEN, 0, u64::MAX, &[]).expect("queued");
    let ended = match client.complete() {
        Ok(done) => done.error.map(|(error, _)| error) == Some(Errno::EINVAL) && client.read(0, 512).is_err(),
        Err(_) => true,
    };
    assert!(ended);
    world.client("disk").and_then(|mut other| other.read(0, 512)).expect("others are served");
}

#[test]
fn who_does_not_read_replies_hurts_nobody_else() {
    let world = World::new();
    let mut writer = world.client("disk").expect("connects");
    writer.write(0, &pattern(1 << 20, 9), 0).expect("written");
    let mut lazy = world.client("disk").expect("connects");
    for _ in 0..500 {
        lazy.submit(command::READ, 0, 0, 1 << 20, &[]).expect("queued");
    }
    lazy.send().expect("requests are small");
    // Both threads still serve.
    for _ in 0..4 {
        world.client("ro").and_then(|mut other| other.read(0, 512)).expect("served");
    }
    assert_eq!(lazy.complete().expect("late, but there").data.len(), 1 << 20);
}

#[test]
fn who_sends_everything_before_reading_anything_is_served() {
    let world = World::new();
    let mut client = world.client("disk").expect("connects");
    // More than what sockets hold, both ways.
    let data = pattern(1 << 20, 3);
    client.write(0, &data, 0).expect("written");
    for _ in 0..8 {
        client.submit(command::READ, 0, 0, 1 << 20, &[]).expect("queued");
        client.submit(command::WRITE, 0, 4 << 20, 1 << 20, &data).expect("queued");
    }
    client.send().expect("the server goes on reading");
    while client.in_flight() > 0 {
        assert_eq!(client.complete().expect("a reply").error, None);
    }
    assert_eq!(client.read(4 << 20, 1 << 20).expect("goes on"), data);
}
