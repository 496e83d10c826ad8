//! The tally of a run: one plain line a check, a closing line of figures.
//!
//! A check that could not run is told as loudly as one that failed: `SKIP name: reason`. The
//! closing line is always the last, so that a reader (or a script) finds the outcome there.

use std::io::Write;
use std::time::Instant;

use anyhow::{Result, bail};

/// What was checked so far, and how it went.
#[derive(Default)]
pub struct Report {
    passed: u64,
    failed: Vec<String>,
    skipped: Vec<String>,
    only: Option<String>,
}

impl Report {
    /// Of the checks whose names have `only` in them; the others are not run.
    pub fn of(only: Option<String>) -> Report {
        Report { only, ..Report::default() }
    }

    /// Runs one check. What it returns is printed beside its name: figures, or nothing.
    /// Returns whether it passed, for checks that make no sense after this one failed.
    pub fn check(&mut self, name: &str, check: impl FnOnce() -> Result<String>) -> bool {
        if self.only.as_ref().is_some_and(|only| !name.contains(only)) {
            return false;
        }
        let start = Instant::now();
        let outcome = check();
        self.outcome(name, outcome, start.elapsed().as_secs_f64())
    }

    /// Enters a check that ran elsewhere, in a guest, as [`Report::check`] does one of its own.
    pub fn outcome(&mut self, name: &str, outcome: Result<String>, seconds: f64) -> bool {
        match outcome {
            Ok(figures) if figures.is_empty() => say(&format!("ok    {name} ({seconds:.1} s)")),
            Ok(figures) => say(&format!("ok    {name}: {figures} ({seconds:.1} s)")),
            Err(error) if error.is::<Unfit>() => {
                self.skip(name, &error.to_string());
                return false;
            }
            Err(error) => {
                say(&format!("FAIL  {name} ({seconds:.1} s): {error:#}"));
                self.failed.push(format!("{name}: {error:#}"));
                return false;
            }
        }
        self.passed += 1;
        true
    }

    /// Notes that a check could not run here, and why.
    pub fn skip(&mut self, name: &str, reason: &str) {
        say(&format!("SKIP  {name}: {reason}"));
        self.skipped.push(format!("{name}: {reason}"));
    }

    /// Notes that a rig could not be set up: whatever it would have checked counts as one failure.
    pub fn broken(&mut self, name: &str, error: &anyhow::Error) {
        say(&format!("FAIL  {name}: {error:#}"));
        self.failed.push(format!("{name}: {error:#}"));
    }

    /// Adds what another runner (cargo test) counted.
    pub fn add(&mut self, name: &str, passed: u64, failed: u64, ignored: u64) {
        self.passed += passed;
        self.failed.extend((0..failed).map(|_| format!("{name}: see its own output")));
        self.skipped.extend((0..ignored).map(|_| format!("{name}: marked #[ignore]")));
    }

    /// Prints what failed and what was skipped once more, then the closing line; fails if a check did.
    pub fn close(self) -> Result<()> {
        say("");
        for line in &self.skipped {
            say(&format!("skipped: {line}"));
        }
        for line in &self.failed {
            say(&format!("failed:  {line}"));
        }
        let (failed, skipped) = (self.failed.len(), self.skipped.len());
        say(&format!("{} passed, {failed} failed, {skipped} skipped", self.passed));
        if failed > 0 {
            bail!("{failed} checks failed");
        }
        Ok(())
    }
}

/// The error of a check that finds that this machine can't tell: it counts as skipped.
#[derive(Debug)]
pub struct Unfit(pub String);

impl std::fmt::Display for Unfit {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Unfit {}

/// Prints a line at once, also into a pipe. A reader that went away is no failure of a check.
pub fn say(line: &str) {
    let mut out = std::io::stdout().lock();
    let _ = writeln!(out, "{line}");
    let _ = out.flush();
}

/// Tells what is being done, apart from results: on standard error.
pub fn note(line: &str) {
    eprintln!("{line}");
}
