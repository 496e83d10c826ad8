//! Kernel block devices: images and replicas over ublk, in all the ways they are served.
//!
//! Invariants checked:
//! - a base device holds what its image does, byte for byte, however it is read: cached and direct,
//!   without copying and with it, over one queue and two; it takes no writes; partitions are seen if
//!   that was asked for;
//! - a replica verifies under mixed writes from 512 bytes to 1 MiB, at any alignment; what was
//!   zeroed reads as zeros; file systems made on it are whole; it grows while it is mounted;
//! - a device that is open is not detached, and what is attached is not removed;
//! - a daemon that is killed, and one that is told to stop, lose nothing: load goes on without an
//!   error once the next one is up.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, ensure};
use fastrand::Rng;
use nix::fcntl::OFlag;

use super::guest::Guest;
use super::stress;
use crate::daemon::Daemon;
use crate::pattern;
use crate::tool::tool;

/// Size of the image, in bytes.
const SIZE: u64 = 64 << 20;
/// Size of the replica: no multiple of a block, to have an end like that.
const REPLICA: u64 = (96 << 20) + 512;
/// How long one load of fio may take in a slow guest.
const LOAD: Duration = Duration::from_secs(240);
/// How long a file system on a replica is put under load.
const STRESS: Duration = Duration::from_secs(15);
/// Where the devices' links are.
const BASE: &str = "/dev/underlay/image/base";
const VM: &str = "/dev/underlay/replica/vm";

/// The ways of attaching that must all serve alike.
const WAYS: [(&str, &[&str]); 4] = [
    ("zero copy, 1 queue", &["--queues", "1"]),
    ("zero copy, 2 queues", &["--queues", "2", "--depth", "128"]),
    ("copying, 1 queue", &["--queues", "1", "--copy"]),
    ("copying, 2 queues", &["--queues", "2", "--copy"]),
];

/// Runs the test; its disks: a (ext4, the image), b (xfs, the replica).
pub fn run(guest: &mut Guest) -> Result<()> {
    let (a, b) = (guest.format("a")?, guest.format("b")?);
    let raw = guest.dir().join("base.raw");
    pattern::image(&raw, SIZE, guest.seed)?;
    partition(&raw)?;
    let mut daemon = guest.daemon("")?;
    daemon.ok(&["disk", "add", &a.to_string_lossy(), "--name", "a"])?;
    daemon.ok(&["disk", "add", &b.to_string_lossy(), "--name", "b"])?;
    daemon.ok(&["image", "import", &raw.to_string_lossy(), "--name", "base", "--disk", "a"])?;
    let truth = fs::read(&raw)?;
    for (way, options) in WAYS {
        guest.check(&format!("base, {way}: reads as the image, takes no writes"), |guest| {
            attach(&daemon, "image/base", options, way.starts_with("zero"))?;
            let same = same_as(BASE, &truth, guest.seed);
            // Opening is allowed, writing is not.
            let write = |file: File| file.write_all_at(&[1; 4096], 0).and_then(|_| file.sync_all());
            let written = OpenOptions::new().write(true).open(BASE).and_then(write);
            daemon.ok(&["detach", "image/base"])?;
            ensure!(written.is_err(), "it takes writes");
            same
        })?;
    }
    guest.check("base: partitions are looked for if asked, and not otherwise", |_| {
        attach(&daemon, "image/base", &["--scan"], true)?;
        let node = fs::canonicalize(BASE)?;
        let first = PathBuf::from(format!("{}p1", node.display()));
        let seen = until(|| first.exists());
        daemon.ok(&["detach", "image/base"])?;
        ensure!(seen, "{} is not there", first.display());
        attach(&daemon, "image/base", &[], true)?;
        std::thread::sleep(Duration::from_millis(300));
        let unwanted = first.exists();
        daemon.ok(&["detach", "image/base"])?;
        ensure!(!unwanted, "{} is there", first.display());
        Ok(String::new())
    })?;

    let size = REPLICA.to_string();
    let create = ["replica", "create", "vm", "--image", "base", "--disk", "b", "--size", &size];
    daemon.ok(&create)?;
    for (way, options) in WAYS {
        guest.check(&format!("replica, {way}: verifies under mixed writes"), |guest| {
            guest.need(&["fio"])?;
            attach(&daemon, "replica/vm", options, way.starts_with("zero"))?;
            let done = load(guest, &["--rw=randrw", "--io_size=48m"]);
            daemon.ok(&["detach", "replica/vm"])?;
            done
        })?;
    }
    attach(&daemon, "replica/vm", &[], true)?;
    attach(&daemon, "image/base", &[], true)?;
    guest.check("what is open is not detached, what is attached is not removed", |_| {
        let open = File::open(VM)?;
        daemon.refused(&["detach", "replica/vm"], &["is open", "--force"])?;
        drop(open);
        let open = File::open(VM)?;
        daemon.ok(&["detach", "replica/vm", "--force"])?;
        let read = open.read_at(&mut [0; 4096], 32 << 20);
        ensure!(!matches!(read, Ok(1..)), "{read:?} could be read after a forced detach");
        drop(open);
        attach(&daemon, "replica/vm", &[], true)?;
        daemon.refused(&["replica", "rm", "vm"], &["replica vm", "/dev/ublkb"])?;
        daemon.refused(&["image", "rm", "base"], &["image base"])?;
        // Once more is no error, and changes nothing.
        attach(&daemon, "replica/vm", &[], true)?;
        Ok(String::new())
    })?;
    guest.check("replica: zeroing and discarding, aligned or not, then zeros", |guest| {
        guest.need(&["blkdiscard"])?;
        for (how, offset, len) in [("-z", 512, 1_000_448), ("-z", 3 << 20, 8 << 20)] {
            let range = [format!("--offset={offset}"), format!("--length={len}")];
            tool("blkdiscard", [how]).args(range).args([VM]).run()?;
            zeros(offset, len)?;
        }
        // Of blocks that hold data a discard makes zeros; written first, so that they do.
        let file = OpenOptions::new().write(true).open(VM)?;
        file.write_all_at(&[7; 4 << 20], 20 << 20)?;
        file.sync_all()?;
        let range = [format!("--offset={}", 20 << 20), format!("--length={}", 4 << 20)];
        tool("blkdiscard", range).args([VM]).run()?;
        zeros(20 << 20, 4 << 20)?;
        Ok(String::new())
    })?;
    guest.check("daemon killed 10 times under load: no error, nothing lost", |guest| {
        guest.need(&["fio"])?;
        restarts(guest, &mut daemon, 10, Daemon::kill)
    })?;
    guest.check("daemon upgraded 6 times under load: no error", |guest| {
        guest.need(&["fio"])?;
        restarts(guest, &mut daemon, 6, Daemon::stop)
    })?;
    guest.check("base: still the image after all that", |guest| {
        same_as(BASE, &truth, guest.seed + 1)
    })?;
    for (name, make, check, grow) in [
        ("ext4", ["mkfs.ext4", "-q", "-F"], ["e2fsck", "-fn"], "resize2fs"),
        ("xfs", ["mkfs.xfs", "-q", "-f"], ["xfs_repair", "-n"], "xfs_growfs"),
    ] {
        guest.check(
            &format!("replica: {name} on it under load, growing: nothing lost, and whole"),
            |guest| {
                guest.need(&[make[0], check[0], grow])?;
                let before = fs::metadata("/sys/class/block").map(|_| device_size(VM))??;
                let now = before + (320 << 20);
                daemon.ok(&["replica", "resize", "vm", &now.to_string()])?;
                ensure!(device_size(VM)? == now, "the kernel says {} bytes", device_size(VM)?);
                tool(make[0], &make[1..]).args([VM]).run()?;
                let at = guest.dir().join(format!("on-{name}"));
                guest.mount_device(Path::new(VM), &at)?;
                let (root, seed) = (at.clone(), guest.seed);
                let load = std::thread::spawn(move || stress::load(&root, seed, STRESS));
                std::thread::sleep(STRESS / 3);
                let grown = now + (32 << 20);
                daemon.ok(&["replica", "resize", "vm", &grown.to_string()])?;
                ensure!(device_size(VM)? == grown, "the kernel did not see it grow");
                match name {
                    "ext4" => tool("resize2fs", [VM]).run()?,
                    _ => tool("xfs_growfs", [&at]).run()?,
                }
                let tree = load.join().map_err(|_| anyhow!("the load panicked"))??;
                tree.check()?;
                tool("umount", [&at]).run()?;
                guest.mount_device(Path::new(VM), &at)?;
                let figures = tree.check()?;
                tool("umount", [&at]).run()?;
                tool(check[0], &check[1..]).args([VM]).limit(LOAD).run()?;
                Ok(figures)
            },
        )?;
    }
    daemon.ok(&["detach", "replica/vm"])?;
    daemon.ok(&["detach", "image/base"])?;
    daemon.healthy()?;
    daemon.stop()
}

/// Attaches an export, and checks how it is served.
fn attach(daemon: &Daemon, export: &str, options: &[&str], zero_copy: bool) -> Result<()> {
    let told = daemon.json(&[&["attach", export], options].concat())?;
    ensure!(told["zero_copy"] == zero_copy, "{told}");
    Ok(())
}

/// Reads a device whole, and here and there past the page cache.
fn same_as(device: &str, truth: &[u8], seed: u64) -> Result<String> {
    let all = fs::read(device).with_context(|| format!("reading {device}"))?;
    if let Some(at) = pattern::differ(&all, truth) {
        anyhow::bail!("{device} differs at byte {at}");
    }
    let direct = OpenOptions::new().read(true).custom_flags(OFlag::O_DIRECT.bits()).open(device)?;
    let mut rng = Rng::with_seed(seed);
    let mut memory = vec![0u8; (1 << 20) + 4096];
    let skip = memory.as_ptr().align_offset(4096);
    for _ in 0..400 {
        let longest = [8, 64, 2048][rng.usize(0..3)];
        let len = rng.usize(1..=longest) * 512;
        let at = rng.u64(0..=(truth.len() - len) as u64 / 512) * 512;
        let piece = &mut memory[skip..skip + len];
        direct.read_exact_at(piece, at).with_context(|| format!("{len} bytes at {at}"))?;
        ensure!(*piece == truth[at as usize..at as usize + len], "{len} bytes at {at} differ");
    }
    Ok(format!("{} MiB, and 400 direct reads", all.len() >> 20))
}

/// A load that verifies what it wrote, soon after and at the end.
fn load(guest: &Guest, more: &[&str]) -> Result<String> {
    let log = guest.dir().join("fio.log");
    let mut fio = fio(guest, more).background(&log)?;
    let code = fio.wait(LOAD)?;
    ensure!(code == 0, "fio ended with {code}: {}", fio.said());
    Ok(String::new())
}

fn fio(guest: &Guest, more: &[&str]) -> crate::tool::Tool {
    tool("fio", ["--name=load", "--ioengine=libaio", "--direct=1", "--iodepth=16"])
        .args([format!("--filename={VM}"), format!("--randseed={}", guest.seed)])
        .args(["--bsrange=512-1m", "--bs_unaligned=0", "--size=64m", "--fsync=40"])
        .args(["--verify=crc32c", "--verify_fatal=1", "--verify_backlog=128"])
        .args(more)
        .within(guest.dir())
}

/// Ends the daemon again and again under a load that notices.
fn restarts(
    guest: &Guest,
    daemon: &mut Daemon,
    times: u32,
    end: fn(&mut Daemon) -> Result<()>,
) -> Result<String> {
    let log = guest.dir().join("fio.log");
    let runtime = format!("--runtime={}", times * 3 + 4);
    let mut fio = fio(guest, &["--rw=randrw", "--time_based", &runtime]).background(&log)?;
    let mut rng = Rng::with_seed(guest.seed);
    for round in 0..times {
        std::thread::sleep(Duration::from_millis(rng.u64(300..2500)));
        ensure!(fio.alive(), "fio ended before restart {round}: {}", fio.said());
        end(daemon)?;
        daemon.restart()?;
    }
    let code = fio.wait(LOAD)?;
    ensure!(code == 0, "fio ended with {code}: {}", fio.said());
    Ok(format!("{times} times"))
}

fn zeros(offset: u64, len: u64) -> Result<()> {
    let mut found = vec![1; len as usize];
    File::open(VM)?.read_exact_at(&mut found, offset)?;
    ensure!(found.iter().all(|byte| *byte == 0), "{len} bytes at {offset} are not zeros");
    Ok(())
}

fn device_size(device: &str) -> Result<u64> {
    let said = tool("blockdev", ["--getsize64", device]).out()?;
    said.trim().parse().with_context(|| format!("blockdev says {said:?}"))
}

/// Gives an image a partition table, with one partition.
pub fn partition(raw: &Path) -> Result<()> {
    let mut sector = [0; 512];
    // Active, from sector 2048 on, 64 Ki sectors, of type Linux.
    sector[446..462].copy_from_slice(&[0x80, 0, 0, 0, 0x83, 0, 0, 0, 0, 8, 0, 0, 0, 0, 1, 0]);
    sector[510..].copy_from_slice(&[0x55, 0xaa]);
    Ok(OpenOptions::new().write(true).open(raw)?.write_all_at(&sector, 0)?)
}

fn until(mut done: impl FnMut() -> bool) -> bool {
    (0..100).any(|_| {
        std::thread::sleep(Duration::from_millis(50));
        done()
    })
}
