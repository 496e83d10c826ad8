//! Generic netlink, as much of it as a client of one family needs: messages, attributes, families.
//!
//! Invariants:
//! - Decoding never panics and takes no length on trust: what does not fit is [`Malformed`].
//!   Attributes and messages that nobody asked for are passed over.
//! - Encoding trusts its caller with lengths: what is sent was bounded before.
//!
//! Pure but for [`Socket`], the thin shell around a socket.
//!
//! Written here rather than taken from a crate: the bytes are few, and `neli`, the crate
//! that fits best, brings some thirty others along.

#![expect(clippy::host_endian_bytes, reason = "netlink speaks the host's byte order")]

use nix::errno::Errno;

mod socket;

pub use socket::{Failure, Socket};

/// Bytes of a netlink message's header.
const HEADER: usize = 16;
/// Bytes of generic netlink's own header: command, version, two unused.
const GENERIC: usize = 4;
/// Bytes of an attribute's header: length and kind.
const ATTRIBUTE: usize = 4;
/// The kind's two high bits say how the data is made; the rest is the kind.
const KIND: u16 = 0x3fff;
const NESTED: u16 = 0x8000;

const NOOP: u16 = 1;
const ERROR: u16 = 2;
const DONE: u16 = 3;
const OVERRUN: u16 = 4;

const REQUEST_AND_ACK: u16 = 1 | 4;
/// The acknowledgement repeats the request's header only, not its data.
const CAPPED: u16 = 0x100;
/// The acknowledgement ends in attributes of its own.
const ACK_TLVS: u16 = 0x200;
/// The attribute of an acknowledgement that is a message for people.
const ACK_MESSAGE: u16 = 1;

/// The family that tells of families, and its one command used here.
const CONTROL: u16 = 16;
const GET_FAMILY: u8 = 3;
const CONTROL_VERSION: u8 = 2;
const FAMILY_ID: u16 = 1;
const FAMILY_NAME: u16 = 2;

/// A request to a family, built attribute by attribute.
#[derive(Clone, Debug)]
pub struct Message {
    bytes: Vec<u8>,
}

impl Message {
    /// A request without attributes.
    pub fn new(family: u16, command: u8, version: u8) -> Message {
        let mut bytes = vec![0; HEADER + GENERIC];
        bytes[4..6].copy_from_slice(&family.to_ne_bytes());
        bytes[6..8].copy_from_slice(&REQUEST_AND_ACK.to_ne_bytes());
        bytes[HEADER] = command;
        bytes[HEADER + 1] = version;
        Message { bytes }
    }

    /// Adds a number of four bytes.
    #[must_use]
    pub fn u32(self, kind: u16, value: u32) -> Message {
        self.attribute(kind, &value.to_ne_bytes())
    }

    /// Adds a number of eight bytes.
    #[must_use]
    pub fn u64(self, kind: u16, value: u64) -> Message {
        self.attribute(kind, &value.to_ne_bytes())
    }

    /// Adds a string, with the NUL that the kernel wants behind it.
    #[must_use]
    pub fn string(self, kind: u16, value: &str) -> Message {
        let mut data = value.as_bytes().to_vec();
        data.push(0);
        self.attribute(kind, &data)
    }

    /// Adds an attribute that holds what `fill` adds.
    #[must_use]
    pub fn nested(mut self, kind: u16, fill: impl FnOnce(Message) -> Message) -> Message {
        let start = self.bytes.len();
        self = fill(self.attribute(kind | NESTED, &[]));
        let len = attribute_len(self.bytes.len() - start);
        self.bytes[start..start + 2].copy_from_slice(&len.to_ne_bytes());
        self
    }

    /// Its bytes so far; length and sequence number are filled in when it is sent.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// The bytes to send.
    fn seal(mut self, sequence: u32) -> Vec<u8> {
        let len = self.bytes.len() as u32;
        self.bytes[..4].copy_from_slice(&len.to_ne_bytes());
        self.bytes[8..12].copy_from_slice(&sequence.to_ne_bytes());
        self.bytes
    }

    fn attribute(mut self, kind: u16, data: &[u8]) -> Message {
        self.bytes.extend(attribute_len(ATTRIBUTE + data.len()).to_ne_bytes());
        self.bytes.extend(kind.to_ne_bytes());
        self.bytes.extend(data);
        self.bytes.resize(aligned(self.bytes.len()), 0);
        self
    }
}

/// The length field of an attribute.
///
/// # Panics
/// If it is too long for one: callers bound what they send.
fn attribute_len(len: usize) -> u16 {
    match u16::try_from(len) {
        Ok(len) => len,
        Err(_) => panic!("an attribute of {len} bytes was not refused before"),
    }
}

/// What the kernel sent is not netlink.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{what} of {claimed} bytes where {there} are")]
pub struct Malformed {
    what: &'static str,
    claimed: usize,
    there: usize,
}

/// One message from the kernel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Received<'a> {
    /// An answer.
    Data {
        /// The family's number.
        family: u16,
        /// The request's number.
        sequence: u32,
        /// The family's command.
        command: u8,
        /// What it says.
        attributes: Attributes<'a>,
    },
    /// The end of a request: done, or refused.
    Ack {
        /// The request's number.
        sequence: u32,
        /// Why it was refused.
        result: Result<(), Refused>,
    },
}

/// The kernel refused a request.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub struct Refused {
    /// Its reason.
    pub errno: Errno,
    /// Its words, where it has any.
    pub message: Option<String>,
}

impl std::fmt::Display for Refused {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.errno.desc())?;
        match &self.message {
            Some(message) => write!(f, " ({message})"),
            None => Ok(()),
        }
    }
}

/// The messages of a datagram, in order; ends after the first that is malformed.
pub fn messages(datagram: &[u8]) -> impl Iterator<Item = Result<Received<'_>, Malformed>> {
    let mut rest = datagram;
    std::iter::from_fn(move || {
        loop {
            if rest.is_empty() {
                return None;
            }
            match message(&mut rest) {
                Ok(Some(received)) => return Some(Ok(received)),
                Ok(None) => (),
                Err(malformed) => {
                    rest = &[];
                    return Some(Err(malformed));
                }
            }
        }
    })
}

/// Takes one message; `None` for one that says nothing.
fn message<'a>(rest: &mut &'a [u8]) -> Result<Option<Received<'a>>, Malformed> {
    let there = rest.len();
    let claimed = u32_at(rest, 0).unwrap_or(0) as usize;
    if claimed < HEADER || claimed > there {
        return Err(Malformed { what: "a message", claimed, there });
    }
    let (message, _) = rest.split_at(claimed);
    *rest = &rest[aligned(claimed).min(there)..];
    let (header, data) = message.split_at(HEADER);
    let half = |at: usize| u16::from_ne_bytes([header[at], header[at + 1]]);
    let (family, flags) = (half(4), half(6));
    let sequence = u32_at(header, 8).unwrap_or(0);
    match family {
        NOOP | DONE | OVERRUN => Ok(None),
        ERROR => {
            let short = Malformed { what: "an acknowledgement", claimed: 20, there: data.len() };
            let code = u32_at(data, 0).ok_or(short)? as i32;
            let result = match code {
                0 => Ok(()),
                // The kernel sends it negative; a positive one would be nonsense, and still a no.
                code => Err(Refused {
                    errno: Errno::from_raw(code.checked_abs().unwrap_or(libc::EPROTO)),
                    message: ack_message(data, flags),
                }),
            };
            Ok(Some(Received::Ack { sequence, result }))
        }
        _ => match data {
            [command, _, _, _, attributes @ ..] => Ok(Some(Received::Data {
                family,
                sequence,
                command: *command,
                attributes: Attributes { rest: attributes },
            })),
            _ => Err(Malformed { what: "a header", claimed: GENERIC, there: data.len() }),
        },
    }
}

/// The words of a refusal. They are an extra: where they can't be found, there are none.
fn ack_message(data: &[u8], flags: u16) -> Option<String> {
    if flags & ACK_TLVS == 0 {
        return None;
    }
    let repeated = match flags & CAPPED {
        0 => aligned(u32_at(data, 4)? as usize),
        _ => HEADER,
    };
    let attributes = Attributes { rest: data.get(4..)?.get(repeated..)? };
    let text = attributes.find(ACK_MESSAGE).ok()??;
    Some(text_of(text).into_owned())
}

/// Attributes of a message or of another attribute.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Attributes<'a> {
    rest: &'a [u8],
}

impl<'a> Attributes<'a> {
    /// Those that `data` holds.
    pub fn new(data: &'a [u8]) -> Attributes<'a> {
        Attributes { rest: data }
    }

    /// Their bytes.
    pub fn bytes(self) -> &'a [u8] {
        self.rest
    }

    /// The data of the first attribute of this kind.
    pub fn find(self, kind: u16) -> Result<Option<&'a [u8]>, Malformed> {
        for attribute in self {
            let (other, data) = attribute?;
            if other == kind {
                return Ok(Some(data));
            }
        }
        Ok(None)
    }

    /// The first attribute of this kind, a number of four bytes.
    pub fn u32(self, kind: u16) -> Result<Option<u32>, Malformed> {
        let Some(data) = self.find(kind)? else { return Ok(None) };
        let wrong = Malformed { what: "a number", claimed: 4, there: data.len() };
        data.try_into().map(|bytes| Some(u32::from_ne_bytes(bytes))).map_err(|_| wrong)
    }
}

impl<'a> Iterator for Attributes<'a> {
    type Item = Result<(u16, &'a [u8]), Malformed>;

    fn next(&mut self) -> Option<Self::Item> {
        let rest = self.rest;
        if rest.is_empty() {
            return None;
        }
        let there = rest.len();
        let claimed = match rest {
            [a, b, _, _, ..] => usize::from(u16::from_ne_bytes([*a, *b])),
            _ => 0,
        };
        if claimed < ATTRIBUTE || claimed > there {
            self.rest = &[];
            return Some(Err(Malformed { what: "an attribute", claimed, there }));
        }
        self.rest = &rest[aligned(claimed).min(there)..];
        let kind = u16::from_ne_bytes([rest[2], rest[3]]) & KIND;
        Some(Ok((kind, &rest[ATTRIBUTE..claimed])))
    }
}

/// The family's number, of what the control family says; `None` if it tells none. Numbers differ
/// from boot to boot.
fn family_of(attributes: Attributes<'_>) -> Result<Option<u16>, Malformed> {
    let Some(id) = attributes.find(FAMILY_ID)? else { return Ok(None) };
    let wrong = Malformed { what: "a family's number", claimed: 2, there: id.len() };
    Ok(Some(u16::from_ne_bytes(id.try_into().map_err(|_| wrong)?)))
}

/// Up to the first NUL, as text.
fn text_of(data: &[u8]) -> std::borrow::Cow<'_, str> {
    let text = data.split(|byte| *byte == 0).next().unwrap_or_default();
    String::from_utf8_lossy(text)
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    let bytes = bytes.get(at..at.checked_add(4)?)?;
    Some(u32::from_ne_bytes(bytes.try_into().ok()?))
}

/// Messages and attributes begin at multiples of four.
const fn aligned(len: usize) -> usize {
    len.next_multiple_of(4)
}

#[cfg(test)]
mod tests;
