//! The catalogue: what is on the disks of a node, and every change to it.
//!
//! ```text
//! node.rs      Node: opening a node, who is at work on what
//! disks.rs     its disks: adding, changing and forgetting them
//! stage.rs     a copy that is being made, and its publication
//! image.rs     images: looking them up, opening and removing them
//! replica.rs   replicas: making, opening and removing them
//! moves.rs     replicas that move to another disk
//! cache.rs     caches of promoted chunks: making, finding and removing them
//! profile.rs   what was read of images, and what stays in caches
//! fsck.rs      what is inconsistent, and mending it
//! report.rs    the node's figures
//!    |
//! view.rs      all disks together, in memory           claims.rs   who is at work on what
//! scan.rs      reading a disk, noting what is wrong     status.rs   what others are told
//! disk.rs      one disk, open and locked                media.rs    what it lies on
//! record.rs    the JSON records                         name.rs     names, digests
//! dir.rs       directories held open                    steps.rs    where tests stop it all
//! ```
//!
//! Invariants:
//! - **Files are the catalogue.** The view in memory is built from them, and changed only after a
//!   change to them is durable.
//! - **A reference is durable before its replica is visible, and is removed after the replica is
//!   durably gone.** A crash at any point can leak a reference, never lose one.
//! - **Nothing half-made is visible**: copies and replicas are built under a staging name and
//!   appear by one rename.
//! - What belongs to a disk that isn't there is never touched.
//! - No content passes through here: images are written by `image`, overlays by `cow`.
//!
//! Everything blocks. `docs/catalogue.md` gives the files.

mod attachment;
mod cache;
mod claims;
mod copies;
mod dir;
mod disk;
mod disks;
mod fsck;
mod image;
mod media;
mod moves;
mod name;
mod node;
mod origin;
mod profile;
mod record;
mod removed;
mod replica;
mod report;
mod scan;
mod scrubbed;
mod stage;
mod status;
mod steps;
mod survey;
mod unfinished;
mod view;

#[cfg(test)]
mod tests;

pub use attachment::{Attachment, Target, Via};
pub use cache::{CacheShape, OpenCache};
pub use copies::COPIES_MAX;
pub use disk::HOME;
pub use disks::{DiskOptions, Forgotten, Placement};
pub use fsck::Repair;
pub use image::{Incarnation, OpenCopy, Unnamed};
pub use media::Tier;
pub use moves::{Leftover, StagedReplica};
pub use name::{Digest, NAME_MAX, Name};
pub use node::Node;
pub use origin::{Origin, Stamp};
pub use profile::{Pin, Profile};
pub use removed::{Buried, Removal};
pub use replica::{NewReplica, OpenReplica, REPLICA_MAX, Removed};
pub use scrubbed::Scrubbed;
pub use stage::{ImageMeta, StagedCopy};
pub use status::{
    CopyState, CopyStatus, DiskState, DiskStatus, FsckReport, ImageStatus, ImageUser, NodeStatus,
    Problem, ReplicaState, ReplicaStatus, UnfinishedStatus, UserState,
};
pub use survey::{Outline, Survey};
