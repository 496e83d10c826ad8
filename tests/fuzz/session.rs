//! An NBD session: requests of every kind, mutated, by clients that leave in one way or another. Whatever they send,
//! the session ends; who reads to the end has one whole answer to each request that came whole; what is read is what
//! belongs there; and the device is asked for nothing that it does not have.

use std::{
    collections::HashMap,
    io::{ErrorKind, Read, Write},
    net::Shutdown,
    os::unix::net::UnixStream,
    sync::{Arc, Mutex},
    thread,
    time::Duration,
};

use fastrand::Rng;
use tokio::sync::oneshot;
use underlay::{
    Error, Kind, Result,
    blockdev::{
        Device, Extent, Grain, Holder, Info, Provision,
        figures::Operations,
        nbd::{Contexts, Headers, Terms, reserve::Share, session},
    },
    io::{Buf, Ring, Rings, yield_now},
};

use crate::{
    Case,
    mutator::{mutate, number},
};

/// Bytes of the device.
const SIZE: u64 = 10 << 20;
/// What lies here can't be read or written.
const BAD: std::ops::Range<u64> = 4 << 20..(4 << 20) + 8192;
/// Requests of a case at most.
const REQUESTS: usize = 40;
/// How long a session may take to end.
const PATIENCE: Duration = Duration::from_secs(20);

const READ: u16 = 0;
const WRITE: u16 = 1;
const DISC: u16 = 2;
const STATUS: u16 = 7;
const DF: u16 = 4;
const PAYLOAD: u16 = 32;

/// The byte that any write leaves there.
fn byte(offset: u64) -> u8 {
    (offset % 251) as u8 | 1
}

/// A device that holds zeros or [`byte`]s, and notes what it should not have been asked.
struct Memory {
    read_only: bool,
    bytes: Mutex<Vec<u8>>,
    wrong: Mutex<Option<String>>,
}

impl Memory {
    /// The range, which must lie within, some time later.
    async fn range(&self, offset: u64, len: u64, changes: bool) -> Result<std::ops::Range<usize>> {
        let within = len > 0 && offset < SIZE && len <= SIZE - offset;
        if !within || changes && self.read_only {
            // A panic would be taken for a failure of the disk.
            let what = format!("{len} bytes at {offset}, to change them: {changes}");
            *self.wrong.lock().unwrap() = Some(what);
        }
        for _ in 0..offset / 4096 % 4 {
            yield_now().await;
        }
        if offset < BAD.end && BAD.start < offset + len {
            return Err(Error::new(Kind::Io, "a bad place"));
        }
        Ok(offset as usize..(offset + len) as usize)
    }
}

impl Device<Ring> for Memory {
    fn info(&self) -> Info {
        Info { size: SIZE, read_only: self.read_only, rotational: false }
    }

    async fn read(&self, _: &Ring, offset: u64, buf: Buf) -> Result<()> {
        let range = self.range(offset, buf.len() as u64, false).await?;
        buf.copy_from(&self.bytes.lock().unwrap()[range]);
        Ok(())
    }

    async fn write(&self, _: &Ring, offset: u64, buf: Buf) -> Result<()> {
        let range = self.range(offset, buf.len() as u64, true).await?;
        // Not what came, which may be anything: what a read of it is known by.
        let mut bytes = self.bytes.lock().unwrap();
        range.for_each(|at| bytes[at] = byte(at as u64));
        Ok(())
    }

    async fn flush(&self, _: &Ring) -> Result<()> {
        yield_now().await;
        Ok(())
    }

    async fn discard(&self, ring: &Ring, offset: u64, len: u64) -> Result<()> {
        self.write_zeroes(ring, offset, len, Provision::Release).await
    }

    async fn write_zeroes(&self, _: &Ring, offset: u64, len: u64, _: Provision) -> Result<()> {
        let range = self.range(offset, len, true).await?;
        self.bytes.lock().unwrap()[range].fill(0);
        Ok(())
    }

    async fn prefetch(&self, _: &Ring, offset: u64, len: u64) -> Result<()> {
        self.range(offset, len, false).await.map(drop)
    }

    fn extents(&self, at: u64, len: u64, _: Grain, limit: usize, extents: &mut Vec<Extent>) {
        assert!(len > 0 && at < SIZE && len <= SIZE - at && limit > 0);
        let bytes = self.bytes.lock().unwrap();
        let bytes = &bytes[at as usize..(at + len) as usize];
        for run in bytes.chunk_by(|a, b| (*a == 0) == (*b == 0)).take(limit) {
            let holder = if run[0] == 0 { Holder::Nobody } else { Holder::Overlay };
            extents.push(Extent { len: run.len() as u64, holder });
        }
    }
}

/// A request as the client remembers it.
#[derive(Clone, Copy, Debug)]
struct Asked {
    command: u16,
    flags: u16,
    offset: u64,
    len: u64,
}

pub fn start() -> Case {
    let rings = Rings::start(1, Duration::ZERO).unwrap();
    Box::new(move |rng| case(&rings, rng))
}

fn case(rings: &Rings, rng: &mut Rng) {
    let headers = [Headers::Simple, Headers::Structured, Headers::Extended][rng.usize(..3)];
    let mut bytes = vec![0; SIZE as usize];
    for _ in 0..rng.usize(..6) {
        let start = rng.usize(..bytes.len());
        let end = (start + rng.usize(..2 << 20)).min(bytes.len());
        (start..end).for_each(|at| bytes[at] = byte(at as u64));
    }
    let (read_only, bytes) = (rng.u8(..4) == 0, Mutex::new(bytes));
    let device = Arc::new(Memory { read_only, bytes, wrong: Mutex::default() });
    let asked_of = device.clone();
    let contexts = if rng.bool() { Contexts::all() } else { Contexts::default() };
    let terms = Terms::new(device.info(), headers, contexts);
    let sent = stream(rng, headers);
    let (client, server) = UnixStream::pair().unwrap();
    client.set_read_timeout(Some(PATIENCE)).unwrap();
    client.set_write_timeout(Some(PATIENCE)).unwrap();
    let (done, ended) = oneshot::channel();
    let early = sent[..rng.usize(..=sent.len().min(300))].to_vec();
    let rest = sent[early.len()..].to_vec();
    rings.spawn(0, move |ring| async move {
        let (socket, share) = (Arc::new(server.into()), Share::of(&Arc::default()));
        let figures = Arc::<Operations>::default();
        session::serve(ring, socket, device, terms, early, figures, share).await;
        let _ = done.send(());
    });
    match rng.u8(..5) {
        0 => {
            // It goes without a word, and without reading.
            let part = rng.usize(..=rest.len());
            client.set_nonblocking(true).unwrap();
            let _ = (&client).write(&rest[..part]);
            drop(client);
        }
        1 => {
            // It reads a little, and goes.
            client.set_nonblocking(true).unwrap();
            let _ = (&client).write(&rest);
            thread::sleep(Duration::from_micros(rng.u64(..500)));
            let _ = (&client).read(&mut vec![0; rng.usize(1..100_000)]);
            drop(client);
        }
        _ => {
            let received = converse(&client, &rest, rng);
            let (asked, may_break) = understood(headers, &sent);
            check(headers, &asked, &received, may_break);
        }
    }
    let waiting = async { tokio::time::timeout(PATIENCE, ended).await };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
    runtime.block_on(waiting).expect("the session does not end").unwrap();
    assert_eq!(*asked_of.wrong.lock().unwrap(), None);
}

/// Sends all of it, in pieces, and ends that half; all that came until the server closed.
fn converse(client: &UnixStream, bytes: &[u8], rng: &mut Rng) -> Vec<u8> {
    let mut received = vec![];
    thread::scope(|scope| {
        let reader = scope.spawn(|| {
            let mut received = vec![];
            match { client }.read_to_end(&mut received) {
                Ok(_) => received,
                Err(error) if error.kind() == ErrorKind::ConnectionReset => received,
                Err(error) => panic!("the server does not close: {error}"),
            }
        });
        let mut rest = bytes;
        while !rest.is_empty() {
            let len = rng.usize(1..200_000).min(rest.len());
            match { client }.write_all(&rest[..len]) {
                Ok(()) => rest = &rest[len..],
                Err(error) if error.kind() == ErrorKind::WouldBlock => panic!("it does not read"),
                // It closed before it had read all.
                Err(_) => break,
            }
        }
        let _ = client.shutdown(Shutdown::Write);
        received = reader.join().unwrap();
    });
    received
}

/// What a client sends: requests of which most make sense.
fn stream(rng: &mut Rng, headers: Headers) -> Vec<u8> {
    let mut bytes = vec![];
    let mut spoilt = rng.usize(..4).saturating_sub(1);
    let count = rng.usize(1..=REQUESTS);
    for index in 0..count {
        let command = if rng.u8(..60) == 0 {
            DISC
        } else {
            [0, 0, 0, 1, 1, 1, 3, 4, 5, 6, 7][rng.usize(..11)]
        };
        let longest = if rng.u8(..12) == 0 { SIZE } else { 40_000 };
        let mut len = rng.u64(1..=longest);
        let mut offset = rng.u64(..=SIZE - len);
        let mut flags = [0, 0, 1, DF, 8, 2][rng.usize(..6)];
        let allowed = match command {
            READ => 1 | DF,
            6 => 1 | 2,
            STATUS => 1 | 8,
            _ => 1,
        };
        flags &= allowed;
        if command == 3 {
            (offset, len) = (0, 0);
        }
        let odd = rng.usize(..count) < spoilt;
        if odd {
            spoilt -= 1;
            match rng.u8(..4) {
                0 => offset = number(rng),
                1 => len = number(rng),
                2 => flags = rng.u16(..),
                _ => (offset, len) = (number(rng), number(rng)),
            }
        }
        let extended = headers == Headers::Extended;
        if extended && command == WRITE && rng.bool() {
            flags |= PAYLOAD;
        }
        let magic = if extended { 0x21e4_1c71 } else { 0x2560_9513_u32 };
        let start = bytes.len();
        bytes.extend(magic.to_be_bytes());
        bytes.extend(flags.to_be_bytes());
        bytes.extend(command.to_be_bytes());
        bytes.extend((index as u64 + 1).to_be_bytes());
        bytes.extend(offset.to_be_bytes());
        match extended {
            true => bytes.extend(len.to_be_bytes()),
            false => bytes.extend((len as u32).to_be_bytes()),
        }
        if odd && rng.u8(..3) == 0 {
            let mut header = bytes.split_off(start);
            mutate(rng, &mut header, &[], 64);
            bytes.extend(header);
        }
        if command == WRITE || flags & PAYLOAD != 0 && extended {
            // As much as is claimed, unless that is absurd: then less comes than should.
            let payload = len.min(SIZE) as usize;
            bytes.resize(bytes.len() + payload, 0x5a);
        }
    }
    if rng.u8(..8) == 0 {
        bytes.truncate(rng.usize(1..=bytes.len()));
    }
    bytes
}

/// The requests of a stream that are due an answer, by their cookies; and whether the server may break off, since
/// a read that could not be held as a whole failed in the midst.
fn understood(headers: Headers, mut bytes: &[u8]) -> (HashMap<u64, Vec<Asked>>, bool) {
    let extended = headers == Headers::Extended;
    let len = if extended { 32 } else { 28 };
    let (mut asked, mut may_break) = (HashMap::<u64, Vec<Asked>>::new(), false);
    while let Some((header, rest)) = bytes.split_at_checked(len) {
        let be = |range: std::ops::Range<usize>| {
            header[range].iter().fold(0_u64, |number, byte| number << 8 | u64::from(*byte))
        };
        let magic = if extended { 0x21e4_1c71 } else { 0x2560_9513 };
        let (flags, command) = (be(4..6) as u16, be(6..8) as u16);
        let (cookie, offset, length) = (be(8..16), be(16..24), be(24..len));
        if be(0..4) != magic || command == DISC {
            break;
        }
        let payload = if command == WRITE || extended && flags & PAYLOAD != 0 { length } else { 0 };
        if extended && payload > 32 << 20 {
            break;
        }
        let Some((_, rest)) = rest.split_at_checked(payload as usize) else { break };
        bytes = rest;
        let in_one = headers == Headers::Simple || flags & DF != 0;
        let is_bad = offset < BAD.end && BAD.start < offset.saturating_add(length);
        may_break |= command == READ && in_one && is_bad && length > 8 << 20;
        asked.entry(cookie).or_default().push(Asked { command, flags, offset, len: length });
    }
    (asked, may_break)
}

/// Each request was answered once and wholly.
fn check(headers: Headers, asked: &HashMap<u64, Vec<Asked>>, received: &[u8], may_break: bool) {
    if asked.values().any(|asked| asked.len() > 1) {
        // By luck: who is answered can't be told.
        return;
    }
    let mut open: HashMap<u64, (Asked, u64)> =
        asked.iter().map(|(cookie, asked)| (*cookie, (asked[0], 0))).collect();
    let mut rest = received;
    let mut cut = false;
    while !rest.is_empty() && !cut {
        cut = take(headers, &mut rest, &mut open).is_none();
    }
    assert!(!cut || may_break, "the last answer is cut off");
    assert!(open.is_empty() || may_break, "no answer to {open:?}");
}

/// Takes one message; `None` if it is cut off.
fn take(headers: Headers, rest: &mut &[u8], open: &mut HashMap<u64, (Asked, u64)>) -> Option<()> {
    let mut field = |len: usize| {
        let (bytes, after) = rest.split_at_checked(len)?;
        *rest = after;
        Some(bytes)
    };
    let be = |bytes: &[u8]| bytes.iter().fold(0_u64, |number, byte| number << 8 | u64::from(*byte));
    let magic = be(field(4)?);
    if magic == 0x6744_6698 {
        assert!(headers != Headers::Extended);
        let (error, cookie) = (be(field(4)?), be(field(8)?));
        let (asked, _) = open.remove(&cookie).expect("a request that was asked");
        assert!(headers == Headers::Simple || !matches!(asked.command, READ | STATUS));
        judge(&asked, error);
        if asked.command == READ && error == 0 {
            content(asked.offset, field(asked.len as usize)?);
        }
        return Some(());
    }
    let extended = headers == Headers::Extended;
    assert!(
        magic == if extended { 0x6e8a_278c } else { 0x668e_33ef } && headers != Headers::Simple
    );
    let (flags, kind, cookie) = (be(field(2)?), be(field(2)?), be(field(8)?));
    let (asked, covered) = open.get_mut(&cookie).expect("a request that was asked");
    if extended {
        assert_eq!(be(field(8)?), asked.offset);
    }
    let len = be(field(if extended { 8 } else { 4 })?);
    assert!(len <= (32 << 20) + 8, "a chunk of {len} bytes");
    let payload = field(len as usize)?;
    let done = flags & 1 == 1;
    match (asked.command, kind) {
        (READ, 1 | 2) => {
            let at = be(&payload[..8]);
            let len = if kind == 1 { len - 8 } else { be(&payload[8..12]) };
            let within = at.checked_sub(asked.offset).is_some_and(|from| from + len <= asked.len);
            assert!(within && len > 0, "{len} bytes at {at} for {asked:?}");
            assert!(asked.flags & DF == 0 || done, "several chunks for DF");
            if kind == 1 {
                content(at, &payload[8..]);
            }
            *covered += len;
            assert!(!done || *covered == asked.len, "{covered} bytes for {asked:?}");
        }
        (STATUS, 5 | 6) => assert!(len > 4),
        (command, 0) if !matches!(command, READ | STATUS) || asked.len == 0 => judge(asked, 0),
        (_, 0x8001) => judge(asked, be(&payload[..4])),
        (_, kind) => panic!("a chunk of type {kind} for {asked:?}"),
    }
    if done {
        open.remove(&cookie);
    }
    Some(())
}

/// Whether a request may end so.
fn judge(asked: &Asked, error: u64) {
    let fits = asked.offset.checked_add(asked.len).is_some_and(|end| end <= SIZE);
    match error {
        0 => assert!(fits || asked.command == STATUS, "{asked:?} can't have been done"),
        1 | 5 | 22 | 28 | 75 | 95 => {}
        other => panic!("error {other} for {asked:?}"),
    }
}

fn content(offset: u64, bytes: &[u8]) {
    let wrong = (offset..).zip(bytes).find(|(at, found)| **found != 0 && **found != byte(*at));
    assert!(wrong.is_none(), "{wrong:?} is not what belongs there");
}
