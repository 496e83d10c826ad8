//! Kernel block devices, in the guest of `cargo xtask vm`: ublk against what the kernel offers otherwise.
//!
//! The guest measures (see `vm/bench.rs`), this side judges. The guest's processors are emulated: the
//! kernel's and the programs' instructions are slow there alike, a disk is fast beside them. No
//! figure of it is one of a real machine; ratios within a round are what it is for.

pub mod plan;
mod table;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use self::plan::{LOADS, Lane};
use super::{Options, machine};
use crate::lab::Lab;
use crate::setup;
use crate::vm;

/// The samples of one load in one lane, at most one a round.
struct Row {
    /// Its place in the list of loads.
    load: usize,
    lane: Lane,
    /// With their rounds.
    samples: Vec<(u64, Sample)>,
}

/// What one run of fio gave.
#[derive(Clone, Copy)]
struct Sample {
    /// Requests a second.
    per_second: f64,
    /// Processor time of the guest per request, in microseconds.
    cpu_us: f64,
    /// Of that, the server's own.
    server_us: Option<f64>,
}

/// What the guest told.
struct Findings {
    /// What it was taken on.
    machine: String,
    rows: Vec<Row>,
    /// Samples that could not be taken: the load was over before the guest looked.
    missed: u64,
    /// What requests cost, as the guest has it.
    counts: Vec<Value>,
}

/// Measures, and puts the figures in words.
pub fn run(lab: &Lab, options: &Options) -> Result<String> {
    setup::need(&["fio", "nbd-client", "qemu-nbd", "qemu-img", "losetup", "dmsetup"])?;
    let only = options.only.replace(' ', "+");
    let plain = |c: char| c.is_ascii_alphanumeric() || "+,-".contains(c);
    ensure!(only.chars().all(plain), "--only {only:?}: no load is called that");
    let known = LOADS.iter().map(|load| load.name).chain([plan::COUNTS]);
    ensure!(
        known.into_iter().any(|name| name.contains(&options.only)),
        "no load is called {only:?}"
    );
    let (rounds, window) = (options.rounds, options.seconds() * 1000.0);
    let words =
        format!("underlay.rounds={rounds} underlay.window={window:.0} underlay.only={only}");
    let machine = machine()?;
    let findings = Findings::read(machine, vm::figures(lab, &vm::BENCH, &words)?)?;
    Ok(match options.json {
        true => serde_json::to_string_pretty(&table::as_json(&findings, options))?,
        false => table::as_markdown(&findings, options),
    })
}

impl Findings {
    fn read(machine: String, figures: Vec<Value>) -> Result<Findings> {
        let mut findings = Findings { machine, rows: Vec::new(), missed: 0, counts: Vec::new() };
        for figure in figures {
            if let Some(kernel) = figure["kernel"].as_str() {
                findings.machine += &format!("; in it a guest with kernel {kernel}");
            } else if let Some(counts) = figure.get("counts") {
                findings.counts.push(counts.clone());
            } else {
                let what = || format!("the guest measured something unknown: {figure}");
                findings.note(&figure).with_context(what)?;
            }
        }
        Ok(findings)
    }

    /// Enters a sample; `None` if it is not understood.
    fn note(&mut self, figure: &Value) -> Option<()> {
        let load = LOADS.iter().position(|load| figure["load"] == load.name)?;
        let lane = Lane::ALL.into_iter().find(|lane| figure["lane"] == lane.key())?;
        let (round, sample) = (figure["round"].as_u64()?, figure.get("sample")?);
        if sample.is_null() {
            self.missed += 1;
            return Some(());
        }
        let sample = Sample {
            per_second: sample["per_second"].as_f64()?,
            cpu_us: sample["cpu_us"].as_f64()?,
            server_us: sample["server_us"].as_f64(),
        };
        match self.rows.iter_mut().find(|row| row.load == load && row.lane == lane) {
            Some(row) => row.samples.push((round, sample)),
            None => self.rows.push(Row { load, lane, samples: vec![(round, sample)] }),
        }
        Some(())
    }

    fn row(&self, load: usize, lane: Lane) -> Option<&Row> {
        self.rows.iter().find(|row| row.load == load && row.lane == lane)
    }

    /// How many times the rate of `other` a lane's is, under one load: the median of the rounds'.
    fn over(&self, load: usize, lane: Lane, other: Lane) -> Option<f64> {
        let (ours, theirs) = (self.row(load, lane)?, self.row(load, other)?);
        let ratios = ours.samples.iter().filter_map(|(round, ours)| {
            let (_, theirs) = theirs.samples.iter().find(|(other, _)| other == round)?;
            Some(ours.per_second / theirs.per_second)
        });
        let ratios: Vec<_> = ratios.collect();
        (!ratios.is_empty()).then(|| super::median(ratios))
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn sample(round: usize, lane: Lane, per_second: Option<f64>) -> Value {
        let sample =
            per_second.map(|rate| json!({"per_second": rate, "cpu_us": 1, "server_us": null}));
        json!({"lane": lane.key(), "load": LOADS[0].name, "round": round, "sample": sample})
    }

    #[test]
    fn ratios_are_of_the_same_round_and_strange_figures_are_refused() {
        let (ours, theirs) = (Lane::BaseCached, Lane::LoopCached);
        let rounds = [(100.0, Some(50.0)), (70.0, None), (10.0, Some(10.0)), (900.0, Some(300.0))];
        let both = rounds
            .iter()
            .enumerate()
            .flat_map(|(round, (a, b))| [sample(round, ours, Some(*a)), sample(round, theirs, *b)]);
        let findings = Findings::read("x".into(), both.collect()).unwrap();
        assert_eq!(findings.over(0, ours, theirs), Some(2.0));
        assert_eq!(findings.missed, 1);
        assert_eq!(findings.over(0, ours, Lane::QemuCached), None);
        assert!(Findings::read("x".into(), vec![json!({"lane": "nonsense"})]).is_err());
    }
}
