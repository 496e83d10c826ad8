//! The chunk table: the `chunks` file beside the `data` of a copy.
//!
//! `docs/chunk-table.md` gives every byte. In short: a header of 4 KiB, then pages of 4 KiB with
//! the sums of 85 chunks each. A page whose chunks are all zeros is a hole in the file and nothing
//! at all in memory, so that a sparse terabyte costs no more than what it holds.
//!
//! Invariants:
//! - Every page carries a CRC over itself and its number; the header carries a CRC over itself and
//!   one over the CRCs of all stored pages, so that a page lost (which then reads as a hole),
//!   swapped or left over from another table is noticed when the table is loaded.
//! - A loaded table is sound: its size is a multiple of 512, at most [`MAX_IMAGE`], and no sum
//!   claims data past the end of the image.
//!
//! The digest is not recomputed by [`ChunkTable::load`]; [`verify`](super::verify()) does that.

use std::{
    fs::File,
    os::unix::fs::{FileExt, MetadataExt},
};

use super::{
    MAX_IMAGE,
    checksum::{ChunkSum, ImageHasher, is_zero},
};
use crate::{
    catalog::Digest,
    error::{Context, Error, Kind, Result},
    io::holes,
    units::{BLOCK, CHUNK, Chunk, SECTOR, chunks},
};

const MAGIC: [u8; 8] = *b"UNDLCHNK";
const VERSION: u32 = 1;
const PAGE: usize = 4096;
const PAGE_HEADER: usize = 16;
const ENTRY: usize = 48;
/// Chunks whose sums share a page.
const PER_PAGE: u64 = 85;

const _: () = assert!(PAGE_HEADER + ENTRY * PER_PAGE as usize == PAGE);

type Page = Box<[u8; PAGE]>;

/// The sums of every chunk of an image, and the digest that follows from them.
#[derive(Debug, PartialEq, Eq)]
pub struct ChunkTable {
    size: u64,
    digest: Digest,
    data_blocks: u64,
    /// Sealed pages by number; `None` where all chunks are zeros.
    pages: Vec<Option<Page>>,
}

/// A table in the making: sums may be set in any order; chunks that aren't set are zeros.
#[derive(Debug, Default)]
pub struct TableBuilder {
    pages: Vec<Option<Page>>,
    data_blocks: u64,
}

impl TableBuilder {
    /// Records the sums of `chunk`, once; it must lie within [`MAX_IMAGE`].
    pub fn set(&mut self, chunk: Chunk, sum: &ChunkSum) {
        assert!(chunk.0 < chunks(MAX_IMAGE), "{chunk:?} lies beyond the largest image");
        if sum.is_zero() {
            return;
        }
        let (number, at) = place(chunk);
        if self.pages.len() <= number {
            self.pages.resize_with(number + 1, || None);
        }
        let page = self.pages[number].get_or_insert_with(|| Box::new([0; PAGE]));
        let entry = &mut page[at..at + ENTRY];
        entry[0..8].copy_from_slice(&(!sum.zeros).to_le_bytes());
        entry[8..12].copy_from_slice(&sum.crc.to_le_bytes());
        entry[16..48].copy_from_slice(&sum.sha256.0);
        self.data_blocks += u64::from(sum.zeros.count_zeros());
    }

    /// The table of an image of `size` bytes, a multiple of 512 and at most [`MAX_IMAGE`].
    pub fn finish(mut self, size: u64) -> ChunkTable {
        assert!(size > 0 && size.is_multiple_of(SECTOR) && size <= MAX_IMAGE, "{size} bytes");
        let count = chunks(size).div_ceil(PER_PAGE) as usize;
        assert!(self.pages.len() <= count, "sums past the end of {size} bytes");
        self.pages.resize_with(count, || None);
        for (number, page) in self.pages.iter_mut().enumerate() {
            if let Some(page) = page {
                seal(page, number as u64);
            }
        }
        let mut table = ChunkTable {
            size,
            digest: Digest([0; 32]),
            data_blocks: self.data_blocks,
            pages: self.pages,
        };
        table.digest = table.compute_digest();
        table
    }
}

impl ChunkTable {
    /// The image's size in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// The image's identity.
    pub fn digest(&self) -> Digest {
        self.digest
    }

    /// How many chunks the image has, the last perhaps in part.
    pub fn chunks(&self) -> u64 {
        chunks(self.size)
    }

    /// Bytes of the blocks that are not all zeros, counted in whole blocks: what a copy stores.
    pub fn data_bytes(&self) -> u64 {
        self.data_blocks * BLOCK
    }

    /// The length of `chunk` in bytes: [`CHUNK`] but for the last; 0 past the end.
    pub fn chunk_len(&self, chunk: Chunk) -> usize {
        self.size.saturating_sub(chunk.0.saturating_mul(CHUNK)).min(CHUNK) as usize
    }

    /// The sums of `chunk`; `None` past the end of the image.
    pub fn sum(&self, chunk: Chunk) -> Option<ChunkSum> {
        if chunk.0 >= self.chunks() {
            return None;
        }
        Some(self.stored(chunk).unwrap_or_else(|| ChunkSum::of_zeros(self.chunk_len(chunk))))
    }

    /// Whether `chunk` is all zeros (or past the end), without computing its sums.
    pub fn is_zero(&self, chunk: Chunk) -> bool {
        self.stored(chunk).is_none()
    }

    /// The first chunk from `from` on that holds data.
    pub fn next_data(&self, from: Chunk) -> Option<Chunk> {
        let mut chunk = from;
        while chunk.0 < self.chunks() {
            let (number, _) = place(chunk);
            if self.pages.get(number)?.is_none() {
                chunk = Chunk((number as u64 + 1) * PER_PAGE);
            } else if self.is_zero(chunk) {
                chunk = Chunk(chunk.0 + 1);
            } else {
                return Some(chunk);
            }
        }
        None
    }

    /// The digest that follows from the size and the sums: one hash step for every chunk.
    pub fn compute_digest(&self) -> Digest {
        let mut hasher = ImageHasher::new(self.size);
        let whole = ChunkSum::of_zeros(CHUNK as usize).sha256;
        for chunk in (0..self.chunks()).map(Chunk) {
            let sha256 = match self.stored(chunk) {
                Some(sum) => sum.sha256,
                None if self.chunk_len(chunk) as u64 == CHUNK => whole,
                None => ChunkSum::of_zeros(self.chunk_len(chunk)).sha256,
            };
            hasher.chunk(&sha256);
        }
        hasher.finish()
    }

    /// Writes the table to `file`, which is empty, and makes it durable. `what` names it in errors.
    pub fn store(&self, file: &File, what: &str) -> Result<()> {
        let writing = || format!("writing {what}");
        let length = (self.pages.len() as u64 + 1) * PAGE as u64;
        file.set_len(length).context(writing)?;
        for (number, page) in self.pages.iter().enumerate() {
            if let Some(page) = page {
                file.write_all_at(&page[..], (number as u64 + 1) * PAGE as u64).context(writing)?;
            }
        }
        file.write_all_at(&self.header(), 0).context(writing)?;
        file.sync_all().context(writing)
    }

    /// Reads a table and checks all of it but the digest. `what` names it in errors.
    pub fn load(file: &File, what: &str) -> Result<ChunkTable> {
        let reading = || format!("reading {what}");
        let damaged = |why: String| {
            Error::new(
                Kind::Corrupt,
                format!("{what} is damaged: {why}; remove this copy and import the image again"),
            )
        };
        let mut page = Box::new([0; PAGE]);
        let length = file.metadata().context(reading)?.size();
        if length < PAGE as u64 {
            return Err(damaged(format!("it ends after {length} bytes")));
        }
        file.read_exact_at(&mut page[..], 0).context(reading)?;
        let header = Header::decode(&page).map_err(|fault| match fault {
            Fault::Version(version) => Error::new(
                Kind::Unsupported,
                format!("{what} has format version {version}; this build reads version {VERSION}"),
            ),
            Fault::Damaged(why) => damaged(why.into()),
        })?;
        let count = chunks(header.size).div_ceil(PER_PAGE);
        if length != (count + 1) * PAGE as u64 {
            return Err(damaged(format!("it is {length} bytes long, not {}", (count + 1) << 12)));
        }
        let mut table = ChunkTable {
            size: header.size,
            digest: header.digest,
            data_blocks: 0,
            pages: Vec::new(),
        };
        table.pages.resize_with(count as usize, || None);

        let mut at = PAGE as u64;
        while let Some(data) = holes::next_data(file, at, length).context(reading)? {
            at = data.start & !(PAGE as u64 - 1);
            while at < data.end {
                file.read_exact_at(&mut page[..], at).context(reading)?;
                let number = at / PAGE as u64 - 1;
                if !is_zero(&page[..]) {
                    table.data_blocks += check_page(&page, number, header.size)
                        .map_err(|why| damaged(format!("page {number} (offset {at}) {why}")))?;
                    table.pages[number as usize] = Some(page.clone());
                }
                at += PAGE as u64;
            }
        }
        let (stored, crc) = table.page_sums();
        if (stored, crc) != (header.pages, header.pages_crc) {
            return Err(damaged(format!(
                "{stored} of its {} pages are there, or they are not those it was written with",
                header.pages
            )));
        }
        if table.data_blocks != header.data_blocks {
            return Err(damaged("its counts disagree".into()));
        }
        Ok(table)
    }

    /// The sums of a chunk that holds data.
    fn stored(&self, chunk: Chunk) -> Option<ChunkSum> {
        let (number, at) = place(chunk);
        let entry = &self.pages.get(number)?.as_ref()?[at..at + ENTRY];
        let data = le64(entry, 0);
        let mut sha256 = [0; 32];
        sha256.copy_from_slice(&entry[16..48]);
        (data != 0).then(|| ChunkSum { zeros: !data, crc: le32(entry, 8), sha256: Digest(sha256) })
    }

    fn header(&self) -> [u8; PAGE] {
        let (pages, pages_crc) = self.page_sums();
        Header {
            size: self.size,
            digest: self.digest,
            data_blocks: self.data_blocks,
            pages,
            pages_crc,
        }
        .encode()
    }

    /// How many pages are stored, and the CRC over (number, CRC) of each in order.
    fn page_sums(&self) -> (u64, u32) {
        let mut crc = crc32fast::Hasher::new();
        let mut stored = 0;
        for (number, page) in self.pages.iter().enumerate() {
            if let Some(page) = page {
                crc.update(&(number as u64).to_le_bytes());
                crc.update(&page[0..4]);
                stored += 1;
            }
        }
        (stored, crc.finalize())
    }
}

/// The first page of a table.
struct Header {
    size: u64,
    digest: Digest,
    data_blocks: u64,
    pages: u64,
    pages_crc: u32,
}

/// Why a header is refused.
enum Fault {
    Version(u32),
    Damaged(&'static str),
}

impl Header {
    fn encode(&self) -> [u8; PAGE] {
        let mut page = [0; PAGE];
        page[0..8].copy_from_slice(&MAGIC);
        page[8..12].copy_from_slice(&VERSION.to_le_bytes());
        page[16..24].copy_from_slice(&self.size.to_le_bytes());
        page[24..32].copy_from_slice(&chunks(self.size).to_le_bytes());
        page[32..64].copy_from_slice(&self.digest.0);
        page[64..72].copy_from_slice(&self.data_blocks.to_le_bytes());
        page[72..80].copy_from_slice(&self.pages.to_le_bytes());
        page[80..84].copy_from_slice(&self.pages_crc.to_le_bytes());
        let crc = crc32fast::hash(&page[..PAGE - 4]);
        page[PAGE - 4..].copy_from_slice(&crc.to_le_bytes());
        page
    }

    fn decode(page: &[u8; PAGE]) -> Result<Header, Fault> {
        if page[0..8] != MAGIC {
            return Err(Fault::Damaged("its magic is not that of a chunk table"));
        }
        if crc32fast::hash(&page[..PAGE - 4]) != le32(page, PAGE - 4) {
            return Err(Fault::Damaged("its header's checksum is wrong"));
        }
        let version = le32(page, 8);
        if version != VERSION {
            return Err(Fault::Version(version));
        }
        let mut digest = [0; 32];
        digest.copy_from_slice(&page[32..64]);
        let header = Header {
            size: le64(page, 16),
            digest: Digest(digest),
            data_blocks: le64(page, 64),
            pages: le64(page, 72),
            pages_crc: le32(page, 80),
        };
        if header.size == 0 || header.size > MAX_IMAGE || !header.size.is_multiple_of(SECTOR) {
            return Err(Fault::Damaged("its image size is impossible"));
        }
        if le64(page, 24) != chunks(header.size) || le32(page, 12) != 0 {
            return Err(Fault::Damaged("its header contradicts itself"));
        }
        Ok(header)
    }
}

/// Sets a page's number and CRC.
fn seal(page: &mut Page, number: u64) {
    page[8..16].copy_from_slice(&number.to_le_bytes());
    let crc = crc32fast::hash(&page[4..]);
    page[0..4].copy_from_slice(&crc.to_le_bytes());
}

/// Checks a stored page of an image of `size` bytes; returns how many blocks of data it counts.
fn check_page(page: &[u8; PAGE], number: u64, size: u64) -> Result<u64, &'static str> {
    if crc32fast::hash(&page[4..]) != le32(page, 0) {
        return Err("has a wrong checksum");
    }
    if le64(page, 8) != number || le32(page, 4) != 0 {
        return Err("belongs elsewhere");
    }
    let mut blocks = 0;
    for i in 0..PER_PAGE {
        let entry = &page[PAGE_HEADER + i as usize * ENTRY..][..ENTRY];
        let data = le64(entry, 0);
        if data == 0 {
            if !is_zero(entry) {
                return Err("gives sums to a chunk of zeros");
            }
            continue;
        }
        let start = (number * PER_PAGE + i) * CHUNK;
        let held = crate::units::blocks(size.saturating_sub(start).min(CHUNK));
        if le32(entry, 12) != 0 || held == 0 || (held < 64 && data >> held != 0) {
            return Err("claims data past the end of the image");
        }
        blocks += u64::from(data.count_ones());
    }
    Ok(blocks)
}

/// The page of a chunk's sums, and the byte in it where they start.
fn place(chunk: Chunk) -> (usize, usize) {
    let number = usize::try_from(chunk.0 / PER_PAGE).unwrap_or(usize::MAX);
    (number, PAGE_HEADER + (chunk.0 % PER_PAGE) as usize * ENTRY)
}

fn le32(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

fn le64(bytes: &[u8], at: usize) -> u64 {
    u64::from(le32(bytes, at)) | u64::from(le32(bytes, at + 4)) << 32
}

#[cfg(test)]
#[path = "table_tests.rs"]
mod tests;
