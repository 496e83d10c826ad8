//! What was removed while a disk was away that may hold a part of it: so that it doesn't come back with
//! the disk.
//!
//! ```text
//!   <state>/removed/<disk>.json    what is to go from that disk when it returns
//!   remove      it is written there first, then what is here goes
//!   return      judged before anybody sees the disk; what is to go goes; then it is struck off
//! ```
//!
//! Invariants:
//! - Identities count, not names: digests, and the ids of replicas.
//! - A copy that a replica stands on, or may stand on, never goes.
//! - What is there on a disk that doesn't wait for its removal was not removed, or has come again: a
//!   removal that was interrupted, or undone by an import, is struck off.
//! - A replica that waits for its disk's return to go is seen by nobody, and holds nothing.
//! - Deciding is pure ([`World::judge`]).

use std::collections::{BTreeMap, HashMap, HashSet};

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::{
    disk::{Disk, IMAGE_JSON},
    name::{Digest, Name},
    node::{DISKS_MAX, Node},
    record::{self, FORMAT},
    replica::drop_reference,
    scan::{Contents, CopyFound, DELETING},
    view::View,
};
use crate::error::{Error, Kind, Result};

/// The directory, within the state directory, of what was removed.
const REMOVED: &str = "removed";
/// Removals that may wait for one disk: what fits a record.
pub(crate) const REMOVED_MAX: usize = 800;
/// Words about what has gone that wait to be heard.
const BURIED_MAX: usize = 1000;

/// `<state>/removed/<disk>.json`: what is to go from a disk when it returns.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct RemovedRecord {
    pub format: u32,
    pub disk: Uuid,
    pub images: Vec<RemovedImage>,
    pub names: Vec<RemovedName>,
    pub replicas: Vec<Uuid>,
}

/// An image that was removed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct RemovedImage {
    pub digest: Digest,
    /// When: a copy that was made later is another.
    pub at: u64,
}

/// A name that was taken from an image.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct RemovedName {
    pub digest: Digest,
    pub name: Name,
}

/// Something that is being removed.
#[derive(Clone, Debug)]
pub(crate) enum Gone {
    Image(Digest),
    Name(Digest, Name),
    Replica(Uuid),
}

/// What became, on a disk's return, of something that was removed while it was away.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Buried {
    /// The disk's name.
    pub disk: Name,
    /// What was removed.
    pub what: Removal,
    /// Whether it is gone, and why not.
    pub kept: Option<String>,
}

/// What was removed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Removal {
    /// The copy of an image.
    Copy(Digest),
    /// A replica.
    Replica(Uuid),
}

impl RemovedRecord {
    fn new(disk: Uuid) -> RemovedRecord {
        let (images, names, replicas) = Default::default();
        RemovedRecord { format: FORMAT, disk, images, names, replicas }
    }

    fn len(&self) -> usize {
        self.images.len() + self.names.len() + self.replicas.len()
    }

    fn add(&mut self, gone: &Gone) {
        match gone {
            Gone::Image(digest) => {
                self.images.retain(|image| image.digest != *digest);
                self.names.retain(|name| name.digest != *digest);
                self.images.push(RemovedImage { digest: *digest, at: record::now() });
            }
            Gone::Name(digest, name) => {
                let name = RemovedName { digest: *digest, name: name.clone() };
                if !self.names.contains(&name) {
                    self.names.push(name);
                }
            }
            Gone::Replica(id) => {
                if !self.replicas.contains(id) {
                    self.replicas.push(*id);
                }
            }
        }
    }

    /// Whether a copy that was found on the disk is one that was removed.
    fn names_copy(&self, found: &CopyFound) -> bool {
        let is = |image: &RemovedImage| {
            image.digest == found.record.digest && found.record.created <= image.at
        };
        self.images.iter().any(is)
    }
}

/// What is there on all disks, but for what was removed while they were away.
#[derive(Default)]
pub(crate) struct World {
    copies: HashSet<Digest>,
    names: HashMap<Name, HashSet<Digest>>,
    /// Images that replicas say they stand on.
    standing: HashSet<Digest>,
    replicas: HashMap<Uuid, HashSet<Uuid>>,
    here: HashSet<Uuid>,
    /// Whether a disk is away that may hold what nobody here knows of.
    is_partial: bool,
    /// Replicas whose removal waits for some disk.
    going: HashSet<Uuid>,
}

/// What is to be done on a disk that has returned.
#[derive(Debug, Default, PartialEq)]
pub(crate) struct Judgement {
    copies: Vec<Digest>,
    replicas: Vec<Uuid>,
    /// Names that copies lose.
    names: Vec<(Digest, Name)>,
    /// Copies of removed images that stay, and why.
    kept: Vec<(Digest, String)>,
    /// Images of which it can't be told yet.
    waiting: Vec<Digest>,
}

impl World {
    /// What the view has.
    pub(crate) fn of(view: &View) -> World {
        let mut world = World::default();
        for slot in &view.disks {
            match slot.here() {
                Some(disk) => drop(world.here.insert(disk.id)),
                None => world.is_partial = true,
            }
        }
        world.expects(view);
        for copy in view.images.values().flat_map(|image| &image.copies) {
            world.add_copy(&copy.found, view.removed.get(&copy.disk));
        }
        for replica in view.replicas.values().chain(&view.spares) {
            world.add_replica(replica.disk, replica.record.id, replica.record.digest());
        }
        world
    }

    /// And what a disk has that is not in the view yet.
    pub(crate) fn add(&mut self, disk: Uuid, contents: &Contents, removed: Option<&RemovedRecord>) {
        self.here.insert(disk);
        for found in &contents.copies {
            self.add_copy(found, removed);
        }
        let goes = |id: &Uuid| removed.is_some_and(|record| record.replicas.contains(id));
        for found in contents.replicas.iter().filter(|found| !goes(&found.record.id)) {
            self.add_replica(disk, found.record.id, found.record.digest());
        }
        for id in contents.damaged.iter().filter(|id| !goes(id)) {
            self.add_replica(disk, *id, None);
        }
    }

    /// Replicas are to go that are seen nowhere.
    pub(crate) fn expects(&mut self, view: &View) {
        self.going.extend(view.removed.values().flat_map(|record| &record.replicas));
    }

    /// A disk is away.
    pub(crate) fn lacks(&mut self) {
        self.is_partial = true;
    }

    fn add_copy(&mut self, found: &CopyFound, removed: Option<&RemovedRecord>) {
        let digest = found.record.digest;
        if removed.is_some_and(|record| record.names_copy(found)) {
            return;
        }
        self.copies.insert(digest);
        for name in &found.record.names {
            let gone = RemovedName { digest, name: name.clone() };
            if !removed.is_some_and(|record| record.names.contains(&gone)) {
                self.names.entry(gone.name).or_default().insert(digest);
            }
        }
    }

    fn add_replica(&mut self, disk: Uuid, id: Uuid, digest: Option<Digest>) {
        self.replicas.entry(id).or_default().insert(disk);
        self.standing.extend(digest);
    }

    fn has_name(&self, digest: Digest, name: &Name) -> bool {
        self.names.get(name).is_some_and(|digests| digests.contains(&digest))
    }

    fn is_anothers(&self, digest: Digest, name: &Name) -> bool {
        self.names.get(name).is_some_and(|digests| digests.iter().any(|other| *other != digest))
    }

    /// What is to go from a disk that has returned. Pure.
    pub(crate) fn judge(&self, removed: &RemovedRecord, contents: &Contents) -> Judgement {
        let mut judgement = Judgement::default();
        let there = contents.replicas.iter().map(|found| found.record.id);
        let there: HashSet<Uuid> = there.chain(contents.damaged.iter().copied()).collect();
        let going = removed.replicas.iter().filter(|id| there.contains(id));
        judgement.replicas = going.copied().collect();
        for found in &contents.copies {
            let digest = found.record.digest;
            let strip = |names: &mut Vec<(Digest, Name)>, which: &dyn Fn(&Name) -> bool| {
                let these = found.record.names.iter().filter(|name| which(name));
                names.extend(these.map(|name| (digest, name.clone())));
            };
            if removed.names_copy(found) {
                match self.fate(found) {
                    Fate::Goes => judgement.copies.push(digest),
                    fate => {
                        strip(&mut judgement.names, &|name| self.is_anothers(digest, name));
                        match fate {
                            Fate::Stays(why) => judgement.kept.push((digest, why)),
                            _ => judgement.waiting.push(digest),
                        }
                    }
                }
            } else {
                strip(&mut judgement.names, &|name| {
                    let gone = RemovedName { digest, name: name.clone() };
                    removed.names.contains(&gone) && !self.has_name(digest, name)
                });
            }
        }
        judgement
    }

    fn fate(&self, found: &CopyFound) -> Fate {
        let digest = found.record.digest;
        if self.copies.contains(&digest) {
            return Fate::Stays("the same content is there again".to_owned());
        }
        if self.standing.contains(&digest) {
            return Fate::Stays("a replica stands on it".to_owned());
        }
        let mut waits = false;
        for (id, reference) in &found.refs {
            if self.replicas.contains_key(id) {
                return Fate::Stays(format!("replica {} refers to it", reference.record.name));
            }
            // One whose disk is here without it may be on one that is not, if it has moved.
            waits |= !self.going.contains(id)
                && (self.is_partial || !self.here.contains(&reference.record.disk));
        }
        if waits { Fate::Waits } else { Fate::Goes }
    }
}

enum Fate {
    Goes,
    Stays(String),
    Waits,
}

impl Node {
    /// Reads what waits for disks that are away. What waits for a disk that the node doesn't know is
    /// struck off.
    pub(crate) fn load_removed(&self, known: &[Uuid]) -> Result<()> {
        let dir = match self.0.state.open(REMOVED) {
            Err(error) if error.kind() == Kind::NotFound => return Ok(()),
            other => other?,
        };
        let mut all = BTreeMap::new();
        for entry in dir.entries(4 * DISKS_MAX)? {
            let id = entry.name.to_str().and_then(|name| name.strip_suffix(".json"));
            let Some(id) = id.and_then(|id| id.parse::<Uuid>().ok()) else { continue };
            if !known.contains(&id) {
                dir.unlink_if_there(&entry.name)?;
                continue;
            }
            match record::read::<RemovedRecord>(&dir, &file(id)) {
                Ok(record) if record.disk == id && record.len() <= REMOVED_MAX => {
                    all.insert(id, record);
                }
                Ok(_) => tracing::warn!(disk = %id, "what was removed from it may come back"),
                Err(error) => {
                    tracing::warn!(disk = %id, %error, "what was removed from it may come back");
                }
            }
        }
        self.0.view().removed = all;
        Ok(())
    }

    /// Notes that something is being removed, for disks that are away and may have a part of it.
    pub(crate) fn remember_removed(&self, gone: &Gone, disks: &[Uuid]) -> Result<()> {
        let _alone = self.0.removing();
        for disk in disks {
            let mut record = {
                let view = self.0.view();
                view.removed.get(disk).cloned().unwrap_or_else(|| RemovedRecord::new(*disk))
            };
            record.add(gone);
            if record.len() > REMOVED_MAX {
                let view = self.0.view();
                let name = view.disk_name(*disk).cloned().unwrap_or_else(Name::unknown);
                return Err(Error::new(
                    Kind::Unavailable,
                    format!(
                        "disk {name} isn't there, and {REMOVED_MAX} removals wait for it already: \
                         bring it back, or forget it (underlay disk remove {name})"
                    ),
                ));
            }
            self.write_removed(record)?;
        }
        Ok(())
    }

    /// Strikes off that an image, and a name of it, was removed: it is there again.
    pub(crate) fn is_back(&self, digest: Digest, name: &Name) {
        let struck = self.strike(|record| {
            record.images.retain(|image| image.digest != digest);
            record.names.retain(|gone| gone.digest != digest || gone.name != *name);
        });
        if let Err(error) = struck {
            // Struck off when the node opens: a disk has it that doesn't wait for its removal.
            tracing::warn!(image = %digest, %error, "it may be taken for removed");
        }
    }

    /// Strikes off all that waits for a disk which the node has forgotten.
    pub(crate) fn waits_for_no(&self, disk: Uuid) -> Result<()> {
        self.strike(|record| {
            if record.disk == disk {
                *record = RemovedRecord::new(disk);
            }
        })
    }

    /// Strikes off what is there all the same, on a disk that doesn't wait for its removal.
    pub(crate) fn strike_what_is_there(&self) {
        let world = World::of(&self.0.view());
        let struck = self.strike(|record| {
            record.images.retain(|image| !world.copies.contains(&image.digest));
            record.names.retain(|gone| !world.has_name(gone.digest, &gone.name));
            let disk = record.disk;
            let elsewhere = |id: &Uuid| {
                world.replicas.get(id).is_some_and(|disks| disks.iter().any(|it| *it != disk))
            };
            record.replicas.retain(|id| !elsewhere(id));
        });
        if let Err(error) = struck {
            tracing::warn!(%error, "removals that were interrupted may be finished");
        }
    }

    fn strike(&self, change: impl Fn(&mut RemovedRecord)) -> Result<()> {
        let _alone = self.0.removing();
        let before: Vec<RemovedRecord> = self.0.view().removed.values().cloned().collect();
        for before in before {
            let mut after = before.clone();
            change(&mut after);
            if after != before {
                self.write_removed(after)?;
            }
        }
        Ok(())
    }

    /// Takes from a disk that nobody sees yet what was removed while it was away.
    pub(crate) fn bury(&self, name: &Name, disk: &Disk, contents: &mut Contents, world: &World) {
        let Some(removed) = self.0.view().removed.get(&disk.id).cloned() else { return };
        let Judgement { copies, replicas, names, kept, waiting } = world.judge(&removed, contents);
        let mut left = RemovedRecord::new(disk.id);
        let again =
            |digest: &Digest| removed.images.iter().find(|it| it.digest == *digest).cloned();
        left.images.extend(waiting.iter().filter_map(again));
        let stays = |what: &str, error: Error| {
            tracing::warn!(disk = %name, %error, "{what} was removed while the disk was away, and stays");
        };
        for id in replicas {
            match bury_replica(disk, contents, id) {
                Ok(()) => self.0.say(name, Removal::Replica(id), None),
                Err(error) => {
                    stays("a replica", error);
                    left.replicas.push(id);
                }
            }
        }
        for digest in copies {
            match disk.take_away_copy(digest) {
                Ok(()) => {
                    contents.copies.retain(|found| found.record.digest != digest);
                    self.0.say(name, Removal::Copy(digest), None);
                }
                Err(error) => {
                    stays("an image", error);
                    left.images.extend(again(&digest));
                }
            }
        }
        for (digest, gone) in names {
            if let Err(error) = bury_name(disk, contents, digest, &gone) {
                stays("a name", error);
                left.names.push(RemovedName { digest, name: gone });
            }
        }
        for (digest, why) in kept {
            self.0.say(name, Removal::Copy(digest), Some(why));
        }
        let _alone = self.0.removing();
        if let Err(error) = self.write_removed(left) {
            // What went is not there any more: nothing is lost by asking for it again.
            tracing::warn!(disk = %name, %error, "what was removed is not struck off");
        }
    }

    /// The same, of one disk that comes while the node is open.
    pub(crate) fn bury_returned(&self, name: &Name, disk: &Disk, contents: &mut Contents) {
        let world = {
            let view = self.0.view();
            let mut world = World::of(&view);
            // It is away as long as it is not taken in.
            world.is_partial = view.away_disks().iter().any(|away| *away != disk.id);
            world.add(disk.id, contents, view.removed.get(&disk.id));
            world
        };
        self.bury(name, disk, contents, &world);
    }

    /// What became of what was removed while disks were away that have returned, told once.
    pub fn take_buried(&self) -> Vec<Buried> {
        std::mem::take(&mut self.0.view().buried)
    }

    /// Writes what waits for a disk; nothing if that is nothing. One caller at a time.
    fn write_removed(&self, record: RemovedRecord) -> Result<()> {
        let dir = self.0.state.ensure(REMOVED)?;
        self.0.state.sync()?;
        if record.len() == 0 {
            dir.unlink_if_there(file(record.disk))?;
            dir.sync()?;
            self.0.view().removed.remove(&record.disk);
        } else {
            record::write(&dir, &file(record.disk), &record)?;
            self.0.view().removed.insert(record.disk, record);
        }
        Ok(())
    }
}

impl super::node::Inner {
    fn say(&self, disk: &Name, what: Removal, kept: Option<String>) {
        tracing::info!(%disk, ?what, kept, "removed while the disk was away");
        let mut view = self.view();
        if view.buried.len() < BURIED_MAX {
            view.buried.push(Buried { disk: disk.clone(), what, kept });
        }
    }
}

/// Out of sight durably, then its files; and the references that the disk's copies have of it.
fn bury_replica(disk: &Disk, contents: &mut Contents, id: Uuid) -> Result<()> {
    let doomed = format!("{DELETING}{id}");
    disk.replicas.remove_tree(&doomed)?;
    disk.replicas.rename(id.to_string(), &doomed)?;
    contents.replicas.retain(|found| found.record.id != id);
    contents.damaged.remove(&id);
    disk.replicas.sync()?;
    disk.replicas.remove_tree(&doomed)?;
    for found in contents.copies.iter_mut().filter(|found| found.refs.contains_key(&id)) {
        drop_reference(disk, found.record.digest, id)?;
        found.refs.remove(&id);
    }
    Ok(())
}

fn bury_name(disk: &Disk, contents: &mut Contents, digest: Digest, name: &Name) -> Result<()> {
    let found = contents.copies.iter_mut().find(|found| found.record.digest == digest);
    let Some(found) = found else { return Ok(()) };
    let mut changed = found.record.clone();
    changed.names.retain(|other| other != name);
    record::write(&disk.copy(digest)?, IMAGE_JSON, &changed)?;
    found.record = changed;
    Ok(())
}

fn file(disk: Uuid) -> String {
    format!("{disk}.json")
}
