//! Writes: whole blocks straight from the caller's memory, partial ones copied up.
//!
//! Invariants:
//! - A block becomes `data` only after all of its 4 KiB were written; a write that fails changes
//!   no state, so what it left in the file stays invisible where the block was not data before.
//! - Whoever writes a block that he first had to read holds its range exclusively.
//! - A block that is copied up takes all 4 KiB of the image's, also beyond the device's end: should
//!   the device grow, what appears there is what the image holds.

use std::{ops::Range, sync::atomic::Ordering};

use super::{
    Base,
    format::State,
    locks::Mode,
    overlay::{BOUNCE, Overlay},
    read::{is_aligned, read_base},
};
use crate::{
    error::Result,
    io::{Buf, Io, loan::withdrawn},
    units::{self, BLOCK, Block, check_range},
};

impl<I: Io> Overlay<I> {
    /// Writes all of `buf` at `offset`.
    pub async fn write<B: Base<I>>(&self, io: &I, base: &B, offset: u64, buf: Buf) -> Result<()> {
        let end = check_range(offset, buf.len() as u64, self.size())?;
        if buf.is_empty() {
            return Ok(());
        }
        self.before_change(io).await?;
        let blocks = offset / BLOCK..units::blocks(end);
        let whole = offset.is_multiple_of(BLOCK) && end.is_multiple_of(BLOCK);
        let align = io.align(&self.data);
        let in_place = offset.is_multiple_of(align) && end.is_multiple_of(align);
        let all_data = || in_place && self.changes.map().is_all(blocks.clone(), State::Data);
        if whole || all_data() {
            let shared = self.locks.lock(blocks.clone(), Mode::Shared).await;
            // A discard may have been ahead in the queue.
            if whole || all_data() {
                self.write_data(io, offset, buf).await?;
                self.changes.to_data(blocks);
                return Ok(());
            }
            drop(shared);
        }
        let _exclusive = self.locks.lock(blocks.clone(), Mode::Exclusive).await;
        self.write_with_edges(io, base, offset, buf).await?;
        self.changes.to_data(blocks);
        Ok(())
    }

    /// What every operation that changes state does first: is the overlay sound, and is there room
    /// on the list of changes? If not, a commit makes some.
    pub(super) async fn before_change(&self, io: &I) -> Result<()> {
        self.check_poison()?;
        // One at a time while there is room: who finds the journal locked need not wait for it.
        let changes = &self.changes;
        if changes.is_full() || changes.is_half_full() && self.journal.try_lock().is_ok() {
            self.flush(io).await?;
        }
        Ok(())
    }

    /// Writes a range that covers its first and last block in part. The range is held exclusively.
    async fn write_with_edges<B: Base<I>>(
        &self,
        io: &I,
        base: &B,
        offset: u64,
        buf: Buf,
    ) -> Result<()> {
        let end = offset + buf.len() as u64;
        // Where the whole blocks begin and end: both at the range's end if there are none.
        let first = offset.next_multiple_of(BLOCK).min(end);
        let last = units::round_down(end, BLOCK).max(first);
        let piece =
            |from: u64, to: u64| buf.slice((from - offset) as usize..(to - offset) as usize);
        let middle = async {
            match first == last {
                true => Ok(()),
                false => self.write_data(io, first, piece(first, last)).await,
            }
        };
        let (head, middle, tail) = futures_util::future::join3(
            self.write_partial(io, base, offset, piece(offset, first)),
            middle,
            self.write_partial(io, base, last, piece(last, end)),
        )
        .await;
        head.and(middle).and(tail)
    }

    /// Writes a part of one block, making the rest of it whole if need be. The block is held
    /// exclusively; an empty buffer writes nothing.
    pub(super) async fn write_partial<B: Base<I>>(
        &self,
        io: &I,
        base: &B,
        offset: u64,
        buf: Buf,
    ) -> Result<()> {
        if buf.is_empty() {
            return Ok(());
        }
        let (block, align) = (Block::at(offset), io.align(&self.data));
        let state = self.changes.map().state(block.0);
        let end = offset + buf.len() as u64;
        if state == State::Data && offset.is_multiple_of(align) && end.is_multiple_of(align) {
            return self.write_data(io, offset, buf).await;
        }
        let whole = io.alloc(BLOCK as usize);
        match state {
            State::Data => self.read_data(io, block.offset(), whole.clone()).await?,
            State::Base if !is_zero(base, block) => {
                read_base(io, base, block.offset(), whole.clone()).await?;
            }
            State::Base | State::Zero => whole.fill(0),
        }
        if state != State::Data {
            self.counters.copied_up.fetch_add(1, Ordering::Relaxed);
        }
        let start = (offset - block.offset()) as usize;
        whole.slice(start..start + buf.len()).copy_from_buf(&buf);
        if buf.is_lost() {
            return Err(self.failed("writing", withdrawn()));
        }
        self.write_data(io, block.offset(), whole).await
    }

    /// Writes `buf` to the data file, through aligned memory where the file wants it. Offset and
    /// length are aligned.
    pub(super) async fn write_data(&self, io: &I, offset: u64, buf: Buf) -> Result<()> {
        let (align, end) = (io.align(&self.data), offset + buf.len() as u64);
        let written = if is_aligned(align, offset, &buf) {
            io.write(&self.data, buf, offset).await
        } else {
            self.write_bounced(io, offset, &buf).await
        };
        // Also after an error: parts of it may stand in the file.
        self.written(offset..end);
        written.map_err(|error| self.failed(format_args!("writing data at {offset}"), error))
    }

    /// A write to these bytes of the data file has ended.
    pub(super) fn written(&self, bytes: Range<u64>) {
        self.writes.fetch_add(1, Ordering::Release);
        self.changes.dirty().mark(bytes.start / BLOCK..units::blocks(bytes.end));
    }

    async fn write_bounced(&self, io: &I, offset: u64, buf: &Buf) -> std::io::Result<()> {
        let mut done = 0;
        while done < buf.len() {
            let len = (buf.len() - done).min(BOUNCE);
            let bounce = io.alloc(len);
            bounce.copy_from_buf(&buf.slice(done..done + len));
            if buf.is_lost() {
                return Err(withdrawn());
            }
            io.write(&self.data, bounce, offset + done as u64).await?;
            done += len;
        }
        Ok(())
    }
}

/// Whether the image holds nothing but zeros in this block, or ends before it.
pub(super) fn is_zero<I: Io, B: Base<I>>(base: &B, block: Block) -> bool {
    block.offset() >= base.size() || base.is_zero(block)
}
