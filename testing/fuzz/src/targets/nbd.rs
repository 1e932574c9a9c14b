//! Both halves of NBD against a stranger on the other side. The first byte of an input chooses what is wished for and
//! in what pieces the rest comes.

use underlay_nbd::handshake::client::{ClientHandshake, Progress, Wish};
use underlay_nbd::handshake::server::{Ask, ServerHandshake, Step};
use underlay_nbd::transmission::{Payload, Reply, Request, command};
use underlay_nbd::{ExportInfo, Framing, MAX_PAYLOAD};

/// Output per byte of input: the largest answer is that to the smallest option, LIST.
const OUTPUT: usize = 1 << 16;

fn export(name: &str) -> ExportInfo {
    ExportInfo {
        name: name.to_owned(),
        description: "a disk".to_owned(),
        size: 1 << 30,
        flags: 0x4ff,
        minimum_block: 1,
        preferred_block: 4096,
        maximum_block: MAX_PAYLOAD,
        contexts: vec!["base:allocation".to_owned(), "qemu:allocation-depth".to_owned()],
    }
}

/// The server's half: a handshake, then requests.
pub fn server(data: &[u8]) {
    let Some((&choice, data)) = data.split_first() else { return };
    let mut machine = ServerHandshake::new();
    let mut sent = 0;
    let size = 1 + usize::from(choice % 32);
    let mut pieces = data.chunks(size);
    let agreed = loop {
        match machine.step() {
            Step::NeedBytes => match pieces.next() {
                Some(piece) => machine.feed(piece),
                None => return,
            },
            Step::Ask(Ask::List) => machine.answer_list(&[("disk".to_owned(), "a disk".to_owned())]),
            Step::Ask(Ask::Export(name)) => {
                machine.answer_export((name != "none").then(|| export(&name)).as_ref());
            }
            Step::Done(agreed) => break agreed,
            Step::Abort | Step::Fail(_) => return,
        }
        sent += machine.take_output().len();
        assert!(sent <= OUTPUT * (data.len() + 1), "{sent} bytes sent in answer to {}", data.len());
    };
    let rest: Vec<u8> = machine.into_rest().into_iter().chain(pieces.flatten().copied()).collect();
    let mut rest = rest.as_slice();
    while let Ok(Some(request)) = Request::parse(agreed.framing, rest) {
        let payload = request.payload_len(agreed.framing);
        let used = usize::try_from(payload)
            .ok()
            .and_then(|payload| payload.checked_add(Request::header_len(agreed.framing)));
        let Some(next) = used.and_then(|used| rest.get(used..)) else { return };
        rest = next;
    }
}

/// The client's half: a handshake, then replies.
pub fn client(data: &[u8]) {
    let Some((&choice, data)) = data.split_first() else { return };
    let wish = Wish {
        export: "disk".to_owned(),
        framing: [Framing::Simple, Framing::Structured, Framing::Extended][usize::from(choice % 3)],
        contexts: vec!["base:allocation".to_owned()],
        list: choice & 0x40 != 0,
    };
    let mut machine = ClientHandshake::new(wish);
    let mut pieces = data.chunks(1 + usize::from(choice % 16));
    let granted = loop {
        let progress = machine.step();
        machine.take_output();
        match progress {
            Progress::NeedBytes => match pieces.next() {
                Some(piece) => machine.feed(piece),
                None => return,
            },
            Progress::Done(granted) => break granted,
            Progress::Listed(_) | Progress::Refused(_) | Progress::Fail(_) => return,
        }
    };
    let rest: Vec<u8> = machine.into_rest().into_iter().chain(pieces.flatten().copied()).collect();
    let mut rest = rest.as_slice();
    while let Ok(Some((reply, used))) = Reply::parse(granted.framing, rest) {
        rest = &rest[used..];
        let Reply::Chunk(chunk) = reply else { continue };
        let Some(payload) = usize::try_from(chunk.length).ok().and_then(|len| rest.get(..len)) else {
            return;
        };
        let _ = Payload::parse(chunk.kind, payload);
        rest = &rest[payload.len()..];
    }
}

fn option(option: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).unwrap_or(0);
    [b"IHAVEOPT".as_slice(), &option.to_be_bytes(), &length.to_be_bytes(), payload].concat()
}

/// Clients that are fine: the old way, GO, listing, with requests behind.
pub fn seeds_of_clients() -> Vec<Vec<u8>> {
    let flags = [9u8, 0, 0, 0, 3];
    let name = [&4u32.to_be_bytes(), b"disk".as_slice()].concat();
    let go = [name.as_slice(), &1u16.to_be_bytes(), &3u16.to_be_bytes()].concat();
    let contexts = [name.as_slice(), &1u32.to_be_bytes(), &15u32.to_be_bytes(), b"base:allocation"].concat();
    let requests = |framing| {
        let mut out = Vec::new();
        for (command, length) in
            [(command::READ, 4096), (command::BLOCK_STATUS, 1 << 20), (command::TRIM, 512)]
        {
            let request = Request { command, cookie: 7, offset: 4096, length, ..Request::default() };
            request.encode(framing, &mut out).unwrap_or_default();
        }
        let write = Request { command: command::WRITE, length: 4, ..Request::default() };
        write.encode(framing, &mut out).unwrap_or_default();
        [out.as_slice(), b"data"].concat()
    };
    vec![
        [flags.as_slice(), &option(1, b"disk"), &requests(Framing::Simple)].concat(),
        [
            flags.as_slice(),
            &option(8, &[]),
            &option(10, &contexts),
            &option(7, &go),
            &requests(Framing::Structured),
        ]
        .concat(),
        [
            flags.as_slice(),
            &option(11, &[]),
            &option(10, &contexts),
            &option(7, &go),
            &requests(Framing::Extended),
        ]
        .concat(),
        [
            flags.as_slice(),
            &option(3, &[]),
            &option(6, &go),
            &option(9, &contexts),
            &option(5, &[]),
            &option(2, &[]),
        ]
        .concat(),
    ]
}

/// What our own server answers to clients that are fine.
pub fn seeds_of_servers() -> Vec<Vec<u8>> {
    let mut all = Vec::new();
    for (choice, framing) in [(0u8, Framing::Simple), (1, Framing::Structured), (2, Framing::Extended)] {
        for list in [false, true] {
            let contexts = vec!["base:allocation".to_owned()];
            let mut client =
                ClientHandshake::new(Wish { export: "disk".to_owned(), framing, contexts, list });
            let mut server = ServerHandshake::new();
            let mut said = vec![choice | if list { 0x40 } else { 0 }];
            // They come to an end long before that.
            for _ in 0..100 {
                match server.step() {
                    Step::Ask(Ask::List) => server.answer_list(&[("disk".to_owned(), String::new())]),
                    Step::Ask(Ask::Export(name)) => server.answer_export(Some(&export(&name))),
                    _ => {}
                }
                let output = server.take_output();
                client.feed(&output);
                said.extend(output);
                client.step();
                server.feed(&client.take_output());
            }
            // Replies: an error without text, and the end.
            said.extend([
                0x66, 0x8e, 0x33, 0xef, 0, 1, 0x80, 1, 0, 0, 0, 0, 0, 0, 0, 7, 0, 0, 0, 6, 0, 0, 0, 5, 0, 0,
            ]);
            all.push(said);
        }
    }
    all
}
