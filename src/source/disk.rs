//! A disk as those know it who read copies on it: how long its reads take, and whether it is in
//! trouble. One for each disk of the node, shared by all images; readers take no lock.

use std::{
    sync::atomic::{AtomicU8, AtomicU32, AtomicU64, Ordering},
    time::Duration,
};

use serde::{Deserialize, Serialize};
use tokio::sync::Semaphore;

use crate::{catalog::Tier, histogram::Histogram};

/// Failed reads in a row after which a disk is asked last.
const FAILURES: u32 = 8;
/// No read is waited for longer while another source could be asked.
const PATIENCE_MAX: Duration = Duration::from_millis(500);

/// Why a disk is asked only when no other can answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "snake_case")]
#[repr(u8)]
pub enum Trouble {
    /// It takes much longer than its peers.
    Slow = 1,
    /// It doesn't answer.
    Silent,
    /// Its reads fail, one after the other.
    Failing,
}

impl Trouble {
    /// All of them.
    pub const ALL: [Trouble; 3] = [Trouble::Slow, Trouble::Silent, Trouble::Failing];

    /// As users read it.
    pub fn name(self) -> &'static str {
        match self {
            Trouble::Slow => "slow",
            Trouble::Silent => "silent",
            Trouble::Failing => "failing",
        }
    }

    fn of(number: u8) -> Option<Trouble> {
        Trouble::ALL.into_iter().find(|trouble| *trouble as u8 == number)
    }
}

/// How long a read is waited for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Patience {
    /// After so long a second source is asked too, if the budget allows.
    pub hedge: Duration,
    /// After so long it is asked whatever the budget says, and the read counts as late.
    pub late: Duration,
}

impl Patience {
    /// With a disk of this tier, 95 % of whose reads take no longer than `usual`.
    pub fn of(tier: Option<Tier>, usual: Duration) -> Patience {
        let (hedge, late) = match tier {
            Some(Tier::Nvme) => (1, 50),
            Some(Tier::Ssd) | None => (2, 50),
            Some(Tier::Hdd) => (20, 250),
        };
        let longest = |floor, times| {
            Duration::from_millis(floor).max(usual.saturating_mul(times)).min(PATIENCE_MAX)
        };
        Patience { hedge: longest(hedge, 2), late: longest(late, 4) }
    }
}

/// A disk that copies lie on.
pub struct Disk {
    name: String,
    tier: Option<Tier>,
    /// Short reads of copies on it, as long as they took.
    pub reads: Histogram,
    errors: AtomicU64,
    late: AtomicU64,
    begun: AtomicU64,
    ended: AtomicU64,
    failures: AtomicU32,
    /// Nanoseconds that 95 % of its reads stay below, in good times.
    usual: AtomicU64,
    trouble: AtomicU8,
    /// Places for reads in flight: fewer than its queue has, since whoever hands it one too many waits
    /// in the kernel, with all that his thread serves.
    pub(super) room: Semaphore,
}

impl Disk {
    /// A disk in good health, whose queue takes `depth` requests.
    pub fn new(name: impl Into<String>, tier: Option<Tier>, depth: usize) -> Disk {
        Disk {
            name: name.into(),
            tier,
            reads: Histogram::default(),
            errors: AtomicU64::new(0),
            late: AtomicU64::new(0),
            begun: AtomicU64::new(0),
            ended: AtomicU64::new(0),
            failures: AtomicU32::new(0),
            usual: AtomicU64::new(0),
            trouble: AtomicU8::new(0),
            room: Semaphore::new((depth / 4 * 3).max(8)),
        }
    }

    /// What it is called.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What kind of disk it is.
    pub fn tier(&self) -> Option<Tier> {
        self.tier
    }

    /// Whether it is asked last, and why.
    pub fn trouble(&self) -> Option<Trouble> {
        Trouble::of(self.trouble.load(Ordering::Relaxed))
    }

    /// From now on it is in this trouble, or in none. Whether that is news.
    pub fn set_trouble(&self, trouble: Option<Trouble>) -> bool {
        let number = trouble.map_or(0, |trouble| trouble as u8);
        if number == 0 {
            self.failures.store(0, Ordering::Relaxed);
        }
        self.trouble.swap(number, Ordering::Relaxed) != number
    }

    /// How long a read of it is waited for.
    pub fn patience(&self) -> Patience {
        Patience::of(self.tier, Duration::from_nanos(self.usual.load(Ordering::Relaxed)))
    }

    /// 95 % of its reads take no longer than this, as far as is known.
    pub fn set_usual(&self, nanos: u64) {
        self.usual.store(nanos, Ordering::Relaxed);
    }

    /// Reads that failed, and reads that were late.
    pub fn failed_and_late(&self) -> (u64, u64) {
        (self.errors.load(Ordering::Relaxed), self.late.load(Ordering::Relaxed))
    }

    /// Reads that began, and reads that ended.
    pub fn begun_and_ended(&self) -> (u64, u64) {
        let ended = self.ended.load(Ordering::Relaxed);
        (self.begun.load(Ordering::Relaxed), ended)
    }

    /// How many reads have ended so far: what [`Disk::late`] wants to know.
    pub(super) fn ended(&self) -> u64 {
        self.ended.load(Ordering::Relaxed)
    }

    /// A read begins.
    pub(super) fn begin(&self) -> Reading<'_> {
        self.begun.fetch_add(1, Ordering::Relaxed);
        Reading { disk: self }
    }

    fn end(&self, took: Option<Duration>, good: bool) {
        self.ended.fetch_add(1, Ordering::Relaxed);
        took.into_iter().for_each(|took| self.reads.record(took));
        if good {
            if self.failures.load(Ordering::Relaxed) != 0 {
                self.failures.store(0, Ordering::Relaxed);
            }
            return;
        }
        self.errors.fetch_add(1, Ordering::Relaxed);
        if self.failures.fetch_add(1, Ordering::Relaxed) + 1 == FAILURES {
            self.fall(Trouble::Failing);
        }
    }

    /// A read is late that began when `ended` others had ended: if none has since, the disk is silent.
    pub(super) fn late(&self, ended: u64) {
        self.late.fetch_add(1, Ordering::Relaxed);
        if self.ended.load(Ordering::Relaxed) == ended {
            self.fall(Trouble::Silent);
        }
    }

    fn fall(&self, trouble: Trouble) {
        // It is told by who looks at all disks from time to time.
        self.set_trouble(Some(trouble));
    }
}

/// A read under way. Dropped before its end it has never begun.
pub(super) struct Reading<'a> {
    disk: &'a Disk,
}

impl Reading<'_> {
    /// It ended, well or not; `took` if that says how fast the disk is.
    pub(super) fn end(self, took: Option<Duration>, good: bool) {
        self.disk.end(took, good);
        std::mem::forget(self);
    }
}

impl Drop for Reading<'_> {
    fn drop(&mut self) {
        self.disk.begun.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patience_grows_with_what_is_usual_and_has_an_end() {
        let ms = Duration::from_millis;
        let of = |tier, usual| {
            let patience = Patience::of(tier, usual);
            (patience.hedge, patience.late)
        };
        assert_eq!(of(Some(Tier::Nvme), ms(0)), (ms(1), ms(50)));
        assert_eq!(of(Some(Tier::Ssd), ms(30)), (ms(60), ms(120)));
        assert_eq!(of(Some(Tier::Hdd), ms(5)), (ms(20), ms(250)));
        assert_eq!(of(None, Duration::MAX), (PATIENCE_MAX, PATIENCE_MAX));
    }

    #[test]
    fn it_fails_after_failures_in_a_row_and_is_silent_when_nothing_ends() {
        let disk = Disk::new("a", None, 64);
        let read = |good| disk.begin().end(Some(Duration::from_micros(80)), good);
        for _ in 0..3 {
            (1..FAILURES).for_each(|_| read(false));
            read(true);
        }
        assert_eq!(disk.trouble(), None);
        (0..FAILURES).for_each(|_| read(false));
        assert_eq!(disk.trouble(), Some(Trouble::Failing));
        assert!(disk.set_trouble(None) && !disk.set_trouble(None));
        let ended = disk.ended();
        read(true);
        disk.late(ended);
        assert_eq!(disk.trouble(), None, "others are answered");
        disk.late(disk.ended());
        assert_eq!(disk.trouble(), Some(Trouble::Silent));
        assert_eq!(disk.failed_and_late(), (3 * 7 + 8, 2));
        drop(disk.begin());
        assert_eq!(disk.begun_and_ended(), (33, 33));
    }
}
