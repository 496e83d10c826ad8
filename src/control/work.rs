//! Imports and verifications, as the service runs them: prepared, then begun with a [`Job`].
//!
//! Preparing tells what is wrong with the request itself, before any content is read. What was
//! prepared and never begun leaves nothing behind.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::{Duration, Instant},
};

use crate::{
    catalog::{COPIES_MAX, Digest, ImageMeta, Name, StagedCopy},
    control::{
        api::{CopyVerification, ImageView, ProfileView, Verification},
        copying::Order,
        event::Progress,
        job::Job,
        promotion::Promotion,
        service::Service,
    },
    error::{Error, Kind, Result},
    image::{self, ChunkTable, Format, ImportRequest, Source},
    units::{CHUNK, Chunk},
};

/// Damaged chunks that a verification names.
const BAD_TOLD: usize = 1000;

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

/// Copies that can be made.
pub struct Copies {
    pub(super) service: Arc<Service>,
    pub(super) name: Name,
    pub(super) digest: Digest,
    /// The disk for one more; otherwise as many as are wanted.
    pub(super) disk: Option<Name>,
    pub(super) anyhow: bool,
}

impl Copies {
    /// Makes them. Blocks.
    pub fn run(self, job: &Job) -> Result<ImageView> {
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
                rate: None,
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
                let (disk, _) = make(None).map_err(within)?;
                tracing::info!(image = %self.name, %disk, "a copy was made");
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
        Ok(verified)
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
            let chunks = found.bad.iter().copied().map(Chunk).collect();
            let mend = self.service.health().mend_image(self.digest, disk.clone(), chunks);
            // This thread may block; what mends are tasks of the runtime and the rings.
            match tokio::runtime::Handle::current().block_on(mend) {
                Ok(mended) => (repaired, error) = mended,
                Err(failed) => error = Some(failed),
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
