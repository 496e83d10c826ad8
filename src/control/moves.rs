//! Long work on replicas that are in use: moving one to another disk, and freeing one of its image.
//!
//! ```text
//!   copy      a step at a time, at a bounded rate, while guests go on; what they change is marked
//!   ready     what is lacking takes less than `REST`: made durable; the catalogue is prepared
//!   switch    requests wait: the rest, two syncs, a rename and its sync; then the new overlay serves
//!   tidy      references and the old directory, with guests at work again
//! ```
//!
//! Invariants:
//! - Given up or failed before the rename, nothing has happened.
//! - Guests wait for the switch alone. It is not begun before what is lacking takes less than `REST`, and
//!   given up when it takes longer than [`SWITCH`]; but for the rename and its sync, which take as long as
//!   the new disk takes.

use std::{
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};

use serde_json::json;
use tokio::time::timeout;

use super::{event::Progress, events::Happened, exports::Exports, job::Job, service::blocking};
use crate::{
    blockdev::{Below, Footing, Replica},
    catalog::{Leftover, Name, Node, ReplicaStatus, StagedReplica},
    cow::{Base, Overlay, Relocation},
    error::{Error, Kind, Result},
    io::Ring,
};

/// Bytes a second that a copy moves unless asked for otherwise.
pub const RATE: u64 = 256 << 20;
/// What is lacking when requests are stopped takes no longer than this, where guests allow it.
const REST: Duration = Duration::from_millis(30);
/// How often the bound of what is lacking is doubled, while guests write as fast as is copied.
const PATIENCE: u32 = 6;
/// What is lacking when requests are stopped, at most, in bytes.
const REST_BYTES: u64 = 64 << 20;
/// How long a switch may take before it is given up.
const SWITCH: Duration = Duration::from_secs(5);
/// Steps between the preparation of the catalogue and the switch, at most.
const LAST_STEPS: usize = 16;
/// Bytes between two syncs of what is copied.
const SETTLE: u64 = 256 << 20;

/// How fast the work goes, who hears of it, and who may stop it.
pub struct Course<'a> {
    job: &'a Job,
    phase: String,
    /// Bytes a second; 0 for no bound.
    rate: u64,
    began: Instant,
    /// Bytes that were copied.
    bytes: u64,
    done: u64,
}

impl<'a> Course<'a> {
    /// Work called `phase`, of at most `rate` bytes a second; 0 for as fast as it goes.
    pub fn new(job: &'a Job, phase: impl Into<String>, rate: u64) -> Course<'a> {
        Course { job, phase: phase.into(), rate, began: Instant::now(), bytes: 0, done: 0 }
    }

    /// `bytes` are done of `total`, `copied` of them by copying: tells so, and waits until more may be
    /// copied.
    pub async fn did(&mut self, bytes: u64, copied: u64, total: u64) -> Result<()> {
        self.done += bytes;
        self.bytes += copied;
        self.job.report(Progress {
            phase: self.phase.clone(),
            done_bytes: self.done,
            total_bytes: Some(total.max(self.done)),
            source_bytes: self.done,
        });
        let due = match self.rate {
            0 => Duration::ZERO,
            rate => Duration::from_secs_f64(self.bytes as f64 / rate as f64),
        };
        while let Some(early) = due.checked_sub(self.began.elapsed()).filter(|it| !it.is_zero()) {
            self.check()?;
            tokio::time::sleep(early.min(Duration::from_millis(200))).await;
        }
        self.check()
    }

    /// An error if the work is to stop.
    pub fn check(&self) -> Result<()> {
        match self.job.cancel().load(Ordering::Acquire) {
            false => Ok(()),
            true => Err(Error::new(Kind::Cancelled, "given up")),
        }
    }

    fn hurry(&mut self) {
        self.rate = 0;
    }
}

/// When a copy that is written to meanwhile is near enough to its end. Pure.
///
/// A round ends when as much was copied as was lacking when it began. One after which more than half is
/// lacking again has gained little: from the first such one on the rate is not bounded, and what may be
/// lacking in the end doubles with each.
#[derive(Debug)]
struct Approach {
    /// What was lacking when the round began, and what of it is to be copied, in bytes.
    lacking: u64,
    to_copy: u64,
    slow: u32,
}

/// What to do next.
#[derive(Debug, PartialEq, Eq)]
enum Next {
    Copy,
    Hurry,
    Switch,
    GiveUp,
}

impl Approach {
    fn new(lacking: u64) -> Approach {
        Approach { lacking, to_copy: lacking, slow: 0 }
    }

    /// A step has copied `bytes` within `took`, and `left` are lacking now.
    fn step(&mut self, bytes: u64, took: Duration, left: u64) -> Next {
        if left == 0 {
            return Next::Switch;
        }
        let rest = took.as_secs_f64() * left as f64 / bytes.max(1) as f64;
        let bound = REST.as_secs_f64() * f64::from(1 << self.slow.min(PATIENCE));
        if left <= REST_BYTES && rest <= bound {
            return Next::Switch;
        }
        self.to_copy = self.to_copy.saturating_sub(bytes);
        if self.to_copy > 0 {
            return Next::Copy;
        }
        let gained = left <= self.lacking / 2;
        (self.lacking, self.to_copy) = (left, left);
        self.slow += u32::from(!gained);
        match (gained, self.slow) {
            (true, _) => Next::Copy,
            (false, slow) if slow > 2 * PATIENCE => Next::GiveUp,
            (false, _) => Next::Hurry,
        }
    }
}

/// What a move took.
#[derive(Clone, Copy, Debug)]
pub struct Moved {
    /// Bytes that were copied.
    pub copied: u64,
    /// How long requests waited.
    pub paused: Duration,
}

impl Exports {
    /// Moves a replica to the disk `to`, in use or not.
    pub async fn move_replica(
        &self,
        status: &ReplicaStatus,
        to: &Name,
        course: &mut Course<'_>,
    ) -> Result<Moved> {
        let name = &status.name;
        let within = |error: Error| error.within(format!("replica {name}"));
        let _busy =
            self.begin(status.id, name, "it is being moved; wait for that, or interrupt it")?;
        let replica = self.open_for_work(status.clone()).await?;
        let overlay = replica.overlay();
        let (node, by, disk, size) = (self.node.clone(), name.clone(), to.clone(), overlay.size());
        let staged =
            blocking(move || node.stage_move(&by, &disk, size, Overlay::<Ring>::blank)).await?;
        let (staged, new) = self.open_staged(staged, name.clone()).await.map_err(within)?;
        let new = Arc::new(new);
        let moving = Arc::new(Relocation::begin(overlay, new.clone())?);
        let mut copied = self.approach(&moving, course, to).await.map_err(within)?;
        let staged = blocking(move || {
            let mut staged = staged;
            staged.prepare()?;
            Ok(staged)
        })
        .await?;
        let (exports, of) = (self, moving.clone());
        for _ in 0..LAST_STEPS {
            course.check()?;
            let started = Instant::now();
            let bytes = exports.copy_step(&of).await.map_err(within)?;
            copied += bytes;
            let next = Approach::new(u64::MAX).step(bytes, started.elapsed(), moving.left());
            if next == Next::Switch {
                break;
            }
        }
        let base = match replica.footing().base.copy().zip(status.digest) {
            Some((copy, digest)) => self.below(to, digest, copy)?,
            None => Below::NOTHING,
        };
        let rotational = turns(&self.node, to).await;
        let footing = Footing { overlay: new, base, rotational };
        let (paused, leftover) =
            self.switch(&replica, moving, staged, footing).await.map_err(within)?;
        let waited = paused.as_secs_f64() * 1000.0;
        let message =
            format!("moved from disk {} to {to}; requests waited {waited:.1} ms", status.disk);
        let details = json!({
            "id": status.id, "from": status.disk, "to": to, "copied_bytes": copied, "paused_ms": waited,
        });
        let object = format!("replica {name}");
        self.bases().events().tell(Happened::ReplicaMoved, object, message, details);
        blocking(move || leftover.remove()).await.unwrap_or_else(|error| {
            tracing::warn!(%error, "what a move has left stays until fsck or the next start");
        });
        Ok(Moved { copied, paused })
    }

    /// Copies until what is lacking is little.
    async fn approach(
        &self,
        moving: &Arc<Relocation<Ring>>,
        course: &mut Course<'_>,
        to: &Name,
    ) -> Result<u64> {
        let mut approach = Approach::new(moving.left());
        let (mut copied, mut unsettled) = (0, 0);
        loop {
            let started = Instant::now();
            let bytes = self.copy_step(moving).await?;
            let took = started.elapsed();
            (copied, unsettled) = (copied + bytes, unsettled + bytes);
            course.did(bytes, bytes, copied + moving.left()).await?;
            let next = approach.step(bytes, took, moving.left());
            if unsettled >= SETTLE || next == Next::Switch {
                let settled = moving.clone();
                self.run(move |ring| async move { settled.settle(&ring).await }).await?;
                unsettled = 0;
            }
            match next {
                Next::Switch => return Ok(copied),
                Next::Hurry => course.hurry(),
                Next::Copy => {}
                Next::GiveUp => {
                    return Err(Error::new(
                        Kind::InUse,
                        format!(
                            "it is written to as fast as disk {to} takes it: nothing has changed; \
                             try again while there is less to write"
                        ),
                    ));
                }
            }
        }
    }

    async fn copy_step(&self, moving: &Arc<Relocation<Ring>>) -> Result<u64> {
        let moving = moving.clone();
        self.run(move |ring| async move { moving.step(&ring).await }).await
    }

    /// Stops the requests, makes the other overlay the replica, and lets them go on. How long they
    /// waited.
    async fn switch(
        &self,
        replica: &Arc<Replica<Ring>>,
        moving: Arc<Relocation<Ring>>,
        staged: StagedReplica,
        footing: Footing<Ring>,
    ) -> Result<(Duration, Leftover)> {
        let slow = || {
            let what = "requests under way, or the new disk, took too long: nothing has changed";
            Error::new(Kind::Unavailable, what)
        };
        let (started, new) = (Instant::now(), footing.overlay.clone());
        let closed = timeout(SWITCH, replica.close()).await.map_err(|_| slow())?;
        let finishing = moving.clone();
        let finish = self.run(move |ring| async move { finishing.finish(&ring).await });
        timeout(SWITCH, finish).await.map_err(|_| slow())??;
        let leftover = blocking(move || staged.publish()).await.inspect_err(|error| {
            if error.kind() == Kind::Poisoned {
                replica.overlay().poison(error.to_string());
            }
        })?;
        new.keep_tail(self.tail(new.id()).await).await;
        closed.replace(footing);
        Ok((started.elapsed(), leftover))
    }

    /// Frees a replica of its image, in use or not; the bytes that were copied.
    pub async fn flatten_replica(
        &self,
        status: &ReplicaStatus,
        course: &mut Course<'_>,
    ) -> Result<u64> {
        let name = &status.name;
        let within = |error: Error| error.within(format!("replica {name}"));
        let _busy =
            self.begin(status.id, name, "it is being flattened; wait for that, or interrupt it")?;
        if status.digest.is_none() {
            return Err(within(Error::new(Kind::Exists, "it stands on no image already")));
        }
        let replica = self.open_for_work(status.clone()).await?;
        let total = replica.footing().base.copy().map_or(0, |copy| Base::<Ring>::size(&**copy));
        let (mut next, mut copied, mut unflushed) = (0, 0, 0);
        loop {
            let working = replica.clone();
            let step = self.run(move |ring| async move {
                let inside = working.enter().await;
                inside.overlay.flatten_step(&ring, &inside.base, next).await
            });
            let step = step.await.map_err(within)?;
            copied += step.copied;
            unflushed += step.copied;
            let looked_at = step.next.saturating_sub(next);
            if unflushed >= SETTLE || step.next >= total {
                let working = replica.clone();
                let flush = self.run(move |ring| async move {
                    working.enter().await.overlay.flush(&ring).await
                });
                flush.await.map_err(within)?;
                unflushed = 0;
            }
            next = step.next;
            course.did(looked_at, step.copied, total).await?;
            if next >= total {
                break;
            }
        }
        course.check()?;
        let (node, by) = (self.node.clone(), status.id.to_string().parse::<Name>()?);
        blocking(move || node.flatten_replica(&by)).await?;
        // From here on it is its own; what it would still read of the image is zeros.
        match timeout(SWITCH, replica.close()).await {
            Ok(closed) => {
                let footing = replica.footing();
                closed.replace(Footing { base: Below::NOTHING, ..footing });
            }
            Err(_) => tracing::warn!(replica = %name, "its image stays open until it is closed"),
        }
        let details = json!({ "id": status.id, "copied_bytes": copied });
        let (object, message) = (format!("replica {name}"), "it needs no image any more");
        self.bases().events().tell(Happened::ReplicaFlattened, object, message, details);
        Ok(copied)
    }
}

async fn turns(node: &Node, disk: &Name) -> bool {
    let (node, disk) = (node.clone(), disk.clone());
    blocking(move || Ok(super::exports::turns(&node, &disk))).await.unwrap_or(false)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Copies at `speed` bytes a millisecond while guests write `load` of them.
    fn run(lacking: u64, speed: u64, load: u64) -> (Next, u64, u32) {
        let mut approach = Approach::new(lacking);
        let mut left = lacking;
        for _ in 0..1_000_000 {
            let step = left.min(4 << 20);
            let took = Duration::from_secs_f64(step as f64 / speed as f64 / 1000.0);
            // Guests write the same over and over.
            left = left - step + (load as f64 * took.as_secs_f64() * 1000.0) as u64;
            left = left.min(lacking);
            match approach.step(step, took, left) {
                Next::Copy | Next::Hurry => {}
                end => return (end, left, approach.slow),
            }
        }
        panic!("it never ends: {approach:?}");
    }

    #[test]
    fn it_comes_near_where_it_can_and_gives_up_where_it_cannot() {
        let megabyte = 1 << 20;
        assert_eq!(run(0, megabyte, 0), (Next::Switch, 0, 0));
        // 1 GiB/s: what is lacking in the end is what 30 ms copy.
        let (end, left, slow) = run(8 << 30, megabyte, 0);
        assert!(end == Next::Switch && left <= 30 * megabyte && slow == 0, "{left}");
        let (end, left, _) = run(8 << 30, megabyte, megabyte / 2);
        assert!(end == Next::Switch && left <= 30 * megabyte, "{left}");
        assert_eq!(run(8 << 30, megabyte, 2 * megabyte).0, Next::GiveUp);
    }
}
