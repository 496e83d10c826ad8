//! One disk's share of promotion: its policy, its mover, and what the policy is told.

use std::{
    collections::HashMap,
    sync::Arc,
    time::{Duration, Instant},
};

use uuid::Uuid;

use super::mover::{Mover, Outcome};
use crate::{
    catalog::{Digest, DiskState, DiskStatus, Survey},
    control::{
        api::CacheFigures,
        views::{Seat, Views},
    },
    error::Result,
    promote::{Decisions, Key, Policy, Settings, Tick, Touch, gain::CopyLatency},
    units::CHUNK,
};

/// Of each disk this much stays free of promoted chunks, whatever they may take: one part in twenty.
const RESERVE: u64 = 20;

/// Images by the handles that policies know them by.
#[derive(Default)]
pub struct Images {
    handles: HashMap<Digest, u32>,
    known: Vec<(Digest, u64)>,
}

impl Images {
    /// The handle of an image of `size` bytes.
    pub fn handle(&mut self, digest: Digest, size: u64) -> u32 {
        *self.handles.entry(digest).or_insert_with(|| {
            self.known.push((digest, size));
            // As many as a process can have met.
            self.known.len() as u32 - 1
        })
    }

    /// The handle of an image, if it has one.
    pub fn find(&self, digest: Digest) -> Option<u32> {
        self.handles.get(&digest).copied()
    }

    /// The digest and the size of the image of a handle.
    pub fn of(&self, handle: u32) -> Option<(Digest, u64)> {
        self.known.get(handle as usize).copied()
    }
}

/// A disk that promotes.
pub struct Plan {
    /// The disk's identity.
    pub id: Uuid,
    /// Whether the policy knows what is pinned.
    pub pins: PinsTold,
    /// Decides.
    pub policy: Policy,
    /// Carries out.
    pub mover: Mover,
    /// What the cache may take now, in bytes.
    pub limit: u64,
    /// Why nothing is promoted, if so.
    pub off: Option<String>,
    /// What the cache took when the disk was looked at.
    stored: u64,
    /// Bytes free for the cache, beyond what must stay free.
    free: u64,
    /// Whether the disk ever told how it is: nothing leaves the cache until then.
    seen: bool,
    /// Chunks that readers found to be wrong, or could not read.
    dropped: u64,
    /// Those of caches that were given up.
    dropped_before: u64,
}

/// Whether a policy knows what is pinned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PinsTold {
    /// It is to be told, not before this.
    Not(Instant),
    /// Somebody finds out which chunks these are.
    Soon,
    /// It knows.
    All,
}

/// What replicas of one disk read of one image in a tick, and how fast its copy is.
pub struct Reads {
    /// The image's handle.
    pub image: u32,
    /// Reads of the copy that reached the device.
    pub touches: Vec<Touch>,
    /// Reads of the cache.
    pub hits: Vec<Touch>,
    /// Nanoseconds of a read from the copy, if it is known.
    pub copy: Option<u64>,
}

impl Plan {
    /// A plan for the disk of this id, carried out by `mover`.
    pub fn new(id: Uuid, mover: Mover) -> Result<Plan> {
        let policy = Policy::new(Settings::default())?;
        Ok(Plan {
            id,
            pins: PinsTold::Not(Instant::now()),
            policy,
            mover,
            limit: 0,
            off: None,
            stored: 0,
            free: 0,
            seen: false,
            dropped: 0,
            dropped_before: 0,
        })
    }

    /// Takes in how the disk is, by what it told a moment ago: `percent` of it is for the cache, unless
    /// it says otherwise.
    pub fn look_at(&mut self, disk: &DiskStatus, told: Option<&Survey>, percent: u64) {
        let Some(told) = told else {
            // It keeps what it has, and gets no more.
            self.free = 0;
            return;
        };
        self.seen = true;
        let share = told.total_bytes / 100 * percent;
        let reserve = told.total_bytes / RESERVE;
        // Where less than the reserve is free, the cache gives way to whatever else needs the space.
        let room = (self.stored + told.free_bytes).saturating_sub(reserve);
        self.limit = disk.cache_bytes.unwrap_or(share).min(room);
        self.free = told.free_bytes.saturating_sub(reserve);
        self.off = match disk.state {
            DiskState::Present if disk.cache_bytes.unwrap_or(share) < CHUNK => {
                Some("its cache is switched off".to_owned())
            }
            DiskState::Present => None,
            _ => {
                Some(disk.reason.clone().unwrap_or_else(|| "the disk can't be written".to_owned()))
            }
        };
        if self.off.is_some() {
            self.limit = 0;
        }
    }

    /// Takes in what became of earlier orders.
    pub fn hear(&mut self, images: &mut Images, views: &Views) {
        for (seat, chunk, outcome) in self.mover.outcomes() {
            if !views.holds(&seat) {
                // Of an image that is gone, and was forgotten.
                continue;
            }
            let key = Key { image: images.handle(seat.digest, seat.size), chunk };
            // Its cache may have been given up since, or the chunk doubted.
            let here = seat.view.cache().is_some_and(|cache| cache.is_stored(chunk));
            match outcome {
                Outcome::Promoted if here => self.policy.promoted(key),
                Outcome::Found if here => self.policy.adopt(key),
                Outcome::Promoted | Outcome::Failed => self.policy.failed(key),
                Outcome::Found => {}
                Outcome::Gone => self.policy.dropped(key),
            }
        }
    }

    /// Takes in how the caches of its disk are: how full, and whether one has failed.
    pub fn look_into(&mut self, seats: &[&Arc<Seat>], images: &Images) {
        for seat in seats {
            if let Some(cache) = seat.failed_cache() {
                self.dropped_before += cache.doubts();
                images.find(seat.digest).into_iter().for_each(|image| self.policy.lost(image));
            }
        }
        let caches = || seats.iter().filter_map(|seat| seat.view.cache());
        self.stored = caches().map(|cache| cache.stored()).sum::<u64>() * CHUNK;
        self.dropped = self.dropped_before + caches().map(|cache| cache.doubts()).sum::<u64>();
    }

    /// Decides, of what was read in `elapsed` by replicas of this disk, whose own reads take `local`
    /// nanoseconds.
    pub fn decide(
        &mut self,
        elapsed: Duration,
        reads: &[Reads],
        local: u64,
        rate: u64,
    ) -> Decisions {
        let all = |of: fn(&Reads) -> &Vec<Touch>| reads.iter().flat_map(of).copied().collect();
        let (touches, hits): (Vec<_>, Vec<_>) = (all(|it| &it.touches), all(|it| &it.hits));
        let copies =
            reads.iter().filter_map(|it| Some(CopyLatency { image: it.image, nanos: it.copy? }));
        let copies: Vec<CopyLatency> = copies.collect();
        self.policy.tick(&Tick {
            elapsed,
            touches: &touches,
            hits: &hits,
            copies: &copies,
            local,
            capacity: if self.seen { self.limit } else { u64::MAX },
            free: self.free,
            // While the mover works on an earlier order, no other is made.
            budget: if self.mover.is_free() { rate } else { 0 },
        })
    }

    /// What was done so far.
    pub fn figures(&self) -> CacheFigures {
        let totals = self.policy.totals();
        CacheFigures {
            promoted: totals.promoted,
            promoted_bytes: totals.written,
            evicted: totals.evicted,
            failed: totals.failed,
            dropped: self.dropped,
            saved_seconds: totals.saved as f64 / 1e9,
            saved_ms_per_mib: totals.saved_per_mib().unwrap_or(0.0),
        }
    }
}
