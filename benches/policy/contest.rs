//! One load, one size of cache, every contestant.
//!
//! What a read costs: [`SLOW`] from the copy, [`LOCAL`] from the cache, for each chunk that it
//! touches. A promotion writes one chunk. The baselines decide within the access: what they insert
//! is there for the next one, at no cost. Ours decides once a second: what a second touched is
//! there from the next second on, if the budget allows.

use std::collections::{HashMap, HashSet};
use std::time::Duration;

use underlay::promote::gain::CopyLatency;
use underlay::promote::tick::{Tick, Touch};
use underlay::promote::{Key, Policy, Settings};
use underlay::units::{CHUNK, Chunk};

use crate::caches::{Belady, Cache, Larc, Lru, Outcome, S3Fifo};
use crate::trace::Access;

/// Nanoseconds of a read from the copy.
pub const SLOW: u64 = 10_000_000;
/// Nanoseconds of a read from the cache.
pub const LOCAL: u64 = 200_000;
/// Bytes a second that ours may write.
pub const BUDGET: u64 = 32 << 20;

/// Who takes part.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Who {
    Ours,
    Lru,
    Larc,
    S3Fifo,
    Belady,
}

impl Who {
    pub const ALL: [Who; 5] = [Who::Ours, Who::Lru, Who::Larc, Who::S3Fifo, Who::Belady];

    pub fn name(self) -> &'static str {
        match self {
            Who::Ours => "ours",
            Who::Lru => "LRU",
            Who::Larc => "LARC",
            Who::S3Fifo => "S3-FIFO",
            Who::Belady => "Belady",
        }
    }
}

/// How it went.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Figures {
    pub accesses: u64,
    pub hits: u64,
    /// Hits of what was there before the second began.
    pub settled: u64,
    pub written: u64,
}

impl Figures {
    pub fn hit_rate(&self) -> f64 {
        100.0 * self.hits as f64 / self.accesses.max(1) as f64
    }

    /// The hit rate if what a second inserts could be read from the next second on only.
    pub fn settled_rate(&self) -> f64 {
        100.0 * self.settled as f64 / self.accesses.max(1) as f64
    }

    pub fn seconds_saved(&self) -> f64 {
        self.hits as f64 * (SLOW - LOCAL) as f64 / 1e9
    }

    /// MiB written, of chunks of this size.
    pub fn mib(&self, chunk: u64) -> f64 {
        (self.written * chunk) as f64 / f64::from(1 << 20)
    }
}

/// Runs one of them with room for `size` chunks of `chunk` bytes.
pub fn run(who: Who, accesses: &[Access], size: usize, chunk: u64, settings: Settings) -> Figures {
    let mut cache: Box<dyn Cache> = match who {
        Who::Ours => return ours(accesses, size, chunk, settings),
        Who::Lru => Box::new(Lru::new(size)),
        Who::Larc => Box::new(Larc::new(size)),
        Who::S3Fifo => Box::new(S3Fifo::new(size)),
        Who::Belady => {
            let keys: Vec<u64> = accesses.iter().map(|access| access.chunk).collect();
            Box::new(Belady::new(size, &keys))
        }
    };
    let mut figures = Figures { accesses: accesses.len() as u64, ..Figures::default() };
    let mut since = HashMap::new();
    for access in accesses {
        match cache.access(access.chunk) {
            Outcome::Hit => {
                figures.hits += 1;
                figures.settled += u64::from(since.get(&access.chunk) < Some(&access.second));
            }
            Outcome::Inserted => {
                figures.written += 1;
                since.insert(access.chunk, access.second);
            }
            Outcome::Passed => {}
        }
    }
    figures
}

/// The product's policy. It thinks in chunks of its own size: room and budget are given to it as so
/// many of them.
fn ours(accesses: &[Access], size: usize, chunk: u64, settings: Settings) -> Figures {
    let mut policy = Policy::new(settings).expect("settings of the bench");
    let copies = [CopyLatency { image: 0, nanos: SLOW }];
    let capacity = size as u64 * CHUNK;
    let mut figures = Figures { accesses: accesses.len() as u64, ..Figures::default() };
    let mut cached = HashSet::new();
    let mut before = accesses.first().map_or(0, |access| access.second);
    for second in accesses.chunk_by(|a, b| a.second == b.second) {
        let (mut hits, mut touches) = (Vec::new(), Vec::new());
        for access in second {
            let key = Key { image: 0, chunk: Chunk(access.chunk) };
            if cached.contains(&key) {
                hits.push(Touch { key, reads: 1, nanos: LOCAL });
            } else {
                touches.push(Touch { key, reads: 1, nanos: SLOW });
            }
        }
        figures.hits += hits.len() as u64;
        figures.settled = figures.hits;
        // The seconds without a read between, as the ticks that they are; the last is the one with
        // reads.
        for idle in (0..=second[0].second - before).rev() {
            let (hits, touches): (&[_], &[_]) =
                if idle == 0 { (&hits, &touches) } else { (&[], &[]) };
            let decisions = policy.tick(&Tick {
                elapsed: Duration::from_secs(1),
                touches,
                hits,
                copies: &copies,
                local: LOCAL,
                capacity,
                free: u64::MAX,
                budget: BUDGET * (CHUNK / chunk),
            });
            for key in decisions.evict {
                cached.remove(&key);
                policy.dropped(key);
            }
            for key in decisions.promote {
                cached.insert(key);
                policy.promoted(key);
                figures.written += 1;
            }
        }
        assert!(cached.len() <= size, "{} chunks in a cache of {size}", cached.len());
        before = second[0].second + 1;
    }
    figures
}
