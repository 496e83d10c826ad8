//! The node: its state directory, its disks, and who is at work on what.
//!
//! Invariants:
//! - A disk that can't be used is kept, with the reason; the others work.
//! - The lock on the view is never held while a disk is read or written.
//! - No two daemons work on one state directory.

use std::{
    collections::{HashMap, HashSet},
    fs,
    os::unix::fs::DirBuilderExt,
    path::Path,
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        mpsc::{self, RecvTimeoutError},
    },
    thread,
    time::{Duration, Instant},
};

use uuid::Uuid;

use super::{
    claims::{PATIENCE, Want},
    dir::{DIR_MODE, Dir},
    disk::{self, Absence, Disk},
    record::{self, DiskRecord, DisksRecord, KnownDisk},
    removed::World,
    scan::{self, Contents, Mend},
    status::DiskState,
    steps::Steps,
    view::{Attachment, Slot, View},
};
use crate::error::{Context, Error, Kind, Result};

pub(crate) const DISKS_JSON: &str = "disks.json";
/// Disks that one node may know.
pub(crate) const DISKS_MAX: usize = 256;
/// How long a disk may take to open before the node starts without it.
const OPEN_PATIENCE: Duration = Duration::from_secs(30);

/// A node's catalogue. Clones are the same node.
#[derive(Clone)]
pub struct Node(pub(crate) Arc<Inner>);

pub(crate) struct Inner {
    pub state: Dir,
    pub steps: Steps,
    view: Mutex<View>,
    /// Held while what waits for disks that are away is changed.
    removing: Mutex<()>,
    /// Signalled when a claim is given back.
    freed: Condvar,
    _lock: Option<fs::File>,
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

/// A disk with what it holds, or why it isn't there.
pub(crate) type Opened = Result<(Disk, DiskRecord, Contents), Absence>;

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
            removing: Mutex::default(),
            freed: Condvar::new(),
            _lock: lock,
        }));
        let ids: Vec<Uuid> = known.iter().map(|known| known.id).collect();
        node.load_removed(&ids)?;
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
        let mut all = Vec::new();
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
            all.push((known, opened));
        }
        let mut world = World::default();
        {
            let view = self.0.view();
            for (known, opened) in &all {
                match opened {
                    Ok((.., contents)) => {
                        world.add(known.id, contents, view.removed.get(&known.id));
                    }
                    Err(_) => world.lacks(),
                }
            }
            world.expects(&view);
        }
        for (known, mut opened) in all {
            if let Ok((disk, _, contents)) = &mut opened {
                self.bury(&known.name, disk, contents, &world);
            }
            self.0.settle(known, opened);
        }
        self.strike_what_is_there();
        self.settle_moves();
    }
}

impl Inner {
    /// The view, for a moment.
    pub(crate) fn view(&self) -> MutexGuard<'_, View> {
        // A panic in between leaves a view that is whole: each change to it is one call.
        self.view.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The right to change what waits for disks that are away.
    pub(crate) fn removing(&self) -> MutexGuard<'_, ()> {
        self.removing.lock().unwrap_or_else(PoisonError::into_inner)
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
    pub(crate) fn settle(&self, known: KnownDisk, opened: Opened) {
        let mut view = self.view();
        let id = known.id;
        let (at, contents) = match opened {
            Ok((disk, record, contents)) => {
                (Attachment::Here(Arc::new(disk), record), Some(contents))
            }
            Err(absence) => {
                let before = view.slot(id).map(|slot| &slot.at);
                let is_news =
                    !matches!(before, Some(Attachment::Away(it)) if it.reason == absence.reason);
                // A disk that can't be used is looked for again and again.
                if is_news {
                    tracing::warn!(disk = %known.name, "{}", absence.reason);
                }
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
}

pub(crate) fn open_disk(known: &KnownDisk, steps: Steps) -> Opened {
    let (disk, record) = Disk::open(known, steps)?;
    let contents = scan_and_clean(&disk)?;
    Ok((disk, record, contents))
}

/// Reads a disk that nobody is at work on yet, and removes what a dead process left unfinished.
pub(crate) fn scan_and_clean(disk: &Disk) -> Result<Contents> {
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
