//! What the node tells of its disks, images and replicas.
//!
//! Invariant: disks are asked (for free space, for what files take) after the view was let go, so
//! one that hangs holds up only who asked.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use uuid::Uuid;

use super::{
    dir::{Space, allocated},
    disk::{DATA, Disk, IMAGES, MAP},
    moves::may_be_elsewhere,
    name::{Digest, Name},
    node::Node,
    record::{Base, RefRecord, ReplicaRecord},
    replica,
    status::{
        CopyStatus, DiskState, DiskStatus, ImageStatus, NodeStatus, ReplicaState, ReplicaStatus,
        UnfinishedStatus,
    },
    view::{Attachment, Image, Replica, Slot, View, listed},
};
use crate::error::{Error, Kind, Result};

impl Node {
    /// One disk, by its name or id.
    pub fn disk(&self, name: &Name) -> Result<DiskStatus> {
        let (mut status, disk) = {
            let view = self.0.view();
            let slot = view.disk(name)?;
            (disk_status(&view, slot), slot.here().cloned())
        };
        let Some(disk) = disk else { return Ok(status) };
        match disk.home.space() {
            Ok(space) => {
                status.total_bytes = space.total;
                status.free_bytes = space.free;
                if let Some((state, reason)) = told(&space) {
                    status.state = state;
                    status.reason = Some(reason.to_owned());
                }
            }
            Err(error) => {
                status.state = DiskState::Failed;
                status.reason = Some(error.to_string());
            }
        }
        let on_it: Vec<Uuid> = {
            let view = self.0.view();
            let found = view.replicas.iter().filter(|(_, replica)| replica.disk == disk.id);
            found.map(|(id, _)| *id).collect()
        };
        status.stored_bytes += on_it.into_iter().map(|id| taken(&disk, id)).sum::<u64>();
        Ok(status)
    }

    /// All images of which a copy is there, by name.
    pub fn images(&self) -> Vec<ImageStatus> {
        let view = self.0.view();
        let mut all: Vec<_> =
            view.images.iter().map(|(digest, image)| image_status(&view, *digest, image)).collect();
        all.sort_by(|a, b| (&a.names, a.digest).cmp(&(&b.names, b.digest)));
        all
    }

    /// One image, by a name of its or its digest.
    pub fn image(&self, name: &Name) -> Result<ImageStatus> {
        let view = self.0.view();
        let (digest, image) = view.image(name)?;
        Ok(image_status(&view, digest, image))
    }

    pub(crate) fn image_by_digest(&self, digest: Digest) -> Result<ImageStatus> {
        let view = self.0.view();
        let image = view.images.get(&digest).ok_or_else(|| {
            Error::new(Kind::NotFound, format!("image {digest} has just been removed"))
        })?;
        Ok(image_status(&view, digest, image))
    }

    /// All replicas, by name; those of missing disks as far as their references tell.
    pub fn replicas(&self) -> Vec<ReplicaStatus> {
        let (mut all, disks): (Vec<_>, Vec<_>) = {
            let view = self.0.view();
            let here = view.replicas.values();
            let away = view.away();
            here.map(|replica| (replica_status(&view, replica), view.here(replica.disk).cloned()))
                .chain(away.iter().map(|(digest, r)| (away_status(&view, *digest, r), None)))
                .unzip()
        };
        for (status, disk) in all.iter_mut().zip(disks) {
            measure(status, disk);
        }
        all.sort_by(|a, b| (&a.name, a.id).cmp(&(&b.name, b.id)));
        all
    }

    /// One replica, by its name or id.
    pub fn replica(&self, name: &Name) -> Result<ReplicaStatus> {
        let (mut status, disk) = {
            let view = self.0.view();
            match (view.replica(name), replica::away(&view, name)) {
                (Ok((_, found)), _) => {
                    (replica_status(&view, found), view.here(found.disk).cloned())
                }
                (Err(_), Some((digest, reference))) => {
                    (away_status(&view, digest, reference), None)
                }
                (Err(error), None) => return Err(error),
            }
        };
        measure(&mut status, disk);
        Ok(status)
    }

    pub(crate) fn replica_by_id(&self, id: Uuid) -> Result<ReplicaStatus> {
        self.replica(&Name::of_id(id))
    }

    /// The node in figures: what is stored, and what a copy of each image on every disk that has a
    /// replica of it would take more.
    pub fn status(&self) -> NodeStatus {
        let (mut status, here) = {
            let view = self.0.view();
            let replicas = view.replicas.iter();
            let here: Vec<_> = replicas
                .filter_map(|(id, replica)| Some((*id, view.here(replica.disk)?.clone())))
                .collect();
            (node_status(&view), here)
        };
        let overlays: u64 = here.iter().map(|(id, disk)| taken(disk, *id)).sum();
        status.stored_bytes += overlays;
        status
    }
}

/// The node in figures, as far as they are known without asking a disk: what replicas take is not
/// counted.
pub(super) fn node_status(view: &View) -> NodeStatus {
    let mut status = NodeStatus {
        disks: view.disks.len(),
        images: view.images.len(),
        replicas: view.replicas.len(),
        ..NodeStatus::default()
    };
    let mut users: BTreeMap<Digest, BTreeSet<Uuid>> = BTreeMap::new();
    for replica in view.replicas.values() {
        if let Some(digest) = replica.record.digest() {
            users.entry(digest).or_default().insert(replica.disk);
        }
    }
    for (digest, image) in &view.images {
        let one = image.copies.iter().map(|copy| copy.found.stored).max().unwrap_or(0);
        let stored: u64 = image.copies.iter().map(|copy| copy.found.stored).sum();
        let disks = users.get(digest).map_or(0, BTreeSet::len).max(1) as u64;
        status.copies += image.copies.len();
        status.image_bytes += stored;
        status.per_disk_bytes += one.saturating_mul(disks);
        status.saved_bytes += one.saturating_mul(disks).saturating_sub(stored);
    }
    status.stored_bytes = status.image_bytes;
    status
}

/// What its file system tells of a disk that can't be used as it was attached, and why.
pub(super) fn told(space: &Space) -> Option<(DiskState, &'static str)> {
    let why = "its file system is read-only: remount it for replicas to work";
    space.read_only.then_some((DiskState::ReadOnly, why))
}

/// Space that a replica takes; nothing if it has gone meanwhile.
pub(super) fn taken(disk: &Disk, id: Uuid) -> u64 {
    let Ok(dir) = disk.replica(id) else { return 0 };
    let files = [DATA, MAP].into_iter().filter_map(|file| dir.stat(file).ok().flatten());
    files.map(|stat| allocated(&stat)).sum()
}

fn measure(status: &mut ReplicaStatus, disk: Option<Arc<Disk>>) {
    let Some(disk) = disk else { return };
    status.stored_bytes = taken(&disk, status.id);
    if status.state == ReplicaState::Ready
        && let Err(error) = disk.check_writable()
    {
        status.state = ReplicaState::ReadOnly;
        status.reason = Some(error.to_string());
    }
}

pub(super) fn disk_status(view: &View, slot: &Slot) -> DiskStatus {
    let id = slot.known.id;
    let copies = view.images.values().flat_map(|image| &image.copies);
    let copies: Vec<_> = copies.filter(|copy| copy.disk == id).collect();
    let mut status = DiskStatus {
        name: slot.known.name.clone(),
        id,
        path: slot.known.path.clone(),
        tier: None,
        cache_bytes: None,
        pool: slot.is_pool(),
        draining: slot.is_draining(),
        state: DiskState::Present,
        reason: None,
        total_bytes: 0,
        free_bytes: 0,
        stored_bytes: copies.iter().map(|copy| copy.found.stored).sum(),
        images: copies.len(),
        replicas: view.replicas.values().filter(|replica| replica.disk == id).count(),
        fails_with: Vec::new(),
    };
    match &slot.at {
        Attachment::Here(disk, record) => {
            status.tier = record.tier.or(disk.media.tier);
            status.cache_bytes = record.cache;
            let others = view.disks.iter().filter(|other| other.known.id != id);
            let same = others.filter(|other| {
                other.here().is_some_and(|other| other.media.fails_with(&disk.media))
            });
            status.fails_with = same.map(|other| other.known.name.clone()).collect();
        }
        Attachment::Away(absence) => {
            status.state = absence.state;
            status.reason = Some(absence.reason.clone());
            status.replicas = view.away().iter().filter(|(_, away)| away.disk == id).count();
        }
    }
    status
}

pub(super) fn image_status(view: &View, digest: Digest, image: &Image) -> ImageStatus {
    let oldest = image.copies.iter().min_by_key(|copy| copy.found.record.created);
    let copies = image.copies.iter().map(|copy| {
        let slot = view.slot(copy.disk);
        let place = |slot: &Slot| slot.known.path.join(super::HOME).join(IMAGES);
        CopyStatus {
            disk: slot.map_or_else(Name::unknown, |slot| slot.known.name.clone()),
            path: slot.map(place).unwrap_or_default().join(digest.to_string()),
            state: copy.state(),
            reason: copy.found.fault.clone(),
            stored_bytes: copy.found.stored,
        }
    });
    let unfinished = view.unfinished.iter().filter(|it| it.digest == digest);
    let unfinished = unfinished.map(|it| UnfinishedStatus {
        disk: view.disk_name(it.disk).cloned().unwrap_or_else(Name::unknown),
        done_bytes: it.done,
        stored_bytes: it.stored,
    });
    ImageStatus {
        names: image.names(),
        digest,
        size: oldest.map_or(0, |copy| copy.found.record.size),
        stored_bytes: image.copies.iter().map(|copy| copy.found.stored).sum(),
        copies: copies.collect(),
        unfinished: unfinished.collect(),
        wanted_copies: image.wanted(),
        users: view.users(digest),
        created: oldest.map_or(0, |copy| copy.found.record.created),
        source: oldest.map_or(String::new(), |copy| copy.found.record.source.clone()),
        source_sha256: oldest.and_then(|copy| copy.found.record.source_sha256),
    }
}

pub(super) fn replica_status(view: &View, replica: &Replica) -> ReplicaStatus {
    let ReplicaRecord { id, name, size, image: base, created, .. } = &replica.record;
    let image = base.as_ref().and_then(|base| view.images.get(&base.digest));
    let elsewhere = may_be_elsewhere(view, replica);
    let (state, mut reason) = match (elsewhere, &replica.fault, base) {
        (Some(why), ..) => (ReplicaState::Unsettled, Some(why)),
        (None, Some(fault), _) => (ReplicaState::Failed, Some(fault.clone())),
        (None, None, Some(base)) if image.and_then(Image::ready).is_none() => {
            (ReplicaState::BaseMissing, Some(base_missing(view, base)))
        }
        (None, None, _) => (ReplicaState::Ready, None),
    };
    if view.replica_named(name) != Some(*id) {
        let hidden = format!("another replica has its name: it is reached by its id {id}");
        reason = Some(reason.map_or(hidden.clone(), |reason| format!("{reason}; {hidden}")));
    }
    ReplicaStatus {
        name: name.clone(),
        id: *id,
        disk: view.disk_name(replica.disk).cloned().unwrap_or_else(Name::unknown),
        image: image
            .map_or_else(|| base.iter().map(|base| base.name.clone()).collect(), Image::names),
        digest: replica.record.digest(),
        size: *size,
        stored_bytes: 0,
        state,
        reason,
        created: *created,
    }
}

pub(super) fn away_status(view: &View, digest: Digest, reference: &RefRecord) -> ReplicaStatus {
    let disk = view.disk_name(reference.disk).unwrap_or(&reference.disk_name).clone();
    ReplicaStatus {
        name: reference.name.clone(),
        id: reference.replica,
        reason: Some(format!("its disk {disk} isn't there: bring it back")),
        disk,
        image: view.images.get(&digest).map(Image::names).unwrap_or_default(),
        digest: Some(digest),
        size: reference.size,
        stored_bytes: 0,
        state: ReplicaState::DiskMissing,
        created: reference.created,
    }
}

/// Why a replica has no base, and what to do.
pub(crate) fn base_missing(view: &View, base: &Base) -> String {
    if view.images.contains_key(&base.digest) {
        return format!("no copy of its image {} serves: import it again", base.name);
    }
    let home = view.disk_name(base.disk).unwrap_or(&base.disk_name);
    let missing = view.missing();
    let where_now = if missing.is_empty() {
        "no disk that is there holds it".to_owned()
    } else {
        format!("it may be on a disk that isn't there ({})", listed(&missing))
    };
    format!(
        "its image {} ({}) was on disk {home}, and {where_now}: bring that disk back, or import \
         the image again",
        base.name, base.digest
    )
}
