//! Zeroing and discarding: whole blocks change their state, and give their space back once that is
//! durable; partial ones are written.
//!
//! Invariants:
//! - Space is given back under the exclusive lock of its range, and only where the block is zero
//!   still: a block written anew since is never punched.
//! - A discard of a block that is base, or covered in part, does nothing.

use std::{ops::Range, sync::atomic::Ordering};

use super::{
    Base, Provision,
    changes::Over,
    format::{BLOCKS_PER_PAGE, State},
    locks::Mode,
    overlay::{BOUNCE, Overlay},
    plan::{Plan, Source},
};
use crate::{
    error::{Kind, Result},
    io::{Buf, Io, yield_now},
    units::{self, BLOCK, Block, check_range},
};

/// Blocks that one punch, under one lock, covers at most: 1 GiB.
const PUNCH_BLOCKS: u64 = (1 << 30) / BLOCK;

/// Pieces of a range after which others get their turn.
const PIECES: usize = 16;

impl<I: Io> Overlay<I> {
    /// Says that the range's content is no longer needed: blocks of data that it covers become
    /// zeros, all else stays.
    pub async fn discard(&self, io: &I, offset: u64, len: u64) -> Result<()> {
        let end = check_range(offset, len, self.size())?;
        self.check_poison()?;
        for (number, piece) in pieces(offset..end).enumerate() {
            give_way(number).await;
            let mut inner = whole_blocks(&piece);
            while !inner.is_empty() {
                self.before_change(io).await?;
                let _exclusive = self.locks.lock(inner.clone(), Mode::Exclusive).await;
                inner.start = self.changes.to_zero(inner.clone(), Over::Data);
            }
        }
        Ok(())
    }

    /// Makes the range read as zeros.
    pub async fn write_zeroes<B: Base<I>>(
        &self,
        io: &I,
        base: &B,
        offset: u64,
        len: u64,
        provision: Provision,
    ) -> Result<()> {
        let end = check_range(offset, len, self.size())?;
        self.check_poison()?;
        for (number, mut piece) in pieces(offset..end).enumerate() {
            give_way(number).await;
            while !piece.is_empty() {
                self.before_change(io).await?;
                piece.start = self.zero_piece(io, base, piece.clone(), provision).await?;
            }
        }
        Ok(())
    }

    /// Returns where it stopped: short of the end when the list of changes is full. The lock must go
    /// before there can be a commit, which gives space back.
    async fn zero_piece<B: Base<I>>(
        &self,
        io: &I,
        base: &B,
        bytes: Range<u64>,
        provision: Provision,
    ) -> Result<u64> {
        let Range { start: offset, end } = bytes;
        let blocks = offset / BLOCK..units::blocks(end);
        let inner = whole_blocks(&bytes);
        let _exclusive = self.locks.lock(blocks, Mode::Exclusive).await;
        if inner.is_empty() {
            let middle = end.min(units::round_down(offset, BLOCK) + BLOCK);
            self.zero_partial(io, base, offset..middle).await?;
            self.zero_partial(io, base, middle..end).await?;
            return Ok(end);
        }
        let (first, last) = (inner.start * BLOCK, inner.end * BLOCK);
        match provision {
            Provision::Keep | Provision::KeepIfFast => {
                // Before anything else is written: it may be refused.
                self.zero_in_place(io, first..last, provision).await?;
                self.changes.to_data(inner);
                self.zero_partial(io, base, offset..first).await?;
            }
            Provision::Release => {
                self.zero_partial(io, base, offset..first).await?;
                for segment in Plan::new(self.changes.map(), base, first..last) {
                    if segment.source != Source::Zero {
                        let blocks =
                            segment.offset / BLOCK..units::blocks(segment.offset + segment.len);
                        let stop = self.changes.to_zero(blocks.clone(), Over::Everything);
                        if stop < blocks.end {
                            return Ok(stop * BLOCK);
                        }
                    }
                }
            }
        }
        self.zero_partial(io, base, last..end).await?;
        Ok(end)
    }

    /// Writes zeros to a part of one block, unless it reads as zeros already.
    async fn zero_partial<B: Base<I>>(&self, io: &I, base: &B, bytes: Range<u64>) -> Result<()> {
        let mut plan = Plan::new(self.changes.map(), base, bytes.clone());
        if plan.all(|segment| segment.source == Source::Zero) {
            return Ok(());
        }
        let zeros = io.alloc((bytes.end - bytes.start) as usize);
        zeros.fill(0);
        self.write_partial(io, base, bytes.start, zeros).await?;
        let block = Block::at(bytes.start).0;
        self.changes.to_data(block..block + 1);
        Ok(())
    }

    /// Zeros whole blocks of the data file and keeps their space allocated.
    async fn zero_in_place(&self, io: &I, bytes: Range<u64>, provision: Provision) -> Result<()> {
        let zeroed = io.zero(&self.data, bytes.clone()).await;
        self.written(bytes.clone());
        let zeroed = zeroed
            .map_err(|error| self.failed(format_args!("zeroing data at {}", bytes.start), error));
        match zeroed {
            // Not every file system can: then they are written.
            Err(error)
                if error.kind() == Kind::Unsupported && provision != Provision::KeepIfFast => {}
            done => return done,
        }
        let zeros: Buf = io.alloc(BOUNCE.min((bytes.end - bytes.start) as usize));
        zeros.fill(0);
        let mut at = bytes.start;
        while at < bytes.end {
            let len = (bytes.end - at).min(zeros.len() as u64);
            self.write_data(io, at, zeros.slice(0..len as usize)).await?;
            at += len;
        }
        Ok(())
    }

    /// Gives back the space of those of `ranges` whose blocks are zero still. They are durably so;
    /// a failure leaks space until the block is written or zeroed again, and harms nothing.
    pub(super) async fn give_back(&self, io: &I, ranges: Vec<Range<u64>>) {
        for range in ranges {
            let mut start = range.start;
            while start < range.end {
                let end = range.end.min(start + PUNCH_BLOCKS);
                let _exclusive = self.locks.lock(start..end, Mode::Exclusive).await;
                while start < end {
                    let (state, stop) = self.changes.map().run(start..end);
                    if state == State::Zero {
                        let punched = io.punch(&self.data, start * BLOCK..stop * BLOCK).await;
                        match punched {
                            Ok(()) => {
                                self.counters.punched.fetch_add(stop - start, Ordering::Relaxed);
                            }
                            Err(error) => {
                                tracing::debug!(overlay = %self.id, %error, "space not given back");
                            }
                        }
                    }
                    start = stop;
                }
            }
        }
    }
}

/// The range, cut where pages of the map begin: the changes of one piece are bounded, and between
/// two pieces others get their turn, commits included.
fn pieces(bytes: Range<u64>) -> impl Iterator<Item = Range<u64>> {
    const PIECE: u64 = BLOCKS_PER_PAGE * BLOCK;
    (bytes.start / PIECE..bytes.end.div_ceil(PIECE))
        .map(move |n| bytes.start.max(n * PIECE)..bytes.end.min((n + 1) * PIECE))
}

/// Lets others of this thread go on: one request can span terabytes.
async fn give_way(piece: usize) {
    if piece % PIECES == PIECES - 1 {
        yield_now().await;
    }
}

/// The blocks that lie wholly within the bytes. The last one of a device that ends within it never
/// does: should the device grow, what appears there is what the image holds.
fn whole_blocks(bytes: &Range<u64>) -> Range<u64> {
    units::blocks(bytes.start)..bytes.end / BLOCK
}
