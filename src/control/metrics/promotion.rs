//! Promotion: what moved to which disk, and what it was good for.

use std::fmt;

use super::page::{About, Of, Page};

/// Promotion as it stands.
#[derive(Clone, Debug, Default)]
pub struct Promotion {
    /// Bytes a second that may be written for it to one disk.
    pub rate_bytes: u64,
    /// Every disk that may hold promoted chunks.
    pub disks: Vec<PromotingDisk>,
}

/// What promotion did on one disk since the daemon's start.
#[derive(Clone, Debug, Default)]
pub struct PromotingDisk {
    /// Its name.
    pub disk: String,
    /// Space that promoted chunks may take, as of now; 0 while it is off.
    pub limit_bytes: u64,
    /// Chunks promoted to it.
    pub promoted: u64,
    /// Bytes written for that.
    pub promoted_bytes: u64,
    /// Chunks that made room for others.
    pub evicted: u64,
    /// Chunks that could not be promoted.
    pub failed: u64,
    /// Time that readers did not wait for other disks, in seconds: an estimate.
    pub saved_seconds: f64,
}

const RATE: About = About(
    "promotion_rate",
    Of::Bytes,
    "Bytes a second that may be written for promotion to one disk",
);
const BUDGET: About =
    About("promotion_budget", Of::Bytes, "Space that promoted chunks may take on the disk");
const PROMOTIONS: About = About("promotions", Of::Things, "Chunks promoted to the disk");
const BYTES: About = About("promoted", Of::Bytes, "Bytes written to the disk for promotion");
const EVICTIONS: About =
    About("evictions", Of::Things, "Promoted chunks that made room for others");
const FAILURES: About =
    About("promotion_failures", Of::Things, "Chunks that could not be promoted");
const SAVED: About = About(
    "promotion_saved",
    Of::Seconds,
    "Estimated time that readers did not wait for other disks",
);

pub(super) fn tell(page: &mut Page<'_>, promotion: Option<&Promotion>) -> fmt::Result {
    let Some(Promotion { rate_bytes, disks }) = promotion else { return Ok(()) };
    let all = |value: fn(&PromotingDisk) -> u64| {
        disks.iter().map(move |disk| ([("disk", disk.disk.as_str())], value(disk)))
    };
    page.one(RATE, *rate_bytes)?;
    page.gauge(BUDGET, all(|disk| disk.limit_bytes))?;
    page.counter(PROMOTIONS, all(|disk| disk.promoted))?;
    page.counter(BYTES, all(|disk| disk.promoted_bytes))?;
    page.counter(EVICTIONS, all(|disk| disk.evicted))?;
    page.counter(FAILURES, all(|disk| disk.failed))?;
    let saved = disks.iter().map(|disk| ([("disk", disk.disk.as_str())], disk.saved_seconds));
    page.counter(SAVED, saved)
}
