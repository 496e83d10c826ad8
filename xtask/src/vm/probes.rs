//! The probes on devices without requests, and on the guest's kernel, which is newer than most.
//!
//! Invariants checked:
//! - a device-mapper disk is watched by its bios: each read counts once, as long as it took, whole even if
//!   it is split further down;
//! - the disk beneath, watched at the same time, has the same bytes by its requests;
//! - nothing is left behind, and no beginning or end goes unseen.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::guest::Guest;
use super::mapped::Mapped;
use crate::probes::{Watching, fio};
use crate::report::Unfit;
use crate::subject::text;
use crate::tool::{json, tool};

/// Where the initramfs has the agent: not beside the daemon, whose other tests go without.
pub const AGENT: &str = "/rig/underlay-agent";
/// Size of the device, in bytes.
const SIZE: u64 = 256 << 20;
/// How far from fio's figures the probes' may be: its own way there and back is long in here.
const NEAR: f64 = 0.15;

/// Runs the test; its disk: a.
pub fn run(guest: &mut Guest) -> Result<()> {
    let mut mapped = None;
    guest.check("the agent understands this kernel", |guest| {
        guest.need(&["fio", "dmsetup"])?;
        if !Path::new(AGENT).exists() {
            return Err(Unfit("the agent is not built; cargo xtask probes builds it".into()).into());
        }
        let found = tool(AGENT, ["check", "--json"]).outcome()?;
        let found = json(&found.stdout)?;
        ensure!(found["works"] == true, "{}", found["problem"]);
        mapped = Some(Mapped::new(guest, "probed", "a", 2048 * 512, SIZE)?);
        Ok(tool("uname", ["-r"]).out()?.trim().to_string())
    })?;
    let Some(mapped) = mapped else { return Ok(()) };
    guest.check("dm-linear: each read counts once, above and beneath", |guest| {
        let said = [counted(guest, &mapped, "4k")?, counted(guest, &mapped, "2m")?];
        Ok(said.join("; "))
    })?;
    guest.check("dm-delay: reads take as long as fio says", |guest| {
        mapped.become_target("delay BELOW START 20")?;
        let watching =
            Watching::start(Path::new(AGENT), &guest.lab.dir("probes")?, &[text(&mapped.path)?])?;
        let load = ["--ioengine=psync", "--runtime=5", "--time_based"];
        let fio = fio(&mapped.path, &load)?;
        let report = watching.end()?;
        let (count, mean) = (sum(&report, 0, "count")?, sum(&report, 0, "device_ns")?);
        let (ours, theirs) = (mean / count.max(1.0) / 1e6, fio.mean / 1e6);
        let said = format!("{count} of {} seen, {ours:.2} ms, fio {theirs:.2} ms", fio.count);
        ensure!(count == fio.count && (ours / theirs - 1.0).abs() <= NEAR, "{said}");
        Ok(said)
    })?;
    Ok(())
}

fn counted(guest: &Guest, mapped: &Mapped, size: &str) -> Result<String> {
    let below = guest.device("a")?;
    let dir = guest.lab.dir("probes")?;
    let watching = Watching::start(Path::new(AGENT), &dir, &[text(&mapped.path)?, text(&below)?])?;
    let load = ["--ioengine=io_uring", "--iodepth=32", "--runtime=5", "--time_based"];
    let size_option = format!("--bs={size}");
    let fio = fio(&mapped.path, &[&load[..], &[&size_option]].concat())?;
    let report = watching.end()?;
    let (above, beneath) = (sum(&report, 0, "bytes")?, sum(&report, 1, "bytes")?);
    let requests = sum(&report, 1, "count")?;
    let said = format!(
        "{size}: {} reads of fio, {} bios, {requests} requests, {above} bytes above, {beneath} beneath",
        fio.count,
        sum(&report, 0, "count")?
    );
    let done = fio.count * if size == "4k" { 4096.0 } else { 2097152.0 };
    ensure!(above == done && beneath == done, "{said}; {report}");
    let quiet = |disk: &Value| disk["in_flight"] == 0;
    let quiet = report["disks"].as_array().is_some_and(|all| all.iter().all(quiet));
    let lost = report["losses"].as_object().into_iter().flatten().any(|(_, count)| *count != 0);
    ensure!(quiet && !lost, "{said}; {report}");
    Ok(said)
}

fn sum(report: &Value, disk: usize, what: &str) -> Result<f64> {
    let reads = &report["disks"][disk]["foreign_reads"][what];
    reads.as_f64().with_context(|| format!("no {what} in {report}"))
}
