//! The images that are open, each once, read from every copy that is there.
//!
//! Invariant: a lock on an image's slot is held across I/O on disks with copies of it, on no other.

use std::{
    collections::{HashMap, HashSet},
    fs::File,
    future::Future,
    pin::{Pin, pin},
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
    time::Duration,
};

use futures_util::{
    StreamExt,
    future::{Either, select},
    stream::FuturesUnordered,
};
use nix::fcntl::OFlag;
use serde_json::json;
use tokio::{
    sync::{Mutex as AsyncMutex, Semaphore},
    time::timeout,
};

use crate::{
    blockdev::BaseImage,
    catalog::{Digest, Name, Node, OpenCopy, Tier},
    control::{
        config::{Caching, Config},
        events::{Events, Happened},
        origins::{AT_ONCE, FromOrigin, InTurn},
        service::blocking,
        views::{Base, Views},
    },
    error::{Context, Error, Kind, Result},
    image::{ChunkSum, ChunkTable},
    io::{Io, Ring, RingFile, Rings},
    promote::Cache,
    source::{Content, Copy, Disk, Rescue, Sources, Verify},
    units::{self, Chunk},
};

type Slot = Arc<AsyncMutex<Weak<Base>>>;

/// Requests that a queue takes if the kernel doesn't tell.
const DEPTH: usize = 64;
/// How long caches are waited for that may have what no copy can give.
const RESCUE: Duration = Duration::from_secs(10);
/// Copies of which it is remembered that they can't be used.
const UNUSABLE_MAX: usize = 10_000;
/// How long a disk may take to open a copy while others could serve.
const OPENING: Duration = Duration::from_secs(5);

/// The table of open images.
pub struct Bases {
    node: Node,
    rings: Arc<Rings>,
    views: Arc<Views>,
    caching: Caching,
    verify: Verify,
    events: Arc<Events>,
    /// Places for those who read the files that images came from; `None` if nobody may.
    origins: Option<Arc<Semaphore>>,
    open: Mutex<HashMap<Digest, Slot>>,
    /// The copies that were told not to be of use.
    unusable: Mutex<HashSet<(Digest, Name)>>,
    disks: Mutex<HashMap<Name, Arc<Disk>>>,
}

impl Bases {
    /// None yet, of `node`. What is promoted is seen by `views`; what happens is told to `events`.
    pub fn new(
        config: &Config,
        node: Node,
        rings: Arc<Rings>,
        views: Arc<Views>,
        events: Arc<Events>,
    ) -> Bases {
        let (caching, verify) = (config.image_io, config.verify_reads);
        let (open, unusable, disks) = Default::default();
        let origins = config.read_sources.then(|| Arc::new(Semaphore::new(AT_ONCE)));
        Bases { node, rings, views, caching, verify, events, origins, open, unusable, disks }
    }

    /// Who is told what happens.
    pub fn events(&self) -> &Arc<Events> {
        &self.events
    }

    /// An image as events call it.
    pub fn called(&self, digest: Digest) -> String {
        called(&self.node, digest)
    }

    /// The image of this digest, opened unless it is open.
    pub async fn base(self: &Arc<Self>, digest: Digest) -> Result<Arc<Base>> {
        let slot = {
            let mut open = locked(&self.open);
            // Slots of images that nobody uses any more, and nobody is about to open.
            open.retain(|_, slot| {
                Arc::strong_count(slot) > 1
                    || slot.try_lock().is_ok_and(|base| base.strong_count() > 0)
            });
            open.entry(digest).or_default().clone()
        };
        let mut slot = slot.lock().await;
        if let Some(base) = slot.upgrade() {
            return Ok(base);
        }
        let base = Arc::new(self.open(digest).await?);
        *slot = Arc::downgrade(&base);
        Ok(base)
    }

    /// All images that are open and not being opened right now.
    pub fn all(&self) -> Vec<(Digest, Arc<Base>)> {
        let open = locked(&self.open);
        let base = |slot: &Slot| slot.try_lock().ok()?.upgrade();
        open.iter().filter_map(|(digest, slot)| Some((*digest, base(slot)?))).collect()
    }

    /// The disks that copies were opened on.
    pub fn disks(&self) -> Vec<Arc<Disk>> {
        locked(&self.disks).values().cloned().collect()
    }

    /// The disk of this name, if copies were opened on it.
    pub fn disk(&self, name: &Name) -> Option<Arc<Disk>> {
        locked(&self.disks).get(name).cloned()
    }

    /// Brings the copies that open images are read from in line with those that are there, the better
    /// ones first.
    pub async fn refresh(self: &Arc<Self>) {
        for (digest, base) in self.all() {
            self.refresh_one(digest, &base).await;
        }
    }

    async fn refresh_one(self: &Arc<Self>, digest: Digest, base: &Base) {
        let sources = base.sources();
        let (known, mut copies) = (sources.copies(), Vec::new());
        for (disk, incarnation) in self.node.ready_copies(digest) {
            let same = |copy: &&Arc<Copy<Ring>>| {
                copy.disk().name() == disk.as_str() && copy.identity() == incarnation.numbers()
            };
            match known.iter().find(same) {
                Some(copy) => copies.push(copy.clone()),
                None => copies.extend(self.try_copy(digest, &disk).await.map(|(copy, _)| copy)),
            }
        }
        if copies.is_empty() {
            // Those that it had may still answer, from memory at least.
            return;
        }
        arrange(&mut copies);
        let as_before = copies.len() == known.len()
            && copies.iter().zip(known.iter()).all(|(one, other)| Arc::ptr_eq(one, other));
        if !as_before {
            let disks: Vec<&str> = copies.iter().map(|copy| copy.disk().name()).collect();
            tracing::info!(image = %digest, ?disks, "read from these copies from now on");
            sources.set_copies(copies);
        }
    }

    async fn open(self: &Arc<Self>, digest: Digest) -> Result<Base> {
        let ready = self.node.ready_copies(digest);
        let opening = ready.iter().map(|(disk, _)| self.try_copy(digest, disk));
        let opened = futures_util::future::join_all(opening).await;
        let opened: Vec<_> = opened.into_iter().flatten().collect();
        let (mut copies, files): (Vec<_>, Vec<_>) = opened.into_iter().unzip();
        let mut table = None;
        for file in files {
            let disk = file.disk.clone();
            match soon(move || load_table(digest, &file)).await {
                Ok(loaded) => {
                    table = Some(loaded);
                    break;
                }
                Err(error) => {
                    self.is_unusable(digest, &disk, &error);
                    copies.retain(|copy| copy.disk().name() != disk.as_str());
                }
            }
        }
        let Some(table) = table else {
            // Why is for the catalogue to say.
            let node = self.node.clone();
            let why = soon(move || {
                let copy = node.open_copy(&digest.to_string().parse()?)?;
                load_table(digest, &copy).map(drop)
            });
            return Err(why.await.err().unwrap_or_else(|| no_copy(digest)));
        };
        arrange(&mut copies);
        let rotational = copies.first().is_some_and(|copy| copy.disk().tier() == Some(Tier::Hdd));
        let chunks = (0..table.chunks()).map(|chunk| {
            let content = |sum: ChunkSum| Content { zeros: sum.zeros, crc: sum.crc };
            table.sum(Chunk(chunk)).map_or(Content { zeros: u64::MAX, crc: 0 }, content)
        });
        let name = digest.to_string();
        let sources = Sources::new(name, table.size(), chunks, copies, self.verify)?;
        let (views, rings) = (self.views.clone(), self.rings.clone());
        let size = table.size();
        let caches = Box::new(Caches { digest, size, views, rings });
        sources.set_rescue(match &self.origins {
            Some(room) => {
                let (node, room) = (self.node.clone(), room.clone());
                let runtime = tokio::runtime::Handle::current();
                let origin = Box::new(FromOrigin { node, digest, size, runtime, room });
                Box::new(InTurn(caches, origin))
            }
            None => caches,
        });
        let base = BaseImage::new(sources);
        Ok(if rotational { base.on_rotating_disk() } else { base })
    }

    /// The copy on a disk, unless it can't be opened, or not soon.
    async fn try_copy(
        self: &Arc<Self>,
        digest: Digest,
        disk: &Name,
    ) -> Option<(Arc<Copy<Ring>>, OpenCopy)> {
        let (own, by) = (self.clone(), disk.clone());
        let opened = soon(move || own.open_copy(digest, &by)).await;
        match &opened {
            Ok(_) => drop(locked(&self.unusable).remove(&(digest, disk.clone()))),
            Err(error) => self.is_unusable(digest, disk, error),
        }
        opened.ok()
    }

    /// Tells so, unless it was told before: it is tried again every second.
    fn is_unusable(&self, digest: Digest, disk: &Name, error: &Error) {
        let mut unusable = locked(&self.unusable);
        // Of images and disks that are long gone.
        if unusable.len() >= UNUSABLE_MAX {
            unusable.clear();
        }
        if unusable.insert((digest, disk.clone())) {
            let message = format!("its copy on disk {disk} can't be used: {error}");
            let details = json!({ "digest": digest, "disk": disk, "error": error.kind() });
            self.events.tell(Happened::CopyUnusable, self.called(digest), message, details);
        }
    }

    fn open_copy(&self, digest: Digest, disk: &Name) -> Result<(Arc<Copy<Ring>>, OpenCopy)> {
        let copy = self.node.open_copy_on(digest, disk)?;
        let what = || format!("image {digest}: opening its content on disk {disk}");
        let data = opened(self.caching, &|flags| copy.reopen_data(flags))?;
        let direct = opened(Caching::Direct, &|flags| copy.reopen_data(flags))?;
        let data = RingFile::new(data).context(what)?;
        let direct = RingFile::new(direct).context(what)?;
        let known = self.known_disk(disk);
        let chunks = units::chunks(copy.size);
        let identity = copy.incarnation.numbers();
        Ok((Arc::new(Copy::new(known, identity, data, direct, chunks)), copy))
    }

    fn known_disk(&self, name: &Name) -> Arc<Disk> {
        if let Some(disk) = self.disk(name) {
            return disk;
        }
        let tier = self.node.disk(name).ok().and_then(|disk| disk.tier);
        let depth = self.node.queue_depth(name).unwrap_or(DEPTH);
        let made = Arc::new(Disk::new(name.as_str(), tier, depth));
        locked(&self.disks).entry(name.clone()).or_insert(made).clone()
    }
}

/// What `work` comes to, unless its disk hangs.
async fn soon<T: Send + 'static>(work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    let late = |_| {
        let what = format!("its disk didn't answer within {} s", OPENING.as_secs());
        Error::new(Kind::Unavailable, what)
    };
    timeout(OPENING, blocking(work)).await.map_err(late)?
}

/// The copies in the order in which they are to be asked: the faster disk first.
fn arrange(copies: &mut [Arc<Copy<Ring>>]) {
    copies.sort_by_key(|copy| {
        let disk = copy.disk();
        (disk.trouble().is_some(), disk.tier().unwrap_or(Tier::Ssd))
    });
}

/// The chunk table of a copy, if it is that of the image.
pub(super) fn load_table(digest: Digest, copy: &OpenCopy) -> Result<ChunkTable> {
    let table = ChunkTable::load(&copy.chunks, &format!("the chunk table of image {digest}"))?;
    if table.digest().0 != digest.0 || table.size() != copy.size {
        return Err(Error::new(
            Kind::Corrupt,
            format!("image {digest}: its chunk table is that of another image; import it again"),
        ));
    }
    Ok(table)
}

/// An image as events call it: by its first name, if it has any.
pub(super) fn called(node: &Node, digest: Digest) -> String {
    let status = digest.to_string().parse().and_then(|name| node.image(&name)).ok();
    match status.as_ref().and_then(|status| status.names.first()) {
        Some(name) => format!("image {name}"),
        None => format!("image {digest}"),
    }
}

fn no_copy(digest: Digest) -> Error {
    Error::new(Kind::Unavailable, format!("image {digest}: no copy of it can be read"))
}

/// Opens a file past the page cache if that is wanted and its file system can.
pub(super) fn opened(caching: Caching, open: &dyn Fn(OFlag) -> Result<File>) -> Result<File> {
    match caching {
        Caching::Cached => open(OFlag::empty()),
        Caching::Direct => match open(OFlag::O_DIRECT) {
            // tmpfs of old and some network file systems.
            Err(error) if error.kind() == Kind::Io => open(OFlag::empty()),
            other => other,
        },
    }
}

/// The caches of all disks, as a source of chunks that no copy can give.
struct Caches {
    digest: Digest,
    size: u64,
    views: Arc<Views>,
    rings: Arc<Rings>,
}

impl Rescue for Caches {
    fn chunk(&self, chunk: Chunk) -> Pin<Box<dyn Future<Output = Option<Vec<u8>>> + Send>> {
        let seats = self.views.all().into_iter().filter(|seat| seat.digest == self.digest);
        let caches: Vec<_> = seats.filter_map(|seat| seat.view.cache()).collect();
        let len = self.size.saturating_sub(chunk.offset()).min(units::CHUNK) as usize;
        let rings = self.rings.clone();
        Box::pin(async move {
            let read = rings.run(rings.pick(), move |ring| async move {
                first_of(&ring, &caches, chunk, len).await
            });
            read.await.flatten()
        })
    }
}

/// A chunk of `len` bytes from the cache that is the first to give it. All are asked at once: a disk that
/// hangs holds nobody up, and where no other has the chunk it is given up in the end.
async fn first_of<I: Io>(
    io: &I,
    caches: &[Arc<Cache<I>>],
    chunk: Chunk,
    len: usize,
) -> Option<Vec<u8>> {
    let leased = caches.iter().filter_map(|cache| Some((cache, cache.lease(chunk)?)));
    let mut reads: FuturesUnordered<_> = leased
        .map(|(cache, lease)| async move {
            let buf = io.alloc(len);
            let read = cache.read(io, lease, chunk.offset(), buf.clone()).await;
            read.ok().map(|()| buf.to_vec())
        })
        .collect();
    let first = async {
        while let Some(read) = reads.next().await {
            if read.is_some() {
                return read;
            }
        }
        None
    };
    match select(pin!(first), pin!(io.sleep(RESCUE))).await {
        Either::Left((read, _)) => read,
        Either::Right(_) => None,
    }
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Nothing here panics half way through a change to a table.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    //! Checked: of the caches that have a chunk the first that answers gives it, whoever hangs or fails.

    use super::*;
    use crate::{
        io::{Buf, sim::Sim},
        promote::cache::entry,
        units::CHUNK,
    };

    #[test]
    fn a_cache_that_hangs_holds_up_no_rescue() {
        let (mut given, mut not) = (0, 0);
        for seed in 0..60 {
            let sim = Sim::new(seed);
            let (digest, content) = (Digest([3; 32]), vec![7; CHUNK as usize]);
            let mut files = Vec::new();
            let caches: Vec<_> = (0..3)
                .map(|_| {
                    let data = sim.create(1, &[], CHUNK);
                    let table = entry::header(&digest, CHUNK);
                    let table = sim.create(1, &table, entry::file_len(CHUNK));
                    files.push(data);
                    Arc::new(Cache::<Sim>::new("test", data, table, digest, CHUNK))
                })
                .collect();
            for cache in &caches[..2] {
                let bytes = [(Chunk(0), Buf::from_bytes(&content))];
                sim.run_one(cache.fill(&sim, &bytes), None).unwrap().unwrap();
            }
            sim.set_hung(files[0], true);
            if seed % 2 == 0 {
                sim.set_read_faults(files[1], 1024);
            }
            let read = sim.run_one(first_of(&sim, &caches, Chunk(0), content.len()), None);
            match read.expect("it has an end") {
                Some(bytes) => {
                    assert!(bytes == content && seed % 2 == 1);
                    given += 1;
                }
                // The seed let the time pass first, or the only other one failed.
                None => not += 1,
            }
        }
        assert!(given > 5 && not >= 30, "{given} {not}");
    }
}
