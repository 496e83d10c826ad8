//! Looking for completions before sleeping: when it pays, and when to stop trying.
//!
//! A thread that sleeps for the disk is woken through an interrupt and the scheduler, which in a
//! virtual machine may cost more than the disk itself, and tends to be put on its client's
//! processor, where the two then take turns. A thread that looks a little longer keeps its own. So
//! with a deep queue, when the next completion is near, it looks; whoever waits for single reads,
//! or for a slow disk, sleeps.

use std::{
    cell::Cell,
    time::{Duration, Instant},
};

/// Disk operations in flight from which on it pays to look: below, the next is not near.
const DEEP: usize = 8;

/// The most waits that are slept through after looking in vain.
const MAX_SKIP: u32 = 1024;

/// One thread's habit of looking.
pub(super) struct Poll {
    limit: Duration,
    /// Waits to sleep through before looking again.
    skip: Cell<u32>,
    /// How many will be slept through the next time that looking was in vain.
    penalty: Cell<u32>,
}

impl Poll {
    /// Looks for at most `limit` at a time; never if that is zero.
    pub(super) fn new(limit: Duration) -> Poll {
        Poll { limit, skip: Cell::new(0), penalty: Cell::new(1) }
    }

    /// Whether to look now, with so many disk operations in flight.
    pub(super) fn wanted(&self, in_flight: usize) -> bool {
        if self.limit.is_zero() || in_flight < DEEP {
            return false;
        }
        let skip = self.skip.get();
        self.skip.set(skip.saturating_sub(1));
        skip == 0
    }

    /// Looks until there is something or the limit has passed, and learns from that.
    pub(super) fn look(&self, mut something: impl FnMut() -> bool) {
        let start = Instant::now();
        while !something() {
            if start.elapsed() >= self.limit {
                self.skip.set(self.penalty.get());
                self.penalty.set((self.penalty.get() * 2).min(MAX_SKIP));
                return;
            }
            for _ in 0..16 {
                std::hint::spin_loop();
            }
        }
        self.penalty.set(1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shallow_queues_and_a_limit_of_zero_sleep() {
        assert!(!Poll::new(Duration::ZERO).wanted(100));
        let poll = Poll::new(Duration::from_micros(1));
        assert!(!poll.wanted(DEEP - 1));
        assert!(poll.wanted(DEEP));
    }

    #[test]
    fn looking_in_vain_makes_it_rare_and_a_hit_makes_it_usual_again() {
        let poll = Poll::new(Duration::from_nanos(1));
        let waits_until_wanted = || (0..).find(|_| poll.wanted(DEEP)).unwrap();
        for penalty in [1, 2, 4, 8] {
            poll.look(|| false);
            assert_eq!(waits_until_wanted(), penalty);
        }
        poll.look(|| true);
        assert_eq!(waits_until_wanted(), 0);
        (0..20).for_each(|_| poll.look(|| false));
        assert_eq!(waits_until_wanted(), MAX_SKIP as usize);
    }
}
