//! A raw NBD client for tests: it says anything, in any order, and hides nothing of the answers.
//!
//! It shares no code with the server on purpose: numbers are those of the protocol's text, so that
//! a mistake in the server's constants can't hide in a test that makes the same one. Every wait ends
//! after [`PATIENCE`]: a server that hangs fails the test.

#![allow(dead_code, clippy::unwrap_used, reason = "every test file uses a part of it")]

use std::{
    io::{ErrorKind, Read, Write},
    os::unix::net::UnixStream,
    path::Path,
    time::Duration,
};

/// How long any single answer may take.
pub const PATIENCE: Duration = Duration::from_secs(30);

pub const READ: u16 = 0;
pub const WRITE: u16 = 1;
pub const DISC: u16 = 2;
pub const FLUSH: u16 = 3;
pub const TRIM: u16 = 4;
pub const CACHE: u16 = 5;
pub const ZEROES: u16 = 6;
pub const STATUS: u16 = 7;

pub const FUA: u16 = 1;
pub const NO_HOLE: u16 = 2;
pub const DF: u16 = 4;
pub const REQ_ONE: u16 = 8;
pub const FAST_ZERO: u16 = 16;

/// Transmission flags that a test asks for by name.
pub const SEND_FAST_ZERO: u16 = 1 << 11;

pub const EPERM: u32 = 1;
pub const EIO: u32 = 5;
pub const EINVAL: u32 = 22;
pub const ENOSPC: u32 = 28;
pub const EOVERFLOW: u32 = 75;

/// How replies come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Replies {
    /// Simple ones only, as to the kernel's client.
    Simple,
    /// Chunks, with `base:allocation`.
    Structured,
}

/// A connection in any phase.
pub struct Client {
    pub stream: UnixStream,
    pub replies: Replies,
    pub size: u64,
    pub flags: u16,
    /// The id of `base:allocation`, if it was negotiated.
    pub context: u32,
    cookie: u64,
}

/// One message of the server's in the transmission phase.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Message {
    /// A simple reply, without the data that may follow it.
    Simple { error: u32, cookie: u64 },
    /// A chunk of a structured reply.
    Chunk { done: bool, kind: u16, cookie: u64, payload: Vec<u8> },
}

impl Message {
    pub fn cookie(&self) -> u64 {
        match self {
            Message::Simple { cookie, .. } | Message::Chunk { cookie, .. } => *cookie,
        }
    }
}

/// Header of an option and its data.
pub fn option(number: u32, data: &[u8]) -> Vec<u8> {
    let mut bytes = b"IHAVEOPT".to_vec();
    bytes.extend(number.to_be_bytes());
    bytes.extend((data.len() as u32).to_be_bytes());
    bytes.extend(data);
    bytes
}

/// GO for an export, asking for block sizes as real clients do.
pub fn go(export: &str) -> Vec<u8> {
    let mut data = (export.len() as u32).to_be_bytes().to_vec();
    data.extend(export.as_bytes());
    data.extend([0, 1, 0, 3]);
    option(7, &data)
}

/// SET_META_CONTEXT of `base:allocation` for an export.
pub fn set_allocation(export: &str) -> Vec<u8> {
    let mut data = (export.len() as u32).to_be_bytes().to_vec();
    data.extend(export.as_bytes());
    data.extend([0, 0, 0, 1, 0, 0, 0, 15]);
    data.extend(b"base:allocation");
    option(10, &data)
}

/// A whole handshake: client flags, STRUCTURED_REPLY, SET_META_CONTEXT, GO.
pub fn handshake(export: &str) -> Vec<u8> {
    let parts = [vec![0, 0, 0, 3], option(8, b""), set_allocation(export), go(export)];
    parts.concat()
}

/// A request's header.
pub fn request(flags: u16, command: u16, cookie: u64, offset: u64, len: u32) -> Vec<u8> {
    let mut bytes = 0x2560_9513_u32.to_be_bytes().to_vec();
    bytes.extend(flags.to_be_bytes());
    bytes.extend(command.to_be_bytes());
    bytes.extend(cookie.to_be_bytes());
    bytes.extend(offset.to_be_bytes());
    bytes.extend(len.to_be_bytes());
    bytes
}

impl Client {
    /// Connects and takes the greeting; nothing is sent yet.
    pub fn connect(socket: &Path) -> Client {
        let stream = UnixStream::connect(socket).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.set_write_timeout(Some(PATIENCE)).unwrap();
        let mut client = Client {
            stream,
            replies: Replies::Simple,
            size: 0,
            flags: 0,
            context: 0,
            cookie: 0x0123_4567_0000_0000,
        };
        assert_eq!(client.take(18), b"NBDMAGICIHAVEOPT\0\x03");
        client
    }

    /// Connects and negotiates `export`, up to the transmission phase.
    pub fn open(socket: &Path, export: &str, replies: Replies) -> Client {
        let mut client = Client::connect(socket);
        client.send(&[0, 0, 0, 3]);
        if replies == Replies::Structured {
            client.send(&option(8, b""));
            assert_eq!(client.option_reply(), (8, 1, vec![]));
            client.send(&set_allocation(export));
            let (_, kind, payload) = client.option_reply();
            assert_eq!((kind, &payload[4..]), (4, &b"base:allocation"[..]));
            client.context = be(&payload[..4]) as u32;
            assert_eq!(client.option_reply(), (10, 1, vec![]));
        }
        client.replies = replies;
        client.send(&go(export));
        client.take_go();
        client
    }

    /// Takes the answer to GO, up to its ACK.
    pub fn take_go(&mut self) {
        loop {
            match self.option_reply() {
                (7, 3, payload) if payload[..2] == [0, 0] => {
                    self.size = be(&payload[2..10]);
                    self.flags = be(&payload[10..12]) as u16;
                }
                (7, 3, payload) if payload[..2] == [0, 3] => {
                    assert_eq!(payload[2..], [0, 0, 0, 1, 0, 0, 0x10, 0, 2, 0, 0, 0]);
                }
                (7, 1, payload) if payload.is_empty() => return,
                other => panic!("an answer to GO: {other:?}"),
            }
        }
    }

    /// Sends bytes as they are.
    pub fn send(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).unwrap();
    }

    /// Sends bytes to a server that may hang up meanwhile; tells whether it took them all.
    pub fn try_send(&mut self, bytes: &[u8]) -> bool {
        match self.stream.write_all(bytes) {
            Ok(()) => true,
            Err(error) if error.kind() == ErrorKind::WouldBlock => panic!("the server hangs"),
            Err(_) => false,
        }
    }

    /// Receives exactly `len` bytes.
    pub fn take(&mut self, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.stream.read_exact(&mut bytes).unwrap_or_else(|error| panic!("{len} bytes: {error}"));
        bytes
    }

    /// Takes what comes until the server hangs up.
    pub fn rest(&mut self) -> Vec<u8> {
        let mut bytes = vec![];
        match self.stream.read_to_end(&mut bytes) {
            Ok(_) => bytes,
            Err(error) if error.kind() == ErrorKind::ConnectionReset => bytes,
            Err(error) => panic!("the server does not hang up: {error}"),
        }
    }

    /// One reply to an option: the option, the reply's type, its payload.
    pub fn option_reply(&mut self) -> (u32, u32, Vec<u8>) {
        let header = self.take(20);
        assert_eq!(header[..8], [0, 3, 0xe8, 0x89, 4, 0x55, 0x65, 0xa9]);
        let (option, kind) = (be(&header[8..12]) as u32, be(&header[12..16]) as u32);
        let len = be(&header[16..]) as usize;
        assert!(len <= 16 << 20, "an option reply of {len} bytes");
        (option, kind, self.take(len))
    }

    /// A cookie that no other request of this connection has.
    pub fn fresh(&mut self) -> u64 {
        self.cookie += 1;
        self.cookie
    }

    /// One message of the transmission phase.
    pub fn message(&mut self) -> Message {
        let header = self.take(16);
        match be(&header[..4]) {
            0x6744_6698 => {
                Message::Simple { error: be(&header[4..8]) as u32, cookie: be(&header[8..]) }
            }
            0x668e_33ef => {
                let len = be(&self.take(4)) as usize;
                assert!(len <= (32 << 20) + 8, "a chunk of {len} bytes");
                Message::Chunk {
                    done: header[5] & 1 == 1,
                    kind: be(&header[6..8]) as u16,
                    cookie: be(&header[8..]),
                    payload: self.take(len),
                }
            }
            magic => panic!("a message that begins with {magic:#x}"),
        }
    }

    /// The reply to a READ of `len` bytes at `offset` that is the only request under way.
    pub fn read_reply(&mut self, cookie: u64, offset: u64, len: u32) -> Result<Vec<u8>, u32> {
        let mut data = vec![0xa5; len as usize];
        let mut covered = 0;
        loop {
            match self.message() {
                Message::Simple { error, cookie: same } => {
                    assert_eq!((same, self.replies), (cookie, Replies::Simple));
                    return if error == 0 { Ok(self.take(len as usize)) } else { Err(error) };
                }
                Message::Chunk { done, kind, cookie: same, payload } => {
                    assert_eq!((same, self.replies), (cookie, Replies::Structured));
                    let start = || {
                        let at = be(&payload[..8]).checked_sub(offset).unwrap();
                        usize::try_from(at).unwrap()
                    };
                    match kind {
                        0 => assert!(done && payload.is_empty()),
                        1 => {
                            let (at, bytes) = (start(), &payload[8..]);
                            assert!(!bytes.is_empty());
                            data[at..at + bytes.len()].copy_from_slice(bytes);
                            covered += bytes.len();
                        }
                        2 => {
                            let (at, hole) = (start(), be(&payload[8..]) as usize);
                            assert!(hole > 0);
                            data[at..at + hole].fill(0);
                            covered += hole;
                        }
                        0x8001 | 0x8002 => {
                            let error = be(&payload[..4]) as u32;
                            assert!(error != 0);
                            while !done
                                && !matches!(self.message(), Message::Chunk { done: true, .. })
                            {
                            }
                            return Err(error);
                        }
                        other => panic!("a chunk of type {other} in answer to READ"),
                    }
                    if done {
                        assert_eq!(covered, len as usize, "data for all of the request, once");
                        return Ok(data);
                    }
                }
            }
        }
    }

    /// The reply to a request without data that is the only one under way.
    pub fn done_reply(&mut self, cookie: u64) -> Result<(), u32> {
        let error = match self.message() {
            Message::Simple { error, cookie: same } => {
                assert_eq!(same, cookie);
                error
            }
            Message::Chunk { done, kind, cookie: same, payload } => {
                assert_eq!((same, done, self.replies), (cookie, true, Replies::Structured));
                match kind {
                    0 => 0,
                    0x8001 | 0x8002 => be(&payload[..4]) as u32,
                    other => panic!("a chunk of type {other} in answer to a command without data"),
                }
            }
        };
        if error == 0 { Ok(()) } else { Err(error) }
    }

    /// Any request without a payload but READ and STATUS, answered.
    pub fn command(&mut self, flags: u16, command: u16, offset: u64, len: u32) -> Result<(), u32> {
        let cookie = self.fresh();
        self.send(&request(flags, command, cookie, offset, len));
        self.done_reply(cookie)
    }

    pub fn read(&mut self, offset: u64, len: u32) -> Result<Vec<u8>, u32> {
        let cookie = self.fresh();
        self.send(&request(0, READ, cookie, offset, len));
        self.read_reply(cookie, offset, len)
    }

    pub fn write(&mut self, flags: u16, offset: u64, data: &[u8]) -> Result<(), u32> {
        let cookie = self.fresh();
        self.send(&request(flags, WRITE, cookie, offset, data.len() as u32));
        self.send(data);
        self.done_reply(cookie)
    }

    pub fn flush(&mut self) -> Result<(), u32> {
        self.command(0, FLUSH, 0, 0)
    }

    /// Extents of `base:allocation` as (bytes, state).
    pub fn status(&mut self, flags: u16, offset: u64, len: u32) -> Result<Vec<(u32, u32)>, u32> {
        let cookie = self.fresh();
        self.send(&request(flags, STATUS, cookie, offset, len));
        match self.message() {
            Message::Simple { error, cookie: same } => {
                assert_eq!(same, cookie);
                assert!(error != 0, "a status without extents");
                Err(error)
            }
            Message::Chunk { done: true, kind: 5, cookie: same, payload } => {
                assert_eq!((same, be(&payload[..4])), (cookie, u64::from(self.context)));
                assert!(payload.len() > 4 && payload.len() % 8 == 4);
                let pairs = payload[4..].chunks(8);
                Ok(pairs.map(|both| (be(&both[..4]) as u32, be(&both[4..]) as u32)).collect())
            }
            Message::Chunk { done: true, kind: 0x8001, payload, .. } => {
                Err(be(&payload[..4]) as u32)
            }
            other => panic!("an answer to BLOCK_STATUS: {other:?}"),
        }
    }

    /// Ends the connection as the protocol wants it, and waits for the server to hang up.
    pub fn close(mut self) {
        let cookie = self.fresh();
        self.send(&request(0, DISC, cookie, 0, 0));
        assert_eq!(self.rest(), b"", "nothing comes after DISC");
    }
}

/// Up to eight bytes as one number.
pub fn be(bytes: &[u8]) -> u64 {
    assert!(bytes.len() <= 8);
    bytes.iter().fold(0, |number, byte| number << 8 | u64::from(*byte))
}
