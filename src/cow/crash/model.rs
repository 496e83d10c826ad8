//! What each sector of a replica may hold, by the rules of a disk with a volatile cache.
//!
//! Two sets a sector. **Live**: what a read may return now. **Durable**: what may be found after a
//! power cut. A write adds its content to both when it begins. When it has succeeded, it drives
//! from the live set whatever was complete before it began. When a flush is acknowledged, every
//! write that had succeeded before the flush began does the same in the durable set.
//!
//! Writes that fail, and discards, add and never drive out: they may have happened or not. What is
//! read while nothing is in flight is what is there: the reading counts as a write of its own, so
//! that contents can't change their mind.

use std::{collections::BTreeMap, ops::Range, rc::Rc};

use crate::units::SECTOR;

const BYTES: usize = SECTOR as usize;

type Content = Rc<[u8; BYTES]>;

/// The number of an event that gave sectors a content.
pub(super) type Event = usize;

#[derive(Clone, Copy)]
struct Times {
    began: u64,
    ended: Option<u64>,
    /// It surely happened.
    sure: bool,
}

#[derive(Clone)]
struct Version {
    content: Content,
    event: Event,
}

#[derive(Clone, Default)]
struct Sector {
    live: Vec<Version>,
    durable: Vec<Version>,
    /// No longer live, and since when: a read that began before may still return it.
    gone: Vec<(Version, u64)>,
}

/// A write of less than a sector.
#[derive(Clone)]
struct Part {
    event: Event,
    number: u64,
    at: usize,
    bytes: Vec<u8>,
}

impl Part {
    fn over(&self, content: &Content) -> Content {
        let mut merged = **content;
        merged[self.at..self.at + self.bytes.len()].copy_from_slice(&self.bytes);
        Rc::new(merged)
    }
}

/// All sectors that guests touch.
#[derive(Clone)]
pub(super) struct Model {
    clock: u64,
    events: Vec<Times>,
    sectors: BTreeMap<u64, Sector>,
    /// Sectors whose durable set has more than one content.
    unsettled: Vec<u64>,
    /// Writes of less than a sector since the last crash.
    parts: Vec<Part>,
}

impl Model {
    /// A model whose sectors hold `content(sector)`.
    pub(super) fn new(areas: &[Range<u64>], content: impl Fn(u64) -> [u8; BYTES]) -> Model {
        let start = Times { began: 0, ended: Some(1), sure: true };
        let sectors = areas.iter().cloned().flat_map(sectors).map(|number| {
            let version = Version { content: Rc::new(content(number)), event: 0 };
            let (live, durable) = (vec![version.clone()], vec![version]);
            (number, Sector { live, durable, gone: Vec::new() })
        });
        Model {
            clock: 1,
            events: vec![start],
            sectors: sectors.collect(),
            unsettled: Vec::new(),
            parts: Vec::new(),
        }
    }

    pub(super) fn now(&mut self) -> u64 {
        self.clock += 1;
        self.clock
    }

    /// A write of `bytes` at `offset` begins; sectors covered in part keep the rest.
    pub(super) fn begin(&mut self, offset: u64, bytes: &[u8]) -> Event {
        let began = self.now();
        let event = self.events.len();
        self.events.push(Times { began, ended: None, sure: false });
        let range = offset..offset + bytes.len() as u64;
        for number in sectors(range.clone()) {
            let Some(sector) = self.sectors.get_mut(&number) else { continue };
            let start = number * SECTOR;
            let (from, to) = (range.start.max(start), range.end.min(start + SECTOR));
            let piece = &bytes[(from - offset) as usize..(to - offset) as usize];
            let mut contents = Vec::new();
            if let Ok(whole) = piece.try_into() {
                contents.push(Rc::new(whole));
            } else {
                let part = Part { event, number, at: (from - start) as usize, bytes: piece.into() };
                contents.extend(sector.live.iter().map(|version| part.over(&version.content)));
                self.parts.push(part);
            }
            let versions = contents.into_iter().map(|content| Version { content, event });
            sector.live.extend(versions.clone());
            sector.durable.extend(versions);
            self.unsettled.push(number);
        }
        event
    }

    /// The write has ended: `sure` if it succeeded.
    pub(super) fn end(&mut self, event: Event, range: Range<u64>, sure: bool) {
        let now = self.now();
        self.events[event].ended = Some(now);
        self.events[event].sure = sure;
        if !sure {
            return;
        }
        let began = self.events[event].began;
        for number in sectors(range) {
            let Some(sector) = self.sectors.get_mut(&number) else { continue };
            let events = &self.events;
            let overtaken = |version: &Version| {
                version.event != event
                    && events[version.event].ended.is_some_and(|end| end <= began)
            };
            sector.gone.extend(
                sector.live.iter().filter(|v| overtaken(v)).map(|version| (version.clone(), now)),
            );
            sector.live.retain(|version| !overtaken(version));
        }
    }

    /// A flush that began at `began` was acknowledged.
    pub(super) fn flushed(&mut self, began: u64) {
        let events = &self.events;
        let (sectors, unsettled) = (&mut self.sectors, &mut self.unsettled);
        unsettled.sort_unstable();
        unsettled.dedup();
        unsettled.retain(|number| {
            let Some(sector) = sectors.get_mut(number) else { return false };
            let latest = sector
                .durable
                .iter()
                .map(|version| events[version.event])
                .filter(|times| times.sure && times.ended.is_some_and(|end| end <= began))
                .map(|times| times.began)
                .max();
            if let Some(latest) = latest {
                sector
                    .durable
                    .retain(|version| events[version.event].ended.is_none_or(|end| end > latest));
            }
            sector.durable.len() > 1
        });
    }

    /// Checks what a read that began at `began` returned.
    pub(super) fn check_read(
        &mut self,
        began: u64,
        offset: u64,
        bytes: &[u8],
    ) -> Result<(), String> {
        let range = offset..offset + bytes.len() as u64;
        for number in sectors(range.clone()) {
            let start = number * SECTOR;
            let (from, to) = (range.start.max(start), range.end.min(start + SECTOR));
            let piece = &bytes[(from - offset) as usize..(to - offset) as usize];
            let within = (from - start) as usize..(to - start) as usize;
            let Some(sector) = self.sectors.get(&number) else { continue };
            let gone = sector.gone.iter().filter(|(_, since)| *since > began).map(|(v, _)| v);
            let allowed = |version: &&Version| version.content[within.clone()] == *piece;
            let Some(found) = sector.live.iter().chain(gone).find(allowed).cloned() else {
                return Err(self.describe("read", number, piece));
            };
            let quiet = |version: &Version| {
                self.events[version.event].ended.is_some_and(|end| end <= began)
            };
            if piece.len() == BYTES && sector.live.len() > 1 && sector.live.iter().all(quiet) {
                self.observe(number, found.content);
            }
        }
        Ok(())
    }

    /// Checks what is found after a power cut. From here on it is what there is.
    pub(super) fn check_cut(&mut self, offset: u64, bytes: &[u8]) -> Result<(), String> {
        for (number, piece) in sectors(offset..offset + bytes.len() as u64).zip(bytes.chunks(BYTES))
        {
            let Some(sector) = self.sectors.get_mut(&number) else { continue };
            let Some(found) =
                sector.durable.iter().find(|version| *version.content == *piece).cloned()
            else {
                return Err(self.describe("found after a power cut", number, piece));
            };
            sector.live = vec![found.clone()];
            sector.durable = vec![found];
            sector.gone.clear();
        }
        Ok(())
    }

    /// The device ends at `size` after a power cut: it had grown, and that was lost. What appears
    /// beyond should it grow again may be anything that was durable there; nobody knows until then.
    pub(super) fn hide(&mut self, size: u64) {
        let now = self.now();
        let event = self.events.len();
        self.events.push(Times { began: now, ended: Some(now), sure: false });
        for (_, sector) in self.sectors.range_mut(size.div_ceil(SECTOR)..) {
            sector.durable.iter_mut().for_each(|version| version.event = event);
            sector.live = sector.durable.clone();
            sector.gone.clear();
        }
    }

    /// Checks what is found after a kill. The map's changes since the last flush died with the
    /// process, so it is what a power cut allows; but it is not durable because it is there.
    pub(super) fn check_kill(&mut self, offset: u64, bytes: &[u8]) -> Result<(), String> {
        for (number, piece) in sectors(offset..offset + bytes.len() as u64).zip(bytes.chunks(BYTES))
        {
            let Some(sector) = self.sectors.get(&number) else { continue };
            let Some(found) =
                sector.durable.iter().find(|version| *version.content == *piece).cloned()
            else {
                return Err(self.describe("found after a kill", number, piece));
            };
            self.observe(number, found.content);
        }
        Ok(())
    }

    /// Checks what is found after the death of a process whose tail was kept: all that it had
    /// acknowledged.
    pub(super) fn check_death(&mut self, offset: u64, bytes: &[u8]) -> Result<(), String> {
        for (number, piece) in sectors(offset..offset + bytes.len() as u64).zip(bytes.chunks(BYTES))
        {
            let Some(sector) = self.sectors.get(&number) else { continue };
            let Some(found) =
                sector.live.iter().find(|version| *version.content == *piece).cloned()
            else {
                return Err(self.describe("found after a death", number, piece));
            };
            self.observe(number, found.content);
        }
        Ok(())
    }

    /// Takes what is found for what there is.
    pub(super) fn take(&mut self, offset: u64, bytes: &[u8]) {
        for (number, piece) in sectors(offset..offset + bytes.len() as u64).zip(bytes.chunks(BYTES))
        {
            if let Ok(content) = piece.try_into() {
                self.observe(number, Rc::new(content));
            }
        }
    }

    /// A failed sync took pages from the cache: a write of less than a sector may have met any
    /// older content of it.
    pub(super) fn lost_pages(&mut self) {
        for part in &self.parts {
            let Some(sector) = self.sectors.get_mut(&part.number) else { continue };
            let merged: Vec<Version> = sector
                .durable
                .iter()
                .map(|version| Version { content: part.over(&version.content), event: part.event })
                .collect();
            sector.durable.extend(merged);
        }
    }

    /// A crash ended whatever was under way.
    pub(super) fn end_all(&mut self) {
        self.parts.clear();
        let now = self.now();
        for times in self.events.iter_mut().filter(|times| times.ended.is_none()) {
            times.ended = Some(now);
        }
    }

    /// The sector was seen to hold `content` while nothing was in flight on it.
    fn observe(&mut self, number: u64, content: Content) {
        let (began, ended) = (self.now(), Some(self.now()));
        let event = self.events.len();
        self.events.push(Times { began, ended, sure: true });
        if let Some(sector) = self.sectors.get_mut(&number) {
            let version = Version { content, event };
            let before = std::mem::replace(&mut sector.live, vec![version.clone()]);
            sector.gone.extend(before.into_iter().map(|version| (version, began)));
            sector.durable.push(version);
            self.unsettled.push(number);
        }
    }

    fn describe(&self, what: &str, number: u64, piece: &[u8]) -> String {
        let short = |bytes: &[u8]| {
            bytes.iter().take(8).map(|byte| format!("{byte:02x}")).collect::<String>()
        };
        let list = |versions: &[Version]| {
            let each =
                versions.iter().map(|v| format!("{} (event {})", short(&*v.content), v.event));
            each.collect::<Vec<_>>().join(", ")
        };
        let (live, durable) = match self.sectors.get(&number) {
            Some(sector) => (list(&sector.live), list(&sector.durable)),
            None => Default::default(),
        };
        format!(
            "sector {number} (block {}): {what} {}; live {live}; durable {durable}",
            number / 8,
            short(piece)
        )
    }
}

fn sectors(bytes: Range<u64>) -> Range<u64> {
    bytes.start / SECTOR..bytes.end.div_ceil(SECTOR)
}
