//! One copy of an image, open: what its chunks were found to be, and reads of it.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering},
    },
    time::Instant,
};

use tokio::sync::Semaphore;

use super::{Image, Verify, disk::Disk};
use crate::{
    cow::{LockMode, RangeLocks},
    error::{Context, Error, Kind, Result},
    io::{Buf, Io, read_any},
    pages::Pages,
    units::Chunk,
};

/// The chunk's content was compared with its sum since the copy was opened.
const VERIFIED: u8 = 1;
/// It was not what it must be.
const CORRUPT: u8 = 2;
/// It could not be read.
const UNREADABLE: u8 = 4;

/// Chunks of one copy that are verified at one time: each takes memory of its size.
const CHECKS: usize = 32;
/// Bytes of a read that tells how fast a disk is, at most.
const SHORT: usize = 64 << 10;
/// Bytes that a sum is taken over at a time.
const PIECE: usize = 4 << 10;

/// A copy of an image on one disk.
pub struct Copy<I: Io> {
    disk: Arc<Disk>,
    identity: (u64, u64),
    data: I::File,
    direct: I::File,
    chunks: Pages<AtomicU8>,
    unsound: AtomicU64,
    beyond_repair: AtomicBool,
    checking: RangeLocks,
    checks: Semaphore,
}

impl<I: Io> Copy<I> {
    /// The copy in `data` on `disk`, of an image of so many chunks; `direct` is the same file, open
    /// past the page cache if its file system can do that. `identity` tells it from others that were or
    /// come in its place.
    pub fn new(
        disk: Arc<Disk>,
        identity: (u64, u64),
        data: I::File,
        direct: I::File,
        chunks: u64,
    ) -> Copy<I> {
        Copy {
            disk,
            identity,
            data,
            direct,
            chunks: Pages::new(chunks),
            unsound: AtomicU64::new(0),
            beyond_repair: AtomicBool::new(false),
            checking: RangeLocks::default(),
            checks: Semaphore::new(CHECKS),
        }
    }

    /// The disk that it is on.
    pub fn disk(&self) -> &Arc<Disk> {
        &self.disk
    }

    /// What tells it from others that were or come in its place.
    pub fn identity(&self) -> (u64, u64) {
        self.identity
    }

    /// Its content, through the page cache if images are cached.
    pub fn data(&self) -> &I::File {
        &self.data
    }

    /// Whether chunks of it were found unsound and can't be written anew.
    pub fn is_beyond_repair(&self) -> bool {
        self.beyond_repair.load(Ordering::Relaxed)
    }

    /// What was found when it was to be repaired.
    pub fn set_beyond_repair(&self, is: bool) {
        self.beyond_repair.store(is, Ordering::Relaxed);
    }

    /// Chunks that could not be read, or were not what they must be.
    pub fn unsound(&self) -> Vec<Chunk> {
        if self.unsound.load(Ordering::Relaxed) == 0 {
            return Vec::new();
        }
        let all = self.chunks.each();
        let unsound = all.filter(|(_, flags)| flags.load(Ordering::Relaxed) > VERIFIED);
        unsound.map(|(chunk, _)| chunk).collect()
    }

    /// Whether the chunk was found to be neither corrupt nor unreadable.
    pub(super) fn is_sound(&self, chunk: Chunk) -> bool {
        self.flags(chunk) <= VERIFIED
    }

    pub(super) fn is_corrupt(&self, chunk: Chunk) -> bool {
        self.flags(chunk) & CORRUPT != 0
    }

    /// Whether the chunk needn't be verified before it is believed.
    pub(super) fn is_trusted(&self, chunk: Chunk, verify: Verify) -> bool {
        match verify {
            Verify::Always => false,
            Verify::First => self.flags(chunk) == VERIFIED,
            Verify::Never => self.is_sound(chunk),
        }
    }

    /// Fills `buf` from `offset`, all of it within one chunk, verified as `image` wants it. After an
    /// error its content is arbitrary, and the chunk is not sound.
    pub(super) async fn read(&self, io: &I, image: &Image, offset: u64, buf: Buf) -> Result<()> {
        let chunk = Chunk::at(offset);
        if self.is_trusted(chunk, image.verify) {
            let read = self.read_plain(io, offset, buf.clone()).await;
            return read.inspect_err(|_| self.doubt(chunk, UNREADABLE, &buf));
        }
        // One verifies, the others find it verified. Where all must be, they needn't wait.
        let _alone = match image.verify {
            Verify::Always => None,
            _ => Some(self.checking.lock(chunk.0..chunk.0 + 1, LockMode::Exclusive).await),
        };
        if self.is_trusted(chunk, image.verify) {
            return self.read_plain(io, offset, buf).await;
        }
        let _room = self.checks.acquire().await;
        let start = chunk.offset();
        let len = image.len_of(chunk);
        if offset == start && buf.len() == len && !buf.is_lent() {
            return self.read_verified(io, image, chunk, &self.data, &buf).await;
        }
        let whole = io.alloc(len);
        self.read_verified(io, image, chunk, &self.data, &whole).await?;
        let skip = (offset - start) as usize;
        buf.copy_from_buf(&whole.slice(skip..skip + buf.len()));
        Ok(())
    }

    /// Fills `buf` from `offset`, as the disk has it.
    pub(super) async fn read_plain(&self, io: &I, offset: u64, buf: Buf) -> Result<()> {
        self.read_file(io, &self.data, offset, buf).await
    }

    /// Reads a chunk past the page cache, and finds out whether it is sound.
    pub async fn examine(&self, io: &I, image: &Image, chunk: Chunk) -> Result<()> {
        let buf = io.alloc(image.len_of(chunk));
        self.read_verified(io, image, chunk, &self.direct, &buf).await
    }

    /// Fills `buf` with a whole chunk, compares it with its sum and remembers what it was.
    async fn read_verified(
        &self,
        io: &I,
        image: &Image,
        chunk: Chunk,
        file: &I::File,
        buf: &Buf,
    ) -> Result<()> {
        if let Err(error) = self.read_file(io, file, chunk.offset(), buf.clone()).await {
            self.doubt(chunk, UNREADABLE, buf);
            return Err(error);
        }
        if !image.is(chunk, buf) {
            self.doubt(chunk, CORRUPT, buf);
            let what = format!("disk {}: chunk {} is not what it was", self.disk.name(), chunk.0);
            return Err(Error::new(Kind::Corrupt, what));
        }
        if let Some(flags) = self.chunks.make(chunk)
            && flags.swap(VERIFIED, Ordering::Relaxed) > VERIFIED
        {
            self.unsound.fetch_sub(1, Ordering::Relaxed);
        }
        Ok(())
    }

    async fn read_file(&self, io: &I, file: &I::File, offset: u64, buf: Buf) -> Result<()> {
        // It is never closed.
        let _room = self.disk.room.acquire().await;
        let (reading, started) = (self.disk.begin(), Instant::now());
        let read = read_any(io, file, buf.clone(), offset).await;
        // How long a disk takes is told by short reads: those of whole chunks would make a disk look slow
        // that is asked for nothing else. Memory that the kernel took back says nothing of the disk.
        let took = (buf.len() <= SHORT).then(|| started.elapsed());
        reading.end(took, read.is_ok() || buf.is_lost());
        read.context(|| {
            format!("disk {}: reading {} bytes at {offset}", self.disk.name(), buf.len())
        })
    }

    fn doubt(&self, chunk: Chunk, why: u8, buf: &Buf) {
        if buf.is_lost() {
            return;
        }
        if let Some(flags) = self.chunks.make(chunk)
            && flags.swap(why, Ordering::Relaxed) <= VERIFIED
        {
            self.unsound.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn flags(&self, chunk: Chunk) -> u8 {
        self.chunks.get(chunk).map_or(0, |flags| flags.load(Ordering::Relaxed))
    }
}

/// The CRC-32 of what a buffer holds.
pub(super) fn sum(buf: &Buf) -> u32 {
    let (mut hasher, mut piece) = (crc32fast::Hasher::new(), [0; PIECE]);
    for at in (0..buf.len()).step_by(PIECE) {
        let piece = &mut piece[..(buf.len() - at).min(PIECE)];
        buf.slice(at..buf.len()).copy_to(piece);
        hasher.update(piece);
    }
    hasher.finalize()
}
