//! Images: looking them up, naming them, opening and removing them.
//!
//! Invariants:
//! - An image goes only when nothing stands on it, as far as any disk that is there can tell.
//! - A copy that goes is renamed out of sight first: it is there whole, or not at all.

use std::{fs::File, os::unix::fs::MetadataExt, path::PathBuf, sync::Arc};

use nix::fcntl::OFlag;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::{
    claims::{Mode, Object},
    dir::{Dir, FILE_MODE, SEALED_MODE},
    disk::{CHUNKS, DATA, Disk, IMAGE_JSON},
    name::{Digest, Name},
    node::Node,
    record::{self, ImageRecord, NAMES_MAX},
    removed::Gone,
    scan::{self, DELETING},
    status::{CopyState, ImageUser, UserState},
    view::{Copy, Image, listed},
};
use crate::error::{Context, Error, Kind, Result};

/// A copy of an image, ready to be read.
#[derive(Debug)]
pub struct OpenCopy {
    /// The image's identity.
    pub digest: Digest,
    /// The image's size, in bytes.
    pub size: u64,
    /// The disk that the copy is on.
    pub disk: Name,
    /// Its content, read only; exactly `size` bytes when it was opened.
    pub data: File,
    /// The table of its chunks' checksums.
    pub chunks: File,
    /// Where the content is, for messages.
    pub path: PathBuf,
    /// Which copy it is of those that were there in the course of time.
    pub incarnation: Incarnation,
    dir: Dir,
}

/// Tells a copy from another of the same image that was or comes in its place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Incarnation {
    /// When its disk was opened, by this process' own count.
    opened: u64,
    /// The number of its content's file.
    inode: u64,
}

impl Incarnation {
    /// As numbers.
    pub fn numbers(self) -> (u64, u64) {
        (self.opened, self.inode)
    }
}

impl OpenCopy {
    /// Opens the content once more, read only, with `flags` (such as `O_DIRECT`) beside.
    pub fn reopen_data(&self, flags: OFlag) -> Result<File> {
        self.dir.file(DATA, OFlag::O_RDONLY | flags)
    }
}

/// What became of an image when a name was taken from it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Unnamed {
    /// It has other names, and is there.
    Kept,
    /// That was its last name: its copies are gone.
    Removed,
}

impl Node {
    /// Opens a copy of the image of this name or digest for reading: the first that serves.
    pub fn open_copy(&self, image: &Name) -> Result<OpenCopy> {
        let (digest, disk) = {
            let view = self.0.view();
            let (digest, found) = view.image(image)?;
            let Some(copy) = found.ready() else { return Err(no_copy(image, found)) };
            let slot = view.slot(copy.disk);
            (digest, slot.map_or_else(Name::unknown, |slot| slot.known.name.clone()))
        };
        self.open_copy_on(digest, &disk).map_err(|error| error.within(format!("image {image}")))
    }

    /// The copies of an image that serve: on which disk, and which one there. No I/O.
    pub fn ready_copies(&self, digest: Digest) -> Vec<(Name, Incarnation)> {
        let view = self.0.view();
        let Some(image) = view.images.get(&digest) else { return Vec::new() };
        let ready = image.copies.iter().filter(|copy| copy.state() == CopyState::Ready);
        let named = ready.filter_map(|copy| {
            let slot = view.slot(copy.disk)?;
            let opened = slot.here()?.opened;
            Some((slot.known.name.clone(), Incarnation { opened, inode: copy.found.inode }))
        });
        named.collect()
    }

    /// All copies that serve: of which image, on which disk, made when. No I/O.
    pub fn all_ready_copies(&self) -> Vec<(Digest, Name, u64)> {
        let view = self.0.view();
        let mut all = Vec::new();
        for (digest, image) in &view.images {
            for copy in image.copies.iter().filter(|copy| copy.state() == CopyState::Ready) {
                let disk = view.disk_name(copy.disk).cloned();
                all.extend(disk.map(|disk| (*digest, disk, copy.found.record.created)));
            }
        }
        all
    }

    /// Opens the copy of an image on a disk.
    pub fn open_copy_on(&self, digest: Digest, disk: &Name) -> Result<OpenCopy> {
        let (home, size) = self.copy_on(digest, disk)?;
        let dir = home.copy(digest)?;
        let data = dir.file(DATA, OFlag::O_RDONLY)?;
        let path = dir.path().join(DATA);
        let meta = data.metadata().context(|| format!("looking at {}", path.display()))?;
        if meta.len() != size {
            return Err(Error::new(
                Kind::Corrupt,
                format!(
                    "{} has {} bytes instead of {size}: import the image again",
                    path.display(),
                    meta.len()
                ),
            ));
        }
        let incarnation = Incarnation { opened: home.opened, inode: meta.ino() };
        let chunks = dir.file(CHUNKS, OFlag::O_RDONLY)?;
        Ok(OpenCopy { digest, size, disk: disk.clone(), data, chunks, path, incarnation, dir })
    }

    /// Opens the content of the copy of an image on a disk for writing, to mend what is damaged. The file
    /// stays sealed for everybody else.
    pub fn mend_copy_on(&self, digest: Digest, disk: &Name) -> Result<File> {
        let (home, _) = self.copy_on(digest, disk)?;
        home.check_writable()?;
        let dir = home.copy(digest)?;
        dir.set_mode(DATA, FILE_MODE)?;
        let file = dir.file(DATA, OFlag::O_RDWR);
        dir.set_mode(DATA, SEALED_MODE)?;
        file
    }

    /// How many requests the queues below a disk take at least, as far as the kernel tells.
    pub fn queue_depth(&self, disk: &Name) -> Option<usize> {
        self.0.view().disk(disk).ok()?.here()?.media.depth
    }

    /// The disk of this name, and the size of the image that it has a copy of.
    fn copy_on(&self, digest: Digest, disk: &Name) -> Result<(Arc<Disk>, u64)> {
        let view = self.0.view();
        let slot = view.disk(disk)?;
        let home = slot.usable()?.clone();
        let image = view.images.get(&digest);
        let copy = image.and_then(|image| image.copies.iter().find(|copy| copy.disk == home.id));
        let none = || Error::new(Kind::NotFound, format!("disk {disk} has no copy of it"));
        Ok((home, copy.ok_or_else(none)?.found.record.size))
    }

    /// Takes a name from an image; with its last name the image goes. One that is in use keeps its
    /// last name, and the error names the users.
    pub fn remove_image(&self, name: &Name) -> Result<Unnamed> {
        let (_claimed, (digest, names, disks, away)) =
            self.0.claim(format!("image {name}"), |view| {
                let (digest, image) = view.image(name)?;
                let mut names = image.names();
                // By its digest an image is removed whatever it is called.
                if names.contains(name) {
                    names.retain(|other| other != name);
                } else {
                    names.clear();
                }
                let users = view.users(digest);
                if names.is_empty() && !users.is_empty() {
                    return Err(in_use(name, &users));
                }
                let copies = image.copies.iter().map(|copy| copy.disk);
                let disks: Vec<Arc<Disk>> =
                    copies.filter_map(|id| view.here(id).cloned()).collect();
                let mut wants = vec![
                    (Object::Catalogue, Mode::Shared),
                    // No disk comes meanwhile that would be asked for nothing.
                    (Object::Disks, Mode::Shared),
                    (Object::ImageName(name.clone()), Mode::Alone),
                    (Object::Image(digest), Mode::Alone),
                ];
                wants.extend(disks.iter().map(|disk| (Object::Disk(disk.id), Mode::Shared)));
                Ok((wants, (digest, names, disks, view.away_disks())))
            })?;
        let within = |error: Error| error.within(format!("image {name}"));
        if !names.is_empty() {
            let gone = Gone::Name(digest, name.clone());
            self.remember_removed(&gone, &away).map_err(within)?;
            for disk in &disks {
                self.change_names(disk, digest, |names| names.retain(|other| other != name))
                    .map_err(within)?;
            }
            return Ok(Unnamed::Kept);
        }
        for disk in &disks {
            disk.check_writable().map_err(within)?;
        }
        self.remember_removed(&Gone::Image(digest), &away).map_err(within)?;
        for disk in disks {
            self.remove_copy(&disk, digest).map_err(within)?;
        }
        Ok(Unnamed::Removed)
    }

    /// Removes one copy: out of sight durably, then its files.
    pub(crate) fn remove_copy(&self, disk: &Disk, digest: Digest) -> Result<()> {
        let doomed = format!("{DELETING}{}", Uuid::new_v4());
        self.0.view().live.insert(doomed.clone().into());
        let renamed = disk.images.rename(digest.to_string(), &doomed).map(|()| {
            let mut view = self.0.view();
            if let Some(image) = view.images.get_mut(&digest) {
                image.copies.retain(|copy| copy.disk != disk.id);
            }
            view.images.retain(|_, image| !image.copies.is_empty());
            view.index();
        });
        let removed = renamed
            .and_then(|()| disk.images.sync())
            .and_then(|()| disk.images.remove_tree(&doomed));
        self.0.view().live.remove(std::ffi::OsStr::new(&doomed));
        removed
    }

    /// Gives an image one more name; the caller has claimed both.
    pub(crate) fn add_image_name(&self, digest: Digest, name: &Name) -> Result<()> {
        let disks: Vec<Arc<Disk>> = {
            let view = self.0.view();
            let image = view.images.get(&digest);
            let copies = image.iter().flat_map(|image| &image.copies);
            copies.filter_map(|copy| view.here(copy.disk).cloned()).collect()
        };
        for disk in disks {
            self.change_names(&disk, digest, |names| {
                if !names.contains(name) {
                    names.push(name.clone());
                }
            })?;
        }
        Ok(())
    }

    /// Changes the names in a copy's record, if that makes a difference.
    fn change_names(
        &self,
        disk: &Disk,
        digest: Digest,
        change: impl FnOnce(&mut Vec<Name>),
    ) -> Result<()> {
        self.change_record(disk, digest, |record| change(&mut record.names))
    }

    /// Changes a copy's record, if that makes a difference.
    pub(crate) fn change_record(
        &self,
        disk: &Disk,
        digest: Digest,
        change: impl FnOnce(&mut ImageRecord),
    ) -> Result<()> {
        let dir = disk.copy(digest)?;
        let mut record: ImageRecord = record::read(&dir, IMAGE_JSON)?;
        let before = (record.names.clone(), record.copies);
        change(&mut record);
        if (&record.names, record.copies) == (&before.0, before.1) {
            return Ok(());
        }
        if record.names.len() > NAMES_MAX {
            let what = format!("image {digest} has {NAMES_MAX} names: remove one first");
            return Err(Error::new(Kind::Invalid, what));
        }
        let written = record::write(&dir, IMAGE_JSON, &record);
        // Read again, because a failed write may have changed the record all the same.
        let found = scan::copy(disk, digest);
        let mut view = self.0.view();
        if let Ok(Some(found)) = found {
            view.put_copy(Copy { disk: disk.id, found });
        }
        view.index();
        written
    }
}

/// The error for an image none of whose copies serves.
pub(crate) fn no_copy(name: &Name, image: &Image) -> Error {
    let faults: Vec<_> = image.copies.iter().filter_map(|copy| copy.found.fault.clone()).collect();
    Error::new(
        Kind::Corrupt,
        format!("image {name}: no copy serves ({}): import it again", listed(&faults)),
    )
}

fn in_use(name: &Name, users: &[ImageUser]) -> Error {
    let mut text = format!("image {name} is in use by ");
    let told: Vec<_> = users
        .iter()
        .map(|user| match user.state {
            UserState::Present => format!("replica {} on disk {}", user.name, user.disk),
            UserState::Away => {
                format!("replica {} on disk {}, which isn't there", user.name, user.disk)
            }
            UserState::Leaked => format!(
                "a reference to replica {}, which isn't there (`underlay fsck --repair` removes \
                 it)",
                user.name
            ),
        })
        .collect();
    text += &listed(&told);
    Error::new(Kind::InUse, text + "; remove what stands on it first")
}
