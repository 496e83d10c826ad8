//! Replicas: making, opening, growing and removing them.
//!
//! Invariants:
//! - Making one: the reference is durable before the replica appears, whole, by one rename.
//!   Removing one: the replica is durably out of sight before the reference goes. A crash in between
//!   leaves a reference too many, never one too few.
//! - The cost of making one depends on neither size: `data` is a hole and `map` is given by the
//!   caller.
//! - What a replica holds is the overlay's: here only its files' names and their record are known.

use std::{ffi::OsString, fs::File, path::Path, sync::Arc};

use nix::fcntl::OFlag;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::{
    claims::{Mode, Object, Want},
    dir::{Dir, TEMP_PREFIX, sync_together},
    disk::{DATA, Disk, MAP, REFS, REPLICA_JSON},
    image::no_copy,
    moves::{check_settled, check_target},
    name::{Digest, Name},
    node::Node,
    record::{self, Base, FORMAT, RefRecord, ReplicaRecord},
    removed::Gone,
    scan::{DELETING, Reference, STAGING, ref_file},
    status::{CopyState, ReplicaStatus},
    view::{Image, Replica, View},
};
use crate::{
    error::{Error, Kind, Result},
    units::SECTOR,
};

/// The largest replica, in bytes.
pub const REPLICA_MAX: u64 = 64 << 40;

/// A replica to be made.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NewReplica {
    /// What it shall be called.
    pub name: Name,
    /// The image it stands on: a name or a digest.
    pub image: Name,
    /// The disk that its overlay lies on.
    pub disk: Name,
    /// Its size in bytes; the image's by default, never less, a multiple of 512.
    pub size: Option<u64>,
}

/// What became of a replica that was removed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Removed {
    /// It is gone.
    Whole,
    /// It is gone; its reference could not be removed, and holds the image until `fsck` does.
    ReferenceLeft,
    /// Its disk is none of the node's: it no longer holds its image, and its files are where they were.
    ReferenceOnly,
    /// Its disk isn't there: it holds nothing any more, and goes when the disk returns.
    OnReturn,
}

/// A replica's files, to be opened as its overlay needs them.
#[derive(Debug)]
pub struct OpenReplica {
    /// Its identity; the overlay's, too.
    pub id: Uuid,
    /// Its name.
    pub name: Name,
    /// Its disk.
    pub disk: Name,
    /// The image that it stands on, unless it needs none.
    pub digest: Option<Digest>,
    /// The size in its record; the overlay's own is the one that counts.
    pub size: u64,
    dir: Dir,
}

impl OpenReplica {
    /// Opens `data` for reading and writing, with `flags` (such as `O_DIRECT`) beside.
    pub fn open_data(&self, flags: OFlag) -> Result<File> {
        self.open(DATA, flags)
    }

    /// Opens `map` for reading and writing, with `flags` beside.
    pub fn open_map(&self, flags: OFlag) -> Result<File> {
        self.open(MAP, flags)
    }

    /// Its directory, for messages.
    pub fn path(&self) -> &Path {
        self.dir.path()
    }

    fn open(&self, file: &str, flags: OFlag) -> Result<File> {
        let opened = self.dir.file(file, OFlag::O_RDWR | flags);
        opened.map_err(|error| error.within(format!("replica {}", self.name)))
    }
}

/// All that making a replica needs, found out at once.
struct Plan {
    digest: Digest,
    disk: Arc<Disk>,
    /// The disks with copies of the image.
    copies: Vec<Arc<Disk>>,
    reference: RefRecord,
    record: ReplicaRecord,
}

impl Node {
    /// Makes a replica. `map` gives the first bytes of the map of an overlay of that id and size.
    pub fn create_replica(
        &self,
        new: NewReplica,
        map: impl FnOnce(Uuid, u64) -> Vec<u8>,
    ) -> Result<ReplicaStatus> {
        self.create_filled(new, map, |_| Ok(()))
    }

    /// Makes a replica that `fill` fills, durably, before anybody sees it.
    pub fn create_filled(
        &self,
        new: NewReplica,
        map: impl FnOnce(Uuid, u64) -> Vec<u8>,
        fill: impl FnOnce(OpenReplica) -> Result<()>,
    ) -> Result<ReplicaStatus> {
        new.name.for_new()?;
        let within = |error: Error| error.within(format!("replica {}", new.name));
        let id = Uuid::new_v4();
        let (_claimed, plan) = self.0.claim(format!("replica {}", new.name), |view| {
            let plan = plan(view, &new, id).map_err(within)?;
            let wants: Vec<Want> = vec![
                (Object::Catalogue, Mode::Shared),
                (Object::ReplicaName(new.name.clone()), Mode::Alone),
                (Object::Replica(id), Mode::Alone),
                (Object::Image(plan.digest), Mode::Shared),
                (Object::Disk(plan.disk.id), Mode::Shared),
            ];
            let copies = plan.copies.iter().map(|copy| (Object::Disk(copy.id), Mode::Shared));
            Ok((wants.into_iter().chain(copies).collect(), plan))
        })?;
        let made = plan
            .disk
            .check_writable()
            .and_then(|()| self.make(&plan, &map(id, plan.record.size), fill));
        made.map_err(|error| match error.kind() {
            Kind::NoSpace => within(error.within("a disk is full: free some space on it")),
            _ => within(error),
        })?;
        self.replica_by_id(id)
    }

    fn make(
        &self,
        plan: &Plan,
        map: &[u8],
        fill: impl FnOnce(OpenReplica) -> Result<()>,
    ) -> Result<()> {
        let Plan { digest, disk, copies, reference, record } = plan;
        let digest = *digest;
        let replicas = &disk.replicas;
        let staging = OsString::from(format!("{STAGING}{}", record.id));
        let (sound, refs) = writable(copies, digest)?;
        let built = build(replicas, &staging, record, map, &refs, reference).and_then(|()| {
            fill(OpenReplica {
                id: record.id,
                name: record.name.clone(),
                disk: reference.disk_name.clone(),
                digest: Some(digest),
                size: record.size,
                dir: replicas.open(&staging)?,
            })?;
            replicas.rename(&staging, record.id.to_string())
        });
        if let Err(error) = built {
            // Nothing is visible yet: take back what was made, the references last.
            let mut undone = replicas.remove_tree(&staging);
            for copy in &sound {
                undone = undone.and_then(|()| drop_reference(copy, digest, record.id));
            }
            if let Err(left) = undone {
                tracing::warn!(%left, "the rest of a replica stays until fsck");
            }
            return Err(error);
        }
        // From here on it is there. Should the sync fail, it is known and the error is told.
        {
            let mut view = self.0.view();
            for copy in view.copies_mut(digest) {
                if sound.iter().any(|disk| disk.id == copy.disk) {
                    let reference = Reference { record: reference.clone(), damaged: false };
                    copy.found.refs.insert(record.id, reference);
                }
            }
            view.put_replica(Replica { disk: disk.id, record: record.clone(), fault: None });
        }
        replicas.sync()
    }

    /// Opens a replica's directory. Nothing is read yet but what the catalogue knows.
    pub fn open_replica(&self, name: &Name) -> Result<OpenReplica> {
        let view = self.0.view();
        let (id, replica) = view.replica(name)?;
        if let Some(fault) = &replica.fault {
            let what = format!("replica {name}: {fault}: bring it back from a backup");
            return Err(Error::new(Kind::Corrupt, what));
        }
        check_settled(&view, replica)?;
        let Some(slot) = view.slot(replica.disk) else { return Err(unplaced(name)) };
        let disk = slot.usable()?.clone();
        let record = replica.record.clone();
        let disk_name = slot.known.name.clone();
        drop(view);
        let within = |error: Error| error.within(format!("replica {name}"));
        disk.check_writable().map_err(within)?;
        let dir = disk.replica(id).map_err(within)?;
        let digest = record.digest();
        let ReplicaRecord { name, size, .. } = record;
        Ok(OpenReplica { id, name, disk: disk_name, digest, size, dir })
    }

    /// Removes a replica and then its reference. Nobody may have it open.
    pub fn remove_replica(&self, name: &Name) -> Result<Removed> {
        let within = |error: Error| error.within(format!("replica {name}"));
        let what = format!("replica {name}");
        let (_claimed, (id, digest, disk, copies, away)) = self.0.claim(what, |view| {
            let (id, digest, disk, away) = match view.replica(name) {
                Ok((id, replica)) => {
                    check_settled(view, replica)?;
                    if view.spares.iter().any(|spare| spare.record.id == id) {
                        let what = format!(
                            "replica {name}: it is on two disks: `underlay fsck --repair` removes \
                             what a move has left, or tells what to do"
                        );
                        return Err(Error::new(Kind::InUse, what));
                    }
                    let slot = view.slot(replica.disk).ok_or_else(|| unplaced(name))?;
                    // What it was moved from, or to in vain, may be on a disk that is away.
                    let has_moved = replica.record.epoch > 0;
                    let away = if has_moved { view.away_disks() } else { Vec::new() };
                    (id, replica.record.digest(), Some(slot.usable()?.clone()), away)
                }
                Err(error) => match away(view, name) {
                    Some((digest, reference)) => {
                        // Where a disk waits, its return is what the rest waits for.
                        let known = view.slot(reference.disk).is_some();
                        let away = if known { view.away_disks() } else { Vec::new() };
                        (reference.replica, Some(digest), None, away)
                    }
                    None => return Err(error),
                },
            };
            let image = digest.and_then(|digest| view.images.get(&digest));
            let copies = image.map_or(&[][..], |image| &image.copies);
            let with = copies.iter().filter(|copy| copy.found.refs.contains_key(&id));
            let copies: Vec<Arc<Disk>> = with.filter_map(|c| view.here(c.disk).cloned()).collect();
            let mut wants: Vec<Want> = vec![
                (Object::Catalogue, Mode::Shared),
                (Object::Disks, Mode::Shared),
                (Object::ReplicaName(name.clone()), Mode::Alone),
                (Object::Replica(id), Mode::Alone),
            ];
            wants.extend(digest.map(|digest| (Object::Image(digest), Mode::Shared)));
            let disks = disk.iter().chain(&copies);
            wants.extend(disks.map(|disk| (Object::Disk(disk.id), Mode::Shared)));
            Ok((wants, (id, digest, disk, copies, away)))
        })?;
        if let Some(disk) = &disk {
            disk.check_writable().map_err(within)?;
        }
        // If its disk is away, this is the moment at which it is removed.
        self.remember_removed(&Gone::Replica(id), &away).map_err(within)?;
        if let Some(disk) = &disk {
            self.take_away(disk, id).map_err(within)?;
        }
        let mut outcome = match (&disk, away.is_empty()) {
            (Some(_), _) => Removed::Whole,
            (None, true) => Removed::ReferenceOnly,
            (None, false) => Removed::OnReturn,
        };
        for (copy, digest) in copies.iter().zip(digest.into_iter().cycle()) {
            match drop_reference(copy, digest, id) {
                Ok(()) => {
                    let mut view = self.0.view();
                    if let Some(copy) = view.copies_mut(digest).find(|found| found.disk == copy.id)
                    {
                        copy.found.refs.remove(&id);
                    }
                }
                Err(error) if outcome == Removed::ReferenceOnly => return Err(within(error)),
                Err(error) => {
                    tracing::warn!(replica = %name, %error, "its reference stays until fsck");
                    outcome = Removed::ReferenceLeft;
                }
            }
        }
        Ok(outcome)
    }

    /// Renames a replica out of sight, durably, and removes its files.
    fn take_away(&self, disk: &Disk, id: Uuid) -> Result<()> {
        let doomed = format!("{DELETING}{id}");
        // A replica of this id may have been removed before, and its rest still be there.
        disk.replicas.remove_tree(&doomed)?;
        disk.replicas.rename(id.to_string(), &doomed)?;
        self.0.view().drop_replica(id);
        disk.replicas.sync()?;
        disk.replicas.remove_tree(&doomed)
    }

    /// Brings a replica's record in line with its overlay, whose size is the one that counts.
    pub fn set_replica_size(&self, name: &Name, size: u64) -> Result<()> {
        let (_claimed, (disk, record)) = self.0.claim(format!("replica {name}"), |view| {
            let (id, replica) = view.replica(name)?;
            let slot = view.slot(replica.disk).ok_or_else(|| unplaced(name))?;
            let wants: Vec<Want> = vec![
                (Object::Catalogue, Mode::Shared),
                (Object::Replica(id), Mode::Alone),
                (Object::Disk(replica.disk), Mode::Shared),
            ];
            Ok((wants, (slot.usable()?.clone(), replica.record.clone())))
        })?;
        if record.size == size {
            return Ok(());
        }
        self.write_record(&disk, ReplicaRecord { size, ..record })
            .map_err(|error| error.within(format!("replica {name}")))
    }

    /// Records that a replica needs no image any more: all that it took from it is durably its own.
    /// Whether its references are gone, too; else `fsck` removes them.
    pub fn flatten_replica(&self, name: &Name) -> Result<Removed> {
        let within = |error: Error| error.within(format!("replica {name}"));
        let (_claimed, (disk, record, digest, copies)) =
            self.0.claim(format!("replica {name}"), |view| {
                let (id, replica) = view.replica(name)?;
                check_settled(view, replica)?;
                let slot = view.slot(replica.disk).ok_or_else(|| unplaced(name))?;
                let Some(digest) = replica.record.digest() else { return Err(is_flat(name)) };
                let image = view.images.get(&digest);
                let copies = image.iter().flat_map(|image| &image.copies);
                let copies: Vec<_> = copies.filter_map(|c| view.here(c.disk).cloned()).collect();
                let mut wants: Vec<Want> = vec![
                    (Object::Catalogue, Mode::Shared),
                    (Object::Replica(id), Mode::Alone),
                    (Object::Image(digest), Mode::Shared),
                    (Object::Disk(replica.disk), Mode::Shared),
                ];
                wants.extend(copies.iter().map(|disk| (Object::Disk(disk.id), Mode::Shared)));
                let disk = slot.usable()?.clone();
                Ok((wants, (disk, replica.record.clone(), digest, copies)))
            })?;
        let id = record.id;
        self.write_record(&disk, ReplicaRecord { image: None, ..record }).map_err(within)?;
        let mut outcome = Removed::Whole;
        for copy in &copies {
            match drop_reference(copy, digest, id) {
                Ok(()) => {
                    let mut view = self.0.view();
                    if let Some(copy) = view.copies_mut(digest).find(|found| found.disk == copy.id)
                    {
                        copy.found.refs.remove(&id);
                    }
                }
                Err(error) => {
                    tracing::warn!(replica = %name, %error, "its reference stays until fsck");
                    outcome = Removed::ReferenceLeft;
                }
            }
        }
        Ok(outcome)
    }
}

/// The error for a replica that has no image to be freed of.
pub(crate) fn is_flat(name: &Name) -> Error {
    Error::new(Kind::Exists, format!("replica {name}: it stands on no image already"))
}

/// The reference of a replica where it is now.
pub(crate) fn reference_to(view: &View, replica: &Replica) -> Option<RefRecord> {
    Some(RefRecord {
        format: FORMAT,
        replica: replica.record.id,
        name: replica.record.name.clone(),
        disk: replica.disk,
        disk_name: view.disk_name(replica.disk)?.clone(),
        size: replica.record.size,
        created: replica.record.created,
    })
}

/// The reference, by that name or id, to a replica whose disk isn't there.
pub(crate) fn away<'a>(view: &'a View, name: &Name) -> Option<(Digest, &'a RefRecord)> {
    let refs = view.away();
    let named = refs.iter().find(|(_, reference)| reference.name == *name).copied();
    named.or_else(|| refs.into_iter().find(|(_, reference)| Some(reference.replica) == name.id()))
}

/// Removes a reference beside a copy, durably.
pub(crate) fn drop_reference(disk: &Disk, digest: Digest, id: Uuid) -> Result<()> {
    let refs = disk.refs(digest)?;
    let file = ref_file(id);
    refs.unlink_if_there(format!("{TEMP_PREFIX}{file}"))?;
    refs.unlink_if_there(file)?;
    refs.sync()
}

/// The directories of references of those copies that can take one, and their disks; an error if there is
/// none. A copy that lacks a reference gets it from the others once it can be written.
fn writable(copies: &[Arc<Disk>], digest: Digest) -> Result<(Vec<Arc<Disk>>, Vec<Dir>)> {
    let (mut disks, mut refs, mut failed) = (Vec::new(), Vec::new(), None);
    for disk in copies {
        let dir = disk.check_writable().and_then(|()| disk.copy(digest)?.ensure(REFS));
        match dir {
            Ok(dir) => {
                refs.push(dir);
                disks.push(disk.clone());
            }
            Err(error) => failed = Some(error),
        }
    }
    match failed {
        Some(error) if disks.is_empty() => Err(error),
        Some(error) => {
            tracing::warn!(image = %digest, %error, "a copy gets its reference later");
            Ok((disks, refs))
        }
        None => Ok((disks, refs)),
    }
}

/// Makes the references durable, and builds the replica's directory under its staging name, durable
/// too. The syncs of both go together: what counts is that both are done when the replica appears.
fn build(
    replicas: &Dir,
    staging: &OsString,
    record: &ReplicaRecord,
    map: &[u8],
    refs: &[Dir],
    reference: &RefRecord,
) -> Result<()> {
    let file = ref_file(record.id);
    let mut temps = Vec::new();
    for refs in refs {
        temps.push((refs, refs.write_temp(&file, &record::bytes(reference)?)?));
    }
    let dir = replicas.create(staging)?;
    dir.write_sparse(DATA, record.size)?;
    dir.write_new(MAP, map)?;
    dir.write_new(REPLICA_JSON, &record::bytes(record)?)?;
    let mut syncs: Vec<Box<dyn Fn() -> Result<()> + Sync + '_>> = Vec::new();
    for (refs, temp) in &temps {
        syncs.push(Box::new(move || refs.sync_file(temp)));
    }
    for file in [DATA, MAP, REPLICA_JSON] {
        let dir = &dir;
        syncs.push(Box::new(move || dir.sync_file(file)));
    }
    sync_together(&syncs.iter().map(|sync| &**sync).collect::<Vec<_>>())?;
    for (refs, temp) in &temps {
        refs.rename(temp, &file)?;
    }
    let mut syncs: Vec<Box<dyn Fn() -> Result<()> + Sync + '_>> = vec![Box::new(|| dir.sync())];
    for refs in refs {
        syncs.push(Box::new(move || refs.sync()));
    }
    sync_together(&syncs.iter().map(|sync| &**sync).collect::<Vec<_>>())
}

fn plan(view: &View, new: &NewReplica, id: Uuid) -> Result<Plan> {
    let slot = view.disk(&new.disk)?;
    let disk = check_target(slot)?;
    if view.replica_named(&new.name).is_some() {
        let what = "the name is taken: choose another, or remove that replica first";
        return Err(Error::new(Kind::Exists, what));
    }
    if let Some((_, reference)) = away(view, &new.name) {
        let what = format!(
            "the name belongs to a replica on disk {}, which isn't there: choose another",
            reference.disk_name
        );
        return Err(Error::new(Kind::Exists, what));
    }
    let (digest, image) = view.image(&new.image)?;
    let Some(copy) = image.ready() else { return Err(no_copy(&new.image, image)) };
    let base = copy.found.record.size;
    let size = check_size(new.size, base)?;
    let ready = image.copies.iter().filter(|copy| copy.state() == CopyState::Ready);
    let copies: Vec<Arc<Disk>> = ready.filter_map(|copy| view.here(copy.disk).cloned()).collect();
    let reference = RefRecord {
        format: FORMAT,
        replica: id,
        name: new.name.clone(),
        disk: disk.id,
        disk_name: slot.known.name.clone(),
        size,
        created: record::now(),
    };
    let base = Base {
        digest,
        size: base,
        name: called(&new.image, image),
        disk: copy.disk,
        disk_name: view.disk_name(copy.disk).cloned().unwrap_or_else(Name::unknown),
    };
    let created = reference.created;
    let record = ReplicaRecord {
        format: FORMAT,
        id,
        name: new.name.clone(),
        size,
        image: Some(base),
        epoch: 0,
        moving_to: None,
        created,
    };
    Ok(Plan { digest, disk, copies, reference, record })
}

/// What to remember an image by: its name rather than its digest.
fn called(asked: &Name, image: &Image) -> Name {
    let names = image.names();
    if names.contains(asked) { asked.clone() } else { names.first().unwrap_or(asked).clone() }
}

fn check_size(asked: Option<u64>, base: u64) -> Result<u64> {
    let size = asked.unwrap_or(base);
    let wrong = if size == 0 {
        "is empty".to_owned()
    } else if !size.is_multiple_of(SECTOR) {
        format!("is no multiple of {SECTOR}")
    } else if size < base {
        format!("is less than its image's {base}")
    } else if size > REPLICA_MAX {
        format!("is more than {REPLICA_MAX}")
    } else {
        return Ok(size);
    };
    Err(Error::new(Kind::Invalid, format!("a size of {size} bytes {wrong}: choose another")))
}

pub(crate) fn unplaced(name: &Name) -> Error {
    Error::new(Kind::Unavailable, format!("replica {name}: its disk is gone"))
}
