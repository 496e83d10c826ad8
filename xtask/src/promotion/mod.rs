//! Promotion on real disks: the disk of the image's copy becomes slow, and the hot chunks move to the disks
//! that read them; and whatever happens to a cache, reads are the image's content.
//!
//! Invariants checked:
//! - within ten seconds the p99 of hot reads is below twice that of the reader's own disk;
//! - what is written stays within the budget and what is stored within the limit;
//! - nothing is promoted while the copy's disk is as fast as the reader's, before and after.

mod agent;
mod chart;
mod faults;

use std::fs;
use std::path::Path;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use self::chart::{Mark, Promoted};
use crate::daemon::Daemon;
use crate::lab::{Lab, loop_disks};
use crate::load::{Aim, Kind, Load, quantile};
use crate::nbd::Client;
use crate::place::Profile;
use crate::report::Report;
use crate::slow::SlowDisk;
use crate::subject::text;
use crate::{pattern, probes, setup};

/// Size of the image, in bytes.
const SIZE: u64 = 192 << 20;
/// Size of a disk, in bytes.
const DISK: u64 = 512 << 20;
/// What a cache may take.
const LIMIT: u64 = 40 << 20;
/// MiB a second that may be promoted to a disk.
const RATE: u64 = 16;
/// What is written to each replica: its own disk's reads are the measure.
const OWN: u64 = 8 << 20;
/// Milliseconds that the copy's disk becomes slower.
const SLOWER: u64 = 20;
/// Hot chunks, and the share of reads that go to them in percent.
const HOT: Aim = Aim { hot: 48, share: 95 };

/// What tells how fast disks are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Signal {
    /// The agent's probes.
    Probes,
    /// The service's own timing.
    Timing,
}

/// Runs what does not depend on how busy the machine is.
pub fn run_untimed(lab: &Lab, report: &mut Report) {
    let ready = loop_disks().and_then(|()| setup::need(&["mkfs.ext4"]));
    if let Err(error) = ready {
        return report.skip("promotion", &format!("{error:#}"));
    }
    agent::run(lab, probes::usable().is_ok(), report);
    faults::run(lab, report);
}

/// Runs the rig; a picture of it goes to `chart`, if that is a directory.
pub fn run(lab: &Lab, chart: Option<&Path>, report: &mut Report) {
    let ready = loop_disks().and_then(|()| setup::need(&["mkfs.ext4"]));
    if let Err(error) = ready {
        return report.skip("promotion", &format!("{error:#}"));
    }
    report.check("promotion: a slow disk, by the service's own timing", || {
        slow_disk(lab, Signal::Timing, chart)
    });
    let usable = probes::usable();
    agent::run(lab, usable.is_ok(), report);
    match usable {
        Err(error) => report.skip("promotion: by the probes", &format!("{error:#}")),
        Ok(_) => {
            report.check("promotion: a slow disk, by the probes", || {
                slow_disk(lab, Signal::Probes, chart)
            });
        }
    }
    faults::run(lab, report);
}

/// Three disks, the image on A, a replica on B and one on C.
pub struct Node {
    /// The daemon.
    pub daemon: Daemon,
    /// The image's content.
    pub content: Vec<u8>,
    /// A, B and C.
    pub disks: [SlowDisk; 3],
}

impl Node {
    /// Makes it, and writes the first bytes of each replica: the image's own content, so that all of a
    /// replica reads as the image.
    pub fn new(lab: &Lab, name: &str, settings: &str) -> Result<Node> {
        let dir = lab.dir(name)?;
        let raw = dir.join("base.raw");
        pattern::noise(&raw, SIZE, 11)?;
        let content = fs::read(&raw)?;
        let disk = |name| SlowDisk::new(&dir, name, DISK);
        let disks = [disk("a")?, disk("b")?, disk("c")?];
        let settings = format!("image_io = \"direct\"\npromote_mib = {RATE}\n{settings}");
        let daemon = Daemon::start(lab, &dir, name, Profile::Debug, &settings)?;
        for (disk, name) in disks.iter().zip(["a", "b", "c"]) {
            let (path, limit) = (text(&disk.path)?, format!("--cache={LIMIT}"));
            daemon.ok(&["disk", "add", path, "--name", name, "--tier=ssd", &limit])?;
        }
        daemon.ok(&["image", "import", text(&raw)?, "--name=base", "--disk=a"])?;
        fs::remove_file(&raw)?;
        for disk in ["b", "c"] {
            let name = format!("on-{disk}");
            daemon.ok(&["replica", "create", &name, "--image=base", "--disk", disk])?;
            let mut client = Client::open(daemon.nbd(), &format!("replica/{name}"))?;
            client.write(0, &content[..OWN as usize], 0)?;
            client.flush()?;
        }
        Ok(Node { daemon, content, disks })
    }

    /// Waits until the agent's probes tell how fast disks are.
    fn until_probed(&self) -> Result<()> {
        for _ in 0..100 {
            if self.daemon.json(&["top", "--once"])?["signal"]["source"] == "probes" {
                return Ok(());
            }
            thread::sleep(Duration::from_millis(100));
        }
        let said = self.daemon.json(&["top", "--once"])?["signal"].to_string();
        anyhow::bail!("the probes tell nothing: {said}")
    }

    /// A figure of all caches, added up.
    pub fn sum(&self, figure: &str) -> Result<u64> {
        let caches = self.daemon.json(&["cache", "list"])?;
        let all = caches.as_array().context("no list of caches")?.iter();
        Ok(all.filter_map(|cache| cache.pointer(figure)?.as_u64()).sum())
    }

    /// Compares all of both replicas with the image.
    pub fn compare(&self) -> Result<()> {
        for disk in ["b", "c"] {
            let read =
                Client::open(self.daemon.nbd(), &format!("replica/on-{disk}"))?.read_all(SIZE)?;
            if let Some(at) = pattern::differ(&read, &self.content) {
                anyhow::bail!("the replica on {disk} differs from the image at byte {at}");
            }
        }
        Ok(())
    }
}

fn slow_disk(lab: &Lab, signal: Signal, chart: Option<&Path>) -> Result<String> {
    let settings = match signal {
        Signal::Probes => "",
        Signal::Timing => "probes = false",
    };
    let mut node = Node::new(lab, "promotion", settings)?;
    if signal == Signal::Probes {
        node.until_probed()?;
    }
    let mut load = Load::new(node.content.clone());
    for disk in ["b", "c"] {
        let export = format!("replica/on-{disk}");
        // As many readers to each disk: A has those of two replicas.
        for _ in 0..2 {
            load.read(node.daemon.nbd(), &export, Some(HOT), 0)?;
        }
        for _ in 0..4 {
            load.read(node.daemon.nbd(), &export, None, OWN)?;
        }
    }
    let mut promoted: Vec<Promoted> = Vec::new();
    let mut stored = 0;
    let mut watch = |node: &Node, load: &Load, until: f64| -> Result<()> {
        while load.clock() < until {
            thread::sleep(Duration::from_millis(500));
            promoted.push((load.clock(), node.sum("/figures/promoted_bytes")?));
            stored = node.sum("/stored_bytes")?.max(stored);
        }
        Ok(())
    };
    watch(&node, &load, 8.0)?;
    let slow = load.clock();
    node.disks[0].slow_by(SLOWER)?;
    watch(&node, &load, slow + 20.0)?;
    let well = load.clock();
    node.disks[0].slow_by(0)?;
    // The latency is a mean of ten seconds: until then the disk counts as slow.
    watch(&node, &load, well + 12.0)?;
    load.shift();
    let shifted = load.clock();
    watch(&node, &load, shifted + 10.0)?;
    let end = load.clock();
    let samples = load.end()?;
    let at = |moment: f64| {
        promoted.iter().take_while(|(at, _)| *at <= moment).last().map_or(0, |(_, bytes)| *bytes)
    };
    if let Some(dir) = chart {
        let marks = [
            Mark { at: slow, what: "the copy's disk: 20 ms slower" },
            Mark { at: well, what: "well again" },
            Mark { at: shifted, what: "other chunks hot" },
        ];
        let by = match signal {
            Signal::Probes => "probes",
            Signal::Timing => "timing",
        };
        let title = format!("Hot reads while the image's disk is slow (latencies by {by})");
        let svg = chart::svg(&title, &samples, &marks, &promoted);
        fs::write(dir.join(format!("promotion-{by}.svg")), svg)?;
    }
    let p99 = |kind, from, to| quantile(&samples, kind, from, to, 0.99).context("no reads");
    let (hot, own) = (p99(Kind::Hot, slow + 10.0, well)?, p99(Kind::Local, slow + 10.0, well)?);
    let told = format!(
        "hot p99 {:.2} ms before, {:.2} ms in the first 3 s, {:.2} ms after 10 s; own disk {:.2} ms; \
         promoted {} MiB before, {} MiB while slow, {} MiB after; stored at most {} MiB",
        p99(Kind::Hot, 2.0, slow)? * 1e3,
        p99(Kind::Hot, slow, slow + 3.0)? * 1e3,
        hot * 1e3,
        own * 1e3,
        at(slow) >> 20,
        (at(well) - at(slow)) >> 20,
        (at(end) - at(shifted)) >> 20,
        stored >> 20,
    );
    ensure!(hot < 2.0 * own, "hot reads are not back at the own disk's speed: {told}");
    ensure!(at(slow) == 0, "promoted while the copy's disk was as fast as the others: {told}");
    ensure!(at(well) > at(slow), "nothing was promoted: {told}");
    ensure!(at(end) == at(shifted), "promoted though the disk is well again: {told}");
    ensure!(stored <= 2 * LIMIT, "more was stored than the limit of {LIMIT} a disk: {told}");
    // Two disks; each may save up four seconds of its rate.
    for pair in promoted.windows(9) {
        let (from, to) = (pair[0], pair[8]);
        let may = ((to.0 - from.0 + 5.0) * 2.0 * (RATE << 20) as f64) as u64;
        ensure!(to.1 - from.1 <= may, "promoted {} bytes in {:.1} s", to.1 - from.1, to.0 - from.0);
    }
    node.compare()?;
    node.daemon.healthy()?;
    node.daemon.stop()?;
    Ok(told)
}
