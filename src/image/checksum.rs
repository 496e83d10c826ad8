//! What is known of a chunk (which of its blocks are zeros, its CRC-32 and its SHA-256) and of a
//! whole image (its digest).
//!
//! The digest is `SHA-256(size as u64 little-endian, SHA-256 of chunk 0, SHA-256 of chunk 1, …)`;
//! chunks are 256 KiB of raw content, the last one as long as the image leaves it. So a chunk can
//! be verified or fetched on its own, and the hash of a chunk of zeros is computed once a process.

use std::sync::OnceLock;

use sha2::{Digest as _, Sha256};

use crate::{
    catalog::Digest,
    units::{BLOCK, CHUNK},
};

/// What the chunk table keeps of one chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ChunkSum {
    /// Bit `i` is set when block `i` of the chunk is all zeros or lies past the end of the image.
    pub zeros: u64,
    /// CRC-32 (IEEE) of the chunk's raw content.
    pub crc: u32,
    /// SHA-256 of the chunk's raw content.
    pub sha256: Digest,
}

impl ChunkSum {
    /// The sums of a chunk's content: 1 to [`CHUNK`] bytes.
    pub fn of(content: &[u8]) -> ChunkSum {
        debug_assert!(!content.is_empty() && content.len() as u64 <= CHUNK);
        let zeros = zero_mask(content);
        if zeros == u64::MAX {
            return ChunkSum::of_zeros(content.len());
        }
        ChunkSum { zeros, crc: crc32fast::hash(content), sha256: sha256(content) }
    }

    /// The sums of a chunk of `len` zeros; those of a whole chunk are computed once.
    pub fn of_zeros(len: usize) -> ChunkSum {
        static WHOLE: OnceLock<ChunkSum> = OnceLock::new();
        let compute = |len: usize| {
            let content = vec![0; len];
            ChunkSum { zeros: u64::MAX, crc: crc32fast::hash(&content), sha256: sha256(&content) }
        };
        if len as u64 == CHUNK { *WHOLE.get_or_init(|| compute(len)) } else { compute(len) }
    }

    /// Whether the chunk holds nothing but zeros.
    pub fn is_zero(&self) -> bool {
        self.zeros == u64::MAX
    }

    /// The byte ranges of a chunk of `len` bytes that hold blocks other than zeros, neighbours
    /// joined.
    pub fn data_runs(&self, len: usize) -> Vec<std::ops::Range<usize>> {
        let mut runs = Vec::new();
        let mut data = !self.zeros;
        while data != 0 {
            let first = data.trailing_zeros();
            let count = (data >> first).trailing_ones();
            let start = first as usize * BLOCK as usize;
            let end = (start + count as usize * BLOCK as usize).min(len);
            runs.push(start..end);
            data = if first + count == 64 { 0 } else { data >> (first + count) << (first + count) };
        }
        runs
    }
}

/// The SHA-256 of `content`.
pub fn sha256(content: &[u8]) -> Digest {
    Digest(Sha256::digest(content).into())
}

/// Computes an image's digest from the hashes of its chunks, given in order.
pub(super) struct ImageHasher(Sha256);

impl ImageHasher {
    /// For an image of `size` bytes.
    pub(super) fn new(size: u64) -> ImageHasher {
        ImageHasher(Sha256::new_with_prefix(size.to_le_bytes()))
    }

    pub(super) fn chunk(&mut self, sha256: &Digest) {
        self.0.update(sha256.0);
    }

    pub(super) fn finish(self) -> Digest {
        Digest(self.0.finalize().into())
    }
}

/// Bit `i` set for each block of `content` that is all zeros, and for each that it doesn't reach.
fn zero_mask(content: &[u8]) -> u64 {
    let mut zeros = u64::MAX;
    for (i, block) in content.chunks(BLOCK as usize).enumerate() {
        if !is_zero(block) {
            zeros &= !(1 << i);
        }
    }
    zeros
}

/// Whether all bytes are zero. Works on 128 bytes at a time so that the compiler uses vectors.
pub(super) fn is_zero(bytes: &[u8]) -> bool {
    let mut pieces = bytes.chunks_exact(128);
    let rest = pieces.remainder();
    pieces.all(|piece| piece.iter().fold(0, |all, byte| all | byte) == 0)
        && rest.iter().all(|byte| *byte == 0)
}

#[cfg(test)]
#[allow(clippy::single_range_in_vec_init)] // Runs are ranges.
mod tests {
    use super::*;

    #[test]
    fn zero_blocks_are_seen_to_the_last_byte() {
        let mut content = vec![0; CHUNK as usize];
        assert!(ChunkSum::of(&content).is_zero());
        content[4095] = 1;
        content[63 * 4096 + 4095] = 1;
        let sum = ChunkSum::of(&content);
        assert_eq!(!sum.zeros, 1 | 1 << 63);
        assert_eq!(sum.data_runs(content.len()), [0..4096, 63 * 4096..64 * 4096]);
        assert!(is_zero(&[]) && !is_zero(&[0, 0, 1]));
        for at in 0..300 {
            let mut bytes = vec![0; 300];
            bytes[at] = 0x80;
            assert!(!is_zero(&bytes), "byte {at}");
        }
    }

    #[test]
    fn runs_join_neighbours_and_stop_at_the_end() {
        let mut content = vec![0; 3 * 4096 + 512];
        content[4096] = 1;
        content[2 * 4096] = 1;
        content[3 * 4096 + 511] = 1;
        let sum = ChunkSum::of(&content);
        assert_eq!(sum.data_runs(content.len()), [4096..3 * 4096 + 512]);
        let full = ChunkSum::of(&vec![7; CHUNK as usize]);
        assert_eq!(full.zeros, 0);
        assert_eq!(full.data_runs(CHUNK as usize), [0..CHUNK as usize]);
    }
}
