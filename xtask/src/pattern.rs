//! Content whose every byte can be told from any other's: for images, for writes, for comparing.

use std::fs::File;
use std::io::{Seek, SeekFrom, Write};
use std::path::Path;

use anyhow::{Context, Result};
use fastrand::Rng;

/// Writes `file` of `size` bytes: runs of random data and holes of 4 KiB to 2 MiB, some of them
/// broken at odd sectors. The same seed gives the same file.
pub fn image(file: &Path, size: u64, seed: u64) -> Result<()> {
    let mut rng = Rng::with_seed(seed);
    let mut out = File::create(file).with_context(|| format!("creating {}", file.display()))?;
    out.set_len(size)?;
    let mut at = 0;
    let mut buf = Vec::new();
    while at < size {
        let unit = if rng.u8(..4) == 0 { 512 } else { 4096 };
        let run = (unit << rng.u32(0..10)).min(size - at);
        if rng.bool() {
            buf.resize(usize::try_from(run)?, 0);
            rng.fill(&mut buf);
            out.seek(SeekFrom::Start(at))?;
            out.write_all(&buf)?;
        }
        at += run;
    }
    Ok(())
}

/// Writes `file` of `size` bytes without a hole: nothing about it can be stored for free.
pub fn noise(file: &Path, size: u64, seed: u64) -> Result<()> {
    let mut rng = Rng::with_seed(seed);
    let mut out = File::create(file).with_context(|| format!("creating {}", file.display()))?;
    let mut buf = vec![0; 1 << 20];
    let mut left = size;
    while left > 0 {
        let run = left.min(buf.len() as u64);
        rng.fill(&mut buf);
        out.write_all(&buf[..usize::try_from(run)?])?;
        left -= run;
    }
    out.sync_all().with_context(|| format!("syncing {}", file.display()))
}

/// The first byte at which two contents differ, if they do.
pub fn differ(left: &[u8], right: &[u8]) -> Option<usize> {
    if left == right {
        return None;
    }
    let at = left.iter().zip(right).position(|(a, b)| a != b);
    Some(at.unwrap_or(left.len().min(right.len())))
}
