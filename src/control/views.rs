//! The views of images that replicas have: one for each disk and image, shared by all replicas of that
//! disk on that image. It stays while the daemon runs: what was promoted to the disk belongs to it.

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, Weak,
        atomic::{AtomicBool, Ordering},
    },
};

use crate::{
    blockdev::BaseImage,
    catalog::{Digest, Name},
    histogram::Counts,
    io::Ring,
    promote::View,
};

/// An image's copy, open.
pub type Base = BaseImage<Ring>;

/// All views of a node.
#[derive(Default)]
pub struct Views(Mutex<HashMap<(Name, Digest), Arc<Seat>>>);

/// An image and a disk whose replicas read it.
pub struct Seat {
    /// The disk.
    pub disk: Name,
    /// The image.
    pub digest: Digest,
    /// The image's bytes.
    pub size: u64,
    /// What the replicas read through.
    pub view: Arc<View<Ring>>,
    copy: Mutex<Weak<Base>>,
    /// What of the demand was told already.
    told: Mutex<News>,
    /// Whether somebody knows that its cache was given up.
    given_up: AtomicBool,
}

/// Reads, as long as they took.
#[derive(Default)]
pub struct News {
    /// Of the image's copy.
    pub copy: Counts,
    /// Of the disk's own: of its cache, and of what its replicas wrote.
    pub local: Counts,
}

impl Seat {
    /// Whether its cache was given up since this was asked last.
    pub fn is_given_up(&self) -> bool {
        let closed = self.view.cache().is_some_and(|cache| cache.is_closed());
        closed && !self.given_up.swap(true, Ordering::Relaxed)
    }

    /// What was read since this was asked last.
    pub fn news(&self) -> News {
        let demand = &self.view.demand;
        let mut local = demand.cache.counts();
        local.add(&demand.overlay.counts());
        let now = News { copy: demand.copy.counts(), local };
        let mut told = locked(&self.told);
        let news = News { copy: now.copy.since(&told.copy), local: now.local.since(&told.local) };
        *told = now;
        news
    }

    /// The disk of the copy that the replicas read, while any of them is open.
    pub fn copy_disk(&self) -> Option<Name> {
        self.copy()?.disk()?.parse().ok()
    }

    /// The copy that the replicas read, while any of them is open.
    pub fn copy(&self) -> Option<Arc<Base>> {
        locked(&self.copy).upgrade()
    }
}

impl Views {
    /// The view that replicas on `disk` have of the image `digest`, whose open copy is `copy`.
    pub fn of(&self, disk: &Name, digest: Digest, copy: &Arc<Base>) -> Arc<View<Ring>> {
        let seat = self.seat(disk, digest, crate::cow::Base::<Ring>::size(&**copy));
        *locked(&seat.copy) = Arc::downgrade(copy);
        seat.view.clone()
    }

    /// The seat of `disk` and the image `digest` of `size` bytes.
    pub fn seat(&self, disk: &Name, digest: Digest, size: u64) -> Arc<Seat> {
        let made = || Seat {
            disk: disk.clone(),
            digest,
            size,
            view: Arc::new(View::new(size)),
            copy: Mutex::default(),
            told: Mutex::default(),
            given_up: AtomicBool::new(false),
        };
        let mut seats = locked(&self.0);
        let seat = seats.entry((disk.clone(), digest)).or_insert_with(|| Arc::new(made()));
        if seat.view.cache().is_some_and(|cache| cache.is_closed()) {
            // It was given up with its disk, and that is back.
            *seat = Arc::new(made());
        }
        seat.clone()
    }

    /// All of them, in no order.
    pub fn all(&self) -> Vec<Arc<Seat>> {
        locked(&self.0).values().cloned().collect()
    }

    /// Forgets what has to do with a disk or an image that is gone.
    pub fn retain(&self, stays: impl Fn(&Seat) -> bool) {
        locked(&self.0).retain(|_, seat| stays(seat));
    }
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Nothing here panics half way through a change.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
