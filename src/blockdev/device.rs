//! The contract between front ends and devices.
//!
//! Front ends check nothing of a device's inside and devices nothing of the wire; both rely on what
//! is written here.

use std::{any::Any, future::Future, panic::AssertUnwindSafe};

use futures_util::FutureExt;

pub use crate::cow::Provision;
use crate::{
    error::Result,
    io::{Buf, Io},
};

/// What a front end tells its clients of a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Info {
    /// Bytes; a multiple of 512. A device may grow, it never shrinks.
    pub size: u64,
    /// Writes, discards and zeroings fail with `ReadOnly`.
    pub read_only: bool,
    /// The disk below turns: clients may prefer sequential access.
    pub rotational: bool,
}

/// A run of content that one place holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Bytes; never 0.
    pub len: u64,
    /// Who holds it.
    pub holder: Holder,
}

/// Who holds a run of content: what a read of it would ask.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Holder {
    /// Nobody: it reads as zeros, and no space is allocated for it in this device or the image below.
    Nobody,
    /// The replica's own overlay.
    Overlay,
    /// A copy of the image.
    Base,
    /// The cache of promoted chunks on the replica's disk.
    Cache,
}

/// How finely runs are told apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Grain {
    /// What nobody holds, and what somebody holds, whoever that is.
    Zeros,
    /// By who holds it.
    Holders,
}

/// A block device. Ranges lie within `info().size`; lengths are not 0; no alignment is asked for.
///
/// Completed writes are visible to every later read. They are durable once a flush that began
/// after their completion has ended, whichever thread or connection either came from.
pub trait Device<I: Io>: 'static {
    /// Size and kind, as of now.
    fn info(&self) -> Info;

    /// Fills all of `buf` from `offset`.
    fn read(&self, io: &I, offset: u64, buf: Buf) -> impl Future<Output = Result<()>>;

    /// Writes all of `buf` at `offset`. On an error the range holds old and new sectors.
    fn write(&self, io: &I, offset: u64, buf: Buf) -> impl Future<Output = Result<()>>;

    /// Makes every write that completed before this call durable.
    fn flush(&self, io: &I) -> impl Future<Output = Result<()>>;

    /// Says that the range's content is no longer needed; afterwards it reads as before or as zeros.
    fn discard(&self, io: &I, offset: u64, len: u64) -> impl Future<Output = Result<()>>;

    /// Makes the range read as zeros.
    fn write_zeroes(
        &self,
        io: &I,
        offset: u64,
        len: u64,
        provision: Provision,
    ) -> impl Future<Output = Result<()>>;

    /// Brings the range into the page cache where that speeds up later reads.
    fn prefetch(&self, io: &I, offset: u64, len: u64) -> impl Future<Output = Result<()>>;

    /// Appends to `extents` what lies in the range, in order, neighbours merged, until the range or
    /// `limit` extents are covered, or it has looked for long; at least one. Pure: no I/O.
    fn extents(&self, offset: u64, len: u64, grain: Grain, limit: usize, extents: &mut Vec<Extent>);
}

/// Serves a request; `None` if that panics, which is a bug of ours: it costs the request, and not the
/// client, who must be answered. What it held is told by its guards; operations that it had under way
/// keep their memory until they end.
pub(super) async fn caught<T>(request: impl Future<Output = T>) -> Option<T> {
    let caught = AssertUnwindSafe(request).catch_unwind().await;
    caught.inspect_err(|panic| tracing::error!(what = message(&**panic), "a request panicked")).ok()
}

fn message(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("no message")
}

/// Appends an extent, or lengthens the last one if it is of the same kind. False if it would be
/// more than `limit`.
pub fn merge(extents: &mut Vec<Extent>, grain: Grain, limit: usize, extent: Extent) -> bool {
    let full = extents.len() >= limit;
    let is_same = |last: &Extent| match grain {
        Grain::Holders => last.holder == extent.holder,
        Grain::Zeros => (last.holder == Holder::Nobody) == (extent.holder == Holder::Nobody),
    };
    match extents.last_mut() {
        Some(last) if is_same(last) => last.len += extent.len,
        _ if full => return false,
        _ => extents.push(extent),
    }
    true
}
