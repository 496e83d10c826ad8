//! The figures, as tables for people and as JSON for programs.

use std::fmt::Write;

use serde_json::{Value, json};

use crate::contest::{BUDGET, Figures, LOCAL, SLOW, Who};
use crate::{Row, Table};

/// The goal: so many points of hit rate below S3-FIFO at most, at so many percent of its writes.
const POINTS: f64 = 5.0;
const WRITES: f64 = 25.0;

impl Row {
    fn of(&self, who: Who) -> Figures {
        let found = self.figures.iter().find(|&&(other, _)| other == who);
        found.map_or(Figures::default(), |&(_, figures)| figures)
    }

    /// Points of hit rate and percent of writes of `ours`, against S3-FIFO.
    fn against(&self, ours: Figures) -> (f64, f64) {
        let theirs = self.of(Who::S3Fifo);
        let writes = 100.0 * ours.written as f64 / theirs.written.max(1) as f64;
        (ours.hit_rate() - theirs.hit_rate(), writes)
    }

    fn meets(&self, ours: Figures) -> bool {
        let (points, writes) = self.against(ours);
        points >= -POINTS && writes <= WRITES
    }
}

/// Tables for a terminal, also legible as Markdown.
pub fn text(tables: &[Table]) -> String {
    let mut out = format!(
        "A read costs {} ms from the copy, {} ms from the cache. Each cell: hit rate in %, seconds\n\
         saved, MiB written. Ours decides once a second, within {} MiB/s; the others insert at once.\n\
         Belady knows the future (with bypass: the most hits, not the fewest writes). Goal: at most\n\
         {POINTS} points below S3-FIFO, at {WRITES} % of its writes or less. A second late: points\n\
         against S3-FIFO if what it inserts, too, could be read from the next second on only.\n",
        SLOW as f64 / 1e6,
        LOCAL as f64 / 1e6,
        BUDGET >> 20,
    );
    // Writing to a string doesn't fail.
    for table in tables {
        let _ = write_table(&mut out, table);
    }
    out
}

fn write_table(out: &mut String, table: &Table) -> std::fmt::Result {
    writeln!(out, "\n{}, counted {}\n", table.load, table.counting.name())?;
    write!(out, "| {:^13} |", "chunk, cache")?;
    for who in Who::ALL {
        write!(out, " {:^19} |", who.name())?;
    }
    writeln!(out, " {:^26} | {:^13} | ms/MiB |", "ours against S3-FIFO", "a second late")?;
    writeln!(out, "|---------------|{}|---------------|--------|", rule())?;
    for row in &table.rows {
        write!(out, "| {:>4}K {:>3} %   |", row.chunk >> 10, row.percent)?;
        for who in Who::ALL {
            let figures = row.of(who);
            let (saved, mib) = (figures.seconds_saved(), figures.mib(row.chunk));
            write!(out, " {:>5.1} {saved:>6.0} {mib:>6.0} |", figures.hit_rate())?;
        }
        let ours = row.of(Who::Ours);
        let (points, writes) = row.against(ours);
        let verdict = if row.meets(ours) { "meets" } else { "short" };
        let per_mib = 1000.0 * ours.seconds_saved() / ours.mib(row.chunk).max(f64::EPSILON);
        let late = ours.hit_rate() - row.of(Who::S3Fifo).settled_rate();
        write!(out, " {points:>+5.1}, {writes:>3.0} % written {verdict} | {late:>+13.1} |")?;
        writeln!(out, " {per_mib:>6.0} |")?;
    }
    write_variants(out, table)
}

fn rule() -> String {
    let mut rule = String::new();
    for _ in Who::ALL {
        rule.push_str("---------------------|");
    }
    rule + &"-".repeat(28)
}

/// What becomes of ours against S3-FIFO when one setting is changed.
fn write_variants(out: &mut String, table: &Table) -> std::fmt::Result {
    let Some(first) = table.rows.first().filter(|row| !row.variants.is_empty()) else {
        return Ok(());
    };
    write!(out, "\n| {:<14} |", "with")?;
    for row in &table.rows {
        write!(out, " {:>4}K {:>2} %   |", row.chunk >> 10, row.percent)?;
    }
    writeln!(out, "\n|----------------|{}", "--------------|".repeat(table.rows.len()))?;
    for (index, (name, _)) in first.variants.iter().enumerate() {
        write!(out, "| {name:<14} |")?;
        for row in &table.rows {
            let (points, writes) = row.against(row.variants[index].1);
            write!(out, " {points:>+5.1}, {writes:>3.0} % |")?;
        }
        writeln!(out)?;
    }
    Ok(())
}

/// One document: a list of rows, with all that went into them.
pub fn json(tables: &[Table], skipped: Option<&str>) -> Value {
    let mut rows = Vec::new();
    for table in tables {
        for row in &table.rows {
            let figures = row.figures.iter().map(|&(who, figures)| (who.name(), figures));
            let figures: Vec<Value> = figures
                .chain(row.variants.iter().copied())
                .map(|(name, f)| cell(row, name, f))
                .collect();
            rows.push(json!({
                "load": table.load,
                "counting": table.counting.name(),
                "chunk_bytes": row.chunk,
                "cache_percent": row.percent,
                "cache_chunks": row.room,
                "figures": figures,
                "meets_goal": row.meets(row.of(Who::Ours)),
            }));
        }
    }
    json!({
        "slow_nanos": SLOW,
        "local_nanos": LOCAL,
        "budget_bytes_per_second": BUDGET,
        "skipped": skipped,
        "rows": rows,
    })
}

fn cell(row: &Row, name: &str, figures: Figures) -> Value {
    json!({
        "name": name,
        "accesses": figures.accesses,
        "hits": figures.hits,
        "hits_settled": figures.settled,
        "hit_percent": figures.hit_rate(),
        "seconds_saved": figures.seconds_saved(),
        "mib_written": figures.mib(row.chunk),
    })
}
