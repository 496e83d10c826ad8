//! Reading what a disk says of itself, and noting what is not as it should be.
//!
//! Invariants:
//! - A scan changes nothing. What could be done about a finding is data ([`Mend`]), done elsewhere.
//! - What can't be understood is never taken for absent: a damaged reference still holds its copy,
//!   and a damaged replica still keeps its reference from being called leaked.
//! - Work and memory are bounded, whatever the disk holds; past a bound the disk doesn't open.

use std::{
    collections::{BTreeMap, HashSet},
    ffi::{OsStr, OsString},
};

use nix::sys::stat::FileStat;
use uuid::Uuid;

use super::{
    dir::{
        DIR_MODE, Dir, Entry, EntryKind, FILE_MODE, SEALED_MODE, TEMP_PREFIX, allocated, kind_of,
    },
    disk::{
        CACHE, CHUNKS, DATA, DISK_JSON, Disk, IMAGE_JSON, IMAGES, LOCK, MAP, REFS, REPLICA_JSON,
        REPLICAS,
    },
    moves::Settlement,
    name::{Digest, Name, parse_id},
    record::{self, ImageRecord, RefRecord, ReplicaRecord},
    unfinished::Unfinished,
};
use crate::error::{Error, Kind, Result};

/// Prefix of a directory that is being built.
pub(crate) const STAGING: &str = ".staging-";
/// Prefix of a directory that is being removed.
pub(crate) const DELETING: &str = ".deleting-";

/// Images, and replicas, that one disk may hold; the references of one copy.
const OBJECTS_MAX: usize = 65_536;
/// Entries that a disk's own directory, or an image's or replica's, may hold.
const FILES_MAX: usize = 1024;

/// What is on a disk.
#[derive(Debug, Default)]
pub(crate) struct Contents {
    pub copies: Vec<CopyFound>,
    pub replicas: Vec<ReplicaFound>,
    /// Replicas that are there and can't be understood.
    pub damaged: HashSet<Uuid>,
    pub unfinished: Vec<Unfinished>,
    pub findings: Vec<Finding>,
}

/// A copy of an image.
#[derive(Debug)]
pub(crate) struct CopyFound {
    pub record: ImageRecord,
    pub stored: u64,
    /// The number of its content's file; 0 if that is not there.
    pub inode: u64,
    /// Why it can't serve.
    pub fault: Option<String>,
    pub refs: BTreeMap<Uuid, Reference>,
}

/// A reference beside a copy.
#[derive(Clone, Debug)]
pub(crate) struct Reference {
    pub record: RefRecord,
    /// The file can't be understood: the record was made up from its name, so that it holds.
    pub damaged: bool,
}

/// A replica.
#[derive(Debug)]
pub(crate) struct ReplicaFound {
    pub record: ReplicaRecord,
    /// Why it can't be opened.
    pub fault: Option<String>,
}

/// Something that isn't as it should be.
#[derive(Clone, Debug)]
pub(crate) struct Finding {
    pub object: String,
    pub what: String,
    pub remedy: String,
    pub mend: Option<Mend>,
}

/// How a finding is mended.
#[derive(Clone, Debug)]
pub(crate) enum Mend {
    /// Remove what an interrupted operation left; this is done at every start, too.
    Leftover(Spot),
    /// Take the mode back to what it should be.
    Mode(Spot, u32),
    /// Remove a reference to a replica that isn't there.
    DropReference(Spot),
    /// Write the reference that a replica lacks.
    AddReference(Spot, Box<RefRecord>),
    /// End a move that was interrupted; this is done at every start, too.
    Settle(Settlement),
}

/// A name in a directory of a disk.
#[derive(Clone, Debug)]
pub(crate) struct Spot {
    pub disk: Uuid,
    /// From `<disk>/underlay` down.
    pub dir: Vec<OsString>,
    pub name: OsString,
}

impl Spot {
    /// The spot of a reference.
    pub(crate) fn reference(disk: Uuid, digest: Digest, replica: Uuid) -> Spot {
        let dir = [IMAGES, &digest.to_string(), REFS].map(OsString::from).to_vec();
        Spot { disk, dir, name: ref_file(replica).into() }
    }
}

/// The file name of a reference.
pub(crate) fn ref_file(replica: Uuid) -> String {
    format!("{replica}.json")
}

/// Reads all of a disk. `live` tells whether somebody is at work in the directory of a name; it is
/// asked after the name was seen, so that work begun meanwhile counts.
pub(crate) fn disk(disk: &Disk, live: &dyn Fn(&OsStr) -> bool) -> Result<Contents> {
    let mut scan = Scan { disk: disk.id, live, contents: Contents::default() };
    for entry in disk.home.entries(FILES_MAX)? {
        match entry.name.to_str() {
            Some(DISK_JSON | LOCK) => scan.mode(&disk.home, &[], &entry.name, FILE_MODE)?,
            Some(IMAGES | REPLICAS | CACHE) => scan.mode(&disk.home, &[], &entry.name, DIR_MODE)?,
            _ => scan.stray(&disk.home, &[], &entry),
        }
    }
    for entry in disk.images.entries(OBJECTS_MAX)? {
        let digest = entry.name.to_str().and_then(|name| name.parse::<Digest>().ok());
        match digest {
            Some(digest) if entry.kind == EntryKind::Dir => match scan.copy(&disk.images, digest) {
                Ok(found) => scan.contents.copies.extend(found),
                Err(error) => scan.unreadable(&disk.images, &entry, &error),
            },
            _ => scan.building(&disk.images, IMAGES, &entry)?,
        }
    }
    for entry in disk.replicas.entries(OBJECTS_MAX)? {
        let id = entry.name.to_str().and_then(parse_id);
        match id {
            Some(id) if entry.kind == EntryKind::Dir => {
                if let Err(error) = scan.replica(&disk.replicas, id) {
                    scan.contents.damaged.insert(id);
                    scan.unreadable(&disk.replicas, &entry, &error);
                }
            }
            _ => scan.building(&disk.replicas, REPLICAS, &entry)?,
        }
    }
    Ok(scan.contents)
}

/// Reads one copy anew; `None` if it can't be understood.
pub(crate) fn copy(disk: &Disk, digest: Digest) -> Result<Option<CopyFound>> {
    let mut scan = Scan { disk: disk.id, live: &|_| false, contents: Contents::default() };
    scan.copy(&disk.images, digest)
}

struct Scan<'a> {
    disk: Uuid,
    live: &'a dyn Fn(&OsStr) -> bool,
    contents: Contents,
}

impl Scan<'_> {
    fn copy(&mut self, images: &Dir, digest: Digest) -> Result<Option<CopyFound>> {
        let text = digest.to_string();
        let dir = images.open(&text)?;
        let at = [IMAGES, &text];
        self.mode(images, &at[..1], OsStr::new(&text), DIR_MODE)?;
        let refs = self.refs(&dir, &text)?;
        for entry in self.files(&dir)? {
            match entry.name.to_str() {
                Some(DATA | CHUNKS) => self.mode(&dir, &at, &entry.name, SEALED_MODE)?,
                Some(IMAGE_JSON) => self.mode(&dir, &at, &entry.name, FILE_MODE)?,
                Some(REFS) => self.mode(&dir, &at, &entry.name, DIR_MODE)?,
                _ => self.stray(&dir, &at, &entry),
            }
        }
        let record: ImageRecord = match record::read(&dir, IMAGE_JSON) {
            Ok(record) => record,
            Err(error) => {
                let what = match error.kind() {
                    Kind::NotFound => format!("it has no {IMAGE_JSON}"),
                    _ => error.to_string(),
                };
                self.find(dir.path().display(), what, "import the image again", None);
                return Ok(None);
            }
        };
        if record.digest != digest {
            let what = format!("its {IMAGE_JSON} is that of image {}", record.digest);
            let remedy = format!("rename the directory to {}", record.digest);
            self.find(dir.path().display(), what, remedy, None);
            return Ok(None);
        }
        let (data, chunks) = (dir.stat(DATA)?, dir.stat(CHUNKS)?);
        let fault = file_fault(DATA, data.as_ref(), Some(record.size))
            .or_else(|| file_fault(CHUNKS, chunks.as_ref(), None));
        if let Some(fault) = &fault {
            self.find(dir.path().display(), fault.clone(), "import the image again", None);
        }
        let inode = data.as_ref().map_or(0, |stat| stat.st_ino);
        let stored = [data, chunks].iter().flatten().map(allocated).sum();
        Ok(Some(CopyFound { record, stored, inode, fault, refs }))
    }

    fn refs(&mut self, copy: &Dir, digest: &str) -> Result<BTreeMap<Uuid, Reference>> {
        let mut refs = BTreeMap::new();
        let dir = match copy.open(REFS) {
            Err(error) if error.kind() == Kind::NotFound => {
                let remedy = "it is made anew when a replica's reference is put into it";
                self.find(copy.path().display(), format!("it has no {REFS}"), remedy, None);
                return Ok(refs);
            }
            other => other?,
        };
        for entry in dir.entries(OBJECTS_MAX)? {
            let id = entry.name.to_str().and_then(|name| name.strip_suffix(".json"));
            let Some(id) = id.and_then(parse_id) else {
                self.stray(&dir, &[IMAGES, digest, REFS], &entry);
                continue;
            };
            let reference = match record::read::<RefRecord>(&dir, &ref_file(id)) {
                Ok(record) if record.replica == id => Reference { record, damaged: false },
                Ok(other) => {
                    let what = format!("it is the reference of replica {}", other.replica);
                    self.damaged_ref(&dir, &entry, id, what)
                }
                Err(error) => self.damaged_ref(&dir, &entry, id, error.to_string()),
            };
            refs.insert(id, reference);
        }
        Ok(refs)
    }

    fn damaged_ref(&mut self, dir: &Dir, entry: &Entry, id: Uuid, what: String) -> Reference {
        let path = dir.path().join(&entry.name);
        let remedy = "it holds the image; it is rewritten once its replica is there";
        self.find(path.display(), what, remedy, None);
        let record = RefRecord {
            format: record::FORMAT,
            replica: id,
            name: Name::of_id(id),
            disk: Uuid::nil(),
            disk_name: Name::unknown(),
            size: 0,
            created: 0,
        };
        Reference { record, damaged: true }
    }

    fn replica(&mut self, replicas: &Dir, id: Uuid) -> Result<()> {
        let text = id.to_string();
        let dir = replicas.open(&text)?;
        let at = [REPLICAS, &text];
        self.mode(replicas, &at[..1], OsStr::new(&text), DIR_MODE)?;
        for entry in self.files(&dir)? {
            match entry.name.to_str() {
                Some(DATA | MAP | REPLICA_JSON) => self.mode(&dir, &at, &entry.name, FILE_MODE)?,
                _ => self.stray(&dir, &at, &entry),
            }
        }
        let record = match record::read::<ReplicaRecord>(&dir, REPLICA_JSON) {
            Ok(record) if record.id == id => record,
            other => {
                let what = match other {
                    Ok(other) => format!("its {REPLICA_JSON} is that of replica {}", other.id),
                    Err(error) => error.to_string(),
                };
                let remedy = "bring the record back from a backup, or move the directory away";
                self.find(dir.path().display(), what, remedy, None);
                self.contents.damaged.insert(id);
                return Ok(());
            }
        };
        let (data, map) = (dir.stat(DATA)?, dir.stat(MAP)?);
        let fault =
            file_fault(DATA, data.as_ref(), None).or_else(|| file_fault(MAP, map.as_ref(), None));
        if let Some(fault) = &fault {
            let remedy = "bring the file back from a backup, or remove the replica";
            self.find(format!("replica {}", record.name), fault.clone(), remedy, None);
        }
        self.contents.replicas.push(ReplicaFound { record, fault });
        Ok(())
    }

    /// Notes an object that could not be read at all. It counts as there, and as unusable.
    fn unreadable(&mut self, parent: &Dir, entry: &Entry, error: &Error) {
        let remedy = "check the disk and its file system";
        self.find(parent.path().join(&entry.name).display(), error.to_string(), remedy, None);
    }

    fn files(&mut self, dir: &Dir) -> Result<Vec<Entry>> {
        match dir.entries(FILES_MAX) {
            Err(error) if error.kind() == Kind::Unsupported => {
                let remedy = "move what isn't underlay's away";
                self.find(dir.path().display(), error.to_string(), remedy, None);
                Ok(Vec::new())
            }
            other => other,
        }
    }

    /// Notes a name among images or replicas that isn't one of them.
    fn building(&mut self, parent: &Dir, place: &str, entry: &Entry) -> Result<()> {
        let name = entry.name.to_string_lossy();
        if !name.starts_with(STAGING) && !name.starts_with(DELETING) {
            self.stray(parent, &[place], entry);
            return Ok(());
        }
        // Work that has just ended took its directory away before it was called ended.
        if (self.live)(&entry.name) || parent.stat(&entry.name)?.is_none() {
            return Ok(());
        }
        let unfinished = match place {
            IMAGES => Unfinished::read(self.disk, parent, entry),
            _ => Ok(None),
        };
        match unfinished {
            Ok(Some(unfinished)) => self.contents.unfinished.push(unfinished),
            Ok(None) => self.leftover(parent, &[place], entry),
            Err(error) => self.unreadable(parent, entry, &error),
        }
        Ok(())
    }

    /// Notes a file that has no business where it is: an unfinished write, or a foreign file.
    fn stray(&mut self, parent: &Dir, at: &[&str], entry: &Entry) {
        let ours = entry.name.to_string_lossy().starts_with(TEMP_PREFIX);
        if ours && entry.kind == EntryKind::File {
            return self.leftover(parent, at, entry);
        }
        let what = "it is not underlay's";
        self.find(parent.path().join(&entry.name).display(), what, "move it away", None);
    }

    fn leftover(&mut self, parent: &Dir, at: &[&str], entry: &Entry) {
        let mend = Mend::Leftover(self.spot(at, &entry.name));
        let path = parent.path().join(&entry.name);
        self.find(path.display(), "left by an interrupted operation", "remove it", Some(mend));
    }

    /// Notes a file or directory that others than its owner may use.
    fn mode(&mut self, parent: &Dir, at: &[&str], name: &OsStr, right: u32) -> Result<()> {
        if let Some(stat) = parent.stat(name)?
            && kind_of(&stat) != EntryKind::Other
            && stat.st_mode & 0o077 != 0
        {
            let mend = Mend::Mode(self.spot(at, name), right);
            let path = parent.path().join(name);
            let what = format!("others may use it: its mode is {:o}", stat.st_mode & 0o7777);
            self.find(path.display(), what, format!("make it {right:o}"), Some(mend));
        }
        Ok(())
    }

    fn spot(&self, at: &[&str], name: &OsStr) -> Spot {
        let dir = at.iter().map(OsString::from).collect();
        Spot { disk: self.disk, dir, name: name.to_owned() }
    }

    fn find(
        &mut self,
        object: impl ToString,
        what: impl Into<String>,
        remedy: impl Into<String>,
        mend: Option<Mend>,
    ) {
        let (object, what, remedy) = (object.to_string(), what.into(), remedy.into());
        self.contents.findings.push(Finding { object, what, remedy, mend });
    }
}

fn file_fault(name: &str, stat: Option<&FileStat>, size: Option<u64>) -> Option<String> {
    let Some(stat) = stat else { return Some(format!("its {name} is not there")) };
    if kind_of(stat) != EntryKind::File {
        return Some(format!("its {name} is not a file"));
    }
    match size {
        Some(size) if u64::try_from(stat.st_size) != Ok(size) => {
            Some(format!("its {name} has {} bytes instead of {size}", stat.st_size))
        }
        _ => None,
    }
}
