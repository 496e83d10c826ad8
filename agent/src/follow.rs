//! From what is watched to what is reported: slots, differences, attribution.
//!
//! Invariants:
//! - A slot belongs to one whole disk as long as anything on it is watched; its figures are those of
//!   the disk, with all partitions.
//! - Completed reads are attributed with the extents of the watch under which they were taken out of
//!   the ring: a change of the watch drains first.
//! - Memory is bounded, whatever is read: [`CHUNKS`] chunks a report.

use std::collections::HashMap;
use std::time::Instant;

use underlay_agent_ebpf::{self as layout, Class, Counters, READ, Touch, WRITE, class};

use crate::device::{Dev, Device, Kind};
use crate::error::{Error, Result};
use crate::extents::Extents;
use crate::histogram::Histogram;
use crate::probes::{InFlight, LONG, Needed, Probes};
use crate::report::{
    ChunkReport, Cost, Disk, DiskReport, Heat, Load, Losses, Refused, Report, Watch,
};

/// Most chunks that one report names.
pub const CHUNKS: usize = 64 << 10;

/// Follows the I/O of the watched disks.
pub struct Follower {
    probes: Probes,
    generation: u64,
    slots: Vec<Option<Slot>>,
    /// The watched disks by name, with their slots.
    names: Vec<(String, usize)>,
    refused: Vec<Refused>,
    chunks: HashMap<(u64, u64), (Heat, Heat)>,
    unresolved: Heat,
    unnamed: u64,
    swept: u64,
    since: Instant,
    losses: layout::Losses,
    cost: Option<Cost>,
}

/// What belongs to one whole disk.
struct Slot {
    device: Device,
    devs: Vec<Dev>,
    extents: Extents,
    last: Counters,
}

impl Follower {
    /// Watches nothing yet.
    pub fn new(probes: Probes) -> Result<Follower> {
        Ok(Follower {
            generation: 0,
            slots: (0..probes.slots()).map(|_| None).collect(),
            names: Vec::new(),
            refused: Vec::new(),
            chunks: HashMap::new(),
            unresolved: Heat::default(),
            unnamed: 0,
            swept: 0,
            since: Instant::now(),
            losses: probes.losses()?,
            cost: probes.cost(),
            probes,
        })
    }

    /// The programs beneath.
    pub fn probes(&mut self) -> &mut Probes {
        &mut self.probes
    }

    /// The generation of the watch in force.
    pub fn generation(&self) -> u64 {
        self.generation
    }

    /// Puts a watch into force. A disk that can't be watched is named in the reports; the others are.
    pub fn watch(&mut self, watch: &Watch) -> Result<()> {
        self.drain();
        // What is attributed from here on has other numbers.
        self.chunks.clear();
        self.probes.own(&watch.tgids)?;
        self.names.clear();
        self.refused.clear();
        let mut found = Vec::new();
        for disk in &watch.disks {
            match disk.dev.parse().and_then(Device::find) {
                Ok(device) => found.push((disk, device)),
                Err(error) => self.refuse(disk, &error.to_string()),
            }
        }
        for at in 0..self.slots.len() {
            let stays = |slot: &Slot| found.iter().any(|(_, device)| same(&slot.device, device));
            if self.slots[at].as_ref().is_some_and(|slot| !stays(slot)) {
                self.clear(at)?;
            } else if let Some(slot) = &mut self.slots[at] {
                slot.extents = Extents::default();
            }
        }
        let bios = found.iter().any(|(_, device)| device.kind == Kind::Bios);
        self.probes.follow_bios(if bios { Needed::Yes } else { Needed::No })?;
        for (disk, device) in found {
            match self.place(&device) {
                Ok(at) => {
                    self.names.push((disk.name.clone(), at));
                    self.add_files(at, disk, &device);
                }
                Err(error) => self.refuse(disk, &error.to_string()),
            }
        }
        self.generation = watch.generation;
        Ok(())
    }

    /// Takes completed reads out of the ring and attributes them. To be called several times a second:
    /// the ring holds 32 Ki reads.
    pub fn drain(&mut self) {
        let Follower { probes, slots, chunks, unresolved, unnamed, .. } = self;
        probes.drain(|touch| {
            let slot = slots.get(usize::from(touch.slot)).and_then(Option::as_ref);
            let Some(slot) = slot.filter(|_| touch.failed == 0) else { return };
            attribute(&touch, &slot.extents, chunks, unresolved, unnamed);
        });
    }

    /// What happened since the last report.
    pub fn sample(&mut self) -> Result<Report> {
        self.drain();
        let (now, flights) = (Instant::now(), self.probes.in_flight()?);
        let mut disks = Vec::with_capacity(self.names.len());
        let mut figures: Vec<Option<DiskReport>> = Vec::with_capacity(self.slots.len());
        for at in 0..self.slots.len() {
            figures.push(self.figures(at, &flights)?);
        }
        for (name, at) in &self.names {
            if let Some(Some(figures)) = figures.get(*at) {
                disks.push(DiskReport { name: name.clone(), ..figures.clone() });
            }
        }
        let (losses, cost) = (self.probes.losses()?, self.probes.cost());
        let before = std::mem::replace(&mut self.losses, losses);
        let cost_before = std::mem::replace(&mut self.cost, cost);
        let chunks = self.chunks.drain().map(|((file, chunk), (own, foreign))| ChunkReport {
            file,
            chunk,
            own,
            foreign,
        });
        let report = Report {
            version: env!("CARGO_PKG_VERSION").into(),
            pid: std::process::id(),
            generation: self.generation,
            seconds: now.duration_since(self.since).as_secs_f64(),
            disks,
            refused: self.refused.clone(),
            chunks: chunks.collect(),
            unresolved: std::mem::take(&mut self.unresolved),
            losses: Losses {
                full: losses.full.wrapping_sub(before.full),
                ring: losses.ring.wrapping_sub(before.ring),
                chunks: std::mem::take(&mut self.unnamed),
                unmatched: losses.unmatched.wrapping_sub(before.unmatched),
                orphans: losses.orphans.wrapping_sub(before.orphans),
                swept: std::mem::take(&mut self.swept)
                    + losses.replaced.wrapping_sub(before.replaced),
            },
            cost: cost.zip(cost_before).map(|(now, before)| Cost {
                run_ns: now.run_ns.saturating_sub(before.run_ns),
                runs: now.runs.saturating_sub(before.runs),
            }),
        };
        self.since = now;
        Ok(report)
    }

    fn refuse(&mut self, disk: &Disk, why: &str) {
        self.refused.push(Refused { name: disk.name.clone(), why: why.into() });
    }

    /// The slot of the device's whole disk; a free one if it has none.
    fn place(&mut self, device: &Device) -> Result<usize> {
        let known =
            |slot: &Option<Slot>| slot.as_ref().is_some_and(|slot| same(&slot.device, device));
        if let Some(at) = self.slots.iter().position(known) {
            return Ok(at);
        }
        let Some(at) = self.slots.iter().position(Option::is_none) else {
            let slots = self.probes.slots();
            return Err(Error::Full { name: device.name.clone(), slots });
        };
        // Also what came in while an earlier disk lost the slot.
        self.forget(at)?;
        let number = at as u32;
        // What an earlier disk left in the counters is not this one's.
        let last = self.probes.counters(number)?;
        let devs = device.numbers();
        let slot = Slot { device: device.clone(), devs, extents: Extents::default(), last };
        let devs = slot.devs.clone();
        self.slots[at] = Some(slot);
        for dev in devs {
            self.probes.watch(dev, number, device.kind)?;
        }
        Ok(at)
    }

    fn clear(&mut self, at: usize) -> Result<()> {
        let Some(slot) = self.slots[at].take() else { return Ok(()) };
        for dev in slot.devs {
            self.probes.unwatch(dev)?;
        }
        self.forget(at)
    }

    /// Forgets what is under way on a slot that no disk has.
    fn forget(&mut self, at: usize) -> Result<()> {
        let flights = self.probes.in_flight()?;
        for flight in flights.iter().filter(|flight| flight.slot as usize == at) {
            self.probes.forget(flight);
        }
        Ok(())
    }

    fn add_files(&mut self, at: usize, disk: &Disk, device: &Device) {
        let mut wrong = Vec::new();
        if let Some(slot) = &mut self.slots[at] {
            for file in &disk.files {
                if let Err(error) = slot.extents.add(file, device.start) {
                    wrong.push(format!("reads are not attributed to {error}"));
                }
            }
        }
        wrong.iter().for_each(|why| self.refuse(disk, why));
    }

    fn figures(&mut self, at: usize, flights: &[InFlight]) -> Result<Option<DiskReport>> {
        let Some(slot) = &mut self.slots[at] else { return Ok(None) };
        let total = self.probes.counters(at as u32)?;
        let last = std::mem::replace(&mut slot.last, total);
        let load = |direction, own| {
            let class = class(direction, own) as usize;
            difference(&total.classes[class], &last.classes[class])
        };
        let mut mine: Vec<_> = flights.iter().filter(|flight| flight.slot as usize == at).collect();
        mine.sort_unstable_by_key(|flight| flight.age);
        let missed = missed(&mine, slot.device.in_flight());
        mine.retain(|flight| !missed.contains(flight));
        self.swept += missed.len() as u64;
        missed.iter().for_each(|flight| self.probes.forget(flight));
        Ok(Some(DiskReport {
            name: String::new(),
            device: slot.device.name.clone(),
            own_reads: load(READ, 1),
            foreign_reads: load(READ, 0),
            own_writes: load(WRITE, 1),
            foreign_writes: load(WRITE, 0),
            in_flight: mine.len() as u64,
            oldest_ns: mine.last().map_or(0, |flight| flight.age),
        }))
    }
}

/// Whether both stand on one whole disk.
fn same(one: &Device, other: &Device) -> bool {
    one.disk == other.disk && one.kind == other.kind && one.name == other.name
}

/// Which of a disk's flights (ascending by age) can't be in flight: the kernel counts fewer than are here.
///
/// An end goes unseen only if the kernel shows it to neither of two programs; its flight then stays until
/// the next request at its address, which on an idle disk is late. Those that are kept are the youngest: a
/// request taken for hung would be a false alarm.
fn missed(flights: &[&InFlight], real: Option<u64>) -> Vec<InFlight> {
    let Some(real) = real else { return Vec::new() };
    let old = flights.iter().filter(|flight| flight.age > LONG).count() as u64;
    let gone = old.saturating_sub(real);
    flights.iter().rev().take(gone as usize).map(|flight| **flight).collect()
}

fn attribute(
    touch: &Touch,
    extents: &Extents,
    chunks: &mut HashMap<(u64, u64), (Heat, Heat)>,
    unresolved: &mut Heat,
    unnamed: &mut u64,
) {
    let whole = u64::from(touch.sectors) * crate::SECTOR;
    let share = |bytes: u64| {
        let part = u128::from(touch.ns) * u128::from(bytes) / u128::from(whole.max(1));
        u64::try_from(part).unwrap_or(u64::MAX)
    };
    let mut left = whole;
    for hit in extents.resolve(touch.sector, touch.sectors) {
        left = left.saturating_sub(hit.bytes);
        let full = chunks.len() >= CHUNKS;
        let heat = match chunks.entry((hit.file, hit.chunk)) {
            std::collections::hash_map::Entry::Occupied(known) => known.into_mut(),
            std::collections::hash_map::Entry::Vacant(room) if !full => {
                room.insert_entry(Default::default()).into_mut()
            }
            std::collections::hash_map::Entry::Vacant(_) => {
                *unnamed += 1;
                continue;
            }
        };
        let heat = if touch.own != 0 { &mut heat.0 } else { &mut heat.1 };
        heat.add(hit.bytes, share(hit.bytes));
    }
    if left > 0 {
        unresolved.add(left, share(left));
    }
}

fn difference(now: &Class, before: &Class) -> Load {
    let buckets = |now: &[u32], before: &[u32]| {
        let pairs = now.iter().zip(before);
        Histogram::from_counts(pairs.map(|(now, before)| u64::from(now.wrapping_sub(*before))))
    };
    Load {
        count: now.count.wrapping_sub(before.count),
        bytes: now.bytes.wrapping_sub(before.bytes),
        errors: now.errors.wrapping_sub(before.errors),
        device_ns: now.device_ns.wrapping_sub(before.device_ns),
        queue_ns: now.queue_ns.wrapping_sub(before.queue_ns),
        queued: now.queued.wrapping_sub(before.queued),
        device: buckets(&now.device, &before.device),
        queue: buckets(&now.queue, &before.queue),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::extents::file;

    #[test]
    fn a_read_of_several_chunks_shares_its_time_by_bytes() {
        let mut extents = Extents::default();
        extents.add(&file(3, &[(0, crate::CHUNK - 4096, 8192)]), 0).unwrap();
        let touch = Touch { sector: 0, sectors: 32, ns: 1000, own: 1, ..Touch::default() };
        let (mut chunks, mut rest, mut unnamed) = (HashMap::new(), Heat::default(), 0);
        attribute(&touch, &extents, &mut chunks, &mut rest, &mut unnamed);
        let quarter = Heat { reads: 1, bytes: 4096, ns: 250 };
        assert_eq!(chunks[&(3, 0)], (quarter, Heat::default()));
        assert_eq!(chunks[&(3, 1)], (quarter, Heat::default()));
        assert_eq!((rest, unnamed), (Heat { reads: 1, bytes: 8192, ns: 500 }, 0));
    }

    #[test]
    fn of_old_flights_those_are_forgotten_that_the_kernel_does_not_count() {
        let of = |age| {
            let mut flight = InFlight::default();
            flight.age = age;
            flight
        };
        let flights = [of(5), of(LONG + 1), of(LONG + 2), of(LONG + 3)];
        let flights: Vec<&InFlight> = flights.iter().collect();
        let ages = |real| -> Vec<u64> {
            missed(&flights, real).iter().map(|flight| flight.age - LONG).collect()
        };
        assert!(ages(None).is_empty() && ages(Some(3)).is_empty());
        assert_eq!((ages(Some(2)), ages(Some(0))), (vec![3], vec![3, 2, 1]));
    }

    #[test]
    fn a_report_names_no_more_chunks_than_it_may() {
        let mut extents = Extents::default();
        let all = (CHUNKS as u64 + 8) * crate::CHUNK;
        extents.add(&file(3, &[(0, 0, all)]), 0).unwrap();
        let (mut chunks, mut rest, mut unnamed) = (HashMap::new(), Heat::default(), 0);
        for at in 0..CHUNKS as u64 + 8 {
            let sector = at * crate::CHUNK / crate::SECTOR;
            let touch = Touch { sector, sectors: 8, ns: 1, ..Touch::default() };
            attribute(&touch, &extents, &mut chunks, &mut rest, &mut unnamed);
        }
        assert_eq!((chunks.len(), unnamed, rest.reads), (CHUNKS, 8, 0));
    }

    #[test]
    fn counters_that_wrapped_differ_by_what_was_added() {
        let mut before = Class { count: u64::MAX, device_ns: 5, ..Class::default() };
        before.device[3] = u32::MAX;
        let mut now = Class { count: 1, device_ns: 9, ..Class::default() };
        now.device[3] = 1;
        let load = difference(&now, &before);
        assert_eq!((load.count, load.device_ns, load.device.count()), (2, 4, 2));
    }
}
