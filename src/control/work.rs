//! Imports and verifications, as the service runs them: prepared, then begun with a [`Job`].
//!
//! Preparing tells what is wrong with the request itself, before any content is read. What was
//! prepared and never begun leaves nothing behind.

use std::{
    cmp::Reverse,
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};

use crate::{
    catalog::{
        Digest, DiskState, DiskStatus, ImageMeta, Name, OpenCopy, ReplicaStatus, StagedCopy,
    },
    control::{
        api::{Drained, ImageView, MovedReplica, ProfileView, Reworked, Verification},
        event::Progress,
        job::Job,
        moves::Course,
        promotion::Promotion,
        service::Service,
    },
    error::{Error, Kind, Result},
    image::{self, ChunkTable, Format, ImportRequest, Source},
    units::CHUNK,
};

/// Damaged chunks that a verification names.
const BAD_TOLD: usize = 1000;
/// Bytes that stay free on a disk that takes a replica from another.
const SPARE: u64 = 64 << 20;

/// An import that can begin.
pub struct Import {
    pub(super) service: Arc<Service>,
    pub(super) name: Name,
    pub(super) format: Format,
    pub(super) sha256: Option<Digest>,
    pub(super) staged: StagedCopy,
}

impl Import {
    /// Reads `source` to its end and publishes what it holds. Blocks.
    pub fn import(self, source: Source, job: &Job) -> Result<ImageView> {
        let started = Instant::now();
        let request = ImportRequest {
            name: self.name.to_string(),
            source,
            format: self.format,
            sha256: self.sha256,
        };
        let report = |progress| job.report(Progress::from(progress));
        let imported = image::import(request, self.staged.path(), &report, job.cancel())?;
        let status = self.staged.publish(ImageMeta {
            name: self.name.clone(),
            digest: imported.digest,
            size: imported.size,
            source: imported.source,
            source_sha256: imported.source_sha256,
        })?;
        tracing::info!(
            image = %self.name, digest = %status.digest, ms = started.elapsed().as_millis(),
            "image imported"
        );
        Ok(self.service.image_view(status))
    }
}

/// A verification that can begin.
pub struct Verify {
    pub(super) name: Name,
    pub(super) copy: OpenCopy,
}

impl Verify {
    /// Reads the image to its end. Blocks.
    pub fn run(self, job: &Job) -> Result<Verification> {
        let what = format!("image {}", self.name);
        let table = ChunkTable::load(&self.copy.chunks, &format!("the chunk table of {what}"))?;
        let report = |progress| job.report(Progress::from(progress));
        let found = image::verify(&self.copy.data, &table, &what, &report, job.cancel())?;
        Ok(Verification {
            image: self.name.into(),
            digest: self.copy.digest.to_string(),
            sound: found.is_sound(),
            bytes: found.bytes,
            chunks: found.chunks,
            bad: found.bad.len() as u64,
            bad_chunks: found.bad.into_iter().take(BAD_TOLD).collect(),
        })
    }
}

impl From<image::Progress> for Progress {
    fn from(progress: image::Progress) -> Progress {
        let phase = match progress.phase {
            image::Phase::Receiving => "receiving",
            image::Phase::Importing => "importing",
            image::Phase::Syncing => "syncing",
            image::Phase::Verifying => "verifying",
        };
        Progress {
            phase: phase.to_owned(),
            done_bytes: progress.done_bytes,
            total_bytes: progress.total_bytes,
            source_bytes: progress.source_bytes,
        }
    }
}

/// Work on a replica in use that can begin.
pub struct Rework {
    pub(super) service: Arc<Service>,
    pub(super) replica: ReplicaStatus,
    pub(super) what: What,
    /// Bytes a second; 0 for no bound.
    pub(super) rate: u64,
}

/// What is done to a replica.
pub enum What {
    /// It moves to this disk.
    Move(Name),
    /// It is freed of its image.
    Flatten,
}

impl Rework {
    /// Does it, to its end. Blocks.
    pub fn run(self, job: &Job) -> Result<Reworked> {
        tokio::runtime::Handle::current().block_on(self.work(job))
    }

    async fn work(self, job: &Job) -> Result<Reworked> {
        let Rework { service, replica, what, rate } = self;
        let exports = service.exports();
        let phase = match &what {
            What::Move(disk) => format!("moving to {disk}"),
            What::Flatten => "copying the image".to_owned(),
        };
        let mut course = Course::new(job, phase, rate);
        let (copied_bytes, paused) = match what {
            What::Move(disk) => {
                let moved = exports.move_replica(&replica, &disk, &mut course).await?;
                (moved.copied, moved.paused)
            }
            What::Flatten => {
                (exports.flatten_replica(&replica, &mut course).await?, Duration::ZERO)
            }
        };
        let replica = service.replica(replica.id.to_string().parse()?).await?;
        Ok(Reworked { replica, copied_bytes, paused_ms: paused.as_secs_f64() * 1000.0 })
    }
}

/// The emptying of a disk that can begin.
pub struct DrainDisk {
    pub(super) service: Arc<Service>,
    pub(super) disk: Name,
    /// The disks that may take what is on it; any if there are none.
    pub(super) to: Vec<Name>,
    pub(super) rate: u64,
}

impl DrainDisk {
    /// Moves every replica away. What was moved before it was given up stays moved. Blocks.
    pub fn run(self, job: &Job) -> Result<Drained> {
        tokio::runtime::Handle::current().block_on(self.work(job))
    }

    async fn work(self, job: &Job) -> Result<Drained> {
        let DrainDisk { service, disk, to, rate } = self;
        service.set_draining(&disk, true).await?;
        let replicas = service.replicas().await?;
        let on_it: Vec<_> =
            replicas.into_iter().map(|view| view.status).filter(|it| it.disk == disk).collect();
        let (count, mut moved) = (on_it.len(), Vec::new());
        for (number, replica) in (1..).zip(on_it) {
            let disks = service.disks().await?;
            let target = target_of(&disks, &disk, &to, replica.stored_bytes)
                .map_err(|error| error.within(format!("replica {}", replica.name)))?;
            let phase = format!("{number} of {count}: {} to {target}", replica.name);
            let mut course = Course::new(job, phase, rate);
            course.check()?;
            let done = service.exports().move_replica(&replica, &target, &mut course).await?;
            moved.push(MovedReplica {
                name: replica.name.to_string(),
                disk: target.to_string(),
                copied_bytes: done.copied,
                paused_ms: done.paused.as_secs_f64() * 1000.0,
            });
        }
        Ok(Drained { disk: service.release_copies(&disk).await?, moved })
    }
}

/// Which disk takes a replica of `bytes` that leaves `from`: of the same tier before others, one that
/// does not fail with it before those that do, then the one with most free space. Pure.
fn target_of(disks: &[DiskStatus], from: &Name, allowed: &[Name], bytes: u64) -> Result<Name> {
    let home = disks.iter().find(|disk| disk.name == *from);
    let tier = home.and_then(|disk| disk.tier);
    let room = bytes.saturating_add(bytes / 16).saturating_add(SPARE);
    let fit = disks.iter().filter(|disk| {
        disk.name != *from
            && (allowed.is_empty() || allowed.contains(&disk.name))
            && disk.state == DiskState::Present
            && !disk.pool
            && !disk.draining
            && disk.free_bytes >= room
    });
    let best = fit.max_by_key(|disk| {
        let apart = !disk.fails_with.contains(from);
        (disk.tier == tier, apart, disk.free_bytes, Reverse(disk.name.clone()))
    });
    best.map(|disk| disk.name.clone()).ok_or_else(|| {
        let what = format!(
            "no disk can take it from disk {from}: it needs {room} bytes on one that is there, takes \
             replicas and is not drained itself; free some, or add one"
        );
        Error::new(Kind::NoSpace, what)
    })
}

/// A recording that has begun.
pub struct Recording {
    pub(super) promotion: Arc<Promotion>,
    pub(super) digest: Digest,
    pub(super) length: Duration,
}

impl Recording {
    /// Waits until it has its length, or is told to stop, and keeps what was read. Blocks.
    pub fn run(self, job: &Job) -> Result<ProfileView> {
        let started = Instant::now();
        while started.elapsed() < self.length && !job.cancel().load(Ordering::Acquire) {
            let left = self.length.saturating_sub(started.elapsed());
            std::thread::sleep(left.min(Duration::from_millis(100)));
            let bytes = self.promotion.recorded(self.digest) as u64 * CHUNK;
            job.report(Progress {
                phase: format!("recording, {} s left", left.as_secs()),
                done_bytes: bytes,
                total_bytes: None,
                source_bytes: 0,
            });
        }
        self.promotion.end_recording(self.digest)
    }
}

impl Drop for Recording {
    fn drop(&mut self) {
        // One that never ran must not go on for ever.
        self.promotion.drop_recording(self.digest);
    }
}
