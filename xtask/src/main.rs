//! `cargo xtask`: everything of underlay's upkeep that cargo does not do by itself.
//!
//! The rigs test the program as users have it, with real disks, real clients and a real guest; they
//! install what they need, and tell loudly what they had to skip.

mod apt;
mod bench;
mod chaos;
mod clients;
mod daemon;
mod demo;
mod ebpf;
mod fuzz;
mod guest;
mod hostile;
mod image;
mod kill;
mod lab;
mod load;
mod metrics;
mod nbd;
mod packaging;
mod pattern;
mod place;
mod probes;
mod promotion;
mod report;
mod savings;
mod scale;
mod setup;
mod sick;
mod slow;
mod soak;
mod subject;
mod survive;
mod test;
mod tls;
mod tool;
mod vm;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Result;
use clap::{Parser, Subcommand};

use crate::lab::Lab;
use crate::report::Report;
use crate::subject::Against;
use crate::tool::{NO_ARGS, tool};

/// The chores of the repository.
#[derive(Parser)]
#[command(name = "cargo xtask")]
struct Args {
    /// Runs only checks of a rig that have this in their names
    #[arg(long, global = true)]
    only: Option<String>,
    #[command(subcommand)]
    chore: Chore,
}

#[derive(Subcommand)]
enum Chore {
    /// Installs what the rigs need (apt-get, where this is Debian and root or sudo -n)
    Setup,
    /// cargo test, then every rig: the tests that a change must pass
    Test,
    /// What CI runs: formatting, lints, documentation, then `test` (the script .ci/run)
    Ci,
    /// Builds the eBPF programs, which the agent then embeds; gets bpf-linker and rust-src if missing
    BuildEbpf,
    /// The simulator: as many seeds as asked, several crashes each; a failing seed is printed
    Crash {
        /// How many seeds to run
        #[arg(long, default_value_t = 100_000)]
        seeds: u64,
        /// Only this seed, once more, and all that happens in it (RUST_LOG=underlay=trace)
        #[arg(long)]
        seed: Option<u64>,
    },
    /// Fuzzing: handshakes, requests, maps, images and what else comes from outside, mutated
    Fuzz(fuzz::Options),
    /// Every rig, without cargo's tests
    Rigs,
    /// Figures, side by side: of the data path, or of the promotion policy
    Bench(bench::Options),
    /// Rig: the main job with a real guest: three disks, three replicas, a boot over NBD
    Guest(Aim),
    /// Rig: outside clients against a reference file: qemu's, libnbd's, fio, a file system
    Clients(Aim),
    /// Rig: kill -9 in the midst of writes, ten times in a row
    Kill(Aim),
    /// Rig: what sharing saves, and what replicas cost
    Savings,
    /// Rig: what start, status and fsck of ten disks with ten images take
    Scale {
        /// Replicas of the node
        #[arg(long, default_value_t = 200)]
        replicas: usize,
    },
    /// Rig: chunks move to those who read them when a disk is slow; caches are damaged, filled, pulled
    Promotion {
        /// Draw latency over time, into this directory
        #[arg(long)]
        chart: Option<PathBuf>,
    },
    /// Rig: the commands that a newcomer meets first
    Demo,
    /// Rig: the eBPF probes against fio's own figures, and their attribution of reads
    Probes,
    /// Rig: metrics, rules, alerts and the dashboard, by a real Prometheus
    Metrics,
    /// Rig: tests that need a kernel with ublk, NBD and device-mapper, within a guest that has one
    Vm(vm::Options),
    /// The driver of those tests, within the guest
    #[command(hide = true)]
    Inside,
    /// Rig: an image with two copies, one of which fails, hangs, lies, or is gone
    Survive {
        /// For how many seconds a disk hangs
        #[arg(long, default_value_t = 60)]
        hang: u64,
    },
    /// Rig: drain, migrate, flatten, resize, rm, import at once, under load, with kill -9 in each round
    Churn {
        /// How many times the daemon is killed
        #[arg(long, default_value_t = 200)]
        rounds: u64,
        /// The seed of who does what, and when
        #[arg(long, default_value_t = 1)]
        seed: u64,
    },
    /// Rig: a day's worth of trouble in minutes: sick disks, damage, deaths, and all of churn
    Chaos {
        /// For how long
        #[arg(long, default_value_t = 15)]
        minutes: u64,
        /// The seed of what happens
        #[arg(long, default_value_t = 1)]
        seed: u64,
    },
    /// Rig: NBD clients that come and go for long, against a model; memory and open files must not grow
    Soak {
        /// For how long
        #[arg(long, default_value_t = 10)]
        minutes: u64,
        /// How many clients
        #[arg(long, default_value_t = 16)]
        clients: usize,
        /// The seed of what they do
        #[arg(long, default_value_t = 1)]
        seed: u64,
    },
    /// The server of a disk that can be ill
    #[command(hide = true)]
    SlowDisk {
        /// Its content
        file: PathBuf,
        /// Says what it suffers from
        illness: PathBuf,
        /// Where its file system is mounted
        mount: PathBuf,
    },
    /// Rig: bad names, images, bits; two daemons; disks that are read-only, full, gone
    Hostile {
        /// The seed of which bits are flipped
        #[arg(long, default_value_t = 1)]
        seed: u64,
    },
}

/// What a rig is pointed at.
#[derive(clap::Args)]
struct Aim {
    /// What to point the rig at; anything but underlay proves the rig itself
    #[arg(long, value_enum, default_value = "underlay")]
    against: Against,
    /// The seed of what is written, and when
    #[arg(long, default_value_t = 1)]
    seed: u64,
}

fn main() -> ExitCode {
    let args = Args::parse();
    match run(args.chore, args.only) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("xtask: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(chore: Chore, only: Option<String>) -> Result<()> {
    if let Chore::SlowDisk { file, illness, mount } = &chore {
        return slow::serve(file, illness, mount);
    }
    lab::heed_signals()?;
    let mut report = Report::of(only);
    match &chore {
        Chore::Inside => return vm::inside(),
        Chore::Vm(options) if options.list() => return Ok(()),
        Chore::Vm(options) => options.build()?,
        _ => {}
    }
    match chore {
        Chore::Ci => return tool::hand_over(tool(place::root().join(".ci/run"), NO_ARGS)),
        Chore::Crash { seeds, seed } => return crash(seeds, seed),
        Chore::Fuzz(options) => return fuzz::run(&options),
        Chore::BuildEbpf => return ebpf::build().map(drop),
        Chore::Bench(options) if options.counts_only() => return bench::run(&options),
        _ => setup::run(&mut report),
    }
    match chore {
        Chore::Setup
        | Chore::Ci
        | Chore::Crash { .. }
        | Chore::Fuzz(_)
        | Chore::BuildEbpf
        | Chore::Inside
        | Chore::SlowDisk { .. } => {}
        Chore::Test => test::run(&mut report)?,
        Chore::Rigs => test::rigs(&mut report)?,
        Chore::Bench(options) => {
            bench::run(&options)?;
            return Ok(());
        }
        Chore::Guest(aim) => guest::run(&Lab::open()?, aim.against, &mut report),
        Chore::Clients(aim) => {
            let lab = Lab::open()?;
            clients::run(&lab, aim.against, aim.seed, &mut report);
            tls::run(&lab, &mut report);
        }
        Chore::Kill(aim) => kill::run(&Lab::open()?, aim.against, aim.seed, &mut report),
        Chore::Promotion { chart } => {
            promotion::run(&Lab::open()?, chart.as_deref(), &mut report);
        }
        Chore::Survive { hang } => {
            survive::run(&Lab::open()?, Duration::from_secs(hang), true, &mut report);
        }
        Chore::Churn { rounds, seed } => chaos::churn(&Lab::open()?, rounds, seed, &mut report),
        Chore::Chaos { minutes, seed } => {
            chaos::chaos(&Lab::open()?, Duration::from_secs(minutes * 60), seed, &mut report);
        }
        Chore::Soak { minutes, clients, seed } => {
            let time = Duration::from_secs(minutes * 60);
            soak::run(&Lab::open()?, clients, time, seed, &mut report);
        }
        Chore::Demo => demo::run(&Lab::open()?, &mut report),
        Chore::Metrics => metrics::run(&Lab::open()?, &mut report),
        Chore::Vm(options) => vm::run(&Lab::open()?, &options, &mut report),
        Chore::Probes => probes::run(&Lab::open()?, &mut report),
        Chore::Savings => savings::run(&Lab::open()?, &mut report),
        Chore::Scale { replicas } => scale::run(&Lab::open()?, replicas, &mut report),
        Chore::Hostile { seed } => {
            let lab = Lab::open()?;
            hostile::run(&lab, seed, &mut report);
            sick::run(&lab, &mut report);
        }
    }
    report.close()
}

/// The simulator is in the library, and a test of the library runs it: xtask builds without both.
fn crash(seeds: u64, seed: Option<u64>) -> Result<()> {
    let (variable, value) = match seed {
        Some(seed) => ("UNDERLAY_CRASH_SEED", seed),
        None => ("UNDERLAY_CRASH_SEEDS", seeds),
    };
    let cargo = std::env::var("CARGO").unwrap_or_else(|_| "cargo".into());
    let test = tool(cargo, ["test", "--quiet", "--test", "crash", "--", "--nocapture"]);
    let test = test.args(["no_seed_finds_a_violation"]).env(variable, value.to_string());
    tool::hand_over(test.within(&place::root()))
}
