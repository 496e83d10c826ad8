//! A day's worth of trouble in minutes: disks that are slow, fail, fall silent, are pulled and come back;
//! bits that flip in copies and caches; the daemon killed again and again, with the agent and without; and
//! everything that `churn` does, at the same time.
//!
//! Images are on three disks that can be ill, replicas on three that are well: what befalls a replica's own
//! disk befalls the replica, and is another rig's. One disk is ill at a time, and the next only when the last
//! has recovered. The seed decides what happens in which order.
//!
//! Invariants checked, throughout:
//! - no read of an image with two copies fails, or takes longer than `STALL`;
//! - reads of an image with one copy may fail; no read is ever wrong;
//! - in the end, with everything well: all copies are sound, all replicas hold what was acknowledged, `fsck`
//!   finds nothing, and no disk is in trouble.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use fastrand::Rng;
use serde_json::Value;

use super::acts::Actor;
use super::check::{Root, check};
use super::churn::source;
use super::guest::{Guest, Hours, Seen};
use super::model::Content;
use super::trouble::{Damage, Kind, Patient, damage_cache};
use super::world::{Presence, Replica, Stands, World, told};
use crate::daemon::Daemon;
use crate::lab::{Fs, Lab, LoopDisk, loop_disks};
use crate::place::Profile;
use crate::report::{Report, note, say};
use crate::setup;
use crate::slow::Illness;
use crate::subject::text;

/// The disks that can be ill, and hold images only; those that are well; the size of each in bytes.
const POOLS: [&str; 3] = ["p", "q", "r"];
const HOMES: [&str; 3] = ["x", "y", "z"];
const DISK: u64 = 640 << 20;
/// The images: those that have two copies, and those that come and go. Their sizes in bytes.
const KEPT: [u64; 3] = [24 << 20, 32 << 20, 16 << 20];
const OTHERS: [u64; 3] = [16 << 20, 8 << 20, 4 << 20];
/// Guests at images with two copies, and at one with one.
const GUESTS: usize = 4;
const SINGLE: usize = 2;
const ACTORS: u64 = 3;
/// How long a trouble lasts, in milliseconds.
const LASTS: std::ops::Range<u64> = 2000..7000;
/// The longest that a read of an image with two copies may take, in microseconds.
const STALL: u64 = 5_000_000;
/// How long a disk takes to be believed again, and copies to be made anew, at most.
const RECOVERY: Duration = Duration::from_secs(90);
/// Figures of the daemon, which begin anew with it.
const FIGURES: [(&str, &str); 6] = [
    ("underlay_source_failovers_total", "failovers"),
    ("underlay_source_hedges_total", "hedges"),
    ("underlay_repaired_chunks_total", "repaired chunks"),
    ("underlay_copies_made_total", "copies made anew"),
    ("underlay_copies_removed_total", "surplus copies removed"),
    ("underlay_source_failed_total", "reads that nothing could answer"),
];

/// Runs the rig for so long, plus what the last trouble and the end take.
pub fn run(lab: &Lab, last: Duration, seed: u64, report: &mut Report) {
    let ready = loop_disks().and_then(|()| setup::need(&["mkfs.ext4", "nbdfuse"]));
    if let Err(error) = ready {
        return report.skip("chaos", &format!("{error:#}"));
    }
    let name = format!("chaos: {} s of trouble (seed {seed})", last.as_secs());
    report.check(&name, || {
        let within = || format!("seed {seed}");
        Storm::new(lab, seed).with_context(within)?.run(last).with_context(within)
    });
}

struct Storm {
    seed: u64,
    rng: Rng,
    world: Arc<World>,
    daemon: Daemon,
    dir: PathBuf,
    patients: Vec<Patient>,
    homes: Vec<LoopDisk>,
    /// What disks that are well took when they were empty.
    roots: Vec<Root>,
    hours: Arc<Hours>,
    /// What guests see of images with two copies, and of others.
    seen: [Arc<Seen>; 2],
    troubles: BTreeMap<Kind, u64>,
    damaged: usize,
    figures: BTreeMap<&'static str, f64>,
}

impl Storm {
    fn new(lab: &Lab, seed: u64) -> Result<Storm> {
        let dir = lab.dir("chaos")?;
        let patients = POOLS.iter().map(|name| Patient::new(&dir, name, DISK));
        let patients: Vec<Patient> = patients.collect::<Result<_>>()?;
        let homes = HOMES.iter().map(|name| LoopDisk::new(&dir, name, DISK, Fs::Ext4));
        let homes: Vec<LoopDisk> = homes.collect::<Result<_>>()?;
        let daemon = Daemon::start(lab, &dir, "chaos", Profile::Debug, &settings(false))?;
        for patient in &patients {
            let path = patient.path();
            daemon.ok(&[
                "disk",
                "add",
                text(&path)?,
                "--name",
                patient.name,
                "--tier=ssd",
                "--pool",
            ])?;
        }
        let mut roots = Vec::new();
        for (disk, name) in homes.iter().zip(HOMES) {
            daemon.ok(&["disk", "add", text(&disk.path)?, "--name", name, "--tier=ssd"])?;
            roots.push(Root::new(&disk.path)?);
        }
        let sizes = KEPT.iter().chain(&OTHERS).enumerate();
        let sources = sizes.map(|(at, size)| source(&dir, at, *size, seed, at < KEPT.len()));
        let world = Arc::new(World::new(sources.collect::<Result<_>>()?, &HOMES, &POOLS));
        let (seen, troubles, damaged, figures) = Default::default();
        let (rng, hours) = (Rng::with_seed(seed), Arc::new(Hours::new(true)));
        Ok(Storm {
            seed,
            rng,
            world,
            daemon,
            dir,
            patients,
            homes,
            roots,
            hours,
            seen,
            troubles,
            damaged,
            figures,
        })
    }

    fn run(&mut self, last: Duration) -> Result<String> {
        let guests = self.populate()?;
        let hours = self.hours.clone();
        let actors: Vec<Rng> = (0..ACTORS).map(|_| self.rng.fork()).collect();
        let world = self.world.clone();
        let control = self.daemon.control().clone();
        let dir = self.dir.clone();
        let befell = thread::scope(|scope| -> Result<()> {
            let (world, hours, control) = (&world, &*hours, &control);
            let mut all = Vec::new();
            for guest in guests {
                all.push(scope.spawn(move || guest.run(hours)));
            }
            for rng in actors {
                let actor = Actor { world, control, hours, dir: dir.clone(), rng };
                all.push(scope.spawn(move || actor.run()));
            }
            let started = Instant::now();
            let mut deck = Vec::new();
            let mut befell = Ok(());
            while started.elapsed() < last
                && befell.is_ok()
                && !all.iter().any(|it| it.is_finished())
            {
                if deck.is_empty() {
                    deck = Kind::deck(&mut self.rng);
                }
                if let Some(kind) = deck.pop() {
                    let at = started.elapsed().as_secs();
                    befell = self
                        .befall(world, kind)
                        .with_context(|| format!("{kind}, {at} s after the begin"));
                }
            }
            hours.over.store(true, Ordering::SeqCst);
            if let Err(error) = &befell {
                note(&format!("chaos: {error:#}"));
            }
            // What a worker saw explains what befell, more often than the other way round.
            for worker in all {
                worker.join().map_err(|_| anyhow!("a worker panicked"))??;
            }
            befell
        });
        befell?;
        self.end()
    }

    /// Images with two copies and replicas of them, which stay; and the first of the others.
    fn populate(&mut self) -> Result<Vec<Guest>> {
        for (at, image) in self.world.sources.iter().enumerate() {
            let (name, disk) =
                (format!("--name={}", image.name), format!("--disk={}", POOLS[at % 3]));
            let mut args =
                vec!["image", "import", text(&image.file)?, &name, &disk, "--format=raw"];
            if image.kept {
                args.push("--copies=2");
            }
            self.daemon.ok(&args)?;
            self.world.state().images[at] = Presence::Here;
        }
        let mut guests = Vec::new();
        for number in 0..GUESTS + SINGLE {
            let single = number >= GUESTS;
            let source = if single { KEPT.len() } else { number % KEPT.len() };
            let (name, image) = (format!("g{number}"), &self.world.sources[source]);
            let disk = HOMES[number % HOMES.len()];
            self.daemon.ok(&[
                "replica",
                "create",
                &name,
                "--image",
                &image.name,
                "--disk",
                disk,
            ])?;
            let size = image.content.len() as u64;
            let content = Arc::new(Mutex::new(Content::new(image.content.clone(), size)));
            let replica = Replica {
                presence: Presence::Here,
                sizes: vec![size],
                source,
                stands: Stands::On,
                content: content.clone(),
                used: true,
                kept: true,
            };
            self.world.state().replicas.insert(name.clone(), replica);
            guests.push(Guest {
                socket: self.daemon.nbd().to_owned(),
                replica: name,
                content,
                seen: self.seen[usize::from(single)].clone(),
                may_fail: single,
                parts: 6,
                rng: self.rng.fork(),
                client: None,
            });
        }
        Ok(guests)
    }

    /// One thing happens, and is over.
    fn befall(&mut self, world: &World, kind: Kind) -> Result<()> {
        let at = self.rng.usize(..self.patients.len());
        let lasts = Duration::from_millis(self.rng.u64(LASTS));
        let name = self.patients[at].name;
        note(&format!("chaos: {kind} ({name}, {} ms)", lasts.as_millis()));
        match kind {
            Kind::Slow | Kind::Fails | Kind::Silent => {
                let illness = kind.illness(&mut self.rng).unwrap_or(Illness::None);
                self.patients[at].suffers(illness)?;
                thread::sleep(lasts);
                if kind != Kind::Silent && self.rng.bool() {
                    // A process with requests on a silent disk can't even die.
                    self.die()?;
                    thread::sleep(lasts / 2);
                }
                self.patients[at].suffers(Illness::None)?;
            }
            Kind::Pulled => {
                world.away.store(true, Ordering::SeqCst);
                self.patients[at].pull()?;
                thread::sleep(lasts);
                self.kill()?;
                self.patients[at].leave();
                self.start()?;
                thread::sleep(lasts);
                self.kill()?;
                self.patients[at].plug()?;
                self.start()?;
                world.away.store(false, Ordering::SeqCst);
            }
            Kind::Damage => {
                let damage = Damage::copy(world, &self.patients[at].path(), &mut self.rng)?;
                let Some(damage) = damage else { return Ok(()) };
                self.damaged += damage.chunks();
                thread::sleep(lasts);
                let source = &world.sources[damage.source];
                if source.kept {
                    let verified = self.daemon.json(&["image", "verify", &source.name])?;
                    ensure!(verified["sound"] == true, "not all was repaired: {verified}");
                } else {
                    damage.undo(world)?;
                }
            }
            Kind::CacheDamage => {
                let home = self.rng.choice(&self.homes).context("no disks")?;
                if !damage_cache(&home.path, &mut self.rng)? {
                    return Ok(());
                }
                thread::sleep(lasts / 2);
            }
            Kind::Killed => self.die()?,
        }
        *self.troubles.entry(kind).or_default() += 1;
        self.recovered(world)
    }

    /// Waits until no disk is away or in trouble, and every image that is to have two copies has them.
    fn recovered(&mut self, world: &World) -> Result<()> {
        let started = Instant::now();
        loop {
            let disks = self.daemon.json(&["disk", "list"])?;
            let all = disks.as_array().context("no disks")?;
            if all.iter().all(|disk| disk["state"] == "present") {
                break;
            }
            ensure!(started.elapsed() < RECOVERY, "a disk was not taken in again: {disks}");
            thread::sleep(Duration::from_millis(200));
        }
        for disk in POOLS.iter().chain(&HOMES) {
            self.daemon.ok(&["disk", "undrain", disk])?;
        }
        let started = Instant::now();
        loop {
            let status = self.daemon.json(&["status"])?;
            let images = status["images"].as_array().context("no images")?;
            let lacks = |image: &&Value| {
                let named = |name: &str| {
                    image["names"].as_array().is_some_and(|it| it.iter().any(|it| it == name))
                };
                let ready = image["copies"].as_array().into_iter().flatten();
                let ready = ready.filter(|copy| copy["state"] == "ready").count();
                ready < 2 && world.sources.iter().any(|it| it.kept && named(&it.name))
            };
            let lacking: Vec<&Value> = images.iter().filter(lacks).collect();
            let troubles = status["troubles"].as_array().context("no troubles")?;
            if lacking.is_empty() && troubles.is_empty() {
                return Ok(());
            }
            let late =
                || format!("not recovered: in trouble {troubles:?}, too few copies {lacking:?}");
            ensure!(started.elapsed() < RECOVERY, "{}", late());
            if self.hours.over.load(Ordering::SeqCst) {
                return Ok(());
            }
            thread::sleep(Duration::from_millis(200));
        }
    }

    /// The daemon is killed and started.
    fn die(&mut self) -> Result<()> {
        self.kill()?;
        self.start()
    }

    fn kill(&mut self) -> Result<()> {
        for (metric, _) in FIGURES {
            *self.figures.entry(metric).or_default() += self.daemon.metric(metric)?;
        }
        self.daemon.healthy()?;
        self.hours.die();
        self.daemon.kill()
    }

    fn start(&mut self) -> Result<()> {
        self.daemon.configure(&settings(self.rng.bool()))?;
        self.daemon.restart()?;
        self.hours.dying.store(false, Ordering::SeqCst);
        Ok(())
    }

    /// Everything is well: it is compared.
    fn end(&mut self) -> Result<String> {
        // What was cut short ends with the daemon.
        self.die()?;
        for replica in self.world.state().replicas.values_mut() {
            replica.used = false;
        }
        let world = self.world.clone();
        self.recovered(&world)?;
        self.daemon.ok(&["image", "verify", "--all"])?;
        let looked = check(&world, &mut self.daemon, &self.roots)?;
        self.recovered(&world)?;
        self.kill()?;
        self.daemon.restart()?;
        check(&world, &mut self.daemon, &self.roots)?;
        self.daemon.stop()?;
        let worst = self.seen.each_ref().map(|seen| seen.worst.load(Ordering::Relaxed));
        self.table(&world, worst);
        ensure!(
            worst[0] <= STALL,
            "a read of an image with two copies took {} ms",
            worst[0] / 1000
        );
        let compared: u64 =
            self.seen.iter().map(|seen| seen.compared.load(Ordering::Relaxed)).sum();
        Ok(format!(
            "{} troubles, {} MiB compared, worst stall {} ms with two copies, {} errors with one, seed {}",
            self.troubles.values().sum::<u64>(),
            (looked.bytes + compared) >> 20,
            worst[0] / 1000,
            self.seen[1].errors.load(Ordering::Relaxed),
            self.seed,
        ))
    }

    fn table(&self, world: &World, worst: [u64; 2]) {
        let troubles = self.troubles.iter().map(|(kind, count)| format!("{kind} {count}"));
        let requests = self.seen.each_ref().map(|seen| seen.requests.load(Ordering::Relaxed));
        let errors = self.seen.each_ref().map(|seen| seen.errors.load(Ordering::Relaxed));
        let figures = FIGURES.iter().map(|(metric, what)| {
            format!("{} {what}", self.figures.get(metric).copied().unwrap_or_default())
        });
        say(&format!("  troubles          {}", troubles.collect::<Vec<_>>().join(", ")));
        say(&format!("  damaged           {} chunks of copies", self.damaged));
        say(&format!("  done/refused/cut  {}", told(&world.tally())));
        for (at, copies) in ["two copies", "one copy"].iter().enumerate() {
            let (requests, errors, worst) = (requests[at], errors[at], worst[at] / 1000);
            say(&format!(
                "  {copies:<16}  {requests} requests, {errors} errors, the longest read {worst} ms"
            ));
        }
        say(&format!("  the daemon        {}", figures.collect::<Vec<_>>().join(", ")));
    }
}

/// The daemon's settings: every read is compared, because bits flip at any time.
fn settings(probes: bool) -> String {
    format!(
        "image_io = \"direct\"\nverify_reads = \"always\"\nclean_seconds = 2\nrebuild_after_seconds = 3\n\
         probes = {probes}\n"
    )
}
