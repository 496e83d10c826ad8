//! What the replicas of one disk read of one image whose copy lies on another: counted as it happens,
//! taken once a tick by whoever decides what to promote.

use std::{
    sync::atomic::{AtomicU32, AtomicU64, Ordering},
    time::Duration,
};

use crate::pages::Pages;
use crate::{
    histogram::Histogram,
    units::{self, Chunk},
};

/// A read that took less came from memory. 64 µs: a copy of 256 KiB within the page cache takes some
/// 30 µs, a read of 4 KiB from a fast NVMe disk 80 µs.
pub const FROM_MEMORY: Duration = Duration::from_micros(64);

/// Counters of one image as the replicas of one disk read it.
pub struct Demand {
    chunks: Pages<Cell>,
    /// Reads of the copy, as long as they took.
    pub copy: Histogram,
    /// Bytes read from the copy.
    pub copy_bytes: AtomicU64,
    /// Reads of the cache, as long as they took.
    pub cache: Histogram,
    /// Bytes read from the cache.
    pub cache_bytes: AtomicU64,
    /// Reads of what the replicas wrote themselves, as long as they took.
    pub overlay: Histogram,
}

/// One chunk's: since they were taken last, and in all until then.
#[derive(Default)]
struct Cell {
    copy: AtomicU32,
    cache: AtomicU32,
    slow: AtomicU32,
    slow_micros: AtomicU32,
    all_copy: AtomicU64,
    all_cache: AtomicU64,
}

/// Where the reads of one chunk were answered from, since the daemon's start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Total {
    /// Which chunk.
    pub chunk: Chunk,
    /// Reads that the copy answered.
    pub copy: u64,
    /// Reads that the cache answered.
    pub cache: u64,
}

/// What was read of one chunk in a tick.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Touch {
    /// Which chunk.
    pub chunk: Chunk,
    /// Reads that the copy answered.
    pub copy: u32,
    /// Of those, reads that took too long to have come from memory.
    pub slow: u32,
    /// How long these took together.
    pub slow_time: Duration,
    /// Reads that the cache answered.
    pub cache: u32,
}

impl Demand {
    /// Nothing yet, of an image of `size` bytes.
    pub fn new(size: u64) -> Demand {
        Demand {
            chunks: Pages::new(units::chunks(size)),
            copy: Histogram::default(),
            copy_bytes: AtomicU64::new(0),
            cache: Histogram::default(),
            cache_bytes: AtomicU64::new(0),
            overlay: Histogram::default(),
        }
    }

    /// The copy answered a read of `len` bytes at `offset`.
    pub fn read_copy(&self, offset: u64, len: u64, took: Duration) {
        self.copy.record(took);
        self.copy_bytes.fetch_add(len, Ordering::Relaxed);
        let slow = took >= FROM_MEMORY;
        for chunk in Chunk::at(offset).0..units::chunks(offset + len) {
            let Some(cell) = self.chunks.make(Chunk(chunk)) else { return };
            cell.copy.fetch_add(1, Ordering::Relaxed);
            if slow {
                let micros = u32::try_from(took.as_micros()).unwrap_or(u32::MAX);
                cell.slow.fetch_add(1, Ordering::Relaxed);
                cell.slow_micros.fetch_add(micros, Ordering::Relaxed);
            }
        }
    }

    /// The cache answered a read of `len` bytes in `chunk`.
    pub fn read_cache(&self, chunk: Chunk, len: u64, took: Duration) {
        self.cache.record(took);
        self.cache_bytes.fetch_add(len, Ordering::Relaxed);
        if let Some(cell) = self.chunks.make(chunk) {
            cell.cache.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// The chunks that were read since this was asked last, in order.
    pub fn take(&self) -> Vec<Touch> {
        let taken = self.chunks.each().filter_map(|(chunk, cell)| {
            let take = |counter: &AtomicU32| match counter.load(Ordering::Relaxed) {
                0 => 0,
                _ => counter.swap(0, Ordering::Relaxed),
            };
            let micros = take(&cell.slow_micros);
            let touch = Touch {
                chunk,
                copy: take(&cell.copy),
                slow: take(&cell.slow),
                slow_time: Duration::from_micros(micros.into()),
                cache: take(&cell.cache),
            };
            cell.all_copy.fetch_add(touch.copy.into(), Ordering::Relaxed);
            cell.all_cache.fetch_add(touch.cache.into(), Ordering::Relaxed);
            (touch.copy > 0 || touch.cache > 0).then_some(touch)
        });
        taken.collect()
    }

    /// What was taken so far, of the chunks that were ever read, in order.
    pub fn totals(&self) -> impl Iterator<Item = Total> {
        self.chunks.each().filter_map(|(chunk, cell)| {
            let copy = cell.all_copy.load(Ordering::Relaxed);
            let cache = cell.all_cache.load(Ordering::Relaxed);
            (copy > 0 || cache > 0).then_some(Total { chunk, copy, cache })
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::CHUNK;

    #[test]
    fn every_chunk_of_a_read_is_touched_once_a_tick() {
        let demand = Demand::new(1000 * CHUNK - 512);
        demand.read_copy(CHUNK - 512, CHUNK + 1024, Duration::from_millis(3));
        demand.read_copy(CHUNK, 4096, Duration::from_micros(5));
        demand.read_copy(999 * CHUNK, 512, Duration::from_micros(5));
        demand.read_cache(Chunk(2), 4096, Duration::from_micros(90));
        let touch = |chunk, copy, slow, cache| Touch {
            chunk: Chunk(chunk),
            copy,
            slow,
            slow_time: Duration::from_millis(3) * slow,
            cache,
        };
        let expected =
            [touch(0, 1, 1, 0), touch(1, 2, 1, 0), touch(2, 1, 1, 1), touch(999, 1, 0, 0)];
        assert_eq!(demand.take(), expected);
        assert_eq!(demand.take(), []);
        demand.read_copy(0, 1, Duration::ZERO);
        demand.take();
        assert_eq!(demand.totals().next(), Some(Total { chunk: Chunk(0), copy: 2, cache: 0 }));
        assert_eq!(demand.copy_bytes.into_inner(), CHUNK + 1024 + 4096 + 512 + 1);
        assert_eq!((demand.copy.counts().total(), demand.cache.counts().total()), (4, 1));
    }
}
