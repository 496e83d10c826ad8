//! Underlay keeps one on-disk copy of each backing image on a node and lets replicas on any disk of
//! that node stand on it, each with a copy-on-write overlay of its own.
//!
//! Imports run downward only:
//!
//! ```text
//! cli, control          the command line; the HTTP API, the node's service, metrics
//!    |
//! attach                the kernel's NBD client as a client of our server
//!    |
//! blockdev, image       front ends (NBD) over one Device contract; import and verification
//!    |
//! promote, source       what moves to whom, and the caches that it moves to; the copies of an image
//!    |
//! catalog, cow          what is on the disks; overlays
//!    |
//! io                    the seam to the kernel: the Io trait, the ring, the simulated disk
//!    |
//! error, histogram, pages, units   words that all of them share
//! ```
//!
//! Invariants between the modules:
//! - `cow` names no front end, no ring and no path: it is generic over [`io::Io`].
//! - The policy of `promote` is pure: it names no path, no ring and no clock.
//! - Front ends open no file: they are handed a [`blockdev::Device`].
//! - `unsafe` is found in `io` only, where the code meets the kernel.

pub mod attach;
pub mod blockdev;
pub mod catalog;
pub mod cli;
pub mod control;
pub mod cow;
pub mod error;
pub mod histogram;
pub mod image;
pub mod io;
pub mod keep;
pub mod pages;
pub mod promote;
pub mod source;
pub mod units;

pub use error::{Error, Kind, Result};
