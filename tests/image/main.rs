//! Images: import from every source and format, and verification.
//!
//! Invariants checked:
//! - what is imported is, byte for byte, what `qemu-img convert -O raw` (or the test's own writer)
//!   makes of the same source, padded to whole sectors, and its digest is that of its content;
//! - no block of zeros is stored, and holes cost no time;
//! - damaged, truncated, dependent, encrypted or lying sources end in an error that names the
//!   source, never in a panic, a hang or other content;
//! - a wrong SHA-256 or a cancellation ends an import with an error;
//! - verification finds exactly the chunks that were damaged.
//!
//! Tests that need `qemu-img` say loudly that they were skipped where it isn't installed.

// A test's way to fail.
#![allow(clippy::unwrap_used)]

mod hostile;
mod http;
mod qcow2;
mod raw;
mod streams;
mod support;
mod verify;
mod vmdk;
