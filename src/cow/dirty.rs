//! Which blocks a copy of the overlay lacks, while one is being made: a bit a block.
//!
//! Off, it costs a writer one load. On, it takes 512 bytes for each 16 MiB of which anything is
//! lacking, and whoever changes a block marks it once the change has landed: what the copier has read
//! before is marked again.

use std::{
    collections::BTreeMap,
    ops::Range,
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering, fence},
    },
};

const WORDS: usize = 64;
/// Blocks of a page.
const PAGE: u64 = WORDS as u64 * 64;

/// The blocks that are marked.
#[derive(Default)]
pub(super) struct Dirty {
    on: AtomicBool,
    marks: Mutex<Marks>,
}

#[derive(Default)]
struct Marks {
    pages: BTreeMap<u64, Box<[u64; WORDS]>>,
    count: u64,
    /// Where the next search begins: everywhere gets its turn.
    next: u64,
}

impl Dirty {
    /// From now on changes are marked. False if they were already.
    pub(super) fn start(&self) -> bool {
        let fresh = !self.on.swap(true, Ordering::SeqCst);
        // Whoever did not see it had landed before: what is read from here on is what he wrote.
        fence(Ordering::SeqCst);
        fresh
    }

    /// Marks nothing any more, and forgets what was marked.
    pub(super) fn stop(&self) {
        self.on.store(false, Ordering::SeqCst);
        *self.marks() = Marks::default();
    }

    /// `blocks` have changed.
    pub(super) fn mark(&self, blocks: Range<u64>) {
        if self.on.load(Ordering::SeqCst) {
            self.marks().set(blocks);
        }
    }

    /// Blocks that are marked.
    pub(super) fn count(&self) -> u64 {
        self.marks().count
    }

    /// Takes the next marked blocks that lie side by side, `limit` at most, and their marks.
    pub(super) fn take(&self, limit: u64) -> Option<Range<u64>> {
        self.marks().take(limit)
    }

    fn marks(&self) -> MutexGuard<'_, Marks> {
        self.marks.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Marks {
    fn set(&mut self, blocks: Range<u64>) {
        let mut block = blocks.start;
        while block < blocks.end {
            let page = self.pages.entry(block / PAGE).or_insert_with(|| Box::new([0; WORDS]));
            let (word, bits, count) = piece(block, blocks.end);
            let word = &mut page[word];
            self.count += u64::from((bits & !*word).count_ones());
            *word |= bits;
            block += count;
        }
    }

    fn take(&mut self, limit: u64) -> Option<Range<u64>> {
        let start = self.first(self.next).or_else(|| self.first(0))?;
        let mut end = start;
        // A page at a time: where it ends, so does the run.
        let stop = ((start / PAGE + 1) * PAGE).min(start.saturating_add(limit));
        let page = self.pages.get_mut(&(start / PAGE))?;
        while end < stop {
            let (word, bits, count) = piece(end, stop);
            let shift = end % 64;
            let run = u64::from((page[word] >> shift).trailing_ones()).min(count);
            let taken = if run == 64 { u64::MAX } else { ((1 << run) - 1) << shift };
            page[word] &= !(taken & bits);
            end += run;
            if run < count {
                break;
            }
        }
        if page.iter().all(|word| *word == 0) {
            self.pages.remove(&(start / PAGE));
        }
        self.count -= end - start;
        self.next = end;
        Some(start..end)
    }

    /// The first marked block at or after `from`.
    fn first(&self, from: u64) -> Option<u64> {
        self.pages.range(from / PAGE..).find_map(|(number, page)| {
            let skip = from.saturating_sub(number * PAGE);
            (skip / 64..WORDS as u64).find_map(|word| {
                let below = if word == skip / 64 { (1u64 << (skip % 64)) - 1 } else { 0 };
                let bits = page[word as usize] & !below;
                let bit = u64::from(bits.trailing_zeros());
                (bits != 0).then_some(number * PAGE + word * 64 + bit)
            })
        })
    }
}

/// Of the blocks from `block` to `end` those in one word: which of its page, the bits, how many.
fn piece(block: u64, end: u64) -> (usize, u64, u64) {
    let (word, shift) = ((block % PAGE / 64) as usize, block % 64);
    let count = (64 - shift).min(end - block);
    let ones = if count == 64 { u64::MAX } else { (1 << count) - 1 };
    (word, ones << shift, count)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn agrees_with_a_set() {
        let mut rng = fastrand::Rng::with_seed(4);
        let (dirty, mut model) = (Dirty::default(), BTreeSet::new());
        dirty.mark(0..10);
        assert_eq!(dirty.count(), 0, "nobody asked");
        assert!(dirty.start() && !dirty.start());
        for _ in 0..20_000 {
            if rng.u8(0..3) == 0 {
                let start = rng.u64(0..3 * PAGE);
                let longest = if rng.bool() { 5 } else { 300 };
                let end = start + rng.u64(1..longest);
                dirty.mark(start..end);
                model.extend(start..end);
            } else {
                let limit = rng.u64(1..200);
                let Some(run) = dirty.take(limit) else {
                    assert!(model.is_empty());
                    continue;
                };
                assert!(!run.is_empty() && run.end - run.start <= limit);
                let whole = run.clone().all(|block| model.remove(&block));
                assert!(whole, "{run:?} was marked");
            }
            assert_eq!(dirty.count(), model.len() as u64);
        }
        while let Some(run) = dirty.take(u64::MAX) {
            run.for_each(|block| assert!(model.remove(&block)));
        }
        assert!(model.is_empty() && dirty.marks().pages.is_empty());
    }
}
