//! An image with two copies on device-mapper, one of which fails, and replicas that are attached and move.
//!
//! Invariants checked, over ublk and over the kernel's NBD client:
//! - while one copy's disk fails its reads, fails in all, or hangs, reads of what only the image holds are
//!   right, and none waits for long;
//! - a block that went bad beneath a copy is told, and the other copy serves; once the disk is well the
//!   copy is;
//! - a replica moves to another disk while it is attached and written to, and a disk is drained: the
//!   device stays, and holds what was written.

use std::fs;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use fastrand::Rng;

use super::guest::Guest;
use super::limited::Limited;
use super::mapped::{Mapped, place_on_device};
use crate::daemon::Daemon;
use crate::lab::Fs;
use crate::pattern;
use crate::subject::text;
use crate::tool::tool;

/// Size of the image and of each replica, in bytes.
const SIZE: u64 = 16 << 20;
/// Size of a mapped disk, in bytes.
const DISK: u64 = 320 << 20;
/// One read or write, in bytes.
const PIECE: usize = 16 << 10;
/// The part of each replica that is written, in bytes; reads of the rest need the image.
const WRITTEN: u64 = 4 << 20;
/// How long a read may take while a disk is ill: the guest has no processor of its own.
const STALL: Duration = Duration::from_secs(5);
/// Reads of each replica while a disk is ill.
const READS: u32 = 60;
/// The replicas: name, and what makes the device.
const REPLICAS: [(&str, &str); 2] = [("vm1", "ublk"), ("vm2", "nbd")];

/// Runs the test; its disks: a and b (the copies), c (xfs, the replicas).
pub fn run(guest: &mut Guest) -> Result<()> {
    guest.need(&["mkfs.ext4", "mkfs.xfs", "dmsetup", "filefrag"])?;
    let mut node = Node::new(guest)?;
    let ill: [(&str, &str); 2] = [
        ("one copy's disk fails reads: no one notices", "flakey BELOW START 0 600 1 error_reads"),
        ("one copy's disk fails in all: no one notices", "error"),
    ];
    for (name, target) in ill {
        guest.check(name, |_| {
            node.a.become_target(target)?;
            let read = node.read();
            node.a.heal()?;
            node.healed(read?)
        })?;
    }
    guest.check("one copy's disk hangs: no one waits for it", |_| {
        node.a.hang()?;
        let read = node.read();
        node.a.go_on()?;
        node.healed(read?)
    })?;
    guest.check(
        "a bad block beneath a copy: told, served by the other, and well once the disk is",
        |_| node.mended(),
    )?;
    guest
        .check("replicas move, and disks are drained, while they are attached", |_| node.moved())?;
    node.close(guest)
}

struct Node {
    daemon: Daemon,
    a: Mapped,
    b: Mapped,
    a_at: PathBuf,
    /// Each replica's device, and what it holds.
    devices: Vec<(Limited, Vec<u8>)>,
    rng: Rng,
}

impl Node {
    fn new(guest: &Guest) -> Result<Node> {
        let at = |name: &str| guest.dir().join(name);
        let well = guest.format("c")?;
        let [a, b] =
            ["a", "b"].map(|disk| Mapped::new(guest, &format!("copy-{disk}"), disk, 0, DISK));
        let (a, b) = (a?, b?);
        // File systems leave their journals alone meanwhile: an error there would end them.
        for (disk, path) in [(&a, at("a")), (&b, at("b"))] {
            disk.format(Fs::Ext4, &path, "noatime,commit=300")?;
        }
        let raw = at("base.raw");
        pattern::noise(&raw, SIZE, guest.seed)?;
        let base = fs::read(&raw)?;
        let settings = "image_io = \"direct\"\nclean_seconds = 2\nrebuild_after_seconds = 3600\n";
        let daemon = guest.daemon(settings)?;
        for (name, path) in [("a", &at("a")), ("b", &at("b")), ("c", &well)] {
            daemon.ok(&["disk", "add", text(path)?, "--name", name, "--tier=ssd"])?;
        }
        daemon.ok(&["image", "import", text(&raw)?, "--name=base", "--disk=a"])?;
        daemon.ok(&["image", "copy", "base", "--to=b"])?;
        // Otherwise it would be read when no copy can be.
        fs::remove_file(&raw)?;
        let mut devices = Vec::new();
        for (name, via) in REPLICAS {
            daemon.ok(&["replica", "create", name, "--image=base", "--disk=c"])?;
            daemon.ok(&["attach", &format!("replica/{name}"), "--via", via])?;
            let device = Limited::open(&format!("/dev/underlay/replica/{name}"))?;
            devices.push((device, base.clone()));
        }
        let mut node =
            Node { daemon, a, b, a_at: at("a"), devices, rng: Rng::with_seed(guest.seed) };
        write(&mut node.devices, &mut node.rng, 40)?;
        Ok(node)
    }

    /// Reads of both replicas, each compared; the longest.
    fn read(&mut self) -> Result<Duration> {
        let mut worst = Duration::ZERO;
        for _ in 0..READS {
            for (device, truth) in &self.devices {
                let at = self.rng.u64(..SIZE / PIECE as u64) * PIECE as u64;
                let started = Instant::now();
                device.holds(at, &truth[at as usize..at as usize + PIECE])?;
                worst = worst.max(started.elapsed());
            }
        }
        ensure!(worst < STALL, "a read took {worst:?}");
        Ok(worst)
    }

    /// The disk is well again: waits until the daemon says so, and finds everything as it must be.
    fn healed(&mut self, worst: Duration) -> Result<String> {
        self.until("a disk is in trouble still", |node| {
            let troubles = node.daemon.json(&["status"])?["troubles"].clone();
            Ok(troubles.as_array().is_some_and(Vec::is_empty))
        })?;
        self.whole()?;
        Ok(format!("{} reads, the longest took {worst:.1?}", 2 * READS))
    }

    fn mended(&mut self) -> Result<String> {
        let copy =
            tool("find", [&self.a_at.join("underlay/images")]).args(["-name", "data"]).out()?;
        let block = (WRITTEN + (1 << 20)) / 4096;
        let bad = place_on_device(Path::new(copy.trim()), block)?;
        self.a.lose(bad)?;
        let read = self.whole().and_then(|()| {
            let verified = self.daemon.ask(&["image", "verify", "base"])?;
            ensure!(verified.code != 0, "the bad block was not noticed: {}", verified.stdout);
            self.whole()
        });
        self.a.heal()?;
        read?;
        self.until("the copy is damaged still", |node| {
            Ok(node.daemon.ask(&["image", "verify", "base"])?.code == 0)
        })?;
        self.whole()?;
        Ok(format!("block {block} at {bad}"))
    }

    fn moved(&mut self) -> Result<String> {
        let mut moves = 0;
        for to in ["a", "b", "c"] {
            for (name, _) in REPLICAS {
                let migrate = ["replica", "migrate", name, "--to", to];
                self.while_writing(&migrate)?;
                moves += 1;
            }
            self.whole()?;
        }
        self.while_writing(&["disk", "drain", "c"])?;
        self.whole()?;
        for (name, _) in REPLICAS {
            let on = self.daemon.json(&["replica", "inspect", name])?["disk"].clone();
            ensure!(on != "c", "{name} is on {on}");
        }
        self.daemon.ok(&["disk", "undrain", "c"])?;
        self.while_writing(&["replica", "flatten", "vm1"])?;
        self.whole()?;
        Ok(format!("{moves} moves, one drain, one flattened"))
    }

    /// Runs a command while the replicas are written to.
    fn while_writing(&mut self, args: &[&str]) -> Result<()> {
        let Node { daemon, devices, rng, .. } = self;
        thread::scope(|scope| {
            let command = scope.spawn(|| daemon.ok(args).map(drop));
            while !command.is_finished() {
                write(devices, rng, 4)?;
            }
            command.join().map_err(|_| anyhow!("{args:?}: its thread panicked"))?
        })
    }

    /// Both replicas hold what they should, and the daemon is there.
    fn whole(&mut self) -> Result<()> {
        for (device, truth) in &self.devices {
            for at in (0..SIZE as usize).step_by(1 << 20) {
                device.holds(at as u64, &truth[at..at + (1 << 20)])?;
            }
        }
        self.daemon.healthy()
    }

    fn until(&self, what: &str, is: impl Fn(&Node) -> Result<bool>) -> Result<()> {
        let started = Instant::now();
        while !is(self)? {
            ensure!(started.elapsed() < Duration::from_secs(60), "{what}");
            thread::sleep(Duration::from_millis(200));
        }
        Ok(())
    }

    fn close(mut self, guest: &Guest) -> Result<()> {
        self.devices.clear();
        for (name, _) in REPLICAS {
            self.daemon.ok(&["detach", &format!("replica/{name}")])?;
        }
        self.daemon.ok(&["fsck"])?;
        self.daemon.healthy()?;
        self.daemon.stop()?;
        for at in ["a", "b", "c"] {
            tool("umount", [guest.dir().join(at)]).run()?;
        }
        self.a.remove()?;
        self.b.remove()
    }
}

/// Writes and flushes so many pieces of each replica.
fn write(devices: &mut [(Limited, Vec<u8>)], rng: &mut Rng, pieces: u32) -> Result<()> {
    for (device, truth) in devices {
        for _ in 0..pieces {
            let at = rng.u64(..WRITTEN / PIECE as u64) * PIECE as u64;
            let mut data = vec![0; PIECE];
            rng.fill(&mut data);
            device.write(at, &data)?.with_context(|| format!("a write at {at}"))?;
            truth[at as usize..at as usize + PIECE].copy_from_slice(&data);
        }
        device.flush()?.context("a flush")?;
    }
    Ok(())
}
