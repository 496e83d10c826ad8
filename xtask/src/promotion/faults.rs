//! What may happen to a cache: reads are the image's content all the same, the cache shrinks or goes, and
//! nothing else happens.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use fastrand::Rng;

use super::{LIMIT, Node};
use crate::lab::Lab;
use crate::report::Report;

/// Times that the daemon is killed in the midst of promotions and evictions.
const KILLS: u32 = 5;
/// Reads of cached chunks go by timing: no agent is needed for what is tested here.
const SETTINGS: &str = "probes = false";

/// Runs the checks.
pub fn run(lab: &Lab, report: &mut Report) {
    report.check("promotion: killed in the midst of promotions and evictions", || killed(lab));
    report.check("promotion: a damaged cache", || damaged(lab));
    report.check("promotion: a full disk", || full(lab));
    report.check("promotion: the cache's disk vanishes", || vanished(lab));
}

impl Node {
    /// Waits until a figure of the caches is as it should be.
    fn until(&self, figure: &str, right: impl Fn(u64) -> bool) -> Result<u64> {
        let started = Instant::now();
        loop {
            let value = self.sum(figure)?;
            if right(value) {
                return Ok(value);
            }
            let limit = Duration::from_secs(30);
            ensure!(started.elapsed() < limit, "{figure} is {value} after {limit:?}");
            thread::sleep(Duration::from_millis(100));
        }
    }

    /// The files of the cache on B.
    fn cache_on_b(&self) -> Result<PathBuf> {
        let caches = fs::read_dir(self.disks[1].path.join("underlay/cache"))?;
        let mut found = caches.flatten().map(|entry| entry.path());
        found.next().context("disk b has no cache")
    }
}

fn killed(lab: &Lab) -> Result<String> {
    let mut node = Node::new(lab, "promotion-kill", SETTINGS)?;
    let mut rng = Rng::with_seed(1);
    let (mut found, mut promoted) = (0, 0);
    for kill in 0..KILLS {
        // More is warmed than fits, and cleared again: there are always promotions and evictions under way.
        for disk in ["b", "c"] {
            node.daemon.ok(&["cache", "warm", "base", "--disk", disk, "--all"])?;
        }
        thread::sleep(Duration::from_millis(rng.u64(1000..2500)));
        if kill % 2 == 1 {
            node.daemon.ok(&["cache", "clear"])?;
        }
        let stored = node.sum("/stored_bytes")?;
        promoted += stored;
        node.daemon.kill()?;
        node.daemon.restart()?;
        node.compare()?;
        if kill % 2 == 0 {
            // It looks through what is there beside its work. What was on its way out may be gone.
            found += node.until("/stored_bytes", |found| found > 0 && found >= stored / 2)?;
        }
    }
    ensure!(promoted > 0 && found > 0, "{promoted} bytes were stored, {found} found again");
    node.until("/figures/dropped", |dropped| dropped == 0)?;
    node.daemon.healthy()?;
    node.daemon.stop()?;
    Ok(format!("{KILLS} kills, {} MiB found again", found >> 20))
}

fn damaged(lab: &Lab) -> Result<String> {
    let mut node = Node::new(lab, "promotion-damage", SETTINGS)?;
    node.daemon.ok(&["cache", "pin", "base", "--disk=b", "--all"])?;
    node.until("/stored_bytes", |stored| stored + (1 << 20) > LIMIT)?;
    node.compare()?;
    // While it runs, behind its back.
    let cache = node.cache_on_b()?;
    let data = OpenOptions::new().write(true).open(cache.join("data"))?;
    let mut rng = Rng::with_seed(2);
    for _ in 0..40 {
        data.write_all_at(&[rng.u8(..); 512], rng.u64(..LIMIT / 512) * 512)?;
    }
    data.sync_all()?;
    node.compare()?;
    let dropped = node.until("/figures/dropped", |dropped| dropped > 10)?;
    // While it is down: content, entries, the header, and the length.
    for part in ["data", "chunks", "header", "length"] {
        node.daemon.kill()?;
        let (file, at) = match part {
            "data" => ("data", rng.u64(..LIMIT)),
            "chunks" => ("chunks", 4096 + rng.u64(..100) * 16),
            _ => ("chunks", 20),
        };
        let file = OpenOptions::new().write(true).open(cache.join(file))?;
        match part {
            "length" => file.set_len(5000)?,
            _ => file.write_all_at(&[0xee; 16], at)?,
        }
        file.sync_all()?;
        node.daemon.restart()?;
        node.compare().with_context(|| format!("after damage to the {part}"))?;
    }
    // What is pinned comes back.
    node.until("/stored_bytes", |stored| stored + (1 << 20) > LIMIT)?;
    node.compare()?;
    node.daemon.healthy()?;
    node.daemon.stop()?;
    Ok(format!("{dropped} chunks were found to be wrong"))
}

fn full(lab: &Lab) -> Result<String> {
    let mut node = Node::new(lab, "promotion-full", SETTINGS)?;
    node.daemon.ok(&["cache", "warm", "base", "--disk=b", "--all"])?;
    let before = node.until("/stored_bytes", |stored| stored + (2 << 20) > LIMIT)?;
    let filler = File::create(node.disks[1].path.join("filler"))?;
    let mut written = 0;
    // Somebody fills the disk to its last byte; the cache gives way.
    let started = Instant::now();
    while started.elapsed() < Duration::from_secs(12) {
        match filler.write_all_at(&vec![1; 1 << 20], written) {
            Ok(()) => written += 1 << 20,
            Err(_) => thread::sleep(Duration::from_millis(100)),
        }
    }
    let after = node.sum("/stored_bytes")?;
    ensure!(after < before / 4, "the cache holds {after} of {before} bytes on a full disk");
    node.daemon.ok(&["cache", "warm", "base", "--disk=b", "--all"])?;
    thread::sleep(Duration::from_secs(2));
    node.compare()?;
    drop(filler);
    fs::remove_file(node.disks[1].path.join("filler"))?;
    thread::sleep(Duration::from_secs(3));
    node.daemon.ok(&["cache", "warm", "base", "--disk=b", "--all"])?;
    node.until("/stored_bytes", |stored| stored + (2 << 20) > LIMIT)?;
    node.compare()?;
    node.daemon.healthy()?;
    node.daemon.stop()?;
    Ok(format!("from {} to {} MiB and back", before >> 20, after >> 20))
}

fn vanished(lab: &Lab) -> Result<String> {
    let mut node = Node::new(lab, "promotion-gone", SETTINGS)?;
    node.daemon.ok(&["cache", "warm", "base", "--disk=b", "--all"])?;
    node.until("/stored_bytes", |stored| stored + (2 << 20) > LIMIT)?;
    node.disks[1].pull()?;
    // What the replica wrote is lost with its disk; what it has of the image is not.
    let mut client = crate::nbd::Client::open(node.daemon.nbd(), "replica/on-b")?;
    let mut buf = vec![0; 64 << 10];
    for at in (super::OWN..super::SIZE).step_by(buf.len()) {
        client.read(at, &mut buf)?;
        let range = at as usize..at as usize + buf.len();
        ensure!(buf == node.content[range], "byte {at} and on are not the image's");
    }
    let stored = node.sum("/stored_bytes")?;
    node.daemon.healthy()?;
    drop(client);
    node.daemon.kill()?;
    Ok(format!("{} MiB are still counted", stored >> 20))
}
