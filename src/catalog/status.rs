//! What the catalogue tells of itself: plain data, which the control API passes on as it is.
//!
//! Sizes are bytes, times are seconds since 1970. `stored_bytes` is what a file system says it has
//! allocated, not what a file pretends to hold.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use uuid::Uuid;

use super::{
    media::Tier,
    name::{Digest, Name},
};

/// Whether a disk serves.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum DiskState {
    /// It is there and can be written.
    Present,
    /// It is there; its images serve, its replicas do not.
    ReadOnly,
    /// Nothing of it is found at its path.
    Missing,
    /// Another daemon uses it.
    Locked,
    /// Something is there that can't be used: the reason says what.
    Failed,
}

/// A disk, there or not.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct DiskStatus {
    /// Its name on this node.
    pub name: Name,
    /// Its identity, wherever it is.
    #[schema(value_type = String)]
    pub id: Uuid,
    /// The directory that was given to underlay.
    #[schema(value_type = String)]
    pub path: PathBuf,
    /// How fast it is taken to be; unknown while it is not there.
    pub tier: Option<Tier>,
    /// Images only, no replicas.
    pub pool: bool,
    /// It takes nothing new: what is on it leaves.
    pub draining: bool,
    /// What promoted chunks may take there, if somebody set it.
    pub cache_bytes: Option<u64>,
    /// Whether it serves.
    pub state: DiskState,
    /// Why it doesn't, and what to do.
    pub reason: Option<String>,
    /// Size of its file system.
    pub total_bytes: u64,
    /// What can still be written to its file system.
    pub free_bytes: u64,
    /// Space that its copies and replicas take.
    pub stored_bytes: u64,
    /// Copies of images on it.
    pub images: usize,
    /// Replicas on it; of a missing disk, those that references tell of.
    pub replicas: usize,
    /// Other disks of the same block device: they fail together.
    pub fails_with: Vec<Name>,
}

/// Whether a copy serves.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum CopyState {
    /// It serves.
    Ready,
    /// Its files are not what its record says.
    Failed,
}

/// One copy of an image.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct CopyStatus {
    /// Its disk.
    pub disk: Name,
    /// Where its files are.
    #[schema(value_type = String)]
    pub path: PathBuf,
    /// Whether it serves.
    pub state: CopyState,
    /// Why it doesn't, and what to do.
    pub reason: Option<String>,
    /// Space that it takes.
    pub stored_bytes: u64,
}

/// A copy whose making was interrupted.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct UnfinishedStatus {
    /// Its disk.
    pub disk: Name,
    /// The image's bytes before this offset were copied.
    pub done_bytes: u64,
    /// Space that it takes.
    pub stored_bytes: u64,
}

/// An image.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct ImageStatus {
    /// What it is called; several names may stand for one content.
    pub names: Vec<Name>,
    /// Its identity.
    pub digest: Digest,
    /// The size that its readers see.
    pub size: u64,
    /// Space that all its copies take.
    pub stored_bytes: u64,
    /// Where it is.
    pub copies: Vec<CopyStatus>,
    /// Copies whose making was interrupted, and that can be gone on with.
    pub unfinished: Vec<UnfinishedStatus>,
    /// How many copies are wanted, if somebody said; the node's default counts otherwise.
    pub wanted_copies: Option<u32>,
    /// The replicas that stand on it.
    pub users: Vec<ImageUser>,
    /// When it was first published.
    pub created: u64,
    /// Where it came from.
    pub source: String,
    /// SHA-256 of the source as given, where it was found out.
    #[schema(value_type = Option<String>)]
    pub source_sha256: Option<Digest>,
}

/// A replica that stands on an image.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ImageUser {
    /// Its name.
    pub name: Name,
    /// Its identity.
    #[schema(value_type = String)]
    pub id: Uuid,
    /// Its disk's name.
    pub disk: Name,
    /// Whether it is there.
    pub state: UserState,
}

/// Whether the user of an image is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum UserState {
    /// Its disk is there, and so is the replica.
    Present,
    /// Its disk is not there: the reference holds the image for it.
    Away,
    /// Its disk is there and the replica isn't: `fsck` will remove the reference.
    Leaked,
}

/// Whether a replica can be opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum ReplicaState {
    /// It can.
    Ready,
    /// No copy of its image that serves is there.
    BaseMissing,
    /// Its own disk is not there: all that is known comes from its reference.
    DiskMissing,
    /// Its disk can't be written.
    ReadOnly,
    /// It may be on another disk, to which a move was interrupted, and that isn't there.
    Unsettled,
    /// Files of its are not there.
    Failed,
}

/// A replica.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct ReplicaStatus {
    /// Its name.
    pub name: Name,
    /// Its identity.
    #[schema(value_type = String)]
    pub id: Uuid,
    /// Its disk's name.
    pub disk: Name,
    /// Names of the image that it stands on; the one it was made from while the image isn't there;
    /// none if it needs no image.
    pub image: Vec<Name>,
    /// Digest of the image that it stands on, unless it needs none.
    #[schema(value_type = Option<String>)]
    pub digest: Option<Digest>,
    /// The size that its guest sees.
    pub size: u64,
    /// Space that its overlay takes.
    pub stored_bytes: u64,
    /// Whether it can be opened.
    pub state: ReplicaState,
    /// Why it can't, and what to do; or why its name leads to another replica.
    pub reason: Option<String>,
    /// When it was made.
    pub created: u64,
}

/// The node in figures.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct NodeStatus {
    /// Disks, there or not.
    pub disks: usize,
    /// Images of which a copy is there.
    pub images: usize,
    /// Copies of images.
    pub copies: usize,
    /// Replicas that are there.
    pub replicas: usize,
    /// Space that copies and replicas take.
    pub stored_bytes: u64,
    /// Space that the copies alone take.
    pub image_bytes: u64,
    /// Space that images would take with a copy on each disk that has a replica of it.
    pub per_disk_bytes: u64,
    /// `per_disk_bytes` less `image_bytes`, where that is more than nothing.
    pub saved_bytes: u64,
}

/// One thing that `fsck` found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Problem {
    /// What it concerns.
    pub object: String,
    /// What is wrong.
    pub what: String,
    /// What was done about it, or is to be done.
    pub remedy: String,
    /// Whether `fsck --repair` knows how to mend it.
    pub mendable: bool,
    /// Whether it was mended in this run.
    pub mended: bool,
}

/// What `fsck` found and did.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct FsckReport {
    /// Disks that were looked at.
    pub disks: Vec<Name>,
    /// Disks that were not there to be looked at.
    pub missing: Vec<Name>,
    /// What was found.
    pub problems: Vec<Problem>,
}
