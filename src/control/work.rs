//! Imports and verifications, as the service runs them: prepared, then begun with a [`Job`].
//!
//! Preparing tells what is wrong with the request itself, before any content is read. What was
//! prepared and never begun leaves nothing behind.

use std::{
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};

use crate::{
    catalog::{Digest, ImageMeta, Name, OpenCopy, StagedCopy},
    control::{
        api::{ImageView, ProfileView, Verification},
        event::Progress,
        job::Job,
        promotion::Promotion,
        service::Service,
    },
    error::Result,
    image::{self, ChunkTable, Format, ImportRequest, Source},
    units::CHUNK,
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
