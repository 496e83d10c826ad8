//! NBD front end: the protocol's pure parts, and the sessions that move its bytes.
//!
//! `wire` knows bytes, `task` what a request may ask of an export, `options` the data of the
//! handshake's options, `handshake` their order. None of them does I/O, allocates without a bound
//! or panics, whatever a client sends. `reception` takes clients in, by `tls` where they come
//! over TCP, `server` keeps account of them, `session` serves their requests on a ring, with the
//! memory that `reserve` allows.

pub mod context;
pub mod handshake;
mod options;
mod reception;
pub mod reserve;
pub mod server;
pub mod session;
pub mod task;
pub mod tls;
pub mod wire;

pub use context::{Context, Contexts};
pub use handshake::{Ending, Handshake, Negotiated, Offer, Secrecy, Step};
pub use server::{Exports, Line, Pair, Server};
pub use task::{Refusal, Task, Terms};
pub use tls::{Tls, TlsFiles};
pub use wire::{Headers, Request};
