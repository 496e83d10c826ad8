//! A report as lines for people.

use std::fmt::Write;

use crate::report::{Load, Report};

/// One line for each class of I/O that there was, disks in the order given.
pub fn lines(report: &Report) -> String {
    let mut text = format!(
        "{:<10} {:<14} {:>8} {:>9} {:>9} {:>9} {:>9} {:>9} {:>7}\n",
        "disk", "i/o", "count", "MiB", "mean", "p50", "p99", "queue", "errors"
    );
    for disk in &report.disks {
        let classes = [
            ("own reads", &disk.own_reads),
            ("own writes", &disk.own_writes),
            ("foreign reads", &disk.foreign_reads),
            ("foreign writes", &disk.foreign_writes),
        ];
        for (name, load) in classes.into_iter().filter(|(_, load)| load.count > 0) {
            line(&mut text, &disk.name, name, load);
        }
        let _ = writeln!(
            text,
            "{:<10} in flight {}, the oldest for {}",
            disk.name,
            disk.in_flight,
            time(disk.oldest_ns)
        );
    }
    for refused in &report.refused {
        let _ = writeln!(text, "{:<10} {}", refused.name, refused.why);
    }
    let losses = &report.losses;
    let lost =
        [losses.full, losses.ring, losses.chunks, losses.unmatched, losses.orphans, losses.swept];
    if lost.iter().any(|count| *count > 0) {
        let _ = writeln!(
            text,
            "not counted: {} too many in flight, {} not attributed, {} ends and {} beginnings not seen",
            losses.full,
            losses.ring + losses.chunks,
            losses.unmatched,
            losses.orphans + losses.swept,
        );
    }
    if let Some(cost) = &report.cost
        && cost.runs > 0
    {
        let each = cost.run_ns as f64 / cost.runs as f64;
        let _ = writeln!(text, "cost: {} runs of {each:.0} ns", cost.runs);
    }
    text
}

fn line(text: &mut String, disk: &str, name: &str, load: &Load) {
    let some = |ns: Option<u64>| ns.map_or_else(|| "-".into(), time);
    let _ = writeln!(
        text,
        "{disk:<10} {name:<14} {:>8} {:>9.1} {:>9} {:>9} {:>9} {:>9} {:>7}",
        load.count,
        load.bytes as f64 / f64::from(1 << 20),
        some(load.mean()),
        some(load.device.quantile(0.5)),
        some(load.device.quantile(0.99)),
        some(load.queue_ns.checked_div(load.queued)),
        load.errors,
    );
}

/// A time with three digits and its unit.
fn time(ns: u64) -> String {
    let ns = ns as f64;
    match ns {
        0.0 => "0".into(),
        _ if ns < 1e6 => format!("{:.1} µs", ns / 1e3),
        _ if ns < 1e9 => format!("{:.2} ms", ns / 1e6),
        _ => format!("{:.2} s", ns / 1e9),
    }
}
