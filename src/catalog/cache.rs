//! Caches: chunks of images that were promoted to a disk. Their content is `promote`'s; here they are
//! only made, found and removed.
//!
//! Nothing of it is durable on purpose: a cache that is gone or damaged after a crash is made anew. What
//! says whose it is, its header, is compared when it is opened.

use std::{fs::File, os::unix::fs::FileExt};

use nix::fcntl::{OFlag, PosixFadviseAdvice, posix_fadvise};

use super::{
    dir::Dir,
    disk::{CACHE, CHUNKS, DATA},
    name::{Digest, Name},
    node::Node,
};
use crate::{
    error::{Context, Error, Kind, Result},
    units::{self, BLOCK},
};

/// Caches that one disk may have.
const CACHES_MAX: usize = 65_536;

/// The files of a cache.
#[derive(Debug)]
pub struct OpenCache {
    /// Chunks at identity offsets.
    pub data: File,
    /// What is there of them.
    pub chunks: File,
}

/// What a cache is to be.
#[derive(Debug)]
pub struct CacheShape {
    /// The image.
    pub digest: Digest,
    /// The image's bytes.
    pub size: u64,
    /// What the table of a new one begins with.
    pub header: Vec<u8>,
    /// Bytes of the table.
    pub table: u64,
}

impl Node {
    /// The images of which the disk has a cache, which may be empty or damaged.
    pub fn caches(&self, disk: &Name) -> Result<Vec<Digest>> {
        let entries = self.cache_dir(disk)?.entries(CACHES_MAX)?;
        let digests = entries.iter().filter_map(|entry| entry.name.to_str()?.parse().ok());
        Ok(digests.collect())
    }

    /// Opens the disk's cache of this shape; it is made if there is none, or one that can't be right.
    /// `flags` may ask for content past the page cache (`O_DIRECT`), if the disk can.
    pub fn open_cache(&self, disk: &Name, shape: &CacheShape, flags: OFlag) -> Result<OpenCache> {
        let CacheShape { digest, size, header, table } = shape;
        let data_len = units::blocks(*size) * BLOCK;
        let caches = self.cache_dir(disk)?;
        let name = digest.to_string();
        let open = |dir: &Dir| -> Result<OpenCache> {
            let data = match dir.file(DATA, OFlag::O_RDWR | flags) {
                // A file system that knows no direct I/O.
                Err(error) if error.kind() == Kind::Io => dir.file(DATA, OFlag::O_RDWR)?,
                other => other?,
            };
            let chunks = dir.file(CHUNKS, OFlag::O_RDWR)?;
            let len = |file: &File| file.metadata().map(|meta| meta.len());
            let found = len(&data).and_then(|data| Ok((data, len(&chunks)?)));
            if found.context(|| "looking at its files")? != (data_len, *table) {
                return Err(Error::new(Kind::Corrupt, "its files are cut short"));
            }
            let mut told = vec![0; header.len()];
            chunks.read_exact_at(&mut told, 0).context(|| "reading its header")?;
            if told != *header {
                return Err(Error::new(Kind::Corrupt, "its table is that of another image"));
            }
            // What the page cache holds of it may never have reached the disk.
            posix_fadvise(&data, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED)
                .context(|| "dropping what is cached of it")?;
            Ok(OpenCache { data, chunks })
        };
        let make = || -> Result<OpenCache> {
            let dir = caches.create(&name)?;
            dir.write_sparse(DATA, data_len)?;
            dir.write_sparse(CHUNKS, *table)?;
            let chunks = dir.file(CHUNKS, OFlag::O_RDWR)?;
            chunks.write_all_at(header, 0).context(|| "writing its header")?;
            open(&dir)
        };
        let opened = match caches.open(&name).and_then(|dir| open(&dir)) {
            Err(error) if error.kind() == Kind::NotFound && caches.stat(&name)?.is_none() => make(),
            Err(error) => {
                tracing::info!(%disk, image = %digest, %error, "a cache is thrown away");
                caches.remove_tree(&name).and_then(|()| make())
            }
            open => open,
        };
        opened.map_err(|error| error.within(format!("disk {disk}: cache of image {digest}")))
    }

    /// Whether nothing that this node knows can bring the image back, so that what was promoted of it
    /// serves nobody: it has no copy, not even a damaged one, no replica stands on it, and no disk is away
    /// that could hold either.
    pub fn is_image_gone(&self, digest: Digest) -> bool {
        let view = self.0.view();
        !view.images.contains_key(&digest)
            && view.missing().is_empty()
            && view.users(digest).is_empty()
    }

    /// The size of an image, if a copy of it is there.
    pub fn image_size(&self, digest: Digest) -> Option<u64> {
        let view = self.0.view();
        view.images.get(&digest)?.copies.first().map(|copy| copy.found.record.size)
    }

    /// Removes the disk's cache of this image, if there is one.
    pub fn remove_cache(&self, disk: &Name, digest: Digest) -> Result<()> {
        let caches = self.cache_dir(disk)?;
        match caches.stat(digest.to_string())? {
            Some(_) => caches.remove_tree(digest.to_string()),
            None => Ok(()),
        }
    }

    fn cache_dir(&self, disk: &Name) -> Result<Dir> {
        let disk = self.0.view().disk(disk)?.usable()?.clone();
        disk.home.ensure(CACHE)
    }
}

/// Removes every cache in a disk's directory of caches.
pub(super) fn clear(caches: &Dir) -> Result<()> {
    for entry in caches.entries(CACHES_MAX)? {
        if entry.name.to_str().is_some_and(|name| name.parse::<Digest>().is_ok()) {
            caches.remove_tree(&entry.name)?;
        }
    }
    Ok(())
}
