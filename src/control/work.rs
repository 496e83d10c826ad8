//! Imports and verifications, as the service runs them: prepared, then begun with a [`Job`].
//!
//! Preparing tells what is wrong with the request itself, before any content is read. What was
//! prepared and never begun leaves nothing behind.

use std::{
    cmp::Reverse,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::{Duration, Instant},
};

use serde_json::json;

use crate::{
    catalog::{
        COPIES_MAX, Digest, DiskState, DiskStatus, ImageMeta, Name, Origin, ReplicaStatus,
        StagedCopy, Stamp,
    },
    control::{
        api::{
            CopyVerification, Drained, ImageView, MovedReplica, ProfileView, Reworked, Verification,
        },
        copying::Order,
        event::Progress,
        events::Happened,
        job::Job,
        moves::Course,
        promotion::Promotion,
        service::Service,
    },
    error::{Error, Kind, Result},
    image::{self, ChunkTable, Format, ImportRequest, Source},
    units::{CHUNK, Chunk},
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
    /// The path of the file that it comes from, if it may be read again.
    pub(super) path: Option<PathBuf>,
}

impl Import {
    /// Reads `source` to its end and publishes what it holds. Blocks.
    pub fn import(self, source: Source, job: &Job) -> Result<ImageView> {
        let (service, object) = (self.service.clone(), format!("image {}", self.name));
        let done = self.publish(source, job);
        done.inspect_err(|error| service.events().failed(object, "import", error))
    }

    /// The source is the file at this path, which may be read again when no copy can be.
    pub fn at_path(self, path: PathBuf) -> Import {
        Import { path: Some(path), ..self }
    }

    fn publish(self, source: Source, job: &Job) -> Result<ImageView> {
        let started = Instant::now();
        let stamp = match &source {
            Source::File { file, .. } => Stamp::of(file).ok(),
            _ => None,
        };
        let request = ImportRequest {
            name: self.name.to_string(),
            source,
            format: self.format,
            sha256: self.sha256,
        };
        let report = |progress| job.report(Progress::from(progress));
        let imported = image::import(request, self.staged.path(), &report, job.cancel())?;
        let origin = self.path.zip(stamp).and_then(|(path, stamp)| {
            let content = match imported.format {
                Format::Auto => return None,
                Format::Raw => "raw",
                Format::Qcow2 => "qcow2",
                Format::Vmdk => "vmdk",
            };
            Some(Origin::new(imported.digest, path, content, stamp))
        });
        let status = self.staged.publish(ImageMeta {
            name: self.name.clone(),
            digest: imported.digest,
            size: imported.size,
            source: imported.source,
            source_sha256: imported.source_sha256,
        })?;
        if let Some(origin) = origin
            && let Err(error) = self.service.node().record_origin(&origin)
        {
            tracing::warn!(image = %self.name, %error, "its source is not known: it is never read again");
        }
        let message = format!("imported from {}", status.source);
        let details = json!({
            "digest": status.digest, "bytes": status.size, "source": status.source,
            "ms": started.elapsed().as_millis() as u64,
        });
        let object = format!("image {}", self.name);
        self.service.events().tell(Happened::ImageImported, object, message, details);
        Ok(self.service.image_view(status))
    }
}

/// Copies that can be made.
pub struct Copies {
    pub(super) service: Arc<Service>,
    pub(super) name: Name,
    pub(super) digest: Digest,
    /// The disk for one more; otherwise as many as are wanted.
    pub(super) disk: Option<Name>,
    pub(super) anyhow: bool,
    /// Bytes a second at most.
    pub(super) rate: Option<u64>,
}

impl Copies {
    /// Makes them. Blocks.
    pub fn run(self, job: &Job) -> Result<ImageView> {
        let object = format!("image {}", self.name);
        self.make(job).inspect_err(|error| self.service.events().failed(object, "copy", error))
    }

    fn make(&self, job: &Job) -> Result<ImageView> {
        let node = self.service.node();
        let made = AtomicU32::new(0);
        let report = |done, all| {
            job.report(Progress {
                phase: format!("copy {}", made.load(Ordering::Relaxed) + 1),
                done_bytes: done,
                total_bytes: Some(all),
                source_bytes: 0,
            });
        };
        let make = |disk| {
            self.service.keeping().copying().make(&Order {
                digest: self.digest,
                disk,
                anyhow: self.anyhow,
                rate: self.rate,
                why: "asked for",
                cancel: job.cancel(),
                report: &report,
            })
        };
        let within = |error: Error| error.within(format!("image {}", self.name));
        if let Some(disk) = &self.disk {
            let (_, status) = make(Some(disk)).map_err(within)?;
            let ready = node.ready_copies(self.digest).len() as u32;
            // Otherwise it would be one too many, and go.
            if status.wanted_copies.unwrap_or(1) < ready {
                node.want_copies(&self.name, ready.min(COPIES_MAX))?;
            }
        } else {
            let wanted = node.image(&self.name)?.wanted_copies.unwrap_or(1);
            while (node.ready_copies(self.digest).len() as u32) < wanted {
                make(None).map_err(within)?;
                made.fetch_add(1, Ordering::Relaxed);
            }
        }
        Ok(self.service.image_view(node.image(&self.name)?))
    }
}

/// A verification that can begin.
pub struct Verify {
    pub(super) service: Arc<Service>,
    pub(super) name: Name,
    pub(super) digest: Digest,
    /// The disks with copies of it.
    pub(super) disks: Vec<Name>,
}

impl Verify {
    /// Reads all copies to their ends, and mends what can be mended. Blocks.
    pub fn run(self, job: &Job) -> Result<Verification> {
        let mut verified = Verification {
            image: self.name.to_string(),
            digest: self.digest.to_string(),
            sound: true,
            bytes: 0,
            chunks: 0,
            bad: 0,
            repaired: 0,
            copies: Vec::new(),
        };
        for disk in &self.disks {
            let copy = match self.copy(disk, &mut verified, job) {
                Err(error) if error.kind() == Kind::Cancelled => return Err(error),
                // It was given up meanwhile: that is no damage.
                Err(_) if !self.is_there(disk) => continue,
                Err(error) => CopyVerification {
                    disk: disk.clone(),
                    sound: false,
                    bad: 0,
                    bad_chunks: Vec::new(),
                    repaired: 0,
                    error: Some(error.to_string()),
                },
                Ok(copy) => copy,
            };
            verified.sound &= copy.sound;
            verified.bad += copy.bad;
            verified.repaired += copy.repaired;
            verified.copies.push(copy);
        }
        if verified.copies.is_empty() {
            let what = format!("image {}: its copies were given up meanwhile", self.name);
            return Err(Error::new(Kind::NotFound, what));
        }
        Ok(verified)
    }

    fn is_there(&self, disk: &Name) -> bool {
        self.service.node().ready_copies(self.digest).iter().any(|(home, _)| home == disk)
    }

    fn copy(
        &self,
        disk: &Name,
        verified: &mut Verification,
        job: &Job,
    ) -> Result<CopyVerification> {
        let what = format!("image {} on disk {disk}", self.name);
        let copy = self.service.node().open_copy_on(self.digest, disk)?;
        let table = ChunkTable::load(&copy.chunks, &format!("the chunk table of {what}"))?;
        let report = |progress| {
            let progress = Progress::from(progress);
            let phase = format!("{} disk {disk}", progress.phase);
            job.report(Progress { phase, ..progress });
        };
        let found = image::verify(&copy.data, &table, &what, &report, job.cancel())?;
        verified.bytes += found.bytes;
        verified.chunks = found.chunks;
        let (mut repaired, mut error) = (0, None);
        if !found.bad.is_empty() {
            let chunks: Vec<Chunk> = found.bad.iter().copied().map(Chunk).collect();
            self.service.health().tell_bad(self.digest, disk.as_str(), &chunks);
            let mend = self.service.health().mend_image(self.digest, disk.clone(), chunks);
            // This thread may block; what mends are tasks of the runtime and the rings.
            match tokio::runtime::Handle::current().block_on(mend) {
                Ok(mended) => (repaired, error) = mended,
                Err(failed) => error = Some(failed),
            }
            if let Some(error) = &error {
                self.service.health().tell_unrepaired(self.digest, disk.as_str(), error);
            }
        }
        let bad = found.bad.len() as u64;
        Ok(CopyVerification {
            disk: disk.clone(),
            sound: found.digest_matches && found.size_matches && repaired == bad,
            bad,
            bad_chunks: found.bad.into_iter().take(BAD_TOLD).collect(),
            repaired,
            error: error.map(|error| error.to_string()),
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
        let (service, object) = (self.service.clone(), format!("replica {}", self.replica.name));
        let what = match &self.what {
            What::Move(_) => "migrate",
            What::Flatten => "flatten",
        };
        let done = tokio::runtime::Handle::current().block_on(self.work(job));
        done.inspect_err(|error| service.events().failed(object, what, error))
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
    /// Moves every replica away, and every copy that is wanted. What was moved before it was given up
    /// stays moved. Blocks.
    pub fn run(self, job: &Job) -> Result<Drained> {
        let (events, object) = (self.service.events(), format!("disk {}", self.disk));
        let done = self.empty(job);
        let drained = done.inspect_err(|error| events.failed(&object, "drain", error))?;
        let (moved, copies) = (drained.moved.len(), drained.copies.len());
        let message = format!("drained: {moved} replicas and {copies} copies have left it");
        let details = json!({ "disk": self.disk, "replicas": moved, "copies": copies });
        events.tell(Happened::DiskDrained, object, message, details);
        Ok(drained)
    }

    fn empty(&self, job: &Job) -> Result<Drained> {
        let (node, runtime) = (self.service.node(), tokio::runtime::Handle::current());
        runtime.block_on(self.service.set_draining(&self.disk, true))?;
        let (mut moved, mut copies) = (Vec::new(), Vec::new());
        loop {
            moved.extend(runtime.block_on(self.move_replicas(job))?);
            copies.extend(self.move_copies(job)?);
            // What was on its way here when the disk was marked may have arrived behind our back.
            if node.is_left(&self.disk)? {
                return Ok(Drained { disk: node.disk(&self.disk)?, moved, copies });
            }
            Course::new(job, "waiting for what is on its way here", 0).check()?;
        }
    }

    /// Puts copies elsewhere as far as they are wanted, and gives up those that are here. Blocks.
    fn move_copies(&self, job: &Job) -> Result<Vec<String>> {
        let node = self.service.node();
        let mut gone = Vec::new();
        for (digest, disk, _) in node.all_ready_copies() {
            if disk != self.disk {
                continue;
            }
            let image = node.image(&digest.to_string().parse()?)?;
            let name = image.names.first().map_or_else(|| digest.to_string(), Name::to_string);
            let within = |error: Error| error.within(format!("image {name}"));
            let wanted = image.wanted_copies.unwrap_or(1).max(1) as usize;
            let elsewhere = || {
                let ready = node.ready_copies(digest);
                ready.iter().filter(|(disk, _)| *disk != self.disk).count()
            };
            while elsewhere() < wanted {
                let report = |done, all| {
                    job.report(Progress {
                        phase: format!("image {name}"),
                        done_bytes: done,
                        total_bytes: Some(all),
                        source_bytes: 0,
                    });
                };
                let made = self.service.keeping().copying().make(&Order {
                    digest,
                    disk: None,
                    anyhow: false,
                    rate: (self.rate > 0).then_some(self.rate),
                    why: "another leaves its disk",
                    cancel: job.cancel(),
                    report: &report,
                });
                made.map_err(within)?;
            }
            node.remove_copy_on(&digest.to_string().parse()?, &self.disk, false).map_err(within)?;
            let message = format!("its copy has left disk {}, which is drained", self.disk);
            let details = json!({ "digest": digest, "disk": self.disk, "why": "drain" });
            let object = format!("image {name}");
            self.service.events().tell(Happened::CopyRemoved, object, message, details);
            gone.push(name);
        }
        Ok(gone)
    }

    async fn move_replicas(&self, job: &Job) -> Result<Vec<MovedReplica>> {
        let DrainDisk { service, disk, to, rate } = self;
        let rate = *rate;
        let replicas = service.replicas().await?;
        let on_it: Vec<_> =
            replicas.into_iter().map(|view| view.status).filter(|it| it.disk == *disk).collect();
        let (count, mut moved) = (on_it.len(), Vec::new());
        for (number, replica) in (1..).zip(on_it) {
            let disks = service.disks().await?;
            let target = target_of(&disks, disk, to, replica.stored_bytes)
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
        Ok(moved)
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
