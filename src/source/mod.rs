//! Where an image's content is read from: its copies on several disks, and whatever else holds it.
//!
//! ```text
//!   read ──► pieces of one chunk each ──► copies in order: sound and untroubled ones (the faster tier
//!                                           first, equals by stripes), troubled, unsound
//!                                           │ error: the next at once
//!                                           │ late: the next as well, the first answer counts
//!                                           ▼ all failed
//!                                        the rescue: other disks' caches, the image's source
//! ```
//!
//! With one copy a read goes straight to the caller's memory. With several each has memory of its own:
//! an answer that nobody waits for any more touches nothing that was given back.
//!
//! Invariants:
//! - A chunk is believed only if it had its sum since the copy was opened (unless told otherwise); one
//!   that had not is read from this copy again only where no other can answer, and never unverified.
//! - A second source is asked early for one read in twenty at most.
//! - Reads in flight on a disk are fewer than its queue takes: a disk that hangs holds up those who need
//!   it, and no thread.
//! - Nothing here names a path or a ring: the simulator runs the same code.

mod contents;
mod copy;
mod disk;
pub mod judge;
mod race;
pub mod repair;

#[cfg(test)]
mod tests;

use std::{
    future::Future,
    ops::Range,
    pin::Pin,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicI64, AtomicU64, Ordering},
    },
};

use arc_swap::ArcSwap;
use serde::{Deserialize, Serialize};

pub use contents::Content;
use contents::Contents;
pub use copy::Copy;
pub use disk::{Disk, Patience, Trouble};

use crate::{
    cow::run_all,
    error::{Error, Kind, Result},
    io::{Buf, Io},
    units::{self, CHUNK, Chunk},
};

/// When a chunk is compared with its sum.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Verify {
    /// At its first read since the copy was opened.
    #[default]
    First,
    /// At every read: each reads the whole chunk.
    Always,
    /// Never.
    Never,
}

/// What an image is, whichever copy it is read from.
pub struct Image {
    /// What it is called, for messages.
    pub name: String,
    /// Its size in bytes.
    pub size: u64,
    contents: Contents,
    verify: Verify,
}

impl Image {
    /// Bytes of a chunk; the last one may be short.
    pub fn len_of(&self, chunk: Chunk) -> usize {
        self.size.saturating_sub(chunk.offset()).min(CHUNK) as usize
    }

    /// The CRC-32 that a chunk's content must have; `None` if it is zeros, or past the end.
    pub fn crc(&self, chunk: Chunk) -> Option<u32> {
        Some(self.contents.get(chunk)?.crc)
    }

    /// Whether a block is known to be zeros.
    pub fn is_zero(&self, block: units::Block) -> bool {
        self.contents.is_zero(block)
    }

    /// Whether the first of `blocks` is zeros, and the end of those that are like it.
    pub fn zero_run(&self, blocks: Range<u64>) -> (bool, u64) {
        self.contents.zero_run(blocks)
    }

    /// Whether `buf` holds the chunk.
    fn is(&self, chunk: Chunk, buf: &Buf) -> bool {
        buf.len() == self.len_of(chunk) && self.crc(chunk) == Some(copy::sum(buf))
    }
}

/// Whoever else may have a chunk when no copy can give it.
pub trait Rescue: Send + Sync {
    /// The content of a chunk, to be verified by whoever asks.
    fn chunk(&self, chunk: Chunk) -> Pin<Box<dyn Future<Output = Option<Vec<u8>>> + Send>>;
}

/// An image and all that it can be read from.
pub struct Sources<I: Io> {
    image: Image,
    /// The first is asked first.
    copies: ArcSwap<Vec<Arc<Copy<I>>>>,
    rescue: OnceLock<Box<dyn Rescue>>,
    budget: Budget,
    counters: Counters,
}

/// What happened to the reads of an image.
#[derive(Default)]
struct Counters {
    failovers: AtomicU64,
    hedges: AtomicU64,
    hedges_won: AtomicU64,
    rescued: AtomicU64,
    failed: AtomicU64,
    raced: AtomicU64,
}

/// What happened to the reads of an image, as of now.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Figures {
    /// Reads of images with several copies.
    pub raced: u64,
    /// Reads that one copy failed and another was asked for.
    pub failovers: u64,
    /// Reads that a second copy was asked for early.
    pub hedges: u64,
    /// How many of them it answered first.
    pub hedges_won: u64,
    /// Reads that no copy could answer, and something else did.
    pub rescued: u64,
    /// Reads that nothing could answer.
    pub failed: u64,
}

impl<I: Io> Sources<I> {
    /// The image `name` of `size` bytes, whose chunks are `chunks`, to be read from `copies`, the first
    /// first.
    ///
    /// # Errors
    /// `Corrupt` if there is not one of `chunks` for each chunk of the size.
    pub fn new(
        name: impl Into<String>,
        size: u64,
        chunks: impl IntoIterator<Item = Content>,
        copies: Vec<Arc<Copy<I>>>,
        verify: Verify,
    ) -> Result<Sources<I>> {
        let name = name.into();
        let (contents, count) = Contents::of(chunks);
        if units::chunks(size) != count {
            let what = format!("image {name}: {count} chunks in {size} bytes");
            return Err(Error::new(Kind::Corrupt, what));
        }
        Ok(Sources {
            image: Image { name, size, contents, verify },
            copies: ArcSwap::from_pointee(copies),
            rescue: OnceLock::new(),
            budget: Budget::default(),
            counters: Counters::default(),
        })
    }

    /// What the image is.
    pub fn image(&self) -> &Image {
        &self.image
    }

    /// What it is read from, the first first.
    pub fn copies(&self) -> Arc<Vec<Arc<Copy<I>>>> {
        self.copies.load_full()
    }

    /// From now on it is read from these, the first first.
    pub fn set_copies(&self, copies: Vec<Arc<Copy<I>>>) {
        self.copies.store(Arc::new(copies));
    }

    /// Whom to ask when no copy can answer; the first one that is given stays.
    pub fn set_rescue(&self, rescue: Box<dyn Rescue>) {
        let _ = self.rescue.set(rescue);
    }

    /// What happened so far.
    pub fn figures(&self) -> Figures {
        let count = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Figures {
            raced: count(&self.counters.raced),
            failovers: count(&self.counters.failovers),
            hedges: count(&self.counters.hedges),
            hedges_won: count(&self.counters.hedges_won),
            rescued: count(&self.counters.rescued),
            failed: count(&self.counters.failed),
        }
    }

    /// Fills `buf` from `offset`; all of it lies within the image.
    pub async fn read(&self, io: &I, offset: u64, buf: Buf) -> Result<()> {
        let copies = self.copies.load_full();
        let end = offset + buf.len() as u64;
        let mut chunks = Chunk::at(offset).0..units::chunks(end);
        if let [only] = &copies[..]
            && chunks.all(|chunk| only.is_trusted(Chunk(chunk), self.image.verify))
            && only.read_plain(io, offset, buf.clone()).await.is_ok()
        {
            return Ok(());
        }
        if end <= Chunk(Chunk::at(offset).0 + 1).offset() {
            return self.read_chunk(io, &copies, offset, buf).await;
        }
        let copies = &copies;
        run_all((Chunk::at(offset).0..units::chunks(end)).map(|chunk| {
            let from = Chunk(chunk).offset().max(offset);
            let to = Chunk(chunk + 1).offset().min(end);
            let piece = buf.slice((from - offset) as usize..(to - offset) as usize);
            self.read_chunk(io, copies, from, piece)
        }))
        .await
    }
}

/// How many reads may be asked for twice.
struct Budget(AtomicI64);

impl Default for Budget {
    fn default() -> Budget {
        Budget(AtomicI64::new(Budget::MOST))
    }
}

impl Budget {
    const SHARE: i64 = 20;
    /// What can be saved up: 32 reads.
    const MOST: i64 = 32 * Budget::SHARE;

    fn earn(&self) {
        if self.0.load(Ordering::Relaxed) < Budget::MOST {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn spend(&self) -> bool {
        let spent = |left: i64| (left >= Budget::SHARE).then_some(left - Budget::SHARE);
        self.0.fetch_update(Ordering::Relaxed, Ordering::Relaxed, spent).is_ok()
    }
}
