//! Figures for Prometheus, as OpenMetrics text.
//!
//! ```text
//! catalogue (outline) ──┐
//! disks (surveys.rs) ───┤
//! open devices, views ──┼──► snapshot.rs ──► one file a subject ──► page.rs ──► text
//! promotion, probes ────┘    plain numbers   names, units, help
//! ```
//!
//! What can be asked for when it is wanted is asked then; only events that leave no trace elsewhere
//! are counted as they happen. `docs/metrics.md` lists every metric.
//!
//! Invariants:
//! - A scrape waits for no disk longer than [`PATIENCE`](super::surveys::PATIENCE), once; what a disk
//!   that does not answer said last is told with its age.
//! - Labels are names of disks, images and replicas, as many as there are, and words of a fixed list.

mod disks;
mod exports;
mod format;
mod images;
mod node;
mod page;
mod probes;
mod process;
mod promotion;
mod reads;
mod replicas;
mod snapshot;
mod sources;

#[cfg(test)]
mod tests;

use std::{fmt, sync::Arc, time::Duration};

use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, text::encode},
    registry::Registry,
};

pub use self::{
    format::PageFormat,
    page::Latency,
    probes::{DeviceReads, ProbedDisk, Probes, Served},
    promotion::{PromotingDisk, Promotion},
    snapshot::Sources,
};
use self::{page::Page, process::Process, snapshot::Snapshot};
use crate::{
    control::{service::blocking, surveys::Surveys},
    error::{Error, Kind, Result},
    histogram::Histogram,
};

/// What is counted as it happens, and what disks said last.
#[derive(Default)]
pub struct Metrics {
    replica_creation: Histogram,
    surveys: Arc<Surveys>,
}

impl Metrics {
    /// Counts a replica and the time its creation took.
    pub fn replica_created(&self, took: Duration) {
        self.replica_creation.record(took);
    }

    /// Everything, as text.
    pub async fn text(&self, sources: Sources<'_>, format: PageFormat) -> Result<String> {
        let node = sources.node.clone();
        let outline = blocking(move || Ok(node.outline())).await?;
        let disks = outline.disks.iter().map(|disk| disk.id).collect();
        let surveys = self.surveys.ask(sources.node, disks).await;
        let creation = Latency::of(&self.replica_creation.counts());
        let snapshot = Snapshot::take(&sources, outline, surveys, creation);
        // A thousand replicas are some milliseconds of work.
        blocking(move || Ok(format.of(snapshot.text()?))).await
    }
}

impl Snapshot {
    fn text(self) -> Result<String> {
        let mut registry = Registry::default();
        registry.register_collector(Box::new(Process));
        registry.sub_registry_with_prefix("underlay").register_collector(Box::new(self));
        let mut text = String::with_capacity(64 << 10);
        encode(&mut text, &registry)
            .map_err(|error| Error::caused(Kind::Io, "telling the metrics", error))?;
        Ok(text)
    }
}

impl Collector for Snapshot {
    fn encode(&self, encoder: DescriptorEncoder) -> fmt::Result {
        let mut page = Page(encoder);
        node::tell(&mut page, self)?;
        disks::tell(&mut page, &self.disks)?;
        images::tell(&mut page, &self.images)?;
        replicas::tell(&mut page, self)?;
        exports::tell(&mut page, &self.exports)?;
        reads::tell(&mut page, &self.reads)?;
        sources::tell(&mut page, &self.reading)?;
        promotion::tell(&mut page, self.promotion.as_ref())?;
        probes::tell(&mut page, self.probes.as_ref())
    }
}
