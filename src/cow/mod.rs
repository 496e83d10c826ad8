//! The overlay: a replica's copy-on-write layer over an image, in two files.
//!
//! ```text
//!            read                    write                     flush
//!             |                        |                         |
//!   plan: map + base -> segments   range lock                 one commit for all who wait
//!      |        |       |              |                         |
//!    zeros   overlay   base      bytes to `data`          1 take the changes of state
//!               |       |              |                  2 sync `data`
//!             `data`  image      state -> map, list       3 journal record, or checkpoint; sync `map`
//!                                                         4 acknowledge; give space back
//! ```
//!
//! `data` is a sparse file at identity offsets. `map` says of each 4 KiB block whether it is
//! **base** (read the image), **data** (read `data`) or **zero**; its bytes are in
//! [`mod@format`].
//!
//! Invariants:
//! - A state is durable only after the bytes it speaks of are: `data` is synced before `map` is
//!   written. What was acknowledged before an acknowledged flush survives any crash; what came
//!   later is old or new, sector by sector.
//! - Recovery writes nothing. The first commit after it syncs what it found and starts a new
//!   generation, so that a record of a torn tail can never follow one written later.
//! - A failed sync poisons: no later write or flush is acknowledged, reads go on. A failed write of
//!   the map does not: its changes go back on the list.
//! - State is never inferred from holes in a file.
//! - Nothing here names a front end, a ring or a path; all I/O goes through [`Io`].

pub mod crash;
pub mod format;

mod changes;
mod commit;
mod dirty;
mod flatten;
mod gate;
mod locks;
mod map;
mod overlay;
mod plan;
mod read;
mod recover;
mod relocate;
pub mod tail;
mod write;
mod zero;

use std::{future::Future, ops::Range, time::Duration};

pub use flatten::Flattened;
pub use gate::{Closed, Gate, Inside};
pub(crate) use locks::{Mode as LockMode, RangeLocks};
pub(crate) use overlay::run_all;
pub use overlay::{Overlay, Stats};
pub use plan::{Plan, Segment, Source};
pub use relocate::{Relocation, Watch};

use crate::{
    error::Result,
    io::{Buf, Io},
    units::Block,
};

/// The image under an overlay: immutable, of any size.
pub trait Base<I: Io> {
    /// Bytes; past them the replica reads zeros.
    fn size(&self) -> u64;

    /// Whether the block, which starts before the end, is known to be all zeros. Pure: no I/O.
    fn is_zero(&self, block: Block) -> bool;

    /// Whether the first of `blocks` is known to be zeros, and the end of those that are like it.
    /// The range is not empty and its blocks start before the image's end.
    fn zero_run(&self, blocks: Range<u64>) -> (bool, u64) {
        let zero = self.is_zero(Block(blocks.start));
        let alike = |block: &u64| self.is_zero(Block(*block)) == zero;
        (zero, (blocks.start + 1..blocks.end).find(|block| !alike(block)).unwrap_or(blocks.end))
    }

    /// Fills all of `buf` from `offset`; asked only for what lies within the size.
    fn read(&self, io: &I, offset: u64, buf: Buf) -> impl Future<Output = Result<()>>;

    /// Hears how long a read of the overlay's own data took.
    fn overlay_was_read(&self, _took: Duration) {}
}

/// What a write-zeroes request wants of the space below.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Provision {
    /// The space may be given back.
    Release,
    /// The space stays allocated: later writes there do not run out of it.
    Keep,
    /// The same, but only where nothing has to be written for it: `Unsupported` otherwise, at once.
    KeepIfFast,
}
