//! `-L`: what a server has.

use std::fmt::Write;
use std::io;

use underlay_exports::listen::cannot_connect;
use underlay_nbd::Framing;
use underlay_nbd::handshake::list::{Catalogue, ListHandshake, Listed, Progress};
use underlay_sys::net::{Address, Stream};

/// Names of the transmission flags, by their bits.
const FLAGS: [(u16, &str); 12] = [
    (1, "readonly"),
    (2, "flush"),
    (3, "fua"),
    (4, "rotational"),
    (5, "trim"),
    (6, "zeroes"),
    (7, "df"),
    (8, "multi"),
    (9, "resize"),
    (10, "cache"),
    (11, "fast-zero"),
    (12, "block-status-payload"),
];

/// Connects, asks and prints.
pub async fn run(address: &Address) -> Result<(), String> {
    let stream = Stream::connect(address).await.map_err(|error| cannot_connect(address, &error))?;
    let found = look(&stream).await?;
    let text = shown(&found);
    // Nobody may be reading any more.
    let _ = io::Write::write_all(&mut io::stdout(), text.as_bytes());
    Ok(())
}

async fn look(stream: &Stream) -> Result<Catalogue, String> {
    let mut handshake = ListHandshake::default();
    let mut buffer = vec![0; 64 << 10];
    loop {
        let progress = handshake.step();
        let output = handshake.take_output();
        match progress {
            Progress::NeedBytes => {}
            Progress::Done(found) => {
                // The goodbye is a courtesy.
                let _ = stream.send_all(&output).await;
                return Ok(found);
            }
            Progress::Refused(text, None) => return Err(text),
            Progress::Refused(text, Some(hint)) => return Err(format!("{text}\n{hint}")),
            Progress::Fail(error) => return Err(error.to_string()),
        }
        let what = if handshake.is_at_greeting() { "server magic" } else { "option reply" };
        let lost = |reason: String| format!("Failed to read {what}: {reason}");
        stream.send_all(&output).await.map_err(|error| lost(error.to_string()))?;
        match stream.recv(&mut buffer).await {
            Ok(0) => return Err(lost("Unexpected end-of-file before all data were read".to_owned())),
            Ok(count) => handshake.feed(&buffer[..count]),
            Err(error) => return Err(lost(underlay_exports::listen::reason(&error))),
        }
    }
}

fn shown(found: &Catalogue) -> String {
    let mut text = String::new();
    // Writing to a string does not fail.
    let _ = writeln!(text, "exports available: {}", found.exports.len());
    for export in &found.exports {
        let _ = one(&mut text, export, found.framing);
    }
    text
}

fn one(text: &mut String, export: &Listed, framing: Framing) -> std::fmt::Result {
    writeln!(text, " export: '{}'", export.name)?;
    if !export.description.is_empty() {
        writeln!(text, "  description: {}", export.description)?;
    }
    if let Some((size, flags)) = export.size_and_flags {
        writeln!(text, "  size:  {size}")?;
        let names: Vec<_> =
            FLAGS.iter().filter(|(bit, _)| flags & (1 << bit) != 0).map(|(_, name)| *name).collect();
        writeln!(text, "  flags: 0x{flags:x} ( {} )", names.join(" "))?;
    }
    if let Some((minimum, preferred, maximum)) = export.blocks {
        writeln!(text, "  min block: {minimum}\n  opt block: {preferred}\n  max block: {maximum}")?;
    }
    let bits = if framing == Framing::Extended { 64 } else { 32 };
    writeln!(text, "  transaction size: {bits}-bit")?;
    if !export.contexts.is_empty() {
        writeln!(text, "  available meta contexts: {}", export.contexts.len())?;
    }
    export.contexts.iter().try_for_each(|context| writeln!(text, "   {context}"))
}
