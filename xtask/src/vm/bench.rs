//! The guest's side of `cargo xtask bench ublk`: block devices side by side, under the same loads.
//!
//! How a figure comes about:
//! - Every device is there at the same time; a load runs on one after the other, in an order that
//!   rotates with the rounds.
//! - Cached lanes are hot: their file is read once before. Direct lanes read what the host caches.
//! - What is written lasts a round: each has a fresh replica, fresh snapshots, a fresh qcow2 overlay.
//!   Each first-touch load has a region of its own; overwrites fall where all was written before.

pub mod count;
pub mod lanes;
pub mod measure;

use std::time::Duration;

use anyhow::Result;
use serde_json::json;

use self::lanes::{Stage, Subject};
use super::guest::Guest;
use crate::bench::ublk::plan::{COUNTS, Kind, LOADS, Load};
use crate::tool::{NO_ARGS, tool};

/// Size of the image and of every device, in bytes.
pub const SIZE: u64 = 256 << 20;
/// The part that overwrites fall on: the end.
pub const REGION: u64 = 96 << 20;

/// Runs it; its disks: a (ext4, the image), b (ext4, overlays), c and d (bare, what dm-snapshot
/// copies).
pub fn run(guest: &mut Guest) -> Result<()> {
    let programs = ["fio", "nbd-client", "qemu-nbd", "qemu-img", "losetup", "dmsetup"];
    guest.need(&programs)?;
    let number =
        |key, default| guest.word(key).and_then(|word| word.parse().ok()).unwrap_or(default);
    let rounds = number("underlay.rounds", 1);
    let window = Duration::from_millis(number("underlay.window", 500));
    // The command line of a kernel is words.
    let only = guest.word("underlay.only").unwrap_or_default().replace('+', " ");
    let wanted: Vec<&Load> = LOADS.iter().filter(|load| load.name.contains(&only)).collect();
    let kernel = tool("uname", ["-r"]).out()?.trim().to_string();
    guest.figure(json!({"kernel": kernel}))?;

    let mut stage = Stage::new(guest)?;
    for round in 0..rounds {
        let fresh = stage.fresh()?;
        let mut filled = false;
        for load in &wanted {
            if load.kind == Kind::Over && !filled {
                for subject in fresh.iter().filter(|subject| subject.lane.serves(Kind::Over)) {
                    measure::fill(&subject.device, SIZE - REGION, REGION)?;
                }
                filled = true;
            }
            let all = stage.lasting().iter().chain(&fresh);
            let mut lanes: Vec<&Subject> =
                all.filter(|subject| subject.lane.serves(load.kind)).collect();
            let first = round as usize % lanes.len().max(1);
            lanes.rotate_left(first);
            let guest = &*guest;
            measure::samples(&lanes, load, window, round, guest.dir(), |lane, sample| {
                let sample = sample.map(|sample| {
                    json!({
                        "per_second": sample.per_second,
                        "cpu_us": sample.cpu_us,
                        "server_us": sample.server_us,
                    })
                });
                let (lane, load) = (lane.key(), load.name);
                guest.figure(json!({"lane": lane, "load": load, "round": round, "sample": sample}))
            })?;
        }
        stage.discard(fresh)?;
        tool("sync", NO_ARGS).run()?;
    }
    if COUNTS.contains(&only) {
        count::run(guest, &mut stage)?;
    }
    stage.close()
}
