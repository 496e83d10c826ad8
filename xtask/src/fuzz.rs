//! Fuzzing, for as long as is asked: the targets of `tests/fuzz`.

use std::time::Duration;

use anyhow::{Result, ensure};

use crate::place;
use crate::report::Report;
use crate::tool::{self, Tool, tool};

/// What to fuzz, and how long.
#[derive(clap::Args)]
pub struct Options {
    /// Only these
    #[arg(value_parser = ["handshake", "session", "overlay", "image", "stored"])]
    targets: Vec<String>,
    /// For how long, all of them together
    #[arg(long, default_value_t = 10)]
    minutes: u64,
    /// Where the cases come from: another seed, other cases
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Only the case of this number, which a failure tells
    #[arg(long)]
    case: Option<u64>,
}

/// Runs in the place of this process.
pub fn run(options: &Options) -> Result<()> {
    let mut args = options.targets.clone();
    args.extend(["--seconds".into(), (options.minutes * 60).to_string()]);
    args.extend(["--seed".into(), options.seed.to_string()]);
    if let Some(case) = options.case {
        args.extend(["--case".into(), case.to_string()]);
    }
    tool::hand_over(cargo().args(args))
}

/// Every target, as a check.
pub fn check(time: Duration, report: &mut Report) {
    let seconds = time.as_secs();
    report.check(&format!("fuzz: every target, {seconds} s in all"), || {
        let fuzz = cargo().args(["--seconds", &seconds.to_string()]).limit(20 * time);
        let outcome = fuzz.outcome()?;
        ensure!(outcome.code == 0, "{}", outcome.stderr);
        let cases = outcome.stdout.lines().filter_map(|line| line.strip_prefix("fuzz "));
        Ok(cases.collect::<Vec<_>>().join(", "))
    });
}

fn cargo() -> Tool {
    let cargo = std::env::var("CARGO").unwrap_or_else(|_| "cargo".into());
    tool(cargo, ["test", "--quiet", "--test", "fuzz", "--"]).within(&place::root())
}
