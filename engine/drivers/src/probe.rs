//! What format an image has, told from its first bytes when nobody said.

use underlay_graph::{ByteRange, Cx, Result};
use underlay_sys::Iov;

/// How many bytes are looked at.
const LOOK: u64 = 512;

/// Formats that QEMU knows by their first bytes and we do not open. Guessing "raw" for them would show a guest the
/// container instead of its content.
const FOREIGN: [(&[u8], usize, &str); 11] = [
    (b"QED\0", 0, "qed"),
    (b"KDMV", 0, "vmdk"),
    (b"COWD", 0, "vmdk"),
    (b"# Disk DescriptorFile", 0, "vmdk"),
    (b"vhdxfile", 0, "vhdx"),
    (b"conectix", 0, "vpc"),
    (b"\x7f\x10\xda\xbe", 64, "vdi"),
    (b"WithoutFreeSpace", 0, "parallels"),
    (b"WithouFreSpacExt", 0, "parallels"),
    (b"LUKS\xba\xbe", 0, "luks"),
    (b"Bochs Virtual HD Image", 0, "bochs"),
];

/// The name of the format that the bytes of `file` are in: `qcow2`, the name of a format that we do not have, or
/// `raw` when nothing else fits.
pub async fn probe(file: &Cx<'_>) -> Result<&'static str> {
    let length = file.length().min(LOOK);
    let range = ByteRange::between(0, length);
    let bytes = Iov::zeroed(range.buffer_len());
    file.read(range, bytes.clone()).await?;
    Ok(guess(&bytes.to_vec()))
}

/// See [`probe`]; `first` are the first bytes of the file.
pub fn guess(first: &[u8]) -> &'static str {
    if let [b'Q', b'F', b'I', 0xfb, version @ ..] = first {
        let version = version.first_chunk().map_or(0, |bytes| u32::from_be_bytes(*bytes));
        return match version {
            0 => "raw",
            1 => "qcow",
            _ => "qcow2",
        };
    }
    let foreign =
        FOREIGN.iter().find(|(magic, at, _)| first.get(*at..).is_some_and(|rest| rest.starts_with(magic)));
    foreign.map_or("raw", |(_, _, name)| name)
}

#[cfg(test)]
mod tests {
    use super::guess;

    #[test]
    fn formats_are_told_by_their_magic() {
        assert_eq!(guess(b"QFI\xfb\0\0\0\x03"), "qcow2");
        assert_eq!(guess(b"QFI\xfb\0\0\0\x01"), "qcow");
        assert_eq!(guess(b"QFI\xfb\0\0\0\0"), "raw");
        assert_eq!(guess(b"KDMV...."), "vmdk");
        assert_eq!(guess(b"LUKS\xba\xbe\0\x01"), "luks");
        assert_eq!(guess(b""), "raw");
        assert_eq!(guess(&[0; 512]), "raw");
    }
}
