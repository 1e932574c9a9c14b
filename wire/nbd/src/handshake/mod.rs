//! The handshake: each half is a state machine that takes bytes and gives bytes and events.

pub mod client;
pub mod server;

/// The largest option or answer payload that is kept, in bytes. Longer ones are skipped and refused.
pub(crate) const MAX_KEPT: usize = 256 << 10;
/// The largest option or answer payload that is even skipped, in bytes; QEMU's limit.
pub(crate) const MAX_SKIPPED: u32 = 32 << 20;

#[cfg(test)]
mod tests {
    use super::client::{ClientHandshake, Progress, Wish};
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
            server.feed(&[0, 0, 0, 3]);
            client.feed(&ServerHandshake::new().take_output());
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
            }
        }
    }
}
