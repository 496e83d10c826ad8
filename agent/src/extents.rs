//! From a place on a disk to the chunks of the files that lie there. Pure.
//!
//! ```text
//! disk     ....[ piece ][ piece ]....[ piece ]....      sorted by place, disjoint
//! file          8       0             3                 chunks of 256 KiB of the file's own offsets
//! ```
//!
//! Invariants:
//! - Pieces are sorted and do not overlap, so that a place belongs to one file at most.
//! - Where files share content (reflinks on xfs), the place belongs to the file that was named first:
//!   [`Extents::shared`] says how many bytes were decided so.
//! - Memory is bounded: [`MOST`] pieces, 32 bytes each.

use crate::report::{Extent, File};
use crate::{CHUNK, SECTOR};

/// Most pieces on one disk, of all files together.
pub const MOST: usize = 8 << 20;

/// Where the followed files of one disk lie.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Extents {
    pieces: Vec<Piece>,
    shared: u64,
}

/// A run of one file. All in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Piece {
    /// Where it lies on the whole disk.
    start: u64,
    /// Its length, never 0.
    len: u64,
    /// Where it belongs in its file.
    offset: u64,
    file: u64,
}

impl Piece {
    const fn end(&self) -> u64 {
        self.start + self.len
    }
}

/// A part of a read that fell on one chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hit {
    /// The file's number.
    pub file: u64,
    /// The chunk's number in it.
    pub chunk: u64,
    /// How much of the read.
    pub bytes: u64,
}

/// What is wrong with a list of extents.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Malformed {
    /// An extent of no length.
    #[error("file {file}: its extent at byte {at} is empty")]
    Empty {
        /// The file's number.
        file: u64,
        /// Where in the file.
        at: u64,
    },
    /// An extent beyond what a disk or file can have.
    #[error("file {file}: its extent at byte {at} ends beyond 2^63")]
    Beyond {
        /// The file's number.
        file: u64,
        /// Where in the file.
        at: u64,
    },
    /// An extent that begins before the end of the one before it.
    #[error("file {file}: its extent at byte {at} is out of order or overlaps the one before")]
    Disorder {
        /// The file's number.
        file: u64,
        /// Where in the file.
        at: u64,
    },
    /// Too many of them.
    #[error("file {file}: with it, its disk has more than {MOST} extents")]
    TooMany {
        /// The file's number.
        file: u64,
    },
}

impl Extents {
    /// Adds a file's extents, which must ascend by file offset and not overlap in the file. `partition`
    /// is where the file system's device begins on the whole disk, in bytes. On an error nothing is
    /// added.
    pub fn add(&mut self, file: &File, partition: u64) -> Result<(), Malformed> {
        let mut added = pieces(file, partition)?;
        added.sort_unstable_by_key(|piece| (piece.start, piece.offset));
        if self.pieces.len() + added.len() > MOST {
            return Err(Malformed::TooMany { file: file.id });
        }
        let total: u64 = added.iter().fold(0, |sum, piece| sum.saturating_add(piece.len));
        let free = outside(&self.pieces, &added);
        let kept: u64 = free.iter().fold(0, |sum, piece| sum.saturating_add(piece.len));
        if self.pieces.len() + free.len() > MOST {
            return Err(Malformed::TooMany { file: file.id });
        }
        self.shared = self.shared.saturating_add(total - kept);
        self.pieces.extend(free);
        // Two sorted runs: what a stable sort is quick at.
        self.pieces.sort_by_key(|piece| piece.start);
        Ok(())
    }

    /// Bytes that more than one file claims; the first has them.
    pub fn shared(&self) -> u64 {
        self.shared
    }

    /// Whether no file has any place here.
    pub fn is_empty(&self) -> bool {
        self.pieces.is_empty()
    }

    /// The chunks that a read of `sectors` at `sector` of the whole disk fell on. Parts of it that
    /// belong to no file are left out.
    pub fn resolve(&self, sector: u64, sectors: u32) -> impl Iterator<Item = Hit> {
        let from = sector.saturating_mul(SECTOR);
        let to = from.saturating_add(u64::from(sectors) * SECTOR);
        let first = self.pieces.partition_point(|piece| piece.end() <= from);
        let within = self.pieces[first..].iter().take_while(move |piece| piece.start < to);
        within.flat_map(move |piece| {
            let (start, end) = (from.max(piece.start), to.min(piece.end()));
            let mut at = piece.offset + (start - piece.start);
            let end = at + (end - start);
            std::iter::from_fn(move || {
                let bytes = (at / CHUNK * CHUNK + CHUNK).min(end).checked_sub(at)?;
                let hit = Hit { file: piece.file, chunk: at / CHUNK, bytes };
                at += bytes;
                (bytes > 0).then_some(hit)
            })
        })
    }
}

/// Checks one file's extents and brings them to the whole disk.
fn pieces(file: &File, partition: u64) -> Result<Vec<Piece>, Malformed> {
    let mut before = 0;
    let mut pieces = Vec::with_capacity(file.extents.len().min(MOST));
    for extent in &file.extents {
        let (file, at) = (file.id, extent.file);
        if extent.len == 0 {
            return Err(Malformed::Empty { file, at });
        }
        let start = extent.device.checked_add(partition);
        let ends = |start: u64| start.checked_add(extent.len).filter(|end| *end < 1 << 63);
        let (Some(start), Some(end)) = (start, ends(extent.file)) else {
            return Err(Malformed::Beyond { file, at });
        };
        if ends(start).is_none() {
            return Err(Malformed::Beyond { file, at });
        }
        if extent.file < before {
            return Err(Malformed::Disorder { file, at });
        }
        before = end;
        if pieces.len() == MOST {
            return Err(Malformed::TooMany { file });
        }
        pieces.push(Piece { start, len: extent.len, offset: extent.file, file });
    }
    Ok(pieces)
}

/// The parts of `added` (sorted) that lie outside of `taken` (sorted, disjoint) and of one another.
fn outside(taken: &[Piece], added: &[Piece]) -> Vec<Piece> {
    let mut free = Vec::with_capacity(added.len());
    let mut done = 0;
    for piece in added {
        let mut at = piece.start.max(done);
        let end = piece.end();
        let mut push = |from: u64, to: u64| {
            if from < to {
                let offset = piece.offset + (from - piece.start);
                free.push(Piece { start: from, len: to - from, offset, file: piece.file });
            }
        };
        let first = taken.partition_point(|other| other.end() <= at);
        for other in taken[first..].iter().take_while(|other| other.start < end) {
            push(at, other.start);
            at = at.max(other.end());
        }
        push(at, end);
        done = done.max(end);
    }
    free
}

/// A list of extents as one file, for tests and callers that have but one.
pub fn file(id: u64, extents: &[(u64, u64, u64)]) -> File {
    let extent = |&(device, file, len): &(u64, u64, u64)| Extent { device, file, len };
    File { id, extents: extents.iter().map(extent).collect() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;

    fn hits(extents: &Extents, sector: u64, sectors: u32) -> Vec<(u64, u64, u64)> {
        extents.resolve(sector, sectors).map(|hit| (hit.file, hit.chunk, hit.bytes)).collect()
    }

    #[test]
    fn a_read_is_split_at_pieces_and_at_chunks() {
        let mut extents = Extents::default();
        extents
            .add(&file(1, &[(0, CHUNK - 4096, 8192), (8192, 3 * CHUNK, 4096)]), 1 << 20)
            .unwrap();
        let first = (1 << 20) / SECTOR;
        assert_eq!(hits(&extents, first, 24), [(1, 0, 4096), (1, 1, 4096), (1, 3, 4096)]);
        assert_eq!(hits(&extents, first + 7, 2), [(1, 0, 512), (1, 1, 512)]);
        assert_eq!(hits(&extents, first - 8, 8), []);
        assert_eq!(hits(&extents, first + 24, 8), []);
        assert_eq!(hits(&extents, u64::MAX, u32::MAX), []);
    }

    #[test]
    fn what_files_share_belongs_to_the_first() {
        let mut extents = Extents::default();
        extents.add(&file(1, &[(4096, 0, 4096)]), 0).unwrap();
        extents.add(&file(2, &[(0, 0, 16384)]), 0).unwrap();
        assert_eq!(extents.shared(), 4096);
        assert_eq!(hits(&extents, 0, 32), [(2, 0, 4096), (1, 0, 4096), (2, 0, 8192)]);
        extents.add(&file(3, &[(0, 0, 4096), (0, 8192, 4096)]), 0).unwrap();
        assert_eq!(extents.shared(), 4096 + 8192);
    }

    #[test]
    fn malformed_lists_are_refused_and_change_nothing() {
        let mut extents = Extents::default();
        extents.add(&file(1, &[(0, 0, 4096)]), 0).unwrap();
        let before = extents.clone();
        for (list, partition) in [
            (vec![(0, 0, 0)], 0),
            (vec![(0, 4096, 4096), (8192, 0, 4096)], 0),
            (vec![(0, 0, 8192), (8192, 4096, 4096)], 0),
            (vec![(u64::MAX, 0, 1)], 0),
            (vec![(0, u64::MAX, 1)], 0),
            (vec![(0, 0, u64::MAX)], 0),
            (vec![(1 << 20, 0, 4096)], u64::MAX - 4096),
        ] {
            assert!(extents.add(&file(2, &list), partition).is_err(), "{list:?}");
            assert_eq!(extents, before);
        }
    }

    /// Against a map of every sector.
    #[test]
    fn any_files_resolve_as_a_plain_map_does() {
        for seed in 0..200 {
            let mut random = fastrand::Rng::with_seed(seed);
            let (mut extents, mut truth) = (Extents::default(), BTreeMap::new());
            let partition = random.u64(0..64) * SECTOR;
            for id in 0..3 {
                let (mut list, mut offset) = (Vec::new(), 0);
                for _ in 0..random.usize(1..30) {
                    offset += random.u64(0..700) * SECTOR;
                    let (place, len) = (random.u64(0..4000), random.u64(1..90));
                    list.push((place * SECTOR, offset, len * SECTOR));
                    offset += len * SECTOR;
                }
                extents.add(&file(id, &list), partition).unwrap();
                let mut sorted = list.clone();
                sorted.sort_unstable();
                for (place, offset, len) in sorted {
                    for sector in 0..len / SECTOR {
                        let at = (place + partition) / SECTOR + sector;
                        truth.entry(at).or_insert((id, (offset + sector * SECTOR) / CHUNK));
                    }
                }
            }
            for _ in 0..100 {
                let (sector, sectors) = (random.u64(0..4200), random.u32(1..200));
                let mut found = BTreeMap::new();
                for hit in extents.resolve(sector, sectors) {
                    *found.entry((hit.file, hit.chunk)).or_insert(0) += hit.bytes;
                }
                let mut wanted = BTreeMap::new();
                for at in sector..sector + u64::from(sectors) {
                    if let Some(place) = truth.get(&at) {
                        *wanted.entry(*place).or_insert(0) += SECTOR;
                    }
                }
                assert_eq!(found, wanted, "seed {seed}: {sectors} sectors at {sector}");
            }
        }
    }
}
