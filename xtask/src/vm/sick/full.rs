//! A disk without space.

use std::fs::{self, File};
use std::io::Write;
use std::path::Path;

use anyhow::{Context, Result, ensure};

use super::node::{Node, PIECE};
use super::{EIO, ENOSPC};
use crate::tool::tool;
use crate::vm::limited::{Limited, refused};

/// Pieces that are written to it.
const PIECES: u64 = 128;

/// Fills a disk beneath a replica, and empties it again.
pub(super) fn full(node: &Node) -> Result<String> {
    node.daemon.ok(&["attach", "replica/full"])?;
    let device = Limited::open("/dev/underlay/replica/full")?;
    let piece = |byte: u8| vec![byte; PIECE];
    let at = |number: u64| number * PIECE as u64;
    device.write(at(0), &piece(1))??;
    device.flush()??;
    let filler = node.small_at.join("filler");
    fill(&filler, 2 << 20)?;
    let (mut taken, mut refusals) = (vec![0], 0);
    for number in 1..PIECES {
        match device.write(at(number), &piece(1))? {
            Ok(()) => taken.push(number),
            refusal => {
                refused(refusal, &[ENOSPC, EIO], "a write to a full disk")?;
                refusals += 1;
            }
        }
    }
    ensure!(taken.len() > 1 && refusals > 0, "{} taken, {refusals} refused", taken.len());
    // What has its space stays writable, and can be made durable.
    for number in &taken {
        device.write(at(*number), &piece(2))??;
    }
    device.flush()?.context("a flush on a full disk")?;
    for number in &taken {
        device.holds(at(*number), &piece(2))?;
    }
    fs::remove_file(&filler)?;
    // The space comes back with the file system's next commit.
    tool("sync", ["-f"]).args([&node.small_at]).run()?;
    for number in 1..PIECES {
        device.write(at(number), &piece(3))?.with_context(|| format!("piece {number} at last"))?;
    }
    device.flush()??;
    device.holds(at(0), &piece(2))?;
    for number in 1..PIECES {
        device.holds(at(number), &piece(3))?;
    }
    drop(device);
    node.daemon.ok(&["detach", "replica/full"])?;
    Ok(format!("{} pieces taken, {refusals} refused", taken.len()))
}

/// Fills the file's disk but for `leave` bytes.
fn fill(file: &Path, leave: u64) -> Result<()> {
    let mut filler = File::create(file)?;
    for piece in [1 << 20, 64 << 10, 4096] {
        while filler.write_all(&vec![1; piece]).and_then(|()| filler.sync_data()).is_ok() {}
    }
    let size = filler.metadata()?.len();
    filler.set_len(size.saturating_sub(leave))?;
    Ok(filler.sync_all()?)
}
