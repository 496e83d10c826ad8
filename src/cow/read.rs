//! Reads: plan the range, then fetch each segment straight into the caller's memory.
//!
//! No lock; and no allocation where one segment covers the range and is aligned, which is the
//! common case.

use std::time::Instant;

use super::{
    Base,
    overlay::{BOUNCE, Overlay, run_all},
    plan::{Plan, Segment, Source},
};
use crate::{
    error::Result,
    io::{Buf, Io},
    units::{self, check_range},
};

impl<I: Io> Overlay<I> {
    /// Fills all of `buf` from `offset`.
    pub async fn read<B: Base<I>>(&self, io: &I, base: &B, offset: u64, buf: Buf) -> Result<()> {
        let end = check_range(offset, buf.len() as u64, self.size())?;
        let mut plan = Plan::new(self.changes.map(), base, offset..end).peekable();
        let Some(first) = plan.next() else { return Ok(()) };
        if plan.peek().is_none() {
            return self.read_segment(io, base, first, buf).await;
        }
        run_all(std::iter::once(first).chain(plan).map(|segment| {
            let start = (segment.offset - offset) as usize;
            let piece = buf.slice(start..start + segment.len as usize);
            self.read_segment(io, base, segment, piece)
        }))
        .await
    }

    async fn read_segment<B: Base<I>>(
        &self,
        io: &I,
        base: &B,
        segment: Segment,
        buf: Buf,
    ) -> Result<()> {
        match segment.source {
            Source::Zero => buf.fill(0),
            Source::Overlay => {
                let started = Instant::now();
                self.read_data(io, segment.offset, buf).await?;
                base.overlay_was_read(started.elapsed());
            }
            Source::Base => read_base(io, base, segment.offset, buf).await?,
        }
        Ok(())
    }

    /// Fills `buf` from the data file, through aligned memory where the file wants it.
    pub(super) async fn read_data(&self, io: &I, offset: u64, buf: Buf) -> Result<()> {
        let align = io.align(&self.data);
        let describe = |error| self.failed(format_args!("reading data at {offset}"), error);
        if is_aligned(align, offset, &buf) {
            return io.read(&self.data, buf, offset).await.map_err(describe);
        }
        let mut done = 0;
        while done < buf.len() {
            let at = offset + done as u64;
            let start = units::round_down(at, align);
            let len = (buf.len() - done).min(BOUNCE - (at - start) as usize);
            let skip = (at - start) as usize;
            let bounce = io.alloc((skip + len).next_multiple_of(align as usize));
            io.read(&self.data, bounce.clone(), start).await.map_err(describe)?;
            buf.slice(done..done + len).copy_from_buf(&bounce.slice(skip..skip + len));
            done += len;
        }
        Ok(())
    }
}

/// Fills `buf` from the image, and with zeros past its end.
pub(super) async fn read_base<I: Io, B: Base<I>>(
    io: &I,
    base: &B,
    offset: u64,
    buf: Buf,
) -> Result<()> {
    let inside = base.size().saturating_sub(offset).min(buf.len() as u64) as usize;
    if inside < buf.len() {
        buf.slice(inside..buf.len()).fill(0);
    }
    if inside == 0 {
        return Ok(());
    }
    base.read(io, offset, buf.slice(0..inside)).await
}

/// Whether a file of this alignment takes the buffer at this offset as it is.
pub(super) fn is_aligned(align: u64, offset: u64, buf: &Buf) -> bool {
    offset.is_multiple_of(align)
        && (buf.len() as u64).is_multiple_of(align)
        && (buf.as_ptr().addr() as u64).is_multiple_of(align)
}
