//! What is in packaging/, as systemd reads it. The udev rules are run in the guest (`vm/udev.rs`).

use std::fs;

use anyhow::{Context, Result, ensure};

use crate::lab::Lab;
use crate::place;
use crate::report::{Report, Unfit};
use crate::tool::{find, tool};

/// The units.
const UNITS: [&str; 3] = ["underlay.service", "underlay.socket", "underlay-nbd.socket"];

/// Runs the check.
pub fn run(lab: &Lab, report: &mut Report) {
    report.check("packaging: systemd takes the units", || check(lab));
}

fn check(lab: &Lab) -> Result<String> {
    if find("systemd-analyze").is_none() {
        return Err(Unfit("systemd-analyze is not installed".into()).into());
    }
    let dir = lab.dir("packaging")?;
    let program = place::Profile::Debug.underlay();
    for unit in UNITS {
        let text = fs::read_to_string(place::root().join("packaging").join(unit))
            .with_context(|| format!("reading packaging/{unit}"))?;
        // It looks whether the program is there.
        let text = text.replace("/usr/bin/underlay", &program.to_string_lossy());
        fs::write(dir.join(unit), text)?;
    }
    let units = UNITS.map(|unit| dir.join(unit));
    let verified = tool("systemd-analyze", ["verify", "--man=no", "--recursive-errors=no"]);
    let outcome = verified.args(units).outcome()?;
    // Of what it doesn't know it only warns.
    let silent = outcome.stdout.is_empty() && outcome.stderr.is_empty();
    ensure!(outcome.code == 0 && silent, "exit {}: {}", outcome.code, outcome.said());
    Ok(format!("{} units", UNITS.len()))
}
