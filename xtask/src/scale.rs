//! How a node with many disks, images and replicas behaves: what a start, `status` and `fsck` take, and what
//! the daemon holds in memory.
//!
//! Figures to be read side by side, for a node and one with several times its replicas: what grows faster
//! than they do is found. Only what no machine explains is refused.

use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use crate::daemon::Daemon;
use crate::lab::{Fs, Lab, LoopDisk, loop_disks};
use crate::nbd::Client;
use crate::place::Profile;
use crate::report::Report;
use crate::subject::text;
use crate::{pattern, setup};

const MIB: u64 = 1 << 20;
const DISKS: usize = 10;
const IMAGES: usize = 10;
/// Size of an image, in bytes; each has two copies.
const IMAGE: u64 = 4 * MIB;
/// Size of a disk, in bytes (sparse).
const DISK: u64 = 512 * MIB;
/// Times that each figure is taken; the median counts.
const TIMES: usize = 5;
/// No start, `status` or `fsck` may take longer.
const TOO_LONG: Duration = Duration::from_secs(30);
/// The most memory that a closed replica may cost, in bytes.
const EACH: u64 = 32 << 10;

/// Runs the rig, with so many replicas at last.
pub fn run(lab: &Lab, replicas: usize, report: &mut Report) {
    let ready = loop_disks().and_then(|()| setup::need(&["mkfs.ext4", "losetup"]));
    if let Err(error) = ready {
        return report.skip("scale", &format!("{error:#}"));
    }
    if let Err(error) = node(lab, replicas, report) {
        report.broken("scale", &error);
    }
}

fn node(lab: &Lab, replicas: usize, report: &mut Report) -> Result<()> {
    let dir = lab.dir("scale")?;
    let disks = (0..DISKS).map(|at| LoopDisk::new(&dir, &disk(at), DISK, Fs::Ext4));
    let disks = disks.collect::<Result<Vec<_>>>()?;
    let mut daemon = Daemon::start(lab, &dir, "scale", Profile::Debug, "copies = 2")?;
    for (at, there) in disks.iter().enumerate() {
        daemon.ok(&["disk", "add", text(&there.path)?, "--name", &disk(at)])?;
    }
    for at in 0..IMAGES {
        let raw = dir.join("image.raw");
        pattern::noise(&raw, IMAGE, at as u64)?;
        let (name, on) = (format!("i{at}"), disk(at % DISKS));
        daemon.ok(&["image", "import", text(&raw)?, "--name", &name, "--disk", &on])?;
        fs::remove_file(&raw)?;
    }
    let (mut made, mut few) = (0, 0);
    for count in [replicas / 4, replicas] {
        while made < count {
            let (name, image) = (format!("vm{made}"), format!("i{}", made % IMAGES));
            // Every image has replicas on every disk.
            let on = disk(made / IMAGES % DISKS);
            daemon.ok(&["replica", "create", &name, "--image", &image, "--disk", &on])?;
            made += 1;
        }
        report.check(&format!("scale: {DISKS} disks, {IMAGES} images, {count} replicas"), || {
            let (told, memory) = figures(&mut daemon, &disks, count)?;
            if few == 0 {
                few = memory;
            }
            let grown = memory.saturating_sub(few) / (replicas - replicas / 4).max(1) as u64;
            ensure!(grown <= EACH, "{told}; {grown} bytes for each replica more");
            Ok(told)
        });
    }
    daemon.healthy()?;
    daemon.stop()
}

/// What a start and the two commands take, and the memory that the daemon holds after these.
fn figures(daemon: &mut Daemon, disks: &[LoopDisk], replicas: usize) -> Result<(String, u64)> {
    let mut starts = Vec::new();
    for _ in 0..TIMES {
        daemon.stop()?;
        // As after a boot: the catalogue is read from the disks.
        fs::write("/proc/sys/vm/drop_caches", "3").context("dropping caches")?;
        let start = Instant::now();
        daemon.restart()?;
        starts.push(start.elapsed());
    }
    let last = format!("replica/vm{}", replicas - 1);
    let client = Client::open(daemon.nbd(), &last)?;
    ensure!(client.size() >= IMAGE, "{last} has {} bytes", client.size());
    drop(client);
    let times = |args: &[&str]| -> Result<Vec<Duration>> {
        (0..TIMES).map(|_| Ok(daemon.ok(args)?.took)).collect()
    };
    let (status, fsck) = (times(&["status", "--json"])?, times(&["fsck"])?);
    let listed = daemon.json(&["replica", "list"])?;
    let listed = listed.as_array().context("replica list is no list")?.len();
    ensure!(listed == replicas, "{listed} replicas are listed");
    let memory = daemon.memory()?;
    let used = disks.iter().map(LoopDisk::used).sum::<Result<u64>>()?;
    let told = format!(
        "start {}, status {}, fsck {}; {} MiB of memory, {} MiB on each disk",
        median(starts)?,
        median(status)?,
        median(fsck)?,
        memory / MIB,
        used / MIB / DISKS as u64,
    );
    Ok((told, memory))
}

fn median(mut times: Vec<Duration>) -> Result<String> {
    times.sort();
    let (median, worst) = (times[times.len() / 2], times[times.len() - 1]);
    ensure!(worst < TOO_LONG, "{worst:?}");
    Ok(format!("{:.1} ms", median.as_secs_f64() * 1e3))
}

fn disk(at: usize) -> String {
    format!("d{at}")
}
