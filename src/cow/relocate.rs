//! Moving an overlay that is in use to another pair of files.
//!
//! ```text
//!   begin     from now on every change is marked; all that is not base is marked, too
//!   step      takes marks, and writes what the blocks hold into the other overlay    | as guests
//!   settle    makes the other overlay's part durable, its first checkpoint with it   | work
//!   finish    nobody is inside: the rest, and one commit
//! ```
//!
//! The other overlay is an overlay like any, and the copier its one guest: what is durable of it, and
//! in which order, is its own commits' business.
//!
//! Invariants:
//! - A block is marked after its change has landed, and its mark is taken before it is read: the
//!   last change of each block is copied after it.
//! - When `finish` has returned, everything that was ever acknowledged is durable in the other
//!   overlay, flushed or not. Until then it is worth nothing; the first is as it always was.
//! - Between two copies of the same block the other overlay takes turns by its own range locks.

use std::{ops::Range, sync::Arc};

use super::{
    changes::Over,
    format::State,
    locks::Mode,
    overlay::{BOUNCE, Overlay, run_all},
};
use crate::{
    error::{Error, Kind, Result},
    io::Io,
    units::{self, BLOCK},
};

/// Blocks that one copy reads at once.
const PIECE: u64 = BOUNCE as u64 / BLOCK;
/// Blocks that one step copies at most: 4 MiB.
const STEP: u64 = 1024;
/// Runs of blocks that one step copies at most.
const RUNS: usize = 256;

/// A move under way; dropping it ends the marking.
pub struct Relocation<I: Io> {
    from: Arc<Overlay<I>>,
    to: Arc<Overlay<I>>,
}

impl<I: Io> Relocation<I> {
    /// Begins to move `from` to `to`, a new overlay of the same id, without a tail, that nobody else
    /// has.
    ///
    /// # Errors
    /// `InUse` if it is being moved already, `Poisoned` if nobody can tell any more what it holds.
    pub fn begin(from: Arc<Overlay<I>>, to: Arc<Overlay<I>>) -> Result<Relocation<I>> {
        from.check_poison()?;
        if !from.changes.dirty().start() {
            let what = format!("overlay {} is being moved or read already", from.id);
            return Err(Error::new(Kind::InUse, what));
        }
        let moving = Relocation { from, to };
        let map = moving.from.changes.map();
        let end = units::blocks(moving.from.size());
        let mut block = 0;
        while block < end {
            let (state, stop) = map.run(block..end);
            if state != State::Base {
                moving.from.changes.dirty().mark(block..stop);
            }
            block = stop;
        }
        Ok(moving)
    }

    /// Bytes that the other overlay lacks.
    pub fn left(&self) -> u64 {
        self.from.changes.dirty().count() * BLOCK
    }

    /// Copies some of what is lacking; how many bytes. On an error nothing is lost: it is lacking
    /// still.
    pub async fn step(&self, io: &I) -> Result<u64> {
        self.from.check_poison()?;
        self.fit(io).await?;
        let (mut runs, mut blocks) = (Vec::new(), 0);
        while blocks < STEP && runs.len() < RUNS {
            let Some(run) = self.from.changes.dirty().take(PIECE) else { break };
            blocks += run.end - run.start;
            runs.push(run);
        }
        let copied = run_all(runs.iter().map(|run| self.copy(io, run.clone()))).await;
        if copied.is_err() {
            runs.into_iter().for_each(|run| self.from.changes.dirty().mark(run));
        }
        copied.map(|()| blocks * BLOCK)
    }

    /// Makes durable what was copied, so that less is left for [`Relocation::finish`].
    pub async fn settle(&self, io: &I) -> Result<()> {
        self.to.flush(io).await
    }

    /// Copies the rest and makes all of it durable. Nobody may be inside: nothing changes meanwhile.
    pub async fn finish(&self, io: &I) -> Result<()> {
        while self.left() > 0 {
            self.step(io).await?;
        }
        self.fit(io).await?;
        self.to.flush(io).await?;
        // A sync that failed meanwhile may have taken what was copied before.
        self.from.check_poison()
    }

    /// The device may have grown.
    async fn fit(&self, io: &I) -> Result<()> {
        let size = self.from.size();
        if self.to.size() < size { self.to.resize(io, size).await } else { Ok(()) }
    }

    /// Copies blocks as they are now. Those that are base have never been anything else.
    async fn copy(&self, io: &I, blocks: Range<u64>) -> Result<()> {
        let to = &self.to;
        let mut block = blocks.start;
        while block < blocks.end {
            let (state, stop) = self.from.changes.map().run(block..blocks.end);
            let mut run = block..stop;
            block = stop;
            match state {
                State::Base => {}
                State::Data => {
                    to.before_change(io).await?;
                    let _exclusive = to.locks.lock(run.clone(), Mode::Exclusive).await;
                    let buf = io.alloc(((run.end - run.start) * BLOCK) as usize);
                    self.from.read_data(io, run.start * BLOCK, buf.clone()).await?;
                    to.write_data(io, run.start * BLOCK, buf).await?;
                    to.changes.to_data(run);
                }
                State::Zero => {
                    while !run.is_empty() {
                        // Before the lock: a commit gives space back, which takes locks.
                        to.before_change(io).await?;
                        let _exclusive = to.locks.lock(run.clone(), Mode::Exclusive).await;
                        run.start = to.changes.to_zero(run.clone(), Over::Everything);
                    }
                }
            }
        }
        Ok(())
    }
}

/// Somebody who wants to know whether an overlay changes; there is one at most, moves included.
pub struct Watch<I: Io>(Arc<Overlay<I>>);

impl<I: Io> Watch<I> {
    /// Watches `overlay` from now on.
    ///
    /// # Errors
    /// `InUse` if it is being moved, `Poisoned` if nobody can tell any more what it holds.
    pub fn begin(overlay: Arc<Overlay<I>>) -> Result<Watch<I>> {
        overlay.check_poison()?;
        match overlay.changes.dirty().start() {
            true => Ok(Watch(overlay)),
            false => Err(Error::new(Kind::InUse, "it is being moved or exported already")),
        }
    }

    /// Whether it has changed.
    pub fn has_changed(&self) -> bool {
        self.0.changes.dirty().count() > 0
    }
}

impl<I: Io> Drop for Watch<I> {
    fn drop(&mut self) {
        self.0.changes.dirty().stop();
    }
}

impl<I: Io> Drop for Relocation<I> {
    fn drop(&mut self) {
        self.from.changes.dirty().stop();
    }
}
