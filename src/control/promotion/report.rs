//! What the agent reported last: of each disk, and which chunks of which copies reached the device.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    time::{Duration, Instant},
};

use underlay_agent::{
    histogram::Histogram,
    report::{DiskReport, Load, Report},
};

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
        self.bytes += load.bytes;
        self.errors += load.errors;
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
        if let Some(cost) = report.cost {
            self.runs += cost.runs;
            self.run_nanos += cost.run_ns;
        }
        let losses = &report.losses;
        self.dropped += losses.full + losses.ring + losses.chunks + losses.unmatched;
        self.unresolved += report.unresolved.reads;
        for disk in &report.disks {
            let Ok(name) = disk.name.parse::<Name>() else { continue };
            let loads =
                [&disk.own_reads, &disk.own_writes, &disk.foreign_reads, &disk.foreign_writes];
            let classes = self.disks.entry(name).or_default();
            classes.iter_mut().zip(loads).for_each(|(class, load)| class.add(load));
        }
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
        let queued = own.queued + foreign.queued;
        let waited = own.queue_ns + foreign.queue_ns;
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
        counts.buckets[histogram::bucket(from)] += count;
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

    /// These are the copies whose reads the probes can tell.
    pub fn follow(&mut self, copies: HashSet<(Digest, Name)>) {
        self.followed = copies;
    }

    /// Takes a report in; `file` tells the copy that the agent knows by a number.
    pub fn take(
        &mut self,
        report: &Report,
        signals: &mut Signals<Name>,
        file: impl Fn(u64) -> Option<(Digest, Name)>,
    ) {
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
            let mut reads = counts(disk.own_reads.device_ns, &disk.own_reads.device);
            reads.add(&counts(disk.foreign_reads.device_ns, &disk.foreign_reads.device));
            signals.probed(&name, &reads);
            self.disks.insert(name, Probed::of(disk));
        }
        for chunk in report.chunks.iter().filter(|chunk| chunk.own.reads > 0) {
            let Some(copy) = file(chunk.file) else { continue };
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
