//! Images: how one comes to be on a disk, and how one knows that it is still what it was.
//!
//! ```text
//! Source ── Intake ─┬─ a stream of raw content ──────┐
//!                   └─ Content: raw, qcow2, vmdk ────┴─> chunks ─> workers ┬─> io::bulk ─> data
//!                                                (mask, CRC-32, SHA-256) └─> ChunkTable ─> chunks
//! ```
//!
//! [`import()`] reads a source once and writes `data` and `chunks` into a directory it is given;
//! [`verify()`] reads `data` and says which chunks differ from `chunks`.
//!
//! Invariants:
//! - An image's [`Digest`] depends on its size and raw content only, never on the format, the
//!   compression or the holes of its source.
//! - Nothing that an image names is ever opened: backing files, data files and extents are refused
//!   before a byte of content is read.
//! - Whatever a source claims, memory is bounded by constants of this module and by the number of
//!   chunks that hold data (48 bytes each).
//! - A block of zeros is never stored, and a chunk of zeros costs neither hashing nor table space.

mod again;
mod checksum;
mod content;
mod fetch;
mod import;
mod intake;
pub mod parcel;
mod pipeline;
mod qcow2;
mod qcow2_header;
pub mod qcow2_write;
mod source;
mod stream;
mod table;
mod verify;
mod vmdk;

pub use again::read_again;
pub use checksum::{ChunkSum, sha256};
pub use content::Format;
pub use import::{ImportRequest, Imported, import};
pub use pipeline::{Phase, Progress};
pub use source::Source;
pub use table::{ChunkTable, TableBuilder};
pub use verify::{VerifyReport, verify};

pub use crate::catalog::Digest;

/// The largest image that is served, in bytes: 64 TiB.
pub const MAX_IMAGE: u64 = 64 << 40;

/// The name of a copy's content, in its directory.
pub const DATA_FILE: &str = "data";
/// The name of a copy's chunk table, in its directory.
pub const CHUNKS_FILE: &str = "chunks";
