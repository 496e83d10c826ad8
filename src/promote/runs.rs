//! Long sequential runs: what one pass over an image touches twice is still one touch.
//!
//! A backup or a slow copy reads each chunk over several ticks, and would earn its promotion by
//! itself. So the tail of a run that is under way is remembered per image, and a touch of a chunk
//! that the same run has just touched is skipped once the run is long. Another run over the same
//! chunks, later or elsewhere at the same time (the second boot of an image), is another run: its
//! touches count.
//!
//! Invariants:
//! - At most `OPEN` runs are remembered an image, and only while they move; O(touched) a tick.

use std::collections::BTreeMap;

use super::heat::Key;

/// Runs remembered for one image; the one that rested longest makes room.
const OPEN: usize = 32;
/// Ticks that a run may rest before it is over.
const REST: u64 = 2;
/// Chunks that a run may leave out at once: those that the page cache answered.
const GAP: u64 = 2;
/// How many chunks behind its end a run is still touched: read-ahead and requests out of order.
const TAIL: u64 = 4;

#[derive(Clone, Copy, Debug)]
struct Run {
    start: u64,
    /// One beyond the last chunk touched.
    end: u64,
    moved: u64,
}

/// The runs that are under way.
pub struct Runs {
    long: u64,
    tick: u64,
    images: BTreeMap<u32, Vec<Run>>,
}

impl Runs {
    /// None yet; a run is long beyond `long` chunks.
    pub fn new(long: u64) -> Runs {
        Runs { long, tick: 0, images: BTreeMap::new() }
    }

    /// Takes what a tick touched, in order and without doubles, and drops from it what a long run
    /// touched again.
    pub fn sift(&mut self, touched: &mut Vec<Key>) {
        self.tick += 1;
        let mut again = Vec::new();
        for stretch in touched.chunk_by(|a, b| follows(*a, *b)) {
            let (image, start) = (stretch[0].image, stretch[0].chunk.0);
            let end = stretch[stretch.len() - 1].chunk.0.saturating_add(1);
            if let Some(seen) = self.extend(image, start, end) {
                again.extend(stretch.iter().copied().filter(|key| key.chunk.0 < seen));
            }
        }
        let over = self.tick.saturating_sub(REST);
        self.images.retain(|_, runs| {
            runs.retain(|run| run.moved >= over);
            !runs.is_empty()
        });
        touched.retain(|key| again.binary_search(key).is_err());
    }

    /// Forgets the runs over an image.
    pub fn forget_image(&mut self, image: u32) {
        self.images.remove(&image);
    }

    /// Adds a stretch to the run that it continues, or begins one. Returns where a long run had
    /// come to.
    fn extend(&mut self, image: u32, start: u64, end: u64) -> Option<u64> {
        let (long, tick) = (self.long, self.tick);
        let runs = self.images.entry(image).or_default();
        let continued = runs.iter_mut().find(|run| {
            let near = run.end.saturating_sub(TAIL)..=run.end.saturating_add(GAP);
            run.moved < tick && near.contains(&start) && end >= run.end
        });
        if let Some(run) = continued {
            let seen = run.end;
            (run.end, run.moved) = (end, tick);
            return (end - run.start > long).then_some(seen);
        }
        if runs.len() == OPEN {
            let oldest = (0..OPEN).min_by_key(|&index| runs[index].moved).unwrap_or(0);
            runs.swap_remove(oldest);
        }
        runs.push(Run { start, end, moved: tick });
        None
    }
}

fn follows(a: Key, b: Key) -> bool {
    a.image == b.image && b.chunk.0 - a.chunk.0 <= GAP
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::Chunk;

    fn keys(chunks: std::ops::Range<u64>) -> Vec<Key> {
        chunks.map(|chunk| Key { image: 3, chunk: Chunk(chunk) }).collect()
    }

    fn sift(runs: &mut Runs, chunks: std::ops::Range<u64>) -> Vec<u64> {
        let mut touched = keys(chunks);
        runs.sift(&mut touched);
        touched.iter().map(|key| key.chunk.0).collect()
    }

    #[test]
    fn a_slow_pass_touches_each_chunk_once() {
        let mut runs = Runs::new(4);
        assert_eq!(sift(&mut runs, 10..20), (10..20).collect::<Vec<_>>());
        assert_eq!(sift(&mut runs, 19..22), [20, 21]);
        assert!(sift(&mut runs, 21..22).is_empty(), "the same chunk, tick after tick");
        assert_eq!(sift(&mut runs, 21..23), [22]);
    }

    #[test]
    fn another_run_counts_and_so_does_a_short_one() {
        let mut runs = Runs::new(4);
        sift(&mut runs, 0..20);
        assert_eq!(sift(&mut runs, 0..20).len(), 20, "from the beginning: another run");
        sift(&mut runs, 100..102);
        assert_eq!(sift(&mut runs, 101..103), [101, 102], "not long");
        let mut runs = Runs::new(4);
        sift(&mut runs, 0..20);
        (0..3).for_each(|_| assert!(sift(&mut runs, 0..0).is_empty()));
        assert_eq!(sift(&mut runs, 19..22), [19, 20, 21], "it rested: it is over");
    }

    #[test]
    fn what_is_remembered_is_bounded() {
        let mut runs = Runs::new(4);
        let mut touched: Vec<Key> =
            (0..10_000).map(|i| Key { image: 3, chunk: Chunk(i * 10) }).collect();
        runs.sift(&mut touched);
        assert_eq!(touched.len(), 10_000);
        assert_eq!(runs.images[&3].len(), OPEN);
        (0..4).for_each(|_| runs.sift(&mut Vec::new()));
        assert!(runs.images.is_empty());
    }
}
