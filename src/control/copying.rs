//! One more copy of an image, made from those that are there while everybody reads them.
//!
//! Every chunk is read as a guest reads it (from whichever copy has it, verified by CRC-32), compared with
//! its SHA-256, and written; holes stay holes. A copy that was interrupted is gone on with: what is there of it
//! is compared too, and what is not sound is written anew.

use std::{
    fs::File,
    os::{fd::AsFd, unix::fs::FileExt},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use futures_util::future::join_all;
use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use serde_json::json;

use crate::{
    catalog::{Digest, ImageStatus, Name, Node, StagedCopy},
    control::{bases::Bases, events::Happened, service::blocking, views::Base},
    error::{Context, Error, Kind, Result},
    image::{ChunkSum, ChunkTable},
    io::{Io, Rings, holes},
    units::{CHUNK, Chunk},
};

/// Chunks that are read at once.
const BATCH: usize = 8;
/// Chunks after which what was written goes to the disk, and out of the page cache: 64 MiB.
const SYNC: u64 = 256;
/// How many times cheaper a byte is that is there already: it is read once, in order, and not written.
const THERE: u64 = 4;

/// What failed if the copy itself could not be written.
const WRITING: &str = "writing its content";

/// Who makes copies.
#[derive(Clone)]
pub struct Copying {
    node: Node,
    bases: Arc<Bases>,
    rings: Arc<Rings>,
    under_way: Arc<Mutex<Vec<Making>>>,
}

/// How a copy is to be made.
pub struct Order<'a> {
    /// Of which image.
    pub digest: Digest,
    /// On which disk; on the one that suits best otherwise.
    pub disk: Option<&'a Name>,
    /// Also on a disk that fails together with one that has a copy.
    pub anyhow: bool,
    /// Bytes a second at most.
    pub rate: Option<u64>,
    /// Why it is made, for who hears of it.
    pub why: &'a str,
    /// Set once it is to be given up.
    pub cancel: &'a AtomicBool,
    /// Hears how many bytes of the image are done, of how many.
    pub report: &'a dyn Fn(u64, u64),
}

/// A copy that is being made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Making {
    /// Of which image.
    pub digest: Digest,
    /// On which disk.
    pub disk: Name,
    /// Bytes of the image that are done, and in all.
    pub done: (u64, u64),
    /// Why.
    pub why: String,
}

impl Copying {
    /// Makes copies of what is in the catalogue, reading from the images on the rings' threads.
    pub fn new(node: Node, bases: Arc<Bases>, rings: Arc<Rings>) -> Copying {
        Copying { node, bases, rings, under_way: Arc::default() }
    }

    /// The catalogue.
    pub fn node(&self) -> &Node {
        &self.node
    }

    /// The images.
    pub fn bases(&self) -> &Arc<Bases> {
        &self.bases
    }

    /// The copies that are being made.
    pub fn under_way(&self) -> Vec<Making> {
        self.makings().clone()
    }

    /// Makes a copy, and says where. Blocks; must be called where tokio lets one block.
    pub fn make(&self, order: &Order<'_>) -> Result<(Name, ImageStatus)> {
        let mut staged = self.node.stage_another(order.digest, order.disk, order.anyhow)?;
        let disk = staged.disk().clone();
        let within = |error: Error| error.within(format!("a copy on disk {disk}"));
        let found = staged.found();
        self.fill(&mut staged, order).map_err(within)?;
        let status = self.node.publish_another(staged, order.digest).map_err(within)?;
        let message = format!("a copy was made on disk {disk}: {}", order.why);
        let details = json!({
            "digest": order.digest, "disk": disk, "bytes": status.size, "why": order.why,
            "resumed_at": found,
        });
        let object = self.bases.called(order.digest);
        self.bases.events().tell(Happened::CopyMade, object, message, details);
        Ok((disk, status))
    }

    fn fill(&self, staged: &mut StagedCopy, order: &Order<'_>) -> Result<()> {
        let source = self.node.open_copy(&order.digest.to_string().parse()?)?;
        let table = ChunkTable::load(&source.chunks, "its chunk table")?;
        if table.digest().0 != order.digest.0 || table.size() != source.size {
            return Err(Error::new(Kind::Corrupt, "its chunk table is that of another image"));
        }
        drop(source);
        let data = staged.open_data()?;
        let _told = self.tell(Making {
            digest: order.digest,
            disk: staged.disk().clone(),
            done: (0, table.size()),
            why: order.why.to_owned(),
        });
        let mut filling = Filling { copying: self, table: &table, data, staged, order };
        filling.all()?;
        filling.end()
    }

    /// Shows a copy until what this gives is dropped.
    fn tell(&self, making: Making) -> Told<'_> {
        let told = Told { copying: self, digest: making.digest, disk: making.disk.clone() };
        self.makings().push(making);
        told
    }

    fn makings(&self) -> MutexGuard<'_, Vec<Making>> {
        self.under_way.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn read(&self, base: &Arc<Base>, chunk: Chunk, len: usize) -> Result<Vec<u8>> {
        let base = base.clone();
        let read = self.rings.run(self.rings.pick(), move |ring| async move {
            let buf = ring.alloc(len);
            base.sources().read(&ring, chunk.offset(), buf.clone()).await?;
            Ok(buf.to_vec())
        });
        let gone = || Error::new(Kind::Unavailable, "the I/O thread is gone; restart the daemon");
        read.await.ok_or_else(gone)?
    }

    /// Reads the copy on a disk whole, past everything that others know of it. Whether it is sound.
    pub async fn is_sound(&self, digest: Digest, disk: &Name) -> Result<bool> {
        let (node, by) = (self.node.clone(), disk.clone());
        blocking(move || {
            let copy = node.open_copy_on(digest, &by)?;
            let table = ChunkTable::load(&copy.chunks, "its chunk table")?;
            let never = AtomicBool::new(false);
            let found = crate::image::verify(&copy.data, &table, "a copy", &|_| {}, &never)?;
            Ok(found.is_sound())
        })
        .await
    }
}

/// A copy that is shown as being made.
struct Told<'a> {
    copying: &'a Copying,
    digest: Digest,
    disk: Name,
}

impl Drop for Told<'_> {
    fn drop(&mut self) {
        let is_it = |making: &Making| making.digest == self.digest && making.disk == self.disk;
        self.copying.makings().retain(|making| !is_it(making));
    }
}

/// A copy that is being filled.
struct Filling<'a> {
    copying: &'a Copying,
    table: &'a ChunkTable,
    data: File,
    staged: &'a mut StagedCopy,
    order: &'a Order<'a>,
}

impl Filling<'_> {
    fn all(&mut self) -> Result<()> {
        self.clear().inspect_err(|_| self.staged.give_up())?;
        // This thread may block; what reads are tasks of the rings.
        let runtime = tokio::runtime::Handle::current();
        let base = runtime.block_on(self.copying.bases.base(self.order.digest))?;
        let (started, mut work, mut unsynced) = (Instant::now(), 0, 0);
        let mut next = self.table.next_data(Chunk(0));
        while let Some(first) = next {
            if self.order.cancel.load(Ordering::Acquire) {
                let what = match self.staged.found() {
                    0 => "given up; nothing is left of it",
                    _ => "given up; what was copied is kept for a day, and gone on with",
                };
                return Err(Error::new(Kind::Cancelled, what));
            }
            self.report(first.offset());
            let table = self.table;
            let batch: Vec<Chunk> =
                std::iter::successors(Some(first), |chunk| table.next_data(Chunk(chunk.0 + 1)))
                    .take(BATCH)
                    .collect();
            next = batch.last().and_then(|last| table.next_data(Chunk(last.0 + 1)));
            let (there, missing): (Vec<Chunk>, Vec<Chunk>) =
                batch.iter().partition(|chunk| self.has(**chunk));
            let reads = missing.iter().map(|chunk| {
                let len = table.chunk_len(*chunk);
                self.copying.read(&base, *chunk, len)
            });
            for (chunk, bytes) in missing.iter().zip(runtime.block_on(join_all(reads))) {
                self.write(*chunk, &bytes?)?;
            }
            let weight = |chunks: &[Chunk]| -> u64 {
                chunks.iter().map(|chunk| table.chunk_len(*chunk) as u64).sum()
            };
            work += weight(&missing) + weight(&there) / THERE;
            unsynced += missing.len() as u64;
            if unsynced >= SYNC {
                unsynced = 0;
                let end = next.map_or(table.size(), Chunk::offset);
                self.sync(end).inspect_err(|_| self.staged.give_up())?;
            }
            if let Some(rate) = self.order.rate {
                let due = Duration::from_secs_f64(work as f64 / rate.max(1) as f64);
                std::thread::sleep(due.saturating_sub(started.elapsed()));
            }
        }
        self.report(self.table.size());
        Ok(())
    }

    /// Takes away what an earlier try can't have written: behind the end, and where the image is all zeros.
    fn clear(&self) -> Result<()> {
        let (mut at, end) = (0, self.staged.found().min(self.table.size()));
        self.data.set_len(end).context(|| WRITING)?;
        self.data.set_len(self.table.size()).context(|| WRITING)?;
        while at < end {
            let data = self.table.next_data(Chunk::at(at)).map_or(end, Chunk::offset).min(end);
            if holes::next_data(&self.data, at, data).context(|| WRITING)?.is_some() {
                holes::punch(&self.data, at..data).context(|| WRITING)?;
            }
            at = data.saturating_add(CHUNK);
        }
        Ok(())
    }

    /// Whether a chunk is there and sound.
    fn has(&self, chunk: Chunk) -> bool {
        if chunk.offset() >= self.staged.found() {
            return false;
        }
        let mut bytes = vec![0; self.table.chunk_len(chunk)];
        self.data.read_exact_at(&mut bytes, chunk.offset()).is_ok()
            && self.table.sum(chunk) == Some(ChunkSum::of(&bytes))
    }

    fn write(&mut self, chunk: Chunk, bytes: &[u8]) -> Result<()> {
        if self.table.sum(chunk).is_none_or(|sum| sum != ChunkSum::of(bytes)) {
            let what = format!("chunk {} is not what was imported", chunk.0);
            return Err(Error::new(Kind::Corrupt, what));
        }
        let written = self.data.write_all_at(bytes, chunk.offset());
        written.context(|| WRITING).inspect_err(|_| self.staged.give_up())
    }

    /// Makes durable what was written, all before `end`.
    fn sync(&mut self, end: u64) -> Result<()> {
        self.data.sync_data().context(|| WRITING)?;
        // It is for its readers to say what belongs into the page cache.
        let _ = posix_fadvise(self.data.as_fd(), 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED);
        // What an earlier try has left behind that is still to be looked at.
        let end = end.max(self.staged.found().min(self.table.size()));
        self.staged.note(self.order.digest, end)
    }

    fn end(&mut self) -> Result<()> {
        let end = self.data.sync_all().context(|| WRITING).and_then(|()| {
            let chunks =
                File::options().write(true).create_new(true).open(self.staged.chunks_path());
            self.table.store(&chunks.context(|| "writing its chunk table")?, "its chunk table")
        });
        end.inspect_err(|_| self.staged.give_up())
    }

    fn report(&self, done: u64) {
        let all = self.table.size();
        (self.order.report)(done, all);
        for making in &mut *self.copying.makings() {
            if making.digest == self.order.digest && making.disk == *self.staged.disk() {
                making.done = (done, all);
            }
        }
    }
}
