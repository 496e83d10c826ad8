//! The node's service: what it can be asked, over HTTP on a Unix socket, and the client of that.
//!
//! ```text
//! client.rs ──HTTP──> server.rs ──> routes.rs ──> service.rs ──> exports.rs (devices that are open)
//!                     connections   paths         the node       │
//!                                    │            │              └─> catalog, cow, blockdev::nbd
//!                                    └─> job.rs   ├─> work.rs (imports, verifications)
//!                                      long work  └─> metrics
//! events.rs           what has happened: told once, logged, kept and followed
//! api.rs, event.rs    what goes over the wire, on both sides
//! config.rs, paths.rs, socket.rs      how and where it runs
//! ```
//!
//! Invariants:
//! - Whoever can connect to the control socket may do what the service does, and no more: it never
//!   reads a file for a client that the client could not read himself.
//! - No request blocks a thread of the runtime.

pub mod agent;
pub mod api;
pub mod client;
pub mod config;
pub mod event;
pub mod events;
pub mod paths;
pub mod server;
pub mod service;
pub mod socket;

mod attachments;
mod bases;
mod copying;
mod export;
mod exports;
mod health;
mod job;
mod keeper;
mod metrics;
mod moves;
mod origins;
mod promotion;
mod routes;
mod scrub;
mod surveys;
mod tails;
mod upload;
mod views;
mod work;

pub use routes::document;
