//! Promotion at work: once a second, what the replicas of each disk read, and how fast the disks are,
//! becomes orders for that disk's mover.
//!
//! ```text
//! views ── what was read ──┐
//! agent ── device reads ───┼──► tick ──► policy of each disk ──► its mover ──► its caches
//! disks ── free space ─────┘                    ▲                    │
//!                                               └──── outcomes ──────┘
//! ```
//!
//! Invariants:
//! - A tick waits for no disk, nor does what is known of one disk for another that hangs.
//! - Nothing here is needed to serve a read. Whatever fails, reads go to the copy.

mod mover;
mod pins;
mod plan;
mod report;
mod requests;
mod watch;

pub use requests::recording_length;

use std::{
    collections::{BTreeMap, HashMap},
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
    time::{Duration, Instant},
};

use tokio::{
    sync::oneshot::{self, error::TryRecvError},
    time::MissedTickBehavior,
};
use uuid::Uuid;

use self::{
    mover::{Bench, Mover, Order, Turns},
    pins::Pins,
    plan::{Images, PinsTold, Plan, Reads},
    report::Probes,
    watch::{Scene, Watched},
};
use crate::{
    catalog::{Digest, DiskState, DiskStatus, Name, Node, Survey},
    control::{
        agent,
        config::Config,
        exports::Exports,
        service::blocking,
        surveys::{Surveys, Told},
        views::{Seat, Views},
    },
    error::{Context, Error, Result},
    io::Rings,
    promote::{
        Key, Touch, demand,
        signal::{Origin, Signals},
    },
    units::Chunk,
};

/// How often is decided.
const TICK: Duration = Duration::from_secs(1);
/// How old may be what a disk told of itself.
const FRESH: Duration = Duration::from_secs(5);
/// How long one may take who ends the work on a disk that was removed.
const LEAVING: Duration = Duration::from_secs(5);

/// The promotion of a node.
pub struct Promotion {
    bench: Arc<Bench>,
    /// Percent of a disk that its cache may take.
    percent: u64,
    surveys: Arc<Surveys>,
    state: Mutex<State>,
}

struct State {
    disks: Vec<DiskStatus>,
    /// What they told when they were asked last.
    told: HashMap<Uuid, Told>,
    /// What the agent is to watch from now on, while somebody finds that out.
    watching: Option<oneshot::Receiver<Watched>>,
    plans: BTreeMap<Name, Plan>,
    images: Images,
    signals: Signals<Name>,
    probes: Probes,
    watched: Arc<Watched>,
    /// Chunks of images in the order of their first reads, since their recordings began.
    recordings: HashMap<Digest, Recording>,
    ticked: Instant,
}

/// A profile in the making.
#[derive(Default)]
struct Recording {
    chunks: Vec<u64>,
    seen: std::collections::HashSet<u64>,
}

impl Promotion {
    /// Starts to decide once a second.
    pub fn start(
        config: &Config,
        node: Node,
        exports: Arc<Exports>,
        views: Arc<Views>,
    ) -> Result<Arc<Promotion>> {
        // A thread of its own: what is promoted must not wait for guests, nor guests for it.
        let rings = Rings::start(1, Duration::ZERO).context(|| "starting io_uring")?;
        let bench = Bench {
            pins: Pins::read(&node)?,
            node,
            exports,
            views,
            rings: Arc::new(rings),
            turns: Turns::default(),
            caching: config.image_io,
            rate: config.promote_mib << 20,
        };
        let promotion = Arc::new(Promotion {
            bench: Arc::new(bench),
            percent: config.cache_percent,
            surveys: Arc::default(),
            state: Mutex::new(State {
                disks: Vec::new(),
                told: HashMap::new(),
                watching: None,
                plans: BTreeMap::new(),
                images: Images::default(),
                signals: Signals::default(),
                watched: Arc::default(),
                probes: Probes::none("no agent has reported yet"),
                recordings: HashMap::new(),
                ticked: Instant::now(),
            }),
        });
        tokio::spawn(tick_for_ever(Arc::downgrade(&promotion)));
        if config.probes {
            tokio::spawn(agent::keep(config.socket.clone(), Arc::downgrade(&promotion)));
        } else {
            promotion.no_agent("probes are switched off (`probes` in the configuration)".into());
        }
        Ok(promotion)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Figures and plans: whole after any panic, or lost with the cache.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Asks the disks how they are; one that doesn't answer is not waited for, or not long.
    async fn ask(&self) {
        let disks = self.bench.node.known_disks().into_iter().map(|disk| disk.id).collect();
        let told = self.surveys.ask(&self.bench.node, disks).await;
        self.state().told = told;
    }

    /// Takes in which disks are there by now, and what they told.
    fn look(&self, state: &mut State) {
        let State { disks, told, watching, watched, probes, .. } = state;
        let node = &self.bench.node;
        *disks = node.known_disks();
        for disk in disks.iter_mut().filter(|disk| disk.state == DiskState::Present) {
            if let Some(changed) = fresh(told, disk).and_then(|told| told.changed) {
                disk.state = changed;
                disk.reason =
                    Some("it can't be written as it was: see `underlay disk list`".into());
            }
        }
        match watching.as_mut().map(oneshot::Receiver::try_recv) {
            // A disk that hangs: what was watched until now still is.
            Some(Err(TryRecvError::Empty)) => return,
            Some(Ok(changed)) => {
                probes.follow(&changed);
                *watched = Arc::new(changed);
            }
            Some(Err(TryRecvError::Closed)) | None => {}
        }
        *watching = None;
        let scene = Scene::of(node);
        // Copies lie where they lie: extents are asked for once.
        if !watched.is_of(&scene) {
            let (found, result) = oneshot::channel();
            let (node, generation) = (node.clone(), watched.watch.generation + 1);
            tokio::task::spawn_blocking(move || {
                // Nobody waits for it when the daemon ends.
                let _ = found.send(Watched::of(&node, scene, generation));
            });
            *watching = Some(result);
        }
    }

    /// Decides.
    fn tick(&self) -> Result<()> {
        let mut state = self.state();
        let elapsed = std::mem::replace(&mut state.ticked, Instant::now()).elapsed();
        self.look(&mut state);
        self.plan(&mut state)?;
        // Under the lock: whoever forgets an image waits, and no plan hears of it afterwards.
        let seats = self.bench.views.all();
        let reads = take_in(&mut state, &seats);
        let State { plans, images, signals, disks, .. } = &mut *state;
        for (disk, plan) in plans {
            plan.hear(images, &self.bench.views);
            let here: Vec<&Arc<Seat>> = seats.iter().filter(|seat| seat.disk == *disk).collect();
            plan.look_into(&here, images);
            let local = signals.latency(disk, tier(disks, disk)).median;
            let reads = reads.get(disk).map(Vec::as_slice).unwrap_or_default();
            let decided = plan.decide(elapsed, reads, local, self.bench.rate);
            let mut orders =
                Orders { disk, views: &self.bench.views, images, orders: BTreeMap::new() };
            for key in decided.evict {
                match orders.of(key.image) {
                    Some(order) => order.evict.push(key.chunk),
                    None => plan.policy.dropped(key),
                }
            }
            for key in decided.promote {
                match orders.of(key.image) {
                    Some(order) => order.promote.push(key.chunk),
                    None => plan.policy.failed(key),
                }
            }
            let orders = orders.orders;
            if !orders.is_empty() {
                plan.mover.order(orders.into_values().collect());
            }
        }
        Ok(())
    }

    /// Gives every disk that is there a plan, and takes it from those that are not.
    fn plan(&self, state: &mut State) -> Result<()> {
        let State { disks, told, plans, .. } = state;
        let there = |disk: &DiskStatus| {
            matches!(disk.state, DiskState::Present | DiskState::ReadOnly) && !disk.pool
        };
        let views = &self.bench.views;
        plans.retain(|name, plan| {
            let same = |disk: &&DiskStatus| disk.id == plan.id && disk.name == *name;
            let known = disks.iter().find(same);
            if known.is_some_and(there) {
                return true;
            }
            // First nobody opens any more, then all that is open is given up. Should the disk come back,
            // its caches are looked through anew.
            plan.mover.end();
            match known {
                Some(_) => views.all().iter().filter(|seat| seat.disk == *name).for_each(|seat| {
                    seat.view.give_up();
                }),
                // Another may have its name by now.
                None => views.forget(|seat| seat.disk == *name),
            }
            false
        });
        for disk in disks.iter().filter(|disk| there(disk)) {
            if !plans.contains_key(&disk.name) {
                let mover = Mover::start(disk.name.clone(), disk.id, self.bench.clone());
                plans.insert(disk.name.clone(), Plan::new(disk.id, mover)?);
            }
            if let Some(plan) = plans.get_mut(&disk.name) {
                plan.look_at(disk, fresh(told, disk), self.percent);
            }
        }
        Ok(())
    }

    /// Ends the work on disks that the node does not know any more, and closes what is open there.
    pub async fn leave_disks(&self) {
        let left: Vec<_> = {
            let mut state = self.state();
            let before: Vec<_> = state.plans.values().map(|plan| plan.id).collect();
            self.look(&mut state);
            if let Err(error) = self.plan(&mut state) {
                tracing::warn!(%error, "nothing is promoted");
            }
            let stays = |id| state.plans.values().any(|plan| plan.id == id);
            before.into_iter().filter(|id| !stays(*id)).collect()
        };
        let turns: Vec<_> = left.into_iter().map(|id| self.bench.turns.of(id)).collect();
        let ended = futures_util::future::join_all(turns.iter().map(|turn| turn.lock()));
        if tokio::time::timeout(LEAVING, ended).await.is_err() {
            tracing::warn!("a disk that was removed doesn't answer: its caches are open still");
        }
    }

    /// The disks whose policies are to be told now what is pinned.
    fn untold(&self) -> Vec<Name> {
        let mut state = self.state();
        let due = |plan: &Plan| matches!(plan.pins, PinsTold::Not(at) if at <= Instant::now());
        let untold = state.plans.iter_mut().filter(|(_, plan)| due(plan));
        let taken = untold.map(|(disk, plan)| {
            plan.pins = PinsTold::Soon;
            disk.clone()
        });
        taken.collect()
    }
}

/// Orders in the making, one for each image.
struct Orders<'a> {
    disk: &'a Name,
    views: &'a Views,
    images: &'a Images,
    orders: BTreeMap<u32, Order>,
}

impl Orders<'_> {
    /// The order for the image of this handle.
    fn of(&mut self, image: u32) -> Option<&mut Order> {
        if let std::collections::btree_map::Entry::Vacant(vacant) = self.orders.entry(image) {
            let (digest, size) = self.images.of(image)?;
            let seat = self.views.seat(self.disk, digest, size).ok()?;
            vacant.insert(Order { seat, evict: Vec::new(), promote: Vec::new() });
        }
        self.orders.get_mut(&image)
    }
}

async fn tick_for_ever(promotion: Weak<Promotion>) {
    let mut ticks = tokio::time::interval(TICK);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        let Some(promotion) = promotion.upgrade() else { return };
        promotion.ask().await;
        match catch_unwind(AssertUnwindSafe(|| promotion.tick())) {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::warn!(%error, "nothing is promoted"),
            // The panic itself is in the log. The next tick finds plans that are whole, if less than
            // was decided.
            Err(_) => tracing::error!("a tick of promotion failed; the next goes on"),
        }
        for disk in promotion.untold() {
            // It opens copies, whose disks may hang.
            let promotion = promotion.clone();
            tokio::spawn(async move { promotion.pin_again(disk).await });
        }
    }
}

/// Takes what was read since the last tick: into the signals, the recordings, and by disk as its policy
/// wants it.
fn take_in(state: &mut State, seats: &[Arc<Seat>]) -> HashMap<Name, Vec<Reads>> {
    let State { disks, images, signals, probes, recordings, .. } = state;
    signals.tick();
    probes.tick();
    let mut read = Vec::new();
    for seat in seats {
        let touches = seat.view.demand.take();
        let news = seat.news();
        let copy_disk = seat.copy_disk();
        if let Some(disk) = &copy_disk {
            signals.timed(disk, &news.copy);
        }
        signals.timed(&seat.disk, &news.local);
        if let Some(recording) = recordings.get_mut(&seat.digest) {
            recording.add(&touches);
        }
        read.push((seat, touches, copy_disk));
    }
    let mut reads: HashMap<Name, Vec<Reads>> = HashMap::new();
    for (seat, touches, copy_disk) in read {
        // A disk that has a copy of its own needs no cache, whichever is read first.
        let Some(copy_disk) = copy_disk.filter(|_| !seat.has_copy_here()) else { continue };
        let latency = signals.latency(&copy_disk, tier(disks, &copy_disk));
        let image = images.handle(seat.digest, seat.size);
        let key = |chunk| Key { image, chunk };
        // What the page cache answered earns nothing.
        let device = |touch: &&demand::Touch| {
            let slow = touch.slow > 0;
            probes
                .saw(seat.digest, &copy_disk, touch.chunk)
                .map_or(slow, |saw| saw && touch.copy > 0)
        };
        let slow = touches.iter().filter(device).map(|touch| Touch {
            key: key(touch.chunk),
            reads: touch.slow.max(1),
            nanos: u64::try_from(touch.slow_time.as_nanos()).unwrap_or(u64::MAX),
        });
        let hits = touches.iter().filter(|touch| touch.cache > 0).map(|touch| Touch {
            key: key(touch.chunk),
            reads: touch.cache,
            nanos: 0,
        });
        reads.entry(seat.disk.clone()).or_default().push(Reads {
            image,
            touches: slow.collect(),
            hits: hits.collect(),
            // The median: the mover's own reads are longer, and must not make a disk look slow.
            copy: (latency.origin != Origin::Tier).then_some(latency.median),
        });
    }
    reads
}

/// What a disk told a moment ago.
fn fresh<'a>(told: &'a HashMap<Uuid, Told>, disk: &DiskStatus) -> Option<&'a Survey> {
    told.get(&disk.id).filter(|told| told.age() < FRESH).map(|told| &*told.survey)
}

fn tier(disks: &[DiskStatus], name: &Name) -> Option<crate::catalog::Tier> {
    disks.iter().find(|disk| disk.name == *name)?.tier
}

impl Recording {
    fn add(&mut self, touches: &[demand::Touch]) {
        for Chunk(chunk) in touches.iter().map(|touch| touch.chunk) {
            if self.seen.insert(chunk) {
                self.chunks.push(chunk);
            }
        }
    }
}
