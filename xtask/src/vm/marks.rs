//! The replica's disk as it was at every flush, and as a power cut between two could have left it:
//! a log of dm-log-writes, replayed.
//!
//! Invariants checked, on ext4 and on xfs, at points of the log after the replica was made:
//! - the file system mounts, the daemon opens the replica, and its fsck finds nothing;
//! - every write to the replica that was acknowledged before an acknowledged flush (or had FUA) is
//!   there, if the log had told of the flush's end by then;
//! - every other written sector is, as a whole, one of its writes since, or what it held before;
//! - the rest of the replica is what the image is.
//!
//! A point is either exact, the disk as it was at the end of a flush or a forced write; or torn:
//! of what was written since the flush before, each block of 4 KiB was kept or lost by itself. That
//! is what power cuts do (test `power`), with a disk that is as bad as it may be, and without luck.

mod model;

use std::collections::BTreeSet;
use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use fastrand::Rng;
use nix::fcntl::{FallocateFlags, OFlag, fallocate};

use self::model::{Change, Model, Tally, fill};
use super::guest::Guest;
use super::log::{Disk, Kind, Log};
use super::mapped::{Mapped, make};
use crate::daemon::Daemon;
use crate::lab::Fs;
use crate::nbd::Client;
use crate::pattern;
use crate::subject::text;
use crate::tool::tool;

/// Size of the image and of the replica, in bytes.
const SIZE: u64 = 8 << 20;
/// Size of the replica's disk: xfs takes no smaller one.
const DISK: u64 = 320 << 20;
const SECTOR: u64 = 512;
/// Writers, and what each does.
const WRITERS: u64 = 2;
const OPERATIONS: u64 = 120;
/// The sectors in which writers meet within blocks: each owns pairs, in turn.
const SHARED: u64 = 512;
/// The sectors of its own that each writer has behind them.
const OWN: u64 = 4096;
/// Points that are tried on each file system.
const POINTS: usize = 24;
/// The name of the logged device.
const NAME: &str = "marks-disk";

/// Runs the test; its disks: a (ext4, the image), b (the replica), c (the log).
pub fn run(guest: &mut Guest) -> Result<()> {
    guest.need(&["mkfs.ext4", "mkfs.xfs", "dmsetup", "blkdiscard"])?;
    let a = guest.format("a")?;
    let raw = guest.dir().join("base.raw");
    pattern::image(&raw, SIZE, guest.seed)?;
    let mut daemon = guest.daemon("")?;
    daemon.ok(&["disk", "add", text(&a)?, "--name", "a"])?;
    daemon.ok(&["image", "import", text(&raw)?, "--name", "base", "--disk", "a"])?;
    daemon.stop()?;
    let base = fs::read(&raw)?;
    for (name, fs) in [("ext4", Fs::Ext4), ("xfs", Fs::Xfs)] {
        let passed =
            guest.check(&format!("{name}: at any flush, and torn, it recovers"), |guest| {
                let replay = record(guest, &mut daemon, name, fs)?;
                replay.run(guest, &mut daemon, name, &base)
            })?;
        if !passed {
            break;
        }
    }
    Ok(())
}

/// What was recorded.
struct Replay {
    /// The disk before anything was logged.
    disk: Disk,
    log: Log,
    model: Model,
}

/// Writes to a replica on a disk that is logged.
fn record(guest: &Guest, daemon: &mut Daemon, name: &str, fs: Fs) -> Result<Replay> {
    let mapped = Mapped::new(guest, NAME, "b", 0, DISK)?;
    // What other tests left there would be carried from point to point.
    tool("blkdiscard", ["--force"]).args([&mapped.path]).run()?;
    make(fs, &mapped.path)?;
    tool("blockdev", ["--flushbufs"]).args([&mapped.path]).run()?;
    let disk = Disk::read(&mapped.path)?;
    let log = guest.device("c")?;
    mapped.become_target(&format!("log-writes BELOW {}", log.display()))?;
    let at = guest.dir().join(name);
    mapped.mount(&at, "defaults")?;
    daemon.restart()?;
    daemon.ok(&["disk", "add", text(&at)?, "--name", name])?;
    daemon.ok(&["replica", "create", name, "--image", "base", "--disk", name])?;
    let export = format!("replica/{name}");
    let device = format!("/dev/underlay/{export}");
    daemon.ok(&["attach", &export])?;
    mark("begin")?;
    let numbers = AtomicU64::new(1);
    let model = thread::scope(|scope| {
        let writers: Vec<_> = (0..WRITERS)
            .map(|id| {
                let rng = Rng::with_seed(guest.seed << 8 | id);
                let (device, numbers, overclaim) = (&device, &numbers, guest.overclaim);
                scope.spawn(move || Writer::open(id, rng, device, numbers, overclaim)?.write())
            })
            .collect();
        let mut model = Model::default();
        for writer in writers {
            let changes = writer.join().map_err(|_| anyhow!("a writer panicked"))??;
            changes.into_iter().for_each(|change| model.take(change));
        }
        Ok::<_, anyhow::Error>(model)
    })?;
    daemon.ok(&["detach", &export])?;
    daemon.stop()?;
    tool("umount", [&at]).run()?;
    mapped.remove()?;
    Ok(Replay { disk, log: Log::open(&log)?, model })
}

/// Sets a mark in the log: it stands behind whatever has ended.
fn mark(name: &str) -> Result<()> {
    tool("dmsetup", ["message", NAME, "0", "mark", name]).run()
}

impl Replay {
    fn run(
        mut self,
        guest: &Guest,
        daemon: &mut Daemon,
        name: &str,
        base: &[u8],
    ) -> Result<String> {
        let entries = &self.log.entries;
        let is_begin = |kind: &Kind| matches!(kind, Kind::Mark(mark) if mark == "begin");
        let begin = entries.iter().position(|entry| is_begin(&entry.kind));
        let begin = begin.context("the log does not tell where the writing begins")?;
        let mut points: Vec<_> =
            self.log.points().into_iter().filter(|point| *point > begin).collect();
        let all = points.len();
        let mut rng = Rng::with_seed(guest.seed);
        rng.shuffle(&mut points);
        points.truncate(POINTS);
        let points: BTreeSet<_> = points.into_iter().collect();
        let (mut flushed, mut since) = (self.disk.clone(), 0);
        let mut tally = Tally::default();
        let start = Instant::now();
        for (index, entry) in entries.iter().enumerate() {
            let torn = match points.contains(&index) && rng.bool() {
                true => Some(self.log.torn(&flushed, since, index, &mut rng)?),
                false => None,
            };
            self.log.apply(index, &mut self.disk, || true)?;
            if let Kind::Mark(mark) = &entry.kind {
                self.model.hear(mark)?;
            }
            if points.contains(&index) {
                let how = if torn.is_some() { "torn" } else { "exact" };
                tally.torn += u64::from(torn.is_some());
                let disk = torn.as_ref().unwrap_or(&self.disk);
                let checked = self.check(guest, daemon, name, disk, base, &mut tally);
                checked.with_context(|| format!("{how} at entry {index}, seed {}", guest.seed))?;
            }
            if entry.flush {
                (flushed, since) = (self.disk.clone(), index + 1);
            }
        }
        let per_point = start.elapsed().as_secs_f64() / points.len().max(1) as f64;
        ensure!(tally.promised > 0 && tally.lost > 0, "nothing was promised, or nothing lost");
        Ok(format!(
            "{} of {all} flushes and forced writes in {} entries, {} torn; {} sectors promised, {} \
             open, {} of these not the last; {} MiB, {per_point:.2} s each",
            points.len(),
            entries.len(),
            tally.torn,
            tally.promised,
            tally.open,
            tally.lost,
            self.disk.bytes() >> 20,
        ))
    }

    /// The disk mounts, and holds what it should.
    fn check(
        &self,
        guest: &Guest,
        daemon: &mut Daemon,
        name: &str,
        disk: &Disk,
        base: &[u8],
        tally: &mut Tally,
    ) -> Result<()> {
        let (file, at) = (guest.dir().join("replayed"), guest.dir().join(name));
        disk.save(&file, DISK)?;
        tool("mount", ["-o", "loop"]).args([&file, &at]).run().context("the file system")?;
        // It is the death of the kernel, which takes what is in memory.
        let tails = guest.lab.socket("marks.control.tails");
        if tails.exists() {
            fs::remove_dir_all(&tails)?;
        }
        daemon.restart()?;
        let mut held = || -> Result<()> {
            daemon.ok(&["fsck"])?;
            let mut client = Client::open(daemon.nbd(), &format!("replica/{name}"))?;
            self.model.check(&client.read_all(SIZE)?, base, tally)
        };
        let held = held();
        daemon.kill()?;
        unmount(&at)?;
        held
    }
}

/// Unmounts what a daemon that was killed may still hold for a moment.
fn unmount(at: &Path) -> Result<()> {
    let start = Instant::now();
    while let Err(error) = tool("umount", [at]).run() {
        ensure!(start.elapsed() < Duration::from_secs(10), "{error:#}");
        thread::sleep(Duration::from_millis(50));
    }
    Ok(())
}

/// One writer: its own sectors, one request at a time.
struct Writer<'a> {
    id: u64,
    rng: Rng,
    path: &'a str,
    plain: File,
    forced: File,
    numbers: &'a AtomicU64,
    overclaim: bool,
    changes: Vec<Change>,
}

impl<'a> Writer<'a> {
    fn open(
        id: u64,
        rng: Rng,
        path: &'a str,
        numbers: &'a AtomicU64,
        overclaim: bool,
    ) -> Result<Writer<'a>> {
        let open = |flags: OFlag| {
            let flags = (OFlag::O_DIRECT | flags).bits();
            OpenOptions::new().read(true).write(true).custom_flags(flags).open(path)
        };
        let (plain, forced) = (open(OFlag::empty())?, open(OFlag::O_DSYNC)?);
        Ok(Writer { id, rng, path, plain, forced, numbers, overclaim, changes: Vec::new() })
    }

    fn write(mut self) -> Result<Vec<Change>> {
        let mut last = 0;
        for _ in 0..OPERATIONS {
            if self.rng.u8(..4) == 0 {
                self.plain.sync_data()?;
                mark(&format!("f-{}-{last}", self.id))?;
                continue;
            }
            let number = self.numbers.fetch_add(1, Ordering::SeqCst);
            let (first, count) = self.place();
            let mut sectors: Vec<_> = (first..first + count).collect();
            let (offset, len) = (first * SECTOR, count * SECTOR);
            let kind = self.rng.u8(..8);
            match kind {
                0 | 1 => {
                    let how = match kind {
                        0 => FallocateFlags::FALLOC_FL_PUNCH_HOLE,
                        _ => FallocateFlags::FALLOC_FL_ZERO_RANGE,
                    };
                    let how = how | FallocateFlags::FALLOC_FL_KEEP_SIZE;
                    fallocate(&self.plain, how, offset.cast_signed(), len.cast_signed())?;
                }
                2 => {
                    // What it changes is the device's to choose, but then it is so.
                    let range = [format!("--offset={offset}"), format!("--length={len}")];
                    tool("blkdiscard", ["--force"]).args(range).args([self.path]).run()?;
                    let found = self.read(offset, len as usize)?;
                    let zero = |sector: &u64| {
                        let start = ((sector - first) * SECTOR) as usize;
                        found[start..start + SECTOR as usize].iter().all(|byte| *byte == 0)
                    };
                    sectors.retain(zero);
                }
                _ => {
                    let data: Vec<u8> =
                        sectors.iter().flat_map(|sector| fill(number, *sector)).collect();
                    let file = if kind == 3 { &self.forced } else { &self.plain };
                    write(file, offset, &data)?;
                }
            }
            self.changes.push(Change { number, id: self.id, sectors, zero: kind < 3 });
            last = number;
            if kind == 3 || self.overclaim {
                mark(&format!("u-{}-{number}", self.id))?;
            }
        }
        Ok(self.changes)
    }

    fn read(&self, offset: u64, len: usize) -> Result<Vec<u8>> {
        let mut memory = vec![0; len + 4096];
        let skip = memory.as_ptr().align_offset(4096);
        self.plain.read_exact_at(&mut memory[skip..skip + len], offset)?;
        Ok(memory[skip..skip + len].to_vec())
    }

    /// Sectors of this writer: some of its pair among those of others, or a run of its own.
    fn place(&mut self) -> (u64, u64) {
        if self.rng.bool() {
            let group = self.rng.u64(..SHARED / (2 * WRITERS));
            return (group * 2 * WRITERS + 2 * self.id + self.rng.u64(..2), 1);
        }
        let (first, longest) = (self.rng.u64(..OWN), 1 << self.rng.u32(..9));
        let count = self.rng.u64(1..=longest).min(OWN - first);
        (SHARED + self.id * OWN + first, count)
    }
}

fn write(file: &File, offset: u64, data: &[u8]) -> Result<()> {
    let mut memory = vec![0; data.len() + 4096];
    let skip = memory.as_ptr().align_offset(4096);
    memory[skip..skip + data.len()].copy_from_slice(data);
    Ok(file.write_all_at(&memory[skip..skip + data.len()], offset)?)
}

const _: () = assert!((SHARED + WRITERS * OWN) * SECTOR < SIZE);
