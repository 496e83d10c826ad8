//! The cache: chunks of one image that were promoted to one disk.
//!
//! ```text
//! slot:   empty ──fill──► stored ──data synced──► stored + present   readers come and go
//!           ▲                ▲                          │
//!           └────punched─────┴──── no reader is left ◄──┘ withdrawn: evicted, or doubted
//! ```
//!
//! `data` holds chunks at identity offsets, `chunks` an entry for each ([`mod@entry`]). All of it may go
//! at any time: the image's copy has the same bytes.
//!
//! Invariants:
//! - A chunk is present only after its content had the sum that it must have, and `data` was synced:
//!   what is read later is what the disk holds, not what it may have failed to write.
//! - Space is given back only when the chunk is not present and its last reader has left.
//! - What is read is compared with the sums of its 4 KiB blocks, unless it went to memory that the
//!   processor can't see. On any doubt, an error of the disk among them, the chunk is withdrawn.
//! - One task fills and empties a cache; any number reads it. Readers take no lock.
//! - A cache that was given up never has a chunk present again. Its files are opened anew only when
//!   nobody holds it any more ([`View`](super::View)): two would punch under each other's readers.

pub mod entry;

#[cfg(test)]
mod tests;

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};

use crate::pages::Pages;
use crate::{
    catalog::Digest,
    error::{Context, Error, Kind, Result},
    image::{ChunkSum, sha256},
    io::{Buf, Io, read_any},
    units::{self, BLOCK, BLOCKS_PER_CHUNK, CHUNK, Chunk},
};

/// Readers may enter.
const PRESENT: u32 = 1 << 31;
/// The file holds bytes for the chunk, or may.
const STORED: u32 = 1 << 30;
/// The rest of a slot's state counts readers.
const READERS: u32 = STORED - 1;

/// Failed reads after which the whole cache is given up, if no others come between.
const FAILURES: u32 = 16;
/// Good reads that make up for a failed one.
const AMENDS: u32 = 16;
/// Bytes of the table that are read at once.
const TABLE_READ: usize = 64 << 10;

/// One image's chunks on one disk.
pub struct Cache<I: Io> {
    what: String,
    data: I::File,
    chunks: I::File,
    digest: Digest,
    size: u64,
    slots: Pages<Slot>,
    stored: AtomicU64,
    present: AtomicU64,
    doubts: AtomicU64,
    /// Each failed read adds [`AMENDS`], each good one takes one away.
    failures: AtomicU32,
    closed: AtomicBool,
}

struct Slot {
    state: AtomicU32,
    /// The CRC-32 of each 4 KiB block. They follow from the content, which never changes: a reader
    /// finds those of the chunk whenever it finds it present.
    sums: [AtomicU32; BLOCKS_PER_CHUNK as usize],
}

impl Default for Slot {
    fn default() -> Slot {
        let sums = [const { AtomicU32::new(0) }; BLOCKS_PER_CHUNK as usize];
        Slot { state: AtomicU32::new(0), sums }
    }
}

/// The right to read a chunk: while it is held, the chunk's space stays as it is.
pub struct Lease<'a> {
    slot: &'a Slot,
    chunk: Chunk,
}

impl Drop for Lease<'_> {
    fn drop(&mut self) {
        self.slot.state.fetch_sub(1, Ordering::Release);
    }
}

impl<I: Io> Cache<I> {
    /// The cache in `data` and `chunks` of the image `digest` of `size` bytes; `what` names it in
    /// errors. Nothing is present before [`Cache::fill`] or [`Cache::admit`] makes it so.
    pub fn new(
        what: impl Into<String>,
        data: I::File,
        chunks: I::File,
        digest: Digest,
        size: u64,
    ) -> Cache<I> {
        Cache {
            what: what.into(),
            data,
            chunks,
            digest,
            size,
            slots: Pages::new(units::chunks(size)),
            stored: AtomicU64::new(0),
            present: AtomicU64::new(0),
            doubts: AtomicU64::new(0),
            failures: AtomicU32::new(0),
            closed: AtomicBool::new(false),
        }
    }

    /// The right to read `chunk`, if it is here.
    pub fn lease(&self, chunk: Chunk) -> Option<Lease<'_>> {
        let slot = self.slots.get(chunk)?;
        if slot.state.load(Ordering::Relaxed) & PRESENT == 0 {
            return None;
        }
        let before = slot.state.fetch_add(1, Ordering::Acquire);
        let lease = Lease { slot, chunk };
        (before & PRESENT != 0 && !self.is_closed()).then_some(lease)
    }

    /// Fills `buf` from `offset`; all of it lies in the leased chunk. After an error the buffer's
    /// content is arbitrary and the chunk is withdrawn: read the copy.
    pub async fn read(&self, io: &I, lease: Lease<'_>, offset: u64, buf: Buf) -> Result<()> {
        let end = offset.saturating_add(buf.len() as u64);
        let chunk = lease.chunk.offset()..lease.chunk.offset() + self.len_of(lease.chunk) as u64;
        if offset < chunk.start || end > chunk.end {
            let what = format!("{}: {} bytes at {offset} of {chunk:?}", self.what, buf.len());
            return Err(Error::new(Kind::Invalid, what));
        }
        match self.read_checked(io, &lease, offset, &buf).await {
            Ok(()) => {
                self.amend();
                Ok(())
            }
            Err(error) => {
                self.doubt(lease.chunk, &error, &buf);
                Err(error)
            }
        }
    }

    /// A read was good.
    fn amend(&self) {
        if self.failures.load(Ordering::Relaxed) != 0 {
            let less = |failures: u32| failures.checked_sub(1);
            let _ = self.failures.fetch_update(Ordering::Relaxed, Ordering::Relaxed, less);
        }
    }

    fn doubt(&self, chunk: Chunk, error: &Error, buf: &Buf) {
        self.withdraw(chunk);
        self.doubts.fetch_add(1, Ordering::Relaxed);
        tracing::warn!(%error, "a cached chunk is dropped; the image's copy is read instead");
        // Lent memory that was withdrawn says nothing of the disk.
        if error.kind() != Kind::Corrupt
            && !buf.is_lost()
            && self.failures.fetch_add(AMENDS, Ordering::Relaxed) + AMENDS >= FAILURES * AMENDS
        {
            self.close();
        }
    }

    async fn read_checked(&self, io: &I, lease: &Lease<'_>, offset: u64, buf: &Buf) -> Result<()> {
        let end = offset + buf.len() as u64;
        let reading = || format!("{}: reading {} bytes at {offset}", self.what, buf.len());
        let start = units::round_down(offset, BLOCK);
        // Where the blocks end that the range touches; the last one of an image may be short.
        let stop = (units::blocks(end) * BLOCK).min(self.size);
        if buf.is_lent() {
            return read_any(io, &self.data, buf.clone(), offset).await.context(reading);
        }
        if (start, stop) == (offset, end) {
            read_any(io, &self.data, buf.clone(), offset).await.context(reading)?;
            return self.check(lease, start, buf);
        }
        let whole = io.alloc((stop - start) as usize);
        read_any(io, &self.data, whole.clone(), start).await.context(reading)?;
        self.check(lease, start, &whole)?;
        let skip = (offset - start) as usize;
        buf.copy_from_buf(&whole.slice(skip..skip + buf.len()));
        Ok(())
    }

    /// Compares whole blocks, the first at `offset`, with their sums.
    fn check(&self, lease: &Lease<'_>, offset: u64, bytes: &Buf) -> Result<()> {
        let first = (offset / BLOCK % BLOCKS_PER_CHUNK) as usize;
        let mut wrong = None;
        each_block(bytes, |at, block| {
            if lease.slot.sums[first + at].load(Ordering::Relaxed) != crc32fast::hash(block) {
                wrong = Some(offset / BLOCK + at as u64);
            }
        });
        let Some(block) = wrong else { return Ok(()) };
        let what = format!("{}: block {block} is not what was stored", self.what);
        Err(Error::new(Kind::Corrupt, what))
    }

    /// Stores chunks whose content is known to be the image's, and makes them present: all, or after
    /// an error none. Those that are here already are left alone.
    pub async fn fill(&self, io: &I, chunks: &[(Chunk, Buf)]) -> Result<()> {
        let taken: Vec<_> = chunks.iter().filter(|(chunk, _)| self.take(*chunk)).collect();
        if taken.is_empty() {
            return Ok(());
        }
        let filled = self.store(io, &taken).await;
        for (chunk, content) in &taken {
            if filled.is_err() || !self.let_in(*chunk, content) {
                self.reclaim(io, *chunk).await;
            }
        }
        filled
    }

    /// Marks an empty slot as stored. False if it isn't empty, or past the end.
    fn take(&self, chunk: Chunk) -> bool {
        let Some(slot) = self.slots.make(chunk) else { return false };
        let taken = slot.state.fetch_or(STORED, Ordering::Acquire) & STORED == 0;
        self.stored.fetch_add(u64::from(taken), Ordering::Relaxed);
        taken
    }

    async fn store(&self, io: &I, chunks: &[&(Chunk, Buf)]) -> Result<()> {
        let storing = || format!("{}: storing promoted chunks", self.what);
        let writes = chunks.iter().map(|(chunk, content)| {
            let align = io.align(&self.data) as usize;
            // The image's last chunk may end within a block of the device.
            let whole = match content.len().next_multiple_of(align) {
                len if len == content.len() => content.clone(),
                len => {
                    let whole = io.alloc(len);
                    whole.fill(0);
                    whole.copy_from_buf(content);
                    whole
                }
            };
            io.write(&self.data, whole, chunk.offset())
        });
        let written = futures_util::future::join_all(writes).await;
        written.into_iter().collect::<std::io::Result<()>>().context(storing)?;
        io.sync(&self.data).await.context(storing)?;
        for (chunk, content) in chunks {
            let entry = entry::entry(&self.digest, *chunk, sum(content));
            let entry = Buf::from_bytes(&entry);
            io.write(&self.chunks, entry, entry::position(*chunk)).await.context(storing)?;
        }
        Ok(())
    }

    /// No new reader enters; its space is given back by [`Cache::sweep`].
    pub fn withdraw(&self, chunk: Chunk) {
        if let Some(slot) = self.slots.get(chunk)
            && slot.state.fetch_and(!PRESENT, Ordering::SeqCst) & PRESENT != 0
        {
            self.present.fetch_sub(1, Ordering::Relaxed);
        }
    }

    /// Lets readers in, unless the cache was given up meanwhile. Whether they are.
    pub(super) fn let_in(&self, chunk: Chunk, content: &Buf) -> bool {
        let Some(slot) = self.slots.get(chunk) else { return false };
        each_block(content, |index, block| {
            slot.sums[index].store(crc32fast::hash(block), Ordering::Relaxed);
        });
        if slot.state.fetch_or(PRESENT, Ordering::SeqCst) & PRESENT == 0 {
            self.present.fetch_add(1, Ordering::Relaxed);
        }
        // Whoever closes it withdraws what is present: if not this chunk, it is seen here.
        if self.is_closed() {
            self.withdraw(chunk);
            return false;
        }
        true
    }

    /// Gives up all chunks, from now on for good; their space stays taken.
    pub fn close(&self) {
        if !self.closed.swap(true, Ordering::SeqCst) {
            tracing::info!(cache = self.what, "given up, for now");
        }
        self.slots.each().for_each(|(chunk, _)| self.withdraw(chunk));
    }

    /// Gives back the space of what was withdrawn, where the last reader has left. The chunks that are
    /// gone now, and how many still wait.
    pub async fn sweep(&self, io: &I) -> (Vec<Chunk>, usize) {
        let withdrawn = |slot: &Slot| slot.state.load(Ordering::Acquire) & !READERS == STORED;
        let waiting = self.slots.each().filter(|(_, slot)| withdrawn(slot));
        let waiting: Vec<Chunk> = waiting.map(|(chunk, _)| chunk).collect();
        let (mut gone, mut left) = (Vec::new(), 0);
        for chunk in waiting {
            match self.reclaim(io, chunk).await {
                true => gone.push(chunk),
                false => left += 1,
            }
        }
        (gone, left)
    }

    /// Empties a slot that is stored and not present. False while somebody reads it, or if it can't be.
    async fn reclaim(&self, io: &I, chunk: Chunk) -> bool {
        let Some(slot) = self.slots.get(chunk) else { return false };
        if slot.state.load(Ordering::Acquire) != STORED {
            return false;
        }
        // Nobody enters any more. The entry goes first, though a crash may bring it back: it would
        // not be believed.
        let nothing = Buf::from_bytes(&[0; entry::ENTRY]);
        let len = units::blocks(self.len_of(chunk) as u64) * BLOCK;
        let range = chunk.offset()..chunk.offset() + len;
        let cleared = io.write(&self.chunks, nothing, entry::position(chunk)).await;
        let punched = io.punch(&self.data, range).await;
        if let Err(error) = cleared.and(punched) {
            tracing::debug!(cache = self.what, %error, "a chunk's space can't be given back");
            return false;
        }
        slot.state.fetch_and(!STORED, Ordering::Release);
        self.stored.fetch_sub(1, Ordering::Relaxed);
        true
    }

    /// The chunks that an earlier process says it left here, with their CRC-32s: claims, which
    /// [`Cache::admit`] looks into.
    pub async fn claims(&self, io: &I) -> Result<Vec<(Chunk, u32)>> {
        let reading = || format!("{}: reading its table", self.what);
        // What an earlier process wrote is on the disk now, or is read as it is there.
        io.sync(&self.data).await.context(reading)?;
        let header = io.alloc(entry::HEADER);
        io.read(&self.chunks, header.clone(), 0).await.context(reading)?;
        if header.to_vec() != entry::header(&self.digest, self.size) {
            let what = format!("{}: its table is not that of this image", self.what);
            return Err(Error::new(Kind::Corrupt, what));
        }
        let mut claims = Vec::new();
        let mut first = 0;
        while first < units::chunks(self.size) {
            let count = (units::chunks(self.size) - first).min((TABLE_READ / entry::ENTRY) as u64);
            let table = io.alloc(count as usize * entry::ENTRY);
            let at = entry::position(Chunk(first));
            io.read(&self.chunks, table.clone(), at).await.context(reading)?;
            for (bytes, number) in table.to_vec().chunks(entry::ENTRY).zip(first..) {
                if let Some(crc) = entry::read(&self.digest, Chunk(number), bytes) {
                    claims.push((Chunk(number), crc));
                }
            }
            first += count;
        }
        Ok(claims)
    }

    /// Gives back the space of all but these chunks, which are in order. What an earlier process stored
    /// may be there though its entry is not; nothing is stored yet by this one.
    pub async fn clean(&self, io: &I, claimed: &[Chunk]) -> Result<()> {
        let end = units::blocks(self.size) * BLOCK;
        let mut from = 0;
        for to in claimed.iter().map(|chunk| chunk.offset()).chain([end]) {
            if from < to {
                let punching = || format!("{}: giving back what nobody claims", self.what);
                io.punch(&self.data, from..to).await.context(punching)?;
            }
            from = to + CHUNK;
        }
        Ok(())
    }

    /// Reads a chunk that an earlier process left, and makes it present if its content is what the
    /// image has there; otherwise drops it. Whether it is present.
    pub async fn admit(&self, io: &I, chunk: Chunk, image: &ChunkSum) -> bool {
        if self.is_closed() || !self.take(chunk) {
            return false;
        }
        let content = io.alloc(self.len_of(chunk));
        let read = read_any(io, &self.data, content.clone(), chunk.offset()).await;
        // The sum of 32 bits finds damage; somebody else's disk may hold what was made to fit it.
        if read.is_ok()
            && sum(&content) == image.crc
            && sha256(&content.to_vec()) == image.sha256
            && self.let_in(chunk, &content)
        {
            return true;
        }
        self.reclaim(io, chunk).await;
        false
    }

    /// The length of `chunk` in bytes: [`CHUNK`] but for the image's last.
    pub fn len_of(&self, chunk: Chunk) -> usize {
        self.size.saturating_sub(chunk.offset()).min(CHUNK) as usize
    }

    /// Whether a read of the chunk would find it here at this moment.
    pub fn is_present(&self, chunk: Chunk) -> bool {
        let slot = self.slots.get(chunk);
        slot.is_some_and(|slot| slot.state.load(Ordering::Relaxed) & PRESENT != 0)
            && !self.is_closed()
    }

    /// The chunks that are present, in order.
    pub fn present(&self) -> Vec<Chunk> {
        let present = |slot: &Slot| slot.state.load(Ordering::Relaxed) & PRESENT != 0;
        self.slots.each().filter(|(_, slot)| present(slot)).map(|(chunk, _)| chunk).collect()
    }

    /// Whether the chunk's space is taken.
    pub fn is_stored(&self, chunk: Chunk) -> bool {
        self.slots.get(chunk).is_some_and(|slot| slot.state.load(Ordering::Relaxed) & STORED != 0)
    }

    /// Chunks whose space is taken.
    pub fn stored(&self) -> u64 {
        self.stored.load(Ordering::Relaxed)
    }

    /// Chunks whose space is taken though nobody may read them: [`Cache::sweep`] gives it back when their
    /// last readers have left. Those that are being stored count as well.
    pub fn withdrawn(&self) -> u64 {
        self.stored().saturating_sub(self.present.load(Ordering::Relaxed))
    }

    /// Chunks that were found to be wrong, or could not be read.
    pub fn doubts(&self) -> u64 {
        self.doubts.load(Ordering::Relaxed)
    }

    /// Whether it was given up.
    pub fn is_closed(&self) -> bool {
        self.closed.load(Ordering::SeqCst)
    }
}

/// The CRC-32 of a buffer's bytes.
pub fn sum(bytes: &Buf) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    each_block(bytes, |_, block| hasher.update(block));
    hasher.finalize()
}

/// Shows each 4 KiB of a buffer, the last perhaps shorter.
fn each_block(bytes: &Buf, mut show: impl FnMut(usize, &[u8])) {
    let mut block = [0; BLOCK as usize];
    for (index, at) in (0..bytes.len()).step_by(block.len()).enumerate() {
        let block = &mut block[..(bytes.len() - at).min(BLOCK as usize)];
        bytes.slice(at..bytes.len()).copy_to(block);
        show(index, block);
    }
}
