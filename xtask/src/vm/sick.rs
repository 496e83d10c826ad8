//! Disks that fail, hang or are full, beneath replicas and an image that are attached over ublk.
//!
//! Invariants checked:
//! - where the image's disk fails, reads of what only the image holds get EIO, and those of what was
//!   written go on; where the replica's disk fails, it is the other way round; both serve again
//!   when the disk does;
//! - a write that fails leaves its blocks as they were, and nothing is poisoned by it;
//! - a sync that fails is final: writes and flushes fail from then on, reads go on, the replica says
//!   so, and opened anew it holds what was flushed, and of later writes each sector old or new;
//! - a disk that hangs makes its own requests wait and nobody else's, and nothing is lost;
//! - a full disk is an error of the writes that need space and of no others;
//! - whatever happens, replicas on other disks go on, and no request goes without an answer.
//!
//! A disk that drops writes and says that it took them is not shown: nothing can be promised on it.

mod full;
mod node;

use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use nix::errno::Errno;

use self::full::full;
use self::node::{BLOCK, MEANWHILE, Node, PIECE, SIZE, WRITTEN, quiet};
use super::guest::Guest;
use super::limited::{LIMIT, Limited, refused};
use super::mapped::{drop_caches, place_on_device};
use crate::lab::Fs;
use crate::subject::text;
use crate::tool::tool;

/// What the kernel may keep in its cache as one, at most, in bytes.
const CACHED: u64 = 1 << 20;
/// How long a disk hangs: longer than `MEANWHILE`.
const HANG: Duration = Duration::from_secs(6);
const EIO: i32 = Errno::EIO as i32;
const ENOSPC: i32 = Errno::ENOSPC as i32;

/// Every read fails, every write fails, everything fails.
const NO_READS: &str = "flakey BELOW START 0 600 1 error_reads";
const NO_WRITES: &str = "flakey BELOW START 0 600 1 error_writes";
const DEAD: &str = "error";

/// Runs the test; its disks: a (the image), b (the replica), c (xfs, well).
pub fn run(guest: &mut Guest) -> Result<()> {
    guest.need(&["mkfs.ext4", "mkfs.xfs", "dmsetup", "filefrag"])?;
    let all = replicas_disk(guest, Fs::Ext4, &CHECKS)?;
    let Some(node) = all else { return Ok(()) };
    guest
        .check("a full disk: ENOSPC for what needs space, until there is some", |_| full(&node))?;
    node.close(guest)?;
    match replicas_disk(guest, Fs::Xfs, &CHECKS[4..])? {
        Some(node) => node.close(guest),
        None => Ok(()),
    }
}

type Check = fn(&mut Node) -> Result<String>;

/// The first four are of the file system below the image, the rest of that below the replica.
const CHECKS: [(&str, Check); 10] = [
    ("the image's disk fails reads: EIO there, nowhere else, until it is well", |node| {
        image_fails(node, NO_READS)
    }),
    ("the image's disk fails in all: the same", |node| image_fails(node, DEAD)),
    ("one bad block beneath the image: EIO there, nowhere else", image_block),
    ("the image's disk is slow: who needs it waits, no one else", image_is_slow),
    ("one bad block beneath the replica: EIO there, nowhere else", replica_block),
    ("the replica's disk fails reads: EIO there, nowhere else", replica_reads),
    ("the replica's disk fails writes: EIO, and they have changed nothing", replica_writes),
    ("a flush fails: no more writes; attached anew, what was flushed is there", flush_fails),
    ("the replica's disk hangs: its requests wait, no others; nothing is lost", replica_hangs),
    ("the replica's file system dies: mounted anew, what was flushed is there", disk_dies),
];

/// Makes checks of a replica on a disk of this file system; the node if all of them passed.
fn replicas_disk(guest: &mut Guest, fs: Fs, checks: &[(&str, Check)]) -> Result<Option<Node>> {
    let mut node = Node::new(guest, fs)?;
    for (name, check) in checks {
        let passed = guest.check(&format!("{fs:?}: {name}"), |_| {
            let checked = check(&mut node);
            let healed = node.image_disk.heal().and_then(|()| node.replica_disk.heal());
            let figures = checked?;
            healed?;
            node.whole().context("afterwards")?;
            Ok(figures)
        })?;
        // What a check that failed leaves is no ground for another.
        if !passed {
            return Ok(None);
        }
    }
    Ok(Some(node))
}

fn image_fails(node: &mut Node, how: &str) -> Result<String> {
    drop_caches()?;
    node.image_disk.become_target(how)?;
    for _ in 0..8 {
        let at = node.untouched()?;
        refused(node.vm.read(at, 4096)?, &[EIO], "a read through the replica")?;
        refused(node.image.read(at, 4096)?, &[EIO], "a read of the image")?;
        // A whole block needs nothing of the image, a part of one does.
        let part = node.vm.write(at + 512, &[1; 512])?;
        refused(part, &[EIO], "a write of a part of a block")?;
        let (written, data) = (node.written(), node.noise());
        node.put(written, &data)?;
        node.holds(written, PIECE)?;
    }
    let at = node.untouched()?;
    node.put(at, &[9; 4096])?;
    node.vm.flush()??;
    node.holds(at, 4096)?;
    node.others()?;
    ensure!(node.poisoned()?.is_none(), "a failed read has poisoned the replica");
    Ok(String::new())
}

fn image_block(node: &mut Node) -> Result<String> {
    let at = node.untouched()?;
    let copy = find(&node.image_at.join("underlay/images"), "data")?;
    let bad = place_on_device(&copy, at / BLOCK)?;
    drop_caches()?;
    node.image_disk.lose(bad)?;
    refused(node.vm.read(at, 4096)?, &[EIO], "a read of the bad block")?;
    refused(node.image.read(at, 4096)?, &[EIO], "a read of the bad block of the image")?;
    let mut lost = 0;
    let near = at.saturating_sub(64 * BLOCK)..(at + 64 * BLOCK).min(SIZE);
    for offset in near.step_by(BLOCK as usize) {
        if node.vm.read(offset, 4096)?.is_ok() {
            node.holds(offset, 4096)?;
            continue;
        }
        lost += 1;
    }
    // The kernel reads ahead, and what it keeps as one it has or has not as one.
    for offset in (0..SIZE).step_by(CACHED as usize).filter(|it| it / CACHED != at / CACHED) {
        node.holds(offset, CACHED as usize)?;
    }
    node.others()?;
    Ok(format!("block {} at {bad}; {lost} blocks lost", at / BLOCK))
}

fn replica_block(node: &mut Node) -> Result<String> {
    let at = node.written();
    let data = replica_data(node)?;
    let bad = place_on_device(&data, at / BLOCK)?;
    node.replica_disk.lose(bad)?;
    refused(node.vm.read(at, 4096)?, &[EIO], "a read of the bad block")?;
    refused(node.vm.read(at, PIECE)?, &[EIO], "a read with the bad block in it")?;
    // What the file system itself can't read is lost, and no more.
    let file = Limited::open(text(&data)?)?;
    let mut lost = 0;
    for offset in (at - 16 * BLOCK..at + 32 * BLOCK).step_by(BLOCK as usize) {
        let (theirs, ours) = (file.read(offset, 4096)?, node.vm.read(offset, 4096)?);
        ensure!(theirs.is_err() == ours.is_err(), "block {}: {ours:?}", offset / BLOCK);
        lost += u64::from(ours.is_err());
    }
    drop(file);
    ensure!(lost < 4, "{lost} blocks are lost");
    let far = |offset: &u64| at.abs_diff(*offset) > PIECE as u64;
    for offset in (0..SIZE).step_by(PIECE).filter(far) {
        node.holds(offset, PIECE)?;
    }
    node.others()?;
    let written = node.vm.write(at, &vec![7; PIECE])?;
    refused(written, &[EIO], "a write with the bad block in it")?;
    node.replica_disk.heal()?;
    // The rest of it may have been written.
    let old = node.truth[at as usize..at as usize + PIECE].to_vec();
    node.settle(at, &old, &[7; PIECE])?;
    node.put(at, &[8; PIECE])?;
    node.vm.flush()??;
    Ok(format!("block {} at {bad}; {lost} blocks lost", at / BLOCK))
}

fn replica_reads(node: &mut Node) -> Result<String> {
    node.replica_disk.become_target(NO_READS)?;
    for _ in 0..8 {
        let (written, untouched) = (node.written(), node.untouched()?);
        refused(node.vm.read(written, 4096)?, &[EIO], "a read of what was written")?;
        node.holds(untouched, 4096)?;
        let data = node.noise();
        node.put(written, &data)?;
    }
    node.vm.flush()??;
    node.others()?;
    ensure!(node.poisoned()?.is_none(), "a failed read has poisoned the replica");
    Ok(String::new())
}

fn replica_writes(node: &mut Node) -> Result<String> {
    node.vm.flush()??;
    node.replica_disk.become_target(NO_WRITES)?;
    for _ in 0..8 {
        let (written, untouched) = (node.written(), node.untouched()?);
        let data = node.noise();
        refused(node.vm.write(written, &data)?, &[EIO], "a write in place")?;
        refused(node.vm.write(untouched, &data[..4096])?, &[EIO], "a write of a block")?;
        refused(node.vm.write(untouched, &data[..512])?, &[EIO], "a write of a sector")?;
        // The disk took none of it.
        node.holds(written, PIECE)?;
        node.holds(untouched, 4096)?;
    }
    node.others()?;
    node.replica_disk.heal()?;
    ensure!(node.poisoned()?.is_none(), "a failed write has poisoned the replica");
    for _ in 0..8 {
        let (written, untouched) = (node.written(), node.untouched()?);
        let data = node.noise();
        node.put(written, &data)?;
        node.put(untouched, &data[..512])?;
    }
    node.vm.flush()??;
    Ok(String::new())
}

fn flush_fails(node: &mut Node) -> Result<String> {
    let (at, new) = (node.written(), node.noise());
    node.vm.flush()??;
    let old = node.truth[at as usize..at as usize + PIECE].to_vec();
    // In place, so that the file system has nothing to write and survives.
    node.put(at, &new)?;
    node.replica_disk.become_target(NO_WRITES)?;
    refused(node.vm.flush()?, &[EIO], "a flush")?;
    node.replica_disk.heal()?;
    let untouched = node.untouched()?;
    for _ in 0..3 {
        refused(node.vm.flush()?, &[EIO], "a flush after one that failed")?;
        refused(node.vm.write(at, &old)?, &[EIO], "a write after a failed flush")?;
        refused(node.vm.write(untouched, &[1; 512])?, &[EIO], "a write of a sector")?;
    }
    // It reads as what it acknowledged.
    node.whole()?;
    let reason = node.poisoned()?.context("`replica inspect` does not say so")?;
    let status = node.daemon.ok(&["status"])?.stdout;
    ensure!(status.contains("poisoned"), "`status` does not say so: {status}");
    node.reopened(|node| {
        node.daemon.ok(&["detach", "replica/vm"])?;
        node.daemon.ok(&["attach", "replica/vm"]).map(drop)
    })?;
    let kept = node.settle(at, &old, &new)?;
    let data = node.noise();
    node.put(at, &data)?;
    node.vm.flush()??;
    ensure!(node.poisoned()?.is_none(), "it is poisoned after it was attached anew");
    Ok(format!("{reason:?}; {kept} of {} unflushed sectors kept", PIECE / 512))
}

fn replica_hangs(node: &mut Node) -> Result<String> {
    let (written, other) = (WRITTEN.start, WRITTEN.start + (1 << 20));
    let (untouched, new) = (node.untouched()?, node.noise());
    // So that the flush has something to do.
    node.put(WRITTEN.end - PIECE as u64, &new)?;
    node.replica_disk.hang()?;
    let since = Instant::now();
    let write = node.vm.begin_write(written, &new);
    let first = node.vm.begin_write(untouched, &new[..4096]);
    let read = node.vm.begin_read(other, PIECE);
    let flush = node.vm.begin_flush();
    let mut rounds = 0;
    let done = thread::scope(|scope| {
        let daemon = &node.daemon;
        let status = scope.spawn(move || {
            let start = Instant::now();
            daemon.ok(&["status"]).map(|_| start.elapsed())
        });
        let meanwhile = (|| {
            while since.elapsed() < HANG {
                // The image is on another disk, and so is the other replica.
                let at = 12 << 20;
                node.image.begin_read(at, 4096).end(MEANWHILE)??;
                node.far.begin_write(0, &new).end(MEANWHILE)??;
                node.far.begin_flush().end(MEANWHILE)??;
                node.far.begin_read(0, PIECE).end(MEANWHILE)??;
                rounds += 1;
            }
            write.waits()?;
            first.waits()?;
            read.waits()?;
            flush.waits()
        })();
        node.replica_disk.go_on()?;
        let status = status.join().map_err(|_| anyhow!("asking for the status panicked"))??;
        meanwhile.map(|()| status)
    })?;
    write.end(HANG + LIMIT)??;
    first.end(HANG + LIMIT)??;
    flush.end(HANG + LIMIT)??;
    let found = read.end(HANG + LIMIT)??;
    ensure!(found == node.truth[other as usize..other as usize + PIECE], "a wrong answer");
    node.truth[written as usize..written as usize + PIECE].copy_from_slice(&new);
    node.truth[untouched as usize..untouched as usize + 4096].copy_from_slice(&new[..4096]);
    ensure!(done < MEANWHILE, "`status` took {:.1} s", done.as_secs_f64());
    Ok(format!("{rounds} rounds of others, `status` in {:.1} s", done.as_secs_f64()))
}

fn image_is_slow(node: &mut Node) -> Result<String> {
    drop_caches()?;
    node.image_disk.become_target("delay BELOW START 3000")?;
    let at = node.untouched()?;
    let read = node.vm.begin_read(at, 4096);
    let since = Instant::now();
    for _ in 0..4 {
        let (written, data) = (node.written(), node.noise());
        node.put(written, &data)?;
        node.holds(written, PIECE)?;
        node.vm.flush()??;
        node.others()?;
    }
    let others = since.elapsed();
    let found = read.end(LIMIT)??;
    let all = since.elapsed();
    ensure!(found == node.truth[at as usize..at as usize + 4096], "a wrong answer");
    ensure!(all >= Duration::from_secs(3), "the disk was not slow: {all:?}");
    Ok(format!("others in {:.1} s, the read in {:.1} s", others.as_secs_f64(), all.as_secs_f64()))
}

fn disk_dies(node: &mut Node) -> Result<String> {
    node.vm.flush()??;
    let (at, new) = (node.written(), node.noise());
    let old = node.truth[at as usize..at as usize + PIECE].to_vec();
    node.put(at, &new)?;
    // New blocks: the flush has something to write to the file system's journal.
    let mut fresh = Vec::new();
    for _ in 0..8 {
        let at = node.untouched()?;
        node.put(at, &new[..4096])?;
        fresh.push(at);
    }
    node.replica_disk.become_target(DEAD)?;
    refused(node.vm.flush()?, &[EIO], "a flush")?;
    refused(node.vm.write(at, &old)?, &[EIO], "a write after a failed flush")?;
    refused(node.vm.read(WRITTEN.start, 4096)?, &[EIO], "a read of what was written")?;
    let untouched = node.untouched()?;
    node.holds(untouched, 4096)?;
    ensure!(node.poisoned()?.is_some(), "it is not poisoned");
    node.others()?;
    // The daemon holds the disk: the file system can be mounted anew only when it is not there.
    // The device stays, and so do its users.
    let stopped = node.daemon.stop();
    ensure!(stopped.is_err(), "the daemon says that it closed everything well");
    tool("umount", [&node.replica_at]).run().context("the daemon is gone")?;
    node.replica_disk.heal()?;
    node.replica_disk.mount(&node.replica_at, quiet(node.fs))?;
    node.daemon.restart()?;
    let mut kept = node.settle(at, &old, &new)?;
    for at in fresh {
        let old = node.base[at as usize..at as usize + 4096].to_vec();
        kept += node.settle(at, &old, &new[..4096])?;
    }
    let data = node.noise();
    node.put(at, &data)?;
    node.vm.flush()??;
    Ok(format!("{kept} unflushed sectors kept"))
}

fn replica_data(node: &Node) -> Result<PathBuf> {
    find(&node.replica_at.join("underlay/replicas"), "data")
}

/// The only file of this name beneath `dir`.
fn find(dir: &Path, name: &str) -> Result<PathBuf> {
    let found = tool("find", [dir]).args(["-name", name, "-type", "f"]).out()?;
    let found: Vec<_> = found.lines().collect();
    ensure!(found.len() == 1, "{} files {name:?} in {}", found.len(), dir.display());
    Ok(PathBuf::from(found[0]))
}
