//! What the API tells of latencies, caches and promotion, and what it is asked of them.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::{
    catalog::{Name, Tier},
    promote::signal,
};

/// The cache of a disk: chunks of images on other disks that were promoted to it.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct CacheView {
    /// The disk.
    pub disk: Name,
    /// What the cache may take, as of now.
    pub limit_bytes: u64,
    /// What it takes.
    pub stored_bytes: u64,
    /// Why nothing is promoted to this disk, if so.
    pub off: Option<String>,
    /// What there is of each image.
    pub images: Vec<CachedImage>,
    /// What was done since the daemon's start.
    pub figures: CacheFigures,
}

/// What a disk's cache did since the daemon's start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct CacheFigures {
    /// Chunks that were promoted.
    pub promoted: u64,
    /// Bytes that were written for that.
    pub promoted_bytes: u64,
    /// Chunks that made room for others.
    pub evicted: u64,
    /// Chunks that could not be promoted.
    pub failed: u64,
    /// Chunks that were dropped because they could not be read, or were not what they should be.
    pub dropped: u64,
    /// Time that readers did not wait for other disks, in seconds: an estimate from the disks' latencies.
    pub saved_seconds: f64,
    /// Time saved for each MiB written, in milliseconds.
    pub saved_ms_per_mib: f64,
}

/// An image as the replicas of one disk read it.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct CachedImage {
    /// A name of it, or its digest.
    pub image: String,
    /// Its identity.
    pub digest: String,
    /// The disk of the copy that is read, if a replica is open.
    pub copy: Option<String>,
    /// Chunks that are here.
    pub chunks: u64,
    /// Bytes that they take.
    pub bytes: u64,
    /// What stays here whatever is read, if anything does.
    pub pinned: Option<Extent>,
    /// Reads that the copy answered since the daemon's start.
    pub copy_reads: u64,
    /// Reads that the cache answered.
    pub cache_reads: u64,
}

/// How much of an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Extent {
    /// What its profile names.
    Profile,
    /// All of it.
    Whole,
}

/// Which caches to clear.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ClearCache {
    /// Of this disk only.
    pub disk: Option<String>,
    /// Of this image only.
    pub image: Option<String>,
}

/// What a clearing has done.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct Cleared {
    /// Chunks that are no longer read from a cache; what is pinned is promoted anew.
    pub chunks: u64,
}

/// An image to keep in, or bring to, the cache of a disk.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Warm {
    /// The image.
    pub image: String,
    /// The disk.
    pub disk: String,
    /// How much of it.
    pub extent: Extent,
}

/// An image that is to be no longer kept in the cache of a disk.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Unpin {
    /// The image.
    pub image: String,
    /// The disk.
    pub disk: String,
}

/// What warming or pinning has begun.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct Warming {
    /// Chunks that will be brought to the disk.
    pub chunks: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Bytes a second, at most.
    pub rate: u64,
}

/// A profile in short.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct ProfileView {
    /// A name of the image, or its digest.
    pub image: String,
    /// Its identity.
    pub digest: String,
    /// When it was recorded, in seconds since 1970.
    pub created: u64,
    /// Chunks that it names.
    pub chunks: u64,
    /// Their bytes.
    pub bytes: u64,
}

/// How long to record a profile.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct RecordProfile {
    /// Seconds; less if whoever asked goes away.
    pub seconds: u64,
}

/// What happens on the node right now: of the last ten seconds, unless it says otherwise.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct Activity {
    /// Where the figures of disks are from, and why not from the probes.
    pub signal: SignalView,
    /// Every disk that is there.
    pub disks: Vec<DiskActivity>,
    /// Every cache.
    pub caches: Vec<CacheView>,
    /// The chunks that were read most from another disk or from a cache, since the daemon's start.
    pub hottest: Vec<HotChunk>,
}

/// Where latencies are from.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct SignalView {
    /// The source that decides.
    pub source: Origin,
    /// Why the probes don't tell, if they don't.
    pub reason: Option<String>,
    /// The agent's process, while it reports.
    pub agent: Option<u32>,
    /// Nanoseconds that the probes cost for each event, where the kernel tells.
    pub cost_nanos: Option<u64>,
}

/// Where a figure is from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Origin {
    /// The probes saw the device.
    Probes,
    /// The service timed its own reads.
    Timing,
    /// Nothing was read: what is usual for the tier.
    Tier,
}

impl From<signal::Origin> for Origin {
    fn from(origin: signal::Origin) -> Origin {
        match origin {
            signal::Origin::Probes => Origin::Probes,
            signal::Origin::Timing => Origin::Timing,
            signal::Origin::Tier => Origin::Tier,
        }
    }
}

/// A disk, as it is read right now.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct DiskActivity {
    /// The disk.
    pub disk: Name,
    /// Its tier.
    pub tier: Option<Tier>,
    /// Where the figures are from.
    pub origin: Origin,
    /// Reads in the last ten seconds that reached the device.
    pub reads: u64,
    /// Their mean latency, in seconds.
    pub mean_seconds: f64,
    /// Half of them took less.
    pub median_seconds: f64,
    /// One in a hundred took longer.
    pub p99_seconds: f64,
    /// Its mean against the median of its peers of the same tier, if it has any.
    pub against_peers: Option<f64>,
    /// Device reads of this daemon, of the last second (probes only).
    pub own: Option<u64>,
    /// Device reads of everybody else, of the last second (probes only).
    pub foreign: Option<u64>,
    /// Requests in flight (probes only).
    pub in_flight: Option<u64>,
    /// The age of the oldest of these, in seconds (probes only).
    pub oldest_seconds: Option<f64>,
    /// Time that requests waited before the device had them: mean of the last second (probes only).
    pub queue_seconds: Option<f64>,
}

/// A chunk that is read much.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct HotChunk {
    /// A name of the image, or its digest.
    pub image: String,
    /// The disk whose replicas read it.
    pub disk: Name,
    /// Its number.
    pub chunk: u64,
    /// Reads that the copy answered.
    pub copy_reads: u64,
    /// Reads that the cache answered.
    pub cache_reads: u64,
    /// Whether it is in the cache.
    pub cached: bool,
}

/// Which parts of an image are read from where.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct Heat {
    /// A name of the image, or its digest.
    pub image: String,
    /// Its bytes.
    pub size: u64,
    /// The bytes of each cell; the last may be shorter.
    pub cell_bytes: u64,
    /// One for each disk whose replicas read it.
    pub disks: Vec<DiskHeat>,
}

/// How the replicas of one disk read an image.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct DiskHeat {
    /// The disk.
    pub disk: Name,
    /// The disk of the copy, if a replica is open.
    pub copy: Option<String>,
    /// For each cell: reads that the copy answered since the daemon's start.
    pub copy_reads: Vec<u64>,
    /// Reads that the cache answered.
    pub cache_reads: Vec<u64>,
    /// The share of the cell's chunks that are in the cache, in percent.
    pub cached_percent: Vec<u8>,
}
