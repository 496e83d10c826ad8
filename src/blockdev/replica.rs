//! A replica device: an overlay on its own disk over the image that it stands on.
//!
//! What it stands on may change while it is in use: the overlay moves to another disk, or needs its
//! image no longer. So each request goes through a gate, behind which that is; the device stays the
//! same for whoever serves it.

use std::{ops::Range, sync::Arc, time::Duration};

use crate::{
    blockdev::{
        base::BaseImage,
        device::{Device, Extent, Grain, Holder, Info, Provision, merge},
    },
    cow::{Base, Closed, Gate, Inside, Overlay, Segment, Source},
    error::Result,
    io::{Buf, Io},
    promote::{Cache, View},
    units::{Block, Chunk},
};

/// Runs that a question for extents looks at: what it asks after is told from where the answer ends.
const STEPS: u32 = 65_536;

/// A replica, open for reading and writing. Shared by every thread that serves it.
pub struct Replica<I: Io> {
    gate: Gate<Footing<I>>,
}

/// What a replica stands on.
pub struct Footing<I: Io> {
    /// Its own writes.
    pub overlay: Arc<Overlay<I>>,
    /// Where the rest is.
    pub base: Below<I>,
    /// The overlay's disk turns.
    pub rotational: bool,
}

/// What is below a replica's overlay: nothing, or the image's copy as it is seen from the overlay's disk.
pub struct Below<I: Io>(Option<Seen<I>>);

/// An image's copy, and the view of it.
struct Seen<I: Io> {
    copy: Arc<BaseImage<I>>,
    view: Arc<View<I>>,
}

impl<I: Io> Below<I> {
    /// Nothing: what the overlay does not hold is zeros.
    pub const NOTHING: Below<I> = Below(None);

    /// An image's copy, as `view` shows it.
    pub fn image(copy: Arc<BaseImage<I>>, view: Arc<View<I>>) -> Below<I> {
        Below(Some(Seen { copy, view }))
    }

    /// The image's copy.
    pub fn copy(&self) -> Option<&Arc<BaseImage<I>>> {
        self.0.as_ref().map(|seen| &seen.copy)
    }

    /// The chunks that are promoted to the replica's disk, if any are.
    fn cache(&self) -> Option<Arc<Cache<I>>> {
        self.0.as_ref().and_then(|seen| seen.view.cache())
    }
}

/// What of a segment of the image's data is in `cache`, a run a chunk.
fn runs<I: Io>(cache: Option<&Cache<I>>, segment: Segment) -> impl Iterator<Item = Extent> {
    let end = segment.offset.saturating_add(segment.len);
    let mut at = segment.offset;
    std::iter::from_fn(move || {
        let (start, chunk) = (at, Chunk::at(at));
        let cached = cache.is_some_and(|cache| cache.is_present(chunk));
        let holder = if cached { Holder::Cache } else { Holder::Base };
        at = Chunk(chunk.0 + 1).offset().min(end);
        (start < end).then(|| Extent { len: at - start, holder })
    })
}

impl<I: Io> Clone for Below<I> {
    fn clone(&self) -> Below<I> {
        let again = |seen: &Seen<I>| Seen { copy: seen.copy.clone(), view: seen.view.clone() };
        Below(self.0.as_ref().map(again))
    }
}

impl<I: Io> Clone for Footing<I> {
    fn clone(&self) -> Footing<I> {
        let Footing { overlay, base, rotational } = self;
        Footing { overlay: overlay.clone(), base: base.clone(), rotational: *rotational }
    }
}

impl<I: Io> Base<I> for Below<I> {
    fn size(&self) -> u64 {
        self.0.as_ref().map_or(0, |seen| Base::size(&*seen.copy))
    }

    fn is_zero(&self, block: Block) -> bool {
        self.0.as_ref().is_none_or(|seen| seen.copy.is_zero(block))
    }

    fn zero_run(&self, blocks: Range<u64>) -> (bool, u64) {
        match &self.0 {
            Some(seen) => seen.copy.zero_run(blocks),
            None => (true, blocks.end),
        }
    }

    async fn read(&self, io: &I, offset: u64, buf: Buf) -> Result<()> {
        match &self.0 {
            Some(seen) => seen.view.read(io, &*seen.copy, offset, buf).await,
            None => {
                buf.fill(0);
                Ok(())
            }
        }
    }

    fn overlay_was_read(&self, took: Duration) {
        if let Some(seen) = &self.0 {
            seen.view.demand.overlay.record(took);
        }
    }
}

impl<I: Io> Replica<I> {
    /// The replica that stands on `footing`.
    pub fn new(footing: Footing<I>) -> Replica<I> {
        Replica { gate: Gate::new(footing) }
    }

    /// The overlay of this moment, to look at.
    pub fn overlay(&self) -> Arc<Overlay<I>> {
        self.gate.look(|footing| footing.overlay.clone())
    }

    /// What it stands on at this moment, to look at.
    pub fn footing(&self) -> Footing<I> {
        self.gate.get()
    }

    /// What it stands on, for as long as what is returned is there: as a request does.
    pub async fn enter(&self) -> Inside<'_, Footing<I>> {
        self.gate.enter().await
    }

    /// Waits for all requests under way, and lets none in until what is returned is gone.
    pub async fn close(&self) -> Closed<'_, Footing<I>> {
        self.gate.close().await
    }
}

impl<I: Io> Device<I> for Replica<I> {
    fn info(&self) -> Info {
        self.gate.look(|footing| Info {
            size: footing.overlay.size(),
            read_only: false,
            rotational: footing.rotational,
        })
    }

    async fn read(&self, io: &I, offset: u64, buf: Buf) -> Result<()> {
        let Footing { overlay, base, .. } = &*self.gate.enter().await;
        overlay.read(io, base, offset, buf).await
    }

    async fn write(&self, io: &I, offset: u64, buf: Buf) -> Result<()> {
        let Footing { overlay, base, .. } = &*self.gate.enter().await;
        overlay.write(io, base, offset, buf).await
    }

    async fn flush(&self, io: &I) -> Result<()> {
        self.gate.enter().await.overlay.flush(io).await
    }

    async fn discard(&self, io: &I, offset: u64, len: u64) -> Result<()> {
        self.gate.enter().await.overlay.discard(io, offset, len).await
    }

    async fn write_zeroes(
        &self,
        io: &I,
        offset: u64,
        len: u64,
        provision: Provision,
    ) -> Result<()> {
        let Footing { overlay, base, .. } = &*self.gate.enter().await;
        overlay.write_zeroes(io, base, offset, len, provision).await
    }

    async fn prefetch(&self, io: &I, offset: u64, len: u64) -> Result<()> {
        // Overlays are read past the page cache; what they take from the base is worth fetching.
        let base = self.gate.look(|footing| footing.base.clone());
        let end = (offset + len).min(base.size());
        match base.copy() {
            Some(copy) if offset < end => Device::prefetch(&**copy, io, offset, end - offset).await,
            _ => Ok(()),
        }
    }

    fn extents(
        &self,
        offset: u64,
        len: u64,
        grain: Grain,
        limit: usize,
        extents: &mut Vec<Extent>,
    ) {
        let footing = self.gate.get();
        let Ok(segments) = footing.overlay.extents(&footing.base, offset, len) else {
            unreachable!("front ends check ranges against the size, and devices never shrink");
        };
        let cache = footing.base.cache();
        let mut steps = 0..STEPS;
        for segment in segments {
            let more = match (segment.source, grain) {
                (Source::Base, Grain::Holders) => runs(cache.as_deref(), segment)
                    .all(|extent| merge(extents, grain, limit, extent) && steps.next().is_some()),
                (source, _) => {
                    // What the base holds is allocated as far as a client can care: it is no zero.
                    let holder = match source {
                        Source::Zero => Holder::Nobody,
                        Source::Overlay => Holder::Overlay,
                        Source::Base => Holder::Base,
                    };
                    merge(extents, grain, limit, Extent { len: segment.len, holder })
                }
            };
            if !more || steps.next().is_none() {
                return;
            }
        }
    }
}
