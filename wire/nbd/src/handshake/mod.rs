//! The handshake: each half is a state machine that takes bytes and gives bytes and events.

pub mod client;
pub mod list;
pub mod server;

/// The largest option or answer payload that is kept, in bytes. Longer ones are skipped and refused.
pub(crate) const MAX_KEPT: usize = 256 << 10;
/// The largest option or answer payload that is even skipped, in bytes; QEMU's limit.
pub(crate) const MAX_SKIPPED: u32 = 32 << 20;

#[cfg(test)]
mod tests {
    use super::client::{ClientHandshake, Progress, Wish};
    use super::list::{self, ListHandshake};
    use super::server::{Ask, ServerHandshake, Step};
    use crate::options::ExportInfo;
    use crate::{Framing, flags};

    fn export() -> ExportInfo {
        ExportInfo {
            name: "disk".into(),
            description: "a disk".into(),
            size: 1 << 20,
            flags: flags::HAS_FLAGS | flags::SEND_FLUSH,
            minimum_block: 512,
            preferred_block: 4096,
            maximum_block: 32 << 20,
            contexts: vec!["base:allocation".into(), "qemu:allocation-depth".into()],
        }
    }

    fn serve(server: &mut ServerHandshake) -> Step {
        loop {
            match server.step() {
                Step::Ask(Ask::List) => server.answer_list(&[("disk".into(), "a disk".into())]),
                Step::Ask(Ask::Export(name)) => {
                    let export = export();
                    server.answer_export((name == export.name).then_some(&export));
                }
                other => return other,
            }
        }
    }

    /// Both halves against each other, a few bytes at a time.
    fn meet(wish: Wish) -> (Progress, Step) {
        let mut server = ServerHandshake::new();
        let mut client = ClientHandshake::new(wish);
        loop {
            for byte in server.take_output().chunks(7) {
                client.feed(byte);
            }
            let told = client.step();
            for byte in client.take_output().chunks(5) {
                server.feed(byte);
            }
            let answer = serve(&mut server);
            if !matches!(told, Progress::NeedBytes) {
                return (told, answer);
            }
            assert!(!matches!(answer, Step::Fail(_)), "{answer:?}");
        }
    }

    #[test]
    fn both_halves_agree() {
        let contexts = vec!["qemu:allocation-depth".to_owned(), "x:y".to_owned()];
        for framing in [Framing::Simple, Framing::Structured, Framing::Extended] {
            let wish = Wish { export: "disk".into(), framing, contexts: contexts.clone(), ..Wish::default() };
            let (Progress::Done(client), Step::Done(server)) = meet(wish) else { panic!("{framing:?}") };
            assert_eq!(client.framing, framing);
            assert_eq!(server.framing, framing);
            assert_eq!(client.size, 1 << 20);
            assert_eq!(server.name, "disk");
            assert_eq!(client.minimum_block, 512);
            let df = client.flags & flags::SEND_DF != 0;
            assert_eq!(df, framing != Framing::Simple);
            assert_eq!(client.contexts.len(), usize::from(framing != Framing::Simple));
            assert_eq!(client.contexts, server.contexts);
        }
    }

    #[test]
    fn an_unknown_export_is_told() {
        let (told, _) = meet(Wish { export: "nope".into(), framing: Framing::Extended, ..Wish::default() });
        let Progress::Refused(text) = told else { panic!("{told:?}") };
        assert_eq!(text, "export 'nope' not present");
    }

    #[test]
    fn exports_are_listed() {
        let (told, _) = meet(Wish { list: true, ..Wish::default() });
        let Progress::Listed(list) = told else { panic!("{told:?}") };
        assert_eq!(list, [("disk".to_owned(), "a disk".to_owned())]);
    }

    /// A server that is asked for everything it has.
    fn look() -> list::Progress {
        let mut server = ServerHandshake::new();
        let mut client = ListHandshake::default();
        loop {
            for bytes in server.take_output().chunks(7) {
                client.feed(bytes);
            }
            let told = client.step();
            for bytes in client.take_output().chunks(5) {
                server.feed(bytes);
            }
            let answer = serve(&mut server);
            if told != list::Progress::NeedBytes {
                assert_eq!(answer, Step::Abort, "it says goodbye");
                return told;
            }
        }
    }

    #[test]
    fn a_catalogue_has_all_that_the_server_tells() {
        let list::Progress::Done(found) = look() else { panic!("refused") };
        assert_eq!(found.framing, Framing::Extended);
        let expected = list::Listed {
            name: "disk".into(),
            description: "a disk".into(),
            size_and_flags: Some((1 << 20, found.exports[0].size_and_flags.unwrap().1)),
            blocks: Some((512, 4096, 32 << 20)),
            contexts: vec!["base:allocation".into(), "qemu:allocation-depth".into()],
        };
        assert_eq!(found.exports, [expected]);
    }

    #[test]
    fn an_oldstyle_server_has_one_export_without_a_name() {
        let mut client = ListHandshake::default();
        client.feed(b"NBDMAGIC\x00\x00\x42\x02\x81\x86\x12\x53");
        client.feed(&(1_u64 << 20).to_be_bytes());
        assert_eq!(client.step(), list::Progress::NeedBytes);
        client.feed(&[0, 0, 0, 3]);
        let list::Progress::Done(found) = client.step() else { panic!("refused") };
        assert_eq!(found.framing, Framing::Simple);
        assert_eq!(found.exports[0].size_and_flags, Some((1 << 20, 3)));
    }

    #[test]
    fn a_list_without_end_is_not_listened_to() {
        let mut client = ListHandshake::default();
        client.feed(&ServerHandshake::new().take_output());
        client.step();
        let answer = |option: u32, kind: u32, payload: &[u8]| {
            let mut bytes = crate::options::ANSWER_MAGIC.to_be_bytes().to_vec();
            bytes.extend(option.to_be_bytes());
            bytes.extend(kind.to_be_bytes());
            bytes.extend(u32::try_from(payload.len()).unwrap().to_be_bytes());
            bytes.extend(payload);
            bytes
        };
        client.feed(&answer(crate::options::EXTENDED_HEADERS, crate::options::REP_ACK, &[]));
        assert_eq!(client.step(), list::Progress::NeedBytes);
        let mut export = 60_000_u32.to_be_bytes().to_vec();
        export.resize(60_004, b'x');
        let export = answer(crate::options::LIST, crate::options::REP_SERVER, &export);
        let fed = (0..1000).find(|_| {
            client.feed(&export);
            matches!(client.step(), list::Progress::Fail(_))
        });
        assert!(fed.is_some(), "it must end");
    }

    #[test]
    fn random_bytes_do_no_harm() {
        let mut state = 88_172_645_463_325_252_u64;
        let mut random = move || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state
        };
        for round in 0..2000 {
            let mut server = ServerHandshake::new();
            let mut client = ClientHandshake::new(Wish { framing: Framing::Extended, ..Wish::default() });
            let mut looker = ListHandshake::default();
            server.feed(&[0, 0, 0, 3]);
            client.feed(&ServerHandshake::new().take_output());
            looker.feed(&ServerHandshake::new().take_output());
            for _ in 0..20 {
                // Half of the time a sound head with random insides.
                let mut bytes = Vec::new();
                let len = u32::try_from(random() % 40).unwrap();
                if round % 2 == 0 {
                    bytes.extend(crate::options::OPTION_MAGIC.to_be_bytes());
                    bytes.extend(u32::try_from(random() % 14).unwrap().to_be_bytes());
                    bytes.extend(len.to_be_bytes());
                }
                bytes.extend((0..len).map(|_| if random() % 3 == 0 { random().to_be_bytes()[0] } else { 0 }));
                server.feed(&bytes);
                serve(&mut server);
                client.feed(&bytes);
                client.step();
                looker.feed(&bytes);
                looker.step();
            }
        }
    }
}
