//! Tests of the catalogue as a whole, on directories of a temporary one.

mod caches;
mod dir;
mod hostile;
mod kill;
mod mending;
mod moves;
mod operations;
mod power;
mod removed;
mod scale;
mod scenario;
mod unfinished;

use std::{
    fs,
    path::{Path, PathBuf},
};

use sha2::{Digest as _, Sha256};
use uuid::Uuid;

use super::{
    Digest, DiskOptions, ImageMeta, ImageStatus, Name, NewReplica, Node, Placement, ReplicaStatus,
    StagedCopy, steps::Steps,
};
use crate::error::Result;

/// A node in a temporary directory: its state and the directories that are its disks.
struct Bench {
    temp: tempfile::TempDir,
}

impl Bench {
    fn new() -> Bench {
        Bench { temp: tempfile::tempdir().unwrap() }
    }

    /// In memory where that can be had: for tests of thousands of runs, whose syncs prove nothing.
    fn in_memory() -> Bench {
        let memory = tempfile::tempdir_in("/dev/shm");
        Bench { temp: memory.or_else(|_| tempfile::tempdir()).unwrap() }
    }

    /// A node with these disks.
    fn with(disks: &[&str]) -> (Bench, Node) {
        let bench = Bench::new();
        let node = bench.open_with(disks);
        (bench, node)
    }

    fn open_with(&self, disks: &[&str]) -> Node {
        let node = self.open();
        for disk in disks {
            self.add(&node, disk).unwrap();
        }
        node
    }

    fn open(&self) -> Node {
        Node::open(&self.state()).unwrap()
    }

    fn open_in_steps(&self, steps: Steps) -> Node {
        Node::open_in_steps(&self.state(), steps).unwrap()
    }

    fn state(&self) -> PathBuf {
        self.temp.path().join("state")
    }

    fn path(&self, disk: &str) -> PathBuf {
        self.temp.path().join(disk)
    }

    fn home(&self, disk: &str) -> PathBuf {
        self.path(disk).join("underlay")
    }

    fn add(&self, node: &Node, disk: &str) -> Result<super::DiskStatus> {
        fs::create_dir_all(self.path(disk)).unwrap();
        node.add_disk(&self.path(disk), DiskOptions::default())
    }

    fn add_pool(&self, node: &Node, disk: &str) {
        fs::create_dir_all(self.path(disk)).unwrap();
        let options = DiskOptions { placement: Some(Placement::Pool), ..DiskOptions::default() };
        node.add_disk(&self.path(disk), options).unwrap();
    }
}

fn name(text: &str) -> Name {
    text.parse().unwrap()
}

fn digest(content: &[u8]) -> Digest {
    Digest(Sha256::digest(content).into())
}

/// Stages a copy with this content, as an importer would.
fn stage(node: &Node, disk: Option<&str>, content: &[u8]) -> Result<StagedCopy> {
    let staged = node.stage_copy(disk.map(name).as_ref(), content.len() as u64)?;
    fs::write(staged.data_path(), content).unwrap();
    fs::write(staged.chunks_path(), b"chunk table").unwrap();
    Ok(staged)
}

fn meta(image: &str, content: &[u8]) -> ImageMeta {
    ImageMeta {
        name: name(image),
        digest: digest(content),
        size: content.len() as u64,
        source: "https://example.org/image.raw".to_owned(),
        source_sha256: None,
    }
}

fn import(node: &Node, disk: Option<&str>, image: &str, content: &[u8]) -> Result<ImageStatus> {
    stage(node, disk, content)?.publish(meta(image, content))
}

fn create(node: &Node, replica: &str, image: &str, disk: &str) -> Result<ReplicaStatus> {
    let new = NewReplica { name: name(replica), image: name(image), disk: name(disk), size: None };
    node.create_replica(new, blank_map)
}

/// Stands for the first bytes of an overlay's map.
fn blank_map(id: Uuid, size: u64) -> Vec<u8> {
    [id.as_bytes().as_slice(), &size.to_le_bytes()].concat()
}

/// All files and directories below `path`, relative to it, sorted.
fn tree(path: &Path) -> Vec<String> {
    let mut found = Vec::new();
    let mut todo = vec![path.to_owned()];
    while let Some(dir) = todo.pop() {
        for entry in fs::read_dir(dir).unwrap() {
            let entry = entry.unwrap();
            found.push(entry.path().strip_prefix(path).unwrap().display().to_string());
            if entry.file_type().unwrap().is_dir() {
                todo.push(entry.path());
            }
        }
    }
    found.sort();
    found
}
