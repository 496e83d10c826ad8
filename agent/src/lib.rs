//! User space of underlay's probes: which device reads cost what time, and which chunk of which copy
//! they were for.
//!
//! ```text
//! main            the program: serve the daemon, watch by hand, check
//!   |
//! serve, follow   the daemon's socket; from what is watched to what is reported
//!   |
//! probes          load, attach, read maps                      (feature `probes`, with aya)
//!   |
//! extents, fiemap, device, kernel, btf, histogram, report      (always)
//!   |
//! sys             every unsafe line
//! ```
//!
//! Invariants:
//! - Without feature `probes` this crate has no eBPF in it: that is how the daemon uses it.
//! - Time is nanoseconds, positions are bytes unless a name says sectors (of 512 bytes).

pub mod btf;
pub mod device;
pub mod error;
pub mod extents;
pub mod fiemap;
pub mod histogram;
pub mod kernel;
pub mod report;

#[cfg(feature = "probes")]
pub mod capabilities;
#[cfg(feature = "probes")]
pub mod check;
#[cfg(feature = "probes")]
pub mod follow;
#[cfg(feature = "probes")]
pub mod http;
#[cfg(feature = "probes")]
pub mod probes;
#[cfg(feature = "probes")]
pub mod serve;
#[cfg(feature = "probes")]
pub mod table;

mod sys;

pub use error::{Error, Result};

/// Size of a chunk of an image, in bytes: the unit of attribution.
pub const CHUNK: u64 = 256 << 10;
/// Size of a sector, in bytes.
pub const SECTOR: u64 = 512;
