//! What the control API takes and gives, besides the catalogue's own status records.
//!
//! Names arrive as text and become [`Name`]s in the handlers, so that a bad
//! one is refused with the words that say what is allowed.

mod promotion;

use std::path::PathBuf;

pub use promotion::*;
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

use crate::{
    catalog::{DiskStatus, ImageStatus, Name, NodeStatus, ReplicaStatus, Tier, Via},
    source::Trouble,
};

/// A disk to add.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct AddDisk {
    /// An existing directory, given by its absolute path.
    #[schema(value_type = String, example = "/mnt/nvme0")]
    pub path: PathBuf,
    /// What to call it; the last part of its path otherwise.
    pub name: Option<String>,
    /// How fast it is; read from sysfs otherwise.
    pub tier: Option<Tier>,
    /// Images only, no replicas.
    #[serde(default)]
    pub pool: bool,
    /// What promoted chunks may take there, in bytes, 0 for nothing; a share of the disk otherwise.
    pub cache_bytes: Option<u64>,
}

/// An image to import from something that the daemon can read itself.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ImportImage {
    /// What to call the image.
    #[schema(example = "debian-12")]
    pub name: String,
    /// Where it comes from.
    pub source: ImportSource,
    /// The disk to put the copy on; the daemon chooses otherwise: pool disks first, then free space.
    pub disk: Option<String>,
    /// `raw`, `qcow2` or `vmdk`; found out otherwise.
    pub format: Option<String>,
    /// SHA-256 that the source, as it is given, must have.
    pub sha256: Option<String>,
}

/// Where an image comes from.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum ImportSource {
    /// A file of this host. Only for clients of the daemon's own user, or root's: nobody may read
    /// through the daemon what he could not read himself.
    File(FileSource),
    /// An http or https URL.
    Url(String),
}

/// A file as the client sees it. The daemon takes it only if it sees the same one at that path.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct FileSource {
    /// Absolute path.
    #[schema(value_type = String)]
    pub path: PathBuf,
    /// Device number of its file system.
    pub device: u64,
    /// Inode number.
    pub inode: u64,
}

/// How an image whose content is sent along is to be taken.
#[derive(Clone, Debug, Default, Serialize, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct UploadOptions {
    /// The disk to put the copy on; the daemon chooses otherwise: pool disks first, then free space.
    pub disk: Option<String>,
    /// `raw`, `qcow2` or `vmdk`; found out otherwise.
    pub format: Option<String>,
    /// SHA-256 that the content, as it is sent, must have.
    pub sha256: Option<String>,
    /// What to call the source in records and errors.
    pub source: Option<String>,
}

/// An image as the API shows it.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct ImageView {
    /// What the catalogue knows.
    #[serde(flatten)]
    pub status: ImageStatus,
    /// The clients that read it now.
    pub clients: Vec<String>,
    /// The copies of it that are being made.
    pub making: Vec<MakingView>,
}

/// A copy that is being made.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct MakingView {
    /// The disk that it is made on.
    pub disk: Name,
    /// Bytes of the image that are done.
    pub done_bytes: u64,
    /// Bytes of the image.
    pub total_bytes: u64,
    /// Why it is made.
    pub why: String,
}

/// A replica to create.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CreateReplica {
    /// What to call it.
    #[schema(example = "vm1")]
    pub name: String,
    /// The image to stand on: a name or a digest.
    pub image: String,
    /// The disk to put its writes on.
    pub disk: String,
    /// Bytes; the image's size otherwise. A multiple of 512, and no less than the image.
    pub size: Option<u64>,
}

/// A replica as the API shows it.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct ReplicaView {
    /// What the catalogue knows.
    #[serde(flatten)]
    pub status: ReplicaStatus,
    /// Its export on the NBD socket.
    #[schema(example = "replica/vm1")]
    pub export: String,
    /// The clients that are attached now.
    pub clients: Vec<String>,
    /// Why its writes are refused since a sync failed; reads go on.
    pub poisoned: Option<String>,
    /// How long its creation took, if this daemon created it.
    pub created_in_ms: Option<f64>,
}

/// How large a replica is to be.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Resize {
    /// Bytes: a multiple of 512, and no less than now.
    pub size: u64,
}

/// Where a replica is to move.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Migrate {
    /// The disk.
    pub disk: String,
    /// Bytes a second that are copied, at most; 0 for no bound, 256 MiB if it is left out.
    pub rate_bytes: Option<u64>,
}

/// How a replica is to be freed of its image.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Flatten {
    /// Bytes a second that are copied, at most; 0 for no bound, 256 MiB if it is left out.
    pub rate_bytes: Option<u64>,
}

/// A replica that has moved, or was freed of its image.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct Reworked {
    /// The replica.
    pub replica: ReplicaView,
    /// Bytes that were copied.
    pub copied_bytes: u64,
    /// How long its requests waited.
    pub paused_ms: f64,
}

/// What of a replica is exported.
#[derive(Clone, Debug, Default, Serialize, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct ExportOptions {
    /// Only what was written to it, with the digest of the image that it stands on.
    #[serde(default)]
    pub overlay: bool,
    /// Also while clients have it open: each block as it is when it is read.
    #[serde(default)]
    pub live: bool,
}

/// Where a replica whose overlay is sent along is to be.
#[derive(Clone, Debug, Serialize, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct ImportOptions {
    /// The disk to put its writes on.
    pub disk: String,
}

/// How a disk is to be emptied.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Drain {
    /// The disks that may take what is on it; any otherwise.
    #[serde(default)]
    pub to: Vec<String>,
    /// Bytes a second that are copied, at most; 0 for no bound, 256 MiB if it is left out.
    pub rate_bytes: Option<u64>,
}

/// A disk that takes nothing new, and what has left it.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct Drained {
    /// The disk.
    pub disk: DiskStatus,
    /// The replicas that have moved, and where.
    pub moved: Vec<MovedReplica>,
    /// The images whose copies left it.
    pub copies: Vec<String>,
}

/// A replica that has left a disk.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct MovedReplica {
    /// Its name.
    pub name: String,
    /// The disk that it is on now.
    pub disk: String,
    /// Bytes that were copied.
    pub copied_bytes: u64,
    /// How long its requests waited.
    pub paused_ms: f64,
}

/// What was removed.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct Removed {
    /// The name under which it was known.
    pub removed: String,
    /// What is left of it, and where, if anything is.
    pub note: Option<String>,
}

/// Whether `fsck` mends what it finds.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct FsckRequest {
    /// Mend what can be mended; only report otherwise.
    pub repair: bool,
}

/// What a verification found.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct Verification {
    /// The image.
    pub image: String,
    /// Its identity.
    pub digest: String,
    /// Whether every copy is what was imported, now that it has been repaired where that could be done.
    pub sound: bool,
    /// Bytes that were read; what is known to be zeros and is a hole is not.
    pub bytes: u64,
    /// Chunks of 256 KiB in the image.
    pub chunks: u64,
    /// How many chunks of copies were not what was imported.
    pub bad: u64,
    /// How many of those were written anew from another copy.
    pub repaired: u64,
    /// The copies.
    pub copies: Vec<CopyVerification>,
}

/// What the verification of one copy found.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct CopyVerification {
    /// The disk that it is on.
    pub disk: Name,
    /// Whether it is what was imported, now that it has been repaired where that could be done.
    pub sound: bool,
    /// How many chunks were not.
    pub bad: u64,
    /// Their numbers, the first thousand of them.
    pub bad_chunks: Vec<u64>,
    /// How many of them were written anew.
    pub repaired: u64,
    /// Why it could not be verified, or not be repaired.
    pub error: Option<String>,
}

/// The node: what is there, what it takes, what is saved.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct Status {
    /// The daemon itself.
    pub daemon: Daemon,
    /// The node in figures.
    pub node: NodeStatus,
    /// Every disk that the node knows, there or not.
    pub disks: Vec<DiskStatus>,
    /// Every image.
    pub images: Vec<ImageView>,
    /// Every replica.
    pub replicas: Vec<ReplicaView>,
    /// Every block device.
    pub attachments: Vec<AttachmentView>,
    /// Where latencies of disks are from.
    pub signal: SignalView,
    /// Disks whose copies are read only where no other can answer.
    pub troubles: Vec<DiskTrouble>,
    /// The copy that is being scrubbed.
    pub scrub: Option<ScrubView>,
}

/// Copies to be made: one on a disk, or so many in all.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct MakeCopies {
    /// How many copies are wanted from now on; those that are missing are made.
    pub copies: Option<u32>,
    /// The disk for one more copy.
    pub to: Option<String>,
    /// Also on a disk that fails together with one that has a copy.
    #[serde(default)]
    pub force: bool,
    /// Bytes a second that are copied, at most; none, or 0, for no bound.
    pub rate_bytes: Option<u64>,
}

/// How a copy is to be given up.
#[derive(Clone, Debug, Default, Serialize, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
pub struct RemoveCopy {
    /// Also if fewer copies are left than are wanted: so many are wanted from then on.
    #[serde(default)]
    pub force: bool,
}

/// Which events are wanted.
#[derive(Clone, Debug, Default, Serialize, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
pub struct EventsWanted {
    /// Those after the event of this number; all that are kept otherwise.
    pub since: Option<u64>,
    /// The start of the daemon that the number counts from, as an event gave it.
    pub boot: Option<String>,
    /// Go on with what happens from now on.
    #[serde(default)]
    pub follow: bool,
}

/// A copy that is being scrubbed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ScrubView {
    /// The image's digest.
    pub image: String,
    /// The disk that the copy is on.
    pub disk: Name,
    /// Bytes of the image that are behind it.
    pub done_bytes: u64,
    /// Bytes of the image.
    pub total_bytes: u64,
}

/// A disk in trouble.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct DiskTrouble {
    /// Its name.
    pub disk: Name,
    /// What it does.
    pub trouble: Trouble,
}

/// An export to make a block device of.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Attach {
    /// `image/NAME` or `replica/NAME`.
    #[schema(example = "replica/vm1")]
    pub export: String,
    /// What makes the block device; ublk otherwise.
    pub via: Option<Via>,
    /// Queues, each served by one I/O thread.
    pub queues: Option<u16>,
    /// Requests that a queue may have under way.
    pub depth: Option<u16>,
    /// Copy data between kernel and daemon, also where that isn't needed.
    #[serde(default)]
    pub copy: bool,
    /// Have the kernel look for partitions.
    #[serde(default)]
    pub scan: bool,
}

/// A block device to remove.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Detach {
    /// `image/NAME`, `replica/NAME`, or the device's path.
    pub what: String,
    /// Also while it is open.
    #[serde(default)]
    pub force: bool,
}

/// An export that is a block device.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct AttachmentView {
    /// `image/NAME` or `replica/NAME`.
    pub export: String,
    /// The device's path.
    #[schema(value_type = String, example = "/dev/ublkb0")]
    pub device: PathBuf,
    /// What makes it.
    pub via: Via,
    /// Queues.
    pub queues: u16,
    /// Requests that a queue may have under way.
    pub depth: u16,
    /// Whether data moves without being copied by the daemon; unknown while it waits.
    pub zero_copy: Option<bool>,
    /// Why its requests wait, if they do.
    pub waiting: Option<String>,
}

/// The daemon itself.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct Daemon {
    /// Its version.
    pub version: String,
    /// Its process.
    pub pid: u32,
    /// How long it has been up.
    pub uptime_seconds: u64,
    /// Where NBD clients connect.
    #[schema(value_type = Option<String>)]
    pub nbd_socket: Option<PathBuf>,
    /// Where NBD is served over TCP.
    pub nbd_address: Option<String>,
    /// Where metrics are served besides the control socket.
    pub metrics: Option<String>,
}
