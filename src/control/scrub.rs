//! The scrub: every copy is read whole and compared with its sums from time to time, slowly, and only
//! while nobody else reads its disk. What it finds unsound is mended as what readers find is.
//!
//! Invariant: one chunk is under way at a time, on the node as a whole.

use std::{
    sync::{
        Arc, Mutex, PoisonError, Weak,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use serde_json::json;

use crate::{
    catalog::{Digest, Name, Node, Scrubbed},
    control::{bases::Bases, events::Happened, service::blocking, views::Base},
    error::{Error, Kind, Result},
    io::{Ring, Rings},
    source::Copy,
    units::{self, CHUNK, Chunk},
};

/// How often it is looked whether a copy is due.
const LOOK: Duration = Duration::from_secs(60);
/// How long a chunk waits for its disk to be idle: some progress is made on a disk that never is.
const YIELD: Duration = Duration::from_millis(250);
/// Between two looks at whether a disk is idle.
const STEP: Duration = Duration::from_millis(10);

/// The scrub of a node.
pub struct Scrub {
    node: Node,
    bases: Arc<Bases>,
    rings: Arc<Rings>,
    /// How old a copy's last scrub may become.
    period: Duration,
    /// Bytes a second.
    rate: u64,
    /// What is being read, and how far it is.
    now: Mutex<Option<Scrubbing>>,
    bytes: AtomicU64,
    unsound: AtomicU64,
}

/// A scrub under way.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Scrubbing {
    /// The image.
    pub digest: Digest,
    /// The disk that the copy is on.
    pub disk: Name,
    /// Bytes of the image that are behind it, and in all.
    pub done: (u64, u64),
}

impl Scrub {
    /// Scrubs each copy once in `period`, never if that is zero, at `rate` bytes a second.
    pub fn start(
        node: Node,
        bases: Arc<Bases>,
        rings: Arc<Rings>,
        period: Duration,
        rate: u64,
    ) -> Arc<Scrub> {
        let (now, bytes, unsound) = Default::default();
        let scrub = Arc::new(Scrub { node, bases, rings, period, rate, now, bytes, unsound });
        if !period.is_zero() {
            tokio::spawn(scrub_for_ever(Arc::downgrade(&scrub)));
        }
        scrub
    }

    /// What is being read right now.
    pub fn now(&self) -> Option<Scrubbing> {
        self.now.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Bytes that were read, and chunks that were found unsound.
    pub fn figures(&self) -> (u64, u64) {
        (self.bytes.load(Ordering::Relaxed), self.unsound.load(Ordering::Relaxed))
    }

    /// Scrubs the copy that has waited longest, if one is due.
    async fn one(self: &Arc<Self>) -> Result<bool> {
        let (node, period) = (self.node.clone(), self.period);
        let due = blocking(move || Ok(due(node.all_ready_copies(), &node.scrubbed()?, period)));
        let Some((digest, disk)) = due.await? else { return Ok(false) };
        let base = self.bases.base(digest).await?;
        let copies = base.sources().copies();
        let copy = copies.iter().find(|copy| copy.disk().name() == disk.as_str()).cloned();
        let (events, object) = (self.bases.events().clone(), self.bases.called(digest));
        let details = json!({ "digest": digest, "disk": disk });
        let message = format!("its copy on disk {disk} is being read whole");
        events.tell(Happened::ScrubBegun, &object, message, details);
        let before = self.figures().0;
        let bad = match copy {
            Some(copy) => self.copy(digest, &disk, &base, &copy).await,
            // It could not be opened; it is looked at again when its time has come.
            None => Err(Error::new(Kind::Unavailable, format!("disk {disk}: its copy is gone"))),
        };
        self.set_now(None);
        let message = match &bad {
            Ok(0) => format!("its copy on disk {disk} is sound"),
            Ok(bad) => format!("{bad} chunks of its copy on disk {disk} are unsound"),
            Err(error) => format!("its copy on disk {disk} was not read whole: {error}"),
        };
        let details = json!({
            "digest": digest, "disk": disk, "bytes": self.figures().0 - before,
            "bad": bad.as_ref().ok(), "error": bad.as_ref().err().map(Error::kind),
        });
        events.tell(Happened::ScrubEnded, &object, message, details);
        let done = Scrubbed { digest, disk, at: now(), bad: bad.unwrap_or(0) };
        let node = self.node.clone();
        blocking(move || node.record_scrubbed(done)).await?;
        Ok(true)
    }

    async fn copy(
        &self,
        digest: Digest,
        disk: &Name,
        base: &Arc<Base>,
        copy: &Arc<Copy<Ring>>,
    ) -> Result<u64> {
        let image = base.sources().image();
        let (mut bad, mut failed) = (0, 0);
        for chunk in (0..units::chunks(image.size)).map(Chunk) {
            if image.crc(chunk).is_none() {
                continue;
            }
            let done = (chunk.offset(), image.size);
            self.set_now(Some(Scrubbing { digest, disk: disk.clone(), done }));
            self.wait_until_idle(copy).await;
            if copy.disk().trouble().is_some() {
                let what = format!("disk {disk} is in trouble");
                return Err(Error::new(Kind::Unavailable, what));
            }
            let started = tokio::time::Instant::now();
            let (of, examined) = (base.clone(), copy.clone());
            let examine = self.rings.run(self.rings.pick(), move |ring| async move {
                examined.examine(&ring, of.sources().image(), chunk).await
            });
            let gone = || Error::new(Kind::Unavailable, "the I/O thread is gone");
            if let Err(error) = examine.await.ok_or_else(gone)? {
                bad += 1;
                failed += u64::from(error.kind() != Kind::Corrupt);
                self.unsound.fetch_add(1, Ordering::Relaxed);
                tracing::debug!(image = %digest, %disk, chunk = chunk.0, %error, "unsound");
            }
            let len = image.len_of(chunk) as u64;
            self.bytes.fetch_add(len, Ordering::Relaxed);
            let whole = Duration::from_secs_f64(CHUNK as f64 / self.rate.max(1) as f64);
            tokio::time::sleep_until(started + whole).await;
        }
        if failed > 0 {
            tracing::debug!(image = %digest, %disk, failed, "chunks could not be read");
        }
        Ok(bad)
    }

    /// Waits until nobody reads the disk, or long enough.
    async fn wait_until_idle(&self, copy: &Copy<Ring>) {
        let mut waited = Duration::ZERO;
        while waited < YIELD {
            let (begun, ended) = copy.disk().begun_and_ended();
            tokio::time::sleep(STEP).await;
            if begun == ended && copy.disk().begun_and_ended() == (begun, ended) {
                return;
            }
            waited += STEP;
        }
    }

    fn set_now(&self, now: Option<Scrubbing>) {
        *self.now.lock().unwrap_or_else(PoisonError::into_inner) = now;
    }
}

/// Of all copies the one whose last scrub (or else its making) is the longest ago, if that is longer than
/// `period`.
fn due(
    copies: Vec<(Digest, Name, u64)>,
    scrubbed: &[Scrubbed],
    period: Duration,
) -> Option<(Digest, Name)> {
    let last = |(digest, disk, made): &(Digest, Name, u64)| {
        let found = scrubbed.iter().find(|it| it.digest == *digest && it.disk == *disk);
        found.map_or(*made, |it| it.at)
    };
    let oldest = copies.into_iter().min_by_key(last)?;
    let is_due = last(&oldest).saturating_add(period.as_secs()) <= now();
    is_due.then_some((oldest.0, oldest.1))
}

fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

async fn scrub_for_ever(scrub: Weak<Scrub>) {
    loop {
        let Some(scrub) = scrub.upgrade() else { return };
        let more = scrub.one().await.unwrap_or_else(|error| {
            tracing::warn!(%error, "the scrub");
            false
        });
        drop(scrub);
        if !more {
            tokio::time::sleep(LOOK).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_has_waited_longest_is_next() {
        let name = |name: &str| name.parse::<Name>().unwrap();
        let copy = |byte, disk, ago| (Digest([byte; 32]), name(disk), now() - ago);
        let at = |byte, disk, ago| {
            let (digest, disk, _) = copy(byte, disk, 0);
            Scrubbed { digest, disk, at: now() - ago, bad: 0 }
        };
        let next = |copies: &[(Digest, Name, u64)], done: &[Scrubbed], hours: u64| {
            let next = due(copies.to_vec(), done, Duration::from_secs(hours * 3600));
            next.map(|(digest, disk)| (digest.0[0], disk.to_string()))
        };
        let copies = [copy(1, "a", 9000), copy(1, "b", 9000), copy(2, "a", 20_000)];
        let done = [at(1, "a", 4000), at(1, "b", 7000), at(2, "a", 10), at(3, "a", 99_999)];
        assert_eq!(next(&copies, &done, 1), Some((1, "b".to_owned())));
        assert_eq!(next(&copies, &done[..2], 1), Some((2, "a".to_owned())), "never scrubbed");
        assert_eq!(next(&copies, &done, 2), None);
        assert_eq!(next(&[], &done, 1), None);
        assert_eq!(next(&[copy(4, "a", 10)], &[], 1), None, "it was made a moment ago");
    }
}
