//! A read load on several replicas at once: most reads go to few chunks. Every read is compared with what
//! it must be, and timed.

use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow, ensure};
use fastrand::Rng;

use crate::nbd::Client;

/// Bytes of a chunk: the unit of promotion.
pub const CHUNK: u64 = 256 << 10;
/// Bytes of a read.
const READ: usize = 4096;
/// Between two reads of a thread: the load leaves the processors to those who are measured.
const PAUSE: Duration = Duration::from_millis(2);

/// One read.
#[derive(Clone, Copy, Debug)]
pub struct Sample {
    /// Seconds since the load began.
    pub at: f64,
    /// How long it took, in seconds.
    pub took: f64,
    /// What was read.
    pub kind: Kind,
}

/// What was read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// One of the few chunks of the image that are read often.
    Hot,
    /// Any of the others.
    Cold,
    /// What the replica wrote, which is on its own disk.
    Local,
}

/// What the threads share.
struct Shared {
    content: Vec<u8>,
    started: Instant,
    stop: AtomicBool,
    /// Where the hot chunks begin: every seventh chunk from here.
    hot: AtomicU64,
    samples: Mutex<Vec<Sample>>,
}

/// A load that runs.
pub struct Load {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<Result<()>>>,
}

/// How a thread reads.
#[derive(Clone, Copy, Debug)]
pub struct Aim {
    /// How many chunks are hot.
    pub hot: u64,
    /// The share of reads that go there, in percent.
    pub share: u32,
}

impl Load {
    /// A load on replicas of an image with this content; no thread reads yet.
    pub fn new(content: Vec<u8>) -> Load {
        let shared = Shared {
            content,
            started: Instant::now(),
            stop: AtomicBool::new(false),
            hot: AtomicU64::new(0),
            samples: Mutex::default(),
        };
        Load { shared: Arc::new(shared), threads: Vec::new() }
    }

    /// Starts a thread that reads `export`: hot and cold chunks as `aim` says; or, without one, what lies in
    /// the first `local` bytes, which the replica holds itself.
    pub fn read(
        &mut self,
        socket: &Path,
        export: &str,
        aim: Option<Aim>,
        local: u64,
    ) -> Result<()> {
        let mut client = Client::open(socket, export)?;
        let shared = self.shared.clone();
        let mut rng = Rng::with_seed(self.threads.len() as u64);
        self.threads.push(thread::spawn(move || {
            let chunks = shared.content.len() as u64 / CHUNK;
            let mut buf = vec![0; READ];
            while !shared.stop.load(Ordering::Relaxed) {
                let (kind, chunk) = match aim {
                    None => (Kind::Local, rng.u64(..local / CHUNK)),
                    Some(aim) if rng.u32(..100) < aim.share => {
                        let first = shared.hot.load(Ordering::Relaxed);
                        (Kind::Hot, (first + rng.u64(..aim.hot) * 7) % chunks)
                    }
                    Some(_) => (Kind::Cold, rng.u64(..chunks)),
                };
                let at = chunk * CHUNK + rng.u64(..CHUNK / READ as u64) * READ as u64;
                let started = Instant::now();
                client.read(at, &mut buf)?;
                let took = started.elapsed().as_secs_f64();
                let range = at as usize..at as usize + READ;
                ensure!(buf == shared.content[range], "byte {at} and on: not the image's content");
                let at = shared.started.elapsed().as_secs_f64();
                let sample = Sample { at, took, kind };
                shared.samples.lock().map_err(|_| anyhow!("a thread died"))?.push(sample);
                thread::sleep(PAUSE);
            }
            Ok(())
        }));
        Ok(())
    }

    /// Seconds since it began.
    pub fn clock(&self) -> f64 {
        self.shared.started.elapsed().as_secs_f64()
    }

    /// From now on other chunks are hot.
    pub fn shift(&self) {
        self.shared.hot.fetch_add(3, Ordering::Relaxed);
    }

    /// Ends it; all that was read.
    pub fn end(self) -> Result<Vec<Sample>> {
        self.shared.stop.store(true, Ordering::Relaxed);
        for thread in self.threads {
            thread.join().map_err(|_| anyhow!("a reader panicked"))??;
        }
        let mut samples = self.shared.samples.lock().map_err(|_| anyhow!("a thread died"))?;
        Ok(std::mem::take(&mut samples))
    }
}

/// The time that `share` of the reads of a kind took less than, of those between two moments; `None` of
/// none.
pub fn quantile(samples: &[Sample], kind: Kind, from: f64, to: f64, share: f64) -> Option<f64> {
    let within = |it: &&Sample| it.kind == kind && it.at >= from && it.at < to;
    let mut took: Vec<f64> = samples.iter().filter(within).map(|sample| sample.took).collect();
    took.sort_by(f64::total_cmp);
    let rank = (took.len() as f64 * share) as usize;
    took.get(rank.min(took.len().checked_sub(1)?)).copied()
}
