//! What is on all disks together, in memory: built from their contents, and changed after each
//! durable change to them.
//!
//! Invariants:
//! - The view does no I/O.
//! - One name leads to at most one image and one replica. Where two disks that were brought
//!   together claim the same name, the older object has it; the other is reached by its id or
//!   digest.
//! - An image is used by whatever refers to it *and* by every replica that says it stands on it: a
//!   lost reference doesn't make a base removable.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    ffi::OsString,
    sync::Arc,
};

use uuid::Uuid;

use super::{
    claims::Claims,
    disk::{Absence, Disk},
    disks::Placement,
    media::Tier,
    name::{Digest, Name},
    record::{DiskRecord, KnownDisk, RefRecord, ReplicaRecord},
    removed::{Buried, RemovedRecord},
    scan::{Contents, CopyFound, Reference, ReplicaFound},
    status::{CopyState, ImageUser, UserState},
    unfinished::Unfinished,
};
use crate::error::{Error, Kind, Result};

/// The view.
#[derive(Debug, Default)]
pub(crate) struct View {
    /// In the order in which they were added.
    pub disks: Vec<Slot>,
    pub images: BTreeMap<Digest, Image>,
    pub replicas: BTreeMap<Uuid, Replica>,
    /// Directories of replicas that are also on another disk, where they count.
    pub spares: Vec<Replica>,
    pub claims: Claims,
    /// The kind of disk that images are placed on before others.
    pub placement: Placement,
    /// Staging directories that somebody is at work in.
    pub live: HashSet<OsString>,
    /// Copies whose making was interrupted.
    pub unfinished: Vec<Unfinished>,
    /// What is to go from disks that are away, once they return.
    pub removed: BTreeMap<Uuid, RemovedRecord>,
    /// What has gone from disks that have returned, to be told.
    pub buried: Vec<Buried>,
    /// Replicas that are there and can't be understood, and their disk.
    damaged: HashMap<Uuid, Uuid>,
    image_names: HashMap<Name, Digest>,
    replica_names: HashMap<Name, Uuid>,
}

/// A disk that the node knows.
#[derive(Debug)]
pub(crate) struct Slot {
    pub known: KnownDisk,
    pub at: Attachment,
}

/// Whether a disk is there.
#[derive(Debug)]
pub(crate) enum Attachment {
    Here(Arc<Disk>, DiskRecord),
    Away(Absence),
}

/// An image.
#[derive(Debug)]
pub(crate) struct Image {
    /// In the order of the disks; never empty.
    pub copies: Vec<Copy>,
}

/// A copy of an image, on a disk that is there.
#[derive(Debug)]
pub(crate) struct Copy {
    pub disk: Uuid,
    pub found: CopyFound,
}

/// A replica, on a disk that is there.
#[derive(Debug)]
pub(crate) struct Replica {
    pub disk: Uuid,
    pub record: ReplicaRecord,
    pub fault: Option<String>,
}

impl Slot {
    /// The disk, if it is there.
    pub(crate) fn here(&self) -> Option<&Arc<Disk>> {
        match &self.at {
            Attachment::Here(disk, _) => Some(disk),
            Attachment::Away(_) => None,
        }
    }

    /// The disk, or why it can't be used.
    pub(crate) fn usable(&self) -> Result<&Arc<Disk>> {
        match &self.at {
            Attachment::Here(disk, _) => Ok(disk),
            Attachment::Away(_) => Err(self.absent()),
        }
    }

    /// The error of a disk that isn't there.
    pub(crate) fn absent(&self) -> Error {
        let reason = match &self.at {
            Attachment::Here(..) => "it isn't there",
            Attachment::Away(absence) => &absence.reason,
        };
        let what = format!("disk {} can't be used: {reason}", self.known.name);
        Error::new(Kind::Unavailable, what)
    }

    /// The disk, if something new may be put on it.
    pub(crate) fn takes_new(&self) -> Result<&Arc<Disk>> {
        let disk = self.usable()?;
        if self.is_draining() {
            let name = &self.known.name;
            let what = format!(
                "disk {name} is being drained and takes nothing new: choose another, or \
                 `underlay disk undrain {name}`"
            );
            return Err(Error::new(Kind::Invalid, what));
        }
        Ok(disk)
    }

    /// Whether it takes nothing new.
    pub(crate) fn is_draining(&self) -> bool {
        matches!(&self.at, Attachment::Here(_, record) if record.draining)
    }

    /// How fast it is, if it is there and that is known.
    pub(crate) fn tier(&self) -> Option<Tier> {
        match &self.at {
            Attachment::Here(_, record) => record.tier,
            Attachment::Away(_) => None,
        }
    }

    /// Whether it takes images only.
    pub(crate) fn is_pool(&self) -> bool {
        matches!(&self.at, Attachment::Here(_, record) if record.pool)
    }
}

impl Copy {
    /// Whether it serves.
    pub(crate) fn state(&self) -> CopyState {
        if self.found.fault.is_none() { CopyState::Ready } else { CopyState::Failed }
    }
}

impl Image {
    /// The names of the image, from all its copies.
    pub(crate) fn names(&self) -> Vec<Name> {
        let mut names = Vec::new();
        for name in self.copies.iter().flat_map(|copy| &copy.found.record.names) {
            if !names.contains(name) {
                names.push(name.clone());
            }
        }
        names
    }

    /// How many copies are wanted, if somebody said: the most that any copy knows of.
    pub(crate) fn wanted(&self) -> Option<u32> {
        self.copies.iter().filter_map(|copy| copy.found.record.copies).max()
    }

    /// A copy that serves, the first of them.
    pub(crate) fn ready(&self) -> Option<&Copy> {
        self.copies.iter().find(|copy| copy.state() == CopyState::Ready)
    }

    /// References beside any of the copies.
    pub(crate) fn refs(&self) -> BTreeMap<Uuid, &Reference> {
        let mut refs: BTreeMap<Uuid, &Reference> = BTreeMap::new();
        for (id, reference) in self.copies.iter().flat_map(|copy| &copy.found.refs) {
            let known = refs.entry(*id).or_insert(reference);
            if known.damaged {
                *known = reference;
            }
        }
        refs
    }
}

impl View {
    /// The disk of this id, among those that the node knows.
    pub(crate) fn slot(&self, id: Uuid) -> Option<&Slot> {
        self.disks.iter().find(|slot| slot.known.id == id)
    }

    /// The disk of this id, if it is there.
    pub(crate) fn here(&self, id: Uuid) -> Option<&Arc<Disk>> {
        self.slot(id)?.here()
    }

    /// The disk of this name, or id.
    pub(crate) fn disk(&self, name: &Name) -> Result<&Slot> {
        let named = self.disks.iter().find(|slot| slot.known.name == *name);
        named.or_else(|| self.slot(name.id()?)).ok_or_else(|| {
            Error::new(
                Kind::NotFound,
                format!("no disk {name} on this node: see `underlay disk list`"),
            )
        })
    }

    /// The name of a disk, if the node knows it.
    pub(crate) fn disk_name(&self, id: Uuid) -> Option<&Name> {
        self.slot(id).map(|slot| &slot.known.name)
    }

    /// Names of the disks that are not there.
    pub(crate) fn missing(&self) -> Vec<Name> {
        let away = self.disks.iter().filter(|slot| slot.here().is_none());
        away.map(|slot| slot.known.name.clone()).collect()
    }

    /// The image of this name, or digest.
    pub(crate) fn image(&self, name: &Name) -> Result<(Digest, &Image)> {
        let digest = self.image_names.get(name).copied().or_else(|| name.digest());
        let found = digest.and_then(|digest| Some((digest, self.images.get(&digest)?)));
        found.ok_or_else(|| self.absent("image", name))
    }

    /// The image that has this name, which may be another's digest.
    pub(crate) fn image_named(&self, name: &Name) -> Option<Digest> {
        self.image_names.get(name).copied()
    }

    /// The replica of this name, or id.
    pub(crate) fn replica(&self, name: &Name) -> Result<(Uuid, &Replica)> {
        let id = self.replica_names.get(name).copied().or_else(|| name.id());
        let found = id.and_then(|id| Some((id, self.replicas.get(&id)?)));
        found.ok_or_else(|| self.absent("replica", name))
    }

    /// The replica that has this name, which may be another's id.
    pub(crate) fn replica_named(&self, name: &Name) -> Option<Uuid> {
        self.replica_names.get(name).copied()
    }

    fn absent(&self, kind: &str, name: &Name) -> Error {
        let missing = self.missing();
        let hint = if missing.is_empty() {
            format!("see `underlay {kind} list`")
        } else {
            format!("it may be on a disk that isn't there ({})", listed(&missing))
        };
        Error::new(Kind::NotFound, format!("no {kind} {name} on this node: {hint}"))
    }

    /// References whose replica's disk isn't there, each once, with the image referred to.
    pub(crate) fn away(&self) -> Vec<(Digest, &RefRecord)> {
        let mut away = Vec::new();
        for (digest, image) in &self.images {
            for (id, reference) in image.refs() {
                if self.user_state(id, reference) == UserState::Away {
                    away.push((*digest, &reference.record));
                }
            }
        }
        away
    }

    /// Whether the replica that a reference tells of is there. One that is there and says that it
    /// stands on another image counts as well: one of the two records is wrong, who knows which.
    pub(crate) fn user_state(&self, id: Uuid, reference: &Reference) -> UserState {
        if self.replicas.contains_key(&id) || self.damaged.contains_key(&id) {
            UserState::Present
        } else if self.is_removed(id) {
            UserState::Leaked
        } else if self.here(reference.record.disk).is_none() {
            UserState::Away
        } else {
            UserState::Leaked
        }
    }

    /// Whether a replica was removed while a disk was away that may have a part of it.
    fn is_removed(&self, id: Uuid) -> bool {
        self.removed.values().any(|record| record.replicas.contains(&id))
    }

    /// The disks that are not there.
    pub(crate) fn away_disks(&self) -> Vec<Uuid> {
        let away = self.disks.iter().filter(|slot| slot.here().is_none());
        away.map(|slot| slot.known.id).collect()
    }

    /// Who uses an image.
    pub(crate) fn users(&self, digest: Digest) -> Vec<ImageUser> {
        let mut users = BTreeMap::new();
        if let Some(image) = self.images.get(&digest) {
            for (id, reference) in image.refs() {
                let state = self.user_state(id, reference);
                let RefRecord { name, disk, disk_name, .. } = &reference.record;
                let disk = self.disk_name(*disk).unwrap_or(disk_name).clone();
                users.insert(id, ImageUser { name: name.clone(), id, disk, state });
            }
        }
        let standing = self.replicas.iter().filter(|(_, r)| r.record.digest() == Some(digest));
        for (id, replica) in standing {
            let name = replica.record.name.clone();
            let disk = self.disk_name(replica.disk).cloned().unwrap_or_else(Name::unknown);
            users.insert(*id, ImageUser { name, id: *id, disk, state: UserState::Present });
        }
        let mut users: Vec<_> = users.into_values().collect();
        users.sort_by(|a, b| (&a.name, a.id).cmp(&(&b.name, b.id)));
        users
    }

    /// Takes in what was found on a disk, in the place of what was known of it.
    pub(crate) fn attach(&mut self, disk: Uuid, contents: Contents) {
        // Some may have been left since the disk was looked at: those that have gone do no harm.
        let mut left = std::mem::take(&mut self.unfinished);
        self.forget(disk);
        left.retain(|it| {
            it.disk != disk || !contents.unfinished.iter().any(|at| at.name == it.name)
        });
        self.unfinished = left;
        let mut contents = contents;
        if let Some(removed) = self.removed.get(&disk) {
            contents.replicas.retain(|found| !removed.replicas.contains(&found.record.id));
            contents.damaged.retain(|id| !removed.replicas.contains(id));
        }
        for found in contents.copies {
            self.put_copy(Copy { disk, found });
        }
        for ReplicaFound { record, fault } in contents.replicas {
            self.put_found(Replica { disk, record, fault });
        }
        self.unfinished.extend(contents.unfinished);
        self.damaged.extend(contents.damaged.into_iter().map(|id| (id, disk)));
        self.promote_spares();
        self.index();
    }

    /// An id that is there twice: the higher epoch counts, the first of equals. What becomes of the
    /// other is `moves`' business, or `fsck` tells of it.
    fn put_found(&mut self, found: Replica) {
        let id = found.record.id;
        let spare = match self.replicas.get_mut(&id) {
            None => self.replicas.insert(id, found),
            Some(known) if found.record.epoch > known.record.epoch => {
                Some(std::mem::replace(known, found))
            }
            Some(_) => Some(found),
        };
        self.spares.extend(spare);
    }

    /// Of replicas that were on two disks, and one has gone, the other counts.
    fn promote_spares(&mut self) {
        for spare in std::mem::take(&mut self.spares) {
            self.put_found(spare);
        }
    }

    /// Whether something of this id is on the disk that can't be understood.
    pub(crate) fn is_damaged(&self, id: Uuid, disk: Uuid) -> bool {
        self.damaged.get(&id) == Some(&disk)
    }

    /// Forgets what is on a disk.
    pub(crate) fn detach(&mut self, disk: Uuid) {
        self.forget(disk);
        self.promote_spares();
        self.index();
    }

    fn forget(&mut self, disk: Uuid) {
        for image in self.images.values_mut() {
            image.copies.retain(|copy| copy.disk != disk);
        }
        self.images.retain(|_, image| !image.copies.is_empty());
        self.replicas.retain(|_, replica| replica.disk != disk);
        self.spares.retain(|replica| replica.disk != disk);
        self.unfinished.retain(|unfinished| unfinished.disk != disk);
        self.damaged.retain(|_, at| *at != disk);
    }

    /// Takes in a copy, in the place of what was known of it.
    pub(crate) fn put_copy(&mut self, copy: Copy) {
        let digest = copy.found.record.digest;
        let image = self.images.entry(digest).or_insert_with(|| Image { copies: Vec::new() });
        image.copies.retain(|other| other.disk != copy.disk);
        image.copies.push(copy);
        let rank = |id| self.disks.iter().position(|slot| slot.known.id == id);
        image.copies.sort_by_key(|copy| rank(copy.disk));
    }

    /// Takes in a new replica.
    pub(crate) fn put_replica(&mut self, replica: Replica) {
        let (id, name) = (replica.record.id, replica.record.name.clone());
        self.replicas.insert(id, replica);
        self.replica_names.entry(name).or_insert(id);
    }

    /// Forgets a replica; another that was hidden by its name is now reached by it.
    pub(crate) fn drop_replica(&mut self, id: Uuid) {
        let Some(replica) = self.replicas.remove(&id) else { return };
        let name = replica.record.name;
        if self.replica_names.get(&name) == Some(&id) {
            let heirs = self.replicas.values().filter(|other| other.record.name == name);
            match heirs.min_by_key(|other| (other.record.created, other.record.id)) {
                Some(heir) => self.replica_names.insert(name, heir.record.id),
                None => self.replica_names.remove(&name),
            };
        }
    }

    /// The copies of an image, to change what is known of them; call [`View::index`] after a
    /// change of names.
    pub(crate) fn copies_mut(&mut self, digest: Digest) -> impl Iterator<Item = &mut Copy> {
        self.images.get_mut(&digest).into_iter().flat_map(|image| &mut image.copies)
    }

    /// Finds out anew which name leads where.
    pub(crate) fn index(&mut self) {
        let mut images: Vec<_> = self.images.iter().collect();
        images.sort_by_key(|(digest, image)| {
            (image.copies.iter().map(|copy| copy.found.record.created).min(), **digest)
        });
        self.image_names.clear();
        for (digest, image) in images {
            for name in image.names() {
                self.image_names.entry(name).or_insert(*digest);
            }
        }
        let mut replicas: Vec<_> = self.replicas.values().map(|replica| &replica.record).collect();
        replicas.sort_by_key(|record| (record.created, record.id));
        self.replica_names.clear();
        for record in replicas {
            self.replica_names.entry(record.name.clone()).or_insert(record.id);
        }
    }
}

/// Names for a message, not more than are useful.
pub(crate) fn listed<T: ToString>(names: &[T]) -> String {
    const SHOWN: usize = 10;
    let mut text = names.iter().take(SHOWN).map(T::to_string).collect::<Vec<_>>().join(", ");
    if names.len() > SHOWN {
        text += &format!(" and {} more", names.len() - SHOWN);
    }
    text
}
