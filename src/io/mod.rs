//! The seam to the kernel: the block core does its I/O through [`Io`], and nothing else.
//!
//! Two implementations: `ring` on io_uring, which serves guests, and `sim`, a
//! simulated disk with seeded faults and crashes. The same core runs on both: that is how crash
//! safety is proved.

pub mod batch;
pub mod buf;
pub mod bulk;
pub mod command;
pub mod flusher;
pub mod holes;
pub mod inherit;
pub mod loan;
mod poll;
pub mod ring;
pub mod rings;
pub mod shared;
pub mod signal;
pub mod sim;
pub mod sys;
mod task;
mod timers;

pub use buf::Buf;
pub use ring::{Ring, RingFile};
pub use rings::Rings;

use std::{
    future::{Future, poll_fn},
    io::Result,
    ops::Range,
    task::Poll,
    time::Duration,
};

/// Operations on open files, awaited on the thread that asked.
///
/// Every future runs to its end: dropping one that was polled leaves its operation under way, and
/// the buffer's memory stays reserved until the kernel has let go of it.
pub trait Io: Clone + 'static {
    /// An open file. Cheap to clone; the file closes with the last clone.
    type File: Clone + 'static;

    /// A buffer of `len` bytes, aligned to 4096, of arbitrary content.
    fn alloc(&self, len: usize) -> Buf;

    /// The file's alignment of offsets, lengths and memory, in bytes: 1 for a buffered file, the
    /// device's logical block (512 or 4096) for a direct one.
    fn align(&self, file: &Self::File) -> u64;

    /// Fills all of `buf` from `offset`; what lies past the end of the file reads as zeros.
    fn read(&self, file: &Self::File, buf: Buf, offset: u64) -> impl Future<Output = Result<()>>;

    /// Writes all of `buf` at `offset`, growing the file if need be. Not durable before [`Io::sync`].
    /// An error leaves any mixture of old and new sectors in the range.
    fn write(&self, file: &Self::File, buf: Buf, offset: u64) -> impl Future<Output = Result<()>>;

    /// Makes every write, punch and zeroing that completed before this call durable (fdatasync).
    /// After an error nothing may be assumed of what was not synced before, now or later.
    fn sync(&self, file: &Self::File) -> impl Future<Output = Result<()>>;

    /// Makes the range read as zeros and gives its space back. Neither durable nor atomic.
    fn punch(&self, file: &Self::File, range: Range<u64>) -> impl Future<Output = Result<()>>;

    /// Makes the range read as zeros and keeps its space allocated. Neither durable nor atomic.
    fn zero(&self, file: &Self::File, range: Range<u64>) -> impl Future<Output = Result<()>>;

    /// Sets the file's length in bytes. Durable with the next sync.
    fn set_len(&self, file: &Self::File, len: u64) -> impl Future<Output = Result<()>>;

    /// Starts to bring the range into the page cache, where the file has one. A hint.
    fn prefetch(&self, _file: &Self::File, _range: Range<u64>) -> impl Future<Output = Result<()>> {
        std::future::ready(Ok(()))
    }

    /// Waits for `time`, or a little longer. Dropping it forgets it.
    fn sleep(&self, time: Duration) -> impl Future<Output = ()>;

    /// The next range at or after `offset` that may hold anything but zeros; `None` when the rest
    /// of the file is a hole. A hint for skipping holes that are known to read as zeros.
    fn data_after(
        &self,
        file: &Self::File,
        offset: u64,
    ) -> impl Future<Output = Result<Option<Range<u64>>>>;
}

/// Lets the other tasks of this thread go on before the caller does.
pub async fn yield_now() {
    let mut yielded = false;
    poll_fn(|context| match std::mem::replace(&mut yielded, true) {
        true => Poll::Ready(()),
        false => {
            context.waker().wake_by_ref();
            Poll::Pending
        }
    })
    .await;
}

/// Reads any range of a file, also one that its alignment does not allow: by way of a buffer that
/// covers the range.
pub async fn read_any<I: Io>(io: &I, file: &I::File, buf: Buf, offset: u64) -> Result<()> {
    let align = io.align(file);
    let aligned = |value: u64| value.is_multiple_of(align);
    if aligned(offset) && aligned(buf.len() as u64) && aligned(buf.as_ptr() as u64) {
        return io.read(file, buf, offset).await;
    }
    let start = offset - offset % align;
    let skip = (offset - start) as usize;
    let len = (skip + buf.len()).next_multiple_of(align as usize);
    let bounce = io.alloc(len);
    io.read(file, bounce.clone(), start).await?;
    buf.copy_from_buf(&bounce.slice(skip..skip + buf.len()));
    Ok(())
}
