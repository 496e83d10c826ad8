//! The disks of a node: adding, changing and forgetting them.
//!
//! Invariants:
//! - A disk is known (`disks.json`) only after it describes itself (`disk.json`), and is forgotten
//!   before its own files go, which happens only if it holds nothing.
//! - A path at which a disk is known is never made a new disk, whatever is mounted there.
//! - A disk that anything on this node depends on is not forgotten.

use std::{
    fs,
    path::{Path, PathBuf},
};

use uuid::Uuid;

use super::{
    claims::{Mode, Object, Want},
    dir::Dir,
    disk::{DISK_JSON, Disk},
    media::Tier,
    name::Name,
    node::{DISKS_JSON, DISKS_MAX, Inner, Node, Opened, open_disk, scan_and_clean},
    record::{self, DiskRecord, DisksRecord, FORMAT, KnownDisk},
    status::{CopyState, DiskState, DiskStatus, UserState},
    view::{Attachment, Copy, Slot, View, listed},
};
use crate::error::{Context, Error, Kind, Result};

/// What a disk is for, and on which disks images are placed where nobody says on which.
#[derive(
    Clone,
    Copy,
    Debug,
    Default,
    PartialEq,
    Eq,
    Hash,
    serde::Serialize,
    serde::Deserialize,
    utoipa::ToSchema,
)]
#[serde(rename_all = "lowercase")]
pub enum Placement {
    /// Images and replicas.
    Direct,
    /// Images only.
    #[default]
    Pool,
}

/// How a disk is added. What is left out stays as it is, or is found out.
#[derive(Clone, Debug, Default)]
pub struct DiskOptions {
    /// Its name on this node; by default the one that it bears, or its directory's.
    pub name: Option<Name>,
    /// How fast it is; by default what the kernel says.
    pub tier: Option<Tier>,
    /// What it is for; by default `Direct`.
    pub placement: Option<Placement>,
    /// What promoted chunks may take there, in bytes; by default a share of the disk.
    pub cache: Option<u64>,
}

/// What became of a disk's files when the node forgot it.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Forgotten {
    /// It held nothing: its directory is gone, too.
    Erased,
    /// Its files are where they were; `disk add` brings them back.
    Kept,
}

impl Node {
    /// All disks that the node knows, in the order in which they were added.
    pub fn disks(&self) -> Vec<DiskStatus> {
        let names: Vec<Name> =
            self.0.view().disks.iter().map(|slot| slot.known.name.clone()).collect();
        names.iter().filter_map(|name| self.disk(name).ok()).collect()
    }

    /// Gives the directory `path` to the node. A disk that is there already, from this node or
    /// another, keeps what it holds; one that the node knows and missed is taken up again.
    pub fn add_disk(&self, path: &Path, options: DiskOptions) -> Result<DiskStatus> {
        let path = fs::canonicalize(path)
            .context(|| format!("disk {}: give a directory that is there", path.display()))?;
        if !path.is_dir() {
            let what = format!("disk {}: not a directory", path.display());
            return Err(Error::new(Kind::Invalid, what));
        }
        if let Some(name) = &options.name {
            name.for_new()?;
        }
        let (_claimed, here) = self.0.claim("the list of disks", |view| {
            let here = view.disks.iter().find(|slot| slot.known.path == path);
            check_apart(view, &path)?;
            Ok((coming(), here.map(|slot| (slot.known.clone(), slot.here().is_some()))))
        })?;
        match here {
            Some((known, true)) => self.change_disk(&known, &options),
            Some((known, false)) => {
                self.check_name(&known, &options)?;
                let opened = open_disk(&known, self.0.steps.clone());
                if let Err(absence) = &opened {
                    let kind = match absence.state {
                        DiskState::Locked => Kind::Locked,
                        _ => Kind::Unavailable,
                    };
                    let reason = absence.reason.clone();
                    let name = known.name.clone();
                    self.0.settle(known, opened);
                    return Err(Error::new(kind, format!("disk {name}: {reason}")));
                }
                self.take_in(&known, opened);
                self.change_disk(&known, &options)
            }
            None => self.new_disk(path, &options),
        }
    }

    /// The disks that are away and may return by themselves: one that another daemon has locked is not ours for
    /// the taking when that restarts.
    pub fn awaited(&self) -> Vec<Uuid> {
        let returns = |slot: &&Slot| match &slot.at {
            Attachment::Away(absence) => absence.state != DiskState::Locked,
            Attachment::Here(..) => false,
        };
        self.0.view().disks.iter().filter(returns).map(|slot| slot.known.id).collect()
    }

    /// Looks whether a disk that is away has returned, and takes it in if it has. Waits for one that hangs, and
    /// holds up nobody meanwhile.
    pub fn take_back(&self, id: Uuid) {
        let is_away = |slot: &&Slot| slot.here().is_none();
        let known = self.0.view().slot(id).filter(is_away).map(|slot| slot.known.clone());
        let Some(known) = known else { return };
        if !Disk::is_at(&known, self.0.steps.clone()) {
            return;
        }
        let claimed = self.0.claim("the list of disks", |view| {
            let still = view.slot(id).filter(is_away).is_some_and(|slot| slot.known == known);
            Ok(if still { (coming(), true) } else { (Vec::new(), false) })
        });
        match claimed {
            Ok((_claimed, true)) => match open_disk(&known, self.0.steps.clone()) {
                Ok(opened) => self.take_in(&known, Ok(opened)),
                // Now it is known why it can't be used.
                Err(absence) => self.0.settle(known, Err(absence)),
            },
            Ok((_claimed, false)) => {}
            Err(error) => tracing::debug!(disk = %known.name, %error, "it has returned"),
        }
    }

    /// Takes a disk in that was away; the caller has claimed the list of disks.
    fn take_in(&self, known: &KnownDisk, mut opened: Opened) {
        if let Ok((disk, _, contents)) = &mut opened {
            self.bury_returned(&known.name, disk, contents);
        }
        self.0.settle(known.clone(), opened);
        self.strike_what_is_there();
        self.settle_moves();
    }

    /// Adds a disk at a path where the node knows none.
    fn new_disk(&self, path: PathBuf, options: &DiskOptions) -> Result<DiskStatus> {
        let root = Dir::open_root(&path, self.0.steps.clone())?;
        let probed = Disk::probe(&path, self.0.steps.clone())?;
        if probed.is_none() && root.space()?.read_only {
            let what = format!("disk {}: its file system is read-only: remount it", path.display());
            return Err(Error::new(Kind::ReadOnly, what));
        }
        let id = probed.as_ref().map_or_else(Uuid::new_v4, |(_, record)| record.id);
        let before = self.0.view().disk_name(id).cloned();
        let name = match (&options.name, before, &probed) {
            (Some(name), ..) => name.clone(),
            (None, Some(name), _) => name,
            (None, None, Some((_, record))) => record.name.clone(),
            (None, None, None) => default_name(&path)?,
        };
        let known = KnownDisk { id, name, path: path.clone() };
        self.0.check_new(&known)?;
        let (disk, record) = match probed {
            Some((disk, record)) => (disk, record),
            None => {
                let record = DiskRecord {
                    format: FORMAT,
                    id,
                    name: known.name.clone(),
                    tier: options.tier,
                    pool: options.placement == Some(Placement::Pool),
                    cache: options.cache,
                    draining: false,
                    created: record::now(),
                };
                (Disk::init(&path, &record, self.0.steps.clone())?, record)
            }
        };
        let mut contents = scan_and_clean(&disk)?;
        self.bury_returned(&known.name, &disk, &mut contents);
        self.0.write_known(|disks| match disks.iter_mut().find(|other| other.id == id) {
            Some(moved) => *moved = known.clone(),
            None => disks.push(known.clone()),
        })?;
        self.0.settle(known.clone(), Ok((disk, record, contents)));
        self.strike_what_is_there();
        self.settle_moves();
        self.change_disk(&known, options)
    }

    /// Brings a disk's own record in line with the options that were given.
    fn change_disk(&self, known: &KnownDisk, options: &DiskOptions) -> Result<DiskStatus> {
        self.check_name(known, options)?;
        let (disk, mut record, replicas) = {
            let view = self.0.view();
            match view.slot(known.id).map(|slot| &slot.at) {
                Some(Attachment::Here(disk, record)) => {
                    let on_it = view.replicas.values().filter(|r| r.disk == known.id);
                    let names: Vec<_> = on_it.map(|r| r.record.name.clone()).collect();
                    (disk.clone(), record.clone(), names)
                }
                _ => return self.disk(&known.name),
            }
        };
        let before = record.clone();
        record.tier = options.tier.or(record.tier);
        record.cache = options.cache.or(record.cache);
        // Whoever adds it again wants it back.
        record.draining = false;
        record.pool = options.placement.map_or(record.pool, |to| to == Placement::Pool);
        if record.pool && !replicas.is_empty() {
            return Err(Error::new(
                Kind::InUse,
                format!(
                    "disk {}: a pool disk holds no replicas, and it has {}",
                    known.name,
                    listed(&replicas)
                ),
            ));
        }
        if record != before {
            record::write(&disk.home, DISK_JSON, &record)
                .map_err(|error| error.within(format!("disk {}", known.name)))?;
            let mut view = self.0.view();
            if let Some(slot) = view.disks.iter_mut().find(|slot| slot.known.id == known.id) {
                slot.at = Attachment::Here(disk, record);
            }
        }
        self.disk(&known.name)
    }

    fn check_name(&self, known: &KnownDisk, options: &DiskOptions) -> Result<()> {
        match &options.name {
            Some(name) if *name != known.name => Err(Error::new(
                Kind::Exists,
                format!(
                    "disk {}: it is known as {}; remove it first to give it another name",
                    known.path.display(),
                    known.name
                ),
            )),
            _ => Ok(()),
        }
    }

    /// From now on the disk takes nothing new, or does again.
    pub fn set_draining(&self, name: &Name, draining: bool) -> Result<DiskStatus> {
        let (_claimed, (disk, record)) = self.0.claim(name, |view| {
            let slot = view.disk(name)?;
            let disk = slot.usable()?.clone();
            let Attachment::Here(_, record) = &slot.at else { return Err(slot.absent()) };
            // Of two who change the record at once, one would rename the other's away.
            let wants = vec![
                (Object::Catalogue, Mode::Shared),
                (Object::Disks, Mode::Alone),
                (Object::Disk(disk.id), Mode::Shared),
            ];
            Ok((wants, (disk, record.clone())))
        })?;
        if record.draining != draining {
            let record = DiskRecord { draining, ..record };
            record::write(&disk.home, DISK_JSON, &record)
                .map_err(|error| error.within(format!("disk {name}")))?;
            let mut view = self.0.view();
            if let Some(slot) = view.disks.iter_mut().find(|slot| slot.known.id == disk.id) {
                slot.at = Attachment::Here(disk, record);
            }
        }
        self.disk(name)
    }

    /// Waits until nobody is at work on a disk that takes nothing new: what was on its way there when that
    /// was said has arrived, or was given up. Whether nothing is on it then that could leave it; not if
    /// others are at work on it for long.
    ///
    /// # Errors
    /// `InUse` once it takes new things again.
    pub fn is_left(&self, name: &Name) -> Result<bool> {
        let quiet = self.0.claim(format!("disk {name}"), |view| {
            let slot = view.disk(name)?;
            let id = slot.usable()?.id;
            if !slot.is_draining() {
                let what = format!("disk {name}: it takes new things again: drain it anew");
                return Err(Error::new(Kind::InUse, what));
            }
            let copies = view.images.values().flat_map(|image| &image.copies);
            let copies = copies.filter(|copy| copy.disk == id && copy.state() == CopyState::Ready);
            let replicas = view.replicas.values().filter(|replica| replica.disk == id);
            let left = copies.count() + replicas.count() == 0;
            Ok((vec![(Object::Catalogue, Mode::Shared), (Object::Disk(id), Mode::Alone)], left))
        });
        match quiet {
            Err(error) if error.kind() == Kind::Locked => Ok(false),
            other => other.map(|(_claimed, left)| left),
        }
    }

    /// Forgets a disk that nothing on this node depends on. Its files stay, unless it is empty.
    pub fn remove_disk(&self, name: &Name) -> Result<Forgotten> {
        let (_claimed, (known, disk)) = self.0.claim(name, |view| {
            let slot = view.disk(name)?;
            let users = disk_users(view, slot);
            if !users.is_empty() {
                return Err(Error::new(
                    Kind::InUse,
                    format!("disk {}: in use: {}; remove these first", name, listed(&users)),
                ));
            }
            let wants = vec![
                (Object::Catalogue, Mode::Shared),
                (Object::Disks, Mode::Alone),
                (Object::Disk(slot.known.id), Mode::Alone),
            ];
            Ok((wants, (slot.known.clone(), slot.here().cloned())))
        })?;
        self.0.write_known(|disks| disks.retain(|other| other.id != known.id))?;
        if let Err(error) = self.0.drop_unfinished(known.id, None) {
            tracing::warn!(disk = %known.name, %error, "an unfinished copy stays on it");
        }
        {
            let mut view = self.0.view();
            view.disks.retain(|slot| slot.known.id != known.id);
            view.detach(known.id);
        }
        if let Err(error) = self.waits_for_no(known.id) {
            tracing::warn!(disk = %known.name, %error, "what waits for it is struck off at the next start");
        }
        match disk.map(Disk::erase).transpose() {
            Ok(Some(true)) => Ok(Forgotten::Erased),
            Ok(_) => Ok(Forgotten::Kept),
            Err(error) => {
                tracing::warn!(disk = %known.name, %error, "an empty disk's directory stays");
                Ok(Forgotten::Kept)
            }
        }
    }
}

impl Inner {
    /// Refuses a disk that would be mistaken for another.
    fn check_new(&self, known: &KnownDisk) -> Result<()> {
        let view = self.view();
        if let Some(slot) = view.slot(known.id)
            && slot.here().is_some()
        {
            return Err(Error::new(
                Kind::Exists,
                format!(
                    "disk {}: it bears the id of disk {} at {}: a clone? Use one of them only",
                    known.path.display(),
                    slot.known.name,
                    slot.known.path.display()
                ),
            ));
        }
        let taken = |slot: &&Slot| slot.known.name == known.name && slot.known.id != known.id;
        if let Some(slot) = view.disks.iter().find(taken) {
            return Err(Error::new(
                Kind::Exists,
                format!(
                    "disk {}: name {} is taken by the disk at {}: choose another with --name",
                    known.path.display(),
                    known.name,
                    slot.known.path.display()
                ),
            ));
        }
        if view.disks.len() >= DISKS_MAX {
            let what = format!("a node knows at most {DISKS_MAX} disks");
            return Err(Error::new(Kind::Invalid, what));
        }
        Ok(())
    }

    /// Writes the list of disks, changed by `change`.
    fn write_known(&self, change: impl FnOnce(&mut Vec<KnownDisk>)) -> Result<()> {
        let mut disks = self.view().disks.iter().map(|slot| slot.known.clone()).collect();
        change(&mut disks);
        record::write(&self.state, DISKS_JSON, &DisksRecord { format: FORMAT, disks })
    }
}

/// Who keeps a disk from being forgotten.
fn disk_users(view: &View, slot: &Slot) -> Vec<String> {
    let id = slot.known.id;
    let on_it = view.replicas.values().filter(|replica| replica.disk == id);
    let mut users: Vec<_> =
        on_it.map(|replica| format!("replica {} on it", replica.record.name)).collect();
    let away = view.away().into_iter().filter(|(_, reference)| reference.disk == id);
    users.extend(away.map(|(_, reference)| format!("replica {} on it", reference.name)));
    let moving = view.replicas.values().filter(|found| found.record.moving_to == Some(id));
    users.extend(
        moving.map(|found| format!("replica {}, which may have moved to it", found.record.name)),
    );
    for (digest, image) in &view.images {
        if !image.copies.iter().any(|copy| copy.disk == id) {
            continue;
        }
        let serves = |copy: &&Copy| copy.disk != id && copy.state() == CopyState::Ready;
        let others: Vec<&Copy> = image.copies.iter().filter(serves).collect();
        for user in view.users(*digest).into_iter().filter(|user| user.disk != slot.known.name) {
            // Another copy serves in its place: one that holds the reference, or that `fsck` can
            // give one, because the replica is there to say what it stands on.
            let referred = others.iter().any(|copy| copy.found.refs.contains_key(&user.id));
            if !referred && (others.is_empty() || user.state != UserState::Present) {
                let names = listed(&image.names());
                users.push(format!(
                    "replica {} on disk {}, of image {names} on it",
                    user.name, user.disk
                ));
            }
        }
    }
    users
}

/// What is claimed while a disk is taken in: nobody else changes which disks are there.
fn coming() -> Vec<Want> {
    vec![(Object::Catalogue, Mode::Shared), (Object::Disks, Mode::Alone)]
}

/// Refuses a path inside another disk, or around it.
fn check_apart(view: &View, path: &Path) -> Result<()> {
    for slot in &view.disks {
        let other = &slot.known.path;
        if other != path && (path.starts_with(other) || other.starts_with(path)) {
            return Err(Error::new(
                Kind::Invalid,
                format!(
                    "disk {}: it is nested with disk {} at {}: give directories apart",
                    path.display(),
                    slot.known.name,
                    other.display()
                ),
            ));
        }
    }
    Ok(())
}

fn default_name(path: &Path) -> Result<Name> {
    let last = path.file_name().and_then(|name| name.to_str());
    let name = last.and_then(|text| text.parse::<Name>().ok()).filter(|n| n.for_new().is_ok());
    name.ok_or_else(|| {
        let what = format!("disk {}: its directory's name won't do: give --name", path.display());
        Error::new(Kind::Invalid, what)
    })
}
