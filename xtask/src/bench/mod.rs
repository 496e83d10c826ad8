//! Figures, side by side in one run: underlay and what it is compared with, under the same loads of fio.
//!
//! Figures from small and busy machines are noisy, so nothing is compared across runs: every round runs
//! every contestant, in an order that rotates, and what counts is the median of the ratios within a
//! round.

mod beside;
mod nbd;
mod policy;
mod probes;
pub mod ublk;

use std::path::PathBuf;

use anyhow::Result;

use crate::lab::Lab;
use crate::place;
use crate::report::say;
use crate::tool::tool;

/// What the caller may choose.
#[derive(clap::Args)]
pub struct Options {
    /// What is measured
    #[arg(value_enum, default_value = "nbd")]
    area: Area,
    /// Rounds; the median of them is what counts
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=50))]
    rounds: u32,
    /// How long each load is measured, in seconds; 4 for nbd, 1 for beside, 3 for probes, 0.5 for ublk
    /// otherwise
    #[arg(long, value_parser = seconds)]
    seconds: Option<f64>,
    /// Only loads whose name contains this; of ublk also "counts"
    #[arg(long, default_value = "")]
    only: String,
    /// Of policy: the trace, instead of ../shared/traces/cloudphysics.csv.gz
    #[arg(long)]
    trace: Option<PathBuf>,
    /// Of nbd: a directory for a page and a chart of the figures
    #[arg(long, value_name = "DIR")]
    write: Option<PathBuf>,
    /// Prints one JSON document instead of tables
    #[arg(long)]
    json: bool,
}

/// A part of underlay whose speed is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Area {
    /// Reads and writes over NBD: against the raw file, qemu-nbd, nbdkit
    Nbd,
    /// What an NBD client has beside another that does what it should not, or all it can
    Beside,
    /// Kernel block devices, in a guest: against loop, dm-snapshot, kernel NBD; and what a request costs
    Ublk,
    /// What the promotion policy saves and writes: against LRU, LARC, S3-FIFO, Belady (counts, not times)
    Policy,
    /// The eBPF probes: time by the kernel's account, throughput with and without, memory
    Probes,
}

impl Options {
    fn seconds(&self) -> f64 {
        self.seconds.unwrap_or(match self.area {
            Area::Nbd => 4.0,
            Area::Beside => 1.0,
            Area::Ublk | Area::Policy => 0.5,
            Area::Probes => 3.0,
        })
    }

    /// Whether this measures nothing of the machine, and needs nothing of it.
    pub fn counts_only(&self) -> bool {
        self.area == Area::Policy
    }
}

fn seconds(text: &str) -> Result<f64, String> {
    let seconds = text.parse().ok().filter(|seconds| (0.25..=60.0).contains(seconds));
    seconds.ok_or_else(|| "give seconds from 0.25 to 60".into())
}

/// Runs the bench and prints its figures.
pub fn run(options: &Options) -> Result<()> {
    say(&match options.area {
        Area::Nbd => nbd::run(&Lab::open()?, options)?,
        Area::Beside => beside::run(&Lab::open()?, options)?,
        Area::Ublk => ublk::run(&Lab::open()?, options)?,
        Area::Policy => return policy::run(options),
        Area::Probes => probes::run(&Lab::open()?, options)?,
    });
    Ok(())
}

/// The middle one, or the mean of the two in the middle.
fn median(mut all: Vec<f64>) -> f64 {
    all.sort_by(f64::total_cmp);
    let middle = all.len() / 2;
    if all.len() % 2 == 1 { all[middle] } else { (all[middle - 1] + all[middle]) / 2.0 }
}

/// What the figures were taken on.
fn machine() -> Result<String> {
    let kernel = tool("uname", ["-r"]).out()?;
    let cpus = std::thread::available_parallelism()?;
    let commit = tool("git", ["rev-parse", "--short", "HEAD"]).within(&place::root()).outcome();
    let commit = commit.ok().filter(|outcome| outcome.code == 0);
    let commit = commit.map_or("no commit".into(), |outcome| outcome.stdout.trim().to_string());
    Ok(format!("{commit}, kernel {}, {cpus} processors", kernel.trim()))
}
