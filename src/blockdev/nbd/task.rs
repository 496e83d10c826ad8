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
mod tests {
    use super::*;
    use crate::blockdev::nbd::Context;

    const SIZE: u64 = 64 << 20;
    const INFO: Info = Info { size: SIZE, read_only: false, rotational: false };

    fn ask(command: Command, flags: u16, offset: u64, length: u64) -> Request {
        let payload = if command == Command::Write { length } else { 0 };
        Request { flags, command, cookie: 1, offset, length, payload }
    }

    fn code(request: Request, info: Info, terms: &Terms) -> u32 {
        Task::of(&request, &[], info, terms).err().map_or(0, |refusal| refusal.error)
    }

    fn allocation() -> Contexts {
        [Context::Allocation].into_iter().collect()
    }

    fn simple(info: Info) -> Terms {
        Terms::new(info, Headers::Simple, Contexts::default())
    }

    fn structured(info: Info) -> Terms {
        Terms::new(info, Headers::Structured, allocation())
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
        let terms = structured(INFO);
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
        let terms = structured(info);
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
        let (structured, simple) = (structured(INFO), simple(INFO));
        for command in ALL {
            for bit in 0..16 {
                let flag = 1 << bit;
                let fits = match command {
                    Command::Disconnect => true,
                    Command::Unknown(_) => false,
                    _ if flag == command_flag::FUA => true,
                    Command::Read => flag == command_flag::DF,
                    Command::WriteZeroes => {
                        flag == command_flag::NO_HOLE || flag == command_flag::FAST_ZERO
                    }
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
        let (structured, simple) = (structured(info), simple(info));
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
            let none = Task::of(&ask(command, 0, 5, 0), &[], info, &structured);
            assert_eq!(none.is_err(), status, "{command:?} of nothing");
            assert!(status || none == Ok(Task::Nothing));
        }
        assert_eq!(code(ask(Command::Flush, 0, 0, 1), INFO, &simple), error::EINVAL);
        assert_eq!(code(ask(Command::Flush, 0, 1, 0), INFO, &simple), error::EINVAL);
    }

    #[test]
    fn tasks_carry_what_the_flags_say() {
        let terms = structured(INFO);
        let of = |command, flags| Task::of(&ask(command, flags, 3, 5), &[], INFO, &terms);
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
            Ok(Task::BlockStatus { offset, len, contexts: allocation(), limit: 1 })
        );
        assert_eq!(
            of(Command::BlockStatus, 0),
            Ok(Task::BlockStatus { offset, len, contexts: allocation(), limit: MAX_DESCRIPTORS })
        );
    }

    #[test]
    fn what_extended_requests_ask_for() {
        let terms = |contexts| Terms::new(INFO, Headers::Extended, contexts);
        let both = terms(Contexts::all());
        let of = |command, flags, len, filter: &[u8], terms: &Terms| {
            let request = ask(command, flags, 4096, len);
            Task::of(&request, filter, INFO, terms).map_err(|refusal| refusal.error)
        };
        let payload = command_flag::PAYLOAD_LEN;
        assert!(matches!(of(Command::Write, payload, 512, &[], &both), Ok(Task::Write { .. })));
        // As qemu's client has it.
        assert!(matches!(of(Command::Write, 0, 512, &[], &both), Ok(Task::Write { .. })));
        for command in [Command::Read, Command::Flush, Command::Trim, Command::WriteZeroes] {
            assert_eq!(of(command, payload, 512, &[], &both), Err(error::EINVAL), "{command:?}");
        }
        let status =
            |len, contexts, limit| Task::BlockStatus { offset: 4096, len, contexts, limit };
        let all = status(512, Contexts::all(), MAX_DESCRIPTORS);
        assert_eq!(of(Command::BlockStatus, 0, 512, &[], &both), Ok(all));
        let filter = |len: u64, ids: &[u32]| -> Vec<u8> {
            let ids = ids.iter().flat_map(|id| id.to_be_bytes());
            len.to_be_bytes().into_iter().chain(ids).collect()
        };
        let ask = |filter: &[u8], terms: &Terms| {
            let flags = payload | command_flag::REQ_ONE;
            of(Command::BlockStatus, flags, filter.len() as u64, filter, terms)
        };
        let source: Contexts = [Context::Source].into_iter().collect();
        assert_eq!(ask(&filter(1024, &[2]), &both), Ok(status(1024, source, 1)));
        assert_eq!(ask(&filter(1024, &[2, 1]), &both), Ok(status(1024, Contexts::all(), 1)));
        let refused = [
            filter(1024, &[]),
            filter(1024, &[1, 1]),
            filter(1024, &[3]),
            filter(0, &[1]),
            filter(SIZE, &[1]),
            filter(u64::MAX, &[1]),
            filter(1024, &[1])[..11].to_vec(),
            filter(1024, &[1])[..7].to_vec(),
            vec![],
        ];
        for filter in refused {
            assert_eq!(ask(&filter, &both), Err(error::EINVAL), "{filter:?}");
        }
        assert_eq!(ask(&filter(1024, &[2]), &terms(allocation())), Err(error::EINVAL));
        assert_eq!(ask(&filter(1024, &[1]), &terms(Contexts::default())), Err(error::EINVAL));
        assert_eq!(ask(&filter(1024, &[1]), &structured(INFO)), Err(error::EINVAL));
    }

    #[test]
    fn zeroing_is_fast_where_that_is_asked() {
        let provision = |flags| match Task::of(
            &ask(Command::WriteZeroes, flags, 0, 512),
            &[],
            INFO,
            &simple(INFO),
        ) {
            Ok(Task::WriteZeroes { provision, .. }) => provision,
            other => panic!("{other:?}"),
        };
        let (fast, keep) = (command_flag::FAST_ZERO, command_flag::NO_HOLE);
        assert_eq!([provision(0), provision(fast)], [Provision::Release; 2]);
        assert_eq!(
            [provision(keep), provision(keep | fast)],
            [Provision::Keep, Provision::KeepIfFast]
        );
    }

    #[test]
    fn terms_tell_what_the_export_can() {
        let flags = |read_only, rotational, headers, contexts| {
            Terms::new(Info { size: SIZE, read_only, rotational }, headers, contexts).flags
        };
        let none = Contexts::default();
        // HAS_FLAGS, FLUSH, FUA, TRIM, WRITE_ZEROES, MULTI_CONN, CACHE, FAST_ZERO.
        assert_eq!(flags(false, false, Headers::Simple, none), 0b1101_0110_1101);
        assert_eq!(flags(true, false, Headers::Simple, allocation()), 0b101_0000_1111);
        assert_eq!(flags(true, true, Headers::Structured, allocation()), 0b101_1001_1111);
        assert_eq!(flags(true, true, Headers::Extended, none), 0b101_1001_1111);
        assert_eq!(flags(true, true, Headers::Extended, allocation()), 0b1_0101_1001_1111);
        let terms = Terms::new(INFO, Headers::Simple, allocation());
        assert!(terms.contexts.is_empty(), "no chunks, no status");
    }
}
