//! The node: its state directory, its disks, and who is at work on what.
//!
//! Invariants:
//! - A disk that can't be used is kept, with the reason; the others work.
//! - The lock on the view is never held while a disk is read or written.
//! - A disk is known (`disks.json`) only after it describes itself (`disk.json`).

use std::{
    collections::{HashMap, HashSet},
    fs,
    os::unix::fs::DirBuilderExt,
    path::{Path, PathBuf},
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        mpsc::{self, RecvTimeoutError},
    },
    thread,
    time::{Duration, Instant},
};

use uuid::Uuid;

use super::{
    claims::{Mode, Object, PATIENCE, Want},
    dir::{DIR_MODE, Dir},
    disk::{self, Absence, DISK_JSON, Disk},
    media::Tier,
    name::Name,
    record::{self, DiskRecord, DisksRecord, FORMAT, KnownDisk},
    scan::{self, Contents, Mend},
    status::{DiskState, DiskStatus},
    steps::Steps,
    view::{Attachment, Slot, View, listed},
};
use crate::error::{Context, Error, Kind, Result};

const DISKS_JSON: &str = "disks.json";
/// Disks that one node may know.
const DISKS_MAX: usize = 256;
/// How long a disk may take to open before the node starts without it.
const OPEN_PATIENCE: Duration = Duration::from_secs(20);

/// A node's catalogue. Clones are the same node.
#[derive(Clone)]
pub struct Node(pub(crate) Arc<Inner>);

pub(crate) struct Inner {
    state: Dir,
    pub steps: Steps,
    view: Mutex<View>,
    /// Signalled when a claim is given back.
    freed: Condvar,
    _lock: Option<fs::File>,
}

/// What a disk is for.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize, utoipa::ToSchema,
)]
#[serde(rename_all = "lowercase")]
pub enum Placement {
    /// Images and replicas.
    Direct,
    /// Images only.
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

/// Claims, held until this is dropped.
pub(crate) struct Claimed {
    inner: Arc<Inner>,
    wants: Vec<Want>,
}

impl Drop for Claimed {
    fn drop(&mut self) {
        self.inner.view().claims.release(&self.wants);
        self.inner.freed.notify_all();
    }
}

type Opened = Result<(Disk, DiskRecord, Contents), Absence>;

impl Node {
    /// Opens the node whose list of disks is kept in the directory `state`, which is made if it
    /// isn't there. Disks that can't be used don't keep it from opening.
    pub fn open(state: &Path) -> Result<Node> {
        Node::open_in_steps(state, Steps::default())
    }

    pub(crate) fn open_in_steps(path: &Path, steps: Steps) -> Result<Node> {
        fs::DirBuilder::new()
            .recursive(true)
            .mode(DIR_MODE)
            .create(path)
            .context(|| format!("making state directory {}", path.display()))?;
        let state = Dir::open_root(path, steps.clone())?;
        let lock = disk::lock(&state)?;
        let known = match record::read::<DisksRecord>(&state, DISKS_JSON) {
            Ok(record) => record.disks,
            Err(error) if error.kind() == Kind::NotFound => Vec::new(),
            Err(error) => return Err(error.within("the list of disks")),
        };
        check_known(&known).map_err(|error| error.within(path.join(DISKS_JSON).display()))?;
        let node = Node(Arc::new(Inner {
            state,
            steps,
            view: Mutex::default(),
            freed: Condvar::new(),
            _lock: lock,
        }));
        node.open_disks(known);
        Ok(node)
    }

    /// Opens all disks at the same time; one that hangs is left behind.
    fn open_disks(&self, known: Vec<KnownDisk>) {
        let deadline = Instant::now() + OPEN_PATIENCE;
        let waiting: Vec<_> = known
            .into_iter()
            .map(|known| {
                let (sender, receiver) = mpsc::channel();
                let (steps, wanted) = (self.0.steps.clone(), known.clone());
                let job = move || drop(sender.send(open_disk(&wanted, steps)));
                let started = thread::Builder::new().name("disk".into()).spawn(job);
                (known, receiver, started.is_ok())
            })
            .collect();
        for (known, receiver, started) in waiting {
            let left = deadline.saturating_duration_since(Instant::now());
            let opened = receiver.recv_timeout(left).unwrap_or_else(|error| {
                let reason = match error {
                    RecvTimeoutError::Timeout => {
                        format!("it didn't answer within {} s", OPEN_PATIENCE.as_secs())
                    }
                    RecvTimeoutError::Disconnected if started => "opening it failed".to_owned(),
                    RecvTimeoutError::Disconnected => "no thread could be started".to_owned(),
                };
                Err(Absence { state: DiskState::Failed, reason })
            });
            self.0.settle(known, opened);
        }
    }

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
        let wants = vec![(Object::Catalogue, Mode::Shared), (Object::Disks, Mode::Alone)];
        let (_claimed, here) = self.0.claim("the list of disks", |view| {
            let here = view.disks.iter().find(|slot| slot.known.path == path);
            check_apart(view, &path)?;
            Ok((wants.clone(), here.map(|slot| (slot.known.clone(), slot.here().is_some()))))
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
                self.0.settle(known.clone(), opened);
                self.change_disk(&known, &options)
            }
            None => self.new_disk(path, &options),
        }
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
                    created: record::now(),
                };
                (Disk::init(&path, &record, self.0.steps.clone())?, record)
            }
        };
        let contents = scan_and_clean(&disk)?;
        self.0.write_known(|disks| match disks.iter_mut().find(|other| other.id == id) {
            Some(moved) => *moved = known.clone(),
            None => disks.push(known.clone()),
        })?;
        self.0.settle(known.clone(), Ok((disk, record, contents)));
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
        {
            let mut view = self.0.view();
            view.disks.retain(|slot| slot.known.id != known.id);
            view.detach(known.id);
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
    /// The view, for a moment.
    pub(crate) fn view(&self) -> MutexGuard<'_, View> {
        // A panic in between leaves a view that is whole: each change to it is one call.
        self.view.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes the claims that `plan` wants, once all of them are free; `plan` sees the view as it is
    /// at that moment, and may refuse. `what` names the object, should the wait be in vain.
    pub(crate) fn claim<T>(
        self: &Arc<Self>,
        what: impl std::fmt::Display,
        mut plan: impl FnMut(&View) -> Result<(Vec<Want>, T)>,
    ) -> Result<(Claimed, T)> {
        let deadline = Instant::now() + PATIENCE;
        let mut view = self.view();
        loop {
            let (wants, planned) = plan(&view)?;
            if view.claims.take(&wants) {
                return Ok((Claimed { inner: self.clone(), wants }, planned));
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(Error::new(
                    Kind::Locked,
                    format!("{what}: another operation is at work on it; try again later"),
                ));
            }
            let waited = self.freed.wait_timeout(view, left);
            view = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Takes a disk, or its absence, into the view.
    fn settle(&self, known: KnownDisk, opened: Opened) {
        let mut view = self.view();
        let id = known.id;
        let (at, contents) = match opened {
            Ok((disk, record, contents)) => {
                (Attachment::Here(Arc::new(disk), record), Some(contents))
            }
            Err(absence) => {
                tracing::warn!(disk = %known.name, "{}", absence.reason);
                (Attachment::Away(absence), None)
            }
        };
        match view.disks.iter_mut().find(|slot| slot.known.id == id) {
            Some(slot) => *slot = Slot { known, at },
            None => view.disks.push(Slot { known, at }),
        }
        match contents {
            Some(contents) => view.attach(id, contents),
            None => view.detach(id),
        }
    }

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

fn open_disk(known: &KnownDisk, steps: Steps) -> Opened {
    let (disk, record) = Disk::open(known, steps)?;
    let contents = scan_and_clean(&disk)?;
    Ok((disk, record, contents))
}

/// Reads a disk that nobody is at work on yet, and removes what a dead process left unfinished.
fn scan_and_clean(disk: &Disk) -> Result<Contents> {
    let contents = scan::disk(disk, &|_| false)?;
    for finding in &contents.findings {
        if let Some(Mend::Leftover(spot)) = &finding.mend {
            let removed = disk.walk(&spot.dir).and_then(|dir| dir.remove_tree(&spot.name));
            match removed {
                Ok(()) => tracing::info!("removed {}: {}", finding.object, finding.what),
                Err(error) => tracing::warn!(%error, "{} stays: fsck tells more", finding.object),
            }
        }
    }
    Ok(contents)
}

/// Who keeps a disk from being forgotten.
fn disk_users(view: &View, slot: &Slot) -> Vec<String> {
    let id = slot.known.id;
    let on_it = view.replicas.values().filter(|replica| replica.disk == id);
    let mut users: Vec<_> =
        on_it.map(|replica| format!("replica {} on it", replica.record.name)).collect();
    let away = view.away().into_iter().filter(|(_, reference)| reference.disk == id);
    users.extend(away.map(|(_, reference)| format!("replica {} on it", reference.name)));
    for (digest, image) in &view.images {
        let here = image.copies.iter().any(|copy| copy.disk == id);
        let elsewhere = image.copies.iter().any(|copy| {
            copy.disk != id && copy.found.fault.is_none() && !copy.found.refs.is_empty()
        });
        if here && !elsewhere {
            let others =
                view.users(*digest).into_iter().filter(|user| user.disk != slot.known.name);
            users.extend(others.map(|user| {
                let names = listed(&image.names());
                format!("replica {} on disk {}, of image {names} on it", user.name, user.disk)
            }));
        }
    }
    users
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

/// Refuses a list of disks that no run of this program wrote.
fn check_known(known: &[KnownDisk]) -> Result<()> {
    let mut seen: HashMap<Uuid, ()> = HashMap::new();
    let mut names = HashSet::new();
    for disk in known {
        if seen.insert(disk.id, ()).is_some() || !names.insert(&disk.name) {
            let what = format!("disk {} is in it twice: remove one entry", disk.name);
            return Err(Error::new(Kind::Corrupt, what));
        }
        if !disk.path.is_absolute() {
            let what = format!("disk {}: its path is not absolute", disk.name);
            return Err(Error::new(Kind::Corrupt, what));
        }
    }
    if known.len() > DISKS_MAX {
        return Err(Error::new(Kind::Corrupt, format!("it names more than {DISKS_MAX} disks")));
    }
    Ok(())
}
