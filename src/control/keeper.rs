//! Keeps as many copies of each image as are wanted: lost ones are made anew, surplus ones go.
//!
//! Invariant: one thing at a time is done, at a bounded rate, and nothing waits for it.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::{
        Arc, Mutex, PoisonError, Weak,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use serde_json::json;
use uuid::Uuid;

use crate::{
    catalog::{Buried, CopyState, Digest, DiskState, DiskStatus, Name, Placement, Removal},
    control::{
        copying::{Copying, Order},
        events::Happened,
        service::blocking,
    },
    error::{Error, Kind, Result},
    keep::{Action, Held, Keeper, Place},
    source::Trouble,
};

/// How often it is looked.
const LOOK: Duration = Duration::from_secs(2);
/// How long an image is left alone for which something failed.
const PAUSE: Duration = Duration::from_secs(30);

/// What keeps the copies.
pub struct Keeping {
    copying: Copying,
    wanted: Wanted,
    rate: u64,
    /// The disks as they were at the last look.
    disks: Mutex<HashMap<Name, DiskState>>,
    stop: Arc<AtomicBool>,
    /// What somebody is at: a disk that may have returned, or the sweep.
    tidies: Mutex<BTreeSet<Option<Uuid>>>,
    made: AtomicU64,
    removed: AtomicU64,
    failed: AtomicU64,
}

/// Work that is under way as long as this is there.
struct Tidying {
    keeping: Arc<Keeping>,
    job: Option<Uuid>,
}

impl Drop for Tidying {
    fn drop(&mut self) {
        let tidies = self.keeping.tidies.lock();
        tidies.unwrap_or_else(PoisonError::into_inner).remove(&self.job);
    }
}

/// What is wanted where nobody said something else.
#[derive(Clone, Copy, Debug)]
pub struct Wanted {
    /// How many copies of an image.
    pub copies: u32,
    /// The kind of disk that they are on rather than others.
    pub placement: Placement,
}

impl Keeping {
    /// Begins to keep copies; what is lost is waited for so long.
    pub fn start(copying: Copying, wanted: Wanted, patience: Duration, rate: u64) -> Arc<Keeping> {
        let (disks, stop, tidies) = Default::default();
        let (made, removed, failed) = Default::default();
        let keeping =
            Arc::new(Keeping { copying, wanted, rate, disks, stop, tidies, made, removed, failed });
        tokio::spawn(keep_for_ever(Arc::downgrade(&keeping), Keeper::new(patience)));
        keeping
    }

    /// Copies that were made, removed, and could not be made.
    pub fn figures(&self) -> [u64; 3] {
        [&self.made, &self.removed, &self.failed].map(|count| count.load(Ordering::Relaxed))
    }

    /// Who makes copies.
    pub fn copying(&self) -> &Copying {
        &self.copying
    }

    /// What is being made is given up.
    pub fn stop(&self) {
        self.stop.store(true, Ordering::Release);
    }

    /// Sees to it that the copies of each image say the same, and tells what there is.
    fn look(&self) -> BTreeMap<Digest, Held> {
        let node = self.copying.node();
        let disks = node.disks();
        self.tell_disks(&disks);
        let troubles: HashMap<String, Trouble> = self
            .copying
            .bases()
            .disks()
            .iter()
            .filter_map(|disk| Some((disk.name().to_owned(), disk.trouble()?)))
            .collect();
        let trouble = |name: &Name| troubles.get(name.as_str()).copied();
        let open: HashMap<_, _> = self.copying.bases().all().into_iter().collect();
        let mut images = BTreeMap::new();
        for image in node.images() {
            if let Err(error) = node.align_copies(image.digest) {
                tracing::warn!(image = %image.digest, %error, "its copies differ in what they say");
            }
            // A disk whose device is gone may still be mounted: its reads tell.
            let up = |name: &Name| {
                disks.iter().find(|disk| {
                    disk.name == *name
                        && matches!(disk.state, DiskState::Present | DiskState::ReadOnly)
                        && !matches!(trouble(name), Some(Trouble::Silent | Trouble::Failing))
                })
            };
            let ready = image.copies.iter().filter(|copy| copy.state == CopyState::Ready);
            let homes: Vec<_> = ready.filter_map(|copy| up(&copy.disk)).collect();
            let open = open.get(&image.digest).map(|base| base.sources().copies());
            let damaged = |disk: &Name| {
                let mut copies = open.iter().flat_map(|copies| copies.iter());
                copies.any(|it| it.disk().name() == disk.as_str() && it.is_beyond_repair())
            };
            let copies = homes.iter().map(|disk| Place {
                disk: disk.name.clone(),
                fits: disk.pool == (self.wanted.placement == Placement::Pool),
                tier: disk.tier,
                together: homes.iter().any(|other| disk.fails_with.contains(&other.name)),
                troubled: trouble(&disk.name).is_some(),
                damaged: damaged(&disk.name),
            });
            let wanted = image.wanted_copies.unwrap_or(self.wanted.copies) as usize;
            images.insert(image.digest, Held { wanted, copies: copies.collect() });
        }
        images
    }

    async fn act(self: &Arc<Self>, digest: Digest, action: Action) -> Result<()> {
        match action {
            Action::Make => {
                let own = self.clone();
                let made = blocking(move || {
                    own.copying.make(&Order {
                        digest,
                        disk: None,
                        anyhow: false,
                        why: "fewer were there than wanted",
                        rate: Some(own.rate),
                        cancel: &own.stop,
                        report: &|_, _| {},
                    })
                })
                .await;
                let counter = if made.is_ok() { &self.made } else { &self.failed };
                counter.fetch_add(1, Ordering::Relaxed);
                made?;
            }
            Action::Remove(disk) => {
                let node = self.copying.node().clone();
                let others = blocking(move || Ok(node.ready_copies(digest))).await?;
                for (other, _) in others.iter().filter(|(other, _)| *other != disk) {
                    if !self.copying.is_sound(digest, other).await? {
                        let what = format!("the copy on disk {other} is damaged");
                        return Err(Error::new(Kind::Corrupt, what));
                    }
                }
                let (node, from) = (self.copying.node().clone(), disk.clone());
                blocking(move || node.remove_copy_on(&digest.to_string().parse()?, &from, false))
                    .await?;
                self.removed.fetch_add(1, Ordering::Relaxed);
                let message =
                    format!("its copy on disk {disk} was removed: there were more than wanted");
                let details = json!({ "digest": digest, "disk": disk, "why": "surplus" });
                let bases = self.copying.bases();
                bases.events().tell(Happened::CopyRemoved, bases.called(digest), message, details);
            }
        }
        Ok(())
    }

    /// Takes back disks that have returned, and sweeps what nobody goes on with: each disk by itself, since it
    /// may have to be waited for.
    fn tidy(self: &Arc<Self>) {
        let node = self.copying.node();
        let returning = node.awaited().into_iter().map(Some);
        let sweeping = node.has_ended_unfinished().then_some(None);
        for job in returning.chain(sweeping) {
            let mut under_way = self.tidies.lock().unwrap_or_else(PoisonError::into_inner);
            if !under_way.insert(job) {
                continue;
            }
            drop(under_way);
            let guard = Tidying { keeping: self.clone(), job };
            tokio::task::spawn_blocking(move || match guard.job {
                Some(disk) => guard.keeping.copying.node().take_back(disk),
                None => guard.keeping.copying.node().sweep_unfinished(),
            });
        }
    }

    /// Tells which disks have vanished or returned since the last look.
    fn tell_disks(&self, disks: &[DiskStatus]) {
        let mut known = self.disks.lock().unwrap_or_else(PoisonError::into_inner);
        let events = self.copying.bases().events();
        for disk in disks {
            let before = known.get(&disk.name).copied();
            let object = format!("disk {}", disk.name);
            let details = json!({ "disk": disk.name, "path": disk.path, "state": disk.state });
            match (before.is_none_or(|state| state == DiskState::Present), disk.state) {
                (false, DiskState::Present) => {
                    events.tell(Happened::DiskBack, object, "it is there again", details);
                }
                (_, DiskState::Present) => {}
                (_, state) if before == Some(state) => {}
                _ => {
                    let reason = disk.reason.as_deref().unwrap_or("it is not there");
                    events.tell(Happened::DiskGone, object, reason, details);
                }
            }
        }
        for Buried { disk, what, kept } in self.copying.node().take_buried() {
            let while_away = "removed while the disk was away";
            match (what, kept) {
                (Removal::Copy(digest), None) => {
                    let message = format!("its copy on disk {disk} is gone: {while_away}");
                    let details = json!({ "digest": digest, "disk": disk, "why": while_away });
                    events.tell(Happened::CopyRemoved, format!("image {digest}"), message, details);
                }
                (Removal::Copy(digest), Some(why)) => {
                    let message = format!("its copy on disk {disk} stays, {while_away}: {why}");
                    let details = json!({ "digest": digest, "disk": disk, "why": why });
                    let object = self.copying.bases().called(digest);
                    events.tell(Happened::CopyKept, object, message, details);
                }
                (Removal::Replica(id), _) => {
                    let message = format!("its files on disk {disk} are gone: {while_away}");
                    let details = json!({ "id": id, "disk": disk, "why": while_away });
                    events.tell(
                        Happened::ReplicaRemoved,
                        format!("replica {id}"),
                        message,
                        details,
                    );
                }
            }
        }
        *known = disks.iter().map(|disk| (disk.name.clone(), disk.state)).collect();
    }

    fn tell_short(&self, digest: Digest, error: &Error) {
        let message = format!("its copies are not as many as are wanted: {error}");
        let details = json!({ "digest": digest, "error": error.kind() });
        let bases = self.copying.bases();
        bases.events().tell(Happened::CopyMissing, bases.called(digest), message, details);
    }
}

async fn keep_for_ever(keeping: Weak<Keeping>, mut keeper: Keeper) {
    let (mut looked, mut paused) = (Instant::now(), BTreeMap::<Digest, Instant>::new());
    // Those of which it was told that their copies can't be made.
    let mut short = BTreeSet::<Digest>::new();
    loop {
        tokio::time::sleep(LOOK).await;
        let Some(keeping) = keeping.upgrade() else { return };
        if keeping.stop.load(Ordering::Acquire) {
            return;
        }
        let own = keeping.clone();
        let Ok(images) = blocking(move || Ok(own.look())).await else { continue };
        keeping.tidy();
        let passed = std::mem::replace(&mut looked, Instant::now()).elapsed();
        paused.retain(|_, since| since.elapsed() < PAUSE);
        for (digest, action) in keeper.tick(passed, &images) {
            if paused.contains_key(&digest) {
                continue;
            }
            if let Err(error) = keeping.act(digest, action).await {
                short.retain(|digest| images.contains_key(digest));
                match short.insert(digest) {
                    true => keeping.tell_short(digest, &error),
                    false => {
                        tracing::warn!(image = %digest, %error, "its copies are not as many as wanted");
                    }
                }
                paused.insert(digest, Instant::now());
            } else {
                short.remove(&digest);
            }
        }
    }
}
