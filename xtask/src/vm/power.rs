//! Power cuts under flushed writes, on disks that forget what was not flushed to them.
//!
//! Invariants checked, after each cut, in the next boot:
//! - every write to a replica that was acknowledged before an acknowledged flush (or had FUA) is there;
//! - every other written sector is, as a whole, one of its writes since, or what it held before;
//! - the rest of the replica, and the image, are what they were; the daemon opens and its fsck finds
//!   nothing; an image and a replica whose making was acknowledged are there;
//! - all of that also while the replica moves from disk to disk: it is on one of them.
//!
//! The host keeps the truth: it is told of each write before it is sent, and of each flush after it
//! was acknowledged. A cut loses what the guest's kernel and the drives' write caches held: all of
//! it, or what a flush under way left. It does not tear a sector, and a drive that reorders writes
//! between two flushes in its own way is not shown: that is for a replay of dm-log-writes.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail, ensure};
use fastrand::Rng;

use super::guest::Guest;
use crate::daemon::Daemon;
use crate::nbd::{Client, FUA};
use crate::pattern;

/// Size of the image, in bytes.
const SIZE: u64 = 24 << 20;
/// Writers, each with a connection of its own.
const WRITERS: u64 = 3;
const SECTOR: u64 = 512;
/// The sectors in which writers meet within blocks: each owns pairs, in turn.
const SHARED: u64 = 1536;
/// The sectors of its own that each writer has behind them.
const OWN: u64 = 4096;
/// Where the written part of the replica ends, in sectors.
const WRITTEN: u64 = SHARED + WRITERS * OWN;

/// Whether the replica stays where it is.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Stay {
    Put,
    Moving,
}

/// Runs one phase of the test; its disks: a (ext4, the image and the daemon's state), b (xfs).
pub fn run(guest: &mut Guest) -> Result<()> {
    phase(guest, Stay::Put)
}

/// The same, while the replica moves to and fro.
pub fn moving(guest: &mut Guest) -> Result<()> {
    phase(guest, Stay::Moving)
}

fn phase(guest: &mut Guest, stay: Stay) -> Result<()> {
    let raw = guest.dir().join("base.raw");
    pattern::image(&raw, SIZE, guest.seed)?;
    let base = fs::read(&raw)?;
    let daemon = if guest.phase == 0 { first(guest, &raw)? } else { again(guest)? };
    if guest.phase > 0 {
        let name = format!("cut {}: what was flushed is there", guest.phase);
        let mut daemon = Some(&daemon);
        let passed = guest.check(&name, |guest| {
            let daemon = daemon.take().context("no daemon")?;
            daemon.ok(&["fsck"])?;
            let mut model = Model::default();
            let told = guest.told()?;
            for line in told.lines().filter(|line| !line.is_empty()) {
                model.hear(line).with_context(|| format!("in the ledger: {line}"))?;
            }
            ensure!(model.flushes > 0, "no flush was acknowledged before the cut");
            ensure!(model.moves > 0 || stay == Stay::Put, "it was never moved");
            let found = model.check(daemon.nbd(), &base)?;
            for Found { sector, number, .. } in &found {
                guest.tell(&format!("c {sector} {number}"))?;
            }
            let Model { writes, flushes, moves, .. } = model;
            let (open, lost) = (found.len(), found.iter().filter(|found| found.lost).count());
            Ok(format!(
                "{writes} writes, {flushes} flushes, {moves} moves so far; of {open} sectors without a \
                 flush {lost} were lost"
            ))
        })?;
        if !passed || guest.last {
            return Ok(());
        }
    }
    write(guest, &daemon, stay)
}

/// Makes everything, and syncs nothing: what the daemon acknowledges is durable.
fn first(guest: &Guest, raw: &Path) -> Result<Daemon> {
    let (a, b) = (guest.format("a")?, guest.format("b")?);
    let daemon = guest.daemon_in(&a, "")?;
    for (name, path) in [("a", &a), ("b", &b)] {
        daemon.ok(&["disk", "add", &path.to_string_lossy(), "--name", name])?;
    }
    let source = raw.to_string_lossy();
    daemon.ok(&["image", "import", &source, "--name", "base", "--disk", "a"])?;
    daemon.ok(&["replica", "create", "vm", "--image", "base", "--disk", "b"])?;
    Ok(daemon)
}

fn again(guest: &Guest) -> Result<Daemon> {
    let a = guest.mount("a")?;
    guest.mount("b")?;
    guest.daemon_in(&a, "")
}

/// Writes until the power goes: it only returns with an error.
fn write(guest: &Guest, daemon: &Daemon, stay: Stay) -> Result<()> {
    let (ended, moves) = (AtomicBool::new(false), AtomicU64::new(0));
    let numbers = AtomicU64::new(guest.phase << 32 | 1);
    let flushes: Vec<_> = (0..WRITERS).map(|_| AtomicU64::new(0)).collect();
    thread::scope(|scope| {
        let writers: Vec<_> = (0..WRITERS)
            .map(|id| {
                let rng = Rng::with_seed(guest.seed << 16 | guest.phase << 4 | id);
                let (numbers, flushed) = (&numbers, &flushes[id as usize]);
                let writer = Writer { id, rng, guest, numbers, flushed };
                scope.spawn(move || writer.write(daemon.nbd()))
            })
            .collect();
        let mover = (stay == Stay::Moving)
            .then(|| scope.spawn(|| move_about(guest, daemon, &ended, &moves)));
        let begun = || {
            flushes.iter().all(|count| count.load(Ordering::SeqCst) > 0)
                && (mover.is_none() || moves.load(Ordering::SeqCst) > 0)
        };
        while !begun() && !writers.iter().any(|writer| writer.is_finished()) {
            thread::sleep(Duration::from_millis(10));
        }
        if !writers.iter().any(|writer| writer.is_finished()) {
            guest.ready()?;
        }
        let written = writers
            .into_iter()
            .try_for_each(|writer| writer.join().map_err(|_| anyhow!("a writer panicked"))?);
        ended.store(true, Ordering::SeqCst);
        let moved = mover.map(|mover| mover.join().map_err(|_| anyhow!("the mover panicked")));
        written.and(moved.transpose()?.transpose().map(drop))
    })
}

/// Moves the replica from disk to disk until the end.
fn move_about(guest: &Guest, daemon: &Daemon, ended: &AtomicBool, moves: &AtomicU64) -> Result<()> {
    while !ended.load(Ordering::SeqCst) {
        let on = daemon.json(&["replica", "inspect", "vm"])?["disk"].clone();
        let to = if on == "a" { "b" } else { "a" };
        daemon.ok(&["replica", "migrate", "vm", "--to", to])?;
        guest.tell("m 1")?;
        moves.fetch_add(1, Ordering::SeqCst);
    }
    Ok(())
}

/// One writer: its own sectors, its own connection, one request at a time.
struct Writer<'g> {
    id: u64,
    rng: Rng,
    guest: &'g Guest,
    numbers: &'g AtomicU64,
    flushed: &'g AtomicU64,
}

impl Writer<'_> {
    fn write(mut self, socket: &Path) -> Result<()> {
        let mut client = Client::open(socket, "replica/vm")?;
        let id = self.id;
        loop {
            if self.rng.u8(..12) == 0 {
                client.flush()?;
                self.guest.tell(&format!("f {id}"))?;
                self.flushed.fetch_add(1, Ordering::SeqCst);
                continue;
            }
            let number = self.numbers.fetch_add(1, Ordering::SeqCst);
            let (first, count) = self.place();
            let zero = self.rng.u8(..6) == 0;
            let flags = if self.rng.u8(..8) == 0 { FUA } else { 0 };
            let kind = if zero { "z" } else { "w" };
            self.guest.tell(&format!("{kind} {id} {number} {first} {count}"))?;
            if zero {
                client.zero(first * SECTOR, (count * SECTOR) as usize, flags)?;
            } else {
                let sectors = first..first + count;
                let data: Vec<u8> = sectors.flat_map(|sector| fill(number, sector)).collect();
                client.write(first * SECTOR, &data, flags)?;
            }
            if flags == FUA || self.guest.overclaim {
                self.guest.tell(&format!("u {id}"))?;
            }
        }
    }

    /// Sectors of this writer: some of its pair among those of others, or a run of its own.
    fn place(&mut self) -> (u64, u64) {
        if self.rng.bool() {
            let group = self.rng.u64(..SHARED / (2 * WRITERS));
            let first = group * 2 * WRITERS + 2 * self.id;
            return (first + self.rng.u64(..2), 1);
        }
        let (first, longest) = (self.rng.u64(..OWN), 1 << self.rng.u32(..9));
        let count = self.rng.u64(1..=longest).min(OWN - first);
        (SHARED + self.id * OWN + first, count)
    }
}

/// What the ledger says that each sector may hold: write numbers, the last durable one first; 0 is
/// what the image holds.
#[derive(Default)]
struct Model {
    sectors: BTreeMap<u64, Vec<u64>>,
    zeros: BTreeSet<u64>,
    /// For each writer, its writes since its last flush: first sector and count.
    pending: BTreeMap<u64, Vec<(u64, u64)>>,
    writes: u64,
    flushes: u64,
    moves: u64,
}

impl Model {
    fn hear(&mut self, line: &str) -> Result<()> {
        let (kind, rest) = line.split_once(' ').context("no kind")?;
        let numbers = rest.split(' ').map(str::parse).collect::<Result<Vec<u64>, _>>()?;
        match (kind, &numbers[..]) {
            ("w" | "z", [id, number, first, count]) => {
                if kind == "z" {
                    self.zeros.insert(*number);
                }
                for sector in *first..first + count {
                    self.sectors.entry(sector).or_insert_with(|| vec![0]).push(*number);
                }
                self.pending.entry(*id).or_default().push((*first, *count));
                self.writes += 1;
            }
            ("f", [id]) => {
                let pending = self.pending.remove(id).unwrap_or_default();
                pending.into_iter().for_each(|write| self.durable(write));
                self.flushes += 1;
            }
            ("u", [id]) => {
                let last = self.pending.get(id).and_then(|writes| writes.last().copied());
                self.durable(last.context("no write before it")?);
            }
            ("m", [_]) => self.moves += 1,
            // After a cut this was found there: it is on the disk, and no write is under way.
            ("c", [sector, number]) => {
                self.pending.clear();
                self.sectors.insert(*sector, vec![*number]);
            }
            _ => bail!("unknown"),
        }
        Ok(())
    }

    /// A sector belongs to one writer, which waits for each answer: its last write is the one.
    fn durable(&mut self, (first, count): (u64, u64)) {
        for sector in first..first + count {
            if let Some(numbers) = self.sectors.get_mut(&sector) {
                numbers.drain(..numbers.len() - 1);
            }
        }
    }

    /// Compares image and replica. Returns what was found where there was a choice.
    fn check(&self, socket: &Path, base: &[u8]) -> Result<Vec<Found>> {
        let image = Client::open(socket, "image/base")?.read_all(SIZE)?;
        if let Some(at) = pattern::differ(&image, base) {
            bail!("the image has changed at byte {at}");
        }
        let all = Client::open(socket, "replica/vm")?.read_all(SIZE)?;
        let mut open = Vec::new();
        for sector in 0..SIZE / SECTOR {
            let at = (sector * SECTOR) as usize..((sector + 1) * SECTOR) as usize;
            let (found, base) = (&all[at.clone()], &base[at]);
            let Some(numbers) = self.sectors.get(&sector) else {
                ensure!(found == base, "sector {sector} was never written, but changed");
                continue;
            };
            let is = |number: &&u64| match **number {
                0 => found == base,
                number if self.zeros.contains(&number) => found.iter().all(|byte| *byte == 0),
                number => found == fill(number, sector),
            };
            let Some(number) = numbers.iter().rev().find(is) else {
                let head = &found[..16];
                bail!("sector {sector} may hold writes {numbers:?}, but starts with {head:02x?}");
            };
            if numbers.len() > 1 {
                let lost = numbers.last() != Some(number);
                open.push(Found { sector, number: *number, lost });
            }
        }
        Ok(open)
    }
}

/// What was found in a sector that might have held something else.
struct Found {
    sector: u64,
    number: u64,
    /// It isn't the last that was written.
    lost: bool,
}

/// The content of a sector in write `number`: no other write's, no other sector's.
fn fill(number: u64, sector: u64) -> [u8; SECTOR as usize] {
    let mut bytes = [0; SECTOR as usize];
    Rng::with_seed(number << 20 | sector).fill(&mut bytes);
    bytes
}

const _: () = assert!(WRITTEN * SECTOR < SIZE && SHARED.is_multiple_of(2 * WRITERS));

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ledger_tells_what_may_be_there() {
        let mut model = Model::default();
        for line in ["w 0 1 10 2", "w 1 2 20 1", "f 0", "z 0 3 11 1", "w 1 4 20 1", "u 1"] {
            model.hear(line).unwrap();
        }
        assert_eq!(model.sectors[&10], [1]);
        assert_eq!(model.sectors[&11], [1, 3]);
        assert_eq!(model.sectors[&20], [4]);
        assert!(model.zeros.contains(&3));
        model.hear("c 11 1").unwrap();
        assert_eq!(model.sectors[&11], [1]);
        assert!(model.hear("u 7").is_err() && model.hear("x 1").is_err());
    }
}
