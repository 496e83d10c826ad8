//! Proof by simulation: the overlay that serves guests, on a disk that crashes.
//!
//! [`run`] takes a seed to a course of events: several guests at once write, zero, discard, flush
//! and grow one replica on a simulated disk ([`crate::io::sim`]); the power is cut or the process
//! killed at some step, during recovery and the first checkpoint too; the replica is opened again,
//! and every sector must hold something that the model allows. Then it goes on, through the next
//! crash. Now and then the replica moves to other files meanwhile, or copies up its image.
//!
//! [`exhaust`] leaves nothing to chance instead: all short sequences of operations, cut at every
//! step, in several ways.
//!
//! A violation names its seed, and the same seed takes the same course.

mod errand;
mod exhaust;
mod guest;
mod model;
mod node;

use std::{
    fmt,
    ops::{AddAssign, Range},
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    thread,
};

pub use exhaust::exhaust;

use guest::Guests;
use node::Node;

use crate::io::sim::{Cut, End, Faults};

/// How a run goes.
#[derive(Clone, Debug)]
pub struct Options {
    /// Crashes a run goes through.
    pub crashes: u32,
    /// A disk that lies, to see that the simulation notices.
    pub mutant: Option<Mutant>,
}

impl Default for Options {
    fn default() -> Options {
        Options { crashes: 8, mutant: None }
    }
}

/// What a disk can be made to do wrong: each breaks what the overlay relies on, so a simulation
/// worth its name must find a violation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mutant {
    /// Syncs of `map` are acknowledged and do nothing: flushes come too early.
    UnsyncedMap,
    /// Syncs of `data` are acknowledged and do nothing: the map runs ahead of the data.
    UnsyncedData,
    /// What was not committed dies with the process.
    ForgetfulTail,
    /// A tail that something is missing from says that it holds all the same.
    BoastfulTail,
    /// Syncs of the data file that a replica moves to are acknowledged and do nothing.
    UnsyncedTarget,
    /// A move ends while guests go on.
    OpenGate,
    /// A move is said to have ended before it has.
    EarlySwitch,
}

/// Figures of one run, or of many.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Outcome {
    /// Runs.
    pub runs: u64,
    /// Power cuts, each followed by a recovery that was checked.
    pub cuts: u64,
    /// Kills of the process, likewise.
    pub kills: u64,
    /// Operations that guests issued.
    pub operations: u64,
    /// Flushes that were acknowledged.
    pub flushes: u64,
    /// Operations that failed because the disk was made to.
    pub failures: u64,
    /// Checkpoints.
    pub checkpoints: u64,
    /// Moves and flattenings that came to their end.
    pub errands: u64,
}

impl Outcome {
    /// Crashes of both kinds.
    pub fn crashes(&self) -> u64 {
        self.cuts + self.kills
    }
}

impl AddAssign for Outcome {
    fn add_assign(&mut self, other: Outcome) {
        self.runs += other.runs;
        self.cuts += other.cuts;
        self.kills += other.kills;
        self.operations += other.operations;
        self.flushes += other.flushes;
        self.failures += other.failures;
        self.checkpoints += other.checkpoints;
        self.errands += other.errands;
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} runs, {} crashes ({} power cuts, {} kills), {} operations, {} flushes, {} \
             checkpoints, {} moves and flattenings, {} injected failures",
            self.runs,
            self.crashes(),
            self.cuts,
            self.kills,
            self.operations,
            self.flushes,
            self.checkpoints,
            self.errands,
            self.failures
        )
    }
}

/// Something that must never happen, and how to make it happen again.
#[derive(Clone, Debug)]
pub struct Violation {
    /// Which course of events: `seed 42`, or a sequence of operations.
    pub course: String,
    /// What was found.
    pub found: String,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.course, self.found)
    }
}

impl std::error::Error for Violation {}

/// Takes one replica through the course of events that follows from `seed`.
pub fn run(seed: u64, options: &Options) -> Result<Outcome, Violation> {
    let mut rng = fastrand::Rng::with_seed(seed);
    let mut node = Node::random(&mut rng, options.mutant);
    let mut outcome = Outcome { runs: 1, ..Outcome::default() };
    for crash in 0..options.crashes {
        round(&mut node, &mut rng, &mut outcome).map_err(|found| Violation {
            course: format!("seed {seed}"),
            found: format!("after crash {crash}: {found}"),
        })?;
    }
    Ok(outcome)
}

/// Runs all `seeds` on all processors, and tells `progress` of each that is done. The first violation
/// found ends it.
pub fn run_seeds(
    seeds: Range<u64>,
    options: &Options,
    progress: impl Fn(&Outcome) + Sync,
) -> Result<Outcome, Violation> {
    let next = AtomicU64::new(seeds.start);
    let all = Mutex::new(Outcome::default());
    on_all_processors(|| {
        let mut sum = Outcome::default();
        loop {
            let seed = next.fetch_add(1, Ordering::Relaxed);
            if seed >= seeds.end {
                return Ok(sum);
            }
            let outcome =
                run(seed, options).inspect_err(|_| next.store(seeds.end, Ordering::Relaxed))?;
            sum += outcome;
            let mut all = all.lock().unwrap_or_else(PoisonError::into_inner);
            *all += outcome;
            progress(&all);
        }
    })
}

/// Runs `worker` on a thread for each processor, and adds up what they return.
fn on_all_processors(
    worker: impl Fn() -> Result<Outcome, Violation> + Sync,
) -> Result<Outcome, Violation> {
    thread::scope(|scope| {
        let count = thread::available_parallelism().map_or(1, usize::from);
        let workers: Vec<_> = (0..count).map(|_| scope.spawn(&worker)).collect();
        let mut sum = Outcome::default();
        for worker in workers {
            sum += worker.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
        }
        Ok(sum)
    })
}

/// Opens the replica, lets guests work on it, crashes, and checks what is left.
fn round(node: &mut Node, rng: &mut fastrand::Rng, outcome: &mut Outcome) -> Result<(), String> {
    if rng.u8(0..3) == 0 {
        let rate = |rng: &mut fastrand::Rng| if rng.bool() { rng.u32(0..40) } else { 0 };
        let sync = if rng.u8(0..4) == 0 { rng.u32(0..100) } else { 0 };
        node.set_faults(Faults { read: rate(rng), write: rate(rng), sync });
    }
    // Often early, in recovery's wake: that is where the first checkpoint is.
    let steps = match rng.u8(0..10) {
        0..=3 => Some(rng.u64(0..40)),
        4..=8 => Some(rng.u64(0..400)),
        _ => None,
    };
    let opened = match rng.u8(0..8) {
        0 => node.open_for(rng.u64(0..6))?,
        _ => node.open()?,
    };
    if let Some(overlay) = opened {
        let errand = node.errand(rng);
        let guests = Guests::new(node, overlay, rng.fork());
        let end = guests.work(rng.usize(1..=4), rng.usize(1..=24), errand, steps);
        guests.report(outcome)?;
        match end {
            End::Stuck => return Err("guests wait for each other forever".to_owned()),
            End::Done(_) => guests.check_at_rest()?,
            End::Stopped => {}
        }
    }
    match rng.u8(0..4) {
        0 => {
            node.kill()?;
            outcome.kills += 1;
        }
        _ => {
            let cuts = [Cut::LoseAll, Cut::KeepAll, Cut::KeepEven, Cut::KeepOdd];
            node.power_cut(*rng.choice(&cuts).filter(|_| rng.u8(0..4) == 0).unwrap_or(&Cut::Any))?;
            outcome.cuts += 1;
        }
    }
    Ok(())
}
