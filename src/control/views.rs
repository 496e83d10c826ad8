//! The views of images that replicas have: one for each disk and image, shared by all replicas of that
//! disk on that image. It stays for as long as the node knows disk and image: its cache may be given up and
//! opened anew, the replicas that are open see it.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
    time::{Duration, Instant},
};

use crate::{
    blockdev::BaseImage,
    catalog::{Digest, Name},
    error::{Error, Kind, Result},
    histogram::Counts,
    io::Ring,
    promote::{Cache, View},
};

/// How long a cache that failed is left alone.
const REST: Duration = Duration::from_secs(60);

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
    /// When its cache failed.
    failed: Mutex<Option<Instant>>,
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
    /// Its cache, if that failed since this was asked last. It is given up now, for a while.
    pub fn failed_cache(&self) -> Option<Arc<Cache<Ring>>> {
        self.view.cache().filter(|cache| cache.is_closed())?;
        *locked(&self.failed) = Some(Instant::now());
        self.view.give_up()
    }

    /// Refuses to open a cache that failed a moment ago, or that somebody still holds.
    pub fn check_vacant(&self) -> Result<()> {
        let resting = locked(&self.failed).is_some_and(|failed| failed.elapsed() < REST);
        if resting || !self.view.is_vacant() {
            let why = if resting { "it failed a moment ago" } else { "it is still being read" };
            return Err(Error::new(Kind::Unavailable, why));
        }
        Ok(())
    }

    /// Whether the disk has a copy of the image itself, as far as those know that are open.
    pub fn has_copy_here(&self) -> bool {
        self.copy().is_some_and(|copy| {
            let copies = copy.sources().copies();
            copies.iter().any(|copy| copy.disk().name() == self.disk.as_str())
        })
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
    pub fn of(&self, disk: &Name, digest: Digest, copy: &Arc<Base>) -> Result<Arc<View<Ring>>> {
        let seat = self.seat(disk, digest, crate::cow::Base::<Ring>::size(&**copy))?;
        *locked(&seat.copy) = Arc::downgrade(copy);
        Ok(seat.view.clone())
    }

    /// The seat of `disk` and the image `digest` of `size` bytes.
    ///
    /// # Errors
    /// `Corrupt` if the image is known with another size: the digest covers it, somebody lies.
    pub fn seat(&self, disk: &Name, digest: Digest, size: u64) -> Result<Arc<Seat>> {
        let made = || Seat {
            disk: disk.clone(),
            digest,
            size,
            view: Arc::new(View::new(size)),
            copy: Mutex::default(),
            told: Mutex::default(),
            failed: Mutex::default(),
        };
        let mut seats = locked(&self.0);
        let seat = seats.entry((disk.clone(), digest)).or_insert_with(|| Arc::new(made()));
        if seat.size != size {
            let what = format!("image {digest} of {size} bytes, where it has {}", seat.size);
            return Err(Error::new(Kind::Corrupt, what));
        }
        Ok(seat.clone())
    }

    /// The seat of `disk` and the image `digest`, if there is one.
    pub fn find(&self, disk: &Name, digest: Digest) -> Option<Arc<Seat>> {
        locked(&self.0).get(&(disk.clone(), digest)).cloned()
    }

    /// Whether this is the seat of its disk and image still.
    pub fn holds(&self, seat: &Arc<Seat>) -> bool {
        self.find(&seat.disk, seat.digest).is_some_and(|other| Arc::ptr_eq(&other, seat))
    }

    /// All of them, in no order.
    pub fn all(&self) -> Vec<Arc<Seat>> {
        locked(&self.0).values().cloned().collect()
    }

    /// Forgets what has to do with a disk or an image that is gone, and gives its caches up.
    pub fn forget(&self, gone: impl Fn(&Seat) -> bool) {
        let gone = locked(&self.0).extract_if(|_, seat| gone(seat)).collect::<Vec<_>>();
        gone.into_iter().for_each(|(_, seat)| drop(seat.view.give_up()));
    }
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Nothing here panics half way through a change.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    //! Checked: one seat for a disk and an image, of one size, until it is forgotten.

    use super::*;

    #[test]
    fn a_seat_has_one_size_and_is_itself_until_it_is_forgotten() {
        let views = Views::default();
        let (a, b) = ("a".parse::<Name>().unwrap(), "b".parse::<Name>().unwrap());
        let digest = Digest([1; 32]);
        let seat = views.seat(&a, digest, 4096).unwrap();
        assert!(views.holds(&seat) && Arc::ptr_eq(&seat, &views.seat(&a, digest, 4096).unwrap()));
        assert_eq!(views.seat(&a, digest, 8192).err().unwrap().kind(), Kind::Corrupt);
        let other = views.seat(&b, digest, 4096).unwrap();
        views.forget(|seat| seat.disk == a);
        assert!(!views.holds(&seat) && views.holds(&other));
        assert!(views.find(&a, digest).is_none() && views.all().len() == 1);
        let again = views.seat(&a, digest, 4096).unwrap();
        assert!(!views.holds(&seat) && views.holds(&again), "another with the same name");
    }
}
