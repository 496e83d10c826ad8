//! The bytes of NBD: every constant of the protocol, requests and replies. All of it big endian.
//!
//! Invariants:
//! - Decoding never panics and never allocates; what can't be a request is a [`BadMagic`], after which the
//!   stream can't be followed any more.
//! - Encoders of the transmission phase return arrays, or append to a buffer of the caller's that
//!   keeps its capacity: no allocation in steady state.
//!
//! Not here: which requests are allowed (`task`), the handshake's options (`options`, `handshake`).

use super::context::Context;
use crate::blockdev::Extent;

/// First magic of the server's greeting, "NBDMAGIC".
pub const GREETING: u64 = 0x4e42_444d_4147_4943;
/// Second magic of the greeting and the magic of every option, "IHAVEOPT".
pub const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
/// Magic of a reply to an option.
pub const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
/// Magic of a request with a 28-byte header.
pub const REQUEST_MAGIC: u32 = 0x2560_9513;
/// Magic of a request with a 32-byte header.
pub const EXTENDED_REQUEST_MAGIC: u32 = 0x21e4_1c71;
/// Magic of a chunk with a 32-byte header.
pub const EXTENDED_CHUNK_MAGIC: u32 = 0x6e8a_278c;
/// Magic of a simple reply.
pub const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
/// Magic of a chunk of a structured reply.
pub const CHUNK_MAGIC: u32 = 0x668e_33ef;

/// Bytes of an option's header: magic, option, length.
pub const OPTION_HEADER: usize = 16;
/// Bytes of a request's header, the longer kind.
pub const REQUEST_HEADER: usize = 32;
/// Bytes of a simple reply before its data.
pub const SIMPLE_REPLY: usize = 16;
/// Bytes of a chunk's header before its payload, the longer kind.
pub const CHUNK_HEADER: usize = 32;
/// Bytes of an OFFSET_HOLE chunk, at most: header, offset and length. Nothing else is as long but its data.
pub const HOLE_CHUNK: usize = CHUNK_HEADER + 12;
/// Zeroes after the answer to EXPORT_NAME, unless the client does without.
pub const EXPORT_NAME_PADDING: usize = 124;

/// The longest string of the protocol, names of exports among them, in bytes.
pub const MAX_STRING: usize = 4096;
/// The smallest request, in bytes, as told to clients.
pub const MIN_BLOCK: u32 = 1;
/// The request size from which on nothing is read to be modified, in bytes, as told to clients.
pub const PREFERRED_BLOCK: u32 = 4096;
/// The largest data of a READ or WRITE, in bytes, as told to clients.
pub const MAX_PAYLOAD: u32 = 32 << 20;
/// The most descriptors in one BLOCK_STATUS chunk (64 KiB of them). The protocol's own bound is 2^20;
/// clients ask again from where an answer ends.
pub const MAX_DESCRIPTORS: usize = 8192;

/// Handshake flags: the low two are the server's and, in 32 bits, the client's.
pub mod handshake_flag {
    /// Options other than EXPORT_NAME are understood and answered.
    pub const FIXED_NEWSTYLE: u16 = 1 << 0;
    /// The 124 zeroes after EXPORT_NAME may be left out.
    pub const NO_ZEROES: u16 = 1 << 1;
}

/// Options that a client sends in the handshake.
#[allow(missing_docs, reason = "the protocol's own names")]
pub mod option {
    pub const EXPORT_NAME: u32 = 1;
    pub const ABORT: u32 = 2;
    pub const LIST: u32 = 3;
    pub const STARTTLS: u32 = 5;
    pub const INFO: u32 = 6;
    pub const GO: u32 = 7;
    pub const STRUCTURED_REPLY: u32 = 8;
    pub const LIST_META_CONTEXT: u32 = 9;
    pub const SET_META_CONTEXT: u32 = 10;
    pub const EXTENDED_HEADERS: u32 = 11;
}

/// Types of replies to options; an error has bit 31 set and may carry a message.
#[allow(missing_docs, reason = "the protocol's own names")]
pub mod reply {
    pub const ACK: u32 = 1;
    pub const SERVER: u32 = 2;
    pub const INFO: u32 = 3;
    pub const META_CONTEXT: u32 = 4;
    pub const ERR_UNSUP: u32 = (1 << 31) + 1;
    pub const ERR_POLICY: u32 = (1 << 31) + 2;
    pub const ERR_INVALID: u32 = (1 << 31) + 3;
    pub const ERR_PLATFORM: u32 = (1 << 31) + 4;
    pub const ERR_TLS_REQD: u32 = (1 << 31) + 5;
    pub const ERR_UNKNOWN: u32 = (1 << 31) + 6;
    pub const ERR_SHUTDOWN: u32 = (1 << 31) + 7;
    pub const ERR_BLOCK_SIZE_REQD: u32 = (1 << 31) + 8;
    pub const ERR_TOO_BIG: u32 = (1 << 31) + 9;
    pub const ERR_EXT_HEADER_REQD: u32 = (1 << 31) + 10;
}

/// Kinds of information about an export, asked for and given by INFO and GO.
#[allow(missing_docs, reason = "the protocol's own names")]
pub mod info {
    pub const EXPORT: u16 = 0;
    pub const NAME: u16 = 1;
    pub const DESCRIPTION: u16 = 2;
    pub const BLOCK_SIZE: u16 = 3;
}

/// Transmission flags: what an export can do.
#[allow(missing_docs, reason = "the protocol's own names")]
pub mod flag {
    pub const HAS_FLAGS: u16 = 1 << 0;
    pub const READ_ONLY: u16 = 1 << 1;
    pub const SEND_FLUSH: u16 = 1 << 2;
    pub const SEND_FUA: u16 = 1 << 3;
    pub const ROTATIONAL: u16 = 1 << 4;
    pub const SEND_TRIM: u16 = 1 << 5;
    pub const SEND_WRITE_ZEROES: u16 = 1 << 6;
    pub const SEND_DF: u16 = 1 << 7;
    pub const CAN_MULTI_CONN: u16 = 1 << 8;
    pub const SEND_RESIZE: u16 = 1 << 9;
    pub const SEND_CACHE: u16 = 1 << 10;
    pub const SEND_FAST_ZERO: u16 = 1 << 11;
    pub const BLOCK_STATUS_PAYLOAD: u16 = 1 << 12;
}

/// Flags of a request.
#[allow(missing_docs, reason = "the protocol's own names")]
pub mod command_flag {
    pub const FUA: u16 = 1 << 0;
    pub const NO_HOLE: u16 = 1 << 1;
    pub const DF: u16 = 1 << 2;
    pub const REQ_ONE: u16 = 1 << 3;
    pub const FAST_ZERO: u16 = 1 << 4;
    pub const PAYLOAD_LEN: u16 = 1 << 5;
}

/// Types of chunks in a structured reply; an error has bit 15 set.
#[allow(missing_docs, reason = "the protocol's own names")]
pub mod chunk {
    pub const NONE: u16 = 0;
    pub const OFFSET_DATA: u16 = 1;
    pub const OFFSET_HOLE: u16 = 2;
    pub const BLOCK_STATUS: u16 = 5;
    pub const BLOCK_STATUS_EXT: u16 = 6;
    pub const ERROR: u16 = (1 << 15) + 1;
    pub const ERROR_OFFSET: u16 = (1 << 15) + 2;
    /// The flag of a reply's last chunk.
    pub const DONE: u16 = 1 << 0;
}

/// Error codes of the transmission phase; they are not `errno`, though most look like it.
#[allow(missing_docs, reason = "the protocol's own names")]
pub mod error {
    pub const EPERM: u32 = 1;
    pub const EIO: u32 = 5;
    pub const ENOMEM: u32 = 12;
    pub const EINVAL: u32 = 22;
    pub const ENOSPC: u32 = 28;
    pub const EOVERFLOW: u32 = 75;
    pub const ENOTSUP: u32 = 95;
    pub const ESHUTDOWN: u32 = 108;
}

/// What a request asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "the protocol's own names")]
pub enum Command {
    Read,
    Write,
    Disconnect,
    Flush,
    Trim,
    Cache,
    WriteZeroes,
    BlockStatus,
    /// A command that the protocol has no name for: refused, and no reason to hang up.
    Unknown(u16),
}

impl Command {
    /// The command with this number.
    pub const fn from_wire(number: u16) -> Command {
        match number {
            0 => Command::Read,
            1 => Command::Write,
            2 => Command::Disconnect,
            3 => Command::Flush,
            4 => Command::Trim,
            5 => Command::Cache,
            6 => Command::WriteZeroes,
            7 => Command::BlockStatus,
            other => Command::Unknown(other),
        }
    }
}

/// How requests and replies are laid out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Headers {
    /// Requests of 28 bytes, simple replies.
    Simple,
    /// Requests of 28 bytes; a READ and a BLOCK_STATUS are answered in chunks, others may be.
    Structured,
    /// Requests and chunks with headers of 32 bytes and 64 bits of length; no simple replies.
    Extended,
}

impl Headers {
    /// Bytes of a request's header.
    pub const fn request(self) -> usize {
        match self {
            Headers::Simple | Headers::Structured => 28,
            Headers::Extended => REQUEST_HEADER,
        }
    }
}

/// A request's header as the client sent it: nothing in it is checked but the magic.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    /// Bits of [`command_flag`], unknown ones too.
    pub flags: u16,
    /// What is asked for.
    pub command: Command,
    /// The client's name for the request, echoed in every reply. Two requests may share one.
    pub cookie: u64,
    /// First byte of the range.
    pub offset: u64,
    /// Bytes in the range; of the payload, where the flag PAYLOAD_LEN says so.
    pub length: u64,
    /// Bytes that follow the header, whether the request is allowed or not.
    pub payload: u64,
}

/// The bytes are not a request: the client has lost its place, or is none.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("request begins with {0:#010x}, which is none")]
pub struct BadMagic(pub u32);

impl Request {
    /// Takes a header apart; of the shorter kind the last bytes mean nothing.
    pub fn decode(headers: Headers, header: &[u8; REQUEST_HEADER]) -> Result<Request, BadMagic> {
        let [m0, m1, m2, m3, f0, f1, t0, t1, rest @ ..] = *header;
        let [c0, c1, c2, c3, c4, c5, c6, c7, rest @ ..] = rest;
        let [o0, o1, o2, o3, o4, o5, o6, o7, length @ ..] = rest;
        let [l0, l1, l2, l3, ..] = length;
        let magic = u32::from_be_bytes([m0, m1, m2, m3]);
        let command = Command::from_wire(u16::from_be_bytes([t0, t1]));
        let flags = u16::from_be_bytes([f0, f1]);
        let (wanted, length, has_payload) = match headers {
            Headers::Simple | Headers::Structured => {
                let length = u32::from_be_bytes([l0, l1, l2, l3]).into();
                (REQUEST_MAGIC, length, command == Command::Write)
            }
            Headers::Extended => {
                // qemu's client (10.0) leaves the flag of its writes out, and sends what it is to write.
                let flagged = flags & command_flag::PAYLOAD_LEN != 0;
                let has_payload = flagged || command == Command::Write;
                (EXTENDED_REQUEST_MAGIC, u64::from_be_bytes(length), has_payload)
            }
        };
        if magic != wanted {
            return Err(BadMagic(magic));
        }
        Ok(Request {
            flags,
            command,
            cookie: u64::from_be_bytes([c0, c1, c2, c3, c4, c5, c6, c7]),
            offset: u64::from_be_bytes([o0, o1, o2, o3, o4, o5, o6, o7]),
            length,
            payload: if has_payload { length } else { 0 },
        })
    }
}

/// A place in a structured reply.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// More chunks follow for the same request.
    Middle,
    /// The reply's last chunk: nothing can fail any more.
    Last,
}

/// The first bytes of a reply, or all of it.
#[derive(Clone, Copy)]
pub struct Head {
    bytes: [u8; HOLE_CHUNK],
    len: usize,
}

impl std::ops::Deref for Head {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.bytes[..self.len]
    }
}

impl Head {
    const EMPTY: Head = Head { bytes: [0; HOLE_CHUNK], len: 0 };

    /// Appends a field. What is appended in all is known at each place, and fits.
    fn put<const N: usize>(&mut self, field: [u8; N]) {
        self.bytes[self.len..self.len + N].copy_from_slice(&field);
        self.len += N;
    }
}

/// Whom a reply answers, and how.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Answer {
    /// How it is laid out.
    pub headers: Headers,
    /// The request's.
    pub cookie: u64,
    /// The request's.
    pub offset: u64,
}

impl Answer {
    /// A simple reply; `error` 0 is success, and then a READ's data follows.
    fn simple(&self, error: u32) -> Head {
        let mut head = Head::EMPTY;
        head.put(SIMPLE_REPLY_MAGIC.to_be_bytes());
        head.put(error.to_be_bytes());
        head.put(self.cookie.to_be_bytes());
        head
    }

    /// Success without data, of what is no READ.
    pub fn done(&self) -> Head {
        match self.headers {
            Headers::Simple => self.simple(0),
            Headers::Structured | Headers::Extended => self.chunk(Place::Last, chunk::NONE, 0),
        }
    }

    /// What comes before `len` bytes from `offset` on that were asked for by a READ; `len` is neither 0 nor above
    /// [`MAX_PAYLOAD`]. Without chunks, all that was asked for.
    pub fn data(&self, place: Place, offset: u64, len: u32) -> Head {
        debug_assert!(len > 0 && len <= MAX_PAYLOAD, "a data chunk of {len} bytes");
        if self.headers == Headers::Simple {
            return self.simple(0);
        }
        let mut head = self.chunk(place, chunk::OFFSET_DATA, len + 8);
        head.put(offset.to_be_bytes());
        head
    }

    /// Says that the `len` bytes from `offset` on are zeros. Only where there are chunks.
    pub fn hole(&self, place: Place, offset: u64, len: u32) -> Head {
        debug_assert!(len > 0 && self.headers != Headers::Simple, "a hole of {len} bytes");
        let mut head = self.chunk(place, chunk::OFFSET_HOLE, 12);
        head.put(offset.to_be_bytes());
        head.put(len.to_be_bytes());
        head
    }

    /// Appends the failure of a whole request, with a message for people (cut to [`MAX_STRING`]) where chunks
    /// can carry one. It is the reply's end. `error` is not 0.
    pub fn failure(&self, error: u32, message: &str, output: &mut Vec<u8>) {
        debug_assert!(error != 0, "an error without a code");
        if self.headers == Headers::Simple {
            output.extend_from_slice(&self.simple(error));
            return;
        }
        let message = displayable(message);
        let len = 6 + message.len() as u32;
        output.extend_from_slice(&self.chunk(Place::Last, chunk::ERROR, len));
        output.extend(error.to_be_bytes());
        output.extend((message.len() as u16).to_be_bytes());
        output.extend(message.as_bytes());
    }

    /// Appends what `context` says of the `length` bytes asked for, as `extents` have it: neighbours of one state
    /// are merged, nothing reaches past `length`, at most `limit` descriptors (1 for REQ_ONE). Neither `extents`
    /// nor `length` nor `limit` is empty or 0. Only where there are chunks.
    pub fn status(
        &self,
        place: Place,
        context: Context,
        extents: &[Extent],
        length: u64,
        limit: usize,
        output: &mut Vec<u8>,
    ) {
        let wide = self.headers == Headers::Extended;
        let start = output.len();
        // Its length is known once it is there.
        output.extend_from_slice(&self.chunk(place, chunk::NONE, 0));
        let payload = output.len();
        output.extend(context.id().to_be_bytes());
        if wide {
            output.extend(0_u32.to_be_bytes());
        }
        let mut count: u32 = 0;
        for (len, state) in runs(context, extents, length).take(limit) {
            count += 1;
            if wide {
                output.extend(len.to_be_bytes());
                output.extend(u64::from(state).to_be_bytes());
                continue;
            }
            // A run too long for 32 bits is cut to a multiple of 4096, and nothing can follow it.
            let told = u32::try_from(len).unwrap_or(u32::MAX - (PREFERRED_BLOCK - 1));
            output.extend(told.to_be_bytes());
            output.extend(state.to_be_bytes());
            if u64::from(told) != len {
                break;
            }
        }
        debug_assert!(count > 0, "a status without a descriptor");
        if wide {
            output[payload + 4..payload + 8].copy_from_slice(&count.to_be_bytes());
        }
        let kind = if wide { chunk::BLOCK_STATUS_EXT } else { chunk::BLOCK_STATUS };
        let head = self.chunk(place, kind, (output.len() - payload) as u32);
        output[start..payload].copy_from_slice(&head);
    }

    /// A chunk's header.
    fn chunk(&self, place: Place, kind: u16, len: u32) -> Head {
        let extended = self.headers == Headers::Extended;
        let magic = if extended { EXTENDED_CHUNK_MAGIC } else { CHUNK_MAGIC };
        let flags = if place == Place::Last { chunk::DONE } else { 0 };
        let mut head = Head::EMPTY;
        head.put(magic.to_be_bytes());
        head.put(flags.to_be_bytes());
        head.put(kind.to_be_bytes());
        head.put(self.cookie.to_be_bytes());
        if extended {
            head.put(self.offset.to_be_bytes());
            head.put(u64::from(len).to_be_bytes());
        } else {
            head.put(len.to_be_bytes());
        }
        head
    }
}

/// The first `length` bytes of `extents` as (bytes, state), neighbours of one state merged.
fn runs(context: Context, extents: &[Extent], length: u64) -> impl Iterator<Item = (u64, u32)> {
    let mut rest = length;
    let mut clipped = extents
        .iter()
        .map_while(move |extent| {
            let len = extent.len.min(rest);
            rest -= len;
            (len > 0).then_some((len, context.state(extent)))
        })
        .peekable();
    std::iter::from_fn(move || {
        let (mut len, state) = clipped.next()?;
        while let Some((more, _)) = clipped.next_if(|(_, same)| *same == state) {
            len += more;
        }
        Some((len, state))
    })
}

/// A message as the protocol allows it: without NULs from the first on, at most [`MAX_STRING`] bytes.
pub fn displayable(message: &str) -> &str {
    let message = message.split('\0').next().unwrap_or_default();
    &message[..message.floor_char_boundary(MAX_STRING)]
}

#[cfg(test)]
mod tests;
