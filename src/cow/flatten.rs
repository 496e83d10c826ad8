//! Making an overlay independent of its image while guests use it: what is still read from the image
//! is copied up, block by block, until nothing is.
//!
//! Invariants:
//! - A block is copied under the exclusive lock of its range, and only if it is base still: what a
//!   guest writes is never overwritten.
//! - Blocks that hold zeros in the image stay as they are: without an image they read as zeros.
//! - The device is no smaller than its image: what it shows when it grows is not the image's.
//! - Interrupted, it has written what the image holds and nothing else: whoever begins again skips it.

use std::ops::Range;

use super::{
    Base,
    format::State,
    locks::Mode,
    overlay::{BOUNCE, Overlay, run_all},
    plan::Source,
    read::read_base,
};
use crate::{
    error::Result,
    io::Io,
    units::{self, BLOCK},
};

/// Bytes that one step looks at, at most.
const STEP: u64 = 4 << 20;

/// What a step has done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Flattened {
    /// Where the next one begins, in bytes; the image's end when nothing is left.
    pub next: u64,
    /// Bytes that were copied.
    pub copied: u64,
}

impl<I: Io> Overlay<I> {
    /// Copies up what from `offset` on is read from `base`, as far as one step goes. When the steps
    /// have passed the image's end, and a flush has succeeded, the overlay needs no base.
    pub async fn flatten_step<B: Base<I>>(
        &self,
        io: &I,
        base: &B,
        offset: u64,
    ) -> Result<Flattened> {
        let size = base.size().min(self.size());
        // What is zeros, or ours, is passed over in one go.
        let wanted = self
            .extents(base, offset, size.saturating_sub(offset))?
            .find(|segment| segment.source == Source::Base);
        let Some(first) = wanted else { return Ok(Flattened { next: size, copied: 0 }) };
        let start = units::round_down(first.offset, BLOCK);
        let end = size.min(start + STEP);
        let (first, last) = (start / BLOCK, units::blocks(end));
        let pieces = (first..last).step_by(BOUNCE / BLOCK as usize);
        let pieces = pieces.map(|block| block..last.min(block + BOUNCE as u64 / BLOCK));
        let before = self.counters.flattened();
        run_all(pieces.map(|blocks| self.flatten_piece(io, base, blocks))).await?;
        let copied = self.counters.flattened().saturating_sub(before) * BLOCK;
        Ok(Flattened { next: end, copied })
    }

    async fn flatten_piece<B: Base<I>>(&self, io: &I, base: &B, blocks: Range<u64>) -> Result<()> {
        self.before_change(io).await?;
        let _exclusive = self.locks.lock(blocks.clone(), Mode::Exclusive).await;
        let mut block = blocks.start;
        while block < blocks.end {
            let (state, stop) = self.changes.map().run(block..blocks.end);
            if state == State::Base {
                self.copy_up(io, base, block..stop).await?;
            }
            block = stop;
        }
        Ok(())
    }

    /// Copies blocks that are base and locked, but for those that hold zeros.
    async fn copy_up<B: Base<I>>(&self, io: &I, base: &B, blocks: Range<u64>) -> Result<()> {
        let mut block = blocks.start;
        while block < blocks.end {
            let (zero, stop) = base.zero_run(block..blocks.end);
            let run = block..stop;
            block = stop;
            if zero {
                continue;
            }
            let buf = io.alloc(((run.end - run.start) * BLOCK) as usize);
            read_base(io, base, run.start * BLOCK, buf.clone()).await?;
            let bytes = buf.to_vec();
            let holds = |block: u64| {
                let at = ((block - run.start) * BLOCK) as usize;
                bytes[at..at + BLOCK as usize].iter().any(|byte| *byte != 0)
            };
            let mut at = run.start;
            while at < run.end {
                let kind = holds(at);
                let end = (at..run.end).find(|block| holds(*block) != kind).unwrap_or(run.end);
                if kind {
                    let within = |block: u64| ((block - run.start) * BLOCK) as usize;
                    self.write_data(io, at * BLOCK, buf.slice(within(at)..within(end))).await?;
                    self.changes.to_data(at..end);
                    self.counters.add_flattened(end - at);
                }
                at = end;
            }
        }
        Ok(())
    }
}
