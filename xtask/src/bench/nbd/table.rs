//! The bench's figures as tables: medians, spreads, ratios.

use serde_json::{Value, json};

use super::loads::{LANES, LOADS, Lane, MARKS, Mark, Rival, Way, Who};
use crate::bench::{Options, median};

/// What one run of fio gave.
#[derive(Clone, Copy)]
pub struct Sample {
    /// Operations a second.
    pub per_second: f64,
    /// Half of them took no longer, in microseconds.
    pub median_us: f64,
    /// All but one in a hundred took no longer, in microseconds.
    pub p99_us: f64,
    /// Processor seconds of the server for each GiB; the raw file has no server.
    pub cpu_per_gib: Option<f64>,
    /// Memory of the server right after it, in bytes.
    pub resident: Option<f64>,
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

    /// The median rate.
    pub fn per_second(&self) -> f64 {
        self.median(|sample| sample.per_second)
    }

    /// The lowest rate and the highest.
    pub fn spread(&self) -> (f64, f64) {
        let all = self.samples.iter().map(|sample| sample.per_second);
        all.fold((f64::INFINITY, 0.0), |(low, high), one| (low.min(one), high.max(one)))
    }

    fn cpu(&self) -> Option<f64> {
        self.median_if(|sample| sample.cpu_per_gib)
    }

    fn mebibytes(&self) -> Option<f64> {
        self.median_if(|sample| sample.resident).map(|bytes| bytes / f64::from(1 << 20))
    }

    fn median_if(&self, of: impl Fn(&Sample) -> Option<f64>) -> Option<f64> {
        self.samples.iter().map(of).collect::<Option<Vec<f64>>>().map(median)
    }

    /// How many times the rate of others this row's is, the same way: the median of the rounds' ratios, since
    /// what disturbs a machine for a while disturbs all in the same round.
    fn over(&self, rows: &[Row], rival: Rival) -> Option<f64> {
        let is_rival = |row: &&Row| {
            let of_load = match rival {
                Rival::Base(load) => LOADS[row.load].name == load,
                Rival::One(_) | Rival::Qemu | Rival::Best => row.load == self.load,
            };
            let of_lane = match rival {
                Rival::One(who) => row.lane.1 == who,
                Rival::Qemu => matches!(row.lane.1, Who::QemuNbd | Who::StorageDaemon),
                Rival::Best => row.lane.1.is_peer(),
                Rival::Base(_) => row.lane.1 == Who::Underlay,
            };
            of_load && of_lane && row.lane.0 == self.lane.0
        };
        let rivals: Vec<&Row> = rows.iter().filter(is_rival).collect();
        let ratios = self.samples.iter().enumerate().filter_map(|(round, ours)| {
            let theirs = rivals.iter().filter_map(|row| row.samples.get(round));
            let best = theirs.map(|it| it.per_second).max_by(f64::total_cmp)?;
            Some(ours.per_second / best)
        });
        let ratios: Vec<f64> = ratios.collect();
        (!ratios.is_empty()).then(|| median(ratios))
    }
}

/// What is said of a lane.
pub fn label((way, who): Lane) -> String {
    format!("{}, {}", who.label(), if way == Way::Direct { "direct" } else { "cached" })
}

/// Every row in the order of the tables, whatever order the rounds ran in.
pub fn ordered(rows: &[Row], load: usize) -> impl Iterator<Item = &Row> {
    LANES
        .iter()
        .filter_map(move |lane| rows.iter().find(|row| row.load == load && row.lane == *lane))
}

fn ours(rows: &[Row], load: &str, way: Way) -> Option<usize> {
    let is_it = |row: &Row| LOADS[row.load].name == load && row.lane == (way, Who::Underlay);
    rows.iter().position(is_it)
}

fn marks(rows: &[Row]) -> Vec<(&'static Mark, f64)> {
    let reached = MARKS.iter().filter_map(|mark| {
        let ours = &rows[ours(rows, mark.load, mark.way)?];
        Some((mark, ours.over(rows, mark.rival)?))
    });
    reached.collect()
}

/// Our processor time and that of the peer that takes least, where both were measured.
fn cheapest(rows: &[Row]) -> Vec<(&'static str, Way, f64, f64)> {
    let both = LOADS.iter().flat_map(|load| [(load, Way::Direct), (load, Way::Cached)]);
    let costs = both.filter_map(|(load, way)| {
        let row = &rows[ours(rows, load.name, way)?];
        let peers = rows.iter().filter(|other| {
            let (its_way, who) = other.lane;
            other.load == row.load && its_way == way && who.is_peer() && load.is_served_by(who)
        });
        let least = peers.filter_map(Row::cpu).min_by(f64::total_cmp)?;
        Some((load.name, way, row.cpu()?, least))
    });
    costs.collect()
}

fn way_of(way: Way) -> &'static str {
    match way {
        Way::Direct => "direct",
        Way::Cached => "cached",
    }
}

/// For people: what is asked for, then a table a load.
pub fn as_markdown(machine: &str, options: &Options, rows: &[Row]) -> String {
    let mut text = format!(
        "# NBD, side by side\n\n`cargo xtask bench nbd --rounds {} --seconds {}`: {machine}. Medians of the rounds; \
         ratios are medians of the ratios within a round. Writes of qemu's servers go to a qcow2 overlay, of nbdkit to \
         its filter `cow`, of the raw file to a sparse file. That filter answers a flush and syncs nothing: its \
         processor time is compared only where nothing is to be synced.\n\n![](nbd.svg)\n\n## What is asked for\n\n\
         | load | compared with | asked | measured | |\n|---|---|---:|---:|---|\n",
        options.rounds,
        options.seconds()
    );
    let word = |well: bool| if well { "reached" } else { "**missed**" };
    for (mark, reached) in marks(rows) {
        text += &format!(
            "| {}, {} | {} | {} x | {reached:.2} x | {} |\n",
            mark.load,
            way_of(mark.way),
            mark.rival.label(),
            mark.least,
            word(reached >= mark.least)
        );
    }
    for (load, way, ours, least) in cheapest(rows) {
        text += &format!(
            "| {load}, {} | processor time of the peer that takes least | below {least:.2} s/GiB | {ours:.2} s/GiB \
             | {} |\n",
            way_of(way),
            word(ours < least)
        );
    }
    let ratio = |ratio: Option<f64>| ratio.map_or("".into(), |ratio| format!("{ratio:.2}"));
    for (number, load) in LOADS.iter().enumerate() {
        let mut rows_of_load = ordered(rows, number).peekable();
        if rows_of_load.peek().is_none() {
            continue;
        }
        text += &format!(
            "\n## {}\n\n| | per second | min - max | median µs | p99 µs | server s/GiB | server MiB | x raw | x best peer |\n\
             |---|---:|---:|---:|---:|---:|---:|---:|---:|\n",
            load.name
        );
        for row in rows_of_load {
            let (low, high) = row.spread();
            text += &format!(
                "| {} | {:.0} | {low:.0} - {high:.0} | {:.0} | {:.0} | {} | {} | {} | {} |\n",
                label(row.lane),
                row.per_second(),
                row.median(|sample| sample.median_us),
                row.median(|sample| sample.p99_us),
                ratio(row.cpu()),
                row.mebibytes().map_or("".into(), |mebibytes| format!("{mebibytes:.0}")),
                ratio(row.over(rows, Rival::One(Who::Raw))),
                ratio(row.over(rows, Rival::Best)),
            );
        }
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
            "server_seconds_per_gib": row.cpu(),
            "server_mebibytes": row.mebibytes(),
            "over_raw": row.over(rows, Rival::One(Who::Raw)),
            "over_best_peer": row.over(rows, Rival::Best),
        })
    });
    let marks = marks(rows).into_iter().map(|(mark, reached)| {
        json!({
            "load": mark.load, "way": way_of(mark.way), "rival": mark.rival.label(),
            "asked": mark.least, "reached": reached,
        })
    });
    json!({
        "machine": machine,
        "rounds": options.rounds,
        "seconds": options.seconds(),
        "rows": table.collect::<Vec<_>>(),
        "marks": marks.collect::<Vec<_>>(),
    })
}
