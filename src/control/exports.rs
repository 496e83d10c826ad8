//! The devices that are open: each image and replica at most once, shared by all who use it.
//!
//! Replicas open at their first use and stay open until they are removed or the service stops;
//! images are open for as long as a replica or a client uses them.
//!
//! Invariants:
//! - Two overlays are never open on one replica's files: opening, growing and removing a replica
//!   happen under its slot's lock, and its export leaves the slot only when nobody else holds it.
//! - A lock on a slot is held across I/O on that replica's own disk and its image's, on no other:
//!   a disk that hangs holds up its own replicas only.

use std::{
    collections::{HashMap, hash_map::Entry},
    fs::TryLockError,
    future::Future,
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use nix::fcntl::{OFlag, PosixFadviseAdvice, posix_fadvise};
use tokio::{sync::Mutex as AsyncMutex, time::timeout};
use uuid::Uuid;

use crate::{
    blockdev::{AnyDevice, Below, Export, Figures, Footing, Replica, nbd::Exports as Offered},
    catalog::{Digest, Name, Node, OpenReplica, Removed, ReplicaStatus, StagedReplica, Tier},
    control::{
        bases::{Bases, opened},
        config::Caching,
        service::blocking,
        tails::Tails,
        views::{Base, Views},
    },
    cow::{Overlay, tail::Place},
    error::{Context, Error, Kind, Result},
    io::{Ring, RingFile, Rings},
};

/// How long the files of a replica may be locked by what a former daemon left under way.
const LOCK_PATIENCE: Duration = Duration::from_secs(10);

/// What stands before an image's name in the name of its export.
pub const IMAGE: &str = "image/";
/// What stands before a replica's name in the name of its export.
pub const REPLICA: &str = "replica/";

type Slot<T> = Arc<AsyncMutex<T>>;

/// The table of open devices.
pub struct Exports {
    pub(super) node: Node,
    rings: Arc<Rings>,
    caching: Caching,
    tails: Option<Tails>,
    views: Arc<Views>,
    bases: Arc<Bases>,
    replicas: Mutex<HashMap<Uuid, Slot<Option<Opened>>>>,
    /// What is at work on replicas for long, and what to tell others meanwhile.
    busy: Mutex<HashMap<Uuid, &'static str>>,
    /// By the names of exports, for as long as there is something of that name.
    figures: Mutex<HashMap<String, Arc<Figures>>>,
}

/// A replica that is open.
struct Opened {
    export: Arc<Export>,
    replica: Arc<Replica<Ring>>,
}

impl Opened {
    /// Whether a client, or one that is about to be, holds it.
    fn is_shared(&self) -> bool {
        Arc::strong_count(&self.export) > 1
    }

    /// Whether it takes no more writes, and nobody holds it.
    fn is_spent(&self) -> bool {
        self.replica.overlay().poisoned().is_some() && !self.is_shared()
    }
}

/// A replica that is worked on for long.
pub(super) struct Busy<'a> {
    exports: &'a Exports,
    id: Uuid,
}

impl Drop for Busy<'_> {
    fn drop(&mut self) {
        locked(&self.exports.busy).remove(&self.id);
    }
}

impl Exports {
    /// An empty table for `node`, whose devices are served by `rings` and images opened by `bases`; overlays
    /// go through the page cache if `caching` says so. Where replicas' tails are kept is `tails`; `views` are of the images that replicas stand on.
    pub fn new(
        node: Node,
        rings: Arc<Rings>,
        bases: Arc<Bases>,
        caching: Caching,
        tails: Option<Tails>,
        views: Arc<Views>,
    ) -> Exports {
        let (replicas, figures, busy) = Default::default();
        Exports { node, rings, caching, tails, views, bases, replicas, busy, figures }
    }

    /// The image of this name or digest as an export.
    pub async fn open_image(&self, name: Name) -> Result<Arc<Export>> {
        let node = self.node.clone();
        let status = blocking(move || node.image(&name)).await?;
        let name = status.names.first().map_or_else(|| status.digest.to_string(), Name::to_string);
        let base = self.base(status.digest).await?;
        let export = format!("{IMAGE}{name}");
        Ok(Arc::new(Export {
            description: format!("image {name} ({} bytes)", status.size),
            figures: self.figures(&export),
            name: export,
            device: AnyDevice::Base(base),
        }))
    }

    /// The image of this digest, opened unless it is open.
    pub async fn base(&self, digest: Digest) -> Result<Arc<Base>> {
        self.bases.base(digest).await
    }

    /// The images that are open.
    pub fn bases(&self) -> &Arc<Bases> {
        &self.bases
    }

    /// The replica of this name or id as an export, opened unless it is open.
    pub async fn open_replica(&self, name: Name) -> Result<Arc<Export>> {
        let status = self.replica_status(name).await?;
        let slot = self.slot(status.id);
        let mut slot = slot.lock().await;
        Ok(self.opened(&mut slot, status).await?.export.clone())
    }

    /// Grows a replica, open or not; its id.
    pub async fn resize_replica(&self, name: Name, size: u64) -> Result<Uuid> {
        let status = self.replica_status(name).await?;
        let slot = self.slot(status.id);
        let mut slot = slot.lock().await;
        let (name, id) = (status.name.clone(), status.id);
        let replica = self.opened(&mut slot, status).await?.replica.clone();
        let now = replica.overlay().size();
        if size < now || !size.is_multiple_of(crate::units::SECTOR) {
            return Err(Error::new(
                Kind::Invalid,
                format!(
                    "replica {name}: it has {now} bytes and can't get {size}: it can only grow, \
                     to a multiple of 512"
                ),
            ));
        }
        let grown =
            self.run(
                move |ring| async move { replica.enter().await.overlay.resize(&ring, size).await },
            );
        grown.await.map_err(|error| error.within(format!("replica {name}")))?;
        let node = self.node.clone();
        blocking(move || node.set_replica_size(&name, size)).await?;
        Ok(id)
    }

    /// Removes a replica, unless somebody uses it; `clients` names who does, as far as is known.
    pub async fn remove_replica(
        &self,
        status: &ReplicaStatus,
        clients: impl FnOnce(&str) -> Vec<String>,
    ) -> Result<Removed> {
        let entry = self.slot(status.id);
        let mut slot = entry.lock().await;
        if let Some(why) = locked(&self.busy).get(&status.id) {
            return Err(Error::new(Kind::InUse, format!("replica {}: {why}", status.name)));
        }
        // One that is attached is in use also while its device waits for it.
        let clients = clients(&format!("{REPLICA}{}", status.name));
        if !clients.is_empty() || slot.as_ref().is_some_and(Opened::is_shared) {
            let who = match clients.as_slice() {
                [] => String::new(),
                some => format!(" ({})", some.join(", ")),
            };
            let what = format!("replica {}: a client is attached{who}; disconnect it", status.name);
            return Err(Error::new(Kind::InUse, what + " first"));
        }
        // By its id: names may have changed hands since they were looked up. The slot stays locked,
        // and what is open in it stays as it is should this fail.
        let (node, id) = (self.node.clone(), status.id.to_string().parse::<Name>()?);
        let removed = blocking(move || node.remove_replica(&id)).await?;
        *slot = None;
        locked(&self.replicas).remove(&status.id);
        locked(&self.figures).remove(&format!("{REPLICA}{}", status.name));
        if let Some(tails) = &self.tails {
            tails.remove(status.id);
        }
        Ok(removed)
    }

    /// Flushes and checkpoints every open replica, within `limit`. Those that failed, and why.
    pub async fn close(&self, limit: Duration) -> Vec<Error> {
        let slots: Vec<_> = locked(&self.replicas).drain().map(|(_, slot)| slot).collect();
        let closing = slots.into_iter().map(|slot| async move {
            let Some(Opened { export, replica }) = slot.lock().await.take() else { return Ok(()) };
            let name = export.name.clone();
            let close = self
                .run(move |ring| async move { replica.enter().await.overlay.close(&ring).await });
            close.await.map_err(|error| error.within(format!("closing {name}")))
        });
        match timeout(limit, futures_util::future::join_all(closing)).await {
            Ok(results) => results.into_iter().filter_map(Result::err).collect(),
            Err(_) => vec![Error::new(
                Kind::Io,
                format!(
                    "some replicas did not close within {} s, their disks hang; what was flushed \
                     is safe, and they recover when they are opened next",
                    limit.as_secs()
                ),
            )],
        }
    }

    /// Visits every open replica that is not being opened or changed right now.
    pub fn each_open(&self, mut visit: impl FnMut(Uuid, &Replica<Ring>)) {
        let slots: Vec<_> =
            locked(&self.replicas).iter().map(|(id, slot)| (*id, slot.clone())).collect();
        for (id, slot) in slots {
            if let Ok(slot) = slot.try_lock()
                && let Some(opened) = slot.as_ref()
            {
                visit(id, &opened.replica);
            }
        }
    }

    /// The figures of every export that was opened, by its name; those that are gone, as `stays`
    /// tells by their names, are forgotten.
    pub fn all_figures(&self, stays: impl Fn(&str) -> bool) -> Vec<(String, Arc<Figures>)> {
        let mut figures = locked(&self.figures);
        figures.retain(|name, figures| Arc::strong_count(figures) > 1 || stays(name));
        let mut all: Vec<_> =
            figures.iter().map(|(name, figures)| (name.clone(), figures.clone())).collect();
        all.sort_by(|a, b| a.0.cmp(&b.0));
        all
    }

    /// The views through which replicas read images.
    pub fn views(&self) -> &Views {
        &self.views
    }

    fn figures(&self, export: &str) -> Arc<Figures> {
        locked(&self.figures).entry(export.to_owned()).or_default().clone()
    }

    fn slot(&self, id: Uuid) -> Slot<Option<Opened>> {
        locked(&self.replicas).entry(id).or_default().clone()
    }

    async fn replica_status(&self, name: Name) -> Result<ReplicaStatus> {
        let node = self.node.clone();
        blocking(move || node.replica(&name)).await
    }

    /// What is in the slot, opened if nothing is.
    async fn opened<'a>(
        &self,
        slot: &'a mut Option<Opened>,
        status: ReplicaStatus,
    ) -> Result<&'a Opened> {
        if slot.as_ref().is_some_and(Opened::is_spent) {
            // Nobody is left who could rely on what was not synced: what is on the disk counts.
            tracing::warn!(replica = %status.name, "poisoned by a failed sync; it is opened anew");
            *slot = None;
        }
        if slot.is_none() {
            *slot = Some(self.open_overlay(status).await?);
        }
        slot.as_ref().ok_or_else(|| unreachable!("the slot was filled above"))
    }

    async fn open_overlay(&self, status: ReplicaStatus) -> Result<Opened> {
        let name = status.name.clone();
        let below = match status.digest {
            Some(digest) => {
                let base = self.base(digest).await;
                let base = base.map_err(|error| error.within(format!("replica {name}")))?;
                self.below(&status.disk, digest, &base)?
            }
            None => Below::NOTHING,
        };
        let (node, caching, by) = (self.node.clone(), self.caching, name.clone());
        let files = blocking(move || open_files(&node, &by, caching)).await?;
        let Files { id, data, data_len, map, rotational } = files;
        let tail = self.tail(id).await;
        let overlay = self
            .run(move |ring| async move { Overlay::open(&ring, data, map, id, tail).await })
            .await
            .map_err(|error| error.within(format!("replica {name}")))?;
        if data_len < overlay.size() {
            // Past its end the file would read as zeros.
            return Err(Error::new(
                Kind::Corrupt,
                format!(
                    "replica {name}: its data file was cut short, it has {data_len} of {} bytes; \
                     restore the file, or remove the replica",
                    overlay.size()
                ),
            ));
        }
        if overlay.size() != status.size {
            // It grew right before a crash; the overlay's own word counts.
            let (node, by, size) = (self.node.clone(), name.clone(), overlay.size());
            blocking(move || node.set_replica_size(&by, size)).await?;
        }
        let overlay = Arc::new(overlay);
        let replica = Arc::new(Replica::new(Footing { overlay, base: below, rotational }));
        let export = format!("{REPLICA}{name}");
        let export = Arc::new(Export {
            description: format!("replica {name}"),
            figures: self.figures(&export),
            name: export,
            device: AnyDevice::Replica(replica.clone()),
        });
        Ok(Opened { export, replica })
    }

    /// An image's copy as replicas on `disk` see it.
    pub(super) fn below(
        &self,
        disk: &Name,
        digest: Digest,
        copy: &Arc<Base>,
    ) -> Result<Below<Ring>> {
        Ok(Below::image(copy.clone(), self.views.of(disk, digest, copy)?))
    }

    /// Where the tail of a replica is kept.
    pub(super) async fn tail(&self, id: Uuid) -> Option<Place> {
        let tails = self.tails.clone()?;
        blocking(move || tails.open(id)).await.ok().flatten()
    }

    /// Marks a replica as worked on, which is told to others as `why`, until what is returned goes.
    pub(super) fn begin(&self, id: Uuid, name: &Name, why: &'static str) -> Result<Busy<'_>> {
        match locked(&self.busy).entry(id) {
            Entry::Occupied(other) => {
                Err(Error::new(Kind::InUse, format!("replica {name}: {}", other.get())))
            }
            Entry::Vacant(free) => {
                free.insert(why);
                Ok(Busy { exports: self, id })
            }
        }
    }

    /// The replica, open.
    pub(super) async fn open_for_work(&self, status: ReplicaStatus) -> Result<Arc<Replica<Ring>>> {
        let slot = self.slot(status.id);
        let mut slot = slot.lock().await;
        Ok(self.opened(&mut slot, status).await?.replica.clone())
    }

    /// Opens the overlay of a replica that is moving, in its new place.
    pub(super) async fn open_staged(
        &self,
        staged: StagedReplica,
        name: Name,
    ) -> Result<(StagedReplica, Overlay<Ring>)> {
        let caching = self.caching;
        let (staged, id, data, map) = blocking(move || {
            let (data, _) = overlay_file(&name, caching, &|flags| staged.open_data(flags))?;
            let (map, _) = overlay_file(&name, caching, &|flags| staged.open_map(flags))?;
            let id = staged.id();
            Ok((staged, id, data, map))
        })
        .await?;
        let opened =
            self.run(move |ring| async move { Overlay::open(&ring, data, map, id, None).await });
        Ok((staged, opened.await?))
    }

    /// Opens the files of a replica that nobody sees yet.
    pub(super) async fn overlay_files(
        &self,
        files: OpenReplica,
    ) -> Result<(Uuid, RingFile, RingFile)> {
        let caching = self.caching;
        blocking(move || {
            let (data, _) = overlay_file(&files.name, caching, &|flags| files.open_data(flags))?;
            let (map, _) = overlay_file(&files.name, caching, &|flags| files.open_map(flags))?;
            Ok((files.id, data, map))
        })
        .await
    }

    /// Runs a future on one of the rings.
    pub(super) async fn run<T, F>(&self, make: impl FnOnce(Ring) -> F + Send + 'static) -> Result<T>
    where
        T: Send + 'static,
        F: Future<Output = Result<T>> + 'static,
    {
        let gone = || Error::new(Kind::Unavailable, "the I/O thread is gone; restart the daemon");
        self.rings.run(self.rings.pick(), make).await.ok_or_else(gone)?
    }
}

impl Offered for Exports {
    fn list(&self) -> Vec<(String, String)> {
        // Reads the catalogue, which may wait for a disk.
        tokio::task::block_in_place(|| {
            let images = self.node.images().into_iter().flat_map(|image| {
                let about = format!("image of {} bytes", image.size);
                image.names.into_iter().map(move |name| (format!("{IMAGE}{name}"), about.clone()))
            });
            let replicas = self.node.replicas().into_iter().map(|replica| {
                let about = format!("replica of {} bytes on disk {}", replica.size, replica.disk);
                (format!("{REPLICA}{}", replica.name), about)
            });
            images.chain(replicas).collect()
        })
    }

    fn open<'a>(
        &'a self,
        name: &'a str,
    ) -> Pin<Box<dyn Future<Output = Result<Arc<Export>>> + Send + 'a>> {
        Box::pin(async move {
            if let Some(name) = name.strip_prefix(IMAGE) {
                self.open_image(name.parse()?).await
            } else if let Some(name) = name.strip_prefix(REPLICA) {
                self.open_replica(name.parse()?).await
            } else {
                Err(Error::new(
                    Kind::NotFound,
                    "no such export: exports are called image/NAME and replica/NAME",
                ))
            }
        })
    }
}

/// The two files of an overlay.
struct Files {
    id: Uuid,
    data: RingFile,
    /// Bytes of the data file.
    data_len: u64,
    map: RingFile,
    rotational: bool,
}

fn open_files(node: &Node, name: &Name, caching: Caching) -> Result<Files> {
    let open = node.open_replica(name)?;
    let (data, data_len) = overlay_file(name, caching, &|flags| open.open_data(flags))?;
    Ok(Files {
        id: open.id,
        data,
        data_len,
        map: overlay_file(name, caching, &|flags| open.open_map(flags))?.0,
        rotational: turns(node, &open.disk),
    })
}

/// Opens one of an overlay's files; its length in bytes.
fn overlay_file(
    name: &Name,
    caching: Caching,
    open: &dyn Fn(OFlag) -> Result<std::fs::File>,
) -> Result<(RingFile, u64)> {
    let what = || format!("replica {name}: opening its overlay");
    let file = opened(caching, open)?;
    lock(&file, name)?;
    // Clean pages that an earlier, failed sync left behind may not be what is on the disk.
    posix_fadvise(&file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED).context(what)?;
    let len = file.metadata().context(what)?.len();
    Ok((RingFile::new(file).context(what)?, len))
}

/// Locks one of the files. A daemon that was killed holds it for as long as the kernel still works on
/// what the daemon gave it: a write of then must not land on one of now.
fn lock(file: &std::fs::File, name: &Name) -> Result<()> {
    let deadline = Instant::now() + LOCK_PATIENCE;
    loop {
        match file.try_lock() {
            Ok(()) => return Ok(()),
            Err(TryLockError::WouldBlock) if Instant::now() < deadline => {
                std::thread::sleep(Duration::from_millis(10));
            }
            Err(TryLockError::WouldBlock) => {
                let what = format!(
                    "replica {name}: its files are locked; another daemon has it, or its disk \
                     hangs on what a former one wrote"
                );
                return Err(Error::new(Kind::Locked, what));
            }
            // A file system without locks: nothing is lost but this precaution.
            Err(TryLockError::Error(error)) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => {
                return Ok(());
            }
            Err(TryLockError::Error(error)) => {
                return Err(Error::io(format!("replica {name}: locking its files"), error));
            }
        }
    }
}

pub(super) fn turns(node: &Node, disk: &Name) -> bool {
    node.disk(disk).is_ok_and(|disk| disk.tier == Some(Tier::Hdd))
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Nothing here panics half way through a change to a table.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
