//! Runs the crash simulator for as many seeds as asked: `cargo xtask crash --seeds N`.
//!
//!     cargo run --example crash -- [--seeds=N] [--first=N] [--depth=N]
//!
//! `--depth` exhausts the sequences of up to N operations as well. A violation is printed with its
//! seed; `--first=SEED --seeds=1` with `RUST_LOG=underlay=trace` then tells what happens in it.

use std::{
    process::ExitCode,
    sync::Mutex,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use underlay::cow::crash::{Options, exhaust, run_seeds};

/// How often progress is told.
const TELL: Duration = Duration::from_secs(5);

struct Args {
    first: u64,
    seeds: u64,
    depth: u64,
}

fn args() -> Result<Args> {
    let mut args = Args { first: 0, seeds: 13_000, depth: 0 };
    for arg in std::env::args().skip(1) {
        let (name, value) = arg.split_once('=').context("usage: --seeds=N --first=N --depth=N")?;
        let value = value.parse().with_context(|| format!("{arg}: not a number"))?;
        match name {
            "--first" => args.first = value,
            "--seeds" => args.seeds = value,
            "--depth" => args.depth = value,
            _ => bail!("{arg}: not known; usage: --seeds=N --first=N --depth=N"),
        }
    }
    Ok(args)
}

fn work(args: &Args) -> Result<()> {
    let began = Instant::now();
    let told = Mutex::new(began);
    let last = args.first.checked_add(args.seeds).context("--first plus --seeds is too large")?;
    let outcome = run_seeds(args.first..last, &Options::default(), |sum| {
        let Ok(mut told) = told.lock() else { return };
        if told.elapsed() > TELL {
            *told = Instant::now();
            println!("{} of {} seeds, {} crashes", sum.runs, args.seeds, sum.crashes());
        }
    })?;
    println!("seeds {}..{last}: {outcome}; 0 violations in {:.1?}", args.first, began.elapsed());
    if args.depth > 0 {
        let began = Instant::now();
        let outcome = exhaust(args.depth as usize)?;
        println!(
            "sequences up to {}: {outcome}; 0 violations in {:.1?}",
            args.depth,
            began.elapsed()
        );
    }
    Ok(())
}

fn main() -> ExitCode {
    tracing_subscriber::fmt()
        .with_env_filter(tracing_subscriber::EnvFilter::from_default_env())
        .init();
    match args().and_then(|args| work(&args)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("violation or failure: {error:#}");
            ExitCode::FAILURE
        }
    }
}
