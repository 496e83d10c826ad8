//! Memory for what sessions have under way: a little for each, and a reserve that those borrow from who need more.
//!
//! Nobody waits for what another session holds: its own share is enough for any request.

use std::{
    cell::Cell,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

/// Bytes that each session has for itself.
pub const OWN: usize = 1 << 20;

/// Bytes that a session may borrow.
pub const LOAN: usize = 7 << 20;

/// Bytes that all sessions together may borrow.
pub const RESERVE: usize = 512 << 20;

/// What may be borrowed, of all sessions of a server.
#[derive(Debug, Default)]
pub struct Reserve {
    lent: AtomicUsize,
}

/// What one session has in use.
#[derive(Debug)]
pub struct Share {
    reserve: Arc<Reserve>,
    used: Cell<usize>,
    borrowed: Cell<usize>,
}

impl Share {
    /// A share that nothing is used of.
    pub fn of(reserve: &Arc<Reserve>) -> Share {
        Share { reserve: reserve.clone(), used: Cell::new(0), borrowed: Cell::new(0) }
    }

    /// Takes so many bytes, if they can be had now. Who uses none gets up to [`OWN`] at any time.
    pub fn take(&self, bytes: usize) -> bool {
        let used = self.used.get() + bytes;
        let more = used.saturating_sub(OWN).saturating_sub(self.borrowed.get());
        if more > 0 && (self.borrowed.get() + more > LOAN || !self.reserve.lend(more)) {
            return false;
        }
        self.borrowed.set(self.borrowed.get() + more);
        self.used.set(used);
        true
    }

    /// Gives back what was taken.
    pub fn give(&self, bytes: usize) {
        let used = self.used.get() - bytes;
        self.used.set(used);
        let borrowed = used.saturating_sub(OWN).min(self.borrowed.get());
        self.reserve.take_back(self.borrowed.replace(borrowed) - borrowed);
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        self.reserve.take_back(self.borrowed.get());
    }
}

impl Reserve {
    fn lend(&self, bytes: usize) -> bool {
        let lend = |lent: usize| Some(lent + bytes).filter(|lent| *lent <= RESERVE);
        self.lent.fetch_update(Ordering::Relaxed, Ordering::Relaxed, lend).is_ok()
    }

    fn take_back(&self, bytes: usize) {
        if bytes > 0 {
            self.lent.fetch_sub(bytes, Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_needs_more_borrows_and_gives_it_back_first() {
        let reserve = Arc::<Reserve>::default();
        let share = Share::of(&reserve);
        let lent = || reserve.lent.load(Ordering::Relaxed);
        assert!(share.take(OWN));
        assert_eq!(lent(), 0);
        assert!(share.take(LOAN - 1));
        assert_eq!(lent(), LOAN - 1);
        assert!(!share.take(2), "no more than that");
        assert_eq!(lent(), LOAN - 1, "who gets nothing has borrowed nothing");
        assert!(share.take(1));
        share.give(OWN);
        assert_eq!(lent(), LOAN - OWN);
        share.give(LOAN - OWN);
        assert_eq!(lent(), 0);
        share.give(OWN);
        assert!(share.take(OWN + 3));
        drop(share);
        assert_eq!(lent(), 0);
    }

    #[test]
    fn when_the_reserve_is_lent_each_has_its_own() {
        let reserve = Arc::<Reserve>::default();
        let hoards: Vec<Share> = (0..2 * RESERVE / LOAN).map(|_| Share::of(&reserve)).collect();
        let hoarded = hoards.iter().filter(|share| share.take(OWN + LOAN)).count();
        assert_eq!(hoarded, RESERVE / LOAN);
        let late = Share::of(&reserve);
        assert!(!late.take(OWN + RESERVE % LOAN + 1));
        assert!(late.take(OWN));
        drop(hoards);
        assert!(late.take(LOAN));
    }
}
