//! Carries out what was decided for one disk's caches: what leaves first, then what comes, a few chunks at
//! a time.
//!
//! Invariants:
//! - One task fills and empties the caches of a disk: the next begins when the one before has ended.
//! - A cache's files are opened only where nobody holds a cache of before, and looked through first.
//! - It writes no faster than it may. A disk that hangs holds up its own caches only; a copy that hangs is
//!   not waited for long.

use std::{
    collections::{HashMap, HashSet, VecDeque},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use nix::fcntl::OFlag;
use tokio::{
    sync::{Mutex as AsyncMutex, mpsc, oneshot},
    time::timeout,
};
use uuid::Uuid;

use super::pins::Pins;
use crate::{
    catalog::{CacheShape, Digest, Name, Node},
    control::{
        bases::load_table,
        config::Caching,
        exports::Exports,
        service::blocking,
        views::{Base, Seat, Views},
    },
    error::{Context, Error, Kind, Result},
    image::ChunkTable,
    io::{Ring, RingFile, Rings},
    promote::{Cache, cache::entry, mover, mover::PATIENCE},
    units::{CHUNK, Chunk},
};

/// Chunks that are copied at the same time.
const BATCH: usize = 8;
/// Bytes a second of what an earlier daemon left that are read and compared.
const ADMIT_RATE: u64 = 256 << 20;
/// How often the task looks for chunks that were withdrawn.
const SWEEP: Duration = Duration::from_secs(1);
/// How often it looks for caches that nobody has open: their image was away, or their disk failed.
const ADOPT: Duration = Duration::from_secs(20);

/// What to do with chunks of one image.
pub struct Order {
    /// The image as the disk sees it.
    pub seat: Arc<Seat>,
    /// Chunks to take out of the cache.
    pub evict: Vec<Chunk>,
    /// Chunks to bring into it.
    pub promote: Vec<Chunk>,
}

enum Job {
    Move(Vec<Order>),
    Remove(Digest, oneshot::Sender<()>),
}

/// What became of a chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It is in the cache.
    Promoted,
    /// It was there when the cache was opened.
    Found,
    /// It could not be brought there.
    Failed,
    /// It is gone, and its space is free.
    Gone,
}

/// Sends orders to a disk's task, and hears what became of them.
pub struct Mover {
    jobs: mpsc::UnboundedSender<Job>,
    /// Orders that were given, and promotions of these, that are not carried out yet.
    waiting: Arc<AtomicUsize>,
    ended: Arc<AtomicBool>,
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

/// Whose turn it is on a disk: a task has it to its end.
#[derive(Default)]
pub struct Turns(Mutex<HashMap<Uuid, Arc<AsyncMutex<()>>>>);

impl Turns {
    /// That of one disk.
    pub fn of(&self, disk: Uuid) -> Arc<AsyncMutex<()>> {
        let mut turns = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        turns.retain(|_, turn| Arc::strong_count(turn) > 1);
        turns.entry(disk).or_default().clone()
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
    /// Whose task is at work.
    pub turns: Turns,
    /// How caches are opened.
    pub caching: Caching,
    /// Bytes a second that may be written to a disk.
    pub rate: u64,
}

impl Mover {
    /// Starts the task of the disk of this name and id: it looks first at what an earlier one left there.
    pub fn start(disk: Name, id: Uuid, bench: Arc<Bench>) -> Mover {
        // No longer than the chunks that may leave a cache: nothing is promoted while it is not free.
        let (jobs, received) = mpsc::unbounded_channel::<Job>();
        let outcomes = Outcomes::default();
        let (waiting, ended) = (Arc::new(AtomicUsize::new(1)), Arc::default());
        let turn = bench.turns.of(id);
        let task = Task {
            disk,
            bench,
            outcomes: outcomes.clone(),
            waiting: waiting.clone(),
            ended: Arc::clone(&ended),
            queue: VecDeque::new(),
            unused: HashSet::new(),
        };
        tokio::spawn(async move {
            let _turn = turn.lock().await;
            task.work(received).await;
        });
        Mover { jobs, waiting, ended, outcomes }
    }

    /// Whether it has carried out all that it was told.
    pub fn is_free(&self) -> bool {
        self.waiting.load(Ordering::Acquire) == 0
    }

    /// Gives an order.
    pub fn order(&self, orders: Vec<Order>) {
        let chunks: usize = orders.iter().map(|order| order.promote.len()).sum();
        self.waiting.fetch_add(1 + chunks, Ordering::Relaxed);
        // The task is there as long as this is.
        let _ = self.jobs.send(Job::Move(orders));
    }

    /// Removes the cache of an image that is gone; what comes ends when that is done.
    pub fn remove(&self, digest: Digest) -> oneshot::Receiver<()> {
        let (done, removed) = oneshot::channel();
        let _ = self.jobs.send(Job::Remove(digest, done));
        removed
    }

    /// What became of orders since this was asked last.
    pub fn outcomes(&self) -> Vec<Told> {
        std::mem::take(&mut self.outcomes.all())
    }

    /// Nothing more is to be done, nor anything opened.
    pub fn end(&self) {
        self.ended.store(true, Ordering::SeqCst);
    }
}

impl Drop for Mover {
    fn drop(&mut self) {
        self.end();
    }
}

struct Task {
    disk: Name,
    bench: Arc<Bench>,
    outcomes: Outcomes,
    waiting: Arc<AtomicUsize>,
    ended: Arc<AtomicBool>,
    /// What is to be promoted yet.
    queue: VecDeque<(Arc<Seat>, VecDeque<Chunk>)>,
    /// Caches that could not be used, and of which the log tells.
    unused: HashSet<Digest>,
}

impl Task {
    async fn work(mut self, mut jobs: mpsc::UnboundedReceiver<Job>) {
        let (mut adopted, mut swept) = (None::<Instant>, Instant::now());
        while !self.has_ended() {
            if adopted.is_none_or(|at| at.elapsed() >= ADOPT) {
                self.adopt().await;
                if adopted.replace(Instant::now()).is_none() {
                    self.done(1);
                }
            }
            // What leaves must not wait for what comes.
            while let Ok(job) = jobs.try_recv() {
                self.take(job).await;
            }
            if swept.elapsed() >= SWEEP {
                self.sweep_all().await;
                swept = Instant::now();
            }
            if !self.queue.is_empty() {
                self.promote_some().await;
                continue;
            }
            match timeout(SWEEP, jobs.recv()).await {
                Ok(Some(job)) => self.take(job).await,
                Ok(None) => return,
                Err(_) => {}
            }
        }
    }

    fn has_ended(&self) -> bool {
        self.ended.load(Ordering::SeqCst)
    }

    fn done(&self, count: usize) {
        self.waiting.fetch_sub(count, Ordering::Release);
    }

    async fn take(&mut self, job: Job) {
        match job {
            Job::Move(orders) => {
                for Order { seat, evict, promote } in orders {
                    self.evict(&seat, evict).await;
                    if !promote.is_empty() {
                        self.queue.push_back((seat, promote.into()));
                    }
                }
                self.done(1);
            }
            Job::Remove(digest, done) => {
                let (gone, stay) = std::mem::take(&mut self.queue)
                    .into_iter()
                    .partition::<VecDeque<_>, _>(|(seat, _)| seat.digest == digest);
                self.queue = stay;
                gone.iter().for_each(|(_, chunks)| self.done(chunks.len()));
                let (node, disk) = (self.bench.node.clone(), self.disk.clone());
                let remove = move || match node.image_size(digest) {
                    // Imported again meanwhile.
                    Some(_) => Ok(()),
                    None => node.remove_cache(&disk, digest),
                };
                if let Err(error) = blocking(remove).await {
                    tracing::warn!(disk = %self.disk, image = %digest, %error, "its cache stays");
                }
                // Whoever asked may have given up.
                let _ = done.send(());
            }
        }
    }

    async fn evict(&self, seat: &Arc<Seat>, chunks: Vec<Chunk>) {
        if let Some(cache) = seat.view.cache() {
            chunks.iter().for_each(|chunk| cache.withdraw(*chunk));
            self.sweep(seat, cache).await;
        }
        // What is not there, because it was dropped meanwhile or the cache given up, is gone, too.
        let holds = |chunk| seat.view.cache().is_some_and(|cache| cache.is_stored(chunk));
        for chunk in chunks.into_iter().filter(|chunk| !holds(*chunk)) {
            self.outcomes.tell(seat, chunk, Outcome::Gone);
        }
    }

    /// Gives back what was withdrawn, by whomever, and could not be given back before: somebody read it,
    /// or the disk refused.
    async fn sweep_all(&self) {
        for seat in self.bench.views.all().into_iter().filter(|seat| seat.disk == self.disk) {
            if let Some(cache) = seat.view.cache().filter(|cache| cache.withdrawn() > 0) {
                self.sweep(&seat, cache).await;
            }
        }
    }

    /// Gives back the space of what was withdrawn and is not read any more.
    async fn sweep(&self, seat: &Arc<Seat>, cache: Arc<Cache<Ring>>) {
        let swept = self.bench.rings.run(0, |ring| async move { cache.sweep(&ring).await });
        let (gone, _) = swept.await.unwrap_or_default();
        gone.into_iter().for_each(|chunk| self.outcomes.tell(seat, chunk, Outcome::Gone));
    }

    /// Promotes the next few chunks, and tells what became of them.
    async fn promote_some(&mut self) {
        let Some((seat, mut left)) = self.queue.pop_front() else { return };
        let started = Instant::now();
        let mut chunks: Vec<Chunk> = left.drain(..left.len().min(BATCH)).collect();
        let there = self.promote(&seat, &chunks).await.unwrap_or_else(|error| {
            tracing::warn!(disk = %self.disk, image = %seat.digest, %error, "promotion");
            if !matches!(error.kind(), Kind::Corrupt | Kind::Io) {
                // It would be the same with the rest, only later.
                chunks.extend(left.drain(..));
            }
            Vec::new()
        });
        for chunk in &chunks {
            let outcome = if there.contains(chunk) { Outcome::Promoted } else { Outcome::Failed };
            self.outcomes.tell(&seat, *chunk, outcome);
        }
        if !left.is_empty() {
            self.queue.push_front((seat, left));
        }
        self.done(chunks.len());
        pause(started, there.len() as u64 * CHUNK, self.bench.rate).await;
    }

    /// Which of these are there now; an error if none.
    async fn promote(&self, seat: &Arc<Seat>, chunks: &[Chunk]) -> Result<Vec<Chunk>> {
        let copy = self.copy(seat).await?;
        let copies = copy.sources().copies();
        if copies.iter().any(|copy| copy.disk().name() == self.disk.as_str()) {
            return Err(Error::new(Kind::Invalid, "the disk has a copy of the image itself"));
        }
        let cache = self.cache(seat).await?;
        let known = chunks.iter().filter_map(|chunk| Some((*chunk, copy.crc(*chunk)?)));
        let known: Vec<(Chunk, u32)> = known.collect();
        let promoted = self
            .bench
            .rings
            .run(0, move |ring| async move { mover::promote(&ring, &*copy, &cache, &known).await });
        let (there, outcome) = promoted.await.ok_or_else(no_ring)?;
        match outcome {
            Err(error) if there.is_empty() => return Err(error),
            Err(error) => {
                tracing::warn!(disk = %self.disk, image = %seat.digest, %error, "promotion");
            }
            Ok(()) => {}
        }
        Ok(there)
    }

    /// What the image is read from.
    async fn copy(&self, seat: &Seat) -> Result<Arc<Base>> {
        match seat.copy() {
            Some(copy) => Ok(copy),
            None => timeout(PATIENCE, self.bench.exports.base(seat.digest))
                .await
                .map_err(|_| silent())?,
        }
    }

    /// The seat's cache. If none is open its files are, or are made, and what they hold is looked through.
    async fn cache(&self, seat: &Arc<Seat>) -> Result<Arc<Cache<Ring>>> {
        if let Some(cache) = seat.view.cache() {
            return Ok(cache);
        }
        if !self.bench.views.holds(seat) {
            return Err(Error::new(Kind::NotFound, "the image or the disk is gone"));
        }
        seat.check_vacant()?;
        let cache = Arc::new(self.open(seat).await?);
        seat.view.set_cache(cache.clone());
        // Whoever ends this task gives up the caches that he sees after that.
        let looked = match self.has_ended() {
            true => Err(given_up()),
            false => self.look_through(seat, &cache).await,
        };
        if looked.is_err() {
            seat.view.give_up();
        }
        looked.map(|()| cache)
    }

    async fn open(&self, seat: &Seat) -> Result<Cache<Ring>> {
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
        Ok(Cache::new(what, data, chunks, digest, size))
    }

    /// Makes present what is whole of what was left in a cache, and gives back all other space.
    async fn look_through(&self, seat: &Arc<Seat>, cache: &Arc<Cache<Ring>>) -> Result<()> {
        let rings = &self.bench.rings;
        let own = cache.clone();
        let claims = rings.run(0, |ring| async move { own.claims(&ring).await });
        let claims = claims.await.ok_or_else(no_ring)??;
        let mut claimed: Vec<Chunk> = claims.into_iter().map(|(chunk, _)| chunk).collect();
        let table = match claimed.is_empty() {
            true => None,
            false => Some(self.table(seat).await?),
        };
        if let Some(table) = &table {
            // What is zeros is never read, and would be there for ever.
            claimed.retain(|chunk| !table.is_zero(*chunk));
        }
        let (own, keep) = (cache.clone(), claimed.clone());
        let cleaned = rings.run(0, |ring| async move { own.clean(&ring, &keep).await });
        cleaned.await.ok_or_else(no_ring)??;
        let (mut found, mut dropped) = (0, 0);
        for chunk in claimed {
            if cache.is_closed() || self.has_ended() {
                return Err(given_up());
            }
            // What the image has there, and not what an entry tells.
            let Some(sum) = table.as_ref().and_then(|table| table.sum(chunk)) else { continue };
            let (own, started) = (cache.clone(), Instant::now());
            let admitted =
                rings.run(0, move |ring| async move { own.admit(&ring, chunk, &sum).await });
            if admitted.await.ok_or_else(no_ring)? {
                self.outcomes.tell(seat, chunk, Outcome::Found);
                found += 1;
            } else {
                dropped += 1;
            }
            pause(started, CHUNK, ADMIT_RATE).await;
        }
        if found + dropped > 0 {
            let (disk, image) = (&self.disk, seat.digest);
            tracing::info!(%disk, %image, found, dropped, "a cache was looked through");
        }
        Ok(())
    }

    /// The image's chunk table, from any of its copies.
    async fn table(&self, seat: &Seat) -> Result<ChunkTable> {
        let (digest, mut failed) = (seat.digest, None);
        for (disk, _) in self.bench.node.ready_copies(digest) {
            let node = self.bench.node.clone();
            let load = blocking(move || load_table(digest, &node.open_copy_on(digest, &disk)?));
            match timeout(PATIENCE, load).await.unwrap_or_else(|_| Err(silent())) {
                Ok(table) if table.size() == seat.size => return Ok(table),
                Ok(_) => failed = Some(Error::new(Kind::Corrupt, "a copy is of another size")),
                Err(error) => failed = Some(error),
            }
        }
        Err(failed.unwrap_or_else(|| Error::new(Kind::NotFound, "no copy of its image is there")))
    }

    /// Opens the caches on the disk that nobody has open, and removes those of images that are gone.
    async fn adopt(&mut self) {
        let (node, disk) = (self.bench.node.clone(), self.disk.clone());
        let caches = blocking(move || node.caches(&disk)).await.unwrap_or_else(|error| {
            tracing::debug!(disk = %self.disk, %error, "its caches can't be listed");
            Vec::new()
        });
        self.unused.retain(|digest| caches.contains(digest));
        for digest in caches {
            if self.has_ended() {
                return;
            }
            match self.adopt_one(digest).await {
                Ok(()) => {
                    self.unused.remove(&digest);
                }
                Err(error) if self.unused.insert(digest) => {
                    tracing::warn!(disk = %self.disk, image = %digest, %error, "a cache is not used");
                }
                Err(_) => {}
            }
        }
    }

    async fn adopt_one(&self, digest: Digest) -> Result<()> {
        let (bench, disk) = (&self.bench, self.disk.clone());
        if let Some(size) = bench.node.image_size(digest) {
            return self.cache(&bench.views.seat(&disk, digest, size)?).await.map(drop);
        }
        if !bench.node.is_image_gone(digest) {
            // Its copy may be on a disk that isn't there.
            return Err(Error::new(Kind::NotFound, "no copy of its image is there"));
        }
        let node = bench.node.clone();
        blocking(move || node.remove_cache(&disk, digest)).await?;
        tracing::info!(disk = %self.disk, image = %digest, "the cache of an image that is gone is removed");
        Ok(())
    }
}

fn no_ring() -> Error {
    Error::new(Kind::Unavailable, "the I/O thread is gone; restart the daemon")
}

fn silent() -> Error {
    Error::new(Kind::Unavailable, "the image's copy doesn't answer")
}

fn given_up() -> Error {
    Error::new(Kind::Cancelled, "given up while it was looked through")
}

/// Waits until `bytes` since `started` are no more than `rate` a second.
async fn pause(started: Instant, bytes: u64, rate: u64) {
    let due = Duration::from_secs_f64(bytes as f64 / rate.max(1) as f64);
    tokio::time::sleep(due.saturating_sub(started.elapsed())).await;
}
