//! A disk that is there: its directories held open and its lock held.
//!
//! Invariants:
//! - A [`Disk`] exists only while this process holds the disk's lock, so two daemons never work on
//!   one disk; and only if `disk.json` bears the id that was expected.
//! - Opening a disk that is known makes nothing: an empty mount point stays empty, and a disk whose
//!   file system isn't mounted is missing, not new. Only [`Disk::init`] makes a disk.

use std::{
    ffi::{OsStr, OsString},
    fs::{File, TryLockError},
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use nix::fcntl::OFlag;
use uuid::Uuid;

use super::{
    dir::{self, Dir, TEMP_PREFIX},
    media::Media,
    name::Digest,
    record::{self, DiskRecord, KnownDisk},
    scan::DELETING,
    status::DiskState,
    steps::Steps,
};
use crate::error::{Error, Kind, Result};

/// The directory on a disk that is underlay's.
pub const HOME: &str = "underlay";
pub(crate) const DISK_JSON: &str = "disk.json";
pub(crate) const LOCK: &str = "lock";
pub(crate) const IMAGES: &str = "images";
pub(crate) const REPLICAS: &str = "replicas";
pub(crate) const CACHE: &str = "cache";
pub(crate) const IMAGE_JSON: &str = "image.json";
pub(crate) const REPLICA_JSON: &str = "replica.json";
pub(crate) const DATA: &str = "data";
pub(crate) const CHUNKS: &str = "chunks";
pub(crate) const MAP: &str = "map";
pub(crate) const REFS: &str = "refs";

/// Counts the openings of disks.
static OPENED: AtomicU64 = AtomicU64::new(0);

/// A disk, open and locked.
#[derive(Debug)]
pub(crate) struct Disk {
    pub id: Uuid,
    /// `<disk>/underlay`.
    pub home: Dir,
    pub images: Dir,
    pub replicas: Dir,
    pub media: Media,
    /// Which opening of a disk this is, by this process' count.
    pub opened: u64,
    _lock: Option<File>,
}

/// Why a disk isn't there.
#[derive(Clone, Debug)]
pub(crate) struct Absence {
    pub state: DiskState,
    pub reason: String,
}

impl Disk {
    /// Opens a disk that the node knows.
    pub(crate) fn open(known: &KnownDisk, steps: Steps) -> Result<(Disk, DiskRecord), Absence> {
        let missing = |reason: String| Absence { state: DiskState::Missing, reason };
        let home = match Dir::open_root(&known.path, steps).and_then(|root| root.open(HOME)) {
            Ok(home) => home,
            Err(error) if error.kind() == Kind::NotFound => {
                return Err(missing(format!(
                    "nothing of it is found at {}: mount its file system, and it is taken in by itself",
                    known.path.display()
                )));
            }
            Err(error) => return Err(error.into()),
        };
        let (disk, record) = Disk::assemble(&known.path, home)?;
        if record.id != known.id {
            return Err(Absence {
                state: DiskState::Failed,
                reason: format!(
                    "another disk is mounted at {}: id {} instead of {}",
                    known.path.display(),
                    record.id,
                    known.id
                ),
            });
        }
        Ok((disk, record))
    }

    /// Whether a disk that the node knows is where it was. Takes nothing, and locks nothing.
    pub(crate) fn is_at(known: &KnownDisk, steps: Steps) -> bool {
        let home = Dir::open_root(&known.path, steps).and_then(|root| root.open(HOME));
        let record = home.and_then(|home| record::read::<DiskRecord>(&home, DISK_JSON));
        record.is_ok_and(|record| record.id == known.id)
    }

    /// Opens the disk at `path`, whichever it is; `None` if there is none yet.
    pub(crate) fn probe(path: &Path, steps: Steps) -> Result<Option<(Disk, DiskRecord)>> {
        let home = match Dir::open_root(path, steps)?.open(HOME) {
            Ok(home) => home,
            Err(error) if error.kind() == Kind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        };
        if home.stat(DISK_JSON)?.is_none() && is_unfinished(&home)? {
            return Ok(None);
        }
        Disk::assemble(path, home).map(Some)
    }

    /// Makes a disk at `path`, whose `record` becomes durable last: before that it is none.
    pub(crate) fn init(path: &Path, record: &DiskRecord, steps: Steps) -> Result<Disk> {
        let root = Dir::open_root(path, steps)?;
        let home = root.ensure(HOME)?;
        root.sync()?;
        let lock = lock(&home)?;
        for name in [IMAGES, REPLICAS, CACHE] {
            home.ensure(name)?;
        }
        home.sync()?;
        record::write(&home, DISK_JSON, record)?;
        Ok(Disk {
            id: record.id,
            images: home.open(IMAGES)?,
            replicas: home.open(REPLICAS)?,
            media: Media::of(path),
            opened: OPENED.fetch_add(1, Ordering::Relaxed),
            home,
            _lock: lock,
        })
    }

    fn assemble(path: &Path, home: Dir) -> Result<(Disk, DiskRecord)> {
        let lock = lock(&home)?;
        let record: DiskRecord =
            record::read(&home, DISK_JSON).map_err(|error| match error.kind() {
                Kind::NotFound => Error::new(
                    Kind::Corrupt,
                    format!(
                        "{} has no {DISK_JSON}: bring it back, or move the directory away",
                        home.path().display()
                    ),
                ),
                _ => error,
            })?;
        let disk = Disk {
            id: record.id,
            images: home.open(IMAGES)?,
            replicas: home.open(REPLICAS)?,
            media: Media::of(path),
            opened: OPENED.fetch_add(1, Ordering::Relaxed),
            home,
            _lock: lock,
        };
        Ok((disk, record))
    }

    /// The directory of the copy of an image.
    pub(crate) fn copy(&self, digest: Digest) -> Result<Dir> {
        self.images.open(digest.to_string())
    }

    /// The directory of the references to a copy.
    pub(crate) fn refs(&self, digest: Digest) -> Result<Dir> {
        self.copy(digest)?.open(REFS)
    }

    /// The directory of a replica.
    pub(crate) fn replica(&self, id: Uuid) -> Result<Dir> {
        self.replicas.open(id.to_string())
    }

    /// The directory that is reached from `<disk>/underlay` by these names.
    pub(crate) fn walk(&self, names: &[OsString]) -> Result<Dir> {
        let mut at = self.home.again()?;
        for name in names {
            at = at.open(name)?;
        }
        Ok(at)
    }

    /// Refuses a disk that can't be written, before something is begun on it.
    pub(crate) fn check_writable(&self) -> Result<()> {
        if self.home.space()?.read_only {
            return Err(Error::new(
                Kind::ReadOnly,
                format!("{} is on a read-only file system: remount it", self.home.path().display()),
            ));
        }
        Ok(())
    }

    /// Removes a copy of an image that nobody sees: out of sight durably, then its files.
    pub(crate) fn take_away_copy(&self, digest: Digest) -> Result<()> {
        let doomed = format!("{DELETING}{}", Uuid::new_v4());
        self.images.rename(digest.to_string(), &doomed)?;
        self.images.sync()?;
        self.images.remove_tree(&doomed)
    }

    /// Removes what is left of a disk without images, replicas or anything foreign; tells whether
    /// it did.
    pub(crate) fn erase(self: Arc<Self>) -> Result<bool> {
        let unused = |dir: &Dir| Ok::<_, Error>(dir.entries(1).is_ok_and(|all| all.is_empty()));
        let cache = self.home.ensure(CACHE)?;
        if !unused(&self.images)? || !unused(&self.replicas)? {
            return Ok(false);
        }
        super::cache::clear(&cache)?;
        if !unused(&cache)? {
            return Ok(false);
        }
        let own = [DISK_JSON, LOCK, IMAGES, REPLICAS, CACHE].map(OsStr::new);
        if self.home.entries(16)?.iter().any(|entry| !own.contains(&entry.name.as_os_str())) {
            return Ok(false);
        }
        // The record first: without it the rest is an unfinished disk, which `add` completes.
        self.home.unlink_if_there(DISK_JSON)?;
        for name in [IMAGES, REPLICAS, CACHE] {
            self.home.remove_dir(name)?;
        }
        self.home.unlink_if_there(LOCK)?;
        let Some(parent) = self.home.path().parent() else { return Ok(false) };
        Dir::open_root(parent, self.home.steps())?.remove_dir(HOME)?;
        Ok(true)
    }
}

impl From<Error> for Absence {
    fn from(error: Error) -> Absence {
        let state =
            if error.kind() == Kind::Locked { DiskState::Locked } else { DiskState::Failed };
        Absence { state, reason: error.to_string() }
    }
}

/// Takes the lock in `dir`; `None` where a read-only file system has no lock file to take.
pub(crate) fn lock(dir: &Dir) -> Result<Option<File>> {
    let path = dir.path().join(LOCK);
    let read_only = dir.space()?.read_only;
    if dir.stat(LOCK)?.is_none() {
        if read_only {
            return Ok(None);
        }
        match dir.write_new(LOCK, b"") {
            Err(error) if error.kind() != Kind::Exists => return Err(error),
            _ => {}
        }
    }
    let file = dir.file(LOCK, if read_only { OFlag::O_RDONLY } else { OFlag::O_RDWR })?;
    match file.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => {
            let who = dir.read(LOCK, 64).ok().and_then(|bytes| String::from_utf8(bytes).ok());
            let who = who.and_then(|pid| pid.trim().parse::<u32>().ok());
            let who = match who {
                Some(pid) if pid == std::process::id() => {
                    "used by this underlay already, perhaps by another path to it".to_owned()
                }
                Some(pid) => format!("used by another underlay (process {pid}): stop it first"),
                None => "used by another underlay: stop it first".to_owned(),
            };
            let what = format!("{} is {who}", dir.path().display());
            return Err(Error::new(Kind::Locked, what));
        }
        Err(TryLockError::Error(source)) => {
            return Err(Error::io(format!("locking {}", path.display()), source));
        }
    }
    if !read_only {
        // Told for the sake of the message above; a full disk must not keep itself from opening.
        let _ = dir::overwrite(&file, &format!("{}\n", std::process::id()));
    }
    Ok(Some(file))
}

/// Whether `home` is what a crash left of the making of a disk: it holds nothing yet.
fn is_unfinished(home: &Dir) -> Result<bool> {
    for entry in home.entries(64)? {
        let name = entry.name.to_string_lossy();
        match name.as_ref() {
            LOCK => {}
            IMAGES | REPLICAS | CACHE => {
                if !home.open(&entry.name)?.entries(1).is_ok_and(|all| all.is_empty()) {
                    return Ok(false);
                }
            }
            other if other.starts_with(TEMP_PREFIX) => {}
            _ => return Ok(false),
        }
    }
    Ok(true)
}
