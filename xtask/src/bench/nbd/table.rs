//! The bench's figures as tables: medians, spreads, ratios.

use serde_json::{Value, json};

use super::{LANES, LOADS, Lane, Way, Who};
use crate::bench::{Options, median};

/// Ratios to qemu-nbd that are asked for, direct against direct: (load, at least).
const MARKS: [(&str, f64); 2] =
    [("4 KiB random read, QD32", 1.8), ("4 KiB random write, QD32, first touch", 1.5)];

/// What one run of fio gave.
#[derive(Clone, Copy)]
pub struct Sample {
    /// Operations a second.
    pub per_second: f64,
    /// Half of them took no longer, in microseconds.
    pub median_us: f64,
    /// All but one in a hundred took no longer, in microseconds.
    pub p99_us: f64,
}

/// The samples of one load in one lane.
pub struct Row {
    /// Its place in the list of loads.
    pub load: usize,
    /// Its row.
    pub lane: Lane,
    /// One a round.
    pub samples: Vec<Sample>,
}

impl Row {
    fn median(&self, of: impl Fn(&Sample) -> f64) -> f64 {
        median(self.samples.iter().map(of).collect())
    }

    fn per_second(&self) -> f64 {
        self.median(|sample| sample.per_second)
    }

    fn spread(&self) -> (f64, f64) {
        let all = self.samples.iter().map(|sample| sample.per_second);
        all.fold((f64::INFINITY, 0.0), |(low, high), one| (low.min(one), high.max(one)))
    }

    /// How many times the rate of `who` this row's is, the same load the same way: the median of the
    /// rounds' ratios, since what disturbs a machine for a while disturbs both in the same round.
    fn over(&self, rows: &[Row], who: Who) -> Option<f64> {
        let other = |row: &&Row| row.load == self.load && row.lane == (self.lane.0, who);
        let pairs = self.samples.iter().zip(&rows.iter().find(other)?.samples);
        Some(median(pairs.map(|(ours, theirs)| ours.per_second / theirs.per_second).collect()))
    }
}

fn label((way, who): Lane) -> String {
    let who = match who {
        Who::Raw => "raw file, io_uring",
        Who::Underlay => "underlay",
        Who::QemuNbd => "qemu-nbd",
        Who::Nbdkit => "nbdkit file",
    };
    format!("{who}, {}", if way == Way::Direct { "direct" } else { "cached" })
}

/// Every row in the order of the tables, whatever order the rounds ran in.
fn ordered(rows: &[Row], load: usize) -> impl Iterator<Item = &Row> {
    LANES
        .iter()
        .filter_map(move |lane| rows.iter().find(|row| row.load == load && row.lane == *lane))
}

fn marks(rows: &[Row]) -> Vec<(&'static str, f64, f64)> {
    let reached = MARKS.iter().filter_map(|(name, least)| {
        let ours =
            |row: &&Row| LOADS[row.load].name == *name && row.lane == (Way::Direct, Who::Underlay);
        Some((*name, *least, rows.iter().find(ours)?.over(rows, Who::QemuNbd)?))
    });
    reached.collect()
}

/// For people: a table a load, then the marks.
pub fn as_markdown(machine: &str, options: &Options, rows: &[Row]) -> String {
    let mut text = format!(
        "{machine}; {} rounds of {} s, medians; writes of qemu-nbd go to a qcow2 overlay, of the raw \
         file and nbdkit to a sparse file\n",
        options.rounds,
        options.seconds()
    );
    let ratio = |ratio: Option<f64>| ratio.map_or("".into(), |ratio| format!("{ratio:.2}"));
    for (number, load) in LOADS.iter().enumerate() {
        let mut rows_of_load = ordered(rows, number).peekable();
        if rows_of_load.peek().is_none() {
            continue;
        }
        text += &format!(
            "\n### {}\n\n| | per second | min - max | median µs | p99 µs | x raw | x qemu-nbd |\n\
             |---|---:|---:|---:|---:|---:|---:|\n",
            load.name
        );
        for row in rows_of_load {
            let (low, high) = row.spread();
            text += &format!(
                "| {} | {:.0} | {low:.0} - {high:.0} | {:.0} | {:.0} | {} | {} |\n",
                label(row.lane),
                row.per_second(),
                row.median(|sample| sample.median_us),
                row.median(|sample| sample.p99_us),
                ratio(row.over(rows, Who::Raw)),
                ratio(row.over(rows, Who::QemuNbd)),
            );
        }
    }
    for (name, least, reached) in marks(rows) {
        let word = if reached >= least { "reached" } else { "MISSED" };
        text += &format!("\nmark {word}: {name}: {reached:.2} x qemu-nbd, asked {least} x");
    }
    text
}

/// For programs.
pub fn as_json(machine: &str, options: &Options, rows: &[Row]) -> Value {
    let table = (0..LOADS.len()).flat_map(|load| ordered(rows, load)).map(|row| {
        json!({
            "load": LOADS[row.load].name,
            "lane": label(row.lane),
            "per_second": row.per_second(),
            "samples": row.samples.iter().map(|sample| sample.per_second).collect::<Vec<_>>(),
            "median_us": row.median(|sample| sample.median_us),
            "p99_us": row.median(|sample| sample.p99_us),
            "over_raw": row.over(rows, Who::Raw),
            "over_qemu_nbd": row.over(rows, Who::QemuNbd),
        })
    });
    let marks = marks(rows)
        .into_iter()
        .map(|(name, least, reached)| json!({ "load": name, "asked": least, "reached": reached }));
    json!({
        "machine": machine,
        "rounds": options.rounds,
        "seconds": options.seconds(),
        "rows": table.collect::<Vec<_>>(),
        "marks": marks.collect::<Vec<_>>(),
    })
}
