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
    let read = |chunks| Ok(Task::Read { offset, len: 5, chunks });
    assert_eq!(of(Command::Read, command_flag::DF), read(Chunks::One));
    assert_eq!(of(Command::Read, command_flag::FUA), read(Chunks::Many));
    let simple = Terms::new(INFO, Headers::Simple, Contexts::default());
    let plain = Task::of(&ask(Command::Read, 0, 3, 5), &[], INFO, &simple);
    assert_eq!(plain, read(Chunks::One), "who knows no chunks");
    let durability = Durability::Durable;
    assert_eq!(
        of(Command::Write, command_flag::FUA),
        Ok(Task::Write { offset, len: 5, durability })
    );
    assert_eq!(of(Command::Trim, command_flag::FUA), Ok(Task::Trim { offset, len, durability }));
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
    let status = |len, contexts, limit| Task::BlockStatus { offset: 4096, len, contexts, limit };
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
    let provision =
        |flags| match Task::of(&ask(Command::WriteZeroes, flags, 0, 512), &[], INFO, &simple(INFO))
        {
            Ok(Task::WriteZeroes { provision, .. }) => provision,
            other => panic!("{other:?}"),
        };
    let (fast, keep) = (command_flag::FAST_ZERO, command_flag::NO_HOLE);
    assert_eq!([provision(0), provision(fast)], [Provision::Release; 2]);
    assert_eq!([provision(keep), provision(keep | fast)], [Provision::Keep, Provision::KeepIfFast]);
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
