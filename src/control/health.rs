//! The disks' health: which are in trouble, and what is mended.
//!
//! Once a second: what was read is put before the judge, disks in trouble are tried with a read of their
//! own, and chunks that were found unsound are written anew from whatever else has them.
//!
//! Invariant: nothing here waits for a disk but the tasks that it starts, one trial and one repair a disk
//! at a time.

use std::{
    collections::{HashMap, HashSet},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, Weak,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use serde_json::json;
use tokio::{task::JoinHandle, time::MissedTickBehavior};

use crate::{
    catalog::{Digest, Name, Node},
    control::{bases::Bases, events::Happened, service::blocking, views::Base},
    error::{Error, Kind, Result},
    histogram::Counts,
    io::{Ring, RingFile, Rings},
    promote::demand::FROM_MEMORY,
    source::{
        Copy, Disk, Trouble,
        judge::{Judge, Seen, Trial, Verdict},
        repair::Repair,
    },
    units::{self, Chunk},
};

/// How often it is looked.
const TICK: Duration = Duration::from_secs(1);
/// Chunks of one copy that are mended in a row, before another copy of the disk has its turn.
const BATCH: usize = 64;
/// Times that a copy is tried to be mended before another is made in its place.
const TRIES: u32 = 2;
/// How long a copy that could not be mended is left alone.
const PAUSE: Duration = Duration::from_secs(30);

/// The health of a node's disks.
pub struct Health {
    node: Node,
    bases: Arc<Bases>,
    rings: Arc<Rings>,
    state: Mutex<State>,
    repaired: AtomicU64,
    unrepaired: AtomicU64,
}

struct State {
    judge: Judge,
    ticked: Instant,
    disks: HashMap<String, Watch>,
    refreshing: Option<JoinHandle<()>>,
    /// How many reads of an image were answered though no copy could.
    rescued: HashMap<Digest, u64>,
    /// The disks on which something is being mended.
    mending: HashSet<String>,
    /// Copies that could not be mended: when it was tried last, and how often.
    hopeless: HashMap<(Digest, String), (Instant, u32)>,
}

/// What is known of a disk from tick to tick.
#[derive(Default)]
struct Watch {
    reads: Counts,
    ended: u64,
    /// Since when none ended though some were under way.
    stuck: Option<Instant>,
    trial: Option<Arc<Mutex<Trial>>>,
    /// The trouble that was told last.
    told: Option<Trouble>,
}

impl Health {
    /// Looks after the disks from now on; one in trouble is well after it has been so for `clean`.
    pub fn start(node: Node, bases: Arc<Bases>, rings: Arc<Rings>, clean: Duration) -> Arc<Health> {
        let state = State {
            judge: Judge::new(clean),
            ticked: Instant::now(),
            disks: HashMap::new(),
            refreshing: None,
            rescued: HashMap::new(),
            mending: HashSet::new(),
            hopeless: HashMap::new(),
        };
        let (repaired, unrepaired) = Default::default();
        let state = Mutex::new(state);
        let health = Arc::new(Health { node, bases, rings, state, repaired, unrepaired });
        tokio::spawn(tick_for_ever(Arc::downgrade(&health)));
        health
    }

    /// Chunks that were written anew, and those that could not be.
    pub fn repaired(&self) -> (u64, u64) {
        let count = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        (count(&self.repaired), count(&self.unrepaired))
    }

    fn tick(self: &Arc<Self>) {
        let bases = self.bases.all();
        let disks = self.bases.disks();
        let mut state = self.state();
        let took = std::mem::replace(&mut state.ticked, Instant::now()).elapsed();
        if state.refreshing.as_ref().is_none_or(JoinHandle::is_finished) {
            let bases = self.bases.clone();
            state.refreshing = Some(tokio::spawn(async move { bases.refresh().await }));
        }
        let seen: HashMap<_, _> = disks
            .iter()
            .map(|disk| {
                let watch = state.disks.entry(disk.name().to_owned()).or_default();
                (disk.name().to_owned(), watch.look(disk))
            })
            .collect();
        for (name, verdict) in state.judge.tick(took, &seen) {
            let Some(disk) = disks.iter().find(|disk| disk.name() == name) else { continue };
            match verdict {
                Verdict::Trouble(trouble) => disk.set_trouble(Some(trouble)),
                Verdict::Well => disk.set_trouble(None),
            };
        }
        self.tell_troubles(&disks, &mut state);
        for disk in &disks {
            disk.set_usual(state.judge.usual(disk.name()));
            let Some(watch) = state.disks.get_mut(disk.name()) else { continue };
            if disk.trouble().is_none() {
                watch.trial = None;
            } else if watch.trial.as_ref().is_none_or(|trial| *locked(trial) != Trial::Waits) {
                watch.trial = self.try_disk(disk, &bases);
                if watch.trial.is_none() && !self.has_copy(disk) {
                    // Nothing is left there that could be tried: who reads it next finds out.
                    disk.set_trouble(None);
                    tracing::info!(
                        disk = disk.name(),
                        "no copy is there any more: nothing is known of it"
                    );
                }
            }
        }
        self.tell_rescues(&bases, &mut state);
        drop(state);
        self.mend(&bases);
    }

    /// Tells who has fallen into trouble, by the judge's word or his readers', and who is well again.
    fn tell_troubles(&self, disks: &[Arc<Disk>], state: &mut State) {
        for disk in disks {
            let Some(watch) = state.disks.get_mut(disk.name()) else { continue };
            let now = disk.trouble();
            let before = std::mem::replace(&mut watch.told, now);
            let object = format!("disk {}", disk.name());
            let events = self.bases.events();
            match (before, now) {
                (before, now) if before == now => {}
                (_, Some(trouble)) => {
                    let message = format!("{}: asked last from now on", trouble.name());
                    let details = json!({ "disk": disk.name(), "trouble": trouble.name() });
                    events.tell(Happened::DiskTrouble, object, message, details);
                }
                (_, None) => {
                    let details = json!({ "disk": disk.name() });
                    events.tell(Happened::DiskWell, object, "well again", details);
                }
            }
        }
    }

    /// Tells which images had chunks that no copy could give.
    fn tell_rescues(&self, bases: &[(Digest, Arc<Base>)], state: &mut State) {
        let open: HashSet<Digest> = bases.iter().map(|(digest, _)| *digest).collect();
        state.rescued.retain(|digest, _| open.contains(digest));
        for (digest, base) in bases {
            let rescued = base.sources().figures().rescued;
            let before = state.rescued.insert(*digest, rescued).unwrap_or(0);
            // An image that was closed and is open again counts anew.
            let news = if rescued < before { rescued } else { rescued - before };
            if news > 0 {
                let message =
                    format!("{news} reads that no copy could answer were, from elsewhere");
                let details = json!({ "digest": digest, "reads": news });
                self.bases.events().tell(
                    Happened::Rescued,
                    self.bases.called(*digest),
                    message,
                    details,
                );
            }
        }
    }

    fn has_copy(&self, disk: &Disk) -> bool {
        self.node.all_ready_copies().iter().any(|(_, home, _)| home.as_str() == disk.name())
    }

    /// Reads a chunk of some copy on the disk, past the page cache.
    fn try_disk(
        self: &Arc<Self>,
        disk: &Arc<Disk>,
        bases: &[(Digest, Arc<Base>)],
    ) -> Option<Arc<Mutex<Trial>>> {
        let (base, copy) = bases.iter().find_map(|(_, base)| {
            let copies = base.sources().copies();
            let copy = copies.iter().find(|copy| Arc::ptr_eq(copy.disk(), disk))?;
            Some((base.clone(), copy.clone()))
        })?;
        let image = base.sources().image();
        let chunks = units::chunks(image.size);
        let start = fastrand::u64(0..chunks.max(1));
        let chunk = (start..chunks).chain(0..start).map(Chunk);
        let chunk = chunk.take(1 << 16).find(|chunk| image.crc(*chunk).is_some())?;
        let trial = Arc::new(Mutex::new(Trial::Waits));
        let result = trial.clone();
        self.rings.spawn(self.rings.pick(), move |ring| async move {
            let started = Instant::now();
            let read = copy.examine(&ring, base.sources().image(), chunk).await;
            *locked(&result) = match read {
                Ok(()) => Trial::Answered(started.elapsed()),
                Err(_) => Trial::Failed,
            };
        });
        Some(trial)
    }

    /// Mends what was found unsound, on every disk that isn't at it already.
    fn mend(self: &Arc<Self>, bases: &[(Digest, Arc<Base>)]) {
        for (digest, base) in bases {
            for copy in base.sources().copies().iter() {
                let disk = copy.disk().name().to_owned();
                let mut unsound = copy.unsound();
                unsound.truncate(BATCH);
                let mut state = self.state();
                if unsound.is_empty() {
                    // Mended, by whomever: nothing of before counts if it is damaged again.
                    state.hopeless.remove(&(*digest, disk));
                    copy.set_beyond_repair(false);
                    continue;
                }
                let tried = state.hopeless.get(&(*digest, disk.clone()));
                let waits = tried.is_some_and(|(last, _)| last.elapsed() < PAUSE);
                let told = tried.is_some();
                if waits || !state.mending.insert(disk.clone()) {
                    continue;
                }
                drop(state);
                if !told {
                    self.tell_bad(*digest, &disk, &unsound);
                }
                let (own, digest) = (self.clone(), *digest);
                let (base, copy) = (base.clone(), copy.clone());
                tokio::spawn(async move {
                    let mended = own.mend_copy(digest, base, copy.clone(), unsound).await;
                    let mut state = own.state();
                    state.mending.remove(&disk);
                    match mended {
                        Ok((_, None)) => {
                            copy.set_beyond_repair(false);
                            state.hopeless.remove(&(digest, disk));
                        }
                        Ok((_, Some(error))) | Err(error) => {
                            let now = Instant::now();
                            let tried = state.hopeless.entry((digest, disk.clone()));
                            let tried = tried.or_insert((now, 0));
                            *tried = (now, tried.1.saturating_add(1));
                            let tries = tried.1;
                            drop(state);
                            match tries {
                                1 => own.tell_unrepaired(digest, &disk, &error),
                                _ => tracing::warn!(image = %digest, disk, %error, "not repaired"),
                            }
                            // Where nothing else has the chunk, another copy would lack it, too.
                            if tries >= TRIES && error.kind() != Kind::Unavailable {
                                copy.set_beyond_repair(true);
                            }
                        }
                    }
                });
            }
        }
    }

    /// Tells of chunks of the copy on `disk` that are not what they must be.
    pub fn tell_bad(&self, digest: Digest, disk: &str, chunks: &[Chunk]) {
        let message = format!("{} chunks of its copy on disk {disk} are unsound", chunks.len());
        let details = of_chunks(digest, disk, chunks);
        self.bases.events().tell(Happened::ChunksBad, self.bases.called(digest), message, details);
    }

    /// Tells that chunks of the copy on `disk` stay as they are, and why.
    pub fn tell_unrepaired(&self, digest: Digest, disk: &str, error: &Error) {
        let message = format!("chunks of its copy on disk {disk} can't be written anew: {error}");
        let details = json!({ "digest": digest, "disk": disk, "error": error.kind() });
        let object = self.bases.called(digest);
        self.bases.events().tell(Happened::ChunksUnrepaired, object, message, details);
    }

    /// Mends chunks of the image's copy on `disk`. How many were, and why the last of the others was not.
    pub async fn mend_image(
        &self,
        digest: Digest,
        disk: Name,
        chunks: Vec<Chunk>,
    ) -> Result<(u64, Option<Error>)> {
        let base = self.bases.base(digest).await?;
        let copies = base.sources().copies();
        let copy = copies.iter().find(|copy| copy.disk().name() == disk.as_str()).cloned();
        let none = || Error::new(Kind::Unavailable, format!("disk {disk}: its copy is gone"));
        self.mend_copy(digest, base, copy.ok_or_else(none)?, chunks).await
    }

    async fn mend_copy(
        &self,
        digest: Digest,
        base: Arc<Base>,
        copy: Arc<Copy<Ring>>,
        chunks: Vec<Chunk>,
    ) -> Result<(u64, Option<Error>)> {
        let name: Name = copy.disk().name().parse()?;
        let (node, by) = (self.node.clone(), name.clone());
        let file = blocking(move || node.mend_copy_on(digest, &by)).await?;
        let file = RingFile::new(file).map_err(|error| Error::io("its content", error))?;
        let (mut mended, mut written, mut failed) = (0, Vec::new(), None);
        for chunk in chunks {
            let (base, copy, file) = (base.clone(), copy.clone(), file.clone());
            let repair = self.rings.run(self.rings.pick(), move |ring| async move {
                base.sources().repair(&ring, &copy, chunk, &file).await
            });
            let gone = || Error::new(Kind::Unavailable, "the I/O thread is gone");
            match repair.await.ok_or_else(gone)? {
                Ok(Repair::Sound) => mended += 1,
                Ok(Repair::Written) => {
                    mended += 1;
                    self.repaired.fetch_add(1, Ordering::Relaxed);
                    written.push(chunk);
                }
                Err(error) => {
                    self.unrepaired.fetch_add(1, Ordering::Relaxed);
                    failed = Some(error);
                }
            }
        }
        if !written.is_empty() {
            let message =
                format!("{} chunks of its copy on disk {name} are repaired", written.len());
            let details = of_chunks(digest, name.as_str(), &written);
            let object = self.bases.called(digest);
            self.bases.events().tell(Happened::ChunksRepaired, object, message, details);
        }
        Ok((mended, failed))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        locked(&self.state)
    }
}

/// How many chunks of which copy, and the first of them.
fn of_chunks(digest: Digest, disk: &str, chunks: &[Chunk]) -> serde_json::Value {
    let first: Vec<u64> = chunks.iter().take(BATCH).map(|chunk| chunk.0).collect();
    json!({ "digest": digest, "disk": disk, "count": chunks.len(), "chunks": first })
}

impl Watch {
    fn look(&mut self, disk: &Disk) -> Seen {
        let reads = disk.reads.counts();
        let news = reads.since(&self.reads).above(FROM_MEMORY.as_nanos() as u64);
        self.reads = reads;
        let (begun, ended) = disk.begun_and_ended();
        let stuck = match begun > ended && ended == self.ended {
            true => self.stuck.get_or_insert_with(Instant::now).elapsed(),
            false => {
                self.stuck = None;
                Duration::ZERO
            }
        };
        self.ended = ended;
        let trial = self.trial.as_ref().map(|trial| *locked(trial));
        Seen { tier: disk.tier(), reads: news, stuck, trial, trouble: disk.trouble() }
    }
}

async fn tick_for_ever(health: Weak<Health>) {
    let mut ticks = tokio::time::interval(TICK);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        let Some(health) = health.upgrade() else { return };
        health.tick();
    }
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Nothing here panics half way through a change.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
