//! Looking for completions before sleeping: when it pays, and when to stop trying.
//!
//! A thread that sleeps is woken through an interrupt and the scheduler, which in a virtual machine
//! may cost more than the disk itself, and tends to be put on its client's processor, where the two
//! then take turns. A thread that looks a little longer keeps its own. So it looks where the next
//! completion is near: with a deep queue, and where a client sends its next request as soon as it has
//! the reply to the last and no disk is asked for either. Who waits for single reads of a disk sleeps:
//! looking for the request, too, would only move the thread away from the disk's interrupt.
//!
//! It learns: looking in vain makes it rare, and so does being put off the processor meanwhile, since
//! somebody else wants that.

use std::{
    cell::Cell,
    time::{Duration, Instant},
};

/// Disk operations in flight from which on it pays to look for the next.
const DEEP: usize = 8;

/// The longest look for a client's next request: those that come later are worth no processor.
const NEAR: Duration = Duration::from_micros(50);

/// Who finds that so much time has passed between two looks was put off the processor.
const ABSENCE: Duration = Duration::from_micros(200);

/// The most waits that are slept through after looking in vain.
const MAX_SKIP: u32 = 1024;

/// How many are slept through after being put off the processor.
const YIELD: u32 = 256;

/// One thread's habits of looking.
pub(super) struct Poll {
    /// While the disk is busy.
    disk: Habit,
    /// While there is nothing to do but wait for clients.
    clients: Habit,
    /// A disk was asked for something since the thread last waited for clients only.
    asked: Cell<bool>,
}

impl Poll {
    /// Looks for at most `limit` at a time; never if that is zero.
    pub(super) fn new(limit: Duration) -> Poll {
        let (disk, clients) = (Habit::new(limit), Habit::new(limit.min(NEAR)));
        Poll { disk, clients, asked: Cell::new(false) }
    }

    /// A disk operation begins.
    pub(super) fn disk_is_asked(&self) {
        self.asked.set(true);
    }

    /// The habit to look by now, with so many disk operations in flight; `None` to sleep.
    pub(super) fn wanted(&self, in_flight: usize) -> Option<&Habit> {
        let habit = match in_flight {
            0 if self.asked.take() => return None,
            0 => &self.clients,
            1..DEEP => return None,
            _ => &self.disk,
        };
        habit.wanted().then_some(habit)
    }
}

/// How often it pays to look for one thing.
pub(super) struct Habit {
    limit: Duration,
    /// Waits to sleep through before looking again.
    skip: Cell<u32>,
    /// How many will be slept through the next time that looking was in vain.
    penalty: Cell<u32>,
}

impl Habit {
    fn new(limit: Duration) -> Habit {
        Habit { limit, skip: Cell::new(0), penalty: Cell::new(1) }
    }

    fn wanted(&self) -> bool {
        if self.limit.is_zero() {
            return false;
        }
        let skip = self.skip.get();
        self.skip.set(skip.saturating_sub(1));
        skip == 0
    }

    /// Looks until there is something or the limit has passed, and learns from that.
    pub(super) fn look(&self, mut something: impl FnMut() -> bool) {
        let start = Instant::now();
        let mut last = start;
        while !something() {
            let now = Instant::now();
            if now - last >= ABSENCE {
                self.skip.set(YIELD);
                return;
            }
            if now - start >= self.limit {
                self.skip.set(self.penalty.get());
                self.penalty.set((self.penalty.get() * 2).min(MAX_SKIP));
                return;
            }
            last = now;
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
    fn single_reads_and_a_limit_of_zero_sleep() {
        assert!(Poll::new(Duration::ZERO).wanted(100).is_none());
        assert!(Poll::new(Duration::ZERO).wanted(0).is_none());
        let poll = Poll::new(Duration::from_micros(1));
        assert!(poll.wanted(1).is_none());
        assert!(poll.wanted(DEEP - 1).is_none());
        assert!(poll.wanted(DEEP).is_some());
        assert!(poll.wanted(0).is_some());
        poll.disk_is_asked();
        assert!(poll.wanted(0).is_none(), "a request went to the disk");
        assert!(poll.wanted(0).is_some());
    }

    #[test]
    fn looking_in_vain_makes_it_rare_and_a_hit_makes_it_usual_again() {
        let habit = Habit::new(Duration::from_nanos(1));
        let waits_until_wanted = || (0..).find(|_| habit.wanted()).unwrap();
        for penalty in [1, 2, 4, 8] {
            habit.look(|| false);
            assert_eq!(waits_until_wanted(), penalty);
        }
        habit.look(|| true);
        assert_eq!(waits_until_wanted(), 0);
        (0..20).for_each(|_| habit.look(|| false));
        assert_eq!(waits_until_wanted(), MAX_SKIP as usize);
    }

    #[test]
    fn who_is_in_the_way_of_others_sleeps_for_a_while() {
        let habit = Habit::new(Duration::from_secs(60));
        habit.look(|| {
            std::thread::sleep(2 * ABSENCE);
            false
        });
        assert_eq!((0..).find(|_| habit.wanted()), Some(YIELD));
    }
}
