//! The promotion policy beside LRU, LARC, S3-FIFO and Belady's optimum: hit rate, seconds saved,
//! MiB written.
//!
//! `cargo xtask bench policy` runs it. The loads are a real trace (../shared/traces, skipped loudly
//! where it is missing) and a synthetic one. Nothing is timed: the figures are counts, the same on
//! every machine. What a read costs and when a promoted chunk is there is told in [`contest`]; how
//! repeated reads are counted ([`trace::Counting`]) changes everything, so both ways are shown.

mod caches;
mod contest;
mod table;
mod trace;

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Result;
use clap::Parser;
use underlay::promote::Settings;

use crate::contest::{Figures, Who};
use crate::trace::{Counting, Load};

/// Cache sizes, in percent of the chunks that are read.
const SIZES: [usize; 3] = [5, 10, 20];
/// Chunk sizes, in bytes: ours, and a quarter.
const CHUNKS: [u64; 2] = [64 << 10, 256 << 10];
/// Where the trace is looked for: beside the repository, where it is not committed.
const TRACE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../shared/traces/cloudphysics.csv.gz");
/// The seed of the synthetic load.
const SEED: u64 = 1;

/// Hits, seconds saved and MiB written, by cache policy.
#[derive(Parser)]
struct Args {
    /// The trace of CloudPhysics, as CSV compressed with gzip
    #[arg(long, default_value = TRACE)]
    trace: PathBuf,
    /// Prints one JSON document instead of tables
    #[arg(long)]
    json: bool,
    /// What cargo bench hands to every bench
    #[arg(long, hide = true)]
    bench: bool,
}

/// One size of chunk and of cache: all contestants, and ours with other settings.
struct Row {
    chunk: u64,
    percent: usize,
    room: usize,
    figures: Vec<(Who, Figures)>,
    variants: Vec<(&'static str, Figures)>,
}

/// One load, counted one way.
struct Table {
    load: String,
    counting: Counting,
    rows: Vec<Row>,
}

fn main() -> Result<()> {
    let args = Args::parse();
    let mut loads = Vec::new();
    let mut skipped = None;
    if args.trace.exists() {
        loads.push(Load::cloudphysics(&args.trace)?);
    } else {
        skipped = Some(missing(&args.trace));
    }
    loads.push(Load::synthetic(SEED));
    let mut tables = Vec::new();
    for load in &loads {
        tables.extend(Counting::ALL.map(|counting| run(load, counting)));
    }
    if let Some(skipped) = &skipped {
        eprintln!("SKIP  {skipped}");
    }
    match args.json {
        true => println!("{}", table::json(&tables, skipped.as_deref())),
        false => print!("{}", table::text(&tables)),
    }
    Ok(())
}

fn missing(trace: &Path) -> String {
    format!("cloudphysics: no {}; name it with --trace", trace.display())
}

fn run(load: &Load, counting: Counting) -> Table {
    let mut rows = Vec::new();
    for chunk in CHUNKS {
        let accesses = load.accesses(chunk, counting);
        let footprint: HashSet<u64> = accesses.iter().map(|access| access.chunk).collect();
        for percent in SIZES {
            let room = footprint.len() * percent / 100;
            let play = |who, settings| contest::run(who, &accesses, room, chunk, settings);
            let figures = Who::ALL.map(|who| (who, play(who, Settings::default())));
            let variants = match counting {
                Counting::OneASecond => variants(),
                Counting::Every => Vec::new(),
            };
            let variants =
                variants.into_iter().map(|(name, settings)| (name, play(Who::Ours, settings)));
            rows.push(Row {
                chunk,
                percent,
                room,
                figures: figures.to_vec(),
                variants: variants.collect(),
            });
        }
    }
    Table { load: load.name.clone(), counting, rows }
}

/// Ours with one setting changed, to see whether it hangs by that setting.
fn variants() -> Vec<(&'static str, Settings)> {
    let usual = Settings::default();
    let half_life = |factor: f64| Duration::from_secs_f64(usual.half_life.as_secs_f64() * factor);
    vec![
        ("half-life / 6", Settings { half_life: half_life(1.0 / 6.0), ..usual }),
        ("half-life / 2", Settings { half_life: half_life(0.5), ..usual }),
        ("half-life x 2", Settings { half_life: half_life(2.0), ..usual }),
        ("admission 3", Settings { admission: 3, ..usual }),
        ("edge 1", Settings { edge: 1.0, ..usual }),
        ("edge 1.25", Settings { edge: 1.25, ..usual }),
        ("long runs 4", Settings { long_run: 4, ..usual }),
        ("long runs 64", Settings { long_run: 64, ..usual }),
    ]
}
