//! Carries out what was decided for one disk's cache, one order after the other.
//!
//! Invariants:
//! - One task fills and empties the caches of a disk.
//! - It writes no faster than it may, and a disk that hangs holds up its own caches only.

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use nix::fcntl::OFlag;
use tokio::sync::mpsc;

use super::pins::Pins;
use crate::{
    catalog::{CacheShape, Digest, Name, Node},
    control::{
        config::Caching,
        exports::Exports,
        service::blocking,
        views::{Seat, Views},
    },
    error::{Context, Error, Kind, Result},
    image::ChunkTable,
    io::{Ring, RingFile, Rings},
    promote::{Cache, cache::entry, mover},
    units::{CHUNK, Chunk},
};

/// Chunks that are copied at the same time.
const BATCH: usize = 8;
/// Bytes a second of what an earlier daemon left that are read and compared.
const ADMIT_RATE: u64 = 256 << 20;

/// What to do with chunks of one image.
pub struct Order {
    /// The image as the disk sees it.
    pub seat: Arc<Seat>,
    /// Chunks to take out of the cache.
    pub evict: Vec<Chunk>,
    /// Chunks to bring into it.
    pub promote: Vec<Chunk>,
}

/// What became of a chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It is in the cache.
    Promoted,
    /// It was there when the daemon started.
    Found,
    /// It could not be brought there.
    Failed,
    /// It is gone, and its space is free.
    Gone,
}

/// Sends orders to a disk's task, and hears what became of them.
pub struct Mover {
    orders: mpsc::UnboundedSender<Vec<Order>>,
    /// Orders that were given and not carried out yet.
    waiting: Arc<AtomicUsize>,
    outcomes: Outcomes,
}

/// What became of chunks, until somebody asks.
#[derive(Clone, Default)]
pub struct Outcomes(Arc<Mutex<Vec<Told>>>);

/// A chunk of an image as a disk sees it, and what became of it.
type Told = (Arc<Seat>, Chunk, Outcome);

impl Outcomes {
    fn tell(&self, seat: &Arc<Seat>, chunk: Chunk, outcome: Outcome) {
        self.all().push((seat.clone(), chunk, outcome));
    }

    fn all(&self) -> std::sync::MutexGuard<'_, Vec<Told>> {
        // A list is whole after any panic.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What a disk's task works with.
pub struct Bench {
    /// What is pinned.
    pub pins: Pins,
    /// The node.
    pub node: Node,
    /// Where copies are opened.
    pub exports: Arc<Exports>,
    /// The views of images.
    pub views: Arc<Views>,
    /// The thread that reads copies and writes caches.
    pub rings: Arc<Rings>,
    /// How caches are opened.
    pub caching: Caching,
    /// Bytes a second that may be written to a disk.
    pub rate: u64,
}

impl Mover {
    /// Starts the task of `disk`: it looks first at what an earlier daemon left there.
    pub fn start(disk: Name, bench: Arc<Bench>) -> Mover {
        // No longer than the chunks that may leave a cache: nothing is promoted while it is not free.
        let (orders, mut received) = mpsc::unbounded_channel::<Vec<Order>>();
        let outcomes = Outcomes::default();
        let task = Task { disk, bench, outcomes: outcomes.clone() };
        let waiting = Arc::new(AtomicUsize::new(1));
        let left = waiting.clone();
        tokio::spawn(async move {
            task.adopt().await;
            left.fetch_sub(1, Ordering::Release);
            while let Some(orders) = received.recv().await {
                for order in orders {
                    task.carry_out(order).await;
                }
                left.fetch_sub(1, Ordering::Release);
            }
        });
        Mover { orders, waiting, outcomes }
    }

    /// Whether it has carried out all that it was told.
    pub fn is_free(&self) -> bool {
        self.waiting.load(Ordering::Acquire) == 0
    }

    /// Gives an order.
    pub fn order(&self, orders: Vec<Order>) {
        self.waiting.fetch_add(1, Ordering::Relaxed);
        // The task is there as long as this is.
        let _ = self.orders.send(orders);
    }

    /// What became of orders since this was asked last.
    pub fn outcomes(&self) -> Vec<Told> {
        std::mem::take(&mut self.outcomes.all())
    }
}

struct Task {
    disk: Name,
    bench: Arc<Bench>,
    outcomes: Outcomes,
}

impl Task {
    async fn carry_out(&self, order: Order) {
        let Order { seat, evict, promote } = order;
        if let Some(cache) = seat.view.cache() {
            evict.iter().for_each(|chunk| cache.withdraw(*chunk));
            self.sweep(&seat, cache).await;
        }
        // What is not there, because it was dropped meanwhile or the cache given up, is gone, too.
        let holds = |chunk| seat.view.cache().is_some_and(|cache| cache.is_stored(chunk));
        for chunk in evict.into_iter().filter(|chunk| !holds(*chunk)) {
            self.outcomes.tell(&seat, chunk, Outcome::Gone);
        }
        for chunks in promote.chunks(BATCH) {
            let started = Instant::now();
            let there = self.promote(&seat, chunks).await.unwrap_or_else(|error| {
                tracing::warn!(disk = %self.disk, image = %seat.digest, %error, "promotion");
                Vec::new()
            });
            for chunk in chunks {
                let outcome =
                    if there.contains(chunk) { Outcome::Promoted } else { Outcome::Failed };
                self.outcomes.tell(&seat, *chunk, outcome);
            }
            pause(started, chunks.len() as u64 * CHUNK, self.bench.rate).await;
        }
    }

    /// Gives back the space of what was withdrawn and is not read any more.
    async fn sweep(&self, seat: &Arc<Seat>, cache: &Arc<Cache<Ring>>) {
        let cache = cache.clone();
        let swept = self.bench.rings.run(0, |ring| async move { cache.sweep(&ring).await });
        let (gone, _) = swept.await.unwrap_or_default();
        gone.into_iter().for_each(|chunk| self.outcomes.tell(seat, chunk, Outcome::Gone));
    }

    async fn promote(&self, seat: &Arc<Seat>, chunks: &[Chunk]) -> Result<Vec<Chunk>> {
        let cache = self.cache(seat).await?;
        let copy = match seat.copy() {
            Some(copy) => copy,
            None => self.bench.exports.base(seat.digest).await?,
        };
        let known = chunks.iter().filter_map(|chunk| Some((*chunk, copy.crc(*chunk)?)));
        let known: Vec<(Chunk, u32)> = known.collect();
        let promoted = self
            .bench
            .rings
            .run(0, move |ring| async move { mover::promote(&ring, &*copy, &cache, &known).await });
        let gone = || Error::new(Kind::Unavailable, "the I/O thread is gone; restart the daemon");
        let (there, outcome) = promoted.await.ok_or_else(gone)?;
        if let Err(error) = outcome {
            tracing::warn!(disk = %self.disk, image = %seat.digest, %error, "promotion");
        }
        Ok(there)
    }

    /// The seat's cache, opened or made if need be.
    async fn cache(&self, seat: &Arc<Seat>) -> Result<Arc<Cache<Ring>>> {
        if let Some(cache) = seat.view.cache() {
            return Ok(cache.clone());
        }
        let (digest, size) = (seat.digest, seat.size);
        let shape = CacheShape {
            digest,
            size,
            header: entry::header(&digest, size).to_vec(),
            table: entry::file_len(size),
        };
        let flags = match self.bench.caching {
            Caching::Cached => OFlag::empty(),
            Caching::Direct => OFlag::O_DIRECT,
        };
        let (node, disk) = (self.bench.node.clone(), self.disk.clone());
        let files = blocking(move || node.open_cache(&disk, &shape, flags)).await?;
        let what = format!("cache of image {digest} on disk {}", self.disk);
        let file = |file| RingFile::new(file).context(|| format!("{what}: opening it"));
        let (data, chunks) = (file(files.data)?, file(files.chunks)?);
        let cache = Arc::new(Cache::new(what, data, chunks, digest, size));
        Ok(seat.view.set_cache(cache).clone())
    }

    /// Looks at the caches that an earlier daemon left: what is whole serves, what belongs to nothing goes.
    async fn adopt(&self) {
        let (node, disk) = (self.bench.node.clone(), self.disk.clone());
        let caches = blocking(move || node.caches(&disk)).await.unwrap_or_else(|error| {
            tracing::warn!(disk = %self.disk, %error, "its caches can't be listed");
            Vec::new()
        });
        for digest in caches {
            if let Err(error) = self.adopt_one(digest).await {
                tracing::warn!(disk = %self.disk, image = %digest, %error, "a cache is not used");
            }
        }
    }

    async fn adopt_one(&self, digest: Digest) -> Result<()> {
        let (node, disk) = (self.bench.node.clone(), self.disk.clone());
        let table = blocking(move || {
            let by: Name = digest.to_string().parse()?;
            if node.image(&by).is_err_and(|error| error.kind() == Kind::NotFound) {
                node.remove_cache(&disk, digest)?;
                tracing::info!(%disk, image = %digest, "the cache of an image that is gone is removed");
                return Ok(None);
            }
            let copy = node.open_copy(&by)?;
            ChunkTable::load(&copy.chunks, &format!("the chunk table of image {digest}")).map(Some)
        });
        let Some(table) = table.await? else { return Ok(()) };
        let seat = self.bench.views.seat(&self.disk, digest, table.size());
        let cache = self.cache(&seat).await?;
        let gone = || Error::new(Kind::Unavailable, "the I/O thread is gone; restart the daemon");
        let own = cache.clone();
        let claims = self.bench.rings.run(0, |ring| async move { own.claims(&ring).await });
        let claims: BTreeMap<Chunk, u32> = claims.await.ok_or_else(gone)??.into_iter().collect();
        let (mut found, mut dropped) = (0, 0);
        for chunk in claims.into_keys() {
            let (own, started) = (cache.clone(), Instant::now());
            // What the image has there, and not what an entry tells.
            let crc = table.sum(chunk).map_or(0, |sum| sum.crc);
            let admitted = self
                .bench
                .rings
                .run(0, move |ring| async move { own.admit(&ring, chunk, crc).await });
            if admitted.await.ok_or_else(gone)? {
                self.outcomes.tell(&seat, chunk, Outcome::Found);
                found += 1;
            } else {
                dropped += 1;
            }
            pause(started, CHUNK, ADMIT_RATE).await;
        }
        tracing::info!(disk = %self.disk, image = %digest, found, dropped, "a cache was looked through");
        Ok(())
    }
}

/// Waits until `bytes` since `started` are no more than `rate` a second.
async fn pause(started: Instant, bytes: u64, rate: u64) {
    let due = Duration::from_secs_f64(bytes as f64 / rate.max(1) as f64);
    tokio::time::sleep(due.saturating_sub(started.elapsed())).await;
}
