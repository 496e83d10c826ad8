//! One more copy of an image, made from those that are there while everybody reads them.
//!
//! Every chunk is read as a guest reads it (from whichever copy has it, verified by CRC-32), compared with
//! its SHA-256, and written; holes stay holes. What was not published leaves nothing behind.

use std::{
    fs::File,
    os::{fd::AsFd, unix::fs::FileExt},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use futures_util::future::join_all;
use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use serde_json::json;

use crate::{
    catalog::{Digest, ImageStatus, Name, Node},
    control::{bases::Bases, events::Happened, service::blocking, views::Base},
    error::{Context, Error, Kind, Result},
    image::{ChunkSum, ChunkTable},
    io::{Io, Rings},
    units::Chunk,
};

/// Chunks that are read at once.
const BATCH: usize = 8;
/// Chunks after which what was written goes to the disk, and out of the page cache: 64 MiB.
const SYNC: u64 = 256;

/// Who makes copies.
#[derive(Clone)]
pub struct Copying {
    /// The catalogue.
    pub node: Node,
    /// The images.
    pub bases: Arc<Bases>,
    /// The threads that read.
    pub rings: Arc<Rings>,
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

impl Copying {
    /// Makes a copy, and says where. Blocks; must be called where tokio lets one block.
    pub fn make(&self, order: &Order<'_>) -> Result<(Name, ImageStatus)> {
        let staged = self.node.stage_another(order.digest, order.disk, order.anyhow)?;
        let disk = staged.disk().clone();
        let within = |error: Error| error.within(format!("a copy on disk {disk}"));
        let source = self.node.open_copy(&order.digest.to_string().parse()?)?;
        let table = ChunkTable::load(&source.chunks, "its chunk table")?;
        if table.digest().0 != order.digest.0 || table.size() != source.size {
            return Err(Error::new(Kind::Corrupt, "its chunk table is that of another image"));
        }
        drop(source);
        let what = || format!("writing {}", staged.data_path().display());
        let create = |path| File::options().write(true).create_new(true).open(path);
        let data = create(staged.data_path()).context(what).map_err(within)?;
        data.set_len(table.size()).context(what).map_err(within)?;
        let chunks = create(staged.chunks_path()).context(what).map_err(within)?;
        table.store(&chunks, "its chunk table").map_err(within)?;
        self.fill(&table, &data, order).map_err(within)?;
        data.sync_all().context(what).map_err(within)?;
        let status = self.node.publish_another(staged, order.digest).map_err(within)?;
        let message = format!("a copy was made on disk {disk}: {}", order.why);
        let details = json!({
            "digest": order.digest, "disk": disk, "bytes": status.size, "why": order.why,
        });
        let object = self.bases.called(order.digest);
        self.bases.events().tell(Happened::CopyMade, object, message, details);
        Ok((disk, status))
    }

    fn fill(&self, table: &ChunkTable, data: &File, order: &Order<'_>) -> Result<()> {
        // This thread may block; what reads are tasks of the rings.
        let runtime = tokio::runtime::Handle::current();
        let base = runtime.block_on(self.bases.base(order.digest))?;
        let (started, mut written, mut unsynced) = (Instant::now(), 0, 0);
        let mut next = table.next_data(Chunk(0));
        while let Some(first) = next {
            if order.cancel.load(Ordering::Acquire) {
                return Err(Error::new(Kind::Cancelled, "given up; nothing is left of it"));
            }
            (order.report)(first.offset(), table.size());
            let batch: Vec<Chunk> =
                std::iter::successors(Some(first), |chunk| table.next_data(Chunk(chunk.0 + 1)))
                    .take(BATCH)
                    .collect();
            next = batch.last().and_then(|last| table.next_data(Chunk(last.0 + 1)));
            let reads = batch.iter().map(|chunk| self.read(&base, *chunk, table.chunk_len(*chunk)));
            for (chunk, bytes) in batch.iter().zip(runtime.block_on(join_all(reads))) {
                let bytes = bytes?;
                if table.sum(*chunk).is_none_or(|sum| sum != ChunkSum::of(&bytes)) {
                    let what = format!("chunk {} is not what was imported", chunk.0);
                    return Err(Error::new(Kind::Corrupt, what));
                }
                data.write_all_at(&bytes, chunk.offset()).context(|| "writing its content")?;
                written += bytes.len() as u64;
                unsynced += 1;
            }
            if unsynced >= SYNC {
                unsynced = 0;
                data.sync_data().context(|| "writing its content")?;
                // It is for its readers to say what belongs into the page cache.
                let _ = posix_fadvise(data.as_fd(), 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED);
            }
            if let Some(rate) = order.rate {
                let due = Duration::from_secs_f64(written as f64 / rate.max(1) as f64);
                std::thread::sleep(due.saturating_sub(started.elapsed()));
            }
        }
        (order.report)(table.size(), table.size());
        Ok(())
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
