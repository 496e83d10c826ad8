//! How fast disks are, as far as can be told: the mean of their reads over the last ten ticks.
//!
//! Two sources: the probes, which see what the device did, and the service's own timing, which sees how
//! long a read took, and must guess from that whether it came from memory.

use std::{
    collections::{HashMap, VecDeque},
    hash::Hash,
};

use super::demand::FROM_MEMORY;
use crate::{catalog::Tier, histogram::Counts};

/// Ticks that are remembered.
const WINDOW: usize = 10;
/// Reads that make a mean worth something.
const ENOUGH: u64 = 8;

/// Latencies of disks, by name.
#[derive(Debug)]
pub struct Signals<K> {
    disks: HashMap<K, Windows>,
}

#[derive(Debug, Default)]
struct Windows {
    service: VecDeque<Counts>,
    probes: VecDeque<Counts>,
}

/// Where a figure is from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    /// The probes saw the device.
    Probes,
    /// The service timed its own reads.
    Timing,
    /// Nothing was read: it is what a disk of that tier usually takes.
    Tier,
}

/// How long reads of a disk took.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Latency {
    /// The mean, in nanoseconds.
    pub mean: u64,
    /// Half of them took less.
    pub median: u64,
    /// One in a hundred took longer.
    pub p99: u64,
    /// Reads that this is of.
    pub reads: u64,
    /// Where it is from.
    pub origin: Origin,
}

impl<K> Default for Signals<K> {
    fn default() -> Signals<K> {
        Signals { disks: HashMap::new() }
    }
}

impl<K: Hash + Eq + Clone> Signals<K> {
    /// A tick begins: reads of before the window are forgotten.
    pub fn tick(&mut self) {
        for windows in self.disks.values_mut() {
            for window in [&mut windows.service, &mut windows.probes] {
                window.push_back(Counts::default());
                if window.len() > WINDOW {
                    window.pop_front();
                }
            }
        }
        self.disks.retain(|_, windows| {
            let used = |window: &VecDeque<Counts>| window.iter().any(|counts| counts.nanos > 0);
            used(&windows.service) || used(&windows.probes)
        });
    }

    /// Reads of a disk that the service timed in this tick.
    pub fn timed(&mut self, disk: &K, reads: &Counts) {
        let windows = self.disks.entry(disk.clone()).or_default();
        newest(&mut windows.service).add(&reads.above(FROM_MEMORY.as_nanos() as u64));
    }

    /// Reads of a disk that the probes saw in this tick.
    pub fn probed(&mut self, disk: &K, reads: &Counts) {
        newest(&mut self.disks.entry(disk.clone()).or_default().probes).add(reads);
    }

    /// How fast a disk of this tier is.
    pub fn latency(&self, disk: &K, tier: Option<Tier>) -> Latency {
        let windows = self.disks.get(disk);
        let probed = windows.and_then(|windows| sum(&windows.probes, Origin::Probes));
        let timed = || windows.and_then(|windows| sum(&windows.service, Origin::Timing));
        probed.or_else(timed).unwrap_or_else(|| usual(tier))
    }
}

fn newest(window: &mut VecDeque<Counts>) -> &mut Counts {
    if window.is_empty() {
        window.push_back(Counts::default());
    }
    let last = window.len() - 1;
    &mut window[last]
}

fn sum(window: &VecDeque<Counts>, origin: Origin) -> Option<Latency> {
    let mut sum = Counts::default();
    window.iter().for_each(|counts| sum.add(counts));
    let reads = sum.total();
    if reads < ENOUGH {
        return None;
    }
    let quantile = |share| sum.quantile(share).unwrap_or_default();
    let (median, p99) = (quantile(0.5), quantile(0.99));
    Some(Latency { mean: sum.mean()?, median, p99, reads, origin })
}

/// What a read of a disk of this tier takes, if nothing is known of it.
fn usual(tier: Option<Tier>) -> Latency {
    let mean = match tier {
        Some(Tier::Nvme) => 100_000,
        Some(Tier::Ssd) | None => 200_000,
        Some(Tier::Hdd) => 8_000_000,
    };
    Latency { mean, median: mean, p99: mean, reads: 0, origin: Origin::Tier }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::histogram::Histogram;

    fn reads(count: usize, micros: u64) -> Counts {
        let histogram = Histogram::default();
        (0..count).for_each(|_| histogram.record(Duration::from_micros(micros)));
        histogram.counts()
    }

    #[test]
    fn what_is_old_is_forgotten_and_probes_are_believed_first() {
        let mut signals = Signals::default();
        let of = |signals: &Signals<&str>| {
            let latency = signals.latency(&"a", Some(Tier::Hdd));
            (latency.origin, latency.mean / 1_000_000)
        };
        assert_eq!(of(&signals), (Origin::Tier, 8));
        // What came from memory says nothing of the disk.
        signals.timed(&"a", &reads(1000, 10));
        signals.timed(&"a", &reads(100, 3_000));
        assert_eq!(of(&signals), (Origin::Timing, 3));
        signals.probed(&"a", &reads(100, 5_500));
        assert_eq!(of(&signals), (Origin::Probes, 5));
        for _ in 0..WINDOW - 1 {
            signals.tick();
            assert_eq!(of(&signals), (Origin::Probes, 5));
            signals.timed(&"a", &reads(10, 1_500));
        }
        signals.tick();
        assert_eq!(of(&signals), (Origin::Timing, 1));
        (0..WINDOW).for_each(|_| signals.tick());
        assert_eq!(of(&signals), (Origin::Tier, 8));
        assert!(signals.disks.is_empty());
    }
}
