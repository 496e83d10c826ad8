//! One of two copies fails, hangs, lies, or is gone: whoever reads notices at most the time.
//!
//! Invariants checked:
//! - every read is the image's content, none fails, and the p99.9 of the stall is within 100 ms;
//! - damaged chunks are written anew; a disk in trouble is told of, and believed again when it is well;
//! - with one copy what can't be read fails, and nobody else suffers.

use std::fs::{self, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use fastrand::Rng;

use crate::daemon::Daemon;
use crate::lab::{Fs, Lab, LoopDisk, loop_disks};
use crate::load::{Aim, CHUNK, Kind, Load, Sample, quantile};
use crate::nbd::{Client, Failure};
use crate::place::Profile;
use crate::report::Report;
use crate::slow::{Illness, SlowDisk};
use crate::subject::text;
use crate::tool::tool;
use crate::{pattern, setup};

/// Size of the image, in bytes.
const SIZE: u64 = 96 << 20;
/// Size of a disk, in bytes.
const DISK: u64 = 256 << 20;
/// After how much of a copy in the making the daemon notes how far it is, in bytes.
const NOTED: u64 = 64 << 20;
/// Every read anywhere.
const EVERYWHERE: Aim = Aim { hot: 1, share: 0 };
/// Readers at one time.
const READERS: u64 = 4;
/// What 999 of 1,000 reads may take at most while a copy fails, in seconds.
const STALL: f64 = 0.1;

/// Runs the rig; a disk that hangs does so for `hang`. What depends on how busy the machine is belongs to
/// it if `timed`.
pub fn run(lab: &Lab, hang: Duration, timed: bool, report: &mut Report) {
    let ready = loop_disks().and_then(|()| setup::need(&["mkfs.ext4"]));
    if let Err(error) = ready {
        return report.skip("survive", &format!("{error:#}"));
    }
    report.check("survive: a copy's reads fail", || {
        ill(lab, "fails", Illness::Fails(100), Duration::from_secs(5), timed)
    });
    report.check("survive: every third read of a copy fails", || {
        ill(lab, "some", Illness::Fails(33), Duration::from_secs(5), timed)
    });
    report
        .check("survive: a copy's disk hangs", || ill(lab, "silent", Illness::Silent, hang, timed));
    report.check("survive: a copy is damaged", || damaged(lab));
    report.check("survive: a copy's disk is pulled", || pulled(lab));
    report.check("survive: a lost copy is made anew, and a surplus one goes", || rebuilt(lab));
    report.check("survive: the only copy hangs", || only(lab, hang.min(Duration::from_secs(10))));
    if timed {
        report.check("survive: two reads in a hundred are slow", || hedged(lab));
        report.check("survive: a copy that can't be mended is made elsewhere", || unmended(lab));
    }
}

/// A node with an image on A and B, and a replica on C.
struct Node {
    daemon: Daemon,
    content: Vec<u8>,
    dir: PathBuf,
    a: SlowDisk,
    _b: SlowDisk,
    _c: LoopDisk,
}

impl Node {
    fn new(lab: &Lab, name: &str, copies: u32) -> Result<Node> {
        let dir = lab.dir(&format!("survive-{name}"))?;
        let raw = dir.join("base.raw");
        pattern::noise(&raw, SIZE, 21)?;
        let content = fs::read(&raw)?;
        let a = SlowDisk::new(&dir, "a", DISK)?;
        let b = SlowDisk::new(&dir, "b", DISK)?;
        let c = LoopDisk::new(&dir, "c", DISK, Fs::Ext4)?;
        // Nothing is promoted: reads are to come from the copies.
        let settings = "image_io = \"direct\"\ncache_percent = 0\nprobes = false\nthreads = 1\n\
                        clean_seconds = 3\nrebuild_after_seconds = 4\nrebuild_mib = 24\n";
        let daemon = Daemon::start(lab, &dir, name, Profile::Debug, settings)?;
        for (path, name) in [(&a.path, "a"), (&b.path, "b"), (&c.path, "c")] {
            daemon.ok(&["disk", "add", text(path)?, "--name", name, "--tier=ssd"])?;
        }
        daemon.ok(&["image", "import", text(&raw)?, "--name=base", "--disk=a"])?;
        daemon.ok(&["replica", "create", "vm", "--image=base", "--disk=c"])?;
        fs::remove_file(&raw)?;
        if copies > 1 {
            daemon.ok(&["image", "copy", "base", "--to=b"])?;
        }
        Ok(Node { daemon, content, dir, a, _b: b, _c: c })
    }

    fn load(&self) -> Result<Load> {
        let mut load = Load::new(self.content.clone());
        for _ in 0..READERS {
            load.read(self.daemon.nbd(), "replica/vm", Some(EVERYWHERE), 0)?;
        }
        Ok(load)
    }

    /// The sum of a metric's samples.
    fn metric(&self, name: &str) -> Result<f64> {
        self.daemon.metric(name)
    }

    /// Waits until the daemon holds this disk in this trouble, or in none.
    fn until_trouble(&self, disk: &str, trouble: Option<&str>, limit: Duration) -> Result<()> {
        let started = Instant::now();
        loop {
            let troubles = self.daemon.json(&["status"])?["troubles"].clone();
            let all = troubles.as_array().context("status has no troubles")?;
            let found = all.iter().find(|it| it["disk"] == disk).map(|it| &it["trouble"]);
            if found.and_then(|it| it.as_str()) == trouble {
                return Ok(());
            }
            ensure!(started.elapsed() < limit, "disk {disk}: {troubles}, not {trouble:?}");
            thread::sleep(Duration::from_millis(100));
        }
    }
}

/// A falls ill under load and is well again.
fn ill(lab: &Lab, name: &str, illness: Illness, last: Duration, timed: bool) -> Result<String> {
    let mut node = Node::new(lab, name, 2)?;
    let load = node.load()?;
    thread::sleep(Duration::from_secs(2));
    let sick = load.clock();
    node.a.suffers(illness)?;
    thread::sleep(last);
    if illness == Illness::Silent {
        node.until_trouble("a", Some("silent"), Duration::ZERO)?;
    }
    let well = load.clock();
    node.a.suffers(Illness::None)?;
    node.until_trouble("a", None, Duration::from_secs(30))?;
    thread::sleep(Duration::from_secs(1));
    let samples = load.end()?;
    let failovers = node.metric("underlay_source_failovers_total")?;
    let hedges = node.metric("underlay_source_hedges_total")?;
    ensure!(failovers + hedges > 0.0, "nothing was read from another copy");
    ensure!(node.metric("underlay_source_failed_total")? == 0.0, "reads failed");
    node.daemon.healthy()?;
    node.daemon.stop()?;
    told(&samples, sick, well, timed, &format!("{failovers} failovers, {hedges} hedges"))
}

/// What was seen; an error if it took too long.
fn told(samples: &[Sample], sick: f64, well: f64, timed: bool, more: &str) -> Result<String> {
    let of = |from, to, share| quantile(samples, Kind::Cold, from, to, share).unwrap_or(f64::NAN);
    let worst = of(sick, well, 1.0);
    let stall = of(sick, well, 0.999);
    let told = format!(
        "{} reads; p99.9 {:.1} ms before, {:.1} ms while ill (worst {:.1} ms), {more}",
        samples.len(),
        of(0.0, sick, 0.999) * 1e3,
        stall * 1e3,
        worst * 1e3,
    );
    ensure!(!timed || stall <= STALL, "{told}");
    Ok(told)
}

/// Bits of A's copy flip behind everybody's back.
fn damaged(lab: &Lab) -> Result<String> {
    let mut node = Node::new(lab, "damaged", 2)?;
    let images = node.a.path.join("underlay/images");
    let copy = fs::read_dir(images)?.flatten().next().context("disk a has no copy")?.path();
    let file = OpenOptions::new().read(true).write(true).open(copy.join("data"))?;
    let mut rng = Rng::with_seed(5);
    let chunks: Vec<u64> = rng.choose_multiple(0..SIZE / CHUNK, 30);
    for chunk in &chunks {
        let at = chunk * CHUNK + rng.u64(..CHUNK);
        let byte = node.content[at as usize] ^ 1 << rng.u32(..8);
        file.write_all_at(&[byte], at)?;
    }
    file.sync_all()?;
    let mut client = Client::open(node.daemon.nbd(), "replica/vm")?;
    let compare = |client: &mut Client, content: &[u8]| -> Result<()> {
        let read = client.read_all(SIZE)?;
        let wrong = pattern::differ(&read, content);
        ensure!(wrong.is_none(), "byte {wrong:?} is not the image's");
        Ok(())
    };
    compare(&mut client, &node.content)?;
    // Some of the chunks were read from B only, because that was faster.
    node.daemon.ok(&["image", "verify", "base"])?;
    let started = Instant::now();
    while node.metric("underlay_repaired_chunks_total")? < chunks.len() as f64 {
        let limit = Duration::from_secs(20);
        ensure!(started.elapsed() < limit, "not all were repaired: {}", node.daemon.log_text());
        thread::sleep(Duration::from_millis(200));
    }
    let mut stored = vec![0; SIZE as usize];
    file.read_exact_at(&mut stored, 0)?;
    ensure!(stored == node.content, "the copy on disk a is not the image");
    ensure!(copy.join("data").metadata()?.permissions().readonly(), "the copy is sealed no more");
    compare(&mut client, &node.content)?;
    node.daemon.ok(&["image", "verify", "base"])?;
    node.daemon.healthy()?;
    node.daemon.stop()?;
    Ok(format!("{} of {} chunks repaired", chunks.len(), SIZE / CHUNK))
}

/// A's copy is damaged, and can't be written any more; then its disk takes writes again.
fn unmended(lab: &Lab) -> Result<String> {
    let mut node = Node::new(lab, "unmended", 2)?;
    let images = node.a.path.join("underlay/images");
    let copy = fs::read_dir(images)?.flatten().next().context("disk a has no copy")?.path();
    let file = OpenOptions::new().write(true).open(copy.join("data"))?;
    file.write_all_at(&[node.content[9000] ^ 1], 9000)?;
    file.sync_all()?;
    drop(file);
    tool("chattr", ["+i"]).args([copy.join("data")]).run()?;
    let started = Instant::now();
    let until = |disks: &[&str]| -> Result<u64> {
        loop {
            let read = Client::open(node.daemon.nbd(), "replica/vm")?.read_all(SIZE)?;
            ensure!(read == node.content, "not the image's content");
            let copies = node.daemon.json(&["image", "copies", "base"])?.to_string();
            let on = |disk: &&&str| copies.contains(&format!("\"disk\":\"{disk}\""));
            if ["a", "b", "c"].iter().filter(on).eq(disks) {
                return Ok(started.elapsed().as_secs());
            }
            ensure!(started.elapsed() < Duration::from_secs(150), "not on {disks:?}: {copies}");
            thread::sleep(Duration::from_secs(1));
        }
    };
    let made = until(&["a", "b", "c"]);
    tool("chattr", ["-i"]).args([copy.join("data")]).run()?;
    // Now it is mended after all, and the one that was made is too many.
    let (made, gone) = (made?, until(&["a", "b"])?);
    node.daemon.healthy()?;
    node.daemon.stop()?;
    Ok(format!(
        "another was there after {made} s; mended, it is one too many, and gone after {gone} s"
    ))
}

/// A's device vanishes under load, and comes back after a restart of the daemon.
fn pulled(lab: &Lab) -> Result<String> {
    let mut node = Node::new(lab, "pulled", 2)?;
    let load = node.load()?;
    thread::sleep(Duration::from_secs(2));
    let sick = load.clock();
    node.a.pull()?;
    thread::sleep(Duration::from_secs(5));
    let well = load.clock();
    let samples = load.end()?;
    let told = told(&samples, sick, well, false, "pulled")?;
    node.daemon.stop()?;
    let Node { mut daemon, content, dir, a, _b, _c } = node;
    drop(a);
    let compare = |daemon: &Daemon| -> Result<()> {
        let read = Client::open(daemon.nbd(), "replica/vm")?.read_all(SIZE)?;
        ensure!(pattern::differ(&read, &content).is_none(), "not the image's content");
        Ok(())
    };
    daemon.restart()?;
    compare(&daemon)?;
    daemon.stop()?;
    let _back = SlowDisk::plug(&dir, "a")?;
    daemon.restart()?;
    compare(&daemon)?;
    daemon.ok(&["fsck"])?;
    daemon.stop()?;
    Ok(told)
}

/// A's device vanishes; its copy is made anew on C, over a kill of the daemon. When A is back, one of the three
/// goes.
fn rebuilt(lab: &Lab) -> Result<String> {
    let node = Node::new(lab, "rebuilt", 2)?;
    let load = node.load()?;
    let copies = |daemon: &Daemon| -> Result<Vec<String>> {
        let image = daemon.json(&["image", "inspect", "base"])?;
        let copies = image["copies"].as_array().context("no copies")?;
        let ready = copies.iter().filter(|copy| copy["state"] == "ready");
        Ok(ready.map(|copy| copy["disk"].as_str().unwrap_or_default().to_owned()).collect())
    };
    let until = |daemon: &Daemon, metric: &str| -> Result<Duration> {
        let started = Instant::now();
        while daemon.metric(metric)? < 1.0 {
            let limit = Duration::from_secs(60);
            ensure!(started.elapsed() < limit, "no {metric}: {}", daemon.log_text());
            thread::sleep(Duration::from_millis(200));
        }
        Ok(started.elapsed())
    };
    let Node { mut daemon, content, dir, mut a, _b, _c } = node;
    a.pull()?;
    let pulled = Instant::now();
    loop {
        let image = daemon.json(&["image", "inspect", "base"])?;
        if image["making"][0]["done_bytes"].as_u64() > Some(NOTED) {
            break;
        }
        let limit = Duration::from_secs(60);
        ensure!(pulled.elapsed() < limit, "no copy is made: {}", daemon.log_text());
        thread::sleep(Duration::from_millis(50));
    }
    load.end()?;
    daemon.kill()?;
    drop(a);
    daemon.restart()?;
    until(&daemon, "underlay_copies_made_total")?;
    let took = pulled.elapsed();
    let after = copies(&daemon)?;
    ensure!(after.contains(&"c".to_owned()), "the copies are on {after:?}");
    let events = daemon.json(&["events"])?;
    let made =
        events["events"].as_array().into_iter().flatten().find(|it| it["kind"] == "copy_made");
    let resumed = made.and_then(|it| it["details"]["resumed_at"].as_u64()).unwrap_or(0);
    ensure!(resumed >= NOTED, "it was begun anew: {made:?}");
    daemon.stop()?;
    let _back = SlowDisk::plug(&dir, "a")?;
    daemon.restart()?;
    until(&daemon, "underlay_copies_removed_total")?;
    let left = copies(&daemon)?;
    ensure!(left.len() == 2, "the copies are on {left:?}");
    let read = Client::open(daemon.nbd(), "replica/vm")?.read_all(SIZE)?;
    ensure!(pattern::differ(&read, &content).is_none(), "not the image's content");
    daemon.ok(&["image", "verify", "base"])?;
    daemon.ok(&["fsck"])?;
    daemon.stop()?;
    let (took, resumed) = (took.as_secs_f64(), resumed >> 20);
    Ok(format!(
        "another was made after {took:.0} s, gone on with at {resumed} MiB; then left on {left:?}"
    ))
}

/// The only copy hangs: who needs it waits, and nobody else.
fn only(lab: &Lab, hang: Duration) -> Result<String> {
    let mut node = Node::new(lab, "only", 1)?;
    let raw = node.dir.join("other.raw");
    pattern::noise(&raw, SIZE, 22)?;
    node.daemon.ok(&["image", "import", text(&raw)?, "--name=other", "--disk=b"])?;
    node.daemon.ok(&["replica", "create", "else", "--image=other", "--disk=c"])?;
    // What the replica wrote itself is on its own disk.
    let mut own = Client::open(node.daemon.nbd(), "replica/vm")?;
    own.write(0, &[7; 4096], 0)?;
    own.flush()?;
    let mut load = Load::new(fs::read(&raw)?);
    for _ in 0..READERS {
        load.read(node.daemon.nbd(), "replica/else", Some(EVERYWHERE), 0)?;
    }
    thread::sleep(Duration::from_secs(2));
    let sick = load.clock();
    node.a.suffers(Illness::Silent)?;
    // More than the queue of the device takes, all on the one ring that serves the others, too.
    let socket = node.daemon.nbd().to_owned();
    let waiting: Vec<_> = (0..300)
        .map(|reader| {
            let socket = socket.clone();
            thread::spawn(move || -> Result<u64, Failure> {
                let mut client = Client::open(&socket, "replica/vm").map_err(Failure::Lost)?;
                let mut buf = [0; 4096];
                let at = (1 + reader % (SIZE / CHUNK - 1)) * CHUNK + reader / 300 * 4096;
                client.read(at, &mut buf)?;
                Ok(reader)
            })
        })
        .collect();
    thread::sleep(hang);
    let mut buf = [0; 4096];
    own.read(0, &mut buf)?;
    ensure!(buf == [7; 4096], "what was written is not there");
    own.write(8192, &[8; 4096], 0)?;
    own.flush()?;
    node.until_trouble("a", Some("silent"), Duration::from_secs(5))?;
    let well = load.clock();
    node.a.suffers(Illness::None)?;
    for thread in waiting {
        let read = thread.join().map_err(|_| anyhow::anyhow!("a reader panicked"))?;
        ensure!(read.is_ok(), "a read that waited failed: {read:?}");
    }
    // And if it fails: an error, for what is only there.
    node.a.suffers(Illness::Fails(100))?;
    let read = own.read(64 << 20, &mut buf);
    ensure!(matches!(read, Err(Failure::Refused(_))), "a read that can't be answered: {read:?}");
    own.read(0, &mut buf)?;
    node.a.suffers(Illness::None)?;
    let samples = load.end()?;
    node.until_trouble("a", None, Duration::from_secs(30))?;
    own.read(64 << 20, &mut buf)?;
    node.daemon.healthy()?;
    node.daemon.stop()?;
    told(&samples, sick, well, true, "of another image meanwhile")
}

/// Two reads of A in a hundred take 20 ms longer: with a second copy the tail is cut.
fn hedged(lab: &Lab) -> Result<String> {
    let tail = |copies: u32| -> Result<(f64, f64)> {
        let mut node = Node::new(lab, &format!("hedged{copies}"), copies)?;
        // All is verified before it is measured, on both copies: a chunk's first read is one of all of it.
        let _client = Client::open(node.daemon.nbd(), "replica/vm")?;
        node.daemon.ok(&["image", "verify", "--all"])?;
        node.a.suffers(Illness::Slow(20, 2))?;
        let load = node.load()?;
        thread::sleep(Duration::from_secs(15));
        let samples = load.end()?;
        let figures = ["underlay_source_hedges_total", "underlay_source_reads_total"];
        let [hedges, reads] = figures.map(|name| node.metric(name));
        node.daemon.stop()?;
        let tail = quantile(&samples, Kind::Cold, 1.0, f64::MAX, 0.999).context("no reads")?;
        Ok((tail, hedges? / reads?.max(1.0)))
    };
    let ((alone, _), (with, share)) = (tail(1)?, tail(2)?);
    let told = format!(
        "p99.9 {:.1} ms with one copy, {:.1} ms with two ({:.1} x), {:.2} % hedged",
        alone * 1e3,
        with * 1e3,
        alone / with,
        share * 100.0,
    );
    ensure!(share <= 0.055 && alone >= with * 5.0, "{told}");
    Ok(told)
}
