//! Invariants checked: a power cut after any of an operation's steps, which may lose whatever was
//! not synced (names and content apart, each directory for itself, in or out of order), leaves the
//! state before the operation or the one after it; what was acknowledged stays.
//!
//! The operation's steps are recorded on a real disk and replayed on a model of one.

use std::{
    collections::{BTreeMap, HashMap},
    ffi::OsString,
    os::unix::fs::PermissionsExt,
    sync::{Arc, Mutex},
};

use super::{
    scenario::{Snapshot, all, bring_back, check_after_crash, clear, ends, seen, start},
    *,
};
use crate::catalog::steps::Step;

/// Cuts that are tried after each step.
const TRIES: u64 = 12;

type Inode = usize;

#[derive(Clone, Debug)]
enum Change {
    Add { dir: Inode, name: OsString, inode: Inode },
    Move { dir: Inode, from: OsString, to: OsString },
    Swap { dir: Inode, a: OsString, b: OsString },
    Remove { dir: Inode, name: OsString },
    SyncDir(Inode),
    SyncFile(Inode),
    Mode,
}

impl Change {
    /// The directory whose names it changes.
    fn dir(&self) -> Option<Inode> {
        match self {
            Change::Add { dir, .. }
            | Change::Move { dir, .. }
            | Change::Swap { dir, .. }
            | Change::Remove { dir, .. } => Some(*dir),
            Change::SyncDir(_) | Change::SyncFile(_) | Change::Mode => None,
        }
    }
}

#[derive(Clone, Debug)]
enum Content {
    Dir,
    File(Vec<u8>),
    Hole(u64),
}

type Names = HashMap<Inode, BTreeMap<OsString, Inode>>;

/// What is on the disks: inodes, and the names in each directory.
#[derive(Clone)]
struct Model {
    root: PathBuf,
    inodes: Vec<Content>,
    /// Inodes that were there, and durable, at the start.
    durable: usize,
    names: Names,
}

impl Model {
    fn load(root: &Path) -> Model {
        let mut model = Model {
            root: root.to_owned(),
            inodes: vec![Content::Dir],
            durable: 0,
            names: HashMap::new(),
        };
        model.load_dir(root, 0);
        model.durable = model.inodes.len();
        model
    }

    fn load_dir(&mut self, path: &Path, dir: Inode) {
        for entry in fs::read_dir(path).unwrap() {
            let entry = entry.unwrap();
            let is_dir = entry.file_type().unwrap().is_dir();
            let content =
                if is_dir { Content::Dir } else { Content::File(fs::read(entry.path()).unwrap()) };
            let inode = self.inode(content);
            self.names.entry(dir).or_default().insert(entry.file_name(), inode);
            if is_dir {
                self.load_dir(&entry.path(), inode);
            }
        }
    }

    fn inode(&mut self, content: Content) -> Inode {
        self.inodes.push(content);
        self.inodes.len() - 1
    }

    fn find(&self, path: &Path) -> Inode {
        let below = path.strip_prefix(&self.root).unwrap();
        below.iter().fold(0, |dir, name| self.names[&dir][name])
    }

    fn place(&self, path: &Path) -> (Inode, OsString) {
        (self.find(path.parent().unwrap()), path.file_name().unwrap().to_owned())
    }

    /// Takes a step, and tells what it changed.
    fn take(&mut self, step: &Step) -> Change {
        let change = match step {
            Step::MakeDir(path) => {
                let ((dir, name), inode) = (self.place(path), self.inode(Content::Dir));
                Change::Add { dir, name, inode }
            }
            Step::Write { path, bytes } => {
                let inode = self.inode(Content::File(bytes.to_vec()));
                let (dir, name) = self.place(path);
                Change::Add { dir, name, inode }
            }
            Step::SetLen { path, len } => {
                let ((dir, name), inode) = (self.place(path), self.inode(Content::Hole(*len)));
                Change::Add { dir, name, inode }
            }
            Step::SyncFile(path) => Change::SyncFile(self.find(path)),
            Step::SyncDir(path) => Change::SyncDir(self.find(path)),
            Step::Rename { from, to } => {
                let ((dir, from), (there, to)) = (self.place(from), self.place(to));
                assert_eq!(dir, there, "renames stay within their directory");
                Change::Move { dir, from, to }
            }
            Step::Exchange { a, b } => {
                let ((dir, a), (_, b)) = (self.place(a), self.place(b));
                Change::Swap { dir, a, b }
            }
            Step::Unlink(path) | Step::RemoveDir(path) => {
                let (dir, name) = self.place(path);
                Change::Remove { dir, name }
            }
            Step::SetMode { .. } => Change::Mode,
        };
        apply(&mut self.names, &change);
        change
    }
}

fn apply(names: &mut Names, change: &Change) {
    let Some(dir) = change.dir() else { return };
    let names = names.entry(dir).or_default();
    match change {
        Change::Add { name, inode, .. } => drop(names.insert(name.clone(), *inode)),
        Change::Move { from, to, .. } => {
            // Of a name that never became durable nothing can be moved.
            if let Some(inode) = names.remove(from) {
                names.insert(to.clone(), inode);
            }
        }
        Change::Swap { a, b, .. } => {
            if let (Some(one), Some(other)) = (names.get(a).copied(), names.get(b).copied()) {
                names.insert(a.clone(), other);
                names.insert(b.clone(), one);
            }
        }
        Change::Remove { name, .. } => drop(names.remove(name)),
        Change::SyncDir(_) | Change::SyncFile(_) | Change::Mode => {}
    }
}

/// What a power cut after `changes` leaves of the disks that `start` tells of.
fn cut(start: &Model, inodes: &[Content], changes: &[Change], rng: &mut fastrand::Rng) -> Model {
    let mut left = Model { inodes: inodes.to_vec(), ..start.clone() };
    let in_order = rng.bool();
    let mut kept_until: HashMap<Inode, usize> = HashMap::new();
    for (at, change) in changes.iter().enumerate() {
        let Some(dir) = change.dir() else { continue };
        let synced = |other: &Change| matches!(other, Change::SyncDir(d) if *d == dir);
        let durable = changes[at..].iter().any(synced);
        let until = *kept_until.entry(dir).or_insert_with(|| rng.usize(0..=changes.len()));
        let lucky = if in_order { at < until } else { rng.bool() };
        if durable || lucky {
            apply(&mut left.names, change);
        }
    }
    for inode in start.durable..inodes.len() {
        let synced =
            changes.iter().any(|change| matches!(change, Change::SyncFile(i) if *i == inode));
        if synced {
            continue;
        }
        match &mut left.inodes[inode] {
            Content::File(bytes) => {
                if rng.bool() {
                    bytes.truncate(rng.usize(0..=bytes.len()));
                } else if rng.bool() {
                    bytes.fill(0);
                }
            }
            Content::Hole(len) => *len = if rng.bool() { *len } else { 0 },
            Content::Dir => {}
        }
    }
    left
}

/// Writes what the model holds to where it was taken from.
fn write(model: &Model) {
    clear(&model.root);
    let mut todo = vec![(0, model.root.clone())];
    while let Some((dir, path)) = todo.pop() {
        for (name, inode) in model.names.get(&dir).into_iter().flatten() {
            let path = path.join(name);
            match &model.inodes[*inode] {
                Content::Dir => {
                    fs::create_dir(&path).unwrap();
                    fs::set_permissions(&path, fs::Permissions::from_mode(0o700)).unwrap();
                    todo.push((*inode, path));
                    continue;
                }
                Content::File(bytes) => fs::write(&path, bytes).unwrap(),
                Content::Hole(len) => fs::File::create(&path).unwrap().set_len(*len).unwrap(),
            }
            fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
        }
    }
}

#[test]
fn a_power_cut_leaves_before_or_after() {
    let bench = start();
    let common = Snapshot::of(&bench);
    let seed = 20_250;
    let (mut cuts, mut before, mut after) = (0, 0, 0);
    for scenario in all() {
        common.restore(&bench);
        (scenario.prepare)(&bench);
        let prepared = Snapshot::of(&bench);
        let ends = ends(&bench, &scenario);
        prepared.restore(&bench);
        // What an import writes by itself is published durably or not at all: `publish` is handed
        // files that the model takes for unsynced until it syncs them.
        let log = Arc::new(Mutex::new((None::<Model>, Vec::<Change>::new())));
        let (tap, root) = (log.clone(), bench.temp.path().to_owned());
        let steps = Steps::hooked(move |step| {
            let mut log = tap.lock().unwrap();
            let (Some(model), changes) = &mut *log else { return Ok(()) };
            adopt_foreign(model, &root, changes);
            let change = model.take(step);
            changes.push(change);
            Ok(())
        });
        let node = bench.open_in_steps(steps);
        let first = Model::load(bench.temp.path());
        log.lock().unwrap().0 = Some(first.clone());
        (scenario.run)(&bench, &node).unwrap();
        drop(node);
        let (model, changes) = log.lock().unwrap().clone();
        let inodes = model.unwrap().inodes;
        for steps in 0..=changes.len() {
            for attempt in 0..TRIES {
                let salt = seed + (cuts as u64) * 1000 + attempt;
                let left =
                    cut(&first, &inodes, &changes[..steps], &mut fastrand::Rng::with_seed(salt));
                write(&left);
                let label = scenario.label;
                println!("{label}: cut after step {steps} of {}, seed {salt}", changes.len());
                let now = check_after_crash(&bench, &scenario, &ends);
                if now == ends.0 {
                    before += 1;
                } else {
                    after += 1;
                }
                if steps == changes.len() {
                    assert_eq!(now, ends.1, "{label}: what was acknowledged stays");
                }
                cuts += 1;
            }
        }
    }
    println!("{cuts} cuts: {before} as before, {after} as after");
}

#[test]
fn a_power_cut_while_a_disk_returns_brings_nothing_back() {
    let bench = start();
    let common = Snapshot::of(&bench);
    let (seed, mut cuts) = (20_251, 0);
    for scenario in all().into_iter().filter(|scenario| scenario.label.contains("away")) {
        let label = scenario.label;
        common.restore(&bench);
        (scenario.prepare)(&bench);
        (scenario.run)(&bench, &bench.open()).unwrap();
        bring_back(&bench);
        let returned = Snapshot::of(&bench);
        let wanted = seen(&bench.open());
        returned.restore(&bench);
        let first = Model::load(bench.temp.path());
        let log = Arc::new(Mutex::new((first.clone(), Vec::<Change>::new())));
        let tap = log.clone();
        let steps = Steps::hooked(move |step| {
            let (model, changes) = &mut *tap.lock().unwrap();
            let change = model.take(step);
            changes.push(change);
            Ok(())
        });
        drop(bench.open_in_steps(steps));
        let (model, changes) = log.lock().unwrap().clone();
        assert!(changes.len() > 5, "{label}: it takes steps");
        for steps in 0..=changes.len() {
            for attempt in 0..TRIES {
                let salt = seed + cuts * 1000 + attempt;
                let mut rng = fastrand::Rng::with_seed(salt);
                write(&cut(&first, &model.inodes, &changes[..steps], &mut rng));
                println!("{label}: cut after step {steps} of {}, seed {salt}", changes.len());
                let node = bench.open();
                assert_eq!(seen(&node), wanted, "{label}");
                let problems = node.fsck(crate::catalog::Repair::Mend).unwrap().problems;
                assert!(problems.iter().all(|problem| problem.mended), "{label}: {problems:?}");
                cuts += 1;
            }
        }
    }
    println!("{cuts} cuts");
}

/// Takes into the model the files that an importer has written by itself into a staging directory: what it has
/// written anew counts as another file, whose content is not synced.
fn adopt_foreign(model: &mut Model, root: &Path, changes: &mut Vec<Change>) {
    let staging: Vec<_> =
        tree(root).into_iter().filter(|file| file.contains("/images/.staging-")).collect();
    for file in staging {
        let path = root.join(&file);
        let known = path.strip_prefix(root).unwrap().iter().try_fold(0, |dir, name| {
            model.names.get(&dir).and_then(|names| names.get(name)).copied()
        });
        if !path.is_file() {
            continue;
        }
        let bytes = fs::read(&path).unwrap();
        let is_same = |inode: Inode| match &model.inodes[inode] {
            Content::File(known) => *known == bytes,
            Content::Hole(_) | Content::Dir => true,
        };
        if !known.is_some_and(is_same) {
            let inode = model.inode(Content::File(bytes));
            let (dir, name) = model.place(&path);
            let change = Change::Add { dir, name, inode };
            apply(&mut model.names, &change);
            changes.push(change);
        }
    }
}
