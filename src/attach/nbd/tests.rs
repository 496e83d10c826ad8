//! Invariants checked: commands are these bytes exactly; answers are read whatever they
//! hold; every refusal says what to do.

use std::os::{fd::AsRawFd, unix::net::UnixStream};

use super::*;
use crate::{
    attach::netlink::{Attributes, Message, Refused},
    blockdev::nbd::wire::flag,
};

fn links(count: usize, flags: u16) -> Links {
    let sockets = (0..count).map(|_| UnixStream::pair().unwrap().0).collect();
    Links { sockets, size: 1 << 20, flags }
}

fn setup() -> Setup {
    Setup { dead_after: Duration::from_secs(60), ..Setup::new("image/a") }
}

/// An answer's bytes, without the message's header.
fn attributes(message: &Message) -> Vec<u8> {
    message.bytes()[20..].to_vec()
}

#[test]
#[cfg(target_endian = "little")]
fn connecting_is_these_bytes() {
    let links = links(2, flag::HAS_FLAGS | flag::CAN_MULTI_CONN);
    let message = command::connect(37, Choice::Number(3), &setup(), &links).unwrap();
    let [first, second] = [0, 1].map(|at| links.sockets[at].as_raw_fd() as u8);
    let expected = [
        // Length (filled in when sent), family, REQUEST and ACK, sequence, port.
        0, 0, 0, 0, 37, 0, 5, 0, 0, 0, 0, 0, 0, 0, 0, 0, //
        1, 1, 0, 0, // CONNECT, version
        8, 0, 1, 0, 3, 0, 0, 0, // index
        12, 0, 2, 0, 0, 0, 16, 0, 0, 0, 0, 0, // size
        12, 0, 3, 0, 0, 2, 0, 0, 0, 0, 0, 0, // block size
        12, 0, 5, 0, 1, 1, 0, 0, 0, 0, 0, 0, // server flags
        12, 0, 6, 0, 0, 0, 0, 0, 0, 0, 0, 0, // client flags
        12, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, // timeout: none
        12, 0, 8, 0, 60, 0, 0, 0, 0, 0, 0, 0, // dead connection timeout
        12, 0, 10, 0, b'i', b'm', b'a', b'g', b'e', b'/', b'a', 0, //
        28, 0, 7, 0x80, // sockets
        12, 0, 1, 0x80, 8, 0, 1, 0, first, 0, 0, 0, //
        12, 0, 1, 0x80, 8, 0, 1, 0, second, 0, 0, 0, //
    ];
    assert_eq!(message.bytes(), expected);
}

#[test]
#[cfg(target_endian = "little")]
fn changes_repeat_the_backend_and_never_mix_size_and_sockets() {
    let named = [
        8, 0, 1, 0, 5, 0, 0, 0, //
        12, 0, 10, 0, b'i', b'm', b'a', b'g', b'e', b'/', b'a', 0,
    ];
    let links = links(1, 1);
    let descriptor = links.sockets[0].as_raw_fd() as u8;
    let reconnect = attributes(&command::reconnect(37, 5, &setup(), &links));
    let rest = [
        12, 0, 8, 0, 60, 0, 0, 0, 0, 0, 0, 0, //
        16, 0, 7, 0x80, 12, 0, 1, 0x80, 8, 0, 1, 0, descriptor, 0, 0, 0,
    ];
    assert_eq!(reconnect, [&named[..], &rest].concat());
    let resize = attributes(&command::resize(37, 5, &setup(), 4096));
    assert_eq!(resize, [&named[..], &[12, 0, 2, 0, 0, 16, 0, 0, 0, 0, 0, 0]].concat());
    let disconnect = attributes(&command::disconnect(37, 5));
    assert_eq!(disconnect, [8, 0, 1, 0, 5, 0, 0, 0]);
    assert!(attributes(&command::status(37)).is_empty());
}

#[test]
fn what_the_kernel_would_refuse_or_round_is_refused_before() {
    let refused = |what: &Setup, links: &Links| {
        command::connect(37, Choice::Any, what, links).unwrap_err().kind()
    };
    let multi = flag::HAS_FLAGS | flag::CAN_MULTI_CONN;
    assert_eq!(refused(&setup(), &links(2, flag::HAS_FLAGS)), Kind::Unsupported);
    assert_eq!(refused(&setup(), &links(0, multi)), Kind::Invalid);
    assert_eq!(refused(&setup(), &links(17, multi)), Kind::Invalid);
    for size in [0, 511, 513, u64::MAX - 511, 1 << 63] {
        assert_eq!(refused(&setup(), &Links { size, ..links(1, 1) }), Kind::Invalid, "{size}");
    }
    let blocks = Setup { block_size: BlockSize::Block, ..setup() };
    assert_eq!(refused(&blocks, &Links { size: 4608, ..links(1, 1) }), Kind::Invalid);
    for backend in ["", "a\0b", "a\nb", &"x".repeat(MAX_BACKEND + 1)] {
        assert_eq!(Setup::new(backend).check().unwrap_err().kind(), Kind::Invalid);
    }
    Setup::new("x".repeat(MAX_BACKEND)).check().unwrap();
}

#[test]
fn the_number_is_read_from_the_answer_to_connect_only() {
    let bytes = attributes(&Message::new(37, 1, 1).u32(99, 1).u32(1, 12));
    assert_eq!(command::connected(1, Attributes::new(&bytes)), Ok(Some(12)));
    assert_eq!(command::connected(5, Attributes::new(&bytes)), Ok(None));
    assert_eq!(command::connected(1, Attributes::new(&[])), Ok(None));
    assert!(command::connected(1, Attributes::new(&bytes[..10])).is_err());
}

#[test]
#[cfg(target_endian = "little")]
fn states_are_read_among_what_is_unknown() {
    let list = Message::new(37, 5, 1).nested(9, |list| {
        list.nested(1, |item| item.u32(1, 0).string(2, "\u{1}"))
            .nested(7, |other| other.u32(1, 5))
            .nested(1, |item| item.string(2, "").u32(1, 1).u32(55, 0))
            .nested(1, |item| item.u32(1, 9))
    });
    let bytes = attributes(&list);
    let mut devices = Vec::new();
    command::statuses(5, Attributes::new(&bytes), &mut devices).unwrap();
    let expected = [Status { index: 0, used: true }, Status { index: 1, used: false }];
    assert_eq!(devices, expected, "the last does not say whether it is used");
    for len in 1..bytes.len() {
        let mut devices = Vec::new();
        let cut = command::statuses(5, Attributes::new(&bytes[..len]), &mut devices);
        assert!(cut.is_err(), "{len} of {} bytes", bytes.len());
    }
    command::statuses(1, Attributes::new(&bytes), &mut devices).unwrap();
    assert_eq!(devices.len(), 2, "an answer to something else");
}

#[test]
fn the_lowest_free_number_is_found() {
    let devices = [(0, true), (1, false), (3, true), (2, true), (5, true), (u32::MAX, true)]
        .map(|(index, used)| Status { index, used });
    let free = |from| command::free(&devices, from);
    assert_eq!([0, 1, 2, 4, 5, 9].map(free), [1, 1, 4, 4, 6, 9]);
    assert_eq!(command::free(&[], 7), 7);
}

#[test]
fn refusals_say_what_to_do() {
    let told = |errno, action| {
        let error = explain(Failure::Refused(Refused { errno, message: None }), action);
        (error.kind(), error.to_string())
    };
    let (kind, text) = told(Errno::EPERM, Action::Connect);
    assert_eq!(kind, Kind::Permission);
    assert!(text.contains("CAP_SYS_ADMIN"), "{text}");
    let (kind, text) = told(Errno::EBUSY, Action::Connect);
    assert_eq!(kind, Kind::InUse);
    assert!(text.contains("choose another"), "{text}");
    assert_eq!(told(Errno::ENOSPC, Action::Connect).0, Kind::NoSpace);
    assert_eq!(told(Errno::EINVAL, Action::Disconnect).0, Kind::NotFound);
    assert_eq!(told(Errno::EINVAL, Action::Connect).0, Kind::Invalid);
    assert_eq!(told(Errno::ENOSYS, Action::Status).0, Kind::Io);
}

#[test]
fn a_kernel_without_the_client_is_told_from_one_that_fails() {
    // This machine may have the client or not; either way the answer says which.
    match Client::open() {
        Ok(mut client) => drop(client.status().unwrap()),
        Err(error) => {
            assert!(matches!(error.kind(), Kind::Unsupported | Kind::Permission), "{error}");
            let text = error.to_string();
            assert!(text.contains("modprobe nbd") || text.contains("netlink"), "{text}");
        }
    }
}
