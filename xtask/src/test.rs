//! `cargo xtask test`: cargo's own tests, then every rig, one tally.
//!
//! Cargo's tests run as whoever calls; the rigs want root for disks, mounts and the guest's image.
//! An ordinary user with a `sudo` that asks nothing gets them through it; without it, what needs root
//! is skipped, loudly.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::unistd::geteuid;

use crate::lab::Lab;
use crate::report::{Report, say};
use crate::subject::Against;
use crate::tool::tool;
use crate::{
    chaos, clients, demo, ebpf, fuzz, guest, hostile, kill, metrics, packaging, place, probes,
    promotion, savings, scale, sick, soak, survive, tls, vm,
};

/// How long cargo may build and test, on two slow processors.
const CARGO: Duration = Duration::from_secs(35 * 60);

/// How much of the rigs that take as long as they are told to.
const CHURN: u64 = 8;
const CHAOS: Duration = Duration::from_secs(50);
const SOAK: Duration = Duration::from_secs(30);
const FUZZ: Duration = Duration::from_secs(120);

/// Everything.
pub fn run(report: &mut Report) -> Result<()> {
    let cargo = std::env::var("CARGO").unwrap_or_else(|_| "cargo".into());
    let (mut passed, mut failed, mut ignored) = (0, 0, 0);
    // The agent embeds them when it is built.
    if let Err(error) = ebpf::build() {
        report.skip("build-ebpf", &format!("{error:#}"));
    }
    // cargo test builds the program too, in the same profile: the rigs use that one.
    let status = tool(&cargo, ["test", "--workspace", "--no-fail-fast"])
        .within(&place::root())
        .limit(CARGO)
        .stream(|line| {
            if let Some(counts) = line.strip_prefix("test result: ") {
                let count = |word: &str| count(counts, word);
                passed += count("passed");
                failed += count("failed");
                ignored += count("ignored");
            }
        })?;
    if !status.success() && failed == 0 {
        failed = 1;
    }
    report.add("cargo test", passed, failed, ignored);
    ensure!(passed + failed > 0, "cargo test ran nothing");
    fuzz::check(FUZZ, report);
    let program = place::Profile::Debug.underlay();
    if !program.exists() {
        report.broken("rigs", &anyhow::anyhow!("{} was not built", program.display()));
        return Ok(());
    }
    if geteuid().is_root() || !sudo() { rigs(report) } else { rigs_by_sudo(report) }
}

/// Every rig, in this process.
pub fn rigs(report: &mut Report) -> Result<()> {
    let lab = Lab::open()?;
    demo::run(&lab, report);
    packaging::run(&lab, report);
    metrics::run(&lab, report);
    guest::run(&lab, Against::Underlay, report);
    clients::run(&lab, Against::Underlay, 1, report);
    tls::run(&lab, report);
    kill::run(&lab, Against::Underlay, 1, report);
    savings::run(&lab, report);
    scale::run(&lab, 200, report);
    probes::run(&lab, report);
    promotion::run_untimed(&lab, report);
    survive::run(&lab, Duration::from_secs(6), false, report);
    chaos::churn(&lab, CHURN, 1, report);
    chaos::chaos(&lab, CHAOS, 1, report);
    soak::run(&lab, 16, SOAK, 1, report);
    hostile::run(&lab, 1, report);
    sick::run(&lab, report);
    vm::run(&lab, &vm::Options::everything(), report);
    Ok(())
}

fn sudo() -> bool {
    tool("sudo", ["-n", "true"]).outcome().is_ok_and(|outcome| outcome.code == 0)
}

/// Every rig, in this same program as root; its tally is added to ours.
fn rigs_by_sudo(report: &mut Report) -> Result<()> {
    let me = std::env::current_exe().context("finding this program")?;
    let target = format!("CARGO_TARGET_DIR={}", place::target().display());
    let mut last = String::new();
    let sudo = tool("sudo", ["-n", "env", &target]).args([me.as_os_str(), "rigs".as_ref()]);
    sudo.limit(CARGO).stream(|line| last = line.to_string())?;
    let count = |word: &str| count(&last, word);
    report.add("rigs", count("passed"), count("failed"), 0);
    (0..count("skipped")).for_each(|_| report.skip("rigs", "see above"));
    // What root made lies in this user's target directory: `cargo clean` must be able to remove it.
    let owner = format!("{}:{}", geteuid(), nix::unistd::getegid());
    let ours = place::target().join("rig");
    tool("sudo", ["-n", "chown", "-R", &owner]).args([ours]).run()?;
    ensure!(last.contains("passed"), "the rigs gave no tally but {last:?}");
    say("the rigs ran as root, through sudo -n");
    Ok(())
}

/// The number before `word` in a line like "3 passed, 0 failed" or "ok. 3 passed; 0 failed".
fn count(line: &str, word: &str) -> u64 {
    let before = line.split(word).next().filter(|before| before.len() < line.len());
    let number = before.and_then(|before| before.split_whitespace().last());
    number.and_then(|number| number.parse().ok()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_are_read_from_both_kinds_of_line() {
        let line = "ok. 12 passed; 1 failed; 3 ignored; 0 measured; 0 filtered out";
        assert_eq!(
            (count(line, "passed"), count(line, "failed"), count(line, "ignored")),
            (12, 1, 3)
        );
        assert_eq!(count("19 passed, 2 failed, 5 skipped", "skipped"), 5);
        assert_eq!(count("nothing", "passed"), 0);
    }
}
