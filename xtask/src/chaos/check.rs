//! Whether the node is what it must be: everything that should be there is, once, whole, and nothing else.
//!
//! Invariants checked:
//! - a replica is on one disk, opens, has a size that it was given, and holds what was acknowledged;
//! - an image that a replica stands on is there, and every copy's file is the image;
//! - after `fsck --repair` there is nothing to mend, and nothing on a disk that the catalogue does not know;
//! - no space is taken by what nobody knows.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::PoisonError;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use super::world::{Presence, Replica, Source, Stands, World};
use crate::daemon::Daemon;
use crate::nbd::Client;
use crate::pattern;

/// What a file system may take for itself as files come and go, in bytes.
const SLACK: u64 = 4 << 20;
/// How long the daemon may take to bring the number of copies in order.
const SETTLED: Duration = Duration::from_secs(20);

/// What was looked at.
#[derive(Default, Clone, Copy)]
pub struct Looked {
    /// Bytes that were compared.
    pub bytes: u64,
    /// Replicas, one by one.
    pub replicas: u64,
    /// What `fsck --repair` had to mend.
    pub mended: u64,
}

impl Looked {
    /// Adds what was looked at another time.
    pub fn add(&mut self, other: Looked) {
        self.bytes += other.bytes;
        self.replicas += other.replicas;
        self.mended += other.mended;
    }
}

/// Looks at everything. Nobody else is at work, and the daemon has been started anew.
pub fn check(world: &World, daemon: &mut Daemon, roots: &[Root]) -> Result<Looked> {
    daemon.healthy()?;
    let mended = fsck(daemon)?;
    let status = daemon.json(&["status"])?;
    replicas(world, &status)?;
    images(world, &status)?;
    let mut looked = Looked { mended, ..contents(world, daemon)? };
    let started = Instant::now();
    looked.bytes += loop {
        match files(world, &daemon.json(&["status"])?, roots) {
            Ok(bytes) => break bytes,
            // The daemon itself may be making a copy that is wanted, or removing one that is not.
            Err(_) if started.elapsed() < SETTLED => thread::sleep(Duration::from_millis(300)),
            Err(error) => return Err(error),
        }
    };
    daemon.healthy()?;
    Ok(looked)
}

/// A disk, and what its file system took when it was empty.
pub struct Root {
    /// Where it is mounted.
    pub path: PathBuf,
    /// Bytes that were taken.
    pub before: u64,
}

impl Root {
    /// A disk with nothing on it yet.
    pub fn new(path: &Path) -> Result<Root> {
        Ok(Root { path: path.to_owned(), before: used(path)? })
    }
}

/// Mends what may be left after a kill, and nothing else is wrong. How much there was.
fn fsck(daemon: &Daemon) -> Result<u64> {
    let found = daemon.json(&["fsck", "--repair"]).context("fsck --repair left something")?;
    let problems = found["problems"].as_array().context("fsck has no problems")?;
    let after = daemon.json(&["fsck"]).context("fsck after fsck --repair")?;
    ensure!(after["problems"] == Value::Array(Vec::new()), "fsck mends without end: {after}");
    Ok(problems.len() as u64)
}

/// Compares the list of replicas; what was unknown is known now.
fn replicas(world: &World, status: &Value) -> Result<()> {
    let mut state = world.state();
    let mut listed: BTreeMap<&str, &Value> = BTreeMap::new();
    for replica in array(status, "replicas")? {
        let name = string(replica, "name")?;
        ensure!(listed.insert(name, replica).is_none(), "replica {name} is there twice");
    }
    for (name, replica) in &mut state.replicas {
        let found = listed.remove(name.as_str());
        match (replica.presence, found) {
            (Presence::Here, None) => bail!("replica {name} is lost: {status}"),
            (Presence::Gone, Some(found)) => bail!("replica {name} was removed: {found}"),
            (_, Some(found)) => {
                replica.presence = Presence::Here;
                one(name, replica, found, &world.sources[replica.source])?;
            }
            (_, None) => replica.presence = Presence::Gone,
        }
    }
    ensure!(listed.is_empty(), "nobody made these replicas: {listed:?}");
    state.replicas.retain(|_, replica| replica.presence == Presence::Here);
    Ok(())
}

/// Compares what is told of a replica.
fn one(name: &str, replica: &mut Replica, found: &Value, source: &Source) -> Result<()> {
    ensure!(found["state"] == "ready", "replica {name}: {found}");
    ensure!(found["poisoned"].is_null(), "replica {name}: {found}");
    let image = found["image"].as_array().into_iter().flatten();
    let image: Vec<_> = image.filter_map(Value::as_str).collect();
    let stands = !found["digest"].is_null();
    match (replica.stands, stands) {
        (Stands::On, false) => bail!("replica {name} stands on nothing, and was not flattened"),
        (Stands::Alone, true) => bail!("replica {name} was flattened: {found}"),
        (_, true) => {
            let right = image.contains(&source.name.as_str());
            ensure!(right, "replica {name} was made of {}: {found}", source.name);
            replica.stands = Stands::On;
        }
        (_, false) => replica.stands = Stands::Alone,
    }
    Ok(())
}

/// Compares the list of images; none that a replica stands on can be removed.
fn images(world: &World, status: &Value) -> Result<()> {
    let mut state = world.state();
    let mut listed: BTreeMap<&str, &Value> = BTreeMap::new();
    for image in array(status, "images")? {
        for name in array(image, "names")? {
            let name = name.as_str().context("a name is no text")?;
            ensure!(listed.insert(name, image).is_none(), "image {name} is there twice");
        }
    }
    for (at, source) in world.sources.iter().enumerate() {
        let name = source.name.as_str();
        let users =
            state.replicas.iter().filter(|(_, it)| it.source == at && it.stands == Stands::On);
        let users: BTreeSet<&str> = users.map(|(name, _)| name.as_str()).collect();
        let found = listed.remove(name);
        match (state.images[at], found) {
            (Presence::Here, None) => bail!("image {name} is lost, which has users {users:?}"),
            (Presence::Gone, Some(found)) => bail!("image {name} was removed: {found}"),
            (_, Some(found)) => {
                let told = array(found, "users")?;
                let told = told.iter().map(|user| string(user, "name")).collect::<Result<_>>()?;
                ensure!(users == told, "image {name}: its users are {users:?}: {found}");
                for copy in array(found, "copies")? {
                    ensure!(copy["state"] == "ready", "image {name}: {copy}");
                }
            }
            (_, None) => ensure!(users.is_empty(), "image {name} is lost, its users are {users:?}"),
        }
        state.images[at] = if found.is_some() { Presence::Here } else { Presence::Gone };
    }
    ensure!(listed.is_empty(), "nobody imported these images: {listed:?}");
    Ok(())
}

/// Opens every replica and compares what it holds.
fn contents(world: &World, daemon: &Daemon) -> Result<Looked> {
    let all: Vec<(String, Replica)> =
        world.state().replicas.iter().map(|(name, it)| (name.clone(), it.clone())).collect();
    let mut looked = Looked::default();
    for (name, replica) in all {
        let within = || format!("replica {name}");
        let export = format!("replica/{name}");
        let mut client = Client::open(daemon.nbd(), &export)?;
        let size = client.size();
        ensure!(
            replica.sizes.contains(&size),
            "replica {name} has {size}, not {:?}",
            replica.sizes
        );
        let found = client.read_all(size).with_context(within)?;
        let mut content = replica.content.lock().unwrap_or_else(PoisonError::into_inner);
        content.settle(&found).with_context(within)?;
        world.with(&name, |it| it.sizes = vec![size]);
        looked.bytes += size;
        looked.replicas += 1;
    }
    Ok(looked)
}

/// Looks through the directories of the disks. How many bytes of copies were compared.
fn files(world: &World, status: &Value, roots: &[Root]) -> Result<u64> {
    let mut compared = 0;
    let ids: BTreeSet<(String, String)> = array(status, "replicas")?
        .iter()
        .map(|it| Ok((string(it, "disk")?.to_owned(), string(it, "id")?.to_owned())))
        .collect::<Result<_>>()?;
    let users: BTreeMap<String, (BTreeSet<String>, &Source)> = array(status, "images")?
        .iter()
        .map(|image| {
            let users =
                array(image, "users")?.iter().map(|user| Ok(string(user, "id")?.to_owned()));
            let names = array(image, "names")?;
            let source = world.sources.iter().find(|it| names.iter().any(|name| *name == it.name));
            let source = source.context("an image of nobody")?;
            Ok((string(image, "digest")?.to_owned(), (users.collect::<Result<_>>()?, source)))
        })
        .collect::<Result<_>>()?;
    for disk in array(status, "disks")? {
        let name = string(disk, "name")?;
        let root = PathBuf::from(string(disk, "path")?);
        let base = root.join("underlay");
        let there = entries(&base.join("replicas"))?;
        let of = |id: &String| ids.contains(&(name.to_owned(), id.clone()));
        ensure!(
            there.iter().all(of) && ids.iter().filter(|(on, _)| on == name).count() == there.len(),
            "disk {name} holds the replicas {there:?}, the catalogue knows {ids:?}"
        );
        for id in &there {
            let files = entries(&base.join("replicas").join(id))?;
            ensure!(
                files.iter().eq(["data", "map", "replica.json"]),
                "disk {name}: replica {id} has {files:?}"
            );
        }
        for digest in entries(&base.join("images"))? {
            let copy = base.join("images").join(&digest);
            let (users, source) = users
                .get(&digest)
                .with_context(|| format!("disk {name} has {digest}: of nobody"))?;
            let files = entries(&copy)?;
            ensure!(
                files.iter().eq(["chunks", "data", "image.json", "refs"]),
                "disk {name}: image {digest} has {files:?}"
            );
            let refs = entries(&copy.join("refs"))?;
            let right: BTreeSet<_> = users.iter().map(|id| format!("{id}.json")).collect();
            ensure!(
                refs == right,
                "disk {name}: image {} has the references {refs:?}, its users are {users:?}",
                source.name
            );
            let data = fs::read(copy.join("data"))?;
            if let Some(at) = pattern::differ(&data, &source.content) {
                bail!("disk {name}: byte {at} of the copy of {} is not the image's", source.name);
            }
            compared += data.len() as u64;
        }
        for digest in entries(&base.join("cache"))? {
            ensure!(users.contains_key(&digest), "disk {name} has a cache of {digest}, of nobody");
        }
        if let Some(root) = roots.iter().find(|it| it.path == root) {
            room(name, root)?;
        }
    }
    Ok(compared)
}

/// No more of a disk is taken than its files take.
fn room(name: &str, root: &Root) -> Result<()> {
    let (known, used) = (beneath(&root.path.join("underlay"))?, used(&root.path)?);
    ensure!(
        used <= root.before + known + SLACK,
        "disk {name}: {used} bytes are taken, its files take {known}, it took {} empty",
        root.before
    );
    Ok(())
}

/// Bytes that the file system at `path` has given away.
fn used(path: &Path) -> Result<u64> {
    let all = nix::sys::statvfs::statvfs(path).context("statvfs")?;
    Ok((all.blocks() - all.blocks_free()) * all.fragment_size())
}

/// Bytes that the files beneath `dir` take.
fn beneath(dir: &Path) -> Result<u64> {
    let mut bytes = 0;
    for entry in fs::read_dir(dir).with_context(|| format!("reading {}", dir.display()))? {
        let entry = entry?;
        let meta = entry.metadata()?;
        bytes += meta.blocks() * 512;
        if meta.is_dir() {
            bytes += beneath(&entry.path())?;
        }
    }
    Ok(bytes)
}

/// The names in a directory.
fn entries(dir: &Path) -> Result<BTreeSet<String>> {
    let all = fs::read_dir(dir).with_context(|| format!("reading {}", dir.display()))?;
    all.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned())).collect()
}

fn array<'a>(value: &'a Value, key: &str) -> Result<&'a Vec<Value>> {
    value[key].as_array().with_context(|| format!("no {key} in {value}"))
}

fn string<'a>(value: &'a Value, key: &str) -> Result<&'a str> {
    value[key].as_str().with_context(|| format!("no {key} in {value}"))
}
