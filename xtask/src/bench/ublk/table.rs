//! The figures as tables: rates, CPU time, ratios; what a request costs; which targets are met.

use serde_json::{Value, json};

use super::plan::{Kind, LOADS, Lane, Mark, marks};
use super::{Findings, Row, Sample};
use crate::bench::{Options, median};

/// System calls that move bytes between a process and the kernel.
const MOVING_CALLS: [&str; 14] = [
    "read", "readv", "pread64", "preadv", "preadv2", "write", "writev", "pwrite64", "pwritev",
    "pwritev2", "recvfrom", "recvmsg", "sendto", "sendmsg",
];
/// Operations of a ring that do.
const MOVING_OPERATIONS: [&str; 8] =
    ["READ", "READV", "WRITE", "WRITEV", "RECV", "RECVMSG", "SEND", "SENDMSG"];
/// Moves per request below which a request has none: what a server does beside its requests.
const NONE: f64 = 0.01;
/// What the answer to a ublk request is, and the wait for the next.
const COMMIT: &str = "URING_CMD";

impl Row {
    fn median(&self, of: impl Fn(&Sample) -> f64) -> f64 {
        median(self.samples.iter().map(|(_, sample)| of(sample)).collect())
    }

    fn spread(&self) -> (f64, f64) {
        let all = self.samples.iter().map(|(_, sample)| sample.per_second);
        all.fold((f64::INFINITY, 0.0), |(low, high), one| (low.min(one), high.max(one)))
    }

    fn server_us(&self) -> Option<f64> {
        let all: Option<Vec<f64>> =
            self.samples.iter().map(|(_, sample)| sample.server_us).collect();
        all.map(median)
    }

    fn kind(&self) -> Kind {
        LOADS[self.load].kind
    }
}

/// A target, and how it was met in each load: (name, ratio).
struct Outcome {
    mark: Mark,
    reached: Vec<(&'static str, f64)>,
}

impl Outcome {
    fn passed(&self) -> bool {
        self.reached.iter().all(|(_, ratio)| *ratio >= self.mark.least)
    }

    fn name(&self) -> String {
        let Mark { lane, over, kind, least, .. } = &self.mark;
        format!("{}: {least} x {}", lane.label(*kind), over.label(*kind))
    }
}

fn outcomes(findings: &Findings) -> Vec<Outcome> {
    let outcome = |mark: Mark| {
        let loads = LOADS.iter().enumerate();
        let fit =
            loads.filter(|(_, load)| load.kind == mark.kind && mark.blocks.contains(&load.block));
        let reached = fit.filter_map(|(number, load)| {
            Some((load.name, findings.over(number, mark.lane, mark.over)?))
        });
        Outcome { reached: reached.collect(), mark }
    };
    marks().into_iter().map(outcome).filter(|outcome| !outcome.reached.is_empty()).collect()
}

/// Sum of those of `counts` that `which` picks, per request.
fn sum(counts: &Value, which: impl Fn(&str) -> bool) -> f64 {
    let counts = counts.as_object().into_iter().flatten();
    counts
        .filter(|(name, _)| which(name))
        .filter_map(|(_, count)| count.as_f64())
        .fold(0.0, |sum, one| sum + one)
}

/// The counts of one kind in words, the most frequent first.
fn words(counts: &Value) -> String {
    let counts = counts.as_object().into_iter().flatten();
    let mut all: Vec<(&str, f64)> =
        counts.filter_map(|(name, count)| Some((name.as_str(), count.as_f64()?))).collect();
    all.retain(|(_, count)| *count >= NONE);
    all.sort_by(|a, b| b.1.total_cmp(&a.1));
    let words: Vec<_> = all.iter().map(|(name, count)| format!("{name} {count:.2}")).collect();
    if words.is_empty() { "none".into() } else { words.join(", ") }
}

/// Calls and operations per request that move its bytes through the server's memory.
fn moves(counts: &Value) -> f64 {
    let calls = sum(&counts["calls"], |name| MOVING_CALLS.contains(&name));
    calls + sum(&counts["operations"], |name| MOVING_OPERATIONS.contains(&name))
}

/// Whether a base device in zero copy reads as it must: nothing moved, one operation and the commit.
fn spare(counts: &Value) -> bool {
    let beside = sum(&counts["operations"], |name| name != COMMIT);
    let commits = sum(&counts["operations"], |name| name == COMMIT);
    moves(counts) < NONE && beside <= 1.0 + NONE && commits <= 1.0 + NONE
}

/// The counts of base devices in zero copy.
fn base_counts(findings: &Findings) -> impl Iterator<Item = &Value> {
    let base = [Lane::BaseCached, Lane::BaseDirect].map(|lane| lane.label(Kind::Read));
    findings.counts.iter().filter(move |counts| base.iter().any(|name| counts["what"] == *name))
}

/// For people: a table a load, then what requests cost, then the targets.
pub fn as_markdown(findings: &Findings, options: &Options) -> String {
    let mut text = format!(
        "{}: 2 processors EMULATED by qemu (TCG), so nothing here is the speed of a real machine; \
         {} rounds of {} s, medians; ratios are medians of the rounds' ratios. Cached: hot in the \
         guest's page cache. CPU: all of the guest's busy time, fio's too, per request; server: \
         the serving process's own.\n",
        findings.machine,
        options.rounds,
        options.seconds()
    );
    if findings.missed > 0 {
        text += &format!("{} samples are missing: the machine is too busy.\n", findings.missed);
    }
    for number in 0..LOADS.len() {
        text += &load_table(findings, number);
    }
    if !findings.counts.is_empty() {
        text += &counts_table(findings);
    }
    text += "\n### Targets\n\n";
    for outcome in outcomes(findings) {
        let passed = outcome.passed();
        let figures = outcome.reached.iter().map(|(load, ratio)| {
            let missed = if *ratio < outcome.mark.least { " MISSED" } else { "" };
            format!("{ratio:.2}{missed} ({load})")
        });
        let word = if passed { "passed" } else { "MISSED" };
        text +=
            &format!("- {word}: {}: {}\n", outcome.name(), figures.collect::<Vec<_>>().join("; "));
    }
    let bases: Vec<_> = base_counts(findings).collect();
    if !bases.is_empty() {
        let word = if bases.iter().all(|counts| spare(counts)) { "passed" } else { "MISSED" };
        text += &format!(
            "- {word}: ublk base, reads: 0 copies through the server, at most 1 operation and the commit\n"
        );
    }
    text
}

fn load_table(findings: &Findings, number: usize) -> String {
    let rows: Vec<_> =
        Lane::ALL.into_iter().filter_map(|lane| findings.row(number, lane)).collect();
    if rows.is_empty() {
        return String::new();
    }
    let mut text = format!(
        "\n### {}\n\n| | per second | min - max | CPU µs | server µs | x reference | x qemu-nbd |\n\
         |---|---:|---:|---:|---:|---|---:|\n",
        LOADS[number].name
    );
    for row in rows {
        let (low, high) = row.spread();
        let reference = row.lane.reference(row.kind()).and_then(|other| {
            let ratio = findings.over(number, row.lane, other)?;
            Some(format!("{ratio:.2} ({})", other.label(row.kind())))
        });
        let qemu = row.lane.qemu().and_then(|other| findings.over(number, row.lane, other));
        text += &format!(
            "| {} | {:.0} | {low:.0} - {high:.0} | {:.0} | {} | {} | {} |\n",
            row.lane.label(row.kind()),
            row.median(|sample| sample.per_second),
            row.median(|sample| sample.cpu_us),
            row.server_us().map_or("".into(), |us| format!("{us:.0}")),
            reference.unwrap_or_default(),
            qemu.map_or("".into(), |ratio| format!("{ratio:.2}")),
        );
    }
    text
}

fn counts_table(findings: &Findings) -> String {
    let mut text = "\n### What a request costs its server\n\n\
         Per request: system calls, ring operations; operations that the ring handed to a worker \
         thread, since they would have waited; calls and operations that move its bytes through the \
         server's memory.\n\n\
         | | load | system calls | by name | ring operations | by opcode | handed | moves |\n\
         |---|---|---:|---|---:|---|---:|---:|\n"
        .to_string();
    for counts in &findings.counts {
        let word = |key: &str| counts[key].as_str().unwrap_or_default().to_string();
        text += &format!(
            "| {} | {} | {:.2} | {} | {:.2} | {} | {:.2} | {:.2} |\n",
            word("what"),
            word("load"),
            sum(&counts["calls"], |_| true),
            words(&counts["calls"]),
            sum(&counts["operations"], |_| true),
            words(&counts["operations"]),
            sum(&counts["handed"], |_| true),
            moves(counts),
        );
    }
    text
}

/// For programs.
pub fn as_json(findings: &Findings, options: &Options) -> Value {
    let lanes = |load| Lane::ALL.into_iter().filter_map(move |lane| findings.row(load, lane));
    let rows = (0..LOADS.len()).flat_map(lanes).map(|row| {
        let reference = row.lane.reference(row.kind());
        let over = |other: Option<Lane>| other.and_then(|it| findings.over(row.load, row.lane, it));
        json!({
            "load": LOADS[row.load].name,
            "lane": row.lane.label(row.kind()),
            "per_second": row.median(|sample| sample.per_second),
            "samples": row.samples.iter().map(|(_, sample)| sample.per_second).collect::<Vec<_>>(),
            "cpu_us": row.median(|sample| sample.cpu_us),
            "server_us": row.server_us(),
            "reference": reference.map(|lane| lane.label(row.kind())),
            "over_reference": over(reference),
            "over_qemu_nbd": over(row.lane.qemu()),
        })
    });
    let targets = outcomes(findings).into_iter().map(|outcome| {
        json!({
            "target": outcome.name(),
            "asked": outcome.mark.least,
            "passed": outcome.passed(),
            "reached": outcome.reached.iter().map(|(load, ratio)| json!({"load": load, "ratio": ratio}))
                .collect::<Vec<_>>(),
        })
    });
    json!({
        "machine": findings.machine,
        "missed_samples": findings.missed,
        "emulated": true,
        "rounds": options.rounds,
        "seconds": options.seconds(),
        "rows": rows.collect::<Vec<_>>(),
        "counts": findings.counts,
        "targets": targets.collect::<Vec<_>>(),
        "base_reads_are_spare": base_counts(findings).all(spare),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_base_read_is_one_operation_and_the_commit_and_moves_nothing() {
        let good = json!({
            "calls": {"io_uring_enter": 1.0, "write": 0.001},
            "operations": {"READ_FIXED": 1.0, "URING_CMD": 1.0, "READ": 0.002},
        });
        assert!(spare(&good));
        let (mut copying, mut twice) = (good.clone(), good.clone());
        copying["calls"]["pread64"] = json!(1.0);
        assert!(!spare(&copying));
        twice["operations"]["READ_FIXED"] = json!(2.0);
        assert!(!spare(&twice));
    }
}
