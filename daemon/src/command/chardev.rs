//! Character devices: chardev-add, chardev-change, chardev-remove, query-chardev, ringbuf-write, ringbuf-read.

use underlay_qmp::json::{Object, Value};

use super::arguments::Arguments;
use crate::chardev::{KINDS, ring};
use crate::error::{CommandError, CommandResult};
use crate::state::Daemon;

/// What is asked about character devices.
pub fn query(daemon: &Daemon, command: &str) -> Option<Value> {
    match command {
        "query-chardev" => Some(daemon.chardevs.query()),
        "query-chardev-backends" => {
            let kinds = KINDS.iter().map(|kind| Object::new().with("name", *kind).into());
            Some(Value::List(kinds.collect()))
        }
        _ => None,
    }
}

/// What changes them. `None`: something else.
pub async fn change(
    daemon: &Daemon,
    command: &str,
    arguments: &mut Arguments,
) -> Option<CommandResult<Value>> {
    let nothing = |()| Object::new().into();
    Some(match command {
        "chardev-add" | "chardev-change" => {
            let id = arguments.text("id");
            let backend = arguments.object("backend").unwrap_or_else(|| Arguments::new(Object::new()));
            let done = match command {
                "chardev-add" => daemon.chardevs.add_live(&id, backend).await,
                _ => daemon.chardevs.change(&id, backend).await,
            };
            done.map(|pty| pty.map_or_else(Object::new, |pty| Object::new().with("pty", pty)).into())
        }
        "chardev-remove" => daemon.chardevs.remove(&arguments.text("id")).map(nothing),
        "chardev-send-break" => daemon.chardevs.send_break(&arguments.text("id")).map(nothing),
        "ringbuf-write" => ringbuf_write(daemon, arguments).map(nothing),
        "ringbuf-read" => ringbuf_read(daemon, arguments),
        _ => return None,
    })
}

fn is_base64(arguments: &mut Arguments) -> bool {
    arguments.optional_text("format").as_deref() == Some("base64")
}

fn ringbuf_write(daemon: &Daemon, arguments: &mut Arguments) -> CommandResult<()> {
    let ring = daemon.chardevs.ring(&arguments.text("device"))?;
    let text = arguments.text("data");
    let bytes = if is_base64(arguments) { ring::from_base64(&text) } else { Some(text.into_bytes()) };
    ring.write(&bytes.ok_or_else(|| CommandError::new("Base64 data contains invalid characters"))?);
    Ok(())
}

fn ringbuf_read(daemon: &Daemon, arguments: &mut Arguments) -> CommandResult<Value> {
    let ring = daemon.chardevs.ring(&arguments.text("device"))?;
    let size = usize::try_from(arguments.number("size", 0)).unwrap_or(0);
    if size == 0 {
        return Err(CommandError::new("size must be greater than zero"));
    }
    let bytes = ring.read(size);
    Ok(Value::Str(if is_base64(arguments) { ring::to_base64(&bytes) } else { ring::to_text(&bytes) }))
}
