//! A base device: an image, exported read-only.
//!
//! The content never changes, so what is known of it is too: a mask of its zero blocks, made when
//! the image was imported, answers reads of zeros and allocation queries without I/O. Where the rest
//! is read from is for [`Sources`] to say.

use std::ops::Range;

use crate::{
    blockdev::device::{Device, Extent, Grain, Holder, Info, Provision, merge},
    cow::Base,
    error::{Context, Error, Kind, Result},
    io::{Buf, Io},
    source::Sources,
    units::{self, Block, Chunk},
};

/// An image, open for reading. Shared by every thread and every replica on it.
pub struct BaseImage<I: Io> {
    sources: Sources<I>,
    rotational: bool,
}

impl<I: Io> BaseImage<I> {
    /// The image that is read from `sources`.
    pub fn new(sources: Sources<I>) -> BaseImage<I> {
        BaseImage { sources, rotational: false }
    }

    /// Tells clients that the disk below turns.
    #[must_use]
    pub fn on_rotating_disk(mut self) -> BaseImage<I> {
        self.rotational = true;
        self
    }

    /// Where it is read from.
    pub fn sources(&self) -> &Sources<I> {
        &self.sources
    }

    /// The disk of the copy that is asked first; `None` if there is no copy.
    pub fn disk(&self) -> Option<String> {
        Some(self.sources.copies().first()?.disk().name().to_owned())
    }

    /// Whether a chunk is known to be all zeros; so is all that lies past the end.
    pub fn is_zero_chunk(&self, chunk: Chunk) -> bool {
        self.crc(chunk).is_none()
    }

    /// The CRC-32 that a chunk's content must have; `None` if it is zeros, or past the end.
    pub fn crc(&self, chunk: Chunk) -> Option<u32> {
        self.sources.image().crc(chunk)
    }

    /// Whether every block that the range touches is known to be zeros.
    fn all_zero(&self, offset: u64, len: u64) -> bool {
        let blocks = Block::at(offset).0..units::blocks(offset + len);
        self.zero_run(blocks.clone()) == (true, blocks.end)
    }
}

impl<I: Io> Base<I> for BaseImage<I> {
    fn size(&self) -> u64 {
        self.sources.image().size
    }

    fn is_zero(&self, block: Block) -> bool {
        self.sources.image().is_zero(block)
    }

    fn zero_run(&self, blocks: Range<u64>) -> (bool, u64) {
        self.sources.image().zero_run(blocks)
    }

    async fn read(&self, io: &I, offset: u64, buf: Buf) -> Result<()> {
        self.sources.read(io, offset, buf).await
    }
}

impl<I: Io> Device<I> for BaseImage<I> {
    fn info(&self) -> Info {
        Info { size: Base::size(self), read_only: true, rotational: self.rotational }
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
        let copies = self.sources.copies();
        let Some(copy) = copies.iter().find(|copy| copy.disk().trouble().is_none()) else {
            return Ok(());
        };
        io.prefetch(copy.data(), offset..offset + len)
            .await
            .context(|| format!("image {}: prefetching", self.sources.image().name))
    }

    fn extents(
        &self,
        offset: u64,
        len: u64,
        grain: Grain,
        limit: usize,
        extents: &mut Vec<Extent>,
    ) {
        let end = offset + len;
        let mut at = offset;
        while at < end {
            let (zero, blocks) = self.zero_run(Block::at(at).0..units::blocks(end));
            let next = Block(blocks).offset().min(end);
            let holder = if zero { Holder::Nobody } else { Holder::Base };
            if !merge(extents, grain, limit, Extent { len: next - at, holder }) {
                return;
            }
            at = next;
        }
    }
}

impl<I: Io> BaseImage<I> {
    fn read_only(&self) -> Error {
        let what =
            format!("image {} is read-only: write to a replica of it", self.sources.image().name);
        Error::new(Kind::ReadOnly, what)
    }
}
