//! The states of a replica's blocks in memory: two bits each, read without a lock.
//!
//! Pages of 16,320 blocks hang off a two-level directory and are allocated when first touched: an
//! untouched device costs the directory's top, about 16 KiB, whatever its size.
//!
//! Invariants:
//! - Readers need no lock: a word of 32 blocks changes in one atomic store, so no reader ever sees a
//!   state that a block did not have. Writers take turns; [`super::changes`] sees to that.
//! - A page that exists is not all base: it is created by a change away from base, and no block
//!   ever goes back.
//!
//! `bitvec` would be the natural crate for this, but its two-bit updates are two separate ones: a
//! reader could see data become base on its way to zero. The sets of dirty pages do use it.

use std::{
    ops::Range,
    sync::{
        OnceLock,
        atomic::{AtomicU64, Ordering},
    },
};

use super::format::{BLOCKS_PER_PAGE, BLOCKS_PER_WORD, MAX_PAGES, State, WORDS};

/// Pages under one entry of the directory's top.
const LEAF: u64 = 1024;
/// Two bits each: 01 in all 32 places.
const ONES: u64 = 0x5555_5555_5555_5555;

type Page = [AtomicU64; WORDS];
type Leaf = [OnceLock<Box<Page>>; LEAF as usize];

/// The states of all blocks of a device.
pub struct Map {
    top: Box<[OnceLock<Box<Leaf>>]>,
    pages: AtomicU64,
}

impl Map {
    /// A map whose blocks are all base.
    pub fn new() -> Map {
        let top = (0..MAX_PAGES.div_ceil(LEAF)).map(|_| OnceLock::new()).collect();
        Map { top, pages: AtomicU64::new(0) }
    }

    /// The state of one block, which lies below the largest device's end.
    pub fn state(&self, block: u64) -> State {
        let Some(page) = self.page(block / BLOCKS_PER_PAGE) else { return State::Base };
        let within = block % BLOCKS_PER_PAGE;
        let word = page[(within / BLOCKS_PER_WORD) as usize].load(Ordering::Acquire);
        let bits = word >> (within % BLOCKS_PER_WORD * 2);
        State::from_bits(bits).unwrap_or_else(|| unreachable!("only states are stored"))
    }

    /// The state of the first block of `blocks`, which is not empty, and the end of the run of
    /// blocks that share it.
    pub fn run(&self, blocks: Range<u64>) -> (State, u64) {
        let state = self.state(blocks.start);
        // A change under way may end the run at its very first block: there was one, all the same.
        (state, self.end_of(state, blocks.clone()).max(blocks.start + 1))
    }

    /// Whether all of `blocks` are in `state`.
    pub fn is_all(&self, blocks: Range<u64>, state: State) -> bool {
        self.end_of(state, blocks.clone()) >= blocks.end
    }

    /// The first block of `blocks` that is not in `state`, or their end.
    fn end_of(&self, state: State, blocks: Range<u64>) -> u64 {
        let pattern = state as u64 * ONES;
        let mut block = blocks.start;
        while block < blocks.end {
            let number = block / BLOCKS_PER_PAGE;
            let Some(page) = self.page(number) else {
                if state != State::Base {
                    return block;
                }
                block = self.next_page(number) * BLOCKS_PER_PAGE;
                continue;
            };
            let mut within = block % BLOCKS_PER_PAGE;
            while within < BLOCKS_PER_PAGE && block < blocks.end {
                let skip = within % BLOCKS_PER_WORD;
                let word = page[(within / BLOCKS_PER_WORD) as usize].load(Ordering::Acquire);
                let differing = (word ^ pattern) >> (skip * 2);
                if differing != 0 {
                    let same = u64::from(differing.trailing_zeros() / 2);
                    return (block + same).min(blocks.end);
                }
                within += BLOCKS_PER_WORD - skip;
                block += BLOCKS_PER_WORD - skip;
            }
        }
        blocks.end
    }

    /// Sets all of `blocks` to `state`. Callers take turns.
    pub fn set(&self, blocks: Range<u64>, state: State) {
        let mut block = blocks.start;
        while block < blocks.end {
            let page = self.page_or_new(block / BLOCKS_PER_PAGE);
            let within = block % BLOCKS_PER_PAGE;
            let skip = within % BLOCKS_PER_WORD;
            let count = (BLOCKS_PER_WORD - skip).min(blocks.end - block);
            let ones =
                if count == BLOCKS_PER_WORD { ONES } else { ONES & ((1 << (count * 2)) - 1) };
            let (mask, bits) = ((ones * 3) << (skip * 2), ones * state as u64);
            let word = &page[(within / BLOCKS_PER_WORD) as usize];
            let old = word.load(Ordering::Relaxed);
            word.store((old & !mask) | (bits << (skip * 2)), Ordering::Release);
            block += count;
        }
    }

    /// A copy of a page's states; zeros if it was never touched.
    pub fn copy(&self, page: u64) -> Box<[u64; WORDS]> {
        let mut words = Box::new([0; WORDS]);
        if let Some(page) = self.page(page) {
            for (copy, word) in words.iter_mut().zip(page) {
                *copy = word.load(Ordering::Relaxed);
            }
        }
        words
    }

    /// Sets a page's states to what was read from disk. Callers take turns.
    pub fn load(&self, page: u64, words: &[u64; WORDS]) {
        for (word, states) in self.page_or_new(page).iter().zip(words) {
            word.store(*states, Ordering::Release);
        }
    }

    /// How many pages exist.
    pub fn pages(&self) -> u64 {
        self.pages.load(Ordering::Relaxed)
    }

    /// Bytes of memory that the map takes.
    pub fn bytes(&self) -> u64 {
        let leaves = self.top.iter().filter(|leaf| leaf.get().is_some()).count();
        (size_of_val(&*self.top) + leaves * size_of::<Leaf>()) as u64
            + self.pages() * size_of::<Page>() as u64
    }

    fn page(&self, page: u64) -> Option<&Page> {
        let leaf = self.top.get((page / LEAF) as usize)?.get()?;
        leaf[(page % LEAF) as usize].get().map(|page| &**page)
    }

    fn page_or_new(&self, page: u64) -> &Page {
        let leaf = self.top[(page / LEAF) as usize]
            .get_or_init(|| Box::new([const { OnceLock::new() }; LEAF as usize]));
        leaf[(page % LEAF) as usize].get_or_init(|| {
            self.pages.fetch_add(1, Ordering::Relaxed);
            Box::new([const { AtomicU64::new(0) }; WORDS])
        })
    }

    /// The next page that may exist behind one that does not.
    fn next_page(&self, page: u64) -> u64 {
        match self.top.get((page / LEAF) as usize).map(OnceLock::get) {
            Some(Some(_)) => page + 1,
            _ => (page / LEAF + 1) * LEAF,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn agrees_with_a_vector() {
        let mut rng = fastrand::Rng::with_seed(1);
        let map = Map::new();
        let span = 2 * BLOCKS_PER_PAGE + 500;
        let mut model = vec![State::Base; span as usize];
        for _ in 0..3000 {
            let start = rng.u64(0..span);
            let longest = if rng.bool() { 40 } else { BLOCKS_PER_PAGE };
            let end = span.min(start + rng.u64(1..longest));
            let state = if rng.bool() { State::Data } else { State::Zero };
            map.set(start..end, state);
            model[start as usize..end as usize].fill(state);

            let from = rng.u64(0..span);
            let to = rng.u64(from + 1..=span);
            let same = &model[from as usize..to as usize];
            let len = same.iter().take_while(|state| **state == same[0]).count() as u64;
            assert_eq!(map.run(from..to), (same[0], from + len));
            assert_eq!(map.is_all(from..to, same[0]), from + len == to);
        }
        assert_eq!(map.pages(), 3);
    }

    #[test]
    fn an_untouched_device_costs_little() {
        let map = Map::new();
        let all = MAX_PAGES * BLOCKS_PER_PAGE;
        assert_eq!(map.run(0..all), (State::Base, all));
        assert!(!map.is_all(0..1, State::Data));
        assert!(map.bytes() < 32 << 10, "{}", map.bytes());
        map.set(BLOCKS_PER_PAGE * 5000..BLOCKS_PER_PAGE * 5000 + 1, State::Zero);
        assert_eq!(map.run(0..u64::from(u32::MAX)), (State::Base, BLOCKS_PER_PAGE * 5000));
        assert!(map.bytes() < 64 << 10, "{}", map.bytes());
    }
}
