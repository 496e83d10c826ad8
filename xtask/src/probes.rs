//! The probes on the real kernel, with real disks: do they tell the truth?
//!
//! Invariants checked:
//! - device times agree with what fio measures itself, mean and p99, within 10 %;
//! - what the page cache answers is not counted; whose I/O it is, is told apart; nothing is lost;
//! - reads of fragmented files are attributed to the chunk that was read, also on xfs and on a partition;
//! - at depth 32 no request is left behind, and no beginning or end goes unseen for the programs' own sake;
//! - a request that hangs shows while it hangs;
//! - the agent keeps two capabilities, and outlives its daemon.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail, ensure};
use nix::fcntl::{FallocateFlags, fallocate};
use serde_json::Value;

use crate::lab::{Fs, Lab, LoopDisk, loop_disks};
use crate::report::Report;
use crate::subject::text;
use crate::tool::{Process, json, tool};
use crate::{ebpf, setup};

/// Size of each disk, in bytes.
const DISK: u64 = 512 << 20;
/// Size of the files that are read, in bytes.
const FILE: u64 = 64 << 20;
/// What files are written in, at random, so that they are fragmented, in bytes.
const PIECE: usize = 64 << 10;
/// Underlay's chunk, in bytes.
const CHUNK: u64 = 256 << 10;
/// Direct reads whose attribution is checked, on each disk.
const READS: u64 = 12_000;
/// How far from fio's figures the probes' may be.
const NEAR: f64 = 0.10;
/// The part of all requests whose end may be hidden from the probes: some kernels run no program in an
/// interrupt that has come to certain tasks, and count no program as passed over for it.
const HIDDEN: f64 = 0.005;
/// How often a run in which no program was kept from an end is tried.
const TRIES: usize = 4;

/// Runs the rig.
pub fn run(lab: &Lab, report: &mut Report) {
    let ready = loop_disks().and_then(|()| {
        setup::need(&["fio", "mkfs.ext4", "mkfs.xfs", "addpart", "filefrag", "nbdfuse", "nbdkit"])
    });
    let agent = match ready.and_then(|()| usable()) {
        Ok(agent) => agent,
        Err(error) => return report.skip("probes", &format!("{error:#}")),
    };
    report.check("probes: device time on a slow disk agrees with fio", || slow(lab, &agent));
    report.check("probes: counts and times on a plain disk", || plain(lab, &agent));
    report.check("probes: at depth 32 nothing is left behind", || deep(lab, &agent));
    report.check("probes: the page cache's answers are not counted", || cached(lab, &agent));
    report.check("probes: own and foreign I/O are told apart", || owners(lab, &agent));
    report.check("probes: a daemon is served, with two capabilities", || serving(lab, &agent));
    report.check("probes: reads of chunks of fragmented files, ext4", || {
        let dir = lab.dir("probes-ext4")?;
        let disk = LoopDisk::new(&dir, "a", DISK, Fs::Ext4)?;
        attribution(&disk.path, &agent)
    });
    report.check("probes: reads of chunks of fragmented files, xfs", || {
        let dir = lab.dir("probes-xfs")?;
        let disk = LoopDisk::new(&dir, "b", DISK, Fs::Xfs)?;
        attribution(&disk.path, &agent)
    });
    report.check("probes: reads of chunks of fragmented files, a partition", || {
        let disk = Partition::new(&lab.dir("probes-partition")?)?;
        attribution(&disk.mount, &agent)
    });
}

/// Builds the agent, and asks it whether it can run here.
pub fn usable() -> Result<PathBuf> {
    let agent = ebpf::agent()?;
    let said = tool(&agent, ["check", "--json"]).outcome()?;
    let found = json(&said.stdout)?;
    if found["works"] != true {
        bail!("{}", found["problem"].as_str().unwrap_or("the agent does not say why"));
    }
    Ok(agent)
}

/// The agent at work. It reports when it is told to end.
pub struct Watching {
    process: Process,
    out: PathBuf,
}

impl Watching {
    /// Starts `underlay-agent watch --total`; returns once it watches.
    pub fn start(agent: &Path, dir: &Path, args: &[&str]) -> Result<Watching> {
        let (out, log) = (dir.join("watch.json"), dir.join("watch.log"));
        let _ = fs::remove_file(&log);
        // Through a shell for its standard output alone; exec keeps the process one and the same.
        let script = "exec \"$0\" watch --total --json \"$@\" >\"$OUT\"";
        let mut process = tool("sh", ["-c", script, text(agent)?])
            .args(args)
            .env("OUT", out.as_os_str())
            .background(&log)?;
        let said = || fs::read_to_string(&log).is_ok_and(|text| text.contains("watching"));
        process.until(Duration::from_secs(20), said)?;
        Ok(Watching { process, out })
    }

    /// How often the kernel passed over one of its programs.
    fn passed_over(&self) -> Result<u64> {
        let mut sum = 0;
        for entry in fs::read_dir(format!("/proc/{}/fdinfo", self.process.id()))? {
            let text = fs::read_to_string(entry?.path()).unwrap_or_default();
            let misses = text.lines().find_map(|line| line.strip_prefix("recursion_misses:"));
            sum += misses.map_or(Ok(0), |text| text.trim().parse::<u64>())?;
        }
        Ok(sum)
    }

    /// Ends it; returns its report.
    pub fn end(mut self) -> Result<Value> {
        // The last completions are on their way to the ring when fio ends.
        std::thread::sleep(Duration::from_millis(300));
        let code = self.process.terminate(Duration::from_secs(20))?;
        ensure!(code == 0, "the agent ended with code {code}: {}", self.process.said());
        json(&fs::read_to_string(&self.out).context("reading the agent's report")?)
    }
}

/// What fio says of its reads: count, mean and p99 of completion latency in nanoseconds, IOPS.
pub struct Fio {
    /// How many.
    pub count: f64,
    /// Mean latency.
    pub mean: f64,
    p99: f64,
    /// Reads a second.
    pub iops: f64,
}

/// Random direct reads of `file` by fio.
pub fn fio(file: &Path, options: &[&str]) -> Result<Fio> {
    let said = tool("fio", ["--name=r", "--rw=randread", "--bs=4k", "--direct=1", "--thread"])
        .args(["--output-format=json", "--percentile_list=50:99", "--allow_file_create=0"])
        .args([format!("--filename={}", file.display()), format!("--size={FILE}")])
        .args(options)
        .out()?;
    figures(&said)
}

fn figures(said: &str) -> Result<Fio> {
    let from = said.find('{').ok_or_else(|| anyhow!("fio says no JSON"))?;
    let read = json(&said[from..])?["jobs"][0]["read"].take();
    let number =
        |value: &Value| value.as_f64().ok_or_else(|| anyhow!("fio's figures lack one: {read}"));
    let clat = &read["clat_ns"];
    Ok(Fio {
        count: number(&read["total_ios"])?,
        mean: number(&clat["mean"])?,
        p99: number(&clat["percentile"]["99.000000"])?,
        iops: number(&read["iops"])?,
    })
}

/// A class of I/O in the agent's report: of disk 0, `which` as `foreign_reads`.
struct Seen {
    count: f64,
    mean: f64,
    p99: f64,
}

fn seen(report: &Value, which: &str) -> Result<Seen> {
    let load = &report["disks"][0][which];
    let number = |key: &str| load[key].as_f64().ok_or_else(|| anyhow!("no {key} in {report}"));
    let count = number("count")?;
    Ok(Seen {
        count,
        mean: number("device_ns")? / count.max(1.0),
        p99: quantile(&load["device"], 0.99)?,
    })
}

/// As the agent's histogram has it: pairs of bucket and count, eight steps an octave from 1 µs on.
fn quantile(histogram: &Value, of: f64) -> Result<f64> {
    let pairs = histogram.as_array().ok_or_else(|| anyhow!("no histogram"))?;
    let pair = |pair: &Value| Some((pair[0].as_u64()?, pair[1].as_f64()?));
    let pairs: Vec<_> = pairs.iter().filter_map(pair).collect();
    let floor = |bucket: u64| match bucket.checked_sub(1) {
        None => 0.0,
        Some(at) => ((8 + at % 8) << (7 + at / 8)) as f64,
    };
    let rank = of * pairs.iter().map(|(_, count)| count).sum::<f64>();
    let mut before = 0.0;
    for (bucket, count) in &pairs {
        if before + count >= rank {
            let (from, to) = (floor(*bucket), floor(bucket + 1));
            return Ok(from + (to - from) * (rank - before) / count);
        }
        before += count;
    }
    Ok(0.0)
}

/// A file of [`FILE`] bytes, written through.
pub fn lay(dir: &Path, name: &str) -> Result<PathBuf> {
    let path = dir.join(name);
    let mut file = File::create(&path)?;
    for at in 0..FILE >> 20 {
        file.write_all(&vec![at as u8 + 1; 1 << 20])?;
    }
    file.sync_all()?;
    Ok(path)
}

fn near(what: &str, ours: f64, theirs: f64) -> Result<String> {
    let off = ours / theirs - 1.0;
    let said =
        format!("{what} {:.3} ms, fio {:.3} ms, {:+.1} %", ours / 1e6, theirs / 1e6, off * 100.0);
    ensure!(off.abs() <= NEAR, "{said}");
    Ok(said)
}

fn all_there(seen: f64, done: f64) -> Result<String> {
    let missed = done - seen;
    ensure!(missed.abs() <= (done * HIDDEN).max(2.0), "{seen} seen, {done} done");
    Ok(format!("{seen} of {done} seen"))
}

/// nbdkit with a delay beneath nbdfuse beneath a loop device: so slow that nothing else matters.
fn slow(lab: &Lab, agent: &Path) -> Result<String> {
    let dir = lab.dir("probes-slow")?;
    let disk = Delayed::new(&dir, "4ms")?;
    let watching = Watching::start(agent, &dir, &[&disk.device])?;
    let fio = fio(Path::new(&disk.device), &["--ioengine=psync", "--runtime=6", "--time_based"])?;
    let report = watching.end()?;
    let seen = seen(&report, "foreign_reads")?;
    let figures = [
        all_there(seen.count, fio.count)?,
        near("mean", seen.mean, fio.mean)?,
        near("p99", seen.p99, fio.p99)?,
    ];
    let hung = hung(agent, &dir, &disk)?;
    Ok(format!("{}; {hung}", figures.join("; ")))
}

/// One request that the disk sits on is in flight, for as long as it does.
fn hung(agent: &Path, dir: &Path, disk: &Delayed) -> Result<String> {
    let device = disk.device.clone();
    let watching = Watching::start(agent, dir, &[&device])?;
    disk.pause(Paused::Yes)?;
    let reader = std::thread::spawn(move || {
        let options = ["--ioengine=psync", "--number_ios=1"];
        fio(Path::new(&device), &options).map(drop)
    });
    std::thread::sleep(Duration::from_millis(2500));
    let report = watching.end();
    disk.pause(Paused::No)?;
    reader.join().map_err(|_| anyhow!("the reader panicked"))??;
    let report = report?;
    let (count, oldest) = (&report["disks"][0]["in_flight"], &report["disks"][0]["oldest_ns"]);
    let oldest = oldest.as_f64().unwrap_or_default() / 1e9;
    ensure!(*count == 1 && oldest > 1.5 && oldest < 10.0, "{count} in flight for {oldest:.1} s");
    Ok(format!("a hung read shows, {oldest:.1} s old"))
}

fn plain(lab: &Lab, agent: &Path) -> Result<String> {
    let dir = lab.dir("probes-plain")?;
    let disk = LoopDisk::new(&dir, "a", DISK, Fs::Ext4)?;
    let file = lay(&disk.path, "file")?;
    let mut said = Vec::new();
    for options in [["--ioengine=psync", "--iodepth=1"], ["--ioengine=io_uring", "--iodepth=32"]] {
        let watching = Watching::start(agent, &dir, &[text(&disk.path)?])?;
        let fio = fio(&file, &[options[0], options[1], "--runtime=4", "--time_based"])?;
        let report = watching.end()?;
        let seen = seen(&report, "foreign_reads")?;
        said.push(all_there(seen.count, fio.count)?);
        // fio's latency has the system call and its own way there and back besides.
        ensure!(seen.mean <= fio.mean * 1.02, "mean {} beyond fio's {}", seen.mean, fio.mean);
        said.push(format!("mean {:.0} of fio's {:.0} µs", seen.mean / 1e3, fio.mean / 1e3));
    }
    Ok(said.join("; "))
}

/// Every request of a deep queue, its completions in interrupts, has a beginning and an end.
fn deep(lab: &Lab, agent: &Path) -> Result<String> {
    let dir = lab.dir("probes-deep")?;
    let disk = LoopDisk::new(&dir, "a", DISK, Fs::Ext4)?;
    let file = lay(&disk.path, "file")?;
    disk.direct()?;
    let mut said = Vec::new();
    for _ in 0..TRIES {
        let watching = Watching::start(agent, &dir, &[text(&disk.path)?])?;
        let load = ["--ioengine=io_uring", "--iodepth=32", "--runtime=4", "--time_based"];
        let done = fio(&file, &load)?.count;
        // Long enough for what is left behind to be old.
        std::thread::sleep(Duration::from_millis(1500));
        let passed_over = watching.passed_over()?;
        let report = watching.end()?;
        let seen = seen(&report, "foreign_reads")?.count;
        let (losses, disk) = (&report["losses"], &report["disks"][0]);
        let swept = losses["swept"].as_f64().unwrap_or_default();
        let others = ["full", "ring", "chunks", "unmatched", "orphans"];
        let others = others.iter().any(|which| losses[which] != 0);
        ensure!(disk["in_flight"] == 0 && !others, "left behind: {disk}, {losses}");
        // The file system reads a block of its own now and then.
        ensure!((0.0..=2.0).contains(&(seen + swept - done)), "{seen} of {done} seen, {losses}");
        said.push(format!("{seen} of {done} seen, programs passed over {passed_over} times"));
        if swept == 0.0 {
            return Ok(said.join("; "));
        }
        if passed_over == 0 && swept <= done * HIDDEN {
            return Ok(format!("{}; the kernel hid {swept} ends", said.join("; ")));
        }
    }
    bail!("none of {TRIES} runs without a loss: {}", said.join("; "))
}

fn cached(lab: &Lab, agent: &Path) -> Result<String> {
    let dir = lab.dir("probes-cached")?;
    let disk = LoopDisk::new(&dir, "a", DISK, Fs::Ext4)?;
    let file = lay(&disk.path, "file")?;
    let warm = fs::read(&file)?.len();
    let watching = Watching::start(agent, &dir, &[text(&file)?])?;
    let options = ["--direct=0", "--invalidate=0", "--ioengine=psync", "--number_ios=20000"];
    let fio = fio(&file, &options)?;
    let report = watching.end()?;
    let seen = seen(&report, "foreign_reads")?;
    let chunks = report["chunks"].as_array().map_or(0, Vec::len);
    ensure!(seen.count == 0.0 && chunks == 0, "{} reads counted, {chunks} chunks", seen.count);
    Ok(format!("{} reads of {} warm MiB, none counted", fio.count, warm >> 20))
}

fn owners(lab: &Lab, agent: &Path) -> Result<String> {
    let dir = lab.dir("probes-owners")?;
    let disk = LoopDisk::new(&dir, "a", DISK, Fs::Ext4)?;
    let (own, other) = (lay(&disk.path, "own")?, lay(&disk.path, "other")?);
    let log = dir.join("own.json");
    // It begins late enough for the agent to know it, and ends with a known number.
    let mut ours = tool("fio", ["--name=r", "--rw=randread", "--bs=4k", "--direct=1", "--thread"])
        .args(["--ioengine=io_uring", "--iodepth=8", "--startdelay=3", "--io_size=80m"])
        .args(["--output-format=json", "--percentile_list=50:99", "--allow_file_create=0"])
        .args([format!("--filename={}", own.display()), format!("--size={FILE}")])
        .background(&log)?;
    let tgid = ours.id().to_string();
    let watching = Watching::start(agent, &dir, &[text(&own)?, text(&other)?, "--own", &tgid])?;
    let theirs = fio(&other, &["--ioengine=psync", "--runtime=6", "--time_based"])?;
    ours.wait(Duration::from_secs(60))?;
    let report = watching.end()?;
    let done = figures(&fs::read_to_string(&log)?)?;
    let owned = all_there(seen(&report, "own_reads")?.count, done.count)?;
    let foreign = all_there(seen(&report, "foreign_reads")?.count, theirs.count)?;
    // By files: what is whose must agree with who read which.
    for chunk in report["chunks"].as_array().into_iter().flatten() {
        let wrong = if chunk["file"] == 0 { &chunk["foreign"] } else { &chunk["own"] };
        ensure!(wrong["reads"] == 0, "the other's reads in {chunk}");
    }
    Ok(format!("own: {owned}; foreign: {foreign}"))
}

/// The agent as `serve` starts it, with a daemon that comes late, goes away and comes back.
fn serving(lab: &Lab, agent: &Path) -> Result<String> {
    let dir = lab.dir("probes-daemon")?;
    let disk = LoopDisk::new(&dir, "a", DISK, Fs::Ext4)?;
    let file = lay(&disk.path, "file")?;
    let socket = lab.socket("probes");
    let dev = fs::metadata(&disk.path)?.dev();
    let dev = format!("{}:{}", nix::sys::stat::major(dev), nix::sys::stat::minor(dev));
    let mut process =
        tool(agent, ["--socket", text(&socket)?]).background(&dir.join("agent.log"))?;
    let status = format!("/proc/{}/status", process.id());
    let held = || {
        let text = fs::read_to_string(&status).ok()?;
        let held = text.lines().find_map(|line| line.strip_prefix("CapEff:"))?;
        u64::from_str_radix(held.trim(), 16).ok()
    };
    let (bpf, perfmon) = (1 << 39, 1 << 38);
    let given_up = process.until(Duration::from_secs(20), || held() == Some(bpf | perfmon));
    given_up.with_context(|| format!("capabilities in force: {:#x}", held().unwrap_or(0)))?;
    let mut counted = Vec::new();
    for generation in [7, 3] {
        let watch = format!(
            r#"{{"generation":{generation},"tgids":[],"disks":[{{"name":"disk a","dev":"{dev}"}}]}}"#
        );
        let listener = UnixListener::bind(&socket)?;
        let first = reported(&listener, &watch)?;
        ensure!(first["generation"] == generation, "a report of another watch: {first}");
        let done = fio(&file, &["--ioengine=psync", "--number_ios=2000"])?.count;
        let mut sum = 0.0;
        for _ in 0..3 {
            let report = reported(&listener, &watch)?;
            ensure!(report["disks"][0]["name"] == "disk a", "{report}");
            sum += seen(&report, "foreign_reads")?.count;
        }
        counted.push(all_there(sum, done)?);
        drop(listener);
        fs::remove_file(&socket)?;
        // The agent finds nobody there, and goes on.
        std::thread::sleep(Duration::from_millis(1500));
        ensure!(process.alive(), "the agent ended with its daemon: {}", process.said());
    }
    let code = process.terminate(Duration::from_secs(5))?;
    ensure!(code == 0, "ended with code {code}: {}", process.said());
    Ok(counted.join("; "))
}

/// Answers the agent until it reports.
fn reported(listener: &UnixListener, watch: &str) -> Result<Value> {
    for _ in 0..20 {
        let (mut stream, _) = listener.accept()?;
        stream.set_read_timeout(Some(Duration::from_secs(5)))?;
        let (mut request, mut piece) = (Vec::new(), [0; 65536]);
        let (head, body) = loop {
            let count = stream.read(&mut piece)?;
            ensure!(count > 0, "half a request");
            request.extend_from_slice(&piece[..count]);
            let all = String::from_utf8_lossy(&request).into_owned();
            let Some((head, body)) = all.split_once("\r\n\r\n") else { continue };
            let length = head.lines().find_map(|line| line.strip_prefix("Content-Length: "));
            let length: usize = length.unwrap_or("0").parse()?;
            if body.len() >= length {
                break (head.to_string(), body.to_string());
            }
        };
        if head.starts_with("POST /v1/probes/report ") {
            stream.write_all(b"HTTP/1.1 204 No Content\r\n\r\n")?;
            return json(&body);
        }
        ensure!(head.starts_with("GET /v1/probes/watch"), "{head}");
        let known = head.contains("?generation=");
        let answer = if known { "" } else { watch };
        let status = if known { "204 No Content" } else { "200 OK" };
        let length = answer.len();
        write!(stream, "HTTP/1.1 {status}\r\nContent-Length: {length}\r\n\r\n{answer}")?;
    }
    bail!("the agent does not report")
}

/// Reads chosen places of two files that lie among each other, and compares what the agent says.
fn attribution(disk: &Path, agent: &Path) -> Result<String> {
    let files = [disk.join("one"), disk.join("two")];
    fragment(&files)?;
    let dir = disk.parent().unwrap_or(disk);
    let fragments = files.iter().map(|file| extents(file)).collect::<Result<Vec<_>>>()?;
    ensure!(fragments.iter().all(|count| *count > 50), "not fragmented: {fragments:?} extents");
    let direct = |file| OpenOptions::new().read(true).custom_flags(0o40000).open(file);
    let open = files.iter().map(direct).collect::<std::io::Result<Vec<_>>>()?;
    let mut memory = vec![0; 128 << 10 | 4096];
    let watching = Watching::start(agent, dir, &[text(&files[0])?, text(&files[1])?])?;
    let mut random = fastrand::Rng::with_seed(11);
    let (mut reads, mut bytes) = (BTreeMap::new(), BTreeMap::new());
    for at in 0..READS + 1000 {
        let file = random.usize(0..2);
        // Most are of one block, counted one by one; some go over chunks and pieces, by their bytes.
        let length = if at < READS { 4096 } else { 128 << 10 };
        let from = random.u64(0..(FILE - length) / 4096) * 4096;
        let aligned = memory.as_ptr().align_offset(4096);
        let room = &mut memory[aligned..][..length as usize];
        open[file].read_exact_at(room, from).context("a direct read")?;
        for block in (from..from + length).step_by(4096) {
            *bytes.entry((file as u64, block / CHUNK)).or_insert(0u64) += 4096;
        }
        if at < READS {
            *reads.entry((file as u64, from / CHUNK)).or_insert(0u64) += 1;
        }
    }
    let report = watching.end()?;
    let (mut missing, mut wrong) = (0, 0);
    let mut found: BTreeMap<(u64, u64), u64> = BTreeMap::new();
    for chunk in report["chunks"].as_array().into_iter().flatten() {
        let number = |value: &Value| value.as_u64().unwrap_or(u64::MAX);
        let place = (number(&chunk["file"]), number(&chunk["chunk"]));
        found.insert(place, number(&chunk["foreign"]["bytes"]));
        let least = reads.get(&place).copied().unwrap_or(0);
        let seen = number(&chunk["foreign"]["reads"]);
        ensure!(seen + 3 >= least, "chunk {place:?}: {seen} reads seen, {least} done");
    }
    let places = bytes.keys().chain(found.keys()).copied();
    for place in places.collect::<std::collections::BTreeSet<_>>() {
        let (done, seen) = (bytes.get(&place).unwrap_or(&0), found.get(&place).unwrap_or(&0));
        missing += done.saturating_sub(*seen) / 4096;
        wrong += seen.saturating_sub(*done) / 4096;
    }
    let total = bytes.values().sum::<u64>() / 4096;
    ensure!(wrong == 0, "{wrong} blocks attributed to chunks where nobody read them");
    ensure!(missing as f64 <= total as f64 * HIDDEN, "{missing} of {total} blocks missing");
    Ok(format!(
        "{} reads, 0 misattributed, {missing} of {total} blocks not seen, {fragments:?} extents",
        READS + 1000
    ))
}

/// Two files written in turns, each in pieces in a random order, straight to the disk, whose free space
/// is in pieces as well.
fn fragment(files: &[PathBuf; 2]) -> Result<()> {
    let mut random = fastrand::Rng::with_seed(5);
    let dir = files[0].parent().unwrap_or(&files[0]);
    let filler = File::create_new(dir.join("filler"))?;
    let space = nix::sys::statvfs::statvfs(dir)?;
    let size = space.blocks_available() * space.fragment_size() * 95 / 100;
    let size = size / PIECE as u64 * PIECE as u64;
    fallocate(&filler, FallocateFlags::empty(), 0, i64::try_from(size)?)?;
    let hole = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    for at in (0..size).step_by(2 * PIECE) {
        fallocate(&filler, hole, i64::try_from(at)?, PIECE as i64)?;
    }
    // What was freed can be used again once the journal has it.
    nix::unistd::syncfs(&filler)?;
    let direct =
        |file| OpenOptions::new().write(true).create_new(true).custom_flags(0o40000).open(file);
    let open = files.iter().map(direct).collect::<std::io::Result<Vec<_>>>()?;
    let mut pieces: Vec<u64> = (0..FILE / PIECE as u64).collect();
    random.shuffle(&mut pieces);
    let memory = vec![7; PIECE + 4096];
    let aligned = memory.as_ptr().align_offset(4096);
    for piece in pieces {
        for file in &open {
            file.write_all_at(&memory[aligned..][..PIECE], piece * PIECE as u64)?;
        }
    }
    open.iter().try_for_each(File::sync_all)?;
    Ok(())
}

fn extents(file: &Path) -> Result<u64> {
    // "FILE: 812 extents found"
    let said = tool("filefrag", [file]).out()?;
    let count = said.rsplit_once(": ").and_then(|(_, rest)| rest.split(' ').next()?.parse().ok());
    count.ok_or_else(|| anyhow!("filefrag: {said}"))
}

/// A loop disk with a partition that does not begin where the disk does.
struct Partition {
    device: String,
    mount: PathBuf,
}

impl Partition {
    fn new(dir: &Path) -> Result<Partition> {
        let (file, mount) = (dir.join("p.disk"), dir.join("p"));
        File::create(&file)?.set_len(DISK)?;
        fs::create_dir_all(&mount)?;
        let device = tool("losetup", ["--find", "--show", "--partscan"]).args([&file]).out()?;
        let disk = Partition { device: device.trim().into(), mount };
        // Told to the kernel directly: it may have been built without any format of tables.
        tool("addpart", [&disk.device, "2", "43008", &(DISK / 512 - 50_000).to_string()]).run()?;
        let partition = format!("{}p2", disk.device);
        ensure!(Path::new(&partition).exists(), "{partition} did not appear");
        tool("mkfs.ext4", ["-q", "-F", "-E", "lazy_itable_init=0", &partition]).run()?;
        tool("mount", [&partition]).args([&disk.mount]).run()?;
        Ok(disk)
    }
}

impl Drop for Partition {
    fn drop(&mut self) {
        // Each step is tried; what is left, the sweep takes along.
        let _ = tool("umount", [&self.mount]).outcome();
        let _ = tool("losetup", ["-d", &self.device]).outcome();
    }
}

/// A device that takes its time, and that can be stopped altogether.
struct Delayed {
    device: String,
    fuse: PathBuf,
    control: PathBuf,
    server: Process,
}

/// Whether a device answers.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Paused {
    Yes,
    No,
}

impl Delayed {
    fn new(dir: &Path, delay: &str) -> Result<Delayed> {
        let (backing, fuse) = (dir.join("backing"), dir.join("fuse"));
        let control = dir.join("pause");
        File::create(&backing)?.set_len(FILE)?;
        fs::create_dir_all(&fuse)?;
        let file = fuse.join("disk");
        let mut server = tool("nbdfuse", [text(&file)?, "--command", "nbdkit", "-s"])
            .args(["--exit-with-parent", "--filter=pause", "--filter=delay", "file"])
            .args([text(&backing)?, &format!("rdelay={delay}")])
            .args([format!("pause-control={}", control.display())])
            .background(&dir.join("nbdfuse.log"))?;
        server.until(Duration::from_secs(10), || file.exists())?;
        let losetup =
            tool("losetup", ["--find", "--show", "--direct-io=on"]).args([&file]).outcome()?;
        let device = match losetup.code {
            0 => losetup.stdout,
            // FUSE may not take direct I/O; the page cache then stands in between, cold.
            _ => tool("losetup", ["--find", "--show"]).args([&file]).out()?,
        };
        Ok(Delayed { device: device.trim().into(), fuse, control, server })
    }

    fn pause(&self, paused: Paused) -> Result<()> {
        let mut socket = std::os::unix::net::UnixStream::connect(&self.control)?;
        let (say, answer) = if paused == Paused::Yes { (b"p", b'P') } else { (b"r", b'R') };
        socket.write_all(say)?;
        let mut heard = [0];
        socket.read_exact(&mut heard)?;
        ensure!(heard[0] == answer, "nbdkit's pause filter answered {:?}", heard[0] as char);
        Ok(())
    }
}

impl Drop for Delayed {
    fn drop(&mut self) {
        let _ = self.pause(Paused::No);
        let _ = tool("losetup", ["-d", &self.device]).outcome();
        let _ = self.server.kill();
        let _ = tool("umount", ["-l".as_ref(), self.fuse.as_os_str()]).outcome();
    }
}
