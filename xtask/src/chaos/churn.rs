//! Everything that changes a node, at once, with guests at work, and the daemon killed in the midst of it;
//! round after round: nothing is lost, nothing leaks, no reference is missing.
//!
//! A round: guests at some of the replicas, actors at everything; `kill -9`; a start; a look at everything
//! (`check.rs`). The seed decides who does what and when, not how fast the machine is: a failing round is
//! told with its seed, and the daemon's log stays in `target/rig/logs`.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use fastrand::Rng;

use super::acts::Actor;
use super::check::{Looked, Root, check};
use super::guest::{Guest, Hours, Seen};
use super::world::{Presence, Source, Stands, World, told};
use crate::daemon::Daemon;
use crate::lab::{Fs, Lab, LoopDisk, loop_disks};
use crate::nbd::Client;
use crate::place::Profile;
use crate::report::{Report, note};
use crate::subject::text;
use crate::{pattern, setup};

/// The disks, and the size of each in bytes.
const DISKS: [&str; 4] = ["a", "b", "c", "d"];
const DISK: u64 = 640 << 20;
/// The images that come and go: how large they are, in bytes.
const IMAGES: [u64; 5] = [4 << 20, 6 << 20, 8 << 20, 12 << 20, 16 << 20];
/// Guests at one time, and actors.
const GUESTS: usize = 3;
const ACTORS: u64 = 5;
/// How long a daemon may live, in milliseconds.
const LIFE: std::ops::Range<u64> = 300..2500;
/// After so many rounds progress is told.
const TOLD: u64 = 20;
/// What must have been done at least once where there were so many rounds.
const MANY: u64 = 50;
const ALL: [&str; 11] = [
    "create", "rm", "migrate", "flatten", "resize", "import", "image rm", "copy", "uncopy",
    "drain", "carry",
];

/// Runs the rig.
pub fn run(lab: &Lab, rounds: u64, seed: u64, report: &mut Report) {
    let ready = loop_disks().and_then(|()| setup::need(&["mkfs.ext4"]));
    if let Err(error) = ready {
        return report.skip("churn", &format!("{error:#}"));
    }
    let name = format!(
        "churn: {rounds} rounds of everything at once, each ended by kill -9 (seed {seed})"
    );
    report.check(&name, || Churn::new(lab, seed)?.all(rounds));
}

struct Churn {
    seed: u64,
    world: World,
    daemon: Daemon,
    dir: PathBuf,
    roots: Vec<Root>,
    seen: Arc<Seen>,
    looked: Looked,
    _disks: Vec<LoopDisk>,
}

impl Churn {
    fn new(lab: &Lab, seed: u64) -> Result<Churn> {
        let dir = lab.dir("churn")?;
        let disks: Vec<LoopDisk> = DISKS
            .iter()
            .map(|name| LoopDisk::new(&dir, name, DISK, Fs::Ext4))
            .collect::<Result<_>>()?;
        let settings = "probes = false\nrebuild_after_seconds = 1\n";
        let daemon = Daemon::start(lab, &dir, "churn", Profile::Debug, settings)?;
        let mut roots = Vec::new();
        for (disk, name) in disks.iter().zip(DISKS) {
            daemon.ok(&["disk", "add", text(&disk.path)?, "--name", name, "--tier=ssd"])?;
            roots.push(Root::new(&disk.path)?);
        }
        let sizes = IMAGES.iter().enumerate();
        let sources = sizes.map(|(at, size)| source(&dir, at, *size, seed, false));
        let world = World::new(sources.collect::<Result<_>>()?, &DISKS, &[]);
        let (seen, looked) = Default::default();
        Ok(Churn { seed, world, daemon, dir, roots, seen, looked, _disks: disks })
    }

    fn all(&mut self, rounds: u64) -> Result<String> {
        let started = Instant::now();
        for round in 1..=rounds {
            let done = self.round(round);
            done.with_context(|| format!("round {round} of seed {}", self.seed))?;
            if round % TOLD == 0 {
                note(&format!("churn: {round} rounds, {}", told(&self.world.tally())));
            }
        }
        let end = self.end();
        end.with_context(|| format!("after {rounds} rounds of seed {}", self.seed))?;
        let tally = self.world.tally();
        let never = |act: &&&str| tally.get(**act).is_none_or(|[done, ..]| *done == 0);
        let never: Vec<_> = ALL.iter().filter(never).collect();
        ensure!(rounds < MANY || never.is_empty(), "never done: {never:?}");
        Ok(format!(
            "done/refused/cut: {}; {rounds} rounds in {:.0} s, {} requests of guests, {} MiB and {} replicas \
             compared, {} leftovers mended, seed {}",
            told(&tally),
            started.elapsed().as_secs_f64(),
            self.seen.requests.load(Ordering::Relaxed),
            (self.looked.bytes + self.seen.compared.load(Ordering::Relaxed)) >> 20,
            self.looked.replicas,
            self.looked.mended,
            self.seed,
        ))
    }

    fn round(&mut self, round: u64) -> Result<()> {
        let mut rng = Rng::with_seed(self.seed ^ (round << 32));
        let hours = Hours::new(false);
        let guests = self.guests(&mut rng)?;
        let control = self.daemon.control().clone();
        let life = Duration::from_millis(rng.u64(LIFE));
        let (world, dir, daemon) = (&self.world, &self.dir, &mut self.daemon);
        thread::scope(|scope| -> Result<()> {
            let mut at_work = Vec::new();
            for guest in guests {
                at_work.push(scope.spawn(|| guest.run(&hours)));
            }
            for _ in 0..ACTORS {
                let (dir, rng) = (dir.clone(), rng.fork());
                let actor = Actor { world, control: &control, hours: &hours, dir, rng };
                at_work.push(scope.spawn(|| actor.run()));
            }
            let born = Instant::now();
            while born.elapsed() < life && !at_work.iter().any(|it| it.is_finished()) {
                thread::sleep(Duration::from_millis(5));
            }
            hours.die();
            let killed = daemon.kill();
            for worker in at_work {
                worker.join().map_err(|_| anyhow!("a worker panicked"))??;
            }
            killed
        })?;
        self.daemon.restart()?;
        for replica in self.world.state().replicas.values_mut() {
            replica.used = false;
        }
        self.looked.add(check(&self.world, &mut self.daemon, &self.roots)?);
        self.stands(&mut rng)?;
        // Disks that take nothing would soon be all of them.
        for disk in DISKS {
            if rng.bool() {
                self.daemon.ok(&["disk", "undrain", disk])?;
            }
        }
        Ok(())
    }

    /// Clients at some of the replicas.
    fn guests(&self, rng: &mut Rng) -> Result<Vec<Guest>> {
        let mut guests = Vec::new();
        for _ in 0..GUESTS {
            let Some((name, replica)) = self.world.any_replica(rng, |it| !it.used) else {
                continue;
            };
            self.world.with(&name, |it| it.used = true);
            guests.push(Guest {
                socket: self.daemon.nbd().to_owned(),
                client: Some(Client::open(self.daemon.nbd(), &format!("replica/{name}"))?),
                replica: name,
                content: replica.content,
                seen: self.seen.clone(),
                may_fail: false,
                parts: 2,
                rng: rng.fork(),
            });
        }
        Ok(guests)
    }

    /// An image that a replica stands on can't be removed.
    fn stands(&mut self, rng: &mut Rng) -> Result<()> {
        let any = self.world.any_replica(rng, |it| it.stands == Stands::On);
        if let Some((name, replica)) = any {
            let image = self.world.sources[replica.source].name.clone();
            self.daemon.refused(&["image", "rm", &image], &[&image, &name])?;
        }
        Ok(())
    }

    /// Everything is compared once more after a clean stop, then removed: nothing is left of it.
    fn end(&mut self) -> Result<()> {
        self.daemon.ok(&["image", "verify", "--all"])?;
        self.daemon.stop()?;
        self.daemon.restart()?;
        self.looked.add(check(&self.world, &mut self.daemon, &self.roots)?);
        self.daemon.ok(&["doctor"])?;
        let mut state = self.world.state();
        for (name, replica) in &mut state.replicas {
            self.daemon.ok(&["replica", "rm", name])?;
            let content = replica.content.lock().unwrap_or_else(PoisonError::into_inner);
            ensure!(content.is_sure(), "replica {name} was never compared");
            replica.presence = Presence::Gone;
        }
        for (source, presence) in self.world.sources.iter().zip(&mut state.images) {
            if *presence == Presence::Here {
                self.daemon.ok(&["image", "rm", &source.name])?;
                *presence = Presence::Gone;
            }
        }
        drop(state);
        self.looked.add(check(&self.world, &mut self.daemon, &self.roots)?);
        self.daemon.healthy()?;
        self.daemon.stop()
    }
}

/// The image number `at`, of `size` bytes.
pub fn source(dir: &Path, at: usize, size: u64, seed: u64, kept: bool) -> Result<Source> {
    let (name, file) = (format!("i{at}"), dir.join(format!("i{at}.raw")));
    pattern::image(&file, size, seed ^ (at as u64 + 1) << 48)?;
    let content = Arc::new(fs::read(&file)?);
    Ok(Source { name, file, content, kept })
}
