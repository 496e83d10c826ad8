//! What a tick tells the policy, what the policy answers, and what it all came to.
//!
//! Figures only: the policy gets them from its caller, who knows clocks, disks and probes.

use std::time::Duration;

use super::gain::CopyLatency;
use super::heat::Key;

/// The reads of one chunk in one tick.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Touch {
    /// Which chunk.
    pub key: Key,
    /// How many reads of it.
    pub reads: u32,
    /// How long they took in all.
    pub nanos: u64,
}

/// What happened in a tick, and what the next may use.
#[derive(Clone, Copy, Debug)]
pub struct Tick<'a> {
    /// How long it was.
    pub elapsed: Duration,
    /// Chunks that were read from a copy on another disk and not answered by the page cache.
    pub touches: &'a [Touch],
    /// Chunks that the cache served.
    pub hits: &'a [Touch],
    /// Latencies of copies, as far as they were measured.
    pub copies: &'a [CopyLatency],
    /// Nanoseconds of a typical read from the local disk.
    pub local: u64,
    /// Bytes that the cache may hold.
    pub capacity: u64,
    /// Bytes free for the cache on its disk, beyond what must stay free.
    pub free: u64,
    /// Bytes that may be written into the cache per second.
    pub budget: u64,
}

/// What the mover is to do: first the evictions, then the promotions in their order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Decisions {
    /// Chunks to give up, coldest first; each is answered by [`super::Policy::dropped`] when its
    /// space is free.
    pub evict: Vec<Key>,
    /// Chunks to copy into the cache; each is answered by [`super::Policy::promoted`] or
    /// [`super::Policy::failed`].
    pub promote: Vec<Key>,
}

/// What the cache was good for, since the policy was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Totals {
    /// Reads that the cache served.
    pub hits: u64,
    /// Reads that went to a copy on another disk.
    pub misses: u64,
    /// Nanoseconds that hits saved over reads from the copy, by the latencies of their tick.
    pub saved: u64,
    /// Nanoseconds that misses took longer than local reads would have.
    pub missed: u64,
    /// Chunks promoted.
    pub promoted: u64,
    /// Promotions that failed.
    pub failed: u64,
    /// Chunks evicted by decision.
    pub evicted: u64,
    /// Bytes that promotions wrote, failed ones too.
    pub written: u64,
}

impl Totals {
    /// Milliseconds saved for each MiB written, if anything was.
    pub fn saved_per_mib(&self) -> Option<f64> {
        let mib = self.written as f64 / f64::from(1 << 20);
        (self.written > 0).then(|| self.saved as f64 / 1e6 / mib)
    }
}
