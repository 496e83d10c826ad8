//! What the agent reported last: of each disk, and which chunks of which copies reached the device.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    time::{Duration, Instant},
};

use underlay_agent::{
    histogram::Histogram,
    report::{DiskReport, Load, Report},
};

use super::watch::Watched;
use crate::{
    catalog::{Digest, Name},
    control::{
        api::{Origin, SignalView},
        metrics::{self, DeviceReads, Latency, ProbedDisk, Served},
    },
    histogram::{self, Counts},
    promote::signal::Signals,
    units::Chunk,
};

/// How old a report may be to count.
const FRESH: Duration = Duration::from_secs(4);
/// Ticks that a chunk's device read is remembered: a read's two sides are told in different ticks.
const REMEMBERED: u64 = 3;

/// What the probes tell.
pub struct Probes {
    /// Why there are none, if so.
    reason: String,
    heard: Option<Instant>,
    agent: u32,
    cost: Option<u64>,
    disks: HashMap<Name, Probed>,
    /// By copy (image and disk): the chunks whose reads reached the device, and in which tick.
    chunks: HashMap<(Digest, Name), HashMap<Chunk, u64>>,
    tick: u64,
    /// The copies whose extents are known.
    followed: HashSet<(Digest, Name)>,
    /// What was reported since the daemon's start.
    tally: Tally,
}

/// What was reported since the daemon's start.
#[derive(Default)]
struct Tally {
    runs: u64,
    run_nanos: u64,
    dropped: u64,
    unresolved: u64,
    /// Reads and writes, own and foreign, of each disk.
    disks: BTreeMap<Name, [Class; 4]>,
}

/// One class of I/O on one disk.
#[derive(Default)]
struct Class {
    bytes: u64,
    errors: u64,
    device: Counts,
    queue: Counts,
}

impl Class {
    fn add(&mut self, load: &Load) {
        self.bytes = self.bytes.saturating_add(load.bytes);
        self.errors = self.errors.saturating_add(load.errors);
        self.device.add(&counts(load.device_ns, &load.device));
        self.queue.add(&counts(load.queue_ns, &load.queue));
    }

    fn served(&self) -> Served {
        Served {
            bytes: self.bytes,
            errors: self.errors,
            device: Latency::of(&self.device),
            queue: Latency::of(&self.queue),
        }
    }
}

impl Tally {
    fn add(&mut self, report: &Report) {
        let add = |sum: &mut u64, more| *sum = sum.saturating_add(more);
        if let Some(cost) = report.cost {
            add(&mut self.runs, cost.runs);
            add(&mut self.run_nanos, cost.run_ns);
        }
        let losses = &report.losses;
        for lost in [losses.full, losses.ring, losses.chunks, losses.unmatched] {
            add(&mut self.dropped, lost);
        }
        add(&mut self.unresolved, report.unresolved.reads);
    }

    fn add_disk(&mut self, name: &Name, disk: &DiskReport) {
        let loads = [&disk.own_reads, &disk.own_writes, &disk.foreign_reads, &disk.foreign_writes];
        let classes = self.disks.entry(name.clone()).or_default();
        classes.iter_mut().zip(loads).for_each(|(class, load)| class.add(load));
    }
}

/// A disk as the probes saw it in the last second.
#[derive(Clone, Copy, Debug, Default)]
pub struct Probed {
    /// Device reads of this daemon.
    pub own: u64,
    /// Device reads of everybody else.
    pub foreign: u64,
    /// Requests in flight.
    pub in_flight: u64,
    /// The age of the oldest of these.
    pub oldest_seconds: f64,
    /// Mean time that requests waited before the device had them.
    pub queue_seconds: f64,
}

impl Probed {
    fn of(disk: &DiskReport) -> Probed {
        let (own, foreign) = (&disk.own_reads, &disk.foreign_reads);
        let queued = own.queued.saturating_add(foreign.queued);
        let waited = own.queue_ns.saturating_add(foreign.queue_ns);
        Probed {
            own: own.count,
            foreign: foreign.count,
            in_flight: disk.in_flight,
            oldest_seconds: disk.oldest_ns as f64 / 1e9,
            queue_seconds: waited as f64 / queued.max(1) as f64 / 1e9,
        }
    }
}

/// The agent's histogram as one of ours; buckets are the same from 1 µs on.
fn counts(nanos: u64, histogram: &Histogram) -> Counts {
    let mut counts = Counts { nanos, ..Counts::default() };
    for (from, _, count) in histogram.iter() {
        let bucket = &mut counts.buckets[histogram::bucket(from)];
        *bucket = bucket.saturating_add(count);
    }
    counts
}

impl Probes {
    /// No agent has reported, because of `reason`.
    pub fn none(reason: impl Into<String>) -> Probes {
        Probes {
            reason: reason.into(),
            heard: None,
            agent: 0,
            cost: None,
            disks: HashMap::new(),
            chunks: HashMap::new(),
            tick: 0,
            followed: HashSet::new(),
            tally: Tally::default(),
        }
    }

    /// Whether an agent reports.
    pub fn is_live(&self) -> bool {
        self.heard.is_some_and(|at| at.elapsed() < FRESH)
    }

    /// From now on this is why there are none, while there are none.
    pub fn missing(&mut self, reason: impl Into<String>) {
        self.reason = reason.into();
    }

    /// This is what is watched from now on: of other disks nothing is kept.
    pub fn follow(&mut self, watched: &Watched) {
        self.followed = watched.followed();
        self.tally.disks.retain(|name, _| watched.has_disk(name));
        self.disks.retain(|name, _| watched.has_disk(name));
    }

    /// Takes in a report on what is watched. What it says of anything else is not kept.
    pub fn take(&mut self, report: &Report, signals: &mut Signals<Name>, watched: &Watched) {
        if !self.is_live() {
            tracing::info!(agent = report.pid, version = report.version, "the probes tell");
        }
        self.heard = Some(Instant::now());
        self.agent = report.pid;
        self.cost = report.cost.and_then(|cost| cost.run_ns.checked_div(cost.runs));
        for refused in &report.refused {
            tracing::debug!(disk = refused.name, why = refused.why, "not watched by the probes");
        }
        self.tally.add(report);
        self.disks.clear();
        for disk in &report.disks {
            let Ok(name) = disk.name.parse::<Name>() else { continue };
            if !watched.has_disk(&name) || self.disks.contains_key(&name) {
                continue;
            }
            self.tally.add_disk(&name, disk);
            let mut reads = counts(disk.own_reads.device_ns, &disk.own_reads.device);
            reads.add(&counts(disk.foreign_reads.device_ns, &disk.foreign_reads.device));
            signals.probed(&name, &reads);
            self.disks.insert(name, Probed::of(disk));
        }
        for chunk in report.chunks.iter().filter(|chunk| chunk.own.reads > 0) {
            let Some(file) = watched.file(chunk.file) else { continue };
            if chunk.chunk >= file.chunks {
                continue;
            }
            let copy = (file.digest, file.disk.clone());
            self.chunks.entry(copy).or_default().insert(Chunk(chunk.chunk), self.tick);
        }
    }

    /// A tick begins: what is old is forgotten.
    pub fn tick(&mut self) {
        self.tick += 1;
        let oldest = self.tick.saturating_sub(REMEMBERED);
        self.chunks.retain(|_, chunks| {
            chunks.retain(|_, tick| *tick >= oldest);
            !chunks.is_empty()
        });
    }

    /// Whether a read of this chunk of the copy on `disk` reached the device of late; `None` if the
    /// probes can't tell.
    pub fn saw(&self, digest: Digest, disk: &Name, chunk: Chunk) -> Option<bool> {
        let copy = (digest, disk.clone());
        if !self.is_live() || !self.disks.contains_key(disk) || !self.followed.contains(&copy) {
            return None;
        }
        let chunks = self.chunks.get(&copy);
        Some(chunks.is_some_and(|chunks| chunks.contains_key(&chunk)))
    }

    /// The disk as it was in the last second.
    pub fn of(&self, disk: &Name) -> Option<Probed> {
        self.disks.get(disk).copied().filter(|_| self.is_live())
    }

    /// For the metrics.
    pub fn metrics(&self) -> metrics::Probes {
        let disk = |(name, [own_reads, own_writes, foreign_reads, foreign_writes]): (
            &Name,
            &[Class; 4],
        )| {
            let now = self.of(name);
            ProbedDisk {
                disk: name.to_string(),
                own: DeviceReads { reads: own_reads.served(), writes: own_writes.served() },
                foreign: DeviceReads {
                    reads: foreign_reads.served(),
                    writes: foreign_writes.served(),
                },
                in_flight: now.map(|now| now.in_flight),
                oldest_seconds: now.map(|now| now.oldest_seconds),
            }
        };
        let told = self.tally.runs > 0;
        metrics::Probes {
            up: self.is_live(),
            runs: told.then_some(self.tally.runs),
            run_seconds: told.then_some(self.tally.run_nanos as f64 / 1e9),
            dropped: self.tally.dropped,
            unresolved: self.tally.unresolved,
            disks: self.tally.disks.iter().map(disk).collect(),
        }
    }

    /// Where figures are from.
    pub fn view(&self) -> SignalView {
        match self.is_live() {
            true => SignalView {
                source: Origin::Probes,
                reason: None,
                agent: Some(self.agent),
                cost_nanos: self.cost,
            },
            false => SignalView {
                source: Origin::Timing,
                reason: Some(self.reason.clone()),
                agent: None,
                cost_nanos: None,
            },
        }
    }
}

#[cfg(test)]
mod tests {
    //! Checked: what an agent says is kept only of what it was told to watch, and no figure is too large.

    use underlay_agent::report::{ChunkReport, Cost, Heat, Losses};

    use super::*;

    #[test]
    fn a_report_of_what_is_not_watched_or_too_large_does_no_harm() {
        let name = |text: &str| text.parse::<Name>().unwrap();
        let digest = Digest([1; 32]);
        let watched = Watched::for_test(&[name("a")], &[(7, digest, name("a"), 10)]);
        let load =
            Load { bytes: u64::MAX, errors: u64::MAX, device_ns: u64::MAX, ..Load::default() };
        let load = Load { queued: u64::MAX, queue_ns: u64::MAX, ..load };
        let disk = |name: &str| DiskReport {
            name: name.into(),
            own_reads: load.clone(),
            foreign_reads: load.clone(),
            ..DiskReport::default()
        };
        let chunk = |file, chunk| ChunkReport {
            file,
            chunk,
            own: Heat { reads: 1, ..Heat::default() },
            ..ChunkReport::default()
        };
        let most = u64::MAX;
        let report = Report {
            disks: vec![disk("a"), disk("a"), disk("b"), disk("../c")],
            chunks: vec![chunk(7, 9), chunk(7, 10), chunk(7, most), chunk(8, 0)],
            losses: Losses { full: most, ring: most, ..Losses::default() },
            unresolved: Heat { reads: most, ..Heat::default() },
            cost: Some(Cost { run_ns: most, runs: most }),
            ..Report::default()
        };
        let (mut probes, mut signals) = (Probes::none(""), Signals::default());
        probes.follow(&watched);
        for _ in 0..3 {
            probes.take(&report, &mut signals, &watched);
        }
        assert_eq!(probes.tally.disks.keys().collect::<Vec<_>>(), [&name("a")]);
        assert_eq!((probes.disks.len(), probes.chunks[&(digest, name("a"))].len()), (1, 1));
        assert_eq!(probes.metrics().dropped, most);
        // Another with the name of one that is gone begins anew.
        probes.follow(&Watched::for_test(&[name("b")], &[]));
        assert!(probes.tally.disks.is_empty() && probes.disks.is_empty());
        assert!(probes.of(&name("a")).is_none());
    }
}
