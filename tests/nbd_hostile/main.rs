//! Invariants checked: whatever a client of the NBD socket does, the daemon neither ends, hangs,
//! grows nor leaks; every other client goes on; a request that makes no sense has the error that the
//! protocol names for it; and reads return what was written, at any offset and length.
//!
//! `handshakes`, `requests`, `long`, `connections` are what clients do; `model` is that all of it leaves the
//! content right. Each scenario has a daemon of its own. With `NBD_TARGET=SOCKET,WRITABLE,READONLY` the scenarios
//! that need no more than a socket run against another server, to compare: its writable export
//! has 8 GiB, both begin with the content of [`content`].

#![allow(clippy::unwrap_used, reason = "a test that meets what it did not expect fails")]

mod connections;
#[path = "../support/daemon.rs"]
mod daemon;
mod handshakes;
mod long;
mod model;
#[path = "../support/nbd.rs"]
mod nbd;
mod requests;

use std::{
    collections::HashMap,
    path::PathBuf,
    time::{Duration, Instant},
};

use daemon::Daemon;
use nbd::{Client, Message, PATIENCE, Replies, be};

/// Bytes in the image.
const IMAGE: u64 = 8 << 20;
/// Bytes in the replica: more than one request can name.
const SIZE: u64 = 8 << 30;

/// The image's content: two of three runs of 64 KiB are random, the third is zero.
fn content() -> Vec<u8> {
    let mut random = fastrand::Rng::with_seed(4);
    let mut bytes = vec![0; IMAGE as usize];
    for (index, run) in bytes.chunks_mut(64 << 10).enumerate() {
        if index % 3 != 1 {
            random.fill(run);
        }
    }
    bytes
}

/// What the scenarios run against.
struct Target {
    daemon: Option<Daemon>,
    socket: PathBuf,
    writable: String,
    read_only: String,
}

impl Target {
    fn new() -> Target {
        if let Ok(target) = std::env::var("NBD_TARGET") {
            let mut parts = target.split(',').map(str::to_owned);
            let mut next = || parts.next().expect("NBD_TARGET=SOCKET,WRITABLE,READONLY");
            let socket = PathBuf::from(next());
            return Target { daemon: None, socket, writable: next(), read_only: next() };
        }
        let daemon = Daemon::start();
        daemon.import("base", &content());
        daemon.replica("vm", "base", &SIZE.to_string());
        Target {
            socket: daemon.nbd(),
            daemon: Some(daemon),
            writable: "replica/vm".into(),
            read_only: "image/base".into(),
        }
    }

    fn writer(&self) -> Client {
        Client::open(&self.socket, &self.writable, Replies::Structured)
    }

    fn connect(&self) -> Client {
        Client::connect(&self.socket)
    }

    /// A client that does nothing wrong is served, on both exports.
    fn serves(&self) {
        for (export, replies) in
            [(&self.writable, Replies::Structured), (&self.read_only, Replies::Simple)]
        {
            let mut client = Client::open(&self.socket, export, replies);
            assert!(client.read(0, 4096).unwrap() == content()[..4096]);
            client.close();
        }
    }
}

/// Waits until `done`, for as long as any answer may take.
fn wait_until(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !done() {
        assert!(Instant::now() < deadline, "{what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Takes the replies to `count` READs under way at once, in any order; checks their content, given
/// each one's range by its cookie. Returns the cookies in the order of their ends.
fn replies_to_reads(
    client: &mut Client,
    count: usize,
    range: impl Fn(u64) -> (u64, u32),
) -> Vec<u64> {
    let content = content();
    let mut ends = vec![];
    let mut covered = HashMap::<u64, u64>::new();
    while ends.len() < count {
        let Message::Chunk { done, kind, cookie, payload } = client.message() else {
            panic!("a simple reply to a READ");
        };
        let (offset, len) = range(cookie);
        let seen = covered.entry(cookie).or_default();
        let expected = |at: u64, len: usize| -> Vec<u8> {
            let byte = |at: u64| content.get(at as usize).copied().unwrap_or_default();
            (at..at + len as u64).map(byte).collect()
        };
        match kind {
            0 => (),
            1 => {
                let (at, bytes) = (be(&payload[..8]), &payload[8..]);
                assert!(at >= offset && at + bytes.len() as u64 <= offset + u64::from(len));
                assert!(bytes == expected(at, bytes.len()), "READ of {len} bytes at {offset}");
                *seen += bytes.len() as u64;
            }
            2 => {
                let (at, hole) = (be(&payload[..8]), be(&payload[8..]));
                assert!(at >= offset && at + hole <= offset + u64::from(len));
                assert!(expected(at, hole as usize).iter().all(|byte| *byte == 0));
                *seen += hole;
            }
            other => panic!("a chunk of type {other:#x} in answer to READ"),
        }
        if done {
            ends.push(cookie);
        }
    }
    for (cookie, seen) in covered {
        let times = ends.iter().filter(|end| **end == cookie).count() as u64;
        assert_eq!(seen, times * u64::from(range(cookie).1), "every byte once");
    }
    ends
}
