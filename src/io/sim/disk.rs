//! One simulated file: for each sector what is durable, and what it may become.

use std::{
    collections::{BTreeMap, BTreeSet},
    io::{Error, Result},
    ops::Range,
    rc::Rc,
};

use super::{Kind, Lie, sectors};
use crate::units::{BLOCK, SECTOR, round_down};

const BYTES: usize = SECTOR as usize;

/// What a sector holds; `None` for zeros that take no space.
type Content = Option<Rc<[u8; BYTES]>>;

/// What a power cut leaves of sectors that were not durable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cut {
    /// The durable content, always.
    LoseAll,
    /// The newest content, of operations in flight too.
    KeepAll,
    /// The newest in sectors of even number, the durable in the others.
    KeepEven,
    /// The newest in sectors of odd number, the durable in the others.
    KeepOdd,
    /// Each any content that it may have.
    Any,
}

#[derive(Clone, Default)]
struct Sector {
    durable: Content,
    /// In order of time: what was put there since.
    versions: Vec<Version>,
}

#[derive(Clone)]
struct Version {
    /// When it took effect, by the world's clock.
    at: u64,
    content: Content,
    /// Its sync failed: no other makes it durable.
    doomed: bool,
    /// It was in flight when the crash came.
    landed: bool,
}

impl Sector {
    fn newest(&self) -> &Content {
        self.versions.last().map_or(&self.durable, |version| &version.content)
    }
}

#[derive(Clone)]
pub(super) struct File {
    pub(super) align: u64,
    pub(super) lie: Option<Lie>,
    pub(super) torn_sectors: bool,
    pub(super) read_faults: u32,
    pub(super) hung: bool,
    sectors: BTreeMap<u64, Sector>,
    /// Sectors that have versions.
    unsynced: BTreeSet<u64>,
    durable_len: u64,
    /// Lengths since, with their times.
    lens: Vec<(u64, u64)>,
}

impl File {
    pub(super) fn new(align: u64, content: &[u8], len: u64) -> File {
        let mut file = File {
            align,
            lie: None,
            torn_sectors: false,
            read_faults: 0,
            hung: false,
            sectors: BTreeMap::new(),
            unsynced: BTreeSet::new(),
            durable_len: len.max(content.len() as u64),
            lens: Vec::new(),
        };
        for (number, bytes) in content.chunks(BYTES).enumerate() {
            let durable = content_of(bytes, &None, 0);
            file.sectors.insert(number as u64, Sector { durable, versions: Vec::new() });
        }
        file
    }

    pub(super) fn len(&self) -> u64 {
        self.lens.last().map_or(self.durable_len, |(_, len)| *len)
    }

    /// What the kernel refuses on a direct file.
    pub(super) fn check(&self, kind: &Kind) -> Result<()> {
        let refused = match kind {
            Kind::Read(buf, offset) | Kind::Write(buf, offset) => {
                let place = offset | buf.len() as u64 | buf.as_ptr().addr() as u64;
                !place.is_multiple_of(self.align)
            }
            // Files can be punched at any byte; the overlay never does, so this is a bug.
            Kind::Punch(range) | Kind::Zero(range) => {
                range.is_empty() || !(range.start | range.end).is_multiple_of(BLOCK)
            }
            _ => false,
        };
        if refused { Err(Error::from_raw_os_error(libc::EINVAL)) } else { Ok(()) }
    }

    pub(super) fn read(&self, offset: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        let end = self.len().min(offset + len as u64);
        if offset >= end {
            return bytes;
        }
        for (number, sector) in self.sectors.range(sectors(&(offset..end))) {
            if let Some(content) = sector.newest() {
                let start = number * SECTOR;
                let (from, to) = (offset.max(start), end.min(start + SECTOR));
                bytes[(from - offset) as usize..(to - offset) as usize]
                    .copy_from_slice(&content[(from - start) as usize..(to - start) as usize]);
            }
        }
        bytes
    }

    pub(super) fn data_after(&self, offset: u64) -> Option<Range<u64>> {
        let mut holding = self
            .sectors
            .range(offset / SECTOR..)
            .filter(|(_, sector)| sector.newest().is_some())
            .map(|(number, _)| number * SECTOR);
        let start = holding.next().filter(|start| *start < self.len())?;
        let mut end = round_down(start, BLOCK) + BLOCK;
        for next in holding {
            if next > end {
                break;
            }
            end = round_down(next, BLOCK) + BLOCK;
        }
        Some(start.max(offset)..end.min(self.len()))
    }

    /// The bytes that a write, punch or zeroing changes, and those it puts there.
    fn effect(kind: &Kind) -> (Range<u64>, Option<Vec<u8>>) {
        match kind {
            Kind::Write(buf, offset) => (*offset..*offset + buf.len() as u64, Some(buf.to_vec())),
            Kind::Punch(range) | Kind::Zero(range) => (range.clone(), None),
            _ => (0..0, None),
        }
    }

    /// Applies a write, punch or zeroing to the sectors that `takes` picks.
    pub(super) fn change(&mut self, kind: &Kind, at: u64, mut takes: impl FnMut(u64) -> bool) {
        let (range, bytes) = File::effect(kind);
        for number in sectors(&range) {
            if takes(number) {
                self.put(number, &range, bytes.as_deref(), at, false);
            }
        }
        if !matches!(kind, Kind::Punch(_)) && range.end > self.len() {
            self.lens.push((at, range.end));
        }
    }

    fn put(
        &mut self,
        number: u64,
        range: &Range<u64>,
        bytes: Option<&[u8]>,
        at: u64,
        landed: bool,
    ) {
        let sector = self.sectors.entry(number).or_default();
        let content = bytes.and_then(|bytes| {
            let start = number * SECTOR;
            let (from, to) = (range.start.max(start), range.end.min(start + SECTOR));
            let piece = &bytes[(from - range.start) as usize..(to - range.start) as usize];
            content_of(piece, sector.newest(), (from - start) as usize)
        });
        sector.versions.push(Version { at, content, doomed: false, landed });
        self.unsynced.insert(number);
    }

    /// Replaces durable bytes; nothing may be unsynced there.
    pub(super) fn poke(&mut self, offset: u64, bytes: &[u8]) {
        let range = offset..offset + bytes.len() as u64;
        for number in sectors(&range) {
            let start = number * SECTOR;
            let (from, to) = (range.start.max(start), range.end.min(start + SECTOR));
            let piece = &bytes[(from - offset) as usize..(to - offset) as usize];
            let sector = self.sectors.entry(number).or_default();
            sector.durable = content_of(piece, &sector.durable, (from - start) as usize);
        }
    }

    pub(super) fn set_len(&mut self, len: u64, at: u64) {
        if len < self.len() {
            let cut: Vec<u64> =
                self.sectors.range(len.div_ceil(SECTOR)..).map(|(number, _)| *number).collect();
            for number in cut {
                self.put(number, &(0..0), None, at, false);
            }
        }
        self.lens.push((at, len));
    }

    pub(super) fn sync(&mut self, seen: u64) {
        let sectors = &mut self.sectors;
        self.unsynced.retain(|number| {
            let Some(sector) = sectors.get_mut(number) else { return false };
            let covered =
                sector.versions.iter().rposition(|version| version.at <= seen && !version.doomed);
            if let Some(last) = covered {
                sector.durable = sector.versions.drain(..=last).next_back().and_then(|v| v.content);
            }
            !sector.versions.is_empty()
        });
        if let Some(last) = self.lens.iter().rposition(|(at, _)| *at <= seen) {
            self.durable_len = self.lens.drain(..=last).next_back().map_or(0, |(_, len)| len);
        }
    }

    /// Like Linux: what the sync covered counts as clean, and no later sync brings it to the disk;
    /// of a buffered file some of it is gone from the page cache too.
    pub(super) fn fail_sync(&mut self, seen: u64, rng: &mut fastrand::Rng) {
        for number in &self.unsynced {
            if let Some(sector) = self.sectors.get_mut(number) {
                let evicts = self.align == 1;
                sector.versions.retain(|version| version.at > seen || !evicts || rng.u8(0..4) > 0);
                for version in sector.versions.iter_mut().filter(|version| version.at <= seen) {
                    version.doomed = true;
                }
            }
        }
    }

    /// At a crash: an operation in flight is one more thing that its sectors may hold.
    pub(super) fn land(&mut self, kind: &Kind, at: u64, rng: &mut fastrand::Rng) {
        let (range, bytes) = File::effect(kind);
        let torn = match self.torn_sectors && !range.is_empty() {
            true => Some(rng.u64(sectors(&range))),
            false => None,
        };
        for number in sectors(&range) {
            let old = self.sectors.get(&number).and_then(|sector| sector.newest().clone());
            self.put(number, &range, bytes.as_deref(), at, true);
            if torn == Some(number)
                && let Some(sector) = self.sectors.get_mut(&number)
                && let Some(version) = sector.versions.last_mut()
            {
                version.content = tear(&old, &version.content, rng);
            }
        }
        match kind {
            Kind::SetLen(len) if *len > self.len() => self.lens.push((at, *len)),
            Kind::Write(..) | Kind::Zero(_) if range.end > self.len() => {
                self.lens.push((at, range.end));
            }
            _ => {}
        }
    }

    /// After a power cut: every sector holds one thing, durably.
    pub(super) fn settle(&mut self, cut: Cut, rng: &mut fastrand::Rng) {
        let eager = [16, 128, 240][rng.usize(0..3)];
        let newest = |number: u64, rng: &mut fastrand::Rng| match cut {
            Cut::LoseAll => Some(false),
            Cut::KeepAll => Some(true),
            Cut::KeepEven => Some(number.is_multiple_of(2)),
            Cut::KeepOdd => Some(!number.is_multiple_of(2)),
            Cut::Any if rng.u32(0..256) < eager => Some(true),
            Cut::Any => None,
        };
        self.durable_len = match newest(0, rng) {
            Some(true) => self.len(),
            Some(false) => self.durable_len,
            None => match rng.usize(0..=self.lens.len()) {
                0 => self.durable_len,
                kept => self.lens[kept - 1].1,
            },
        };
        self.lens.clear();
        for number in std::mem::take(&mut self.unsynced) {
            let Some(sector) = self.sectors.get_mut(&number) else { continue };
            let versions = std::mem::take(&mut sector.versions);
            let kept = match newest(number, rng) {
                Some(true) => versions.len(),
                Some(false) => 0,
                None => rng.usize(0..=versions.len()),
            };
            if kept > 0 {
                sector.durable = versions.into_iter().nth(kept - 1).and_then(|v| v.content);
            }
            if number * SECTOR >= self.durable_len {
                sector.durable = None;
            }
        }
    }

    /// After a kill: what completed is there, what was in flight is there in some sectors. What a
    /// failed sync covered is on disk or gone: whoever opens the file looks past the page cache.
    pub(super) fn survive(&mut self, rng: &mut fastrand::Rng) {
        for number in &self.unsynced {
            let Some(sector) = self.sectors.get_mut(number) else { continue };
            for version in sector.versions.iter().filter(|version| version.doomed) {
                if rng.bool() {
                    sector.durable = version.content.clone();
                }
            }
            sector.versions.retain(|version| !version.doomed && (!version.landed || rng.bool()));
            sector.versions.iter_mut().for_each(|version| version.landed = false);
        }
    }
}

/// A sector with `piece` at `at`, and the rest as in `old`.
fn content_of(piece: &[u8], old: &Content, at: usize) -> Content {
    let mut bytes = old.as_deref().copied().unwrap_or([0; BYTES]);
    bytes[at..at + piece.len()].copy_from_slice(piece);
    Some(Rc::new(bytes))
}

/// The bytes of one content up to some point, those of the other from there.
fn tear(old: &Content, new: &Content, rng: &mut fastrand::Rng) -> Content {
    let [mut bytes, new] =
        [old, new].map(|content| content.as_deref().copied().unwrap_or([0; BYTES]));
    let at = rng.usize(0..BYTES);
    bytes[..at].copy_from_slice(&new[..at]);
    Some(Rc::new(bytes))
}
