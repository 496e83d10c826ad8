//! A replica device: an overlay on its own disk over the image that it stands on.

use std::{ops::Range, sync::Arc, time::Duration};

use crate::{
    blockdev::{
        base::BaseImage,
        device::{Device, Extent, Info, Provision, merge},
    },
    cow::{Base, Overlay, Source},
    error::Result,
    io::{Buf, Io},
    promote::View,
    units::Block,
};

/// A replica, open for reading and writing. Shared by every thread that serves it.
pub struct Replica<I: Io> {
    overlay: Overlay<I>,
    base: Seen<I>,
    rotational: bool,
}

/// The image's copy, as it is seen from the overlay's disk.
struct Seen<I: Io> {
    copy: Arc<BaseImage<I>>,
    view: Arc<View<I>>,
}

impl<I: Io> Base<I> for Seen<I> {
    fn size(&self) -> u64 {
        Base::size(&*self.copy)
    }

    fn is_zero(&self, block: Block) -> bool {
        self.copy.is_zero(block)
    }

    fn zero_run(&self, blocks: Range<u64>) -> (bool, u64) {
        self.copy.zero_run(blocks)
    }

    async fn read(&self, io: &I, offset: u64, buf: Buf) -> Result<()> {
        self.view.read(io, &*self.copy, offset, buf).await
    }

    fn overlay_was_read(&self, took: Duration) {
        self.view.demand.overlay.record(took);
    }
}

impl<I: Io> Replica<I> {
    /// The replica of `overlay` over `copy`, as `view` shows it; `rotational` if the overlay's disk
    /// turns.
    pub fn new(
        overlay: Overlay<I>,
        copy: Arc<BaseImage<I>>,
        view: Arc<View<I>>,
        rotational: bool,
    ) -> Replica<I> {
        Replica { overlay, base: Seen { copy, view }, rotational }
    }

    /// The overlay, for growing, closing and figures.
    pub fn overlay(&self) -> &Overlay<I> {
        &self.overlay
    }
}

impl<I: Io> Device<I> for Replica<I> {
    fn info(&self) -> Info {
        Info { size: self.overlay.size(), read_only: false, rotational: self.rotational }
    }

    async fn read(&self, io: &I, offset: u64, buf: Buf) -> Result<()> {
        self.overlay.read(io, &self.base, offset, buf).await
    }

    async fn write(&self, io: &I, offset: u64, buf: Buf) -> Result<()> {
        self.overlay.write(io, &self.base, offset, buf).await
    }

    async fn flush(&self, io: &I) -> Result<()> {
        self.overlay.flush(io).await
    }

    async fn discard(&self, io: &I, offset: u64, len: u64) -> Result<()> {
        self.overlay.discard(io, offset, len).await
    }

    async fn write_zeroes(
        &self,
        io: &I,
        offset: u64,
        len: u64,
        provision: Provision,
    ) -> Result<()> {
        self.overlay.write_zeroes(io, &self.base, offset, len, provision).await
    }

    async fn prefetch(&self, io: &I, offset: u64, len: u64) -> Result<()> {
        // Overlays are read past the page cache; what they take from the base is worth fetching.
        let end = (offset + len).min(self.base.size());
        if offset < end {
            Device::prefetch(&*self.base.copy, io, offset, end - offset).await?;
        }
        Ok(())
    }

    fn extents(&self, offset: u64, len: u64, limit: usize, extents: &mut Vec<Extent>) {
        let Ok(segments) = self.overlay.extents(&self.base, offset, len) else {
            unreachable!("front ends check ranges against the size, and devices never shrink");
        };
        for segment in segments {
            // What the base holds is allocated as far as a client can care: it is no zero.
            let zero = segment.source == Source::Zero;
            if !merge(extents, limit, Extent { len: segment.len, hole: zero, zero }) {
                return;
            }
        }
    }
}
