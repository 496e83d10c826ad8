//! The bytes of a cache's `chunks` file; no I/O. `docs/FORMAT.md` gives them in full.
//!
//! A header of 4 KiB says whose chunks these are; then an entry of 16 bytes for each chunk of the
//! image, zeros where the chunk isn't here. An entry is a claim, not a proof: it is believed once the
//! chunk's data was read and has the sum that the entry tells.

use crate::{
    catalog::Digest,
    units::{self, Chunk},
};

/// Bytes of the header.
pub const HEADER: usize = 4096;
/// Bytes of an entry.
pub const ENTRY: usize = 16;

const MAGIC: [u8; 8] = *b"UNDLCACH";
const VERSION: u32 = 1;
const HERE: u32 = u32::from_le_bytes(*b"HERE");

/// Where the entry of `chunk` stands in the file.
pub fn position(chunk: Chunk) -> u64 {
    HEADER as u64 + chunk.0 * ENTRY as u64
}

/// Bytes of the file of an image of `size` bytes.
pub fn file_len(size: u64) -> u64 {
    position(Chunk(units::chunks(size)))
}

/// The header of the cache of an image of `size` bytes.
pub fn header(digest: &Digest, size: u64) -> [u8; HEADER] {
    let mut bytes = [0; HEADER];
    bytes[0..8].copy_from_slice(&MAGIC);
    bytes[8..12].copy_from_slice(&VERSION.to_le_bytes());
    bytes[16..24].copy_from_slice(&size.to_le_bytes());
    bytes[24..56].copy_from_slice(&digest.0);
    let crc = crc32fast::hash(&bytes);
    bytes[12..16].copy_from_slice(&crc.to_le_bytes());
    bytes
}

/// The entry of a chunk whose content has this CRC-32.
pub fn entry(digest: &Digest, chunk: Chunk, crc: u32) -> [u8; ENTRY] {
    let mut bytes = [0; ENTRY];
    bytes[0..4].copy_from_slice(&HERE.to_le_bytes());
    bytes[4..8].copy_from_slice(&crc.to_le_bytes());
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&digest.0);
    hasher.update(&chunk.0.to_le_bytes());
    hasher.update(&bytes[0..8]);
    bytes[8..12].copy_from_slice(&hasher.finalize().to_le_bytes());
    bytes
}

/// The CRC-32 that an entry tells of its chunk; `None` if it is no entry of that chunk.
pub fn read(digest: &Digest, chunk: Chunk, bytes: &[u8]) -> Option<u32> {
    let crc = u32::from_le_bytes(bytes.get(4..8)?.try_into().ok()?);
    (bytes == entry(digest, chunk, crc)).then_some(crc)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_is_of_one_chunk_of_one_image() {
        let (this, other) = (Digest([1; 32]), Digest([2; 32]));
        let bytes = entry(&this, Chunk(7), 42);
        assert_eq!(read(&this, Chunk(7), &bytes), Some(42));
        assert_eq!(read(&this, Chunk(8), &bytes), None);
        assert_eq!(read(&other, Chunk(7), &bytes), None);
        assert_eq!(read(&this, Chunk(7), &[0; ENTRY]), None);
        for bit in 0..ENTRY * 8 {
            let mut bytes = bytes;
            bytes[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(read(&this, Chunk(7), &bytes), None, "bit {bit}");
        }
    }
}
