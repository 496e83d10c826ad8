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
//! - A tick waits for no disk: what is known of the disks is as old as the slowest of them answers.
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
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
    time::{Duration, Instant},
};

use tokio::{task::JoinHandle, time::MissedTickBehavior};

use self::{
    mover::{Bench, Mover, Order},
    pins::Pins,
    plan::{Images, Plan, Reads},
    report::Probes,
    watch::{Scene, Watched},
};
use crate::{
    catalog::{Digest, DiskState, DiskStatus, Name, Node},
    control::{
        agent,
        config::Config,
        exports::Exports,
        service::blocking,
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

/// The promotion of a node.
pub struct Promotion {
    bench: Arc<Bench>,
    /// Percent of a disk that its cache may take.
    percent: u64,
    state: Mutex<State>,
}

struct State {
    disks: Vec<DiskStatus>,
    /// A look at the disks that is under way.
    looking: Option<JoinHandle<Result<Look>>>,
    /// What that look will bring is older than what is known by now.
    outdated: bool,
    plans: BTreeMap<Name, Plan>,
    images: Images,
    signals: Signals<Name>,
    probes: Probes,
    watched: Arc<Watched>,
    /// Chunks of images in the order of their first reads, since their recordings began.
    recordings: HashMap<Digest, Recording>,
    ticked: Instant,
}

/// What a look at the disks brought.
struct Look {
    disks: Vec<DiskStatus>,
    /// What the agent is to watch from now on, if that changed.
    changed: Option<Watched>,
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
            caching: config.image_io,
            rate: config.promote_mib << 20,
        };
        let promotion = Arc::new(Promotion {
            bench: Arc::new(bench),
            percent: config.cache_percent,
            state: Mutex::new(State {
                disks: Vec::new(),
                looking: None,
                outdated: false,
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

    /// Takes in what the last look at the disks brought, and begins another.
    async fn look(&self) {
        let finished = {
            let mut state = self.state();
            match &state.looking {
                Some(looking) if !looking.is_finished() => return,
                _ => state.looking.take(),
            }
        };
        let found = match finished {
            Some(looking) => looking.await.ok().and_then(Result::ok),
            None => None,
        };
        let mut state = self.state();
        let (node, watched) = (self.bench.node.clone(), state.watched.clone());
        state.looking = Some(tokio::spawn(blocking(move || {
            let scene = Scene::of(&node);
            // Copies lie where they lie: extents are asked for once.
            let changed = (!watched.is_of(&scene))
                .then(|| Watched::of(&node, scene, watched.watch.generation + 1));
            Ok(Look { disks: node.disks(), changed })
        })));
        if std::mem::take(&mut state.outdated) {
            return;
        }
        if let Some(look) = found {
            state.disks = look.disks;
            if let Some(changed) = look.changed {
                state.probes.follow(changed.followed());
                state.watched = Arc::new(changed);
            }
        }
    }

    /// Decides.
    ///
    /// Returns the disks that have a plan only now.
    fn tick(&self) -> Result<Vec<Name>> {
        let seats = self.bench.views.all();
        let mut state = self.state();
        let elapsed = std::mem::replace(&mut state.ticked, Instant::now()).elapsed();
        let new = self.plan(&mut state)?;
        let reads = take_in(&mut state, &seats);
        let State { plans, images, signals, disks, .. } = &mut *state;
        for (disk, plan) in plans {
            plan.hear(images);
            let here: Vec<&Arc<Seat>> = seats.iter().filter(|seat| seat.disk == *disk).collect();
            for seat in here.iter().filter(|seat| seat.is_given_up()) {
                images.find(seat.digest).into_iter().for_each(|it| plan.policy.forget_image(it));
            }
            let local = signals.latency(disk, tier(disks, disk)).median;
            let reads = reads.get(disk).map(Vec::as_slice).unwrap_or_default();
            let decided = plan.decide(elapsed, reads, local, self.bench.rate);
            let mut orders =
                Orders { disk, views: &self.bench.views, images, orders: BTreeMap::new() };
            for Key { image, chunk } in decided.evict {
                orders.of(image).into_iter().for_each(|order| order.evict.push(chunk));
            }
            for Key { image, chunk } in decided.promote {
                orders.of(image).into_iter().for_each(|order| order.promote.push(chunk));
            }
            if plan.doubts(&here) || std::mem::take(&mut plan.sweep) {
                // The mover sweeps what was withdrawn.
                for seat in here {
                    orders.images.find(seat.digest).and_then(|image| orders.of(image).map(drop));
                }
            }
            let orders = orders.orders;
            if !orders.is_empty() {
                plan.mover.order(orders.into_values().collect());
            }
        }
        Ok(new)
    }

    /// Gives every disk that is there a plan, and takes it from those that are not. The new ones.
    fn plan(&self, state: &mut State) -> Result<Vec<Name>> {
        let State { disks, plans, .. } = state;
        let there = |disk: &DiskStatus| {
            matches!(disk.state, DiskState::Present | DiskState::ReadOnly) && !disk.pool
        };
        let mut new = Vec::new();
        plans.retain(|name, _| {
            let stays = disks.iter().any(|disk| disk.name == *name && there(disk));
            if !stays {
                // Should it come back, its caches are looked through anew.
                self.bench.views.all().iter().filter(|seat| seat.disk == *name).for_each(|seat| {
                    seat.view.cache().into_iter().for_each(|cache| cache.close());
                });
            }
            stays
        });
        for disk in disks.iter().filter(|disk| there(disk)) {
            if !plans.contains_key(&disk.name) {
                let mover = Mover::start(disk.name.clone(), self.bench.clone());
                plans.insert(disk.name.clone(), Plan::new(mover)?);
                new.push(disk.name.clone());
            }
            if let Some(plan) = plans.get_mut(&disk.name) {
                plan.look_at(disk, self.percent);
            }
        }
        Ok(new)
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
        let (digest, size) = self.images.of(image)?;
        let seat = || self.views.seat(self.disk, digest, size);
        let order = || Order { seat: seat(), evict: Vec::new(), promote: Vec::new() };
        Some(self.orders.entry(image).or_insert_with(order))
    }
}

async fn tick_for_ever(promotion: Weak<Promotion>) {
    let mut ticks = tokio::time::interval(TICK);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        let Some(promotion) = promotion.upgrade() else { return };
        promotion.look().await;
        match promotion.tick() {
            Ok(new) => {
                for disk in new {
                    // It opens copies, whose disks may hang.
                    let promotion = promotion.clone();
                    tokio::spawn(async move { promotion.pin_again(disk).await });
                }
            }
            Err(error) => tracing::warn!(%error, "nothing is promoted"),
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
        let Some(copy_disk) = copy_disk.filter(|disk| *disk != seat.disk) else { continue };
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
