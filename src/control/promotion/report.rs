//! What the agent reported last: of each disk, and which chunks of which copies reached the device.

use std::{
    collections::HashMap,
    time::{Duration, Instant},
};

use crate::{
    catalog::{Digest, Name},
    control::api::{Origin, SignalView},
    units::Chunk,
};

/// How old a report may be to count.
const FRESH: Duration = Duration::from_secs(4);
/// Ticks that a chunk's device read is remembered: a read's two sides are told in different ticks.
const REMEMBERED: u64 = 3;

/// What the probes tell.
pub struct Probes {
    /// Why there are none, if so.
    reason: String,
    heard: Option<Instant>,
    agent: u32,
    cost: Option<u64>,
    disks: HashMap<Name, Probed>,
    /// By copy (image and disk): the chunks whose reads reached the device, and in which tick.
    chunks: HashMap<(Digest, Name), HashMap<Chunk, u64>>,
    tick: u64,
}

/// A disk as the probes saw it in the last second.
#[derive(Clone, Copy, Debug, Default)]
pub struct Probed {
    /// Device reads of this daemon.
    pub own: u64,
    /// Device reads of everybody else.
    pub foreign: u64,
    /// Requests in flight.
    pub in_flight: u64,
    /// The age of the oldest of these.
    pub oldest_seconds: f64,
    /// Mean time that requests waited before the device had them.
    pub queue_seconds: f64,
}

impl Probes {
    /// No agent has reported, because of `reason`.
    pub fn none(reason: impl Into<String>) -> Probes {
        Probes {
            reason: reason.into(),
            heard: None,
            agent: 0,
            cost: None,
            disks: HashMap::new(),
            chunks: HashMap::new(),
            tick: 0,
        }
    }

    /// Whether an agent reports.
    pub fn is_live(&self) -> bool {
        self.heard.is_some_and(|at| at.elapsed() < FRESH)
    }

    /// A tick begins: what is old is forgotten.
    pub fn tick(&mut self) {
        self.tick += 1;
        let oldest = self.tick.saturating_sub(REMEMBERED);
        self.chunks.retain(|_, chunks| {
            chunks.retain(|_, tick| *tick >= oldest);
            !chunks.is_empty()
        });
    }

    /// Whether a read of this chunk of the copy on `disk` reached the device of late; `None` if the
    /// probes can't tell.
    pub fn saw(&self, digest: Digest, disk: &Name, chunk: Chunk) -> Option<bool> {
        if !self.is_live() {
            return None;
        }
        Some(self.chunks.get(&(digest, disk.clone()))?.contains_key(&chunk))
    }

    /// The disk as it was in the last second.
    pub fn of(&self, disk: &Name) -> Option<Probed> {
        self.disks.get(disk).copied().filter(|_| self.is_live())
    }

    /// Where figures are from.
    pub fn view(&self) -> SignalView {
        match self.is_live() {
            true => SignalView {
                source: Origin::Probes,
                reason: None,
                agent: Some(self.agent),
                cost_nanos: self.cost,
            },
            false => SignalView {
                source: Origin::Timing,
                reason: Some(self.reason.clone()),
                agent: None,
                cost_nanos: None,
            },
        }
    }
}
