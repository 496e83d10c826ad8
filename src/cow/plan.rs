//! From a range of bytes to where they stand: pure, no I/O, no lock, no allocation.
//!
//! Invariants: segments cover the range exactly, in order; none is empty; neighbours differ.

use std::{marker::PhantomData, ops::Range};

use super::{Base, format::State, map::Map};
use crate::{
    io::Io,
    units::{self, BLOCK},
};

/// Where a segment's bytes stand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// Nowhere: they are zeros.
    Zero,
    /// In the overlay's data file, at the same offset.
    Overlay,
    /// In the image below, at the same offset; the last block perhaps beyond the image's end.
    Base,
}

/// A run of bytes that stand in one place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// The first byte, counted from the start of the device.
    pub offset: u64,
    /// Bytes; never 0.
    pub len: u64,
    /// Where they stand.
    pub source: Source,
}

/// The segments of a range, in order.
pub struct Plan<'a, I, B> {
    map: &'a Map,
    base: &'a B,
    range: Range<u64>,
    io: PhantomData<fn(I)>,
}

impl<'a, I: Io, B: Base<I>> Plan<'a, I, B> {
    /// Plans the bytes of `range` of a device whose blocks are in the states of `map`, over `base`.
    pub fn new(map: &'a Map, base: &'a B, range: Range<u64>) -> Plan<'a, I, B> {
        Plan { map, base, range, io: PhantomData }
    }

    /// The source of the first of `blocks`, and the end of the blocks that surely share it.
    fn run(&self, blocks: Range<u64>) -> (Source, u64) {
        let (state, end) = self.map.run(blocks.clone());
        match state {
            State::Data => (Source::Overlay, end),
            State::Zero => (Source::Zero, end),
            State::Base => {
                let last = units::blocks(self.base.size());
                if blocks.start >= last {
                    return (Source::Zero, end);
                }
                match self.base.zero_run(blocks.start..end.min(last)) {
                    (true, end) => (Source::Zero, end),
                    (false, end) => (Source::Base, end),
                }
            }
        }
    }
}

impl<I: Io, B: Base<I>> Iterator for Plan<'_, I, B> {
    type Item = Segment;

    fn next(&mut self) -> Option<Segment> {
        if self.range.is_empty() {
            return None;
        }
        let offset = self.range.start;
        let last = units::blocks(self.range.end);
        let (source, mut block) = self.run(offset / BLOCK..last);
        while block < last {
            let (next, end) = self.run(block..last);
            if next != source {
                break;
            }
            block = end;
        }
        let end = self.range.end.min(block * BLOCK);
        self.range.start = end;
        Some(Segment { offset, len: end - offset, source })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        error::Result,
        io::{Buf, sim::Sim},
        units::Block,
    };

    /// An image whose every third block is zeros.
    struct Thirds(u64);

    impl Base<Sim> for Thirds {
        fn size(&self) -> u64 {
            self.0
        }

        fn is_zero(&self, block: Block) -> bool {
            block.0.is_multiple_of(3)
        }

        async fn read(&self, _: &Sim, _: u64, _: Buf) -> Result<()> {
            unreachable!("a plan reads nothing")
        }
    }

    #[test]
    fn covers_the_range_and_agrees_with_a_vector() {
        let mut rng = fastrand::Rng::with_seed(2);
        for _ in 0..200 {
            let (map, base) = (Map::new(), Thirds(rng.u64(0..300 * BLOCK)));
            let mut model: Vec<Source> = (0..256)
                .map(|block| match block {
                    _ if block * BLOCK >= base.0 || block % 3 == 0 => Source::Zero,
                    _ => Source::Base,
                })
                .collect();
            for _ in 0..20 {
                let start = rng.u64(0..256);
                let end = rng.u64(start + 1..=256);
                let (state, source) = match rng.bool() {
                    true => (State::Data, Source::Overlay),
                    false => (State::Zero, Source::Zero),
                };
                if rng.u8(0..3) > 0 {
                    map.set(start..end.min(start + 9), state);
                    model[start as usize..end.min(start + 9) as usize].fill(source);
                }
            }
            let start = rng.u64(0..256 * BLOCK);
            let range = start..rng.u64(start + 1..=256 * BLOCK);
            let mut at = range.start;
            let mut last = None;
            for segment in Plan::<Sim, _>::new(&map, &base, range.clone()) {
                assert_eq!(segment.offset, at);
                assert!(segment.len > 0);
                assert_ne!(last.replace(segment.source), Some(segment.source));
                at += segment.len;
                for block in segment.offset / BLOCK..units::blocks(at) {
                    assert_eq!(model[block as usize], segment.source, "block {block}");
                }
            }
            assert_eq!(at, range.end);
        }
    }
}
