//! The bytes of a replica's `map` file: pure encoding and decoding, no I/O.
//!
//! ```text
//! 0        superblock slot 0     4 KiB, eight copies of 512 bytes
//! 4096     superblock slot 1     likewise
//! 8192     journal               `records` x 4 KiB, each two copies of 2 KiB
//! ...      bitmap groups         64 pages of area 0 (256 KiB), 64 pages of area 1, and so on
//! ```
//!
//! Invariants:
//! - Numbers are little endian. Whatever is decoded here has passed its checksum and its bounds;
//!   nothing that is read can make the decoder panic or allocate by what it says.
//! - Superblocks and records are written several times over within their 4 KiB: one flipped bit, or
//!   one sector torn by a power cut, never takes a replica down and never passes for "not written".
//! - A bitmap page of zeros is a page never touched. Any other carries the checksum of its states,
//!   its number and the overlay it belongs to.
//!
//! docs/FORMAT.md tells the same in prose, with the reason for each field; the tests hold this code
//! against golden bytes.

use uuid::Uuid;

use crate::{
    error::{Error, Kind, Result},
    units::{self, BLOCK, SECTOR},
};

/// The version this build reads and writes.
pub const VERSION: u32 = 1;
/// The unit in which the map file is written, in bytes.
pub const PAGE: usize = 4096;
/// States in one bitmap page, in 64-bit words.
pub const WORDS: usize = 510;
/// Blocks that one word of states describes.
pub const BLOCKS_PER_WORD: u64 = 32;
/// Blocks that one bitmap page describes: 63.75 MiB of the device.
pub const BLOCKS_PER_PAGE: u64 = WORDS as u64 * BLOCKS_PER_WORD;
/// The largest device, in bytes.
pub const MAX_SIZE: u64 = 64 << 40;
/// Bitmap pages of the largest device.
pub const MAX_PAGES: u64 = pages(MAX_SIZE);
/// Journal records of a new map.
pub const RECORDS: u32 = 64;
/// The smallest and the largest journal that is served, in records.
pub const RECORD_LIMITS: std::ops::RangeInclusive<u32> = 2..=4096;
/// State changes that one record holds.
pub const RUNS_PER_RECORD: usize = (HALF - RECORD_RUNS) / 8;
/// The most blocks that one run covers.
pub const MAX_RUN: u64 = (1 << 22) - 1;

const GROUP_PAGES: u64 = 64;
const COPY: usize = SECTOR as usize;
const HALF: usize = PAGE / 2;

const SUPERBLOCK_MAGIC: &[u8; 8] = b"UNDERMAP";
const RECORD_MAGIC: &[u8; 4] = b"UREC";
const PAGE_MAGIC: &[u8; 4] = b"UPAG";

// A superblock, by byte offset.
const SB_VERSION: usize = 8;
const SB_CRC: usize = 12;
const SB_ID: usize = 16;
const SB_GENERATION: usize = 32;
const SB_SIZE: usize = 40;
const SB_RECORDS: usize = 48;
const SB_AREA: usize = 52;
const SB_PAGES: usize = 56;
const SB_SESSION: usize = 64;
const SB_END: usize = 72;

// A journal record.
const RECORD_CRC: usize = 4;
const RECORD_ID: usize = 8;
const RECORD_GENERATION: usize = 24;
const RECORD_SEQUENCE: usize = 32;
const RECORD_FIRST: usize = 36;
const RECORD_COUNT: usize = 40;
const RECORD_RUNS: usize = 48;

// The trailer of a bitmap page.
const PAGE_STATES: usize = WORDS * 8;
const PAGE_INDEX: usize = PAGE_STATES + 4;
const PAGE_CRC: usize = PAGE_STATES + 12;

const _: () = assert!(SB_END <= COPY && PAGE.is_multiple_of(COPY));
const _: () = assert!(PAGE_STATES == 4080 && PAGE_CRC + 4 == PAGE);
const _: () = assert!(RUNS_PER_RECORD == 250 && RECORD_RUNS.is_multiple_of(8));
const _: () = assert!(MAX_SIZE / BLOCK <= 1 << 40, "a run's start has 40 bits");
const _: () = assert!(MAX_PAGES <= u32::MAX as u64);

/// What a block of a replica holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum State {
    /// Whatever the image below holds.
    Base = 0,
    /// What stands in the overlay's data file.
    Data = 1,
    /// Zeros, whatever the data file holds.
    Zero = 2,
}

impl State {
    /// The state of these two bits; `None` for the fourth pattern, which none has.
    pub const fn from_bits(bits: u64) -> Option<State> {
        match bits & 3 {
            0 => Some(State::Base),
            1 => Some(State::Data),
            2 => Some(State::Zero),
            _ => None,
        }
    }
}

/// Bitmap pages of a device of `size` bytes.
pub const fn pages(size: u64) -> u64 {
    units::blocks(size).div_ceil(BLOCKS_PER_PAGE)
}

/// Whether a device can have this size, or why not.
pub fn check_size(size: u64) -> Result<()> {
    if size == 0 || size > MAX_SIZE || !size.is_multiple_of(SECTOR) {
        return Err(Error::new(
            Kind::Invalid,
            format!(
                "a replica of {size} bytes: choose a multiple of {SECTOR} between {SECTOR} and \
                 {MAX_SIZE}"
            ),
        ));
    }
    Ok(())
}

/// The error of a map file that cannot be trusted.
pub(super) fn corrupt(id: Uuid, what: impl std::fmt::Display) -> Error {
    Error::new(
        Kind::Corrupt,
        format!(
            "map of overlay {id}: {what}; the replica is not served from it, restore its files \
             from a backup"
        ),
    )
}

/// Where the parts of a map file with a journal of `records` records lie.
#[derive(Clone, Copy, Debug)]
pub struct Layout {
    /// Records in the journal.
    pub records: u32,
}

impl Layout {
    /// The byte offset of a superblock slot, 0 or 1.
    pub const fn slot(slot: u64) -> u64 {
        slot * PAGE as u64
    }

    /// The byte offset of the journal's record number `sequence`.
    pub const fn record(sequence: u32) -> u64 {
        (2 + sequence as u64) * PAGE as u64
    }

    /// The byte offset of the first bitmap group.
    pub const fn bitmap(self) -> u64 {
        Layout::record(self.records)
    }

    /// The byte offset of a bitmap page in an area, 0 or 1.
    pub const fn page(self, area: usize, page: u64) -> u64 {
        let group = page / GROUP_PAGES;
        let slot = (group * 2 + area as u64) * GROUP_PAGES + page % GROUP_PAGES;
        self.bitmap() + slot * PAGE as u64
    }

    /// The byte offset behind the last bitmap group of a device of `size` bytes.
    pub const fn end(self, size: u64) -> u64 {
        self.bitmap() + pages(size).div_ceil(GROUP_PAGES) * GROUP_PAGES * 2 * PAGE as u64
    }

    /// The area and the page that lie at `offset`, which lies in the bitmap groups.
    pub const fn page_at(self, offset: u64) -> (usize, u64) {
        let slot = (offset - self.bitmap()) / PAGE as u64;
        let area = (slot / GROUP_PAGES) % 2;
        (area as usize, slot / (GROUP_PAGES * 2) * GROUP_PAGES + slot % GROUP_PAGES)
    }

    /// How many pages from this one on lie side by side in its area.
    pub const fn side_by_side(page: u64) -> u64 {
        GROUP_PAGES - page % GROUP_PAGES
    }
}

/// What a superblock slot says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Superblock {
    /// The overlay that the map belongs to.
    pub id: Uuid,
    /// Grows by one with each checkpoint; its parity is the slot and the bitmap area.
    pub generation: u64,
    /// Bytes of the device.
    pub size: u64,
    /// Records in the journal.
    pub records: u32,
    /// Bitmap pages of this generation's area that are not all base: one that went missing shows.
    pub pages: u64,
    /// The session that wrote it, by a random number; 0 in a new map. See `tail`.
    pub session: u64,
}

impl Superblock {
    /// The bitmap area and the superblock slot of this generation.
    pub const fn area(&self) -> usize {
        (self.generation & 1) as usize
    }

    /// The slot's bytes.
    pub fn encode(&self) -> Vec<u8> {
        let mut copy = [0; COPY];
        copy[..SB_VERSION].copy_from_slice(SUPERBLOCK_MAGIC);
        put32(&mut copy, SB_VERSION, VERSION);
        copy[SB_ID..SB_GENERATION].copy_from_slice(self.id.as_bytes());
        put64(&mut copy, SB_GENERATION, self.generation);
        put64(&mut copy, SB_SIZE, self.size);
        put32(&mut copy, SB_RECORDS, self.records);
        put32(&mut copy, SB_AREA, self.area() as u32);
        put64(&mut copy, SB_PAGES, self.pages);
        put64(&mut copy, SB_SESSION, self.session);
        let crc = crc32fast::hash(&copy);
        put32(&mut copy, SB_CRC, crc);
        copy.repeat(PAGE / COPY)
    }

    /// The newest intact copy in the 4 KiB of slot 0 or 1 of the map of overlay `id`.
    pub fn decode(bytes: &[u8], slot: u64, id: Uuid) -> Result<Superblock> {
        let newest = bytes
            .chunks_exact(COPY)
            .filter_map(|copy| Superblock::decode_copy(copy, slot))
            .max_by_key(|superblock| superblock.generation);
        let Some(superblock) = newest else {
            return Err(Superblock::unreadable(bytes, slot, id));
        };
        if superblock.id != id {
            return Err(corrupt(id, format!("it is the map of overlay {}", superblock.id)));
        }
        Ok(superblock)
    }

    /// One copy, if it is intact, of this version and says nothing absurd.
    fn decode_copy(copy: &[u8], slot: u64) -> Option<Superblock> {
        if &copy[..SB_VERSION] != SUPERBLOCK_MAGIC
            || get32(copy, SB_VERSION) != VERSION
            || get32(copy, SB_CRC) != crc_without(copy, SB_CRC)
        {
            return None;
        }
        let superblock = Superblock {
            id: id_at(copy, SB_ID),
            generation: get64(copy, SB_GENERATION),
            size: get64(copy, SB_SIZE),
            records: get32(copy, SB_RECORDS),
            pages: get64(copy, SB_PAGES),
            session: get64(copy, SB_SESSION),
        };
        let sane = superblock.generation & 1 == slot
            // The next generations must not wrap, whatever a hostile file says.
            && superblock.generation < u64::MAX / 2
            && u64::from(get32(copy, SB_AREA)) == slot
            && check_size(superblock.size).is_ok()
            && RECORD_LIMITS.contains(&superblock.records)
            && superblock.pages <= pages(superblock.size);
        sane.then_some(superblock)
    }

    /// Why a slot without an intact copy has none.
    fn unreadable(bytes: &[u8], slot: u64, id: Uuid) -> Error {
        let foreign = bytes
            .chunks_exact(COPY)
            .filter(|copy| &copy[..SB_VERSION] == SUPERBLOCK_MAGIC)
            .map(|copy| get32(copy, SB_VERSION))
            .find(|version| *version != VERSION);
        match foreign {
            Some(version) => Error::new(
                Kind::Unsupported,
                format!(
                    "map of overlay {id}: format version {version}, this build serves version \
                     {VERSION}; use the build that wrote it"
                ),
            ),
            None => corrupt(id, format!("superblock slot {slot} has no intact copy")),
        }
    }
}

/// A change of state of `len` blocks from `start`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// The first block.
    pub start: u64,
    /// Blocks; 1 to [`MAX_RUN`].
    pub len: u64,
    /// What they became.
    pub state: State,
}

impl Run {
    /// The block behind the last.
    pub const fn end(&self) -> u64 {
        self.start + self.len
    }

    const fn pack(&self) -> u64 {
        self.start | self.len << 40 | (self.state as u64) << 62
    }

    /// `None` if no overlay writes such a run.
    fn unpack(word: u64) -> Option<Run> {
        let (start, len) = (word & ((1 << 40) - 1), word >> 40 & MAX_RUN);
        match State::from_bits(word >> 62) {
            Some(state) if state != State::Base && len > 0 => Some(Run { start, len, state }),
            _ => None,
        }
    }
}

/// A journal record.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    /// The overlay that the record belongs to.
    pub id: Uuid,
    /// The generation whose bitmap it changes.
    pub generation: u64,
    /// Its number in the journal, counted from 0 in each generation.
    pub sequence: u32,
    /// The number of the first record of the commit that wrote it.
    pub first: u32,
    /// Changes in the order in which they were made; at most [`RUNS_PER_RECORD`].
    pub runs: Vec<Run>,
}

impl Record {
    /// The record's 4 KiB.
    ///
    /// # Panics
    /// If there are more runs than a record holds.
    pub fn encode(&self) -> Vec<u8> {
        assert!(self.runs.len() <= RUNS_PER_RECORD, "runs fit a record");
        let mut half = [0; HALF];
        half[..RECORD_CRC].copy_from_slice(RECORD_MAGIC);
        half[RECORD_ID..RECORD_GENERATION].copy_from_slice(self.id.as_bytes());
        put64(&mut half, RECORD_GENERATION, self.generation);
        put32(&mut half, RECORD_SEQUENCE, self.sequence);
        put32(&mut half, RECORD_FIRST, self.first);
        put32(&mut half, RECORD_COUNT, self.runs.len() as u32);
        for (i, run) in self.runs.iter().enumerate() {
            put64(&mut half, RECORD_RUNS + i * 8, run.pack());
        }
        let crc = crc32fast::hash(&half);
        put32(&mut half, RECORD_CRC, crc);
        half.repeat(2)
    }

    /// The intact one of the two copies in a record's 4 KiB; of two that differ, the newer.
    pub fn decode(bytes: &[u8]) -> Option<Record> {
        bytes
            .chunks_exact(HALF)
            .filter_map(Record::decode_half)
            .max_by_key(|record| (record.generation, record.sequence))
    }

    fn decode_half(half: &[u8]) -> Option<Record> {
        let count = get32(half, RECORD_COUNT) as usize;
        if &half[..RECORD_CRC] != RECORD_MAGIC
            || count > RUNS_PER_RECORD
            || get32(half, RECORD_CRC) != crc_without(half, RECORD_CRC)
        {
            return None;
        }
        let words = (0..count).map(|i| get64(half, RECORD_RUNS + i * 8));
        Some(Record {
            id: id_at(half, RECORD_ID),
            generation: get64(half, RECORD_GENERATION),
            sequence: get32(half, RECORD_SEQUENCE),
            first: get32(half, RECORD_FIRST),
            runs: words.map(Run::unpack).collect::<Option<_>>()?,
        })
    }
}

/// The 4 KiB of bitmap page number `page`.
pub fn encode_page(id: Uuid, page: u64, states: &[u64; WORDS]) -> [u8; PAGE] {
    let mut bytes = [0; PAGE];
    if states.iter().all(|word| *word == 0) {
        return bytes;
    }
    for (i, word) in states.iter().enumerate() {
        put64(&mut bytes, i * 8, *word);
    }
    bytes[PAGE_STATES..PAGE_INDEX].copy_from_slice(PAGE_MAGIC);
    put32(&mut bytes, PAGE_INDEX, page as u32);
    let crc = page_crc(id, &bytes);
    put32(&mut bytes, PAGE_CRC, crc);
    bytes
}

/// The states in the 4 KiB of bitmap page number `page` of a device of `blocks` blocks; `None` if
/// the page was never touched.
pub fn decode_page(
    id: Uuid,
    page: u64,
    blocks: u64,
    bytes: &[u8],
) -> Result<Option<Box<[u64; WORDS]>>> {
    if bytes.iter().all(|byte| *byte == 0) {
        return Ok(None);
    }
    if &bytes[PAGE_STATES..PAGE_INDEX] != PAGE_MAGIC
        || u64::from(get32(bytes, PAGE_INDEX)) != page
        || get32(bytes, PAGE_CRC) != page_crc(id, bytes)
    {
        return Err(corrupt(id, format!("bitmap page {page} fails its checksum")));
    }
    let mut states = Box::new([0; WORDS]);
    for (i, word) in states.iter_mut().enumerate() {
        *word = get64(bytes, i * 8);
        let first = page * BLOCKS_PER_PAGE + i as u64 * BLOCKS_PER_WORD;
        let inside = blocks.saturating_sub(first).min(BLOCKS_PER_WORD);
        let past_end = if inside == 32 { 0 } else { *word >> (inside * 2) };
        if past_end != 0 || *word & (*word >> 1) & 0x5555_5555_5555_5555 != 0 {
            return Err(corrupt(id, format!("bitmap page {page} holds states that none can have")));
        }
    }
    Ok(Some(states))
}

/// The first bytes of a new map file: both superblocks and a journal of `records` records, written
/// out so that no later commit allocates. What lies behind them is a hole.
pub fn blank(id: Uuid, size: u64, records: u32) -> Vec<u8> {
    let mut bytes = Vec::new();
    for generation in [0, 1] {
        let superblock = Superblock { id, generation, size, records, pages: 0, session: 0 };
        bytes.extend(superblock.encode());
    }
    bytes.resize(Layout { records }.bitmap() as usize, 0);
    bytes
}

/// The checksum of `bytes` with the four bytes at `at` taken as zeros.
fn crc_without(bytes: &[u8], at: usize) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&bytes[..at]);
    hasher.update(&[0; 4]);
    hasher.update(&bytes[at + 4..]);
    hasher.finalize()
}

fn page_crc(id: Uuid, bytes: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(id.as_bytes());
    hasher.update(&bytes[..PAGE_CRC]);
    hasher.finalize()
}

fn id_at(bytes: &[u8], at: usize) -> Uuid {
    let mut id = [0; 16];
    id.copy_from_slice(&bytes[at..at + 16]);
    Uuid::from_bytes(id)
}

fn get32(bytes: &[u8], at: usize) -> u32 {
    let mut word = [0; 4];
    word.copy_from_slice(&bytes[at..at + 4]);
    u32::from_le_bytes(word)
}

fn get64(bytes: &[u8], at: usize) -> u64 {
    let mut word = [0; 8];
    word.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(word)
}

fn put32(bytes: &mut [u8], at: usize, value: u32) {
    bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
}

fn put64(bytes: &mut [u8], at: usize, value: u64) {
    bytes[at..at + 8].copy_from_slice(&value.to_le_bytes());
}

#[cfg(test)]
mod tests;
