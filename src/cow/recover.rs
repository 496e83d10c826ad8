//! Recovery: from whatever a crash left in the map file to the states of all blocks. Reads only.
//!
//! 1. The newest superblock: the slot with the higher generation. Each slot was written whole at
//!    least once, eight times over, so one without an intact copy is damage, not a torn write.
//! 2. The bitmap pages of its area. One that fails its checksum, or is missing, is damage.
//! 3. Records 0, 1, 2… of exactly its generation, up to the first that is not there. That is the
//!    tail of a commit that was never acknowledged, unless something later proves otherwise: a
//!    record of a later commit, or of a later generation. Then an acknowledged one was lost.
//!
//! 4. The tail of changes that the last process had not committed, if it died and the kernel did not.
//!
//! Damage is an error that names it. Never is it taken for "not written yet": that would show the
//! image's content, or older data, where the guest has written since.

use std::ops::Range;

use bitvec::vec::BitVec;
use uuid::Uuid;

use super::{
    changes::{Changes, mark},
    format::{self, Layout, PAGE, Record, State, Superblock, corrupt, decode_page},
    map::Map,
    tail::{Place, Tail},
};
use crate::{
    error::{Error, Result},
    io::Io,
    units,
};

/// Bytes that one read of the journal or of the bitmap covers at most.
const READ: u64 = 256 << 10;

/// What recovery found.
pub(super) struct Found {
    pub(super) superblock: Superblock,
    pub(super) changes: Changes,
    /// Whether there were records to replay.
    pub(super) replayed: bool,
}

pub(super) async fn recover<I: Io>(
    io: &I,
    file: &I::File,
    id: Uuid,
    place: Option<Place>,
) -> Result<Found> {
    let reader = Reader { io, file, id };
    let superblock = reader.superblock().await?;
    let mut found = Pages { map: Map::new(), stale: Default::default(), loaded: 0 };
    reader.load(&superblock, &mut found).await?;
    if found.loaded != superblock.pages {
        return Err(corrupt(
            id,
            format!("{} bitmap pages of {} are there", found.loaded, superblock.pages),
        ));
    }
    let records = reader.records(&superblock).await?;
    let replayed = !records.is_empty();
    let mut zeroed = Vec::new();
    for run in records.into_iter().flat_map(|record| record.runs) {
        if run.end() > units::blocks(superblock.size) {
            return Err(corrupt(id, "a journal record speaks of blocks past the device's end"));
        }
        let pages = run.start / format::BLOCKS_PER_PAGE..=(run.end() - 1) / format::BLOCKS_PER_PAGE;
        for page in pages {
            found.stale.iter_mut().for_each(|stale| mark(stale, page));
        }
        found.map.set(run.start..run.end(), run.state);
        if run.state == State::Zero {
            zeroed.push(run.start..run.end());
        }
    }
    let (tail, lately) = Tail::open(place, &superblock);
    if lately.iter().any(|run| run.end() > units::blocks(superblock.size)) {
        return Err(corrupt(id, "its tail speaks of blocks past the device's end"));
    }
    let room = superblock.records as usize * format::RUNS_PER_RECORD;
    let changes = Changes::new(found.map, room, found.stale, zeroed, tail, lately);
    Ok(Found { superblock, changes, replayed })
}

struct Reader<'a, I: Io> {
    io: &'a I,
    file: &'a I::File,
    id: Uuid,
}

/// The bitmap as it is loaded.
struct Pages {
    map: Map,
    /// Per area, the pages that are on disk otherwise than in the map, or may be.
    stale: [BitVec; 2],
    loaded: u64,
}

impl<I: Io> Reader<'_, I> {
    async fn superblock(&self) -> Result<Superblock> {
        let bytes = self.read(0, 2 * PAGE).await?;
        let first = Superblock::decode(&bytes[..PAGE], 0, self.id)?;
        let second = Superblock::decode(&bytes[PAGE..], 1, self.id)?;
        if first.records != second.records {
            return Err(corrupt(self.id, "its superblocks contradict each other"));
        }
        Ok(if first.generation > second.generation { first } else { second })
    }

    /// Loads the pages of the superblock's area, and notes those that the other one holds.
    async fn load(&self, superblock: &Superblock, found: &mut Pages) -> Result<()> {
        let layout = Layout { records: superblock.records };
        let end = layout.end(superblock.size);
        let mut at = layout.bitmap();
        while at < end {
            let data =
                self.io.data_after(self.file, at).await.map_err(|error| self.failed(error))?;
            let Some(data) = data else { break };
            // Whole pages; and forward, whatever the hint says.
            at = units::round_down(data.start.max(at), PAGE as u64);
            let stop = data.end.min(end).max(at + 1).next_multiple_of(PAGE as u64);
            while at < stop.min(end) {
                let (area, page) = layout.page_at(at);
                let count = Layout::side_by_side(page).min((stop - at) / PAGE as u64);
                let pages = page..page + count.min(READ / PAGE as u64);
                if area == superblock.area() {
                    self.load_pages(superblock, at, pages.clone(), found).await?;
                } else {
                    pages.clone().for_each(|page| mark(&mut found.stale[area], page));
                }
                at += (pages.end - pages.start) * PAGE as u64;
            }
        }
        Ok(())
    }

    async fn load_pages(
        &self,
        superblock: &Superblock,
        at: u64,
        pages: Range<u64>,
        found: &mut Pages,
    ) -> Result<()> {
        let bytes = self.read(at, (pages.end - pages.start) as usize * PAGE).await?;
        for (page, bytes) in pages.zip(bytes.chunks_exact(PAGE)) {
            let blocks = units::blocks(superblock.size);
            if let Some(states) = decode_page(self.id, page, blocks, bytes)? {
                found.map.load(page, &states);
                found.loaded += 1;
                mark(&mut found.stale[1 - superblock.area()], page);
            }
        }
        Ok(())
    }

    /// The records to replay.
    async fn records(&self, superblock: &Superblock) -> Result<Vec<Record>> {
        let mut records = Vec::new();
        let mut gap = None;
        let mut sequence = 0;
        while sequence < superblock.records {
            let count = (superblock.records - sequence).min((READ / PAGE as u64) as u32);
            let bytes = self.read(Layout::record(sequence), count as usize * PAGE).await?;
            for bytes in bytes.chunks_exact(PAGE) {
                match self.follow(superblock, Record::decode(bytes), sequence, gap)? {
                    Some(record) => records.push(record),
                    None => gap = gap.or(Some(sequence)),
                }
                sequence += 1;
            }
        }
        Ok(records)
    }

    /// The record in place `sequence` if it is to be replayed; `gap` is the first place before it
    /// that held none.
    fn follow(
        &self,
        superblock: &Superblock,
        record: Option<Record>,
        sequence: u32,
        gap: Option<u32>,
    ) -> Result<Option<Record>> {
        let Some(record) = record.filter(|record| record.id == self.id) else { return Ok(None) };
        if record.generation > superblock.generation {
            return Err(corrupt(
                self.id,
                format!("it has records of generation {} but no superblock", record.generation),
            ));
        }
        if record.generation < superblock.generation || record.sequence != sequence {
            return Ok(None);
        }
        match gap {
            None => Ok(Some(record)),
            Some(gap) if record.first > gap => {
                Err(corrupt(self.id, format!("journal record {gap} is damaged")))
            }
            Some(_) => Ok(None),
        }
    }

    async fn read(&self, offset: u64, len: usize) -> Result<Vec<u8>> {
        let buf = self.io.alloc(len);
        self.io.read(self.file, buf.clone(), offset).await.map_err(|error| self.failed(error))?;
        Ok(buf.to_vec())
    }

    fn failed(&self, error: std::io::Error) -> Error {
        Error::io(format!("map of overlay {}: reading", self.id), error)
    }
}
