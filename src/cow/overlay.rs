//! An open overlay: what it holds, its size, its health.
//!
//! Shared by all threads that serve it; its operations are in `read`, `write`, `zero` and `commit`.
//!
//! Futures of writes, zeroings, flushes and resizes are run to their end. One that is dropped half
//! way leaves its I/O under way with the range unlocked; a dropped commit poisons the overlay,
//! because nobody can tell any more what of it reached the disk.

use std::{
    future::Future,
    sync::{
        OnceLock,
        atomic::{AtomicU64, Ordering},
    },
};

use uuid::Uuid;

use super::{
    Base,
    changes::Changes,
    commit::Journal,
    format::{self, State, check_size},
    locks::RangeLocks,
    plan::Plan,
    recover,
    tail::Place,
};
use crate::{
    error::{Error, Kind, Result},
    io::Io,
    units::{self, BLOCK, check_range},
};

/// I/O operations that one request has in flight at most.
pub(super) const IN_FLIGHT: usize = 16;
/// Bytes of one bounce buffer at most.
pub(super) const BOUNCE: usize = 256 << 10;

/// A replica's copy-on-write layer.
pub struct Overlay<I: Io> {
    pub(super) id: Uuid,
    pub(super) data: I::File,
    pub(super) map: I::File,
    pub(super) size: AtomicU64,
    pub(super) changes: Changes,
    pub(super) locks: RangeLocks,
    /// Held by whoever commits.
    pub(super) journal: tokio::sync::Mutex<Journal>,
    /// The number of the newest commit that began, and of the newest that succeeded.
    pub(super) begun: AtomicU64,
    pub(super) committed: AtomicU64,
    /// Writes to the data file that ended.
    pub(super) writes: AtomicU64,
    pub(super) counters: Counters,
    poison: OnceLock<String>,
}

#[derive(Default)]
pub(super) struct Counters {
    pub(super) commits: AtomicU64,
    pub(super) checkpoints: AtomicU64,
    pub(super) copied_up: AtomicU64,
    pub(super) punched: AtomicU64,
    flattened: AtomicU64,
}

impl Counters {
    /// Blocks that were copied up so that the overlay needs no image.
    pub(super) fn flattened(&self) -> u64 {
        self.flattened.load(Ordering::Relaxed)
    }

    pub(super) fn add_flattened(&self, blocks: u64) {
        self.flattened.fetch_add(blocks, Ordering::Relaxed);
    }
}

/// Figures of an overlay, since it was opened where they count events.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stats {
    /// Commits that wrote the map.
    pub commits: u64,
    /// How many of them were checkpoints.
    pub checkpoints: u64,
    /// Blocks written in part that had to be made whole from the image or from zeros.
    pub copied_up: u64,
    /// Blocks whose space was given back.
    pub punched: u64,
    /// Changes of state that are not durable yet, in runs.
    pub pending: u64,
    /// Memory that the block map takes, in bytes.
    pub map_bytes: u64,
}

impl<I: Io> Overlay<I> {
    /// The first bytes of the map file of a new, empty overlay. Its data file is as long as the
    /// device and all hole.
    pub fn blank(id: Uuid, size: u64) -> Vec<u8> {
        format::blank(id, size, format::RECORDS)
    }

    /// Opens the overlay `id` from its two files, whatever crash they have been through. Reads
    /// the map, writes nothing.
    ///
    /// Both files are either direct, or their cached pages were dropped (POSIX_FADV_DONTNEED) when
    /// they were opened: after a failed sync Linux shows pages as clean that never reached the disk,
    /// and a new process must not take them for what is there. The data file is at least as long as
    /// the device; what is missing of it would read as zeros.
    ///
    /// `tail` is where changes that are not durable outlive this process, and where those of the
    /// last one are found.
    pub async fn open(
        io: &I,
        data: I::File,
        map: I::File,
        id: Uuid,
        tail: Option<Place>,
    ) -> Result<Overlay<I>> {
        let found = recover::recover(io, &map, id, tail).await?;
        Ok(Overlay {
            id,
            data,
            map,
            size: AtomicU64::new(found.superblock.size),
            journal: tokio::sync::Mutex::new(Journal::new(found.superblock, found.replayed)),
            changes: found.changes,
            locks: RangeLocks::default(),
            begun: AtomicU64::new(0),
            committed: AtomicU64::new(0),
            writes: AtomicU64::new(0),
            counters: Counters::default(),
            poison: OnceLock::new(),
        })
    }

    /// Its identity.
    pub fn id(&self) -> Uuid {
        self.id
    }

    /// Bytes of the device.
    pub fn size(&self) -> u64 {
        self.size.load(Ordering::Acquire)
    }

    /// Why nothing is acknowledged any more, if so.
    pub fn poisoned(&self) -> Option<&str> {
        self.poison.get().map(String::as_str)
    }

    /// Where the bytes from `offset` stand: pure, no I/O.
    pub fn extents<'a, B: Base<I>>(
        &'a self,
        base: &'a B,
        offset: u64,
        len: u64,
    ) -> Result<Plan<'a, I, B>> {
        let end = check_range(offset, len, self.size())?;
        Ok(Plan::new(self.changes.map(), base, offset..end))
    }

    /// What the overlay itself holds from the block at `offset` on, and where that ends, in bytes:
    /// pure, no I/O. `offset` is a multiple of 4096 below the size.
    pub fn own(&self, offset: u64) -> (State, u64) {
        let blocks = offset / BLOCK..units::blocks(self.size());
        let (state, end) = self.changes.map().run(blocks);
        (state, (end * BLOCK).min(self.size()))
    }

    /// Figures.
    pub fn stats(&self) -> Stats {
        let count = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Stats {
            commits: count(&self.counters.commits),
            checkpoints: count(&self.counters.checkpoints),
            copied_up: count(&self.counters.copied_up),
            punched: count(&self.counters.punched),
            pending: self.changes.count() as u64,
            map_bytes: self.changes.map().bytes(),
        }
    }

    /// Grows the device to `size` bytes, durably. Should it fail at the very last step, the next
    /// flush may still complete it.
    pub async fn resize(&self, io: &I, size: u64) -> Result<()> {
        check_size(size).map_err(|error| error.within(format!("growing overlay {}", self.id)))?;
        self.commit_size(io, size).await
    }

    /// From now on, what is not durable yet outlives the process in `place`. For an overlay that has
    /// just taken another's place, all of it flushed; nobody uses it yet.
    pub async fn keep_tail(&self, place: Option<Place>) {
        let journal = self.journal.lock().await;
        self.changes.keep_tail(place, journal.superblock());
    }

    /// An error if the overlay is poisoned.
    pub(super) fn check_poison(&self) -> Result<()> {
        match self.poison.get() {
            None => Ok(()),
            Some(reason) => Err(Error::new(
                Kind::Poisoned,
                format!(
                    "overlay {}: {reason}; nothing is written any more: once the disk is sound, \
                     disconnect its clients or detach it, and attach it again",
                    self.id
                ),
            )),
        }
    }

    /// Poisons the overlay; the first reason stays.
    pub(crate) fn poison(&self, reason: impl Into<String>) {
        let reason = reason.into();
        if self.poison.set(reason.clone()).is_ok() {
            tracing::error!(overlay = %self.id, reason, "overlay poisoned");
        }
    }

    /// An error of an operation on one of the files, in words.
    pub(in crate::cow) fn failed(
        &self,
        what: impl std::fmt::Display,
        error: std::io::Error,
    ) -> Error {
        Error::io(format!("overlay {}: {what}", self.id), error)
    }
}

/// Runs all `futures`, at most [`IN_FLIGHT`] at a time, to their end; returns the first error.
///
/// To their end even after an error: an operation that was given up could still land, on bytes that
/// somebody else has written since.
pub(crate) async fn run_all<F>(futures: impl IntoIterator<Item = F>) -> Result<()>
where
    F: Future<Output = Result<()>>,
{
    use futures_util::StreamExt;
    futures_util::stream::iter(futures)
        .buffer_unordered(IN_FLIGHT)
        .fold(Ok(()), async |sum: Result<()>, each| sum.and(each))
        .await
}
