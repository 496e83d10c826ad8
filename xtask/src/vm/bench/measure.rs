//! One load on one device: fio makes it, the kernel's own counters tell what came of it.
//!
//! Rates and CPU time are of the same window, which opens when fio has warmed up and closes while it
//! still runs: what fio takes to start and end is not in them, which in an emulated guest is a lot. CPU
//! time is what was not idle, of all processors, whoever used it: fio, the kernel's threads, a server.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::sys::stat::{major, minor};

use super::lanes::Subject;
use super::{REGION, SIZE};
use crate::bench::ublk::plan::{Kind, LOADS, Lane, Load};
use crate::tool::{Process, Tool, tool};

/// How long a load runs before the window opens.
const WARM: Duration = Duration::from_millis(150);
/// How often the counters are read.
const LOOK: Duration = Duration::from_millis(25);
/// How long fio may take to start or to end in a slow guest.
const SLACK: Duration = Duration::from_secs(60);
/// How much longer than the window a load runs: a busy machine looks late.
const LATE: Duration = Duration::from_millis(100);
/// The shortest window that counts.
const SHORTEST: Duration = Duration::from_millis(150);
/// What the kernel's clock of processes counts, a second.
const TICKS: f64 = 100.0;

/// What came of a load.
pub struct Sample {
    /// Requests of the load's size a second.
    pub per_second: f64,
    /// Processor time of the whole guest per request, in microseconds.
    pub cpu_us: f64,
    /// Of that, the time of the server's process; `None` where the kernel serves alone.
    pub server_us: Option<f64>,
}

/// Runs a load on one device after the other and takes their figures: none of one that was over before
/// it was seen. It is one run of fio for all: to start it takes longer than to measure.
pub fn samples(
    subjects: &[&Subject],
    load: &Load,
    window: Duration,
    round: u64,
    dir: &Path,
    mut taken: impl FnMut(Lane, Option<Sample>) -> Result<()>,
) -> Result<()> {
    let (offset, size) = region(load);
    let runtime = format!("--runtime={}ms", (WARM + window + LATE).as_millis());
    let repeated: &[&str] = match load.kind {
        // A first touch can't be repeated: that load ends early where every block was written.
        Kind::Touch => &["--random_generator=lfsr"],
        Kind::Read | Kind::Over => &["--time_based", "--norandommap"],
    };
    let mut fio = fio(load)
        .args([format!("--offset={offset}"), format!("--size={size}")])
        .args([runtime, format!("--randseed={}", round + 1)])
        .args(repeated);
    let mut before = Vec::new();
    for subject in subjects {
        let device = format!("--filename={}", subject.device.display());
        fio = fio.args(["--name", &subject.lane.key(), "--stonewall", &device]);
        before.push(Sight::take(subject, load)?);
    }
    let mut fio = fio.background(&dir.join("fio.log"))?;
    for (subject, before) in subjects.iter().zip(before) {
        let sample = sample(&mut fio, subject, load, window, &before);
        taken(
            subject.lane,
            sample.with_context(|| format!("{} on {:?}", load.name, subject.lane))?,
        )?;
    }
    let code = fio.wait(SLACK)?;
    ensure!(code == 0, "{}: fio ended with {code}: {}", load.name, fio.said());
    Ok(())
}

/// The figures of the device that fio turns to next.
fn sample(
    fio: &mut Process,
    subject: &Subject,
    load: &Load,
    window: Duration,
    before: &Sight,
) -> Result<Option<Sample>> {
    let look = || Sight::take(subject, load);
    let start = Instant::now();
    let mut first = look()?;
    while first.bytes == before.bytes {
        ensure!(fio.alive() && start.elapsed() < SLACK, "nothing comes: {}", fio.said());
        thread::sleep(LOOK / 5);
        first = look()?;
    }
    thread::sleep(WARM);
    first = look()?;
    let mut last = look()?;
    while last.at - first.at < window && first.at.elapsed() < window + LATE {
        thread::sleep(LOOK);
        let now = look()?;
        // The last in which something happened: the load may be over.
        if now.bytes > last.bytes {
            last = now;
        } else if load.kind == Kind::Touch && now.bytes - before.bytes >= region(load).1 {
            break;
        }
    }
    let time = last.at - first.at;
    if time < SHORTEST {
        return Ok(None);
    }
    let requests = (last.bytes - first.bytes) as f64 / load.block as f64;
    let processors = thread::available_parallelism()?.get() as f64;
    let busy = time.as_secs_f64() * processors - (last.idle - first.idle);
    let server = last.server.zip(first.server).map(|(last, first)| last - first);
    Ok(Some(Sample {
        per_second: requests / time.as_secs_f64(),
        cpu_us: busy * 1e6 / requests,
        server_us: server.map(|seconds| seconds * 1e6 / requests),
    }))
}

/// Writes a part of a device once.
pub fn fill(device: &Path, offset: u64, size: u64) -> Result<()> {
    tool("fio", ["--name=fill", "--rw=write", "--bs=128k", "--iodepth=16", "--direct=1"])
        .args(["--ioengine=io_uring", "--thread", "--eta=never", "--invalidate=0"])
        .args([format!("--offset={offset}"), format!("--size={size}")])
        .args([format!("--filename={}", device.display())])
        .run()
}

/// fio with a load, but for its length and place and the device.
pub fn fio(load: &Load) -> Tool {
    tool("fio", ["--ioengine=io_uring", "--direct=1", "--thread", "--eta=never"])
        // The time of each request is not asked for: to tell it costs as much as some requests.
        .args(["--gtod_reduce=1", "--invalidate=0", "--refill_buffers=0"])
        .args([format!("--rw={}", load.rw), format!("--bs={}", load.block)])
        .args([format!("--iodepth={}", load.depth)])
}

/// The part of the device that a load is for, in bytes: where it begins, how long it is.
pub fn region(load: &Load) -> (u64, u64) {
    match load.kind {
        Kind::Read => (0, SIZE),
        Kind::Over => (SIZE - REGION, REGION),
        Kind::Touch => {
            let touches = LOADS.iter().filter(|load| load.kind == Kind::Touch);
            let before = touches.take_while(|other| *other != load);
            (before.map(|load| part(load.block)).sum(), part(load.block))
        }
    }
}

/// How much a first-touch load has before it, in bytes: large requests write more in a second.
fn part(block: u64) -> u64 {
    if block > 4096 { REGION } else { SIZE / 2 - REGION }
}

/// The counters at one moment.
struct Sight {
    at: Instant,
    /// Bytes that the device has read or written.
    bytes: u64,
    /// Seconds that the processors were idle, in sum.
    idle: f64,
    /// Seconds that the server's process has run.
    server: Option<f64>,
}

impl Sight {
    fn take(subject: &Subject, load: &Load) -> Result<Sight> {
        let stat = device_stat(&subject.device)?;
        let all = fs::read_to_string("/proc/stat").context("reading /proc/stat")?;
        let fields: Vec<f64> =
            all.lines().next().unwrap_or_default().split_whitespace().skip(1).map(number).collect();
        let server = subject.server.map(process_seconds).transpose()?;
        Ok(Sight {
            at: Instant::now(),
            bytes: stat[if load.kind == Kind::Read { 2 } else { 6 }] * 512,
            idle: (fields[3] + fields[4]) / TICKS,
            server,
        })
    }
}

/// The device's counters: see Documentation/block/stat.rst of the kernel.
pub fn device_stat(device: &Path) -> Result<Vec<u64>> {
    let number = fs::metadata(device).with_context(|| format!("{}", device.display()))?.rdev();
    let path = format!("/sys/dev/block/{}:{}/stat", major(number), minor(number));
    let text = fs::read_to_string(&path).with_context(|| format!("reading {path}"))?;
    let fields: Vec<u64> = text.split_whitespace().filter_map(|word| word.parse().ok()).collect();
    ensure!(fields.len() >= 17, "{path}: {} counters", fields.len());
    Ok(fields)
}

/// Processor time of a process with all its threads, in seconds.
fn process_seconds(id: u32) -> Result<f64> {
    let path = format!("/proc/{id}/stat");
    let text = fs::read_to_string(&path).with_context(|| format!("reading {path}"))?;
    let rest = text.rsplit_once(')').map(|(_, rest)| rest).unwrap_or_default();
    let fields: Vec<f64> = rest.split_whitespace().skip(11).take(2).map(number).collect();
    ensure!(fields.len() == 2, "{path} is not understood: {text}");
    Ok((fields[0] + fields[1]) / TICKS)
}

fn number(word: &str) -> f64 {
    word.parse().unwrap_or(0.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn first_touches_have_all_of_the_device_among_them_and_overwrites_the_last_part() {
        let mut end = 0;
        for load in LOADS.iter().filter(|load| load.kind == Kind::Touch) {
            let (offset, size) = region(load);
            assert_eq!(offset, end, "{}", load.name);
            end += size;
        }
        assert_eq!(end, SIZE);
        for load in LOADS.iter().filter(|load| load.kind == Kind::Over) {
            assert_eq!(region(load), (SIZE - REGION, REGION));
        }
    }
}
