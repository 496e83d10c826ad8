//! What a request costs the server: its system calls and its ring's operations, counted by the kernel.
//!
//! Histograms of tracefs count while a fixed number of requests is served: system calls by name (what
//! `strace -c -f` tells, without its slowing everything down), operations given to rings by opcode, and
//! those that a ring hands to a worker thread, because they would have to wait. Only the server's own
//! threads count.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::lanes::{Stage, Subject};
use super::measure::{device_stat, fill, fio, region};
use super::{Guest, REGION, SIZE};
use crate::bench::ublk::plan::{Kind, LOADS, Lane, Load};
use crate::tool::tool;

const TRACING: &str = "/sys/kernel/tracing";
/// What is counted: the event, and by what.
const CALLS: (&str, &str) = ("raw_syscalls/sys_enter", "id.syscall");
const OPERATIONS: (&str, &str) = ("io_uring/io_uring_submit_req", "op_str");
const HANDED: (&str, &str) = ("io_uring/io_uring_queue_async_work", "op_str");
/// Requests of a load.
const REQUESTS: u64 = 500;
/// Whose: every way of ours, and for comparison one of qemu-nbd's.
const LANES: [Lane; 7] = [
    Lane::BaseCached,
    Lane::BaseDirect,
    Lane::Replica,
    Lane::ReplicaWritten,
    Lane::NbdBase,
    Lane::NbdReplica,
    Lane::QemuCached,
];

/// Counts what requests cost.
pub fn run(guest: &Guest, stage: &mut Stage) -> Result<()> {
    if !Path::new(TRACING).join("events").exists() {
        tool("mount", ["-t", "tracefs", "tracefs", TRACING]).run()?;
    }
    let fresh = stage.fresh()?;
    for kind in [Kind::Read, Kind::Touch, Kind::Over] {
        for subject in stage.lasting().iter().chain(&fresh) {
            if !LANES.contains(&subject.lane) || !subject.lane.serves(kind) {
                continue;
            }
            if kind == Kind::Over {
                fill(&subject.device, SIZE - REGION, REGION)?;
            }
            for load in LOADS.iter().filter(|load| load.kind == kind && counted(load)) {
                guest.figure(count(subject, subject.lane.label(kind), load, &[])?)?;
            }
        }
    }
    let replica = fresh.iter().find(|subject| subject.lane == Lane::Replica);
    if let (Some(replica), Some(load)) = (replica, over()) {
        let name = "ublk replica, fsync after each";
        guest.figure(count(replica, name, load, &["--fsync=1"])?)?;
    }
    stage.discard(fresh)?;
    stage.copying()?;
    let base = stage.find(Lane::BaseCached)?;
    for load in LOADS.iter().filter(|load| load.kind == Kind::Read && counted(load)) {
        guest.figure(count(base, "ublk base, cached, --copy", load, &[])?)?;
    }
    Ok(())
}

/// Small ones alone and many at a time, large ones many at a time: that is where servers differ.
fn counted(load: &Load) -> bool {
    load.rw != "read" && (load.block == 4096 || load.depth > 1)
}

/// Small overwrites, one at a time.
fn over() -> Option<&'static Load> {
    LOADS.iter().find(|load| load.kind == Kind::Over && load.depth == 1)
}

/// Runs a load of a fixed number of requests, and counts.
fn count(subject: &Subject, name: &str, load: &Load, more: &[&str]) -> Result<Value> {
    let server = subject.server.context("nobody serves it")?;
    let (offset, size) = region(load);
    let requests = REQUESTS.min(size / load.block / 2);
    let once: &[&str] = match load.kind {
        Kind::Touch => &["--random_generator=lfsr"],
        Kind::Read | Kind::Over => &["--norandommap"],
    };
    let fio = fio(load)
        .args([format!("--offset={offset}"), format!("--size={size}")])
        .args([format!("--number_ios={requests}"), "--name=count".into()])
        .args([format!("--filename={}", subject.device.display())])
        .args(once)
        .args(more);
    let mut threads = threads(server)?;
    let before = device_stat(&subject.device)?;
    let counters = [Counter::start(CALLS)?, Counter::start(OPERATIONS)?, Counter::start(HANDED)?];
    fio.run()?;
    let after = device_stat(&subject.device)?;
    threads.extend(self::threads(server)?);
    let served: u64 = [0, 4].into_iter().map(|field| after[field] - before[field]).sum();
    let flushes = after[15] - before[15];
    ensure!(served >= requests / 2, "{name}: {served} requests served, not {requests}");
    let [calls, operations, handed] = counters.map(|counter| counter.stop(&threads));
    let each = |counts: BTreeMap<String, u64>| -> BTreeMap<String, f64> {
        counts.into_iter().map(|(name, count)| (name, count as f64 / served as f64)).collect()
    };
    Ok(json!({"counts": {
        "what": name,
        "load": load.name,
        "requests": served,
        "flushes": flushes,
        "calls": each(calls?),
        "operations": each(operations?),
        "handed": each(handed?),
    }}))
}

fn threads(process: u32) -> Result<BTreeSet<u64>> {
    let path = format!("/proc/{process}/task");
    let entries = fs::read_dir(&path).with_context(|| format!("reading {path}"))?;
    let names = entries.flatten().filter_map(|entry| entry.file_name().into_string().ok());
    Ok(names.filter_map(|name| name.parse().ok()).collect())
}

/// A histogram of an event, which the kernel keeps.
struct Counter {
    event: &'static str,
    trigger: String,
}

impl Counter {
    fn start((event, key): (&'static str, &str)) -> Result<Counter> {
        let trigger = format!("hist:keys=common_pid,{key}:size=4096");
        let counter = Counter { event, trigger };
        counter.set("")?;
        Ok(counter)
    }

    /// Ends it; what it counted of these threads.
    fn stop(self, threads: &BTreeSet<u64>) -> Result<BTreeMap<String, u64>> {
        let path = format!("{TRACING}/events/{}/hist", self.event);
        let text = fs::read_to_string(&path).with_context(|| format!("reading {path}"))?;
        self.set("!")?;
        let mut counts = BTreeMap::new();
        for (thread, name, count) in text.lines().filter_map(entry) {
            if threads.contains(&thread) {
                *counts.entry(name).or_default() += count;
            }
        }
        Ok(counts)
    }

    fn set(&self, how: &str) -> Result<()> {
        let path = format!("{TRACING}/events/{}/trigger", self.event);
        fs::write(&path, format!("{how}{}", self.trigger))
            .with_context(|| format!("writing {how}{} to {path}", self.trigger))
    }
}

/// A line of a histogram: the thread, by what it counts, how often.
fn entry(line: &str) -> Option<(u64, String, u64)> {
    let (keys, rest) = line.strip_prefix('{')?.split_once('}')?;
    let (thread, key) = keys.split_once(',')?;
    let thread = thread.split_once(':')?.1.trim().parse().ok()?;
    let name = key.split_once(':')?.1.split_whitespace().next()?;
    let count = rest.trim().strip_prefix("hitcount:")?.split_whitespace().next()?.parse().ok()?;
    Some((thread, name.trim_start_matches("sys_").to_string(), count))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_histograms_lines_are_read_and_its_other_words_are_not() {
        let call =
            "{ common_pid:        108, id: sys_io_uring_enter            [426] } hitcount:  7";
        assert_eq!(entry(call), Some((108, "io_uring_enter".into(), 7)));
        let operation = "{ common_pid:  9, op_str: READ_FIXED                      } hitcount: 12";
        assert_eq!(entry(operation), Some((9, "READ_FIXED".into(), 12)));
        for other in ["# event histogram", "", "Totals:", "    Hits: 2"] {
            assert_eq!(entry(other), None, "{other}");
        }
    }
}
