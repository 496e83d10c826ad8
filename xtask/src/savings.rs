//! What sharing saves, and what replicas cost: figures, each against its bound.
//!
//! Invariants checked:
//! - ten disks, one image without holes, a replica on each: bytes written (by the block devices' own
//!   count) and bytes stored (by the file systems') are at most 10.1 % of a copy per disk;
//! - a replica is there in at most 10 ms, on an image of 1 GiB and on one of 1 TiB, and `status` says
//!   what was saved;
//! - a replica of 1 TiB is open in less than 50 ms and costs less than 1 MiB of memory untouched;
//! - a daemon with 1,000 idle replicas, each with a client, holds less than 256 MiB.

use std::fs::{self, File};
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use crate::daemon::Daemon;
use crate::lab::{Fs, Lab, LoopDisk, loop_disks};
use crate::nbd::Client;
use crate::place::Profile;
use crate::report::{Report, Unfit};
use crate::subject::text;
use crate::tool::{NO_ARGS, tool};
use crate::{pattern, setup};

const MIB: u64 = 1 << 20;
const TIB: u64 = 1 << 40;
/// Disks of the node.
const DISKS: usize = 10;
/// Size of the image, in bytes; none of it compresses or is zero.
const IMAGE: u64 = 1 << 30;
/// Size of each disk, in bytes (sparse).
const DISK: u64 = 1536 * MIB;
/// The most that may be written or stored, against a copy per disk.
const SHARE: f64 = 0.101;
/// The longest that making a replica may take: the median of all, as a node serves it.
const CREATE: Duration = Duration::from_millis(10);
/// What no disk's syncs explain: the work would grow with the image.
const CREATE_AT_ALL: Duration = Duration::from_millis(500);
/// The longest that opening a replica of 1 TiB may take.
const OPEN: Duration = Duration::from_millis(50);
/// The most memory that an untouched replica of 1 TiB may cost, in bytes.
const UNTOUCHED: u64 = MIB;
/// Replicas of 1 TiB that are opened to find that out.
const LARGE: usize = 16;
/// Idle replicas in one daemon.
const IDLE: usize = 1000;
/// The most memory that the daemon may hold with them, in bytes.
const IDLE_MEMORY: u64 = 256 * MIB;

/// Runs the rig.
pub fn run(lab: &Lab, report: &mut Report) {
    let ready = loop_disks().and_then(|()| setup::need(&["mkfs.ext4", "losetup"]));
    match ready {
        Err(error) => report.skip("savings: ten disks", &format!("{error:#}")),
        Ok(()) => {
            if let Err(error) = ten_disks(lab, report) {
                report.broken("savings: ten disks", &error);
            }
        }
    }
    if let Err(error) = many_replicas(lab, report) {
        report.broken("savings: many replicas", &error);
    }
}

fn ten_disks(lab: &Lab, report: &mut Report) -> Result<()> {
    let dir = lab.dir("savings")?;
    let source = dir.join("base.raw");
    pattern::noise(&source, IMAGE, 4)?;
    let one_copy = plain_copy(&dir, &source)?;
    let per_disk = Cost { written: one_copy.written * 10, stored: one_copy.stored * 10 };
    let disks = (0..DISKS).map(|at| LoopDisk::new(&dir, &name(at), DISK, Fs::Ext4));
    let disks = disks.collect::<Result<Vec<_>>>()?;
    tool("sync", NO_ARGS).run()?;
    let before = Cost::of(&disks)?;
    let daemon = Daemon::start(lab, &dir, "ten", Profile::Debug, "")?;
    for (at, disk) in disks.iter().enumerate() {
        daemon.ok(&["disk", "add", text(&disk.path)?, "--name", &name(at)])?;
    }
    let import = ["image", "import", text(&source)?, "--name", "base", "--disk", "d0"];
    let took = daemon.ok(&import)?.took.as_secs_f64();
    for at in 0..DISKS {
        let (replica, disk) = (format!("vm{at}"), name(at));
        daemon.ok(&["replica", "create", &replica, "--image", "base", "--disk", &disk])?;
    }
    // Each replica is opened and read: what that costs counts as well.
    for at in 0..DISKS {
        let mut client = Client::open(daemon.nbd(), &format!("replica/vm{at}"))?;
        let mut block = [0; 4096];
        client.read(IMAGE - 4096, &mut block)?;
    }
    tool("sync", NO_ARGS).run()?;
    let after = Cost::of(&disks)?;
    let ours =
        Cost { written: after.written - before.written, stored: after.stored - before.stored };
    report.check("savings: bytes written, ten disks", || {
        share("written", ours.written, per_disk.written)
    });
    report.check("savings: bytes stored, ten disks", || {
        share("stored", ours.stored, per_disk.stored)
    });
    report.check("savings: a replica of a 1 GiB image is there in 10 ms", || {
        let mib = IMAGE as f64 / MIB as f64 / took;
        let times = ready(created(&daemon)?, &disks[0].path)?;
        Ok(format!("{times}; the import took {took:.1} s ({mib:.0} MiB/s)"))
    });
    report.check("savings: status says so", || {
        let status = daemon.json(&["status"])?;
        let node = &status["node"];
        let field = |name: &str| node[name].as_u64().with_context(|| format!("no {name}: {node}"));
        ensure!(field("per_disk_bytes")? >= 10 * IMAGE, "per_disk_bytes: {node}");
        ensure!(field("saved_bytes")? >= 9 * IMAGE, "saved_bytes: {node}");
        ensure!(field("stored_bytes")? < 11 * IMAGE / 10, "stored_bytes: {node}");
        let human = daemon.ok(&["status"])?.stdout;
        ensure!(human.contains("saved"), "status does not speak of what is saved: {human}");
        Ok(format!("{} MiB saved", field("saved_bytes")? / MIB))
    });
    Ok(())
}

/// What a plain copy of the image on a disk of its own costs: a tenth of a copy per disk.
fn plain_copy(dir: &Path, source: &Path) -> Result<Cost> {
    let disk = [LoopDisk::new(dir, "plain", DISK, Fs::Ext4)?];
    tool("sync", NO_ARGS).run()?;
    let before = Cost::of(&disk)?;
    tool("cp", [source, disk[0].path.join("backing").as_path()]).run()?;
    tool("sync", NO_ARGS).run()?;
    let after = Cost::of(&disk)?;
    let file = disk[0].path.join("backing");
    fs::remove_file(file)?;
    Ok(Cost { written: after.written - before.written, stored: after.stored - before.stored })
}

/// What was put on disks, in bytes.
struct Cost {
    written: u64,
    stored: u64,
}

impl Cost {
    fn of(disks: &[LoopDisk]) -> Result<Cost> {
        let written = disks.iter().map(LoopDisk::written).sum::<Result<u64>>()?;
        let stored = disks.iter().map(LoopDisk::used).sum::<Result<u64>>()?;
        Ok(Cost { written, stored })
    }
}

fn share(what: &str, ours: u64, per_disk: u64) -> Result<String> {
    let share = ours as f64 / per_disk as f64;
    let figures = format!(
        "{} of {} MiB {what}: {:.2} % of a copy per disk",
        ours / MIB,
        per_disk / MIB,
        share * 100.0
    );
    ensure!(share <= SHARE, "{figures}, at most {} % is asked", SHARE * 100.0);
    ensure!(share > 0.09, "{figures}: less than one copy can't be, the count is wrong");
    Ok(figures)
}

/// How long the daemon took to make each replica, by its own `status`.
fn created(daemon: &Daemon) -> Result<Vec<Duration>> {
    let list = daemon.json(&["replica", "list"])?;
    let list = list.as_array().context("replica list is no list")?;
    let times = list.iter().map(|replica| {
        let ms = replica["created_in_ms"].as_f64();
        ms.map(|ms| Duration::from_secs_f64(ms / 1000.0)).context("no created_in_ms")
    });
    times.collect()
}

/// The times to make replicas. Past the target they are skipped, loudly, with what one durable step
/// costs on the disk at `path` just now: how fast a disk syncs is no property of the program. A
/// time that grows with the image is, and fails.
fn ready(times: Vec<Duration>, path: &Path) -> Result<String> {
    let step = durable_step(path)?.as_secs_f64() * 1000.0;
    let sane = quick(times.clone(), CREATE_AT_ALL)?;
    match quick(times, CREATE) {
        Ok(figures) => Ok(format!("{figures}; one file and its fsyncs take {step:.1} ms")),
        Err(_) => {
            let reason =
                format!("past the target: {sane}; one file and its fsyncs take {step:.1} ms");
            Err(Unfit(reason).into())
        }
    }
}

/// How long it takes here to make one small file durable, and its name: the median of several.
fn durable_step(path: &Path) -> Result<Duration> {
    let mut times = Vec::new();
    for at in 0..21 {
        let name = path.join(format!("step-{at}"));
        let start = Instant::now();
        fs::write(&name, [1; 4096])?;
        File::open(&name)?.sync_all()?;
        File::open(path)?.sync_all()?;
        times.push(start.elapsed());
        fs::remove_file(&name)?;
    }
    times.sort();
    Ok(times[times.len() / 2])
}

/// The median must be within `limit`: a machine that does other things has its outliers.
fn quick(mut times: Vec<Duration>, limit: Duration) -> Result<String> {
    times.sort();
    let ms = |time: Duration| time.as_secs_f64() * 1000.0;
    let (median, worst) = (times[times.len() / 2], times[times.len() - 1]);
    let figures = format!("median {:.1} ms, worst {:.1} ms", ms(median), ms(worst));
    ensure!(median <= limit, "{figures}; at most {} ms is asked", ms(limit));
    Ok(figures)
}

fn many_replicas(lab: &Lab, report: &mut Report) -> Result<()> {
    let dir = lab.dir("replicas")?;
    let (disk, source) = (dir.join("disk"), dir.join("large.raw"));
    fs::create_dir_all(&disk)?;
    pattern::noise(&source, MIB, 5)?;
    File::options().write(true).open(&source)?.set_len(TIB)?;
    let mut daemon = Daemon::start(lab, &dir, "many", Profile::Debug, "")?;
    daemon.ok(&["disk", "add", text(&disk)?, "--name", "disk"])?;
    daemon.ok(&["image", "import", text(&source)?, "--name", "large", "--disk", "disk"])?;
    let mut commands = Vec::new();
    for at in 0..IDLE {
        let name = format!("vm{at}");
        let create = ["replica", "create", &name, "--image", "large", "--disk", "disk"];
        commands.push(daemon.ok(&create)?.took);
    }
    report.check("savings: a replica of a 1 TiB image is there in 10 ms", || {
        let times = ready(created(&daemon)?, &disk)?;
        Ok(format!("{times}; the whole command: {}", quick(commands, Duration::MAX)?))
    });
    report.check("savings: an untouched replica of 1 TiB opens in 50 ms and costs 1 MiB", || {
        daemon.stop()?;
        daemon.restart()?;
        // The first client of a daemon also pays for what all share.
        let first = Client::open(daemon.nbd(), "replica/vm0")?;
        let before = daemon.memory()?;
        let (mut clients, mut opened) = (vec![first], Vec::new());
        for at in 1..=LARGE {
            let start = Instant::now();
            let client = Client::open(daemon.nbd(), &format!("replica/vm{at}"))?;
            opened.push(start.elapsed());
            ensure!(client.size() == TIB, "size {}", client.size());
            clients.push(client);
        }
        let each = daemon.memory()?.saturating_sub(before) / LARGE as u64;
        ensure!(each < UNTOUCHED, "{} KiB each, less than 1 MiB is asked", each / 1024);
        Ok(format!("{}; {} KiB each", quick(opened, OPEN)?, each / 1024))
    });
    report.check("savings: 1,000 idle replicas of 1 TiB with a client each, in 256 MiB", || {
        let start = Instant::now();
        let clients = (0..IDLE).map(|at| Client::open(daemon.nbd(), &format!("replica/vm{at}")));
        let clients = clients.collect::<Result<Vec<_>>>()?;
        let took = start.elapsed().as_secs_f64();
        let memory = daemon.memory()?;
        drop(clients);
        ensure!(memory < IDLE_MEMORY, "{} MiB, less than 256 MiB is asked", memory / MIB);
        daemon.healthy()?;
        Ok(format!("{} MiB, all open after {took:.1} s", memory / MIB))
    });
    daemon.stop()
}

fn name(at: usize) -> String {
    format!("d{at}")
}
