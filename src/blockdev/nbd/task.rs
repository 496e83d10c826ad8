//! What a request may ask of an export: from the header as sent to a task that can be served.
//!
//! Invariants:
//! - A [`Task`] lies within the export, carries only flags that mean something to it, and moves at
//!   most `MAX_PAYLOAD` bytes.
//! - Lengths in a task are never 0: a request of no bytes that breaks no other rule is
//!   [`Task::Nothing`], answered as done.
//!
//! Pure: the caller drains a refused WRITE's payload.

use super::wire::{Command, MAX_DESCRIPTORS, MAX_PAYLOAD, Request, command_flag, error, flag};
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
        /// How many content chunks the answer may have.
        fragments: Fragments,
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
    /// Tell the allocation of the range.
    BlockStatus {
        /// First byte.
        offset: u64,
        /// Bytes, at least 1.
        len: u64,
        /// The metadata context that was negotiated.
        context: u32,
        /// The most descriptors in the answer.
        limit: usize,
    },
    /// Finish what is under way, then close; there is no answer.
    Disconnect,
    /// Succeed without doing anything.
    Nothing,
}

/// How many content chunks may answer a READ.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fragments {
    /// As many as suit.
    Many,
    /// At most one, zeros included.
    One,
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
    /// READ is answered in chunks, never by a simple reply; others may be.
    pub structured: bool,
    /// The id of `base:allocation`, if the client chose it for this export.
    pub allocation: Option<u32>,
}

impl Terms {
    /// Terms for an export like `info`. Every connection sees one cache, and a flush on any of them
    /// covers the writes of all: that is the contract of a `Device`, hence MULTI_CONN.
    pub fn new(info: Info, structured: bool, allocation: Option<u32>) -> Terms {
        let mut flags = flag::HAS_FLAGS
            | flag::SEND_FLUSH
            | flag::SEND_FUA
            | flag::CAN_MULTI_CONN
            | flag::SEND_CACHE;
        flags |= match info.read_only {
            true => flag::READ_ONLY,
            false => flag::SEND_TRIM | flag::SEND_WRITE_ZEROES,
        };
        if info.rotational {
            flags |= flag::ROTATIONAL;
        }
        if structured {
            flags |= flag::SEND_DF;
        }
        Terms { flags, structured, allocation }
    }

    /// The flags that may come with a command.
    const fn allowed(&self, command: Command) -> u16 {
        let special = match command {
            Command::Read if self.flags & flag::SEND_DF != 0 => command_flag::DF,
            Command::WriteZeroes => command_flag::NO_HOLE,
            Command::BlockStatus => command_flag::REQ_ONE,
            _ => 0,
        };
        // Clients are known to set FUA on commands that write nothing; it must be accepted.
        special | if self.flags & flag::SEND_FUA != 0 { command_flag::FUA } else { 0 }
    }
}

impl Task {
    /// What `request` asks of an export that is like `info` now.
    pub fn of(request: &Request, info: Info, terms: &Terms) -> Result<Task, Refusal> {
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
                let fragments = match flags & command_flag::DF {
                    0 => Fragments::Many,
                    _ => Fragments::One,
                };
                Task::Read { offset, len: payload(request, terms)?, fragments }
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
                let provision = match flags & command_flag::NO_HOLE {
                    0 => Provision::Release,
                    _ => Provision::Keep,
                };
                Task::WriteZeroes { offset, len, provision, durability }
            }
            Command::Cache => {
                within(request, info, error::EINVAL)?;
                Task::Cache { offset, len }
            }
            Command::BlockStatus => {
                let Some(context) = terms.allocation else {
                    return refuse(error::EINVAL, "no metadata context was chosen for this export");
                };
                within(request, info, error::EINVAL)?;
                if len == 0 {
                    // There is no descriptor of 0 bytes to answer with.
                    return refuse(error::EINVAL, "a status of no bytes");
                }
                let limit = match flags & command_flag::REQ_ONE {
                    0 => MAX_DESCRIPTORS,
                    _ => 1,
                };
                Task::BlockStatus { offset, len, context, limit }
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
        _ if request.command == Command::Read && terms.structured => {
            refuse(error::EOVERFLOW, "more than 32 MiB in one read; ask for less at a time")
        }
        _ => refuse(error::EINVAL, "more than 32 MiB in one request; ask for less at a time"),
    }
}

fn refuse<T>(error: u32, message: &'static str) -> Result<T, Refusal> {
    Err(Refusal { error, message })
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIZE: u64 = 64 << 20;
    const INFO: Info = Info { size: SIZE, read_only: false, rotational: false };

    fn ask(command: Command, flags: u16, offset: u64, length: u64) -> Request {
        Request { flags, command, cookie: 1, offset, length }
    }

    fn code(request: Request, info: Info, terms: &Terms) -> u32 {
        Task::of(&request, info, terms).err().map_or(0, |refusal| refusal.error)
    }

    const ALL: [Command; 9] = [
        Command::Read,
        Command::Write,
        Command::Disconnect,
        Command::Flush,
        Command::Trim,
        Command::Cache,
        Command::WriteZeroes,
        Command::BlockStatus,
        Command::Unknown(8),
    ];

    #[test]
    fn ranges_are_refused_by_the_table() {
        use error::{EINVAL, ENOSPC};
        let terms = Terms::new(INFO, true, Some(1));
        let table = [
            (Command::Read, EINVAL),
            (Command::Write, ENOSPC),
            (Command::Trim, EINVAL),
            (Command::Cache, EINVAL),
            (Command::WriteZeroes, ENOSPC),
            (Command::BlockStatus, EINVAL),
        ];
        for (command, beyond) in table {
            assert_eq!(code(ask(command, 0, SIZE - 512, 512), INFO, &terms), 0, "{command:?}");
            assert_eq!(code(ask(command, 0, 1, 7), INFO, &terms), 0, "{command:?} unaligned");
            let past = [
                (SIZE - 512, 513),
                (SIZE, 1),
                (u64::MAX, 1),
                (u64::MAX - 511, 512),
                (u64::MAX, u64::from(u32::MAX)),
                (SIZE + 1, 0),
            ];
            for (offset, length) in past {
                let request = ask(command, 0, offset, length);
                assert_eq!(code(request, INFO, &terms), beyond, "{command:?} {offset} {length}");
            }
        }
    }

    #[test]
    fn read_only_exports_refuse_changes_whatever_the_range() {
        let info = Info { read_only: true, ..INFO };
        let terms = Terms::new(info, true, Some(1));
        for command in ALL {
            let writes = matches!(command, Command::Write | Command::Trim | Command::WriteZeroes);
            for offset in [0, SIZE] {
                let got = code(ask(command, 0, offset, 512), info, &terms);
                assert_eq!(got == error::EPERM, writes, "{command:?} at {offset}: {got}");
            }
        }
    }

    #[test]
    fn flags_are_refused_where_they_mean_nothing() {
        let (structured, simple) = (Terms::new(INFO, true, Some(1)), Terms::new(INFO, false, None));
        for command in ALL {
            for bit in 0..16 {
                let flag = 1 << bit;
                let fits = match command {
                    Command::Disconnect => true,
                    Command::Unknown(_) => false,
                    _ if flag == command_flag::FUA => true,
                    Command::Read => flag == command_flag::DF,
                    Command::WriteZeroes => flag == command_flag::NO_HOLE,
                    Command::BlockStatus => flag == command_flag::REQ_ONE,
                    _ => false,
                };
                let length = if command == Command::Flush { 0 } else { 512 };
                let request = ask(command, flag, 0, length);
                let wanted = if fits { 0 } else { error::EINVAL };
                assert_eq!(code(request, INFO, &structured), wanted, "{command:?} flag {flag:#x}");
            }
        }
        assert_eq!(code(ask(Command::Read, command_flag::DF, 0, 1), INFO, &simple), error::EINVAL);
    }

    #[test]
    fn sizes_are_bounded_and_nothing_is_nothing() {
        let info = Info { size: 1 << 40, ..INFO };
        let (structured, simple) = (Terms::new(info, true, Some(1)), Terms::new(info, false, None));
        let max = u64::from(MAX_PAYLOAD);
        let table = [
            (Command::Read, error::EOVERFLOW, error::EINVAL),
            (Command::Write, error::EINVAL, error::EINVAL),
            (Command::Trim, 0, 0),
            (Command::WriteZeroes, 0, 0),
            (Command::Cache, 0, 0),
            (Command::BlockStatus, 0, error::EINVAL),
        ];
        for (command, chunks, no_chunks) in table {
            let status = command == Command::BlockStatus;
            for length in [max + 1, u64::from(u32::MAX)] {
                let request = ask(command, 0, 0, length);
                assert_eq!(code(request, info, &structured), chunks, "{command:?} of {length}");
                assert_eq!(code(request, info, &simple), no_chunks, "{command:?} of {length}");
            }
            assert_eq!(code(ask(command, 0, 0, max), info, &structured), 0);
            let none = Task::of(&ask(command, 0, 5, 0), info, &structured);
            assert_eq!(none.is_err(), status, "{command:?} of nothing");
            assert!(status || none == Ok(Task::Nothing));
        }
        assert_eq!(code(ask(Command::Flush, 0, 0, 1), INFO, &simple), error::EINVAL);
        assert_eq!(code(ask(Command::Flush, 0, 1, 0), INFO, &simple), error::EINVAL);
    }

    #[test]
    fn tasks_carry_what_the_flags_say() {
        let terms = Terms::new(INFO, true, Some(9));
        let of = |command, flags| Task::of(&ask(command, flags, 3, 5), INFO, &terms);
        let (offset, len) = (3, 5);
        assert_eq!(
            of(Command::Read, command_flag::DF),
            Ok(Task::Read { offset, len: 5, fragments: Fragments::One })
        );
        assert_eq!(
            of(Command::Read, command_flag::FUA),
            Ok(Task::Read { offset, len: 5, fragments: Fragments::Many })
        );
        let durability = Durability::Durable;
        assert_eq!(
            of(Command::Write, command_flag::FUA),
            Ok(Task::Write { offset, len: 5, durability })
        );
        assert_eq!(
            of(Command::Trim, command_flag::FUA),
            Ok(Task::Trim { offset, len, durability })
        );
        assert_eq!(
            of(Command::WriteZeroes, command_flag::NO_HOLE),
            Ok(Task::WriteZeroes {
                offset,
                len,
                provision: Provision::Keep,
                durability: Durability::Cached
            })
        );
        assert_eq!(
            of(Command::BlockStatus, command_flag::REQ_ONE),
            Ok(Task::BlockStatus { offset, len, context: 9, limit: 1 })
        );
        assert_eq!(
            of(Command::BlockStatus, 0),
            Ok(Task::BlockStatus { offset, len, context: 9, limit: MAX_DESCRIPTORS })
        );
    }

    #[test]
    fn terms_tell_what_the_export_can() {
        let flags = |read_only, rotational, structured| {
            Terms::new(Info { size: SIZE, read_only, rotational }, structured, None).flags
        };
        // HAS_FLAGS, FLUSH, FUA, TRIM, WRITE_ZEROES, MULTI_CONN, CACHE.
        assert_eq!(flags(false, false, false), 0b101_0110_1101);
        assert_eq!(flags(true, false, false), 0b101_0000_1111);
        assert_eq!(flags(true, true, true), 0b101_1001_1111);
    }
}
