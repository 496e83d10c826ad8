//! Invariants checked, with a client that speaks extended headers: every command does what it does without them;
//! effects of more than 32 bits are done in one request; `x-underlay:source` tells who holds what; what breaks the
//! rules is refused, and its payload taken from the stream.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{
    io::{Read, Write},
    os::unix::net::UnixStream,
};

#[path = "support/nbd.rs"]
mod nbd;
#[path = "support/node.rs"]
mod node;

use nbd::{
    CACHE, DF, DISC, EINVAL, FAST_ZERO, FLUSH, FUA, NO_HOLE, PATIENCE, READ, REQ_ONE,
    SEND_FAST_ZERO, STATUS, TRIM, WRITE, ZEROES, go, option,
};
use node::Daemon;

const MIB: u64 = 1 << 20;
/// The image has data in its first mebibyte and zeros in its second.
const IMAGE: u64 = 2 * MIB;
/// The replica is so large that 32 bits do not span it.
const SIZE: u64 = 20 << 30;

const PAYLOAD: u16 = 1 << 5;
const OVERLAY: u64 = 1;
const BASE: u64 = 2;

/// A connection with extended headers and both contexts.
struct Client {
    stream: UnixStream,
    cookie: u64,
    flags: u16,
}

/// A chunk: whether it is the last, its type, its payload.
type Chunk = (bool, u16, Vec<u8>);

impl Client {
    fn open(daemon: &Daemon, export: &str) -> Client {
        let mut stream = UnixStream::connect(daemon.nbd_socket()).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.read_exact(&mut [0; 18]).unwrap();
        let mut contexts = (export.len() as u32).to_be_bytes().to_vec();
        contexts.extend(export.as_bytes());
        contexts.extend(2_u32.to_be_bytes());
        for context in ["base:allocation", "x-underlay:source"] {
            contexts.extend((context.len() as u32).to_be_bytes());
            contexts.extend(context.as_bytes());
        }
        let said = [vec![0, 0, 0, 3], option(11, b""), option(10, &contexts), go(export)].concat();
        stream.write_all(&said).unwrap();
        let mut flags = 0;
        for (wanted, kind) in [(11, 1), (10, 4), (10, 4), (10, 1), (7, 3), (7, 3), (7, 1)] {
            let mut head = [0; 20];
            stream.read_exact(&mut head).unwrap();
            let word = |at: usize| u32::from_be_bytes(head[at..at + 4].try_into().unwrap());
            let mut data = vec![0; word(16) as usize];
            stream.read_exact(&mut data).unwrap();
            assert_eq!((word(8), word(12)), (wanted, kind));
            if wanted == 7 && data.len() == 12 {
                flags = u16::from_be_bytes([data[10], data[11]]);
            }
        }
        Client { stream, cookie: 0, flags }
    }

    /// Sends a request; all chunks of the answer.
    fn ask(&mut self, flags: u16, command: u16, offset: u64, len: u64, data: &[u8]) -> Vec<Chunk> {
        self.cookie += 1;
        let mut said = 0x21e4_1c71_u32.to_be_bytes().to_vec();
        said.extend(flags.to_be_bytes());
        said.extend(command.to_be_bytes());
        for field in [self.cookie, offset, len] {
            said.extend(field.to_be_bytes());
        }
        said.extend(data);
        self.stream.write_all(&said).unwrap();
        let mut chunks = Vec::new();
        loop {
            let mut head = [0; 32];
            self.stream.read_exact(&mut head).unwrap();
            let long = |at: usize| u64::from_be_bytes(head[at..at + 8].try_into().unwrap());
            assert_eq!(head[..4], 0x6e8a_278c_u32.to_be_bytes());
            assert_eq!((long(8), long(16)), (self.cookie, offset), "whom it answers");
            let mut payload = vec![0; long(24) as usize];
            self.stream.read_exact(&mut payload).unwrap();
            let done = head[5] == 1;
            chunks.push((done, u16::from_be_bytes([head[6], head[7]]), payload));
            if done {
                return chunks;
            }
        }
    }

    /// A request that succeeds without data.
    fn does(&mut self, flags: u16, command: u16, offset: u64, len: u64) {
        assert_eq!(self.ask(flags, command, offset, len, &[]), [(true, 0, vec![])]);
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        let done = self.ask(PAYLOAD, WRITE, offset, data.len() as u64, data);
        assert_eq!(done, [(true, 0, vec![])]);
    }

    fn read(&mut self, offset: u64, len: u64) -> Vec<u8> {
        let mut data = Vec::new();
        for (_, kind, payload) in self.ask(0, READ, offset, len, &[]) {
            // Long ones come in several, which this server sends in their order.
            assert_eq!(payload[..8], (offset + data.len() as u64).to_be_bytes());
            match kind {
                1 => data.extend(&payload[8..]),
                2 => {
                    let hole = u32::from_be_bytes(payload[8..].try_into().unwrap());
                    data.resize(data.len() + hole as usize, 0);
                }
                other => panic!("a chunk of type {other} in answer to READ"),
            }
        }
        assert_eq!(data.len() as u64, len);
        data
    }

    /// The error of a request that fails.
    fn fails(&mut self, flags: u16, command: u16, offset: u64, len: u64, data: &[u8]) -> u32 {
        let chunks = self.ask(flags, command, offset, len, data);
        assert_eq!((chunks.len(), chunks[0].1), (1, 0x8001), "{chunks:?}");
        u32::from_be_bytes(chunks[0].2[..4].try_into().unwrap())
    }

    /// What is said of a range, by the contexts' ids.
    fn status(
        &mut self,
        flags: u16,
        offset: u64,
        len: u64,
        data: &[u8],
    ) -> Vec<(u32, Vec<(u64, u64)>)> {
        let chunks = self.ask(flags, STATUS, offset, len, data);
        let long = |bytes: &[u8]| u64::from_be_bytes(bytes.try_into().unwrap());
        let parsed = chunks.iter().map(|(_, kind, payload)| {
            assert_eq!(*kind, 6, "{chunks:?}");
            let word = |at: usize| u32::from_be_bytes(payload[at..at + 4].try_into().unwrap());
            let extents: Vec<_> =
                payload[8..].chunks(16).map(|it| (long(&it[..8]), long(&it[8..]))).collect();
            assert_eq!(word(4) as usize, extents.len());
            (word(0), extents)
        });
        parsed.collect()
    }
}

fn start() -> (Daemon, Vec<u8>) {
    let daemon = Daemon::with_disks();
    let mut content = vec![0; IMAGE as usize];
    fastrand::Rng::with_seed(3).fill(&mut content[..MIB as usize]);
    daemon.import("base", &content);
    daemon.ok(&["replica", "create", "vm", "--image", "base", "--disk", "b", "--size", "20G"]);
    (daemon, content)
}

#[test]
fn every_command_does_what_it_does() {
    let (daemon, mut content) = start();
    let mut client = Client::open(&daemon, "replica/vm");
    assert_eq!(client.read(0, IMAGE), content);
    let data = vec![0x5a; 70_000];
    client.write(12_345, &data);
    content[12_345..82_345].copy_from_slice(&data);
    // As qemu's client has it: without the flag that says that a payload follows.
    client.ask(FUA, WRITE, 0, 3, b"abc");
    content[..3].copy_from_slice(b"abc");
    client.does(0, FLUSH, 0, 0);
    client.does(0, CACHE, 0, SIZE);
    client.does(0, ZEROES, 100_000, 50_000);
    content[100_000..150_000].fill(0);
    client.does(FUA | NO_HOLE, ZEROES, 200_000, 50_000);
    content[200_000..250_000].fill(0);
    assert_eq!(client.read(0, IMAGE), content);
    let chunks = client.ask(DF, READ, 0, 4096, &[]);
    assert_eq!((chunks.len(), chunks[0].2.len()), (1, 4096 + 8));
    // The same by another client, with headers of the old kind.
    let mut other = nbd::Client::open(&daemon.nbd_socket(), "replica/vm", nbd::Replies::Structured);
    assert_eq!(other.read(0, IMAGE as u32), Ok(content));
    client.ask_no_answer(DISC);
    assert_eq!(client.stream.read(&mut [0]).unwrap(), 0);
}

impl Client {
    fn ask_no_answer(&mut self, command: u16) {
        let mut said = 0x21e4_1c71_u32.to_be_bytes().to_vec();
        said.extend([0, 0]);
        said.extend(command.to_be_bytes());
        said.extend([0; 24]);
        self.stream.write_all(&said).unwrap();
    }
}

#[test]
fn effects_of_more_than_32_bits_are_one_request() {
    let (daemon, _) = start();
    let mut client = Client::open(&daemon, "replica/vm");
    let far = SIZE - MIB;
    client.write(far, &[7; 4096]);
    client.write(5 << 30, &[7; 4096]);
    // One extent of more than 4 GiB.
    let said = client.status(0, IMAGE, 4 << 30, &[]);
    assert_eq!(said[0], (1, vec![(4 << 30, 3)]), "{said:?}");
    let all = client.status(0, 0, SIZE, &[]);
    let allocation = [
        (MIB, 0),
        ((5 << 30) - MIB, 3),
        (4096, 0),
        (far - (5 << 30) - 4096, 3),
        (4096, 0),
        (MIB - 4096, 3),
    ];
    assert_eq!(all[0], (1, allocation.to_vec()));
    let (id, source) = &all[1];
    let wanted = allocation.map(|(len, state)| match (len, state) {
        (_, 3) => (len, 0),
        (4096, _) => (len, OVERLAY),
        _ => (len, BASE),
    });
    assert_eq!((*id, &source[..]), (2, &wanted[..]));
    client.does(0, TRIM, IMAGE, SIZE - IMAGE);
    client.does(0, ZEROES, 0, SIZE);
    assert_eq!(client.status(0, 0, SIZE, &[])[1].1, [(SIZE, 0)]);
    assert_eq!(client.read(far, 4096), [0; 4096]);
    assert_eq!(client.read(0, 4096), [0; 4096]);
}

#[test]
fn much_that_is_zeros_is_answered_without_it() {
    let (daemon, content) = start();
    let mut client = Client::open(&daemon, "replica/vm");
    let hole = |offset: u64, len: u64| {
        let payload = [&offset.to_be_bytes()[..], &(len as u32).to_be_bytes()].concat();
        [(true, 2, payload)]
    };
    for (offset, len) in [(MIB, MIB), (SIZE - MIB, MIB), (MIB + 4096, 1 << 16)] {
        for flags in [0, DF] {
            assert_eq!(client.ask(flags, READ, offset, len, &[]), hole(offset, len));
        }
    }
    // Little of it is sent, and so is what is zeros in part, but for long pieces of it where there may be several.
    for (flags, offset, len) in [(0, MIB, 32768), (0, MIB - 512, MIB / 2), (DF, MIB - 512, MIB)] {
        let chunks = client.ask(flags, READ, offset, len, &[]);
        assert_eq!((chunks.len(), chunks[0].1), (1, 1));
        assert!(chunks[0].2[8..] == content[offset as usize..][..len as usize]);
    }
    let chunks = client.ask(0, READ, MIB - 512, MIB, &[]);
    assert_eq!(
        chunks.iter().map(|chunk| (chunk.0, chunk.1)).collect::<Vec<_>>(),
        [(false, 1), (true, 2)]
    );
    assert_eq!(client.read(MIB - 512, MIB), content[MIB as usize - 512..][..MIB as usize]);
    // What was written there is no hole, until it is discarded.
    client.write(MIB + 70_000, &[9; 512]);
    let chunks = client.ask(0, READ, MIB, MIB, &[]);
    assert!(chunks[0].1 == 1 && chunks[0].2[8 + 70_000] == 9);
    client.does(0, TRIM, MIB, MIB);
    assert_eq!(client.ask(0, READ, MIB, MIB, &[]), hole(MIB, MIB));
    let mut base = Client::open(&daemon, "image/base");
    assert_eq!(base.ask(0, READ, MIB, MIB, &[]), hole(MIB, MIB));
}

#[test]
fn a_status_can_be_of_some_contexts() {
    let (daemon, _) = start();
    let mut client = Client::open(&daemon, "replica/vm");
    client.write(0, &[1; 8192]);
    let filter = |len: u64, ids: &[u32]| -> Vec<u8> {
        let ids = ids.iter().flat_map(|id| id.to_be_bytes());
        len.to_be_bytes().into_iter().chain(ids).collect()
    };
    assert_ne!(client.flags & 1 << 12, 0, "it is offered");
    let of = filter(MIB, &[2]);
    let said = client.status(PAYLOAD, 0, of.len() as u64, &of);
    assert_eq!(said, [(2, vec![(8192, OVERLAY), (MIB - 8192, BASE)])]);
    let said = client.status(PAYLOAD | REQ_ONE, 0, of.len() as u64, &of);
    assert_eq!(said, [(2, vec![(8192, OVERLAY)])]);
    let both = filter(MIB, &[2, 1]);
    assert_eq!(client.status(PAYLOAD, 0, both.len() as u64, &both).len(), 2);
    for bad in
        [filter(MIB, &[]), filter(MIB, &[9]), filter(MIB, &[1, 1]), vec![1; 11], vec![1; 5000]]
    {
        assert_eq!(client.fails(PAYLOAD, STATUS, 0, bad.len() as u64, &bad), EINVAL);
    }
    client.does(0, FLUSH, 0, 0);
}

#[test]
fn zeroing_is_fast_where_it_has_to_be() {
    let (daemon, content) = start();
    let mut client = Client::open(&daemon, "replica/vm");
    assert_ne!(client.flags & SEND_FAST_ZERO, 0);
    client.does(FAST_ZERO, ZEROES, 0, MIB / 2);
    assert_eq!(client.read(0, MIB / 2), vec![0; MIB as usize / 2]);
    assert_eq!(client.read(MIB / 2, 4096), content[MIB as usize / 2..][..4096]);
    // Whether it can keep the space depends on the file system: it is done, or refused in so many words.
    let kept = client.ask(FAST_ZERO | NO_HOLE, ZEROES, MIB / 2, MIB / 2, &[]);
    match &kept[0] {
        (true, 0, _) => assert_eq!(client.read(0, MIB), vec![0; MIB as usize]),
        (true, 0x8001, why) => assert_eq!(why[..4], 95_u32.to_be_bytes()),
        other => panic!("{other:?}"),
    }
}

#[test]
fn what_breaks_the_rules_is_refused_and_its_payload_taken() {
    let (daemon, content) = start();
    let mut client = Client::open(&daemon, "replica/vm");
    for command in [READ, FLUSH, TRIM, CACHE, ZEROES, 77] {
        let payload = vec![0x25; 300];
        assert_eq!(client.fails(PAYLOAD, command, 0, 300, &payload), EINVAL, "{command}");
    }
    assert_eq!(client.fails(0, READ, 0, 1 << 40, &[]), EINVAL, "past the end");
    assert_eq!(client.fails(0, READ, 0, 1 << 33, &[]), 75, "more than one answer holds");
    assert_eq!(client.fails(0, TRIM, u64::MAX, 2, &[]), EINVAL);
    assert_eq!(client.fails(0, STATUS, 0, 0, &[]), EINVAL);
    let refused = client.fails(PAYLOAD, WRITE, SIZE - 4, 8, &[1; 8]);
    assert_eq!(refused, 28, "past the end");
    assert_eq!(client.read(0, 4096), content[..4096], "it has not lost its place");
    // More than can be skipped, and what is no request: the connection ends.
    for (magic, len) in [(0x21e4_1c71_u32, u64::MAX), (0x21e4_1c71, 33 * MIB), (0x2560_9513, 512)] {
        let mut client = Client::open(&daemon, "image/base");
        let mut said = magic.to_be_bytes().to_vec();
        said.extend(PAYLOAD.to_be_bytes());
        said.extend(WRITE.to_be_bytes());
        for field in [1, 0, len] {
            said.extend(field.to_be_bytes());
        }
        client.stream.write_all(&said).unwrap();
        assert_eq!(client.stream.read(&mut [0]).unwrap_or(0), 0, "{magic:x} {len}");
    }
    daemon.ok(&["status"]);
}
