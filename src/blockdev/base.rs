//! A base device: an image's copy, exported read-only.
//!
//! The content never changes, so what is known of it is too: a mask of its zero blocks, made when
//! the image was imported, answers reads of zeros and allocation queries without I/O.

use std::ops::Range;

use crate::{
    blockdev::device::{Device, Extent, Info, Provision, merge},
    cow::Base,
    error::{Context, Error, Kind, Result},
    io::{Buf, Io, read_any},
    units::{self, BLOCKS_PER_CHUNK, Block, Chunk, round_down},
};

/// A copy of an image, open for reading. Shared by every thread and every replica on it.
pub struct BaseImage<I: Io> {
    name: String,
    disk: String,
    data: I::File,
    size: u64,
    rotational: bool,
    chunks: Contents,
}

/// What is known of a chunk's content.
#[derive(Clone, Copy, Debug)]
pub struct Content {
    /// A bit for each block that holds nothing but zeros.
    pub zeros: u64,
    /// Its CRC-32.
    pub crc: u32,
}

/// Chunks whose contents share a page.
const PER_PAGE: u64 = 128;

/// What is known of all chunks. A page of zeros is nothing at all: a sparse terabyte costs 512 KiB.
struct Contents(Box<[Option<Box<[Content]>>]>);

impl Contents {
    /// Of all chunks in order, and how many there are.
    fn of(chunks: impl IntoIterator<Item = Content>) -> (Contents, u64) {
        let (mut pages, mut page, mut count) = (Vec::new(), Vec::new(), 0);
        let mut close = |page: &mut Vec<Content>| {
            let zero = page.iter().all(|content| content.zeros == u64::MAX);
            pages.push((!zero).then(|| page.as_slice().into()));
            page.clear();
        };
        for content in chunks {
            page.push(content);
            count += 1;
            if page.len() as u64 == PER_PAGE {
                close(&mut page);
            }
        }
        if !page.is_empty() {
            close(&mut page);
        }
        (Contents(pages.into()), count)
    }

    /// What is known of a chunk; `None` if it is zeros, or past the end.
    fn get(&self, chunk: u64) -> Option<&Content> {
        let page = self.0.get((chunk / PER_PAGE) as usize)?.as_ref()?;
        page.get((chunk % PER_PAGE) as usize).filter(|content| content.zeros != u64::MAX)
    }
}

impl<I: Io> BaseImage<I> {
    /// The copy on `disk` of image `name` in `data`: `size` bytes, a multiple of 512, and what is
    /// known of each chunk.
    ///
    /// # Errors
    /// `Corrupt` if there is not one of `chunks` for each chunk of the size.
    pub fn new(
        name: impl Into<String>,
        disk: impl Into<String>,
        data: I::File,
        size: u64,
        chunks: impl IntoIterator<Item = Content>,
    ) -> Result<BaseImage<I>> {
        let name = name.into();
        let (chunks, count) = Contents::of(chunks);
        if units::chunks(size) != count {
            let what = format!("image {name}: {count} chunks in {size} bytes");
            return Err(Error::new(Kind::Corrupt, what));
        }
        Ok(BaseImage { name, disk: disk.into(), data, size, rotational: false, chunks })
    }

    /// Tells clients that the disk below turns.
    #[must_use]
    pub fn on_rotating_disk(mut self) -> BaseImage<I> {
        self.rotational = true;
        self
    }

    /// The disk that the copy is on.
    pub fn disk(&self) -> &str {
        &self.disk
    }

    /// Whether a chunk is known to be all zeros; so is all that lies past the end.
    pub fn is_zero_chunk(&self, chunk: Chunk) -> bool {
        self.chunks.get(chunk.0).is_none()
    }

    /// The CRC-32 that a chunk's content must have; `None` if it is zeros, or past the end.
    pub fn crc(&self, chunk: Chunk) -> Option<u32> {
        Some(self.chunks.get(chunk.0)?.crc)
    }

    /// Whether every block that the range touches is known to be zeros.
    fn all_zero(&self, offset: u64, len: u64) -> bool {
        let blocks = Block::at(offset).0..units::blocks(offset + len);
        self.zero_run(blocks.clone()) == (true, blocks.end)
    }
}

impl<I: Io> Base<I> for BaseImage<I> {
    fn size(&self) -> u64 {
        self.size
    }

    fn is_zero(&self, block: Block) -> bool {
        let chunk = self.chunks.get(block.0 / BLOCKS_PER_CHUNK);
        chunk.is_none_or(|chunk| chunk.zeros >> (block.0 % BLOCKS_PER_CHUNK) & 1 == 1)
    }

    fn zero_run(&self, blocks: Range<u64>) -> (bool, u64) {
        let zero = self.is_zero(Block(blocks.start));
        let same = if zero { u64::MAX } else { 0 };
        let mut block = blocks.start;
        while block < blocks.end && self.is_zero(Block(block)) == zero {
            // A chunk that is all of a kind is one step.
            let chunk = self.chunks.get(block / BLOCKS_PER_CHUNK);
            let zeros = chunk.map_or(u64::MAX, |chunk| chunk.zeros);
            let unit = if zeros == same { BLOCKS_PER_CHUNK } else { 1 };
            block = round_down(block, unit) + unit;
        }
        (zero, block.min(blocks.end))
    }

    async fn read(&self, io: &I, offset: u64, buf: Buf) -> Result<()> {
        let len = buf.len();
        read_any(io, &self.data, buf, offset).await.context(|| {
            format!("image {} on disk {}: reading {len} bytes at {offset}", self.name, self.disk)
        })
    }
}

impl<I: Io> Device<I> for BaseImage<I> {
    fn info(&self) -> Info {
        Info { size: self.size, read_only: true, rotational: self.rotational }
    }

    async fn read(&self, io: &I, offset: u64, buf: Buf) -> Result<()> {
        if self.all_zero(offset, buf.len() as u64) {
            buf.fill(0);
            return Ok(());
        }
        Base::read(self, io, offset, buf).await
    }

    async fn write(&self, _: &I, _: u64, _: Buf) -> Result<()> {
        Err(self.read_only())
    }

    async fn flush(&self, _: &I) -> Result<()> {
        Ok(())
    }

    async fn discard(&self, _: &I, _: u64, _: u64) -> Result<()> {
        Err(self.read_only())
    }

    async fn write_zeroes(&self, _: &I, _: u64, _: u64, _: Provision) -> Result<()> {
        Err(self.read_only())
    }

    async fn prefetch(&self, io: &I, offset: u64, len: u64) -> Result<()> {
        io.prefetch(&self.data, offset..offset + len)
            .await
            .context(|| format!("image {}: prefetching", self.name))
    }

    fn extents(&self, offset: u64, len: u64, limit: usize, extents: &mut Vec<Extent>) {
        let end = offset + len;
        let mut at = offset;
        while at < end {
            let (zero, blocks) = self.zero_run(Block::at(at).0..units::blocks(end));
            let next = Block(blocks).offset().min(end);
            if !merge(extents, limit, Extent { len: next - at, hole: zero, zero }) {
                return;
            }
            at = next;
        }
    }
}

impl<I: Io> BaseImage<I> {
    fn read_only(&self) -> Error {
        let what = format!("image {} is read-only: write to a replica of it", self.name);
        Error::new(Kind::ReadOnly, what)
    }
}
