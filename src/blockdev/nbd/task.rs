//! What a request may ask of an export: from the header as sent to a task that can be served.
//!
//! Invariants:
//! - A [`Task`] lies within the export, carries only flags that mean something to it, and moves at
//!   most `MAX_PAYLOAD` bytes.
//! - Lengths in a task are never 0: a request of no bytes that breaks no other rule is
//!   [`Task::Nothing`], answered as done.
//!
//! Pure: the caller drains a refused WRITE's payload.

use super::{
    context::Contexts,
    wire::{Command, Headers, MAX_DESCRIPTORS, MAX_PAYLOAD, Request, command_flag, error, flag},
};
use crate::{
    blockdev::{Info, Provision},
    units::check_range,
};

/// A request that may be served.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Task {
    /// Answer with `len` bytes.
    Read {
        /// First byte.
        offset: u64,
        /// Bytes, 1 to `MAX_PAYLOAD`.
        len: u32,
        /// How many chunks they may come in.
        chunks: Chunks,
    },
    /// Write the `len` bytes that follow the header.
    Write {
        /// First byte.
        offset: u64,
        /// Bytes, 1 to `MAX_PAYLOAD`.
        len: u32,
        /// When to answer.
        durability: Durability,
    },
    /// Answer once everything answered before is durable.
    Flush,
    /// The range's content is no longer needed.
    Trim {
        /// First byte.
        offset: u64,
        /// Bytes, at least 1.
        len: u64,
        /// When to answer.
        durability: Durability,
    },
    /// The range will soon be read.
    Cache {
        /// First byte.
        offset: u64,
        /// Bytes, at least 1.
        len: u64,
    },
    /// Make the range read as zeros.
    WriteZeroes {
        /// First byte.
        offset: u64,
        /// Bytes, at least 1.
        len: u64,
        /// What becomes of the space below.
        provision: Provision,
        /// When to answer.
        durability: Durability,
    },
    /// Tell what is known of the range.
    BlockStatus {
        /// First byte.
        offset: u64,
        /// Bytes, at least 1.
        len: u64,
        /// The metadata contexts that are asked for; never none.
        contexts: Contexts,
        /// The most descriptors in the answer, for each context.
        limit: usize,
    },
    /// Finish what is under way, then close; there is no answer.
    Disconnect,
    /// Succeed without doing anything.
    Nothing,
}

/// How data may be laid out that was asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Chunks {
    /// In one: the client knows no chunks, or asked for that.
    One,
    /// In as many as it takes.
    Many,
}

/// When a change may be acknowledged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Durability {
    /// Once it is visible.
    Cached,
    /// Once it would survive a power cut.
    Durable,
}

/// Why a request can't be served; the connection goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// One of [`error`]'s codes.
    pub error: u32,
    /// For people; sent along where replies are structured.
    pub message: &'static str,
}

/// What client and server agreed on for one connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Terms {
    /// The transmission flags that the client was sent.
    pub flags: u16,
    /// How requests and replies are laid out.
    pub headers: Headers,
    /// The metadata contexts that the client chose for this export; none without chunks.
    pub contexts: Contexts,
}

impl Terms {
    /// Terms for an export like `info`. Every connection sees one cache, and a flush on any of them
    /// covers the writes of all: that is the contract of a `Device`, hence MULTI_CONN.
    pub fn new(info: Info, headers: Headers, contexts: Contexts) -> Terms {
        let mut flags = flag::HAS_FLAGS
            | flag::SEND_FLUSH
            | flag::SEND_FUA
            | flag::CAN_MULTI_CONN
            | flag::SEND_CACHE;
        flags |= match info.read_only {
            true => flag::READ_ONLY,
            false => flag::SEND_TRIM | flag::SEND_WRITE_ZEROES | flag::SEND_FAST_ZERO,
        };
        if info.rotational {
            flags |= flag::ROTATIONAL;
        }
        let contexts = match headers {
            Headers::Simple => Contexts::default(),
            Headers::Structured | Headers::Extended => {
                flags |= flag::SEND_DF;
                contexts
            }
        };
        if headers == Headers::Extended && !contexts.is_empty() {
            flags |= flag::BLOCK_STATUS_PAYLOAD;
        }
        Terms { flags, headers, contexts }
    }

    /// The flags that may come with a command.
    fn allowed(&self, command: Command) -> u16 {
        let special = match command {
            Command::Read if self.flags & flag::SEND_DF != 0 => command_flag::DF,
            Command::WriteZeroes if self.flags & flag::SEND_FAST_ZERO != 0 => {
                command_flag::NO_HOLE | command_flag::FAST_ZERO
            }
            Command::WriteZeroes => command_flag::NO_HOLE,
            Command::BlockStatus if self.flags & flag::BLOCK_STATUS_PAYLOAD != 0 => {
                command_flag::REQ_ONE | command_flag::PAYLOAD_LEN
            }
            Command::BlockStatus => command_flag::REQ_ONE,
            Command::Write if self.headers == Headers::Extended => command_flag::PAYLOAD_LEN,
            _ => 0,
        };
        // Clients are known to set FUA on commands that write nothing; it must be accepted.
        special | if self.flags & flag::SEND_FUA != 0 { command_flag::FUA } else { 0 }
    }
}

impl Task {
    /// What `request` asks of an export that is like `info` now. `filter` is the payload of a BLOCK_STATUS
    /// that has one.
    pub fn of(
        request: &Request,
        filter: &[u8],
        info: Info,
        terms: &Terms,
    ) -> Result<Task, Refusal> {
        let Request { flags, command, offset, length: len, .. } = *request;
        if flags & !terms.allowed(command) != 0 && command != Command::Disconnect {
            return refuse(error::EINVAL, "a flag that this command does not take here");
        }
        let durability = match flags & command_flag::FUA {
            0 => Durability::Cached,
            _ => Durability::Durable,
        };
        let task = match command {
            Command::Read => {
                within(request, info, error::EINVAL)?;
                let in_one = terms.headers == Headers::Simple || flags & command_flag::DF != 0;
                let chunks = if in_one { Chunks::One } else { Chunks::Many };
                Task::Read { offset, len: payload(request, terms)?, chunks }
            }
            Command::Write => {
                writable(info)?;
                within(request, info, error::ENOSPC)?;
                Task::Write { offset, len: payload(request, terms)?, durability }
            }
            Command::Trim => {
                writable(info)?;
                within(request, info, error::EINVAL)?;
                Task::Trim { offset, len, durability }
            }
            Command::WriteZeroes => {
                writable(info)?;
                within(request, info, error::ENOSPC)?;
                // Giving space back takes no writing of zeros: it is as fast as can be.
                let fast = flags & command_flag::FAST_ZERO != 0;
                let provision = match flags & command_flag::NO_HOLE {
                    0 => Provision::Release,
                    _ if fast => Provision::KeepIfFast,
                    _ => Provision::Keep,
                };
                Task::WriteZeroes { offset, len, provision, durability }
            }
            Command::Cache => {
                within(request, info, error::EINVAL)?;
                Task::Cache { offset, len }
            }
            Command::BlockStatus => {
                if terms.contexts.is_empty() {
                    return refuse(error::EINVAL, "no metadata context was chosen for this export");
                }
                let (len, contexts) = match flags & command_flag::PAYLOAD_LEN {
                    0 => (len, terms.contexts),
                    _ => filtered(filter, terms.contexts)?,
                };
                within(&Request { length: len, ..*request }, info, error::EINVAL)?;
                if len == 0 {
                    // There is no descriptor of 0 bytes to answer with.
                    return refuse(error::EINVAL, "a status of no bytes");
                }
                let limit = match flags & command_flag::REQ_ONE {
                    0 => MAX_DESCRIPTORS,
                    _ => 1,
                };
                return Ok(Task::BlockStatus { offset, len, contexts, limit });
            }
            Command::Flush if offset == 0 && len == 0 => return Ok(Task::Flush),
            Command::Flush => {
                return refuse(error::EINVAL, "a flush has neither offset nor length");
            }
            Command::Disconnect => return Ok(Task::Disconnect),
            Command::Unknown(_) => return refuse(error::EINVAL, "unknown command"),
        };
        Ok(if len == 0 { Task::Nothing } else { task })
    }
}

/// The length and the contexts that the payload of a BLOCK_STATUS asks for.
fn filtered(filter: &[u8], chosen: Contexts) -> Result<(u64, Contexts), Refusal> {
    let (len, ids) = match filter.split_first_chunk() {
        Some((len, ids)) if !ids.is_empty() && ids.len().is_multiple_of(4) => {
            (u64::from_be_bytes(*len), ids)
        }
        _ => {
            return refuse(
                error::EINVAL,
                "a status whose payload is no length and list of contexts",
            );
        }
    };
    let of = |id: &[u8]| chosen.iter().find(|context| context.id().to_be_bytes() == *id);
    let contexts: Option<Contexts> = ids.chunks(4).map(of).collect();
    match contexts {
        Some(contexts) if contexts.len() == ids.len() / 4 => Ok((len, contexts)),
        _ => refuse(error::EINVAL, "a status of contexts that were not chosen, or of one twice"),
    }
}

fn writable(info: Info) -> Result<(), Refusal> {
    match info.read_only {
        true => refuse(error::EPERM, "the export is read-only"),
        false => Ok(()),
    }
}

/// Whether the range lies within the export; `beyond` is the code if it does not.
fn within(request: &Request, info: Info, beyond: u32) -> Result<(), Refusal> {
    match check_range(request.offset, request.length, info.size) {
        Ok(_) => Ok(()),
        Err(_) => refuse(beyond, "the range reaches past the end of the export"),
    }
}

/// The request's length, if that much data may travel in one request.
fn payload(request: &Request, terms: &Terms) -> Result<u32, Refusal> {
    match u32::try_from(request.length) {
        Ok(len) if len <= MAX_PAYLOAD => Ok(len),
        // The protocol has EOVERFLOW for long reads, and only for clients that know chunks.
        _ if request.command == Command::Read && terms.headers != Headers::Simple => {
            refuse(error::EOVERFLOW, "more than 32 MiB in one read; ask for less at a time")
        }
        _ => refuse(error::EINVAL, "more than 32 MiB in one request; ask for less at a time"),
    }
}

fn refuse<T>(error: u32, message: &'static str) -> Result<T, Refusal> {
    Err(Refusal { error, message })
}

#[cfg(test)]
mod tests;
