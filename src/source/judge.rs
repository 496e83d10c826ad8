//! Which disks are in trouble: a pure function of what their reads took, window by window.
//!
//! A disk is slow when its median is more than twice that of its peers, the other disks of its tier, in five
//! of six windows; silent when reads are under way and none ends for two seconds. It is well again after a
//! while in which it was tried once a tick and answered as it should.

use std::{
    collections::{HashMap, VecDeque},
    time::Duration,
};

use super::disk::{Patience, Trouble};
use crate::{catalog::Tier, histogram::Counts};

/// Ticks that make a window.
const WINDOW: u32 = 5;
/// Windows that are remembered.
const WINDOWS: usize = 6;
/// In so many of them a slow disk was slow.
const SLOW: usize = 5;
/// How many times its peers' median a slow disk's is.
const TIMES: u64 = 2;
/// Reads that make a window count.
const ENOUGH: u64 = 8;
/// How long reads may be under way of which none ends.
const SILENCE: Duration = Duration::from_secs(2);

/// What a tick has seen of a disk.
#[derive(Clone, Debug, Default)]
pub struct Seen {
    /// What kind of disk it is.
    pub tier: Option<Tier>,
    /// Reads that the disk itself answered, as long as they took.
    pub reads: Counts,
    /// How long a read has been under way while none ended; zero if none is, or others end.
    pub stuck: Duration,
    /// What became of a read by which a disk in trouble was tried.
    pub trial: Option<Trial>,
    /// The trouble it is in.
    pub trouble: Option<Trouble>,
}

/// What became of a trial.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trial {
    /// It took so long.
    Answered(Duration),
    /// It failed.
    Failed,
    /// It is under way.
    Waits,
}

/// What is to be believed of a disk from now on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It is in this trouble.
    Trouble(Trouble),
    /// It is well again.
    Well,
}

/// The judge of a node's disks.
#[derive(Debug)]
pub struct Judge {
    /// For how long a disk in trouble has to answer well.
    clean: Duration,
    ticks: u32,
    disks: HashMap<String, Record>,
}

#[derive(Debug, Default)]
struct Record {
    window: Counts,
    /// Whether it was slow in the windows that counted, the newest last.
    slow: VecDeque<bool>,
    /// How long it has answered well since it fell.
    well: Duration,
    /// 95 % of its reads in good times take no longer, in nanoseconds.
    usual: u64,
}

impl Judge {
    /// Of disks of which nothing is known yet.
    pub fn new(clean: Duration) -> Judge {
        Judge { clean, ticks: 0, disks: HashMap::new() }
    }

    /// 95 % of a disk's reads in good times take no longer, in nanoseconds; 0 if nothing is known.
    pub fn usual(&self, disk: &str) -> u64 {
        self.disks.get(disk).map_or(0, |record| record.usual)
    }

    /// Takes in what was seen within `took`, and says of whom something else is to be believed.
    pub fn tick(&mut self, took: Duration, seen: &HashMap<String, Seen>) -> Vec<(String, Verdict)> {
        self.disks.retain(|name, _| seen.contains_key(name));
        for (name, seen) in seen {
            self.disks.entry(name.clone()).or_default().window.add(&seen.reads);
        }
        self.ticks += 1;
        if self.ticks >= WINDOW {
            self.ticks = 0;
            self.close_windows(seen);
        }
        let mut verdicts = Vec::new();
        for (name, seen) in seen {
            let Some(record) = self.disks.get_mut(name) else { continue };
            let verdict = match seen.trouble {
                None => record.falls(seen).map(Verdict::Trouble),
                Some(_) => record.recovers(seen, took, self.clean).then_some(Verdict::Well),
            };
            verdicts.extend(verdict.map(|verdict| (name.clone(), verdict)));
        }
        verdicts.sort_by(|a, b| a.0.cmp(&b.0));
        verdicts
    }

    fn close_windows(&mut self, seen: &HashMap<String, Seen>) {
        let medians: Vec<(&String, Option<Tier>, u64)> = seen
            .iter()
            .filter_map(|(name, seen)| {
                let window = &self.disks.get(name)?.window;
                let median = (window.total() >= ENOUGH).then(|| window.quantile(0.5)).flatten()?;
                Some((name, seen.tier, median))
            })
            .collect();
        for (name, tier, median) in &medians {
            let mut peers: Vec<u64> = medians
                .iter()
                .filter(|(peer, its, _)| peer != name && its == tier)
                .map(|(_, _, median)| *median)
                .collect();
            peers.sort_unstable();
            let Some(peers) = peers.get(peers.len() / 2) else { continue };
            let Some(record) = self.disks.get_mut(*name) else { continue };
            // Below what a second source would be asked for, slow is fast enough.
            let floor = Patience::of(*tier, Duration::ZERO).hedge.as_nanos() as u64 / 2;
            let slow = *median > peers.saturating_mul(TIMES) && median - peers > floor;
            record.slow.push_back(slow);
            if record.slow.len() > WINDOWS {
                record.slow.pop_front();
            }
        }
        for (name, record) in &mut self.disks {
            let window = std::mem::take(&mut record.window);
            let well = seen.get(name).is_some_and(|seen| seen.trouble.is_none());
            if well && window.total() >= ENOUGH && !record.slow.back().is_some_and(|slow| *slow) {
                record.usual = window.quantile(0.95).unwrap_or(record.usual);
            }
        }
    }
}

impl Record {
    fn falls(&mut self, seen: &Seen) -> Option<Trouble> {
        let trouble = if seen.stuck >= SILENCE {
            Trouble::Silent
        } else if self.slow.iter().filter(|slow| **slow).count() >= SLOW {
            Trouble::Slow
        } else {
            return None;
        };
        self.slow.clear();
        self.well = Duration::ZERO;
        Some(trouble)
    }

    fn recovers(&mut self, seen: &Seen, took: Duration, clean: Duration) -> bool {
        self.slow.clear();
        let patience = Patience::of(seen.tier, Duration::from_nanos(self.usual));
        // A trial reads a whole chunk. Who fell because he didn't answer has only to answer.
        let enough = match seen.trouble {
            Some(Trouble::Slow) => patience.hedge.saturating_mul(2),
            _ => patience.late,
        };
        match seen.trial {
            Some(Trial::Answered(time)) if time <= enough => {
                self.well = self.well.saturating_add(took);
            }
            Some(Trial::Answered(_) | Trial::Failed | Trial::Waits) => self.well = Duration::ZERO,
            None => {}
        }
        let well = self.well >= clean;
        if well {
            self.well = Duration::ZERO;
        }
        well
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::histogram::Histogram;

    const SECOND: Duration = Duration::from_secs(1);
    const CLEAN: Duration = Duration::from_secs(60);

    fn reads(count: usize, micros: u64) -> Counts {
        let histogram = Histogram::default();
        (0..count).for_each(|_| histogram.record(Duration::from_micros(micros)));
        histogram.counts()
    }

    /// Disks a, b, c: of a tier, with 20 reads of so many microseconds each.
    fn three(micros: [u64; 3]) -> HashMap<String, Seen> {
        let disk = |(name, micros): (&str, u64)| {
            let seen = Seen { tier: Some(Tier::Ssd), reads: reads(20, micros), ..Seen::default() };
            (name.to_owned(), seen)
        };
        ["a", "b", "c"].into_iter().zip(micros).map(disk).collect()
    }

    fn fallen(judge: &mut Judge, seen: &HashMap<String, Seen>, ticks: u32) -> Vec<(u32, String)> {
        let mut fallen = Vec::new();
        for tick in 1..=ticks {
            let verdicts = judge.tick(SECOND, seen);
            fallen.extend(verdicts.into_iter().map(|(name, _)| (tick, name)));
        }
        fallen
    }

    #[test]
    fn slow_is_who_is_slower_than_his_peers_for_long() {
        let mut judge = Judge::new(CLEAN);
        assert_eq!(fallen(&mut judge, &three([200, 180, 220]), 60), []);
        assert_eq!(fallen(&mut judge, &three([20_000, 21_000, 22_000]), 60), [], "all are");
        assert_eq!(fallen(&mut judge, &three([700, 180, 220]), 60), [], "by nothing that matters");
        // Five windows of five ticks.
        assert_eq!(fallen(&mut judge, &three([20_000, 180, 220]), 29), [(25, "a".to_owned())]);
        let alone = HashMap::from([("a".to_owned(), three([20_000, 0, 0])["a"].clone())]);
        assert_eq!(fallen(&mut Judge::new(CLEAN), &alone, 60), [], "it has no peers");
    }

    #[test]
    fn a_burst_is_forgiven() {
        let mut judge = Judge::new(CLEAN);
        for _ in 0..10 {
            assert_eq!(fallen(&mut judge, &three([20_000, 180, 220]), 20), []);
            assert_eq!(fallen(&mut judge, &three([200, 180, 220]), 10), []);
        }
    }

    #[test]
    fn silent_is_who_answers_nothing_and_well_who_answers_for_a_minute() {
        let mut judge = Judge::new(CLEAN);
        fallen(&mut judge, &three([200, 180, 220]), 10);
        let mut seen = three([0, 180, 220]);
        let mut disk = seen.remove("a").unwrap();
        let mut tick = |disk: &Seen| {
            let verdicts = judge.tick(SECOND, &HashMap::from([("a".to_owned(), disk.clone())]));
            verdicts.first().map(|(_, verdict)| *verdict)
        };
        disk.stuck = Duration::from_millis(1900);
        assert_eq!(tick(&disk), None);
        disk.stuck = SILENCE;
        assert_eq!(tick(&disk), Some(Verdict::Trouble(Trouble::Silent)));
        disk.trouble = Some(Trouble::Silent);
        disk.stuck = Duration::ZERO;
        let good = Trial::Answered(Duration::from_millis(1));
        for bad in [Trial::Waits, Trial::Failed, Trial::Answered(SECOND)] {
            disk.trial = Some(good);
            (0..59).for_each(|_| assert_eq!(tick(&disk), None));
            disk.trial = Some(bad);
            assert_eq!(tick(&disk), None);
        }
        disk.trial = Some(good);
        (0..59).for_each(|_| assert_eq!(tick(&disk), None));
        disk.trial = None;
        assert_eq!(tick(&disk), None, "it was not tried");
        disk.trial = Some(good);
        assert_eq!(tick(&disk), Some(Verdict::Well));
        // Fast enough for one that was silent, not for one that was slow.
        disk.trial = Some(Trial::Answered(Duration::from_millis(30)));
        (0..59).for_each(|_| assert_eq!(tick(&disk), None));
        assert_eq!(tick(&disk), Some(Verdict::Well));
        disk.trouble = Some(Trouble::Slow);
        (0..99).for_each(|_| assert_eq!(tick(&disk), None));
    }
}
