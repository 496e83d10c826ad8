//! kill -9 in the midst of writes, again and again: whatever was flushed is there.
//!
//! Invariants checked, each time after a restart:
//! - a sector holds the last content that an acknowledged flush (of any connection) or FUA covered,
//!   or one written since; never anything else: not older, not torn, not another sector's;
//! - a sector never written holds the base's content;
//! - with fio's own writes, each followed by an fsync, everything but the last is there.
//!
//! What was read after one crash is what must be there after the next.

use std::fs;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail, ensure};
use fastrand::Rng;

use crate::lab::Lab;
use crate::nbd::{Client, FUA, Failure};
use crate::report::Report;
use crate::subject::{Against, Subject};
use crate::tool::tool;
use crate::{pattern, setup};

/// How many times in a row the server is killed.
const KILLS: u64 = 10;
/// Writers, each with a connection of its own.
const WRITERS: u64 = 4;
/// The size of the image, in bytes.
const SIZE: u64 = 64 << 20;
/// The part where writers meet within blocks: each owns pairs of sectors, in turn.
const SHARED: u64 = 1 << 20;
/// The part of its own that each writer has behind it, in bytes.
const OWN: u64 = 2 << 20;
/// What of the replica is written and checked, in bytes; the rest must stay as it was.
const WRITTEN: u64 = SHARED + WRITERS * OWN;
const SECTOR: u64 = 512;
/// How long a server may serve before it is killed, in milliseconds.
const LIFE: std::ops::Range<u64> = 200..1000;
/// How long it may take until all are at work, or fio has seen that its server is gone.
const START: Duration = Duration::from_secs(60);
/// What fio says when it is.
const CONNECTED: &str = "connected to NBD server";

/// Runs the rig.
pub fn run(lab: &Lab, against: Against, seed: u64, report: &mut Report) {
    if let Err(error) = setup::need(&["qemu-img", "fio"]) {
        return report.skip("kill", &format!("{error:#}"));
    }
    if let Err(error) = job(lab, against, seed, report) {
        report.broken("kill", &error);
    }
}

fn job(lab: &Lab, against: Against, seed: u64, report: &mut Report) -> Result<()> {
    let dir = lab.dir("kill")?;
    let (raw, qcow2) = (dir.join("base.raw"), dir.join("base.qcow2"));
    pattern::image(&raw, SIZE, seed)?;
    tool("qemu-img", ["convert", "-O", "qcow2"]).args([&raw, &qcow2]).run()?;
    let disks = ["a", "b"].map(|name| (name, dir.join(name)));
    for (_, path) in &disks {
        fs::create_dir_all(path)?;
    }
    let disks = disks.each_ref().map(|(name, path)| (*name, path.as_path()));
    let mut subject = Subject::start(lab, &dir, against, &disks)?;
    subject.import(&qcow2, "base", "a")?;
    subject.replica("own", "base", "b")?;
    subject.replica("fio", "base", "b")?;
    let base = fs::read(&raw)?;
    let mut model = Model::new(&base);
    let mut total = Figures::default();
    for round in 1..=KILLS {
        let name = format!("kill: {round} of {KILLS} (seed {seed})");
        let passed = report.check(&name, || {
            let figures = once(&mut subject, &mut model, &dir, round, seed ^ (round << 32))?;
            total.add(&figures);
            Ok(figures.to_string())
        });
        if !passed {
            return subject.kill();
        }
    }
    report.check(
        "kill: the rest of the replica is untouched, a clean stop changes nothing",
        || {
            subject.stop()?;
            subject.restart()?;
            subject.healthy()?;
            model.check(&mut Client::open(&subject.socket("replica/own"), "replica/own")?)?;
            let mut client = Client::open(&subject.socket("replica/own"), "replica/own")?;
            let all = client.read_all(SIZE)?;
            let rest = usize::try_from(WRITTEN)?;
            if let Some(at) = pattern::differ(&all[rest..], &base[rest..]) {
                bail!("byte {} was never written, but changed", rest + at);
            }
            ensure!(total.fio > 0, "fio never got an fsync through");
            Ok(format!("in all {total}"))
        },
    );
    subject.stop()
}

/// What happened before one kill, or before all of them.
#[derive(Default)]
struct Figures {
    writes: u64,
    flushes: u64,
    durable: u64,
    fio: u64,
}

impl Figures {
    fn add(&mut self, other: &Figures) {
        self.writes += other.writes;
        self.flushes += other.flushes;
        self.durable += other.durable;
        self.fio += other.fio;
    }
}

impl std::fmt::Display for Figures {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Figures { writes, flushes, durable, fio } = self;
        write!(f, "{writes} writes, {flushes} flushes, {durable} made durable; fio {fio} fsynced")
    }
}

/// Lets the writers and fio at it, kills the server, restarts it, looks.
fn once(
    subject: &mut Subject,
    model: &mut Model,
    dir: &Path,
    round: u64,
    seed: u64,
) -> Result<Figures> {
    let mut rng = Rng::with_seed(seed);
    let socket = subject.socket("replica/own");
    let dead = AtomicBool::new(false);
    let shared = Mutex::new(Ledger { model, figures: Figures::default(), clock: 0 });
    let log = dir.join(format!("fio-{round}"));
    let said = dir.join(format!("fio-{round}.log"));
    let fio = fio(&subject.uri("replica/fio"), &log, round);
    let mut fio = fio.within(dir).background(&said)?;
    thread::scope(|scope| -> Result<()> {
        let writers: Vec<_> = (0..WRITERS)
            .map(|id| {
                let client = Client::open(&socket, "replica/own");
                let rng = Rng::with_seed(seed ^ (id + 1));
                let (shared, dead) = (&shared, &dead);
                scope.spawn(move || Writer { id, rng, shared, dead }.write(client?))
            })
            .collect();
        // The server's life is counted from when all of them are at work.
        fio.until(START, || {
            let shared = shared.lock().unwrap_or_else(PoisonError::into_inner);
            shared.figures.flushes > 0
                && fs::read_to_string(&said).is_ok_and(|said| said.contains(CONNECTED))
        })?;
        thread::sleep(Duration::from_millis(rng.u64(LIFE)));
        dead.store(true, Ordering::SeqCst);
        subject.kill()?;
        for writer in writers {
            writer.join().map_err(|_| anyhow!("a writer panicked"))??;
        }
        Ok(())
    })?;
    // It ends by itself: its connection is gone.
    fio.wait(START)?;
    let mut figures = shared.into_inner().unwrap_or_else(PoisonError::into_inner).figures;
    subject.restart()?;
    subject.healthy()?;
    model.check(&mut Client::open(&subject.socket("replica/own"), "replica/own")?)?;
    figures.fio = fsynced(subject, &log, round).with_context(|| fio.said())?;
    Ok(figures)
}

/// fio, one write and one fsync at a time; each block says its own offset and the round.
fn fio(uri: &str, log: &Path, round: u64) -> crate::tool::Tool {
    tool("fio", ["--name=kill", "--ioengine=nbd", "--rw=randwrite", "--bs=4k", "--fsync=1"])
        .args([format!("--uri={uri}"), format!("--size={SIZE}"), format!("--randseed={round}")])
        .args([format!("--verify_pattern=%o0x{}", word(round))])
        .args(["--verify=pattern", "--verify_interval=4096", "--do_verify=0", "--norandommap"])
        .args(["--time_based", "--runtime=60", "--log_offset=1"])
        .args([format!("--write_lat_log={}", log.display())])
}

/// The round as the eight hexadecimal digits that fio writes behind each offset.
fn word(round: u64) -> String {
    format!("{:08x}", 0xf10f_1000 + round)
}

/// Checks what fio logged as written; all but the last were fsynced. Returns how many.
fn fsynced(subject: &Subject, log: &Path, round: u64) -> Result<u64> {
    let file = format!("{}_clat.1.log", log.display());
    let text = fs::read_to_string(&file).with_context(|| format!("reading {file}"))?;
    let offsets = text.lines().filter_map(|line| {
        let mut fields = line.split(',').map(str::trim);
        let kind = fields.nth(2)?;
        let offset = fields.nth(1)?.parse::<u64>().ok()?;
        (kind == "1").then_some(offset)
    });
    let offsets: Vec<_> = offsets.collect();
    let Some((_, covered)) = offsets.split_last() else { bail!("fio logged no write") };
    let mut client = Client::open(&subject.socket("replica/fio"), "replica/fio")?;
    let digits = u32::from_str_radix(&word(round), 16)?;
    let mut block = [0; 4096];
    for offset in covered {
        client.read(*offset, &mut block)?;
        let mut want = Vec::with_capacity(4096 + 12);
        while want.len() < block.len() {
            want.extend(offset.to_le_bytes());
            want.extend(digits.to_be_bytes());
        }
        if let Some(at) = pattern::differ(&block, &want[..4096]) {
            bail!("fio's fsynced write at {offset} is not there (byte {at})");
        }
    }
    Ok(covered.len() as u64)
}

/// What one sector may hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Content {
    /// What the image holds there.
    Base,
    Zero,
    /// The write with this number.
    Write(u64),
}

/// One content that a sector was given.
#[derive(Clone, Copy)]
struct Entry {
    content: Content,
    /// When it was acknowledged; `None` while it is in flight.
    acknowledged: Option<u64>,
    /// A trim may leave what was there: it never replaces what came before.
    optional: bool,
}

/// For each sector, the contents that it may have: the last durable one and those since.
struct Model<'a> {
    base: &'a [u8],
    sectors: Vec<Vec<Entry>>,
    writes: u64,
}

impl<'a> Model<'a> {
    fn new(base: &'a [u8]) -> Model<'a> {
        let first = Entry { content: Content::Base, acknowledged: Some(0), optional: false };
        Model { base, sectors: vec![vec![first]; (WRITTEN / SECTOR) as usize], writes: 0 }
    }

    /// Reads every sector; it must be one of those that it may be, which then is the only one.
    fn check(&mut self, client: &mut Client) -> Result<()> {
        let all = client.read_all(WRITTEN)?;
        for (sector, entries) in self.sectors.iter_mut().enumerate() {
            let at = sector * SECTOR as usize;
            let found = &all[at..at + SECTOR as usize];
            let base = &self.base[at..at + SECTOR as usize];
            let fits = |entry: &&Entry| match entry.content {
                Content::Base => found == base,
                Content::Zero => found.iter().all(|byte| *byte == 0),
                Content::Write(number) => found == fill(number, sector as u64).as_slice(),
            };
            let Some(entry) = entries.iter().rev().find(fits).copied() else {
                let may: Vec<_> = entries.iter().map(|entry| entry.content).collect();
                let head = &found[..16];
                bail!("sector {sector} may hold {may:?}, but starts with {head:02x?}");
            };
            entries.clear();
            entries.push(Entry { acknowledged: Some(0), optional: false, ..entry });
        }
        Ok(())
    }
}

/// The content of a sector in write `number`: no other write's, no other sector's.
fn fill(number: u64, sector: u64) -> [u8; SECTOR as usize] {
    let mut bytes = [0; SECTOR as usize];
    let mut rng = Rng::with_seed(number << 20 | sector);
    rng.fill(&mut bytes);
    bytes
}

/// The model as the writers share it, with the clock of acknowledgements.
struct Ledger<'m, 'a> {
    model: &'m mut Model<'a>,
    figures: Figures,
    clock: u64,
}

impl Ledger<'_, '_> {
    /// Everything acknowledged up to `until` is durable: what came before it is gone for good.
    fn flushed(&mut self, until: u64) {
        for entries in &mut self.model.sectors {
            let durable = entries.iter().rposition(|entry| {
                !entry.optional && entry.acknowledged.is_some_and(|when| when <= until)
            });
            if let Some(at @ 1..) = durable {
                entries.drain(..at);
                self.figures.durable += 1;
            }
        }
        self.figures.flushes += 1;
    }
}

/// One writer: its own sectors, its own connection.
struct Writer<'s, 'm, 'a> {
    id: u64,
    rng: Rng,
    shared: &'s Mutex<Ledger<'m, 'a>>,
    dead: &'s AtomicBool,
}

impl Writer<'_, '_, '_> {
    /// Writes until the connection is lost, which must not be before the server was killed.
    fn write(mut self, mut client: Client) -> Result<()> {
        loop {
            let done = if self.rng.u8(..8) == 0 {
                self.flush(&mut client)
            } else {
                self.change(&mut client)
            };
            match done {
                Ok(()) => {}
                Err(Failure::Lost(_)) if self.dead.load(Ordering::SeqCst) => return Ok(()),
                Err(failure) => return Err(failure.into()),
            }
        }
    }

    fn flush(&mut self, client: &mut Client) -> Result<(), Failure> {
        let before = self.ledger(|ledger| ledger.clock);
        client.flush()?;
        self.ledger(|ledger| ledger.flushed(before));
        Ok(())
    }

    fn change(&mut self, client: &mut Client) -> Result<(), Failure> {
        let (first, count) = self.place();
        let kind = self.rng.u8(..16);
        let flags = if self.rng.u8(..8) == 0 { FUA } else { 0 };
        let number = self.ledger(|ledger| {
            ledger.model.writes += 1;
            let number = ledger.model.writes;
            let content = if kind < 3 { Content::Zero } else { Content::Write(number) };
            let entry = Entry { content, acknowledged: None, optional: kind == 0 };
            for sector in first..first + count {
                ledger.model.sectors[sector as usize].push(entry);
            }
            number
        });
        let (offset, len) = (first * SECTOR, (count * SECTOR) as usize);
        match kind {
            0 => client.trim(offset, len, flags)?,
            1 | 2 => client.zero(offset, len, flags)?,
            _ => {
                let data: Vec<u8> = (first..first + count).flat_map(|s| fill(number, s)).collect();
                client.write(offset, &data, flags)?;
            }
        }
        self.ledger(|ledger| {
            ledger.clock += 1;
            ledger.figures.writes += 1;
            for sector in first..first + count {
                let entries = &mut ledger.model.sectors[sector as usize];
                let Some(last) = entries.last_mut() else { continue };
                last.acknowledged = Some(ledger.clock);
                if flags == FUA && !last.optional {
                    entries.drain(..entries.len() - 1);
                }
            }
        });
        Ok(())
    }

    /// Sectors of this writer: pairs among those of others, or a longer run of its own.
    fn place(&mut self) -> (u64, u64) {
        if self.rng.bool() {
            let group = self.rng.u64(..SHARED / SECTOR / (2 * WRITERS));
            let first = group * 2 * WRITERS + 2 * self.id;
            return (first + self.rng.u64(..2), 1);
        }
        let own = OWN / SECTOR;
        let (first, longest) = (self.rng.u64(..own), 1 << self.rng.u32(..9));
        let count = self.rng.u64(1..=longest).min(own - first);
        (SHARED / SECTOR + self.id * own + first, count)
    }

    fn ledger<T>(&self, with: impl FnOnce(&mut Ledger<'_, '_>) -> T) -> T
    where
        Self: Sized,
    {
        with(&mut self.shared.lock().unwrap_or_else(PoisonError::into_inner))
    }
}
