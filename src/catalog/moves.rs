//! A replica moves to another disk, while it is in use.
//!
//! ```text
//!   stage      `.staging-<id>` on the other disk, with an empty overlay: the caller fills it
//!   prepare    its record, of a higher epoch, is durable; the old one says `moving_to`
//!   publish    renamed into its place: from here on it is on the other disk
//!   remove     the references name the other disk; then the old directory goes
//! ```
//!
//! Invariants:
//! - At any moment one directory counts: the old one up to the rename, the new one from it on. The mark
//!   says that there may be another, so that the old one is never taken for the replica while the other
//!   disk isn't there.
//! - The old directory goes only when the new one is durable and no reference names the old disk any
//!   more: a reference always names a disk that has the replica.
//! - Of two directories of one id the one of the higher epoch counts.
//! - Deciding is pure ([`unsettled`]); `settle` does it, at a start, when a disk comes, and in `fsck`.

use std::{ffi::OsString, fs::File, sync::Arc};

use nix::fcntl::OFlag;
use uuid::Uuid;

use super::{
    claims::{Mode, Object, Want},
    dir::{Dir, sync_together},
    disk::{DATA, Disk, MAP, REFS, REPLICA_JSON},
    name::Name,
    node::{Claimed, Inner, Node},
    record::{self, ReplicaRecord},
    replica::{reference_to, unplaced},
    report::taken,
    scan::{DELETING, Reference, STAGING, ref_file},
    status::ReplicaStatus,
    view::{Replica, Slot, View},
};
use crate::error::{Error, Kind, Result};

/// A replica's new directory, which is being filled. Dropped, it goes, and nothing has happened.
pub struct StagedReplica {
    inner: Arc<Inner>,
    id: Uuid,
    name: Name,
    from: Arc<Disk>,
    to: Arc<Disk>,
    dir: Dir,
    staging: OsString,
    /// The record as it was, and as it is to be; once the old one is marked.
    marked: Option<(ReplicaRecord, ReplicaRecord)>,
    published: bool,
    /// Keeps the disks from being removed meanwhile, and from [`StagedReplica::prepare`] on the
    /// replica from being changed.
    claimed: Vec<Claimed>,
}

/// The old directory of a replica that has moved.
pub struct Leftover {
    node: Node,
    settlement: Settlement,
    _claimed: Vec<Claimed>,
}

/// What is to be done about a move that was interrupted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Settlement {
    /// It had happened: what is left on `old` goes.
    Finish { id: Uuid, old: Uuid, new: Uuid },
    /// It had not: the mark goes.
    Revert { id: Uuid, disk: Uuid },
}

impl Node {
    /// Begins to move a replica to the disk `to_name`. `map` gives the first bytes of the map of an empty
    /// overlay of that id and size.
    pub fn stage_move(
        &self,
        replica: &Name,
        to_name: &Name,
        size: u64,
        map: impl FnOnce(Uuid, u64) -> Vec<u8>,
    ) -> Result<StagedReplica> {
        let within = |error: Error| error.within(format!("replica {replica}"));
        let (claimed, (id, name, from, to)) =
            self.0.claim(format!("replica {replica}"), |view| {
                let (id, found) = view.replica(replica)?;
                check_settled(view, found)?;
                let slot = view.disk(to_name)?;
                let to = check_target(slot).map_err(within)?;
                if found.disk == to.id {
                    let what = format!("it is on disk {} already", slot.known.name);
                    return Err(within(Error::new(Kind::Exists, what)));
                }
                let from =
                    view.slot(found.disk).ok_or_else(|| unplaced(replica))?.usable()?.clone();
                let wants = [from.id, to.id].map(|id| (Object::Disk(id), Mode::Shared)).to_vec();
                Ok((wants, (id, found.record.name.clone(), from, to)))
            })?;
        from.check_writable().and_then(|()| to.check_writable()).map_err(within)?;
        if to.replicas.stat(id.to_string()).map_err(within)?.is_some() {
            let what = format!("disk {to_name} still has what an earlier move left of it");
            let remedy = ": `underlay fsck --repair` clears that";
            return Err(within(Error::new(Kind::Unavailable, what + remedy)));
        }
        let (bytes, free) = (taken(&from, id), to.home.space().map_err(within)?.free);
        if free < bytes {
            let what = format!("it takes {bytes} bytes, and {free} are free on disk {to_name}");
            return Err(within(Error::new(Kind::NoSpace, what + ": free some, or choose another")));
        }
        let staging = OsString::from(format!("{STAGING}{id}"));
        if !self.0.view().live.insert(staging.clone()) {
            return Err(within(Error::new(Kind::InUse, "it is being moved already")));
        }
        let made = to
            .replicas
            .remove_tree(&staging)
            .and_then(|()| to.replicas.create(&staging))
            .inspect_err(|_| {
                self.0.view().live.remove(&staging);
            })
            .map_err(within)?;
        let staged = StagedReplica {
            inner: self.0.clone(),
            id,
            name,
            from,
            to,
            dir: made,
            staging,
            marked: None,
            published: false,
            claimed: vec![claimed],
        };
        staged
            .dir
            .write_sparse(DATA, size)
            .and_then(|()| staged.dir.write_new(MAP, &map(id, size)))
            .map_err(within)?;
        Ok(staged)
    }

    /// Decides that a replica whose move was interrupted is where it was, whatever is on the disk that
    /// it was to move to and that isn't there: that is given up.
    pub fn settle_replica(&self, name: &Name) -> Result<ReplicaStatus> {
        let (_claimed, (disk, record)) = self.0.claim(format!("replica {name}"), |view| {
            let (id, replica) = view.replica(name)?;
            let slot = view.slot(replica.disk).ok_or_else(|| unplaced(name))?;
            if replica.record.moving_to.is_none() {
                let what = format!("replica {name}: no move of it was interrupted");
                return Err(Error::new(Kind::Invalid, what));
            }
            let wants: Vec<Want> = vec![
                (Object::Catalogue, Mode::Shared),
                (Object::Replica(id), Mode::Alone),
                (Object::Disk(replica.disk), Mode::Shared),
            ];
            Ok((wants, (slot.usable()?.clone(), replica.record.clone())))
        })?;
        // Past the epoch of what may have been published there.
        let record = ReplicaRecord { moving_to: None, epoch: record.epoch + 2, ..record };
        self.write_record(&disk, record)
            .map_err(|error| error.within(format!("replica {name}")))?;
        self.replica(name)
    }

    /// Does what is to be done about moves that were interrupted, as far as it can be done.
    pub(crate) fn settle_moves(&self) {
        let todo = unsettled(&self.0.view());
        for settlement in todo {
            match self.settle(&settlement) {
                Ok(()) => tracing::info!(?settlement, "an interrupted move is settled"),
                Err(error) => tracing::warn!(%error, ?settlement, "an interrupted move stays"),
            }
        }
    }

    pub(crate) fn settle(&self, settlement: &Settlement) -> Result<()> {
        match *settlement {
            Settlement::Finish { id, old, new } => self.finish_move(id, old, new),
            Settlement::Revert { id, disk } => {
                let (disk, to, record) = {
                    let view = self.0.view();
                    let found = view.replicas.get(&id).filter(|found| found.disk == disk);
                    let record = found.ok_or_else(gone)?.record.clone();
                    let to = record.moving_to.and_then(|to| view.here(to).cloned());
                    let disks = view.here(disk).cloned().zip(to);
                    let (disk, to) = disks.ok_or_else(gone)?;
                    (disk, to, record)
                };
                // As it is now: what is known may be older than the move.
                if to.replicas.stat(id.to_string())?.is_some() {
                    let what =
                        "the other disk has something of its id: `underlay fsck` reads it anew";
                    return Err(Error::new(Kind::Unavailable, what));
                }
                disk.check_writable()?;
                self.write_record(&disk, ReplicaRecord { moving_to: None, ..record })
            }
        }
    }

    fn finish_move(&self, id: Uuid, old: Uuid, new: Uuid) -> Result<()> {
        let (old_disk, new_disk, reference, copies) = {
            let view = self.0.view();
            let found =
                view.replicas.get(&id).filter(|found| found.disk == new).ok_or_else(gone)?;
            let digest = found.record.image.as_ref().map(|image| image.digest);
            let images = digest.and_then(|digest| view.images.get(&digest));
            let here = images.iter().flat_map(|image| &image.copies);
            let copies: Vec<_> = here.filter_map(|copy| view.here(copy.disk).cloned()).collect();
            if digest.is_some() && copies.is_empty() {
                let what = "no copy of its image is there, whose reference names the old disk";
                return Err(Error::new(Kind::Unavailable, what));
            }
            let disks = view.here(old).cloned().zip(view.here(new).cloned());
            let (old, new) = disks.ok_or_else(gone)?;
            (old, new, digest.zip(reference_to(&view, found)), copies)
        };
        old_disk.check_writable()?;
        // A process that died right after the rename may have left nothing durable of it.
        new_disk.replicas.sync()?;
        if let Some((digest, record)) = reference {
            for copy in copies {
                let refs = copy.copy(digest)?.ensure(REFS)?;
                record::write(&refs, &ref_file(id), &record)?;
                let mut view = self.0.view();
                if let Some(copy) = view.copies_mut(digest).find(|found| found.disk == copy.id) {
                    let reference = Reference { record: record.clone(), damaged: false };
                    copy.found.refs.insert(id, reference);
                }
            }
        }
        let doomed = format!("{DELETING}{id}");
        old_disk.replicas.remove_tree(&doomed)?;
        old_disk.replicas.rename(id.to_string(), &doomed)?;
        self.0.view().spares.retain(|spare| (spare.record.id, spare.disk) != (id, old));
        old_disk.replicas.sync()?;
        old_disk.replicas.remove_tree(&doomed)
    }

    /// Replaces a replica's record, on the disk and in the view.
    pub(super) fn write_record(&self, disk: &Disk, record: ReplicaRecord) -> Result<()> {
        let dir = disk.replica(record.id)?;
        let written = record::write(&dir, REPLICA_JSON, &record);
        // Read again after an error: a failed write may have changed the record all the same.
        let record = match &written {
            Ok(()) => record,
            Err(_) => record::read(&dir, REPLICA_JSON)?,
        };
        let mut view = self.0.view();
        if let Some(found) = view.replicas.get_mut(&record.id).filter(|found| found.disk == disk.id)
        {
            found.record = record;
        }
        written
    }
}

impl StagedReplica {
    /// The replica's identity; the overlay's, too.
    pub fn id(&self) -> Uuid {
        self.id
    }

    /// Opens the new `data` for reading and writing, with `flags` (such as `O_DIRECT`) beside.
    pub fn open_data(&self, flags: OFlag) -> Result<File> {
        self.dir.file(DATA, OFlag::O_RDWR | flags).map_err(|error| self.within(error))
    }

    /// Opens the new `map` for reading and writing, with `flags` beside.
    pub fn open_map(&self, flags: OFlag) -> Result<File> {
        self.dir.file(MAP, OFlag::O_RDWR | flags).map_err(|error| self.within(error))
    }

    /// Makes all durable but the content, and the old directory tell where the replica may be. Takes
    /// the time of some syncs: guests need not wait for it.
    pub fn prepare(&mut self) -> Result<()> {
        let (id, from, to) = (self.id, self.from.id, self.to.id);
        let (claimed, before) = self.inner.claim(format!("replica {}", self.name), |view| {
            let found = view.replicas.get(&id).filter(|found| found.disk == from);
            let record = found.ok_or_else(gone)?.record.clone();
            let mut wants: Vec<Want> = vec![
                (Object::Catalogue, Mode::Shared),
                (Object::Replica(id), Mode::Alone),
                (Object::Disk(from), Mode::Shared),
                (Object::Disk(to), Mode::Shared),
            ];
            wants.extend(record.image.iter().map(|it| (Object::Image(it.digest), Mode::Shared)));
            Ok((wants, record))
        })?;
        self.claimed.push(claimed);
        let after = ReplicaRecord { epoch: before.epoch + 1, ..before.clone() };
        let mark = ReplicaRecord { moving_to: Some(to), ..before.clone() };
        let dir = &self.dir;
        let prepared = dir
            .write_new(REPLICA_JSON, &record::bytes(&after)?)
            .and_then(|()| {
                sync_together(&[&|| dir.sync_file(DATA), &|| dir.sync_file(MAP), &|| {
                    dir.sync_file(REPLICA_JSON)
                }])
            })
            .and_then(|()| dir.sync());
        prepared.map_err(|error| self.within(error))?;
        // From here on there may be a mark, whatever comes of writing it.
        self.marked = Some((before, after));
        let marked = self.from.replica(id).and_then(|dir| record::write(&dir, REPLICA_JSON, &mark));
        marked.map_err(|error| self.within(error))
    }

    /// Makes the new directory the replica, whose content is durable in it. Prepared before.
    ///
    /// # Errors
    /// `Poisoned` if nobody knows whether it happened: then nothing may be acknowledged any more.
    /// After any other error nothing has happened.
    pub fn publish(mut self) -> Result<Leftover> {
        let Some((_, after)) = self.marked.clone() else {
            return Err(Error::new(Kind::Invalid, "a move is prepared before it is published"));
        };
        let (replicas, id) = (&self.to.replicas, self.id.to_string());
        replicas.rename(&self.staging, &id).map_err(|error| self.within(error))?;
        if let Err(error) = replicas.sync() {
            let back = replicas.rename(&id, &self.staging).and_then(|()| replicas.sync());
            if back.is_err() {
                self.published = true;
                // Nobody opens it before a scan has found out.
                let mut view = self.inner.view();
                if let Some(found) = view.replicas.get_mut(&self.id) {
                    found.record.moving_to = Some(self.to.id);
                }
                drop(view);
                return Err(Error::caused(
                    Kind::Poisoned,
                    format!(
                        "replica {}: its new disk failed in the moment of the move, and nobody knows \
                         whether it has moved: restart the daemon once that disk is sound",
                        self.name
                    ),
                    error,
                ));
            }
            return Err(self.within(error));
        }
        self.published = true;
        {
            let mut view = self.inner.view();
            let new = Replica { disk: self.to.id, record: after, fault: None };
            if let Some(old) = view.replicas.insert(self.id, new) {
                view.spares.push(old);
            }
        }
        let (id, old, new) = (self.id, self.from.id, self.to.id);
        Ok(Leftover {
            node: Node(self.inner.clone()),
            settlement: Settlement::Finish { id, old, new },
            _claimed: std::mem::take(&mut self.claimed),
        })
    }

    fn within(&self, error: Error) -> Error {
        error.within(format!("replica {}: moving it", self.name))
    }
}

impl Drop for StagedReplica {
    fn drop(&mut self) {
        if !self.published {
            let unmarked = match self.marked.take() {
                None => Ok(()),
                Some((before, _)) => self
                    .from
                    .replica(self.id)
                    .and_then(|dir| record::write(&dir, REPLICA_JSON, &before)),
            };
            if let Err(error) = unmarked {
                tracing::warn!(%error, "the mark of a move that ended stays until the next start");
            }
            if let Err(error) = self.to.replicas.remove_tree(&self.staging) {
                tracing::warn!(%error, "the rest of a move stays until fsck");
            }
        }
        self.inner.view().live.remove(&self.staging);
    }
}

impl Leftover {
    /// Puts the references right and removes the old directory. Should it fail, the next start or
    /// `fsck` does it.
    pub fn remove(self) -> Result<()> {
        self.node.settle(&self.settlement)
    }
}

impl Settlement {
    /// The replica.
    pub(crate) fn id(&self) -> Uuid {
        match self {
            Settlement::Finish { id, .. } | Settlement::Revert { id, .. } => *id,
        }
    }
}

/// What is to be done about interrupted moves, as far as the disks that are there can tell. Pure. Those that ended
/// come first: what they left may be where another, back again, was to go.
pub(crate) fn unsettled(view: &View) -> Vec<Settlement> {
    let marked = view.replicas.values().chain(&view.spares);
    let judged = marked.filter_map(|found| {
        let (id, to) = (found.record.id, found.record.moving_to?);
        let chosen = view.replicas.get(&id)?;
        if chosen.disk == to && chosen.record.epoch > found.record.epoch {
            return Some(Settlement::Finish { id, old: found.disk, new: to });
        }
        let lacks_it = view.here(to).is_some() && !view.is_damaged(id, to);
        let counts = chosen.disk == found.disk;
        (counts && lacks_it).then_some(Settlement::Revert { id, disk: found.disk })
    });
    let mut all: Vec<Settlement> = judged.collect();
    all.sort_by_key(|settlement| matches!(settlement, Settlement::Revert { .. }));
    all
}

/// Refuses a replica that may have moved to a disk that isn't there.
pub(crate) fn check_settled(view: &View, found: &Replica) -> Result<()> {
    match may_be_elsewhere(view, found) {
        None => Ok(()),
        Some(why) => {
            let what = format!("replica {}: {why}", found.record.name);
            Err(Error::new(Kind::Unavailable, what))
        }
    }
}

/// Why it is not known where a replica is, and what to do; `None` if it is known.
pub(crate) fn may_be_elsewhere(view: &View, found: &Replica) -> Option<String> {
    let to = found.record.moving_to?;
    let disk = view.disk_name(to).map_or_else(|| to.to_string(), Name::to_string);
    Some(format!(
        "a move to disk {disk} was interrupted, and that disk can't tell whether it had ended: \
         bring it back; if it is lost for good, `underlay replica settle {}` takes the replica up as \
         it was before the move",
        found.record.name
    ))
}

/// The disk, if replicas may be put on it.
pub(crate) fn check_target(slot: &Slot) -> Result<Arc<Disk>> {
    let disk = slot.takes_new()?.clone();
    if slot.is_pool() {
        let what = format!("disk {} is a pool disk: it holds images only", slot.known.name);
        return Err(Error::new(Kind::Invalid, what));
    }
    Ok(disk)
}

fn gone() -> Error {
    Error::new(Kind::Unavailable, "its disk is gone")
}
