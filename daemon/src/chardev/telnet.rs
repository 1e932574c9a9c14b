//! Telnet's commands among the bytes of a connection. Source: RFC 854 (commands), 856 (binary), 857 (echo), 858 (go
//! ahead).

const IAC: u8 = 255;
/// Begins a negotiation, up to `IAC SE`.
const SB: u8 = 250;
const SE: u8 = 240;

/// What a server says first: it echoes, holds nothing back and sends and takes any byte. The reference's words.
pub const HELLO: [u8; 12] = [IAC, 251, 1, IAC, 251, 3, IAC, 251, 0, IAC, 253, 0];

/// Takes the commands out of what comes in, wherever it is cut.
#[derive(Debug, Default)]
pub enum Filter {
    /// Among data.
    #[default]
    Data,
    /// Behind `IAC`.
    Command,
    /// Before the name of an option.
    Option,
    /// In a negotiation.
    Negotiation,
    /// In a negotiation, behind `IAC`.
    NegotiationCommand,
}

impl Filter {
    /// Leaves the data at the beginning of `bytes`; how many bytes that are.
    pub fn strip(&mut self, bytes: &mut [u8]) -> usize {
        let mut kept = 0;
        for at in 0..bytes.len() {
            let byte = bytes[at];
            if self.keeps(byte) {
                bytes[kept] = byte;
                kept += 1;
            }
        }
        kept
    }

    fn keeps(&mut self, byte: u8) -> bool {
        let (next, keeps) = match (&self, byte) {
            (Self::Data, IAC) => (Self::Command, false),
            (Self::Data, _) => (Self::Data, true),
            (Self::Command, IAC) => (Self::Data, true),
            (Self::Command, SB) => (Self::Negotiation, false),
            // WILL, WON'T, DO, DON'T
            (Self::Command, 251..=254) => (Self::Option, false),
            (Self::Command | Self::Option, _) | (Self::NegotiationCommand, SE) => (Self::Data, false),
            (Self::Negotiation, IAC) => (Self::NegotiationCommand, false),
            (Self::Negotiation | Self::NegotiationCommand, _) => (Self::Negotiation, false),
        };
        *self = next;
        keeps
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_go_and_data_stays_wherever_it_is_cut() {
        let input =
            b"\xff\xfd\x01{\"a\xff\xffb\xff\xfb\x00\": \xff\xfa\x18\x01\xff\xff\xff\xf01\xff\xf6}\r\n";
        let data = b"{\"a\xffb\": 1}\r\n";
        for size in 1..=input.len() {
            let mut filter = Filter::default();
            let mut heard = Vec::new();
            for piece in input.chunks(size) {
                let mut piece = piece.to_vec();
                let kept = filter.strip(&mut piece);
                heard.extend_from_slice(&piece[..kept]);
            }
            assert_eq!(heard, data, "pieces of {size}");
        }
    }
}
