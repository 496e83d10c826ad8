//! The files that images were imported from, as far as this node may read them again.
//!
//! Invariant: it is in the state directory and never on a disk: a disk that was prepared by somebody else
//! has this host read no file.

use std::{fs::File, os::unix::fs::MetadataExt, path::PathBuf};

use serde::{Deserialize, Serialize};

use super::{
    name::Digest,
    node::Node,
    record::{self, FORMAT, image_file},
};
use crate::error::{Context, Error, Kind, Result};

const ORIGINS: &str = "origins";
/// The longest path that is kept, in bytes.
const PATH_MAX: usize = 4096;

/// `<state>/origins/<digest>.json`: the file that an image was imported from, and what tells that it is
/// still that one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Origin {
    format: u32,
    /// The image.
    pub digest: Digest,
    /// Where the file was.
    pub path: PathBuf,
    /// What its bytes are: `raw`, `qcow2`, `vmdk`.
    pub content: String,
    /// What tells it from others.
    pub stamp: Stamp,
}

/// What tells a file from another, and from what it was before it was changed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Stamp {
    device: u64,
    inode: u64,
    /// Its length in bytes.
    pub length: u64,
    modified: i64,
    modified_nanos: i64,
}

impl Stamp {
    /// The stamp of an open file; an error if it is not a regular one.
    pub fn of(file: &File) -> Result<Stamp> {
        let metadata = file.metadata().context(|| "looking at a source")?;
        if !metadata.is_file() {
            return Err(Error::new(Kind::Invalid, "it is not a regular file"));
        }
        Ok(Stamp {
            device: metadata.dev(),
            inode: metadata.ino(),
            length: metadata.len(),
            modified: metadata.mtime(),
            modified_nanos: metadata.mtime_nsec(),
        })
    }
}

impl Origin {
    /// The image came from this file, whose bytes are `content`.
    pub fn new(digest: Digest, path: PathBuf, content: impl Into<String>, stamp: Stamp) -> Origin {
        Origin { format: FORMAT, digest, path, content: content.into(), stamp }
    }
}

impl Node {
    /// The file that an image was imported from, if that is known.
    pub fn origin(&self, digest: Digest) -> Result<Option<Origin>> {
        let origins = match self.0.state.open(ORIGINS) {
            Err(error) if error.kind() == Kind::NotFound => return Ok(None),
            other => other?,
        };
        match record::read::<Origin>(&origins, &image_file(digest)) {
            Ok(origin) => Ok((origin.digest == digest).then_some(origin)),
            Err(error) if error.kind() == Kind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Keeps where an image was imported from, in the place of an earlier file.
    pub fn record_origin(&self, origin: &Origin) -> Result<()> {
        if origin.path.as_os_str().len() > PATH_MAX || origin.path.to_str().is_none() {
            // A record can't name it.
            return self.remove_origin(origin.digest);
        }
        record::write(&self.0.state.ensure(ORIGINS)?, &image_file(origin.digest), origin)
    }

    /// Forgets where an image was imported from.
    pub fn remove_origin(&self, digest: Digest) -> Result<()> {
        match self.0.state.open(ORIGINS) {
            Err(error) if error.kind() == Kind::NotFound => Ok(()),
            other => other?.unlink_if_there(image_file(digest)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn where_images_came_from_is_kept_and_forgotten() {
        let directory = tempfile::tempdir().unwrap();
        let node = Node::open(directory.path()).unwrap();
        let digest = Digest([5; 32]);
        assert_eq!(node.origin(digest).unwrap(), None);
        node.remove_origin(digest).unwrap();
        let path = directory.path().join("image.raw");
        std::fs::write(&path, "content").unwrap();
        let stamp = Stamp::of(&File::open(&path).unwrap()).unwrap();
        let origin = Origin::new(digest, path.clone(), "raw", stamp.clone());
        node.record_origin(&origin).unwrap();
        assert_eq!(node.origin(digest).unwrap(), Some(origin.clone()));
        std::fs::write(&path, "other").unwrap();
        assert_ne!(Stamp::of(&File::open(&path).unwrap()).unwrap(), stamp);
        assert!(Stamp::of(&File::open(directory.path()).unwrap()).is_err());
        let long = Origin { path: "x".repeat(PATH_MAX + 1).into(), ..origin };
        node.record_origin(&long).unwrap();
        assert_eq!(node.origin(digest).unwrap(), None);
    }
}
