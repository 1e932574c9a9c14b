//! Turning clusters into compressed bytes and back.
//!
//! Deflate is raw (no zlib header) with a window of 4 KiB: QEMU's reader accepts no larger one. zstd data is one or
//! more frames. In both the compressed bytes may be followed by anything up to the end of their last sector.

use std::sync::Arc;

use flate2::{Compress, Decompress, FlushCompress, FlushDecompress, Status};
use underlay_graph::{IoError, Result};
use zstd::stream::raw::{Decoder, InBuffer, Operation, OutBuffer};

use crate::header::Compression;

/// log2 of deflate's window.
const WINDOW_BITS: u8 = 12;

/// The last cluster that was decompressed, by the entry that leads to it.
#[derive(Clone, Debug)]
pub struct Decoded {
    pub(crate) word: u64,
    pub(crate) bytes: Arc<[u8]>,
}

/// Compresses a cluster. `None` when that would not make it smaller.
pub fn compress(how: Compression, cluster: &[u8]) -> Result<Option<Vec<u8>>> {
    let failed = || IoError::EIO.with("A cluster could not be compressed");
    match how {
        Compression::Zlib => {
            let mut out = Vec::with_capacity(cluster.len() - 1);
            let mut deflate =
                Compress::new_with_window_bits(flate2::Compression::default(), false, WINDOW_BITS);
            match deflate.compress_vec(cluster, &mut out, FlushCompress::Finish) {
                Ok(Status::StreamEnd) => Ok(Some(out)),
                Ok(_) => Ok(None),
                Err(_) => Err(failed()),
            }
        }
        Compression::Zstd => {
            let out = zstd::bulk::compress(cluster, 0).map_err(|_| failed())?;
            Ok((out.len() < cluster.len()).then_some(out))
        }
    }
}

/// Decompresses a cluster of `len` bytes. EIO when the bytes do not give that.
pub fn decompress(how: Compression, packed: &[u8], len: usize) -> Result<Vec<u8>> {
    let mut out = vec![0; len];
    let whole = match how {
        Compression::Zlib => inflate(packed, &mut out),
        Compression::Zstd => unzstd(packed, &mut out),
    };
    if whole { Ok(out) } else { Err(IoError::EIO.with("A compressed cluster is damaged")) }
}

fn inflate(packed: &[u8], out: &mut [u8]) -> bool {
    let mut inflate = Decompress::new(false);
    let done = inflate.decompress(packed, out, FlushDecompress::Finish);
    // The stream may end right there or, as far as is seen here, go on: the cluster is complete in both cases.
    done.is_ok() && inflate.total_out() == out.len() as u64
}

fn unzstd(packed: &[u8], out: &mut [u8]) -> bool {
    let Ok(mut decoder) = Decoder::new() else { return false };
    let (mut read, mut written) = (0, 0);
    while written < out.len() {
        let mut from = InBuffer::around(&packed[read..]);
        let mut to = OutBuffer::around(&mut out[written..]);
        let Ok(more) = decoder.run(&mut from, &mut to) else { return false };
        let (used, made) = (from.pos(), to.pos());
        if used == 0 && made == 0 {
            return false;
        }
        (read, written) = (read + used, written + made);
        // A frame has ended: a cluster may be several.
        if more == 0 && written < out.len() && decoder.reinit().is_err() {
            return false;
        }
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_ways_and_never_larger() {
        let mut state = 1u32;
        let mut noise = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            state.to_be_bytes()[0]
        };
        let random: Vec<u8> = (0..65536).map(|_| noise()).collect();
        let mixed: Vec<u8> = (0..65536u32).map(|i| if i % 3 == 0 { noise() } else { 7 }).collect();
        for how in [Compression::Zlib, Compression::Zstd] {
            assert_eq!(compress(how, &random).unwrap(), None);
            let mut packed = compress(how, &mixed).unwrap().unwrap();
            assert!(packed.len() < mixed.len());
            packed.extend([0xaa; 300]);
            assert_eq!(decompress(how, &packed, mixed.len()).unwrap(), mixed);
            packed.truncate(1000);
            assert!(decompress(how, &packed, mixed.len()).is_err());
            assert!(decompress(how, &random, mixed.len()).is_err());
            assert!(decompress(how, &[], 512).is_err());
        }
    }
}
