//! Locks on ranges of blocks, first come, first served.
//!
//! Writes of whole blocks share; whatever must read a block before it writes it, or changes it to
//! zeros, excludes. Reads take no lock.
//!
//! Invariants:
//! - A request waits for exactly the earlier requests that overlap it and don't share with it,
//!   granted or waiting: nobody is overtaken by a conflicting latecomer, so nobody starves.
//! - Holders and waiters may sit on different threads; a waiter that is dropped leaves the queue.

use std::{
    collections::VecDeque,
    future::Future,
    ops::Range,
    pin::Pin,
    sync::{Mutex, MutexGuard, PoisonError},
    task::{Context, Poll, Waker},
};

/// Who else may hold a range at the same time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Other sharers.
    Shared,
    /// Nobody.
    Exclusive,
}

/// The locks of one overlay.
#[derive(Default)]
pub struct RangeLocks {
    queue: Mutex<Queue>,
}

#[derive(Default)]
struct Queue {
    next: u64,
    /// In order of arrival, hence of id.
    entries: VecDeque<Entry>,
}

struct Entry {
    id: u64,
    blocks: Range<u64>,
    mode: Mode,
    granted: bool,
    waker: Option<Waker>,
}

impl Entry {
    fn conflicts(&self, other: &Entry) -> bool {
        self.blocks.start < other.blocks.end
            && other.blocks.start < self.blocks.end
            && (self.mode == Mode::Exclusive || other.mode == Mode::Exclusive)
    }
}

impl Queue {
    fn is_free(&self, index: usize) -> bool {
        let entry = &self.entries[index];
        !self.entries.range(..index).any(|earlier| earlier.conflicts(entry))
    }

    fn find(&self, id: u64) -> Option<usize> {
        self.entries.binary_search_by_key(&id, |entry| entry.id).ok()
    }
}

impl RangeLocks {
    /// Waits for `blocks`.
    pub fn lock(&self, blocks: Range<u64>, mode: Mode) -> Acquire<'_> {
        let mut queue = self.queue();
        let id = queue.next;
        queue.next += 1;
        queue.entries.push_back(Entry { id, blocks, mode, granted: false, waker: None });
        let last = queue.entries.len() - 1;
        queue.entries[last].granted = queue.is_free(last);
        Acquire { guard: Some(RangeGuard { locks: self, id }) }
    }

    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn release(&self, id: u64) {
        let mut queue = self.queue();
        let Some(index) = queue.find(id) else { return };
        let Some(gone) = queue.entries.remove(index) else { return };
        for later in index..queue.entries.len() {
            let entry = &queue.entries[later];
            if !entry.granted && entry.conflicts(&gone) && queue.is_free(later) {
                queue.entries[later].granted = true;
                if let Some(waker) = queue.entries[later].waker.take() {
                    waker.wake();
                }
            }
        }
    }
}

/// Becomes a [`RangeGuard`] when the range is free.
pub struct Acquire<'a> {
    guard: Option<RangeGuard<'a>>,
}

impl<'a> Future for Acquire<'a> {
    type Output = RangeGuard<'a>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<RangeGuard<'a>> {
        let Some(guard) = self.guard.take() else { panic!("polled after it was ready") };
        let mut queue = guard.locks.queue();
        if let Some(index) = queue.find(guard.id)
            && !queue.entries[index].granted
        {
            queue.entries[index].waker = Some(context.waker().clone());
            drop(queue);
            self.guard = Some(guard);
            return Poll::Pending;
        }
        drop(queue);
        Poll::Ready(guard)
    }
}

/// A held range; dropping it lets the next ones in.
pub struct RangeGuard<'a> {
    locks: &'a RangeLocks,
    id: u64,
}

impl Drop for RangeGuard<'_> {
    fn drop(&mut self) {
        self.locks.release(self.id);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    fn poll<'a>(acquire: &mut Acquire<'a>) -> Option<RangeGuard<'a>> {
        match Pin::new(acquire).poll(&mut Context::from_waker(Waker::noop())) {
            Poll::Ready(guard) => Some(guard),
            Poll::Pending => None,
        }
    }

    #[test]
    fn sharers_pass_and_latecomers_wait_their_turn() {
        let locks = RangeLocks::default();
        let first = poll(&mut locks.lock(0..4, Mode::Shared)).expect("free");
        let second = poll(&mut locks.lock(2..6, Mode::Shared)).expect("shared");
        let mut writer = locks.lock(3..5, Mode::Exclusive);
        assert!(poll(&mut writer).is_none());
        let mut late = locks.lock(4..8, Mode::Shared);
        assert!(poll(&mut late).is_none(), "behind the writer");
        let aside = poll(&mut locks.lock(6..8, Mode::Exclusive));
        assert!(aside.is_none(), "behind the latecomer");
        drop(aside);
        drop(first);
        assert!(poll(&mut writer).is_none());
        drop(second);
        let writer = poll(&mut writer).expect("both are gone");
        assert!(poll(&mut late).is_none());
        drop(writer);
        assert!(poll(&mut late).is_some());
        assert!(locks.queue().entries.is_empty());
    }

    #[test]
    fn a_dropped_waiter_blocks_nobody() {
        let locks = RangeLocks::default();
        let held = poll(&mut locks.lock(0..4, Mode::Shared)).expect("free");
        let mut waiting = locks.lock(0..1, Mode::Exclusive);
        assert!(poll(&mut waiting).is_none());
        let mut third = locks.lock(0..1, Mode::Shared);
        assert!(poll(&mut third).is_none());
        drop(waiting);
        assert!(poll(&mut third).is_some());
        drop(held);
    }

    #[test]
    fn excludes_across_threads() {
        let locks = Arc::new(RangeLocks::default());
        let inside = Arc::new(Mutex::new([0u32; 8]));
        let threads: Vec<_> = (0..4)
            .map(|seed| {
                let (locks, inside) = (locks.clone(), inside.clone());
                std::thread::spawn(move || {
                    let mut rng = fastrand::Rng::with_seed(seed);
                    let runtime = tokio::runtime::Builder::new_current_thread().build();
                    runtime.expect("a runtime").block_on(async {
                        for _ in 0..2000 {
                            let start = rng.usize(0..8);
                            let range = start..rng.usize(start + 1..=8);
                            let mode = if rng.bool() { Mode::Shared } else { Mode::Exclusive };
                            let blocks = range.start as u64..range.end as u64;
                            let _guard = locks.lock(blocks, mode).await;
                            let weight = if mode == Mode::Shared { 1 } else { 1000 };
                            let step = |enter: bool| {
                                let mut inside = inside.lock().expect("no panic inside");
                                for count in &mut inside[range.clone()] {
                                    if enter {
                                        *count += weight;
                                        assert!(*count < 1000 || *count == weight, "{count}");
                                    } else {
                                        *count -= weight;
                                    }
                                }
                            };
                            step(true);
                            std::thread::yield_now();
                            step(false);
                        }
                    });
                })
            })
            .collect();
        for thread in threads {
            thread.join().expect("no exclusion was broken");
        }
    }
}
