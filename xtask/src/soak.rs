//! Clients that come and go for long: each reads, writes, discards, zeroes and flushes a replica of its own,
//! some requests at a time, leaves in one way or another, and comes back. Three disks, Unix and TCP sockets,
//! all three kinds of headers. The seed decides what each does.
//!
//! Invariants checked:
//! - every read, and at last every replica, is what was acknowledged; a write that was not sent whole never is
//!   there; what was under way when a client left is old or new;
//! - who only stops sending has all its answers;
//! - the daemon's memory and open files don't grow.

use std::collections::HashMap;
use std::fs;
use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use fastrand::Rng;

use crate::chaos::model::{Content, SECTOR, ZEROS, fill, number};
use crate::daemon::{Control, Daemon};
use crate::lab::Lab;
use crate::nbd::{Client, DISCONNECT, FLUSH, FUA, READ, TRIM, WRITE, WRITE_ZEROES};
use crate::pattern;
use crate::place::Profile;
use crate::report::Report;
use crate::subject::text;

const DISKS: usize = 3;
/// Size of the image, in bytes.
const IMAGE: u64 = 12 << 20;
/// Size of a replica, in bytes: an end of it has no image below.
const SIZE: u64 = 16 << 20;
/// Requests that a client has under way at most; each keeps to its own part of the replica.
const DEPTH: usize = 16;
/// The most sectors of a request, as a power of two.
const LONGEST: u32 = 8;
/// How long an answer may take.
const PATIENCE: Duration = Duration::from_secs(60);
/// Between two looks at the daemon.
const LOOK: Duration = Duration::from_millis(500);
/// What memory may grow by from the second third of the time to the last, in bytes: allocators keep some.
const SLACK: u64 = 12 << 20;

/// Runs the rig, with so many clients for so long.
pub fn run(lab: &Lab, clients: usize, time: Duration, seed: u64, report: &mut Report) {
    let name = format!("soak: {clients} clients for {} s, seed {seed}", time.as_secs());
    report.check(&name, || soak(lab, clients, time, seed));
}

fn soak(lab: &Lab, clients: usize, time: Duration, seed: u64) -> Result<String> {
    let dir = lab.dir("soak")?;
    let settings = "nbd_listen = \"127.0.0.1:0\"\nnbd_insecure = true\n";
    let mut daemon = Daemon::start(lab, &dir, "soak", Profile::Debug, settings)?;
    for at in 0..DISKS {
        let disk = dir.join(format!("disk{at}"));
        fs::create_dir_all(&disk)?;
        daemon.ok(&["disk", "add", text(&disk)?, "--name", &format!("d{at}")])?;
    }
    let raw = dir.join("image.raw");
    pattern::image(&raw, IMAGE, seed)?;
    daemon.ok(&["image", "import", text(&raw)?, "--name", "base", "--disk", "d0"])?;
    let base = Arc::new(fs::read(&raw)?);
    let address = daemon.json(&["status"])?["daemon"]["nbd_address"].as_str().map(str::to_owned);
    let address = address.context("status tells no nbd_address")?;
    let shared = Shared { over: AtomicBool::new(false), seen: Seen::default() };
    let mut rng = Rng::with_seed(seed);
    let mut all = Vec::new();
    for at in 0..clients {
        let (replica, disk) = (format!("vm{at}"), format!("d{}", at % DISKS));
        let size = SIZE.to_string();
        let create = ["replica", "create", &replica, "--image", "base", "--disk", &disk];
        daemon.ok(&[&create[..], &["--size", &size]].concat())?;
        all.push(Guest {
            way: match at % 4 {
                3 => Way::Tcp(address.clone()),
                _ => Way::Unix(daemon.nbd().to_owned()),
            },
            headers: [Headers::Simple, Headers::Structured, Headers::Extended][at % 3],
            control: daemon.control().clone(),
            replica,
            content: Content::new(base.clone(), SIZE),
            rng: rng.fork(),
        });
    }
    let before = look(&daemon)?;
    let (all, looks) = thread::scope(|scope| {
        let shared = &shared;
        let work = |mut guest: Guest| {
            scope.spawn(move || {
                let ended = guest.live(shared);
                if ended.is_err() {
                    shared.over.store(true, Ordering::SeqCst);
                }
                ended.with_context(|| format!("the client of {}", guest.replica)).map(|()| guest)
            })
        };
        let threads: Vec<_> = all.into_iter().map(work).collect();
        let looks = watch(&daemon, shared, time);
        shared.over.store(true, Ordering::SeqCst);
        let died = |_| anyhow::anyhow!("a client panicked");
        let ended = threads.into_iter().map(|thread| thread.join().map_err(died)?);
        let ended: Vec<Result<Guest>> = ended.collect();
        Ok::<_, anyhow::Error>((ended.into_iter().collect::<Result<Vec<_>>>()?, looks?))
    })?;
    let told = flat(&looks)?;
    let mut all = all;
    let verify = |daemon: &Daemon, all: &mut [Guest]| {
        all.iter_mut().try_for_each(|guest| {
            let mut client = Client::open(daemon.nbd(), &format!("replica/{}", guest.replica))?;
            let found = client.read_all(SIZE)?;
            guest.content.settle(&found).with_context(|| guest.replica.clone())
        })
    };
    verify(&daemon, &mut all)?;
    let after = settled(&daemon, &all, before.files)?;
    daemon.ok(&["fsck"])?;
    daemon.healthy()?;
    daemon.stop()?;
    daemon.restart()?;
    verify(&daemon, &mut all)?;
    daemon.stop()?;
    let count = |count: &AtomicU64| count.load(Ordering::Relaxed);
    let Seen { connections, requests, compared, cut } = &shared.seen;
    Ok(format!(
        "{} connections, {} of them cut off in the midst; {} requests, {} MiB compared; {told}; {} files open \
         before, {after} after",
        count(connections),
        count(cut),
        count(requests),
        count(compared) >> 20,
        before.files
    ))
}

/// What all clients share.
struct Shared {
    over: AtomicBool,
    seen: Seen,
}

/// What they did.
#[derive(Default)]
struct Seen {
    connections: AtomicU64,
    requests: AtomicU64,
    /// Bytes that were read and compared.
    compared: AtomicU64,
    /// Connections that were left with something under way.
    cut: AtomicU64,
}

/// The daemon at a moment.
#[derive(Clone, Copy)]
struct Look {
    /// In bytes.
    memory: u64,
    files: usize,
}

fn look(daemon: &Daemon) -> Result<Look> {
    let files = fs::read_dir(format!("/proc/{}/fd", daemon.id()?))?.count();
    Ok(Look { memory: daemon.memory()?, files })
}

/// Looks at the daemon until the time is over, or a client has failed.
fn watch(daemon: &Daemon, shared: &Shared, time: Duration) -> Result<Vec<Look>> {
    let (start, mut looks) = (Instant::now(), Vec::new());
    while start.elapsed() < time && !shared.over.load(Ordering::SeqCst) {
        thread::sleep(LOOK);
        looks.push(look(daemon)?);
    }
    Ok(looks)
}

/// Compares the second third of the time with the last: in the first, what is kept for reuse is made.
fn flat(looks: &[Look]) -> Result<String> {
    let third = looks.len() / 3;
    ensure!(third > 0, "too short to tell");
    let (middle, last) = (&looks[third..2 * third], &looks[2 * third..]);
    // What is asked for and not read comes and goes, some megabytes a client.
    let usual = |looks: &[Look]| {
        let mut memory: Vec<u64> = looks.iter().map(|look| look.memory).collect();
        memory.sort_unstable();
        memory[memory.len() / 2]
    };
    let most = |looks: &[Look]| looks.iter().map(|look| look.files).max().unwrap_or(0);
    let ((memory, files), (later, more)) =
        ((usual(middle), most(middle)), (usual(last), most(last)));
    let told = format!(
        "memory {} and then {} MiB (medians), {files} and then {more} open files at most",
        memory >> 20,
        later >> 20
    );
    ensure!(later <= memory + SLACK && more <= files + files / 4, "it grows: {told}");
    Ok(told)
}

/// How many files are open once every client has gone: what an idle replica keeps open, and no more.
fn settled(daemon: &Daemon, all: &[Guest], before: usize) -> Result<usize> {
    let start = Instant::now();
    loop {
        let files = look(daemon)?.files;
        if files <= before + 4 * all.len() {
            return Ok(files);
        }
        ensure!(start.elapsed() < PATIENCE, "{files} files are open, {before} before");
        thread::sleep(LOOK);
    }
}

/// How a client gets to the daemon.
enum Way {
    Unix(PathBuf),
    Tcp(String),
}

/// What requests and replies look like.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Headers {
    Simple,
    Structured,
    Extended,
}

/// A client, and what its replica must hold.
struct Guest {
    way: Way,
    headers: Headers,
    control: Control,
    replica: String,
    content: Content,
    rng: Rng,
}

/// A request under way.
struct Ask {
    command: u16,
    first: usize,
    count: usize,
    number: u32,
}

impl Guest {
    /// Comes and goes until it is over.
    fn live(&mut self, shared: &Shared) -> Result<()> {
        while !shared.over.load(Ordering::SeqCst) {
            let mut line = Line::open(&self.way, &self.replica, self.headers)?;
            shared.seen.connections.fetch_add(1, Ordering::Relaxed);
            for _ in 0..self.rng.usize(..40) {
                let asks = self.send(&mut line)?;
                self.receive(&mut line, asks, shared)?;
                if shared.over.load(Ordering::SeqCst) {
                    break;
                }
            }
            self.leave(line, shared)?;
        }
        Ok(())
    }

    /// Sends some requests, each to its own part of the replica, as it may be in pieces.
    fn send(&mut self, line: &mut Line) -> Result<HashMap<u64, Ask>> {
        let (mut asks, mut message) = (HashMap::new(), Vec::new());
        for part in 0..self.rng.usize(1..=DEPTH) {
            let sectors = SIZE as usize / SECTOR / DEPTH;
            let longest = 1 << self.rng.u32(..=LONGEST);
            let (mut first, mut count) = (self.rng.usize(..sectors), self.rng.usize(1..=longest));
            if self.rng.bool() {
                // As file systems do it.
                (first, count) = (first / 8 * 8, count.next_multiple_of(8));
            }
            count = count.min(sectors - first);
            first += part * sectors;
            let command = match self.rng.u8(..16) {
                0 => FLUSH,
                1 => TRIM,
                2..4 => WRITE_ZEROES,
                4..9 => WRITE,
                _ => READ,
            };
            let number = match command {
                WRITE => number(),
                _ => ZEROS,
            };
            let flags = if self.rng.u8(..16) == 0 { FUA } else { 0 };
            let data: Vec<u8> = match command {
                WRITE => (first..first + count).flat_map(|at| fill(number, at)).collect(),
                _ => Vec::new(),
            };
            if matches!(command, WRITE | WRITE_ZEROES | TRIM) {
                self.content.begin(first, count, number);
            }
            let range = if command == FLUSH { (0, 0) } else { (first * SECTOR, count * SECTOR) };
            let cookie = line.request(command, flags, range, &data, &mut message);
            asks.insert(cookie, Ask { command, first, count, number });
        }
        match self.rng.u8(..8) {
            0 => {
                for piece in message.chunks(self.rng.usize(1..20_000)) {
                    line.stream.write_all(piece)?;
                }
            }
            _ => line.stream.write_all(&message)?,
        }
        Ok(asks)
    }

    /// Takes the answers to all of them, in whatever order they come.
    fn receive(
        &mut self,
        line: &mut Line,
        mut asks: HashMap<u64, Ask>,
        shared: &Shared,
    ) -> Result<()> {
        while !asks.is_empty() {
            let bytes = |cookie| {
                let ask = asks.get(&cookie).context("an answer to nothing")?;
                Ok(if ask.command == READ { ask.count * SECTOR } else { 0 })
            };
            let (cookie, found) = line.answer(bytes)?;
            let Some(Ask { command, first, count, number }) = asks.remove(&cookie) else {
                bail!("two answers to one request");
            };
            match command {
                READ => {
                    self.content.compare(first, &found)?;
                    shared.seen.compared.fetch_add(found.len() as u64, Ordering::Relaxed);
                }
                // A trim may leave what was there.
                WRITE | WRITE_ZEROES => self.content.done(first, count, number),
                _ => {}
            }
            shared.seen.requests.fetch_add(1, Ordering::Relaxed);
        }
        Ok(())
    }

    /// Goes, in one of the ways in which clients do.
    fn leave(&mut self, mut line: Line, shared: &Shared) -> Result<()> {
        let mut message = Vec::new();
        match self.rng.u8(..8) {
            // As the protocol has it: the server closes when all is answered.
            0 | 1 => {
                let asks = self.send(&mut line)?;
                line.request(DISCONNECT, 0, (0, 0), &[], &mut message);
                line.stream.write_all(&message)?;
                self.receive(&mut line, asks, shared)?;
                return line.ends();
            }
            // It only stops sending.
            2 => {
                let asks = self.send(&mut line)?;
                line.stream.shutdown(Shutdown::Write)?;
                self.receive(&mut line, asks, shared)?;
                return line.ends();
            }
            3 => return Ok(()),
            // With much to read that it never reads.
            4 => {
                for _ in 0..64 {
                    line.request(READ, 0, (0, 1 << 20), &[], &mut message);
                }
                let _ = line.stream.write_all(&message);
                thread::sleep(Duration::from_millis(self.rng.u64(..100)));
            }
            // Within a header.
            5 => {
                line.request(FLUSH, 0, (0, 0), &[], &mut message);
                let _ = line.stream.write_all(&message[..self.rng.usize(1..message.len())]);
            }
            // Within the data of a write, none of which may be seen.
            6 => {
                let data = vec![0x77; self.rng.usize(2..200) * SECTOR];
                line.request(WRITE, 0, (0, data.len()), &data, &mut message);
                let sent = message.len() - self.rng.usize(1..data.len());
                let _ = line.stream.write_all(&message[..sent]);
            }
            // With requests under way.
            _ => drop(self.send(&mut line)?),
        }
        shared.seen.cut.fetch_add(1, Ordering::Relaxed);
        drop(line);
        // What was not answered may be done until the session has ended.
        let start = Instant::now();
        while self.control.json(&["replica", "inspect", &self.replica])?["clients"]
            .as_array()
            .is_none_or(|clients| !clients.is_empty())
        {
            ensure!(start.elapsed() < PATIENCE, "a session does not end when its client has gone");
            thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }
}

/// A stream of either kind.
trait Stream: Read + Write + Send {
    fn shutdown(&self, how: Shutdown) -> std::io::Result<()>;
}

impl Stream for UnixStream {
    fn shutdown(&self, how: Shutdown) -> std::io::Result<()> {
        UnixStream::shutdown(self, how)
    }
}

impl Stream for TcpStream {
    fn shutdown(&self, how: Shutdown) -> std::io::Result<()> {
        TcpStream::shutdown(self, how)
    }
}

/// A connection, with requests and answers of one kind.
struct Line {
    stream: Box<dyn Stream>,
    headers: Headers,
    cookie: u64,
}

impl Line {
    fn open(way: &Way, replica: &str, headers: Headers) -> Result<Line> {
        let stream: Box<dyn Stream> = match way {
            Way::Unix(path) => {
                let stream = UnixStream::connect(path)?;
                stream.set_read_timeout(Some(PATIENCE))?;
                Box::new(stream)
            }
            Way::Tcp(address) => {
                let stream = TcpStream::connect(address)?;
                stream.set_read_timeout(Some(PATIENCE))?;
                stream.set_nodelay(true)?;
                Box::new(stream)
            }
        };
        let mut line = Line { stream, headers, cookie: 0 };
        line.take(18)?;
        line.stream.write_all(&3_u32.to_be_bytes())?;
        match headers {
            Headers::Simple => {}
            Headers::Structured => line.option(8, &[])?,
            Headers::Extended => line.option(11, &[])?,
        }
        let export = format!("replica/{replica}");
        let length = (export.len() as u32).to_be_bytes();
        line.option(7, &[&length[..], export.as_bytes(), &[0, 0]].concat())?;
        Ok(line)
    }

    /// Asks for an option, which must be granted.
    fn option(&mut self, option: u32, data: &[u8]) -> Result<()> {
        let mut message = b"IHAVEOPT".to_vec();
        message.extend(option.to_be_bytes());
        message.extend((data.len() as u32).to_be_bytes());
        message.extend(data);
        self.stream.write_all(&message)?;
        loop {
            let head = self.take(20)?;
            let (kind, length) = (word(&head[12..]), word(&head[16..]));
            self.take(length as usize)?;
            match kind {
                1 => return Ok(()),
                3 => {}
                other => bail!("option {option} is answered by {other:#x}"),
            }
        }
    }

    /// Appends a request to `message`, and tells its cookie.
    fn request(
        &mut self,
        command: u16,
        flags: u16,
        (offset, length): (usize, usize),
        data: &[u8],
        message: &mut Vec<u8>,
    ) -> u64 {
        self.cookie += 1;
        let extended = self.headers == Headers::Extended;
        let payload = if extended && command == WRITE { 1 << 5 } else { 0 };
        let magic: u32 = if extended { 0x21e4_1c71 } else { 0x2560_9513 };
        message.extend(magic.to_be_bytes());
        message.extend((flags | payload).to_be_bytes());
        message.extend(command.to_be_bytes());
        message.extend(self.cookie.to_be_bytes());
        message.extend((offset as u64).to_be_bytes());
        match extended {
            true => message.extend((length as u64).to_be_bytes()),
            false => message.extend((length as u32).to_be_bytes()),
        }
        message.extend(data);
        self.cookie
    }

    /// The next answer: whom it answers, and what was read. `bytes` tells how much each is owed.
    fn answer(&mut self, bytes: impl Fn(u64) -> Result<usize>) -> Result<(u64, Vec<u8>)> {
        if self.headers == Headers::Simple {
            let head = self.take(16)?;
            let cookie = long(&head[8..]);
            ensure!(word(&head) == 0x6744_6698, "no simple reply: {head:02x?}");
            ensure!(word(&head[4..]) == 0, "request {cookie} failed: {}", word(&head[4..]));
            let data = self.take(bytes(cookie)?)?;
            return Ok((cookie, data));
        }
        let extended = self.headers == Headers::Extended;
        let (magic, size) = if extended { (0x6e8a_278c, 32) } else { (0x668e_33ef, 20) };
        let head = self.take(size)?;
        ensure!(word(&head) == magic && head[5] == 1, "no last chunk: {head:02x?}");
        let (kind, cookie) = (u16::from_be_bytes([head[6], head[7]]), long(&head[8..]));
        let length = if extended { long(&head[24..]) as usize } else { word(&head[16..]) as usize };
        let owed = bytes(cookie)?;
        ensure!(length <= owed + 4096, "{length} bytes, {owed} are owed");
        let payload = self.take(length)?;
        let data = match kind {
            0 => Vec::new(),
            1 => payload[8..].to_vec(),
            2 => vec![0; word(&payload[8..]) as usize],
            _ => bail!("request {cookie} failed: {}", String::from_utf8_lossy(&payload)),
        };
        ensure!(data.len() == owed, "{} bytes, {owed} are owed", data.len());
        Ok((cookie, data))
    }

    /// Nothing more may come.
    fn ends(&mut self) -> Result<()> {
        let more = self.stream.read(&mut [0])?;
        ensure!(more == 0, "an answer too many");
        Ok(())
    }

    fn take(&mut self, length: usize) -> Result<Vec<u8>> {
        let mut bytes = vec![0; length];
        self.stream.read_exact(&mut bytes).context("the server hung up, or is silent")?;
        Ok(bytes)
    }
}

fn word(bytes: &[u8]) -> u32 {
    u32::from_be_bytes([bytes[0], bytes[1], bytes[2], bytes[3]])
}

fn long(bytes: &[u8]) -> u64 {
    u64::from(word(bytes)) << 32 | u64::from(word(&bytes[4..]))
}
