//! What images are read from: copies that answer late or wrongly, and what becomes of them.

use std::{fmt, sync::Arc};

use super::page::{About, Of, Page};
use crate::{
    control::events::Happened,
    source::{Disk, Figures, Trouble},
};

const RACED: About = About("source_reads", Of::Things, "Reads of images that have several copies");
const FAILOVERS: About = About(
    "source_failovers",
    Of::Things,
    "Reads that another copy was asked for: the first failed, or was late",
);
const HEDGES: About =
    About("source_hedges", Of::Things, "Reads that a second copy was asked for early");
const WON: About = About("source_hedges_won", Of::Things, "How many of them it answered first");
const RESCUED: About =
    About("source_rescued", Of::Things, "Chunks that no copy could give and something else did");
const FAILED: About = About("source_failed", Of::Things, "Reads that nothing could answer");
const ERRORS: About = About("disk_read_errors", Of::Things, "Reads of copies on it that failed");
const LATE: About =
    About("disk_late_reads", Of::Things, "Reads of copies on it that were given up waiting for");
const TROUBLE: About = About(
    "disk_trouble",
    Of::Things,
    "1 if the disk is in this trouble: its copies are read where no other can answer",
);
const REPAIRED: About = About("repaired_chunks", Of::Things, "Chunks of copies written anew");
const UNREPAIRED: About =
    About("unrepaired_chunks", Of::Things, "Attempts to write a chunk anew that failed");
const SCRUBBED: About = About("scrubbed", Of::Bytes, "Bytes of copies that the scrub has read");
const UNSOUND: About =
    About("scrub_unsound_chunks", Of::Things, "Chunks that it found not to be as they must");
const MADE: About = About(
    "copies_made",
    Of::Things,
    "Copies of images that were made because fewer were there than wanted",
);
const REMOVED: About =
    About("copies_removed", Of::Things, "Copies that were removed because more were there");
const NOT_MADE: About =
    About("copies_failed", Of::Things, "Attempts to make such a copy that failed");

const EVENTS: About = About("events", Of::Things, "What has happened on the node, by kind");

/// What there is to tell.
#[derive(Default)]
pub struct Reading {
    /// The images that are open, by name.
    pub images: Vec<(String, Figures)>,
    /// The disks that copies are read from.
    pub disks: Vec<Arc<Disk>>,
    /// Chunks that were written anew, and those that could not be.
    pub repaired: (u64, u64),
    /// Bytes that the scrub read, and chunks that it found unsound.
    pub scrubbed: (u64, u64),
    /// Copies that were made because they were missing, removed as surplus, and could not be made.
    pub kept: [u64; 3],
    /// How many events of each kind there were.
    pub events: Vec<(Happened, u64)>,
}

impl fmt::Debug for Reading {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Reading").field("images", &self.images).finish_non_exhaustive()
    }
}

pub(super) fn tell(page: &mut Page<'_>, reading: &Reading) -> fmt::Result {
    let all = |value: fn(&Figures) -> u64| {
        let images = reading.images.iter();
        images.map(move |(name, figures)| ([("image", name.as_str())], value(figures)))
    };
    page.counter(RACED, all(|figures| figures.raced))?;
    page.counter(FAILOVERS, all(|figures| figures.failovers))?;
    page.counter(HEDGES, all(|figures| figures.hedges))?;
    page.counter(WON, all(|figures| figures.hedges_won))?;
    page.counter(RESCUED, all(|figures| figures.rescued))?;
    page.counter(FAILED, all(|figures| figures.failed))?;
    let disks = || reading.disks.iter().map(|disk| ([("disk", disk.name())], disk));
    let errors = disks().map(|(labels, disk)| (labels, disk.failed_and_late().0));
    page.counter(ERRORS, errors)?;
    page.counter(LATE, disks().map(|(labels, disk)| (labels, disk.failed_and_late().1)))?;
    let troubles = reading.disks.iter().flat_map(|disk| {
        Trouble::ALL.map(|trouble| {
            let labels = [("disk", disk.name()), ("trouble", trouble.name())];
            (labels, u64::from(disk.trouble() == Some(trouble)))
        })
    });
    page.gauge(TROUBLE, troubles)?;
    page.count(REPAIRED, reading.repaired.0)?;
    page.count(UNREPAIRED, reading.repaired.1)?;
    page.count(SCRUBBED, reading.scrubbed.0)?;
    page.count(UNSOUND, reading.scrubbed.1)?;
    page.count(MADE, reading.kept[0])?;
    page.count(REMOVED, reading.kept[1])?;
    page.count(NOT_MADE, reading.kept[2])?;
    let events = reading.events.iter();
    page.counter(EVENTS, events.map(|(kind, count)| ([("kind", kind.word())], *count)))
}
