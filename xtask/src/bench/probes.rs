//! What the probes cost: by the kernel's own account, and as throughput lost.
//!
//! Two agents at work would be paid twice: nothing else may watch. Account and throughput are taken
//! apart from each other, since keeping the account costs time itself.

use std::fmt::Write;
use std::fs;
use std::path::Path;

use anyhow::{Result, anyhow};
use serde_json::{Value, json};

use super::{Options, machine, median};
use crate::lab::{Fs, Lab, LoopDisk};
use crate::probes::{Watching, fio, lay, usable};
use crate::report::note;
use crate::subject::text;
use crate::tool::{json, tool};

/// Size of the disk, in bytes.
const DISK: u64 = 256 << 20;
/// The load whose throughput counts: 4 KiB reads at depth 32.
const DEEP: [&str; 2] = ["--ioengine=io_uring", "--iodepth=32"];

/// Runs the bench; returns what to print.
pub fn run(lab: &Lab, options: &Options) -> Result<String> {
    let agent = usable()?;
    let dir = lab.dir("bench-probes")?;
    let disk = LoopDisk::new(&dir, "a", DISK, Fs::Ext4)?;
    let files = [("own", lay(&dir, "file")?), ("loop", lay(&disk.path, "file")?)];
    // Otherwise it would be memory that is measured, with a processor as its limit.
    disk.direct()?;
    let mut disks = serde_json::Map::new();
    for (name, file) in &files {
        match measure(&agent, &dir, name, file, options) {
            Ok(figures) => drop(disks.insert((*name).to_owned(), figures)),
            // Of a container the agent can't tell what it is on.
            Err(error) if *name == "own" => note(&format!("bench probes: the own disk: {error:#}")),
            Err(error) => return Err(error),
        }
    }
    let _ = fs::remove_file(&files[0].1);
    let memory = memory(&agent)?;
    let figures = json!({ "machine": machine()?, "disks": disks, "memory_bytes": memory });
    Ok(if options.json { figures.to_string() } else { told(&figures, options.rounds)? })
}

/// Throughput and cost of reads of `file`, on the disk that it is on.
fn measure(agent: &Path, dir: &Path, name: &str, file: &Path, options: &Options) -> Result<Value> {
    let path = text(file.parent().unwrap_or(dir))?;
    let time = format!("--runtime={}", options.seconds().max(1.0));
    let load = [DEEP[0], DEEP[1], &time, "--time_based"];
    let mut ratios = Vec::new();
    let (mut with, mut without, mut noise) = (Vec::new(), Vec::new(), Vec::new());
    for round in 0..options.rounds {
        note(&format!("bench probes: {name} disk, round {} of {}", round + 1, options.rounds));
        let on = || -> Result<f64> {
            let watching = Watching::start(agent, dir, &[path])?;
            let figures = fio(file, &load)?;
            watching.end()?;
            Ok(figures.iops)
        };
        let off = || -> Result<f64> { Ok(fio(file, &load)?.iops) };
        // Off on both sides of on: what the machine does meanwhile falls on both, and how far the
        // two are apart is the noise.
        let (before, during, after) = (off()?, on()?, off()?);
        ratios.push(during * 2.0 / (before + after));
        noise.push((after / before - 1.0).abs());
        with.push(during);
        without.push((before + after) / 2.0);
    }

    let account = |load: &[&str]| -> Result<f64> {
        let watching = Watching::start(agent, dir, &[path, "--account"])?;
        fio(file, load)?;
        cost(&watching.end()?)
    };
    let deep = account(&load)?;
    let shallow = account(&["--ioengine=psync", &time, "--time_based"])?;
    Ok(json!({
        "throughput_ratio": median(ratios),
        "noise": median(noise),
        "iops_with": median(with),
        "iops_without": median(without),
        "cost_ns": { "depth_32": deep, "depth_1": shallow },
    }))
}

fn told(figures: &Value, rounds: u32) -> Result<String> {
    let mut told = figures["machine"].as_str().unwrap_or_default().to_owned();
    let disks = figures["disks"].as_object().into_iter().flatten();
    for (name, disk) in disks {
        let number = |at: &str| disk.pointer(at).and_then(Value::as_f64).unwrap_or_default();
        let what = match name.as_str() {
            "own" => "the machine's disk",
            _ => "a loop disk on that one (the programs see each read twice)",
        };
        write!(
            told,
            "\n{what}, 4 KiB random reads, direct\n  depth 32: {:.0} IOPS with probes, {:.0} without: \
             {:+.1} % (noise {:.1} %, {rounds} rounds)\n  cost by the kernel's account: {:.0} ns a read at \
             depth 32, {:.0} ns at depth 1",
            number("/iops_with"),
            number("/iops_without"),
            (number("/throughput_ratio") - 1.0) * 100.0,
            number("/noise") * 100.0,
            number("/cost_ns/depth_32"),
            number("/cost_ns/depth_1"),
        )?;
    }
    let processors = std::thread::available_parallelism()?.get();
    let memory = figures["memory_bytes"].as_u64().unwrap_or_default() >> 10;
    write!(told, "\nkernel memory for 16 disks on {processors} processors: {memory} KiB")?;
    Ok(told)
}

/// Nanoseconds of all programs for one request of the watched disk.
fn cost(report: &Value) -> Result<f64> {
    let run = report["cost"]["run_ns"].as_f64();
    let run = run.ok_or_else(|| anyhow!("the kernel kept no account: {}", report["cost"]))?;
    let classes = ["own_reads", "own_writes", "foreign_reads", "foreign_writes"];
    let count = |class: &&str| report["disks"][0][*class]["count"].as_f64().unwrap_or_default();
    Ok(run / classes.iter().map(count).sum::<f64>().max(1.0))
}

fn memory(agent: &Path) -> Result<u64> {
    let found = json(&tool(agent, ["check", "--json"]).out()?)?;
    found["memory"].as_u64().ok_or_else(|| anyhow!("no memory in {found}"))
}
