//! Sizes that the formats, the wire and the kernel agree on, and every conversion between them.
//!
//! Offsets and lengths are bytes (`u64`) unless a name says otherwise. Whatever comes from outside
//! is added with `checked_add`: [`check_range`] is the one place that decides what fits.

use crate::error::{Error, Kind, Result};

/// The smallest unit a guest can address in partition tables and superblocks, in bytes.
pub const SECTOR: u64 = 512;
/// The unit of copy-on-write, in bytes.
pub const BLOCK: u64 = 4096;
/// The unit of checksum, repair and promotion, in bytes.
pub const CHUNK: u64 = 256 * 1024;
/// Blocks in a chunk: a chunk's zero blocks fit one `u64` mask.
pub const BLOCKS_PER_CHUNK: u64 = CHUNK / BLOCK;

const _: () = assert!(BLOCKS_PER_CHUNK == 64);

/// The number of a 4 KiB block, counted from the start of a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Block(pub u64);

impl Block {
    /// The block that holds the byte at `offset`.
    pub const fn at(offset: u64) -> Block {
        Block(offset / BLOCK)
    }

    /// The first byte of this block.
    pub const fn offset(self) -> u64 {
        self.0 * BLOCK
    }
}

/// The number of a 256 KiB chunk, counted from the start of an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Chunk(pub u64);

impl Chunk {
    /// The chunk that holds the byte at `offset`.
    pub const fn at(offset: u64) -> Chunk {
        Chunk(offset / CHUNK)
    }

    /// The first byte of this chunk.
    pub const fn offset(self) -> u64 {
        self.0 * CHUNK
    }
}

/// How many blocks hold `bytes` bytes, the last perhaps in part.
pub const fn blocks(bytes: u64) -> u64 {
    bytes.div_ceil(BLOCK)
}

/// How many chunks hold `bytes` bytes, the last perhaps in part.
pub const fn chunks(bytes: u64) -> u64 {
    bytes.div_ceil(CHUNK)
}

/// `offset` rounded down to a multiple of `unit`, a power of two.
pub const fn round_down(offset: u64, unit: u64) -> u64 {
    offset & !(unit - 1)
}

/// `offset` rounded up to a multiple of `unit`, a power of two; `None` past `u64::MAX`.
pub const fn round_up(offset: u64, unit: u64) -> Option<u64> {
    match offset.checked_add(unit - 1) {
        Some(sum) => Some(round_down(sum, unit)),
        None => None,
    }
}

/// Returns the end of `offset + len` if it lies within `size`, or [`Kind::OutOfRange`].
pub fn check_range(offset: u64, len: u64, size: u64) -> Result<u64> {
    match offset.checked_add(len) {
        Some(end) if end <= size => Ok(end),
        _ => Err(Error::new(
            Kind::OutOfRange,
            format!("{len} bytes at offset {offset} of a device of {size} bytes"),
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_never_overflow() {
        assert_eq!(check_range(4096, 512, 4608).unwrap(), 4608);
        assert!(check_range(u64::MAX, 1, u64::MAX).is_err());
        assert!(check_range(4097, 512, 4608).is_err());
        assert_eq!(round_up(u64::MAX, BLOCK), None);
        assert_eq!(round_up(1, BLOCK), Some(BLOCK));
    }
}
