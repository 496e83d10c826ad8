//! What has happened to disks, images and replicas: told once, logged, kept for a while, and heard by
//! who follows.
//!
//! Numbers begin at 1 with every start of the daemon; with the id of that start they say which event is
//! meant, and who follows can tell whether he missed any.
//!
//! Invariants:
//! - Telling waits for nothing but a lock that nobody holds across I/O.
//! - Memory is bounded: `RING` events, none of which has more than `MESSAGE_MAX` bytes of text, and
//!   of details what call sites give: never content, never a list without an end.

use std::{
    collections::VecDeque,
    fmt::Display,
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    time::{SystemTime, UNIX_EPOCH},
};

use serde::{Deserialize, Serialize};
use serde_json::Value;
use tokio::sync::watch;
use utoipa::ToSchema;
use uuid::Uuid;

use crate::error::{Error, Kind};

/// Events kept in memory.
const RING: usize = 4096;
/// Bytes of a message, and of what it is about.
const MESSAGE_MAX: usize = 1000;

/// What kind of thing has happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Happened {
    /// The daemon has started.
    Started,
    /// A disk has become slow, silent or failing: its copies are asked last.
    DiskTrouble,
    /// A disk is well again.
    DiskWell,
    /// A disk that was there is not any more, or can't be used as it should be.
    DiskGone,
    /// A disk is there again.
    DiskBack,
    /// A disk was given to underlay.
    DiskAdded,
    /// A disk was forgotten.
    DiskRemoved,
    /// A disk takes nothing new from now on, or does again.
    DiskChanged,
    /// A disk was drained: nothing is left on it that is wanted.
    DiskDrained,
    /// Chunks of a copy were found not to be what was imported, or can't be read.
    ChunksBad,
    /// Chunks of a copy were written anew.
    ChunksRepaired,
    /// Chunks of a copy could not be written anew.
    ChunksUnrepaired,
    /// Chunks that no copy could give came from elsewhere.
    Rescued,
    /// A copy was made.
    CopyMade,
    /// A copy can't be made: there are fewer than wanted.
    CopyMissing,
    /// A copy was removed.
    CopyRemoved,
    /// A copy is there again though its image was removed while its disk was away: it is needed.
    CopyKept,
    /// A copy can't be used.
    CopyUnusable,
    /// A scrub of a copy has begun.
    ScrubBegun,
    /// A scrub of a copy has ended.
    ScrubEnded,
    /// An image was imported.
    ImageImported,
    /// A name of an image was removed, and with the last one the image.
    ImageRemoved,
    /// A replica was created.
    ReplicaCreated,
    /// A replica was made of an overlay from elsewhere.
    ReplicaImported,
    /// A replica was removed.
    ReplicaRemoved,
    /// A replica has moved to another disk.
    ReplicaMoved,
    /// A replica needs its image no more.
    ReplicaFlattened,
    /// A replica has grown.
    ReplicaResized,
    /// The catalogue was looked through.
    Fsck,
    /// Work that was asked for failed or was given up.
    Failed,
}

impl Happened {
    /// All of them, in their order.
    pub const ALL: [Happened; 30] = [
        Happened::Started,
        Happened::DiskTrouble,
        Happened::DiskWell,
        Happened::DiskGone,
        Happened::DiskBack,
        Happened::DiskAdded,
        Happened::DiskRemoved,
        Happened::DiskChanged,
        Happened::DiskDrained,
        Happened::ChunksBad,
        Happened::ChunksRepaired,
        Happened::ChunksUnrepaired,
        Happened::Rescued,
        Happened::CopyMade,
        Happened::CopyMissing,
        Happened::CopyRemoved,
        Happened::CopyKept,
        Happened::CopyUnusable,
        Happened::ScrubBegun,
        Happened::ScrubEnded,
        Happened::ImageImported,
        Happened::ImageRemoved,
        Happened::ReplicaCreated,
        Happened::ReplicaImported,
        Happened::ReplicaRemoved,
        Happened::ReplicaMoved,
        Happened::ReplicaFlattened,
        Happened::ReplicaResized,
        Happened::Fsck,
        Happened::Failed,
    ];

    /// How much it matters.
    pub fn severity(self) -> Severity {
        match self {
            Happened::DiskGone | Happened::ChunksUnrepaired => Severity::Error,
            Happened::DiskTrouble
            | Happened::ChunksBad
            | Happened::Rescued
            | Happened::CopyMissing
            | Happened::CopyKept
            | Happened::CopyUnusable
            | Happened::Failed => Severity::Warning,
            _ => Severity::Info,
        }
    }

    /// It in a word, as JSON and metrics have it.
    pub fn word(self) -> &'static str {
        match self {
            Happened::Started => "started",
            Happened::DiskTrouble => "disk_trouble",
            Happened::DiskWell => "disk_well",
            Happened::DiskGone => "disk_gone",
            Happened::DiskBack => "disk_back",
            Happened::DiskAdded => "disk_added",
            Happened::DiskRemoved => "disk_removed",
            Happened::DiskChanged => "disk_changed",
            Happened::DiskDrained => "disk_drained",
            Happened::ChunksBad => "chunks_bad",
            Happened::ChunksRepaired => "chunks_repaired",
            Happened::ChunksUnrepaired => "chunks_unrepaired",
            Happened::Rescued => "rescued",
            Happened::CopyMade => "copy_made",
            Happened::CopyMissing => "copy_missing",
            Happened::CopyRemoved => "copy_removed",
            Happened::CopyKept => "copy_kept",
            Happened::CopyUnusable => "copy_unusable",
            Happened::ScrubBegun => "scrub_begun",
            Happened::ScrubEnded => "scrub_ended",
            Happened::ImageImported => "image_imported",
            Happened::ImageRemoved => "image_removed",
            Happened::ReplicaCreated => "replica_created",
            Happened::ReplicaImported => "replica_imported",
            Happened::ReplicaRemoved => "replica_removed",
            Happened::ReplicaMoved => "replica_moved",
            Happened::ReplicaFlattened => "replica_flattened",
            Happened::ReplicaResized => "replica_resized",
            Happened::Fsck => "fsck",
            Happened::Failed => "failed",
        }
    }
}

/// How much it matters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Severity {
    /// Good to know.
    Info,
    /// Somebody should look.
    Warning,
    /// Something was lost, or is about to be.
    Error,
}

impl Severity {
    /// As users read it.
    pub fn name(self) -> &'static str {
        match self {
            Severity::Info => "info",
            Severity::Warning => "warning",
            Severity::Error => "error",
        }
    }
}

/// One thing that has happened.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Entry {
    /// Its number: one more than that of the event before, from 1 with each start of the daemon.
    pub seq: u64,
    /// The start of the daemon that the number counts from.
    #[schema(value_type = String)]
    pub boot: Uuid,
    /// When, in UTC, as RFC 3339 writes it.
    pub time: String,
    /// How much it matters.
    pub severity: Severity,
    /// What kind of thing.
    pub kind: Happened,
    /// What it is about: `disk a`, `image debian-12`.
    pub object: String,
    /// What there is to say.
    pub message: String,
    /// The same for programs, by kind.
    #[schema(value_type = Object)]
    pub details: Value,
}

/// That events were missed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Gap {
    /// Why.
    pub reason: Missed,
    /// How many, if that is known.
    pub lost: Option<u64>,
}

/// Why events were missed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Missed {
    /// More have happened than are kept.
    Overrun,
    /// The daemon was started again: numbers begin anew, and what was not heard before is gone.
    Restarted,
}

/// The events from some number on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Page {
    /// The start of the daemon that numbers count from.
    #[schema(value_type = String)]
    pub boot: Uuid,
    /// The number of the last event that has happened; 0 if none has.
    pub last: u64,
    /// Whether some were missed between those asked for and those given.
    pub gap: Option<Gap>,
    /// The events, in their order.
    pub events: Vec<Entry>,
}

/// A line that a follower is told.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Heard {
    /// This has happened.
    Event(Entry),
    /// What happened in between is not known any more.
    Gap(Gap),
}

/// Where somebody has heard events up to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Mark {
    /// The number of the last one that he heard; `None` if whatever there is shall be told.
    pub seq: Option<u64>,
    /// The start that it counts from, if he knows.
    pub boot: Option<Uuid>,
}

/// The events of a node.
pub struct Events {
    boot: Uuid,
    ring: Mutex<Ring>,
    /// The number of the last one.
    last: watch::Sender<u64>,
    counts: [AtomicU64; Happened::ALL.len()],
    closed: AtomicBool,
}

#[derive(Default)]
struct Ring {
    last: u64,
    entries: VecDeque<Entry>,
}

impl Default for Events {
    fn default() -> Events {
        Events {
            boot: Uuid::new_v4(),
            ring: Mutex::default(),
            last: watch::Sender::new(0),
            counts: std::array::from_fn(|_| AtomicU64::new(0)),
            closed: AtomicBool::new(false),
        }
    }
}

impl Events {
    /// Tells of something that has happened to `object`, and logs it.
    pub fn tell(
        &self,
        kind: Happened,
        object: impl Display,
        message: impl Display,
        details: Value,
    ) {
        let (object, message) = (bounded(object.to_string()), bounded(message.to_string()));
        let (event, severity) = (kind.word(), kind.severity());
        match severity {
            Severity::Info => tracing::info!(event, %object, %details, "{message}"),
            Severity::Warning => tracing::warn!(event, %object, %details, "{message}"),
            Severity::Error => tracing::error!(event, %object, %details, "{message}"),
        }
        self.counts[kind as usize].fetch_add(1, Relaxed);
        let time = rfc3339(SystemTime::now());
        let mut ring = self.ring();
        ring.last += 1;
        let seq = ring.last;
        if ring.entries.len() == RING {
            ring.entries.pop_front();
        }
        let boot = self.boot;
        ring.entries.push_back(Entry { seq, boot, time, severity, kind, object, message, details });
        // While the lock is held: the numbers that are watched never go back.
        self.last.send_replace(seq);
    }

    /// Tells that `work` on `object` failed, unless it was refused before anything was done.
    pub fn failed(&self, object: impl Display, work: &str, error: &Error) {
        let message = match error.kind() {
            Kind::NotFound | Kind::Exists | Kind::InUse | Kind::Invalid | Kind::Permission => {
                tracing::info!(%object, %error, "{work}: refused");
                return;
            }
            Kind::Cancelled => format!("{work}: given up"),
            _ => format!("{work}: {error}"),
        };
        let details = serde_json::json!({ "work": work, "error": error.kind() });
        self.tell(Happened::Failed, object, message, details);
    }

    /// The events after a mark, `most` at most.
    pub fn after(&self, mark: Mark, most: usize) -> Page {
        let ring = self.ring();
        let known = |seq: &u64| *seq <= ring.last && mark.boot.is_none_or(|boot| boot == self.boot);
        let restarted = Gap { reason: Missed::Restarted, lost: None };
        let (from, gap) = match mark.seq {
            Some(seq) if !known(&seq) => (0, Some(restarted)),
            other => (other.unwrap_or(0), None),
        };
        let first = ring.entries.front().map_or(ring.last + 1, |entry| entry.seq);
        let lost = first - 1 - from.min(first - 1);
        let overrun = Gap { reason: Missed::Overrun, lost: Some(lost) };
        let gap = gap.or((lost > 0 && mark.seq.is_some()).then_some(overrun));
        let skipped = (from + 1).saturating_sub(first) as usize;
        let events = ring.entries.iter().skip(skipped).take(most).cloned().collect();
        Page { boot: self.boot, last: ring.last, gap, events }
    }

    /// Changes with each event.
    pub fn watch(&self) -> watch::Receiver<u64> {
        self.last.subscribe()
    }

    /// Lets those who follow go: the daemon stops.
    pub fn close(&self) {
        self.closed.store(true, Relaxed);
        self.last.send_modify(|_| {});
    }

    /// Whether nobody is to follow any more.
    pub fn is_closed(&self) -> bool {
        self.closed.load(Relaxed)
    }

    /// How many of each kind were told since the daemon's start.
    pub fn counts(&self) -> Vec<(Happened, u64)> {
        let count = |kind: Happened| (kind, self.counts[kind as usize].load(Relaxed));
        Happened::ALL.map(count).into()
    }

    fn ring(&self) -> MutexGuard<'_, Ring> {
        // A list of events is whole after any panic.
        self.ring.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// No more than [`MESSAGE_MAX`] bytes of `text`.
fn bounded(mut text: String) -> String {
    if text.len() > MESSAGE_MAX {
        text.truncate(text.floor_char_boundary(MESSAGE_MAX));
        text.push('…');
    }
    text
}

/// A time in UTC as RFC 3339 writes it, in milliseconds: `2026-11-23T05:55:27.125Z`.
pub fn rfc3339(time: SystemTime) -> String {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    let (days, rest) = (since.as_secs() / 86_400, since.as_secs() % 86_400);
    // Civil from days: years begin in March, so that the leap day comes last.
    let shifted = days + 719_468;
    let (era, day) = (shifted / 146_097, shifted % 146_097);
    let year = (day - day / 1_460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    let march = (5 * day + 2) / 153;
    let month = if march < 10 { march + 3 } else { march - 9 };
    let year = era * 400 + year + u64::from(month <= 2);
    let day = day - (153 * march + 2) / 5 + 1;
    let (hour, minute, second) = (rest / 3_600, rest / 60 % 60, rest % 60);
    let millis = since.subsec_millis();
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{millis:03}Z")
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use serde_json::json;

    use super::*;

    fn told(count: u64) -> Events {
        let events = Events::default();
        (1..=count).for_each(|n| {
            events.tell(Happened::CopyMade, "image i", n, json!({ "number": n }));
        });
        events
    }

    fn after(events: &Events, seq: u64) -> Page {
        events.after(Mark { seq: Some(seq), boot: None }, usize::MAX)
    }

    #[test]
    fn events_are_numbered_and_told_from_where_one_was() {
        let events = told(3);
        let page = after(&events, 1);
        assert_eq!(page.events.iter().map(|it| it.seq).collect::<Vec<_>>(), [2, 3]);
        assert_eq!((page.last, page.gap), (3, None));
        assert_eq!(page.events[0].details, json!({ "number": 2 }));
        assert!(after(&events, 3).events.is_empty());
        assert_eq!(events.after(Mark { seq: Some(0), boot: None }, 2).events.len(), 2);
        assert_eq!(events.after(Mark::default(), usize::MAX).events.len(), 3);
        let count = |kind| events.counts().into_iter().find(|it| it.0 == kind).unwrap().1;
        assert_eq!((count(Happened::CopyMade), count(Happened::Fsck)), (3, 0));
    }

    #[test]
    fn memory_is_bounded_and_a_gap_is_told() {
        let events = told(RING as u64 + 10);
        let page = events.after(Mark::default(), usize::MAX);
        assert_eq!((page.events.len(), page.events[0].seq, page.gap), (RING, 11, None));
        let lost = |lost| Some(Gap { reason: Missed::Overrun, lost: Some(lost) });
        assert_eq!(after(&events, 0).gap, lost(10));
        assert_eq!(after(&events, 9).gap, lost(1));
        assert_eq!(after(&events, 10).gap, None);
        assert_eq!(after(&events, 9).events.len(), RING);
        events.tell(Happened::Fsck, "ü".repeat(5000), "x".repeat(5000), json!({}));
        let last = after(&events, RING as u64 + 10).events.remove(0);
        assert!(last.object.len() <= MESSAGE_MAX + 3 && last.message.len() <= MESSAGE_MAX + 3);
    }

    #[test]
    fn who_heard_another_daemon_is_told_that_it_was_started_again() {
        let (before, events) = (told(5), told(7));
        let restarted = Some(Gap { reason: Missed::Restarted, lost: None });
        let boot = before.after(Mark::default(), 1).boot;
        let page = events.after(Mark { seq: Some(5), boot: Some(boot) }, usize::MAX);
        assert_eq!((page.events.len(), page.gap), (7, restarted.clone()));
        assert_eq!(after(&events, 8).gap, restarted, "nothing had that number yet");
        let page = events.after(Mark { seq: Some(5), boot: Some(events.boot) }, usize::MAX);
        assert_eq!((page.events.len(), page.gap), (2, None));
    }

    #[tokio::test]
    async fn who_follows_is_woken() {
        let events = std::sync::Arc::new(told(1));
        let mut watch = events.watch();
        watch.borrow_and_update();
        let teller = events.clone();
        let (heard, ()) = tokio::join!(
            tokio::time::timeout(Duration::from_secs(20), watch.changed()),
            async move { teller.tell(Happened::DiskBack, "disk a", "it is back", json!({})) }
        );
        heard.unwrap().unwrap();
        assert_eq!(*watch.borrow_and_update(), 2);
        events.close();
        tokio::time::timeout(Duration::from_secs(20), watch.changed()).await.unwrap().unwrap();
        assert!(events.is_closed());
    }

    #[test]
    fn failures_are_told_and_refusals_are_not() {
        let events = Events::default();
        events.failed("image i", "import", &Error::new(Kind::Exists, "there is one"));
        assert!(after(&events, 0).events.is_empty());
        events.failed("image i", "import", &Error::new(Kind::NoSpace, "disk a is full"));
        let entry = after(&events, 0).events.remove(0);
        assert_eq!((entry.kind, entry.severity), (Happened::Failed, Severity::Warning));
        assert!(entry.message.starts_with("import: disk a is full"), "{}", entry.message);
    }

    #[test]
    fn kinds_are_called_as_json_calls_them() {
        for (at, kind) in Happened::ALL.into_iter().enumerate() {
            assert_eq!(kind as usize, at);
            assert_eq!(serde_json::to_value(kind).unwrap(), kind.word());
        }
    }

    #[test]
    fn times_are_written_as_rfc_3339_has_them() {
        let at =
            |seconds, millis: u32| rfc3339(UNIX_EPOCH + Duration::new(seconds, millis * 1_000_000));
        assert_eq!(at(0, 0), "1970-01-01T00:00:00.000Z");
        assert_eq!(at(951_782_400, 7), "2000-02-29T00:00:00.007Z");
        assert_eq!(at(1_767_225_599, 999), "2025-12-31T23:59:59.999Z");
    }
}
