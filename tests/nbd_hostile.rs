//! Invariants checked: whatever a client of the NBD socket does, the daemon neither ends, hangs,
//! grows nor leaks; every other client goes on; a request that makes no sense has the error that the
//! protocol names for it; and reads return what was written, at any offset and length.
//!
//! Each scenario has a daemon of its own. With `NBD_TARGET=SOCKET,WRITABLE,READONLY` the scenarios
//! that need no more than a socket run against another server, to compare: its writable export
//! has 8 GiB, both begin with the content of [`content`].

#![allow(clippy::unwrap_used, reason = "a test that meets what it did not expect fails")]

#[path = "support/daemon.rs"]
mod daemon;
#[path = "support/nbd.rs"]
mod nbd;

use std::{
    io::{ErrorKind, Read, Write},
    net::Shutdown,
    os::unix::net::UnixStream,
    path::PathBuf,
    time::{Duration, Instant},
};

use daemon::Daemon;
use nix::sys::resource::{Resource, getrlimit, setrlimit};

use nbd::{
    CACHE, Client, DF, EINVAL, ENOSPC, EPERM, FAST_ZERO, FLUSH, FUA, Message, NO_HOLE, PATIENCE,
    READ, REQ_ONE, Replies, SEND_FAST_ZERO, TRIM, WRITE, ZEROES, be, go, handshake, option,
    request,
};

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
            assert_eq!(client.read(0, 4096).unwrap(), content()[..4096]);
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

#[test]
fn handshakes_that_stall_anywhere_hold_nobody_up() {
    let target = Target::new();
    let all = handshake(&target.writable);
    let mut stalled: Vec<_> = (0..=all.len())
        .map(|stop| {
            let mut client = target.connect();
            client.send(&all[..stop]);
            (client, stop)
        })
        .collect();
    target.serves();
    // Every second one finds its way on, byte by byte; the others vanish.
    let mut index = 0;
    stalled.retain(|_| {
        index += 1;
        index % 2 == 0
    });
    for (client, stop) in &mut stalled {
        for byte in &all[*stop..] {
            client.send(&[*byte]);
        }
        assert_eq!(client.option_reply(), (8, 1, vec![]));
        assert_eq!(client.option_reply().1, 4);
        assert_eq!(client.option_reply(), (10, 1, vec![]));
        client.take_go();
        client.replies = Replies::Structured;
        assert_eq!(client.read(8192, 512).unwrap(), content()[8192..8704]);
    }
    target.serves();
}

#[test]
fn clients_that_never_negotiate_lose_their_places() {
    let target = Target::new();
    target.serves();
    let (_, most) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    setrlimit(Resource::RLIMIT_NOFILE, most, most).unwrap();
    // More than the server takes at once, at three places of the handshake, and one honest client
    // behind them all.
    let all = handshake(&target.writable);
    let silent: Vec<_> = (0..1100)
        .map(|index| {
            let mut stream = UnixStream::connect(&target.socket).unwrap();
            stream.write_all(&all[..[0, 10, 20][index % 3]]).unwrap();
            stream
        })
        .collect();
    if let Some(daemon) = &target.daemon {
        daemon.run(&["status"]);
        daemon.replica("more", "base", "16M");
    }
    target.serves();
    if let Some(daemon) = &target.daemon {
        let mut client = Client::open(&target.socket, "replica/more", Replies::Simple);
        assert_eq!(client.read(0, 512).unwrap(), content()[..512]);
        client.close();
        wait_until("silent clients keep their places", || daemon.files() < 100);
    }
    for mut stream in silent {
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut bytes = vec![];
        let ended = stream.read_to_end(&mut bytes);
        assert!(
            ended.is_ok() || ended.is_err_and(|error| error.kind() == ErrorKind::ConnectionReset)
        );
    }
}

#[test]
fn handshakes_make_sense_or_end() {
    let target = Target::new();
    let long = |number: u32, len: u32| {
        let mut bytes = option(number, b"");
        let at = bytes.len() - 4;
        bytes[at..].copy_from_slice(&len.to_be_bytes());
        bytes
    };
    for number in [1, 3, 6, 7, 8, 9, 10, 99] {
        for len in [1 << 24, 1 << 31, u32::MAX - 15, u32::MAX] {
            let mut client = target.connect();
            client.send(&[0, 0, 0, 3]);
            client.send(&long(number, len));
            let rest = client.rest();
            assert!(rest.len() < 1000, "option {number} of {len} bytes: {} bytes", rest.len());
        }
    }
    // A name longer than its option, and more queries than there are bytes.
    for (number, data) in [(7, &b"\xff\xff\xff\xffname\0\0"[..]), (6, b"\0\0\x10\x01name\0\0")] {
        let mut client = target.connect();
        client.send(&[&[0, 0, 0, 3][..], &option(number, data), &option(2, b"")].concat());
        assert_eq!(client.option_reply().1, (1 << 31) + 3);
        assert_eq!(client.option_reply(), (2, 1, vec![]));
        client.rest();
    }
    for bytes in [&[0xff; 4][..], &[0; 20], b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", &[0, 0, 0, 3, 7]]
    {
        let mut client = target.connect();
        client.send(bytes);
        client.stream.shutdown(Shutdown::Write).unwrap();
        client.rest();
    }
    // Contexts without structured replies: refused, and BLOCK_STATUS as well.
    let mut client = target.connect();
    client.send(&[&[0, 0, 0, 3][..], &nbd::set_allocation(&target.writable)].concat());
    assert_eq!(client.option_reply().1, (1 << 31) + 3);
    client.send(&go(&target.writable));
    client.take_go();
    assert_eq!(client.status(0, 0, 4096), Err(EINVAL));
    target.serves();
}

#[test]
fn requests_may_follow_the_last_option_at_once() {
    let target = Target::new();
    let mut all = handshake(&target.writable);
    for index in 0..3 {
        all.extend(request(0, READ, index, 4096 * index, 4096));
    }
    for cut in [all.len(), all.len() - 84, all.len() - 60, 10] {
        let mut client = target.connect();
        client.send(&all[..cut]);
        std::thread::sleep(Duration::from_millis(20));
        client.send(&all[cut..]);
        for _ in 0..3 {
            client.option_reply();
        }
        client.take_go();
        client.replies = Replies::Structured;
        let cookies = replies_to_reads(&mut client, 3, |cookie| (cookie * 4096, 4096));
        assert_eq!(cookies.len(), 3);
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
    let mut covered = std::collections::HashMap::<u64, u64>::new();
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

#[test]
fn ranges_past_the_end_have_their_errors() {
    let target = Target::new();
    for replies in [Replies::Simple, Replies::Structured] {
        let mut client = Client::open(&target.socket, &target.writable, replies);
        let size = client.size;
        let past = [
            (size, 1),
            (size - 1, 2),
            (size - 4096, 8192),
            (size + (1 << 40), 512),
            (u64::MAX, 1),
            (u64::MAX - 511, 512),
            (u64::MAX - 511, 4096),
            (1 << 63, 4096),
        ];
        for (offset, len) in past {
            assert_eq!(client.read(offset, len), Err(EINVAL), "READ {len} at {offset}");
            let data = vec![1; len as usize];
            assert_eq!(client.write(0, offset, &data), Err(ENOSPC), "WRITE {len} at {offset}");
            assert_eq!(client.command(0, TRIM, offset, len), Err(EINVAL));
            assert_eq!(client.command(0, CACHE, offset, len), Err(EINVAL));
            assert_eq!(client.command(NO_HOLE, ZEROES, offset, len), Err(ENOSPC));
            if replies == Replies::Structured {
                assert_eq!(client.status(0, offset, len), Err(EINVAL));
            }
        }
        assert_eq!(client.write(0, size - 1, &[7]), Ok(()));
        assert_eq!(client.read(size - 2, 2), Ok(vec![0, 7]));
        assert_eq!(client.command(FUA, ZEROES, size - 1, 1), Ok(()));
        client.close();
    }
}

#[test]
fn read_only_exports_stay_as_they_are() {
    let target = Target::new();
    let mut client = Client::open(&target.socket, &target.read_only, Replies::Structured);
    assert_eq!(client.flags & 2, 2);
    for len in [1, 512, 4096, 1 << 20] {
        assert_eq!(client.write(FUA, 0, &vec![0xff; len]), Err(EPERM));
        assert_eq!(client.command(0, TRIM, 0, len as u32), Err(EPERM));
        assert_eq!(client.command(0, ZEROES, 0, len as u32), Err(EPERM));
    }
    assert_eq!(client.write(0, u64::MAX, &[0; 10]), Err(EPERM));
    assert_eq!(client.flush(), Ok(()));
    let image = content();
    for (at, run) in image.chunks(1 << 20).enumerate() {
        assert!(client.read((at as u64) << 20, run.len() as u32).unwrap() == run);
    }
    client.close();
}

#[test]
fn commands_and_flags_that_nobody_knows_are_refused() {
    let target = Target::new();
    for replies in [Replies::Simple, Replies::Structured] {
        let mut client = Client::open(&target.socket, &target.writable, replies);
        for command in (8..40).chain([255, 256, 0x100, 0x7fff, 0x8000, u16::MAX]) {
            assert_eq!(client.command(0, command, 0, 4096), Err(EINVAL), "command {command}");
        }
        for bit in 1..16 {
            let flag = 1 << bit;
            if flag == FAST_ZERO && client.flags & SEND_FAST_ZERO != 0 {
                continue;
            }
            for command in [FLUSH, TRIM, CACHE, ZEROES] {
                let len = if command == FLUSH { 0 } else { 4096 };
                if (command, flag) == (ZEROES, NO_HOLE) {
                    continue;
                }
                let answer = client.command(flag, command, IMAGE, len);
                assert_eq!(answer, Err(EINVAL), "command {command} with flag {flag:#x}");
            }
            assert_eq!(client.write(flag, 0, &[9; 512]), Err(EINVAL), "WRITE with {flag:#x}");
        }
        assert_eq!(client.read(0, 512).unwrap(), content()[..512]);
        client.close();
    }
    // After something that is no request, nothing can be understood any more.
    for bytes in [&[0; 28][..], &[0xff; 500], b"NBDMAGIC", &request(0, READ, 1, 0, 1)[1..]] {
        let mut client = target.writer();
        client.try_send(bytes);
        let _ = client.stream.shutdown(Shutdown::Write);
        assert_eq!(client.rest(), b"");
    }
    target.serves();
}

#[test]
fn lengths_of_nothing_and_of_too_much_are_answered() {
    let target = Target::new();
    let mut client = target.writer();
    // What becomes of a request of no bytes is left open; that it is answered is not.
    for command in [TRIM, CACHE, ZEROES] {
        assert!(matches!(client.command(0, command, 0, 0), Ok(()) | Err(EINVAL)));
    }
    assert!(matches!(client.read(0, 0), Ok(_) | Err(EINVAL)));
    assert!(matches!(client.write(0, 0, b""), Ok(()) | Err(EINVAL)));
    assert!(matches!(client.status(0, 0, 0), Err(EINVAL)));
    for len in [(32 << 20) + 1, 1 << 30, u32::MAX] {
        assert!(client.read(0, len).is_err(), "READ of {len} bytes");
        assert_eq!(client.command(0, CACHE, 0, len), Ok(()));
        assert_eq!(client.command(0, TRIM, SIZE - (5 << 30), len), Ok(()));
        assert_eq!(client.command(0, ZEROES, SIZE - (5 << 30), len), Ok(()));
    }
    assert_eq!(client.read(0, 32 << 20).unwrap().len(), 32 << 20);
    assert_eq!(client.write(0, IMAGE, &vec![5; 32 << 20]), Ok(()));
    assert!(client.read(IMAGE, 32 << 20).unwrap().iter().all(|byte| *byte == 5));
    client.close();
    // A longer payload is drained and refused, or the connection ends; nothing of it is written.
    let mut client = target.writer();
    let data = vec![6; 33 << 20];
    client.try_send(&request(0, WRITE, 1, IMAGE, data.len() as u32));
    if client.try_send(&data) {
        assert_eq!(client.done_reply(1), Err(EINVAL));
    }
    let mut client = target.writer();
    assert_eq!(client.read(IMAGE, 512).unwrap(), [5; 512]);
    // The header of one, and no more.
    let mut client = target.writer();
    client.try_send(&request(0, WRITE, 1, 0, u32::MAX));
    drop(client);
    target.serves();
}

#[test]
fn half_closed_connections_are_answered_and_closed() {
    let target = Target::new();
    // Nothing more comes from the client: what it asked for is still answered, or not, but no hang.
    for count in [1, 10, 100] {
        let mut client = target.writer();
        for index in 0..count {
            client.send(&request(0, READ, index, index * 4096, 4096));
        }
        client.stream.shutdown(Shutdown::Write).unwrap();
        let bytes = client.rest();
        assert!(bytes.len() as u64 <= count * (4096 + 64));
    }
    // The client can't be answered any more: no SIGPIPE, no endless retry.
    for count in [1, 100] {
        let mut client = target.writer();
        client.stream.shutdown(Shutdown::Read).unwrap();
        for index in 0..count {
            client.try_send(&request(0, READ, index, 0, 65536));
        }
    }
    target.serves();
}

#[test]
fn disconnect_finishes_what_is_under_way() {
    let target = Target::new();
    let mut client = target.writer();
    let count = 64;
    for index in 0..count {
        client.send(&request(0, READ, index, index * 512, 4096));
    }
    client.send(&request(0, nbd::DISC, 99, 0, 0));
    let cookies = replies_to_reads(&mut client, count as usize, |cookie| (cookie * 512, 4096));
    assert_eq!(cookies.len(), count as usize);
    assert_eq!(client.rest(), b"");
    target.serves();
}

#[test]
fn replies_that_nobody_reads_cost_little() {
    let target = Target::new();
    target.serves();
    let before = target.daemon.as_ref().map(|daemon| (daemon.memory(), daemon.files()));
    let mut greedy: Vec<_> = (0..8).map(|_| target.writer()).collect();
    for client in &mut greedy {
        // The server may stop reading before it has taken them all: that is its right.
        client.stream.set_write_timeout(Some(Duration::from_millis(500))).unwrap();
        for index in 0..400 {
            let at = index % 7 << 20;
            if client.stream.write_all(&request(0, READ, index, at, 1 << 20)).is_err() {
                break;
            }
        }
    }
    target.serves();
    if let (Some(daemon), Some((memory, _))) = (&target.daemon, before) {
        let grown = daemon.memory().saturating_sub(memory);
        assert!(grown < 384 << 20, "{} MiB for 3200 MiB of replies", grown >> 20);
    }
    drop(greedy);
    target.serves();
    if let (Some(daemon), Some((_, files))) = (&target.daemon, before) {
        wait_until("connections that are gone stay open", || daemon.files() <= files + 2);
    }
}

#[test]
fn clients_that_vanish_leave_nothing_behind() {
    let target = Target::new();
    target.serves();
    let before = target.daemon.as_ref().map(Daemon::files);
    for round in 0..400 {
        let mut client = target.connect();
        match round % 4 {
            0 => (),
            1 => client.send(&handshake(&target.writable)[..round % 100]),
            2 => client.send(&handshake(&target.writable)),
            _ => {
                client.send(&handshake(&target.writable));
                client.try_send(&request(0, READ, 1, 0, 1 << 20));
            }
        }
    }
    target.serves();
    if let (Some(daemon), Some(files)) = (&target.daemon, before) {
        wait_until("connections that are gone stay open", || daemon.files() <= files + 2);
    }
}

#[test]
fn writes_cut_short_are_not_applied_and_whole_ones_are_whole() {
    let target = Target::new();
    let mut random = fastrand::Rng::with_seed(7);
    for round in 0..30_u8 {
        // One write comes whole, and then one that breaks off somewhere. Each round has its own
        // place: what a client left behind without an answer may still be under way.
        let at = IMAGE + (u64::from(round) << 18);
        let mut client = target.writer();
        let stop = random.usize(..65536);
        client.send(&request(0, WRITE, 1, at, 65536));
        client.send(&[round + 1; 65536]);
        client.send(&request(0, WRITE, 2, at + 65536, 65536));
        client.send(&vec![0xee; stop]);
        if round % 2 == 0 {
            assert_eq!(client.done_reply(1), Ok(()));
        }
        drop(client);
        let mut client = target.writer();
        let data = client.read(at, 2 << 16).unwrap();
        let (first, second) = data.split_at(65536);
        assert!(second.iter().all(|byte| *byte == 0), "round {round}: {stop} bytes of a write");
        if round % 2 == 0 {
            assert!(first.iter().all(|byte| *byte == round + 1));
        }
    }
    // Many at once, and gone before any answer: each sector is all old or all new.
    let at = 2 * IMAGE;
    let mut client = target.writer();
    for index in 0..200 {
        client.send(&request(0, WRITE, index, at + (index << 12), 4096));
        client.send(&[0xcc; 4096]);
    }
    drop(client);
    target.serves();
    let mut client = target.writer();
    let data = client.read(at, 200 << 12).unwrap();
    assert!(data.chunks(512).all(|sector| sector.iter().all(|byte| *byte == sector[0])));
    client.close();
}

#[test]
fn requests_may_share_a_cookie() {
    let target = Target::new();
    let mut client = target.writer();
    for _ in 0..50 {
        client.send(&request(0, READ, 5, 12345, 6789));
        client.send(&request(0, READ, u64::MAX, 1, 4096));
    }
    let range = |cookie| if cookie == 5 { (12345, 6789) } else { (1, 4096) };
    let ends = replies_to_reads(&mut client, 100, range);
    assert_eq!(ends.iter().filter(|cookie| **cookie == 5).count(), 50);
    client.close();
}

#[test]
fn any_offset_and_length_agrees_with_a_model() {
    let target = Target::new();
    let mut model = content();
    model.resize(IMAGE as usize + (1 << 20), 0);
    for replies in [Replies::Structured, Replies::Simple] {
        let mut client = Client::open(&target.socket, &target.writable, replies);
        // Around a block's, a chunk's and the image's end.
        let mut fill = 0_u8;
        for edge in [4096, 65536 + 4096, 262_144, IMAGE] {
            let offsets = (0..9).chain([255, 256, 511, 512, 513, 4095]);
            for before in offsets {
                for len in [1, 2, 511, 512, 513, 4095, 4096, 4097] {
                    let at = edge - before;
                    let range = at as usize..at as usize + len;
                    fill = fill.wrapping_add(1);
                    assert_eq!(client.write(0, at, &vec![fill; len]), Ok(()));
                    model[range.clone()].fill(fill);
                    let around = range.start.saturating_sub(600)..range.end + 600;
                    let data = client.read(around.start as u64, around.len() as u32).unwrap();
                    assert!(data == model[around], "{len} bytes written at {at}");
                }
            }
        }
        let mut random = fastrand::Rng::with_seed(11);
        for step in 0..1500 {
            let at = random.usize(..model.len() - 1);
            let len = match random.u8(..4) {
                0 => random.usize(1..16),
                1 => random.usize(1..1024),
                2 => 4096 * random.usize(1..8),
                _ => random.usize(1..100_000),
            };
            let range = at..model.len().min(at + len);
            let (at, len) = (at as u64, range.len() as u32);
            let flags = if random.u8(..20) == 0 { FUA } else { 0 };
            match random.u8(..10) {
                0..4 => {
                    let data: Vec<u8> =
                        std::iter::repeat_with(|| random.u8(..)).take(len as usize).collect();
                    assert_eq!(client.write(flags, at, &data), Ok(()));
                    model[range].copy_from_slice(&data);
                }
                4 | 5 => {
                    let hole = if random.bool() { NO_HOLE } else { 0 };
                    assert_eq!(client.command(flags | hole, ZEROES, at, len), Ok(()));
                    model[range].fill(0);
                }
                6 => {
                    assert_eq!(client.command(flags, TRIM, at, len), Ok(()));
                    let now = client.read(at, len).unwrap();
                    let kept = now.iter().zip(&model[range.clone()]);
                    assert!(
                        kept.into_iter().all(|(now, was)| now == was || *now == 0),
                        "step {step}"
                    );
                    model[range].copy_from_slice(&now);
                }
                7 => assert_eq!(client.flush(), Ok(())),
                _ => assert!(client.read(at, len).unwrap() == model[range], "step {step}"),
            }
        }
        for (index, run) in model.chunks(1 << 20).enumerate() {
            let data = client.read((index as u64) << 20, run.len() as u32).unwrap();
            assert!(data == run, "MiB {index} at the end");
        }
        client.close();
    }
}

#[test]
fn statuses_cover_any_range_and_agree_with_reads() {
    let target = Target::new();
    let mut client = target.writer();
    // Every second block for 40 MiB: more extents than one answer should hold.
    let (from, blocks) = (IMAGE, 10_240_u64);
    let batch = 64;
    for first in (0..blocks).step_by(2 * batch) {
        for index in (first..first + 2 * batch as u64).step_by(2) {
            client.send(&request(0, WRITE, index, from + index * 4096, 4096));
            client.send(&[1; 4096]);
        }
        for _ in 0..batch {
            let message = client.message();
            let done = matches!(
                message,
                Message::Simple { error: 0, .. } | Message::Chunk { kind: 0, .. }
            );
            assert!(done, "{message:?}");
        }
    }
    let size = client.size;
    for flags in [0, REQ_ONE] {
        for (start, end) in
            [(0, size), (from + 1, from + 513), (from + 4095, from + 4098), (size - 1, size)]
        {
            let mut at: u64 = start;
            let mut asked = 0;
            while at < end && asked < 50 {
                let len = u32::try_from(end - at).unwrap_or(u32::MAX);
                let extents = client.status(flags, at, len).unwrap();
                assert!(extents.len() <= 1 << 20 && extents.iter().all(|extent| extent.0 > 0));
                let before: u64 =
                    extents[..extents.len() - 1].iter().map(|extent| u64::from(extent.0)).sum();
                assert!(before < u64::from(len), "all but the last lie in the range");
                if flags == REQ_ONE {
                    assert!(extents.len() == 1 && extents[0].0 <= len);
                }
                for (len, state) in extents {
                    if state & 2 == 2 {
                        // A sample of what reads as zeros, from both ends of it.
                        for at in [at, at + u64::from(len) - u64::from(len.min(65536))] {
                            let data = client.read(at, len.min(65536)).unwrap();
                            assert!(data.iter().all(|byte| *byte == 0), "zeros at {at}");
                        }
                    }
                    at += u64::from(len);
                }
                asked += 1;
            }
            assert!(at >= end || flags == REQ_ONE, "{asked} answers got from {start} to {at} only");
        }
    }
    // The written blocks are told as data, the ones between as holes of zeros.
    let extents = client.status(0, from, 16 * 4096).unwrap();
    assert!(
        extents.iter().enumerate().all(|(index, (_, state))| (index % 2 == 1) == (state & 2 == 2))
    );
    client.close();
}

#[test]
fn one_content_chunk_if_asked_for() {
    let target = Target::new();
    let mut client = target.writer();
    for (offset, len) in [(0, 65536), (60_000, 65536), (1 << 20, 1 << 20)] {
        client.send(&request(DF, READ, 1, offset, len));
        let mut contents = 0;
        loop {
            let Message::Chunk { done, kind, payload, .. } = client.message() else {
                panic!("a simple reply to a READ");
            };
            if kind == 1 {
                contents += 1;
                let range = offset as usize..offset as usize + len as usize;
                assert!(payload[8..] == content()[range]);
            }
            assert!(kind < 2, "a chunk of type {kind}");
            if done {
                break;
            }
        }
        assert_eq!(contents, 1);
    }
    client.close();
}

#[test]
fn connections_see_one_device() {
    let target = Target::new();
    let mut clients: Vec<_> = (0..4).map(|_| target.writer()).collect();
    assert_eq!(clients[0].flags >> 8 & 1, 1, "CAN_MULTI_CONN");
    for round in 0..40_u8 {
        let (writer, reader) = (usize::from(round % 4), usize::from((round + 1) % 4));
        assert_eq!(clients[writer].write(0, 777, &[round; 5000]), Ok(()));
        assert_eq!(clients[reader].read(777, 5000).unwrap(), [round; 5000]);
        assert_eq!(clients[reader].flush(), Ok(()));
    }
}

#[test]
fn clients_that_stay_do_not_hold_up_the_end() {
    let mut target = Target::new();
    let Some(mut daemon) = target.daemon.take() else { return };
    let silent: Vec<_> = (0..20).map(|_| target.connect()).collect();
    let mut idle = target.writer();
    assert_eq!(idle.write(0, 4096, b"kept"), Ok(()));
    let mut greedy = target.writer();
    for index in 0..100 {
        greedy.try_send(&request(0, READ, index, 0, 1 << 20));
    }
    let took = daemon.terminate();
    assert!(took < Duration::from_secs(15), "{took:?}");
    drop((silent, idle, greedy));
    daemon.spawn();
    let mut client = target.writer();
    assert_eq!(client.read(4096, 4).unwrap(), b"kept");
    client.close();
}
