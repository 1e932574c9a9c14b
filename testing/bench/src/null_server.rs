//! An NBD server that does nothing: what the client alone can do against it is the limit of every guest row.

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;

use underlay_nbd::handshake::server::Ask;
use underlay_nbd::transmission::{Chunks, command};
use underlay_nbd::{ExportInfo, Framing, Request, ServerHandshake, Step, flags};

use crate::measure::Outcome;

/// Serves as many clients as come, each on a thread, until the program ends.
pub fn start(path: &Path, size: u64) -> Outcome<()> {
    let listener = UnixListener::bind(path)?;
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            // Clients just go away at the end.
            std::thread::spawn(move || serve(stream, size).is_ok());
        }
    });
    Ok(())
}

fn serve(mut stream: UnixStream, size: u64) -> Outcome<()> {
    let (mut input, mut output) = (Vec::new(), Vec::new());
    let mut buffer = vec![0; 256 << 10];
    let agreed = {
        let mut handshake = ServerHandshake::new();
        loop {
            match handshake.step() {
                Step::NeedBytes => {
                    stream.write_all(&handshake.take_output())?;
                    let got = stream.read(&mut buffer)?;
                    handshake.feed(&buffer[..got]);
                    if got == 0 {
                        return Ok(());
                    }
                }
                Step::Ask(Ask::List) => handshake.answer_list(&[]),
                Step::Ask(Ask::Export(name)) => handshake.answer_export(Some(&export(name, size))),
                Step::Done(agreed) => {
                    stream.write_all(&handshake.take_output())?;
                    input.extend(handshake.into_rest());
                    break agreed;
                }
                Step::Abort | Step::Fail(_) => return Ok(()),
            }
        }
    };
    loop {
        let mut used = 0;
        while let Some(request) = Request::parse(agreed.framing, &input[used..])? {
            let whole = Request::header_len(agreed.framing) as u64 + request.payload_len(agreed.framing);
            let whole = usize::try_from(whole)?;
            if input.len() - used < whole {
                break;
            }
            used += whole;
            answer(agreed.framing, &request, &mut output)?;
        }
        input.drain(..used);
        stream.write_all(&output)?;
        output.clear();
        match stream.read(&mut buffer)? {
            0 => return Ok(()),
            got => input.extend(&buffer[..got]),
        }
    }
}

fn export(name: String, size: u64) -> ExportInfo {
    ExportInfo {
        name,
        description: String::new(),
        size,
        flags: flags::HAS_FLAGS | flags::CAN_MULTI_CONN,
        minimum_block: 1,
        preferred_block: 4096,
        maximum_block: 32 << 20,
        contexts: Vec::new(),
    }
}

fn answer(framing: Framing, request: &Request, output: &mut Vec<u8>) -> Outcome<()> {
    let chunks = Chunks { framing, cookie: request.cookie, offset: request.offset };
    if request.command != command::READ {
        chunks.none(output);
        return Ok(());
    }
    let length = u32::try_from(request.length)?;
    chunks.data(true, request.offset, length, output);
    output.resize(output.len() + usize::try_from(length)?, 0);
    Ok(())
}
