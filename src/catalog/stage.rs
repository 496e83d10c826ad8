//! A copy that is being made, and how it becomes one.
//!
//! Invariants:
//! - A staged copy is invisible, and gone when it is dropped or the process dies, unless its maker has noted
//!   how far it is: then it is kept for who goes on with it (`unfinished`).
//! - What becomes visible is whole and durable: content, checksums and record are synced before the
//!   one rename that publishes them.
//! - One content is one image: publishing a digest that is there already adds a name to it. A copy
//!   that was found damaged is exchanged for the new one in one step, and keeps its references.

use std::{
    cmp::Reverse,
    ffi::OsString,
    fs::File,
    path::{Path, PathBuf},
    sync::Arc,
};

use nix::fcntl::OFlag;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::{
    claims::{Mode, Object, Want},
    dir::{Dir, EntryKind, SEALED_MODE, kind_of},
    disk::{CHUNKS, DATA, Disk, IMAGE_JSON, REFS},
    disks::Placement,
    media::Tier,
    name::{Digest, Name},
    node::{Claimed, Inner, Node},
    record::{self, FORMAT, ImageRecord, NAMES_MAX, RECORD_MAX, RefRecord, clip_source},
    scan::{self, STAGING, ref_file},
    status::ImageStatus,
    unfinished::{self, RESUME_JSON},
    view::{Copy, Slot, View},
};
use crate::error::{Error, Kind, Result};

/// References that a copy takes over from the damaged one in whose place it comes.
const ADOPTED_MAX: usize = 65_536;

/// What is known of an image once it has been read.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageMeta {
    /// What it shall be called.
    pub name: Name,
    /// Its identity.
    pub digest: Digest,
    /// Bytes that its readers see; the length of the data file.
    pub size: u64,
    /// Where it came from; clipped if very long.
    pub source: String,
    /// SHA-256 of the source as given.
    pub source_sha256: Option<Digest>,
}

/// A copy that is being made: a private directory, into which the importer writes `data` and
/// `chunks`. Dropping it removes all of it, unless it was noted how far it is.
pub struct StagedCopy {
    inner: Arc<Inner>,
    disk: Arc<Disk>,
    disk_name: Name,
    dir: Dir,
    data: PathBuf,
    chunks: PathBuf,
    name: OsString,
    /// How far it is, if somebody may go on with it.
    noted: Option<(Digest, u64)>,
    /// Keeps the disk from being removed meanwhile.
    _claimed: Claimed,
}

impl Node {
    /// From now on images are placed on disks of this kind before others.
    pub fn set_placement(&self, placement: Placement) {
        self.0.view().placement = placement;
    }

    /// Begins a copy on `disk`, or on the disk that suits best: one of the kind that is preferred before
    /// others (a pool disk, unless it was set), then of the fastest tier, then the one with the most free
    /// space; never one with less than `need_bytes`.
    pub fn stage_copy(&self, disk: Option<&Name>, need_bytes: u64) -> Result<StagedCopy> {
        self.stage_where(disk, need_bytes, None, &|_| true)
    }

    /// The same, among the disks that `suits`. A copy of the image `of` that was interrupted is gone on with;
    /// its disk suits better than others of its kind and tier.
    pub(crate) fn stage_where(
        &self,
        disk: Option<&Name>,
        need_bytes: u64,
        of: Option<Digest>,
        suits: &dyn Fn(&Disk) -> bool,
    ) -> Result<StagedCopy> {
        let disks: Vec<Candidate> = {
            let view = self.0.view();
            match disk {
                Some(name) => vec![Candidate::of(&view, view.disk(name)?, of)?],
                None => view
                    .disks
                    .iter()
                    .filter_map(|slot| Candidate::of(&view, slot, of).ok())
                    .filter(|candidate| suits(&candidate.disk))
                    .collect(),
            }
        };
        if disks.is_empty() {
            let what = "no disk is there to hold an image, or one more copy of it: give one with \
                        `underlay disk add`";
            return Err(Error::new(Kind::Unavailable, what));
        }
        let (disk, name) = choose(disks, need_bytes)?;
        let wants: Vec<Want> = vec![(Object::Disk(disk.id), Mode::Shared)];
        let (claimed, ()) = self.0.claim(format!("disk {name}"), |view| {
            view.disk(&name)?.usable()?;
            Ok((wants.clone(), ()))
        })?;
        let (staging, dir, noted) = match of.and_then(|digest| self.0.go_on(&disk, digest)) {
            Some((staging, dir, noted)) => (staging, dir, Some(noted)),
            None => {
                let staging = OsString::from(format!("{STAGING}{}", Uuid::new_v4()));
                self.0.view().live.insert(staging.clone());
                let dir = disk.images.create(&staging).map_err(|error| {
                    self.0.view().live.remove(&staging);
                    error.within(format!("disk {name}"))
                })?;
                (staging, dir, None)
            }
        };
        Ok(StagedCopy {
            inner: self.0.clone(),
            disk,
            disk_name: name,
            data: dir.path().join(DATA),
            chunks: dir.path().join(CHUNKS),
            dir,
            name: staging,
            noted,
            _claimed: claimed,
        })
    }
}

impl StagedCopy {
    /// The directory that is the importer's own.
    pub fn path(&self) -> &Path {
        self.dir.path()
    }

    /// Where the image's content goes: a sparse file of exactly its size.
    pub fn data_path(&self) -> &Path {
        &self.data
    }

    /// Where the table of its chunks' checksums goes.
    pub fn chunks_path(&self) -> &Path {
        &self.chunks
    }

    /// The content, to be written: what an earlier try has left, or nothing yet.
    pub fn open_data(&self) -> Result<File> {
        self.dir.file(DATA, OFlag::O_RDWR | OFlag::O_CREAT)
    }

    /// The image's bytes before this offset were copied by an earlier try, or it seems so: whoever goes on
    /// compares them.
    pub fn found(&self) -> u64 {
        self.noted.map_or(0, |(_, done)| done)
    }

    /// Says that the image's bytes before `done` are copied and durable. From now on it is kept, should its
    /// making be interrupted.
    pub fn note(&mut self, digest: Digest, done: u64) -> Result<()> {
        unfinished::note(&self.dir, digest, done)?;
        self.noted = Some((digest, done));
        Ok(())
    }

    /// What is here is not worth going on with.
    pub fn give_up(&mut self) {
        self.noted = None;
    }

    /// The disk that it is made on.
    pub fn disk(&self) -> &Name {
        &self.disk_name
    }

    pub(crate) fn home(&self) -> &Arc<Disk> {
        &self.disk
    }

    /// Makes it visible as one more copy of an image whose record and references these are. The caller has
    /// claimed the image.
    pub(crate) fn publish_beside(mut self, record: &ImageRecord, refs: &[RefRecord]) -> Result<()> {
        let name = record.names.first().map_or_else(|| record.digest.to_string(), Name::to_string);
        self.seal(&name, record.size)?;
        self.dir.unlink_if_there(RESUME_JSON)?;
        self.give_up();
        self.appear(record, refs).map_err(|error| error.within(format!("image {name}")))
    }

    /// Makes the copy visible under its name, or, if this content is there already, gives that
    /// image the name too and drops what was staged.
    pub fn publish(self, meta: ImageMeta) -> Result<ImageStatus> {
        meta.name.for_new()?;
        self.seal(meta.name.as_str(), meta.size)?;
        let ImageMeta { name, digest, .. } = &meta;
        let node = Node(self.inner.clone());
        let (claimed, present) = self.inner.claim(format!("image {name}"), |view| {
            check_name(view, name, *digest)?;
            let image = view.images.get(digest);
            let mut wants = vec![
                (Object::Catalogue, Mode::Shared),
                (Object::ImageName(name.clone()), Mode::Alone),
                (Object::Image(*digest), Mode::Alone),
            ];
            let disks = image.iter().flat_map(|image| &image.copies).map(|copy| copy.disk);
            wants.extend(disks.map(|disk| (Object::Disk(disk), Mode::Shared)));
            wants.dedup();
            Ok((wants, image.is_some_and(|image| image.ready().is_some())))
        })?;
        if present {
            node.add_image_name(*digest, name)?;
        } else {
            let (record, refs) = self.inherit(&meta);
            self.appear(&record, &refs).map_err(|error| error.within(format!("image {name}")))?;
        }
        node.is_back(*digest, name);
        drop(claimed);
        node.image_by_digest(*digest)
    }

    /// Checks what the importer made, and makes it durable.
    fn seal(&self, name: &str, size: u64) -> Result<()> {
        for (file, size) in [(DATA, Some(size)), (CHUNKS, None)] {
            let stat = self.dir.stat(file)?.filter(|stat| kind_of(stat) == EntryKind::File);
            let right = |len: i64| size.is_none_or(|size| u64::try_from(len) == Ok(size));
            if !stat.is_some_and(|stat| right(stat.st_size)) {
                return Err(Error::new(
                    Kind::Invalid,
                    format!("image {name}: the import left no whole `{file}` file"),
                ));
            }
            self.dir.set_mode(file, SEALED_MODE)?;
            self.dir.sync_file(file)?;
        }
        self.dir.ensure(REFS)?.sync()
    }

    /// Takes its place among the images of its disk.
    fn appear(&self, record: &ImageRecord, refs: &[RefRecord]) -> Result<()> {
        let images = &self.disk.images;
        let place = record.digest.to_string();
        let replaced = images.stat(&place)?.map(|_| images.open(&place)).transpose()?;
        self.adopt(replaced.as_ref(), refs)?;
        // Written by `replace`, whose last step makes all names in here durable.
        record::write(&self.dir, IMAGE_JSON, record)?;
        match replaced {
            // What was staged now bears the damaged copy, and goes with it.
            Some(_) => images.exchange(&self.name, &place)?,
            None => images.rename(&self.name, &place)?,
        }
        // From here on it is there. Should the sync fail, it is known and the error is told.
        let found = scan::copy(&self.disk, record.digest)?.ok_or_else(|| {
            Error::new(Kind::Corrupt, "its copy can't be read right after it was written")
        })?;
        {
            let mut view = self.inner.view();
            view.put_copy(Copy { disk: self.disk.id, found });
            view.index();
        }
        images.sync()
    }

    /// The record of the new copy and the references to put beside it, after what is known of other
    /// copies: these are damaged, and with their disks the last trace of both might go.
    fn inherit(&self, meta: &ImageMeta) -> (ImageRecord, Vec<RefRecord>) {
        let mut record = ImageRecord {
            format: FORMAT,
            names: vec![meta.name.clone()],
            digest: meta.digest,
            size: meta.size,
            source: clip_source(&meta.source),
            source_sha256: meta.source_sha256,
            created: record::now(),
            copies: None,
        };
        let view = self.inner.view();
        let Some(image) = view.images.get(&meta.digest) else { return (record, Vec::new()) };
        let others = image.names().into_iter().filter(|name| *name != meta.name);
        record.names.extend(others.take(NAMES_MAX - 1));
        let created = image.copies.iter().map(|copy| copy.found.record.created).min();
        record.created = created.unwrap_or(record.created);
        record.copies = image.wanted();
        let refs = image.refs().into_values().filter(|reference| !reference.damaged);
        (record, refs.map(|reference| reference.record.clone()).collect())
    }

    /// Takes over the references of the damaged copy in this place, as they are, and `known` ones.
    fn adopt(&self, damaged: Option<&Dir>, known: &[RefRecord]) -> Result<()> {
        let new = self.dir.open(REFS)?;
        let old = match damaged.map(|damaged| damaged.open(REFS)).transpose() {
            Err(error) if error.kind() == Kind::NotFound => None,
            other => other?,
        };
        if let Some(old) = old {
            for entry in old.entries(ADOPTED_MAX)? {
                if entry.kind == EntryKind::File {
                    new.write_new(&entry.name, &old.read(&entry.name, RECORD_MAX)?)?;
                    new.sync_file(&entry.name)?;
                }
            }
        }
        for reference in known {
            let file = ref_file(reference.replica);
            if new.stat(&file)?.is_none() {
                new.write_new(&file, &record::bytes(reference)?)?;
                new.sync_file(&file)?;
            }
        }
        new.sync()
    }
}

impl Drop for StagedCopy {
    fn drop(&mut self) {
        if let Some((digest, done)) = self.noted {
            return self.inner.leave(&self.disk, &self.name, digest, done);
        }
        if let Err(error) = self.disk.images.remove_tree(&self.name) {
            tracing::warn!(disk = %self.disk_name, %error, "an unfinished copy stays until fsck");
        }
        self.inner.view().live.remove(&self.name);
    }
}

/// Refuses a name that another image has.
pub(crate) fn check_name(view: &View, name: &Name, digest: Digest) -> Result<()> {
    match view.image_named(name) {
        Some(other) if other != digest => Err(Error::new(
            Kind::Exists,
            format!("image {name}: the name is taken by image {other}: choose another"),
        )),
        _ => Ok(()),
    }
}

/// A disk that a copy may be made on.
struct Candidate {
    disk: Arc<Disk>,
    name: Name,
    /// The lower, the better it suits, whatever its free space.
    rank: (bool, Tier, bool),
    /// Bytes of what is to be put there that are there already.
    stored: u64,
}

impl Candidate {
    /// The disk of a slot, for a copy of the image `of`.
    fn of(view: &View, slot: &Slot, of: Option<Digest>) -> Result<Candidate> {
        let disk = slot.takes_new()?.clone();
        let unlike = slot.is_pool() != (view.placement == Placement::Pool);
        let begun = view.unfinished.iter();
        let stored = begun.filter(|it| it.disk == disk.id && Some(it.digest) == of);
        let stored = stored.map(|it| it.stored).max();
        let rank = (unlike, slot.tier().unwrap_or(Tier::Ssd), stored.is_none());
        let stored = stored.unwrap_or(0);
        Ok(Candidate { disk, name: slot.known.name.clone(), rank, stored })
    }
}

fn choose(disks: Vec<Candidate>, need: u64) -> Result<(Arc<Disk>, Name)> {
    let mut found = Vec::new();
    let mut refused = None;
    for Candidate { disk, name, rank, stored } in disks {
        let need = need.saturating_sub(stored);
        match disk.home.space() {
            Ok(space) if !space.read_only && space.free >= need => {
                found.push((rank, Reverse(space.free), name, disk));
            }
            Ok(_) => {
                let full = || {
                    let what = format!("disk {name}: an image needs {need} bytes there");
                    Error::new(
                        Kind::NoSpace,
                        what + ", and fewer are free: free some, or choose another disk",
                    )
                };
                let read_only = disk.check_writable().err();
                let read_only = read_only.map(|error| error.within(format!("disk {name}")));
                refused = Some(read_only.unwrap_or_else(full));
            }
            Err(error) => refused = Some(error.within(format!("disk {name}"))),
        }
    }
    found.sort_by(|a, b| (&a.0, &a.1, &a.2).cmp(&(&b.0, &b.1, &b.2)));
    match found.into_iter().next() {
        Some((.., name, disk)) => Ok((disk, name)),
        None => Err(refused.unwrap_or_else(|| Error::new(Kind::NoSpace, "no disk has room"))),
    }
}
