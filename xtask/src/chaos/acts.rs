//! What is done to the node while guests are at work: each act goes through the command line, and what it
//! answers decides what must be there afterwards.
//!
//! Invariants checked:
//! - an act that is refused changes nothing (`call.rs`: and says why);
//! - what is in use is not removed; a disk that is drained is empty.

use std::fs;
use std::path::PathBuf;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use anyhow::{Result, bail, ensure};
use fastrand::Rng;

use super::call::Ended;
use super::guest::Hours;
use super::model::Content;
use super::world::{Presence, Replica, Stands, World};
use crate::daemon::Control;
use crate::subject::text;

/// Names that replicas may have.
const NAMES: usize = 12;
/// Replicas at one time.
const MOST: usize = 8;
/// The unit in which replicas grow.
const GROWTH: u64 = 1 << 20;
/// How much larger than its image a replica becomes.
const LARGEST: u64 = 8 << 20;
/// Somebody who does one thing after another.
pub struct Actor<'a> {
    /// The node.
    pub world: &'a World,
    /// Its command line.
    pub control: &'a Control,
    /// When the daemon is killed, and when it is over.
    pub hours: &'a Hours,
    /// A directory for files.
    pub dir: PathBuf,
    /// Decides what is done.
    pub rng: Rng,
}

impl Actor<'_> {
    /// Goes on until it is over, or the daemon is killed and nobody connects again.
    pub fn run(mut self) -> Result<()> {
        while !self.hours.over.load(Ordering::SeqCst) {
            if self.hours.is_dying() {
                if !self.hours.again {
                    return Ok(());
                }
                thread::sleep(Duration::from_millis(20));
                continue;
            }
            self.act()?;
            thread::sleep(Duration::from_millis(self.rng.u64(0..60)));
        }
        Ok(())
    }

    fn act(&mut self) -> Result<()> {
        match self.rng.u8(..34) {
            0..5 => self.create(),
            5..8 => self.remove(),
            8..14 => self.migrate(),
            14..16 => self.flatten(),
            16..18 => self.resize(),
            18..21 => self.import_image(),
            21 => self.remove_image(),
            22..24 => self.copy(),
            24 => self.uncopy(),
            25 => self.drain(),
            26..29 => self.undrain(),
            29..31 => self.carry(),
            31 => self.plain("fsck", &["fsck", "--repair"]),
            32 => self.cache(),
            _ => self.verify(),
        }
    }

    fn create(&mut self) -> Result<()> {
        let Some(name) = self.free_name() else { return Ok(()) };
        let Some(_claim) = self.world.claim(format!("replica/{name}")) else { return Ok(()) };
        let images = self.world.any_image(&mut self.rng, Presence::Here, |_| true);
        let Some(source) = images else { return Ok(()) };
        let image = &self.world.sources[source];
        let size = image.content.len() as u64 + self.rng.u64(..=LARGEST / GROWTH) * GROWTH;
        let replica = Replica {
            presence: Presence::Unknown,
            sizes: vec![size],
            source,
            stands: Stands::On,
            content: Arc::new(Mutex::new(Content::new(image.content.clone(), size))),
            used: false,
            kept: false,
        };
        let (disk, size) = (self.disk(), size.to_string());
        let args =
            ["replica", "create", &name, "--image", &image.name, "--disk", &disk, "--size", &size];
        self.made(&name, replica, "create", &args)
    }

    /// Runs what makes a replica.
    fn made(
        &mut self,
        name: &str,
        replica: Replica,
        act: &'static str,
        args: &[&str],
    ) -> Result<()> {
        self.world.state().replicas.insert(name.to_owned(), replica);
        let presence = match self.call(act, args)? {
            Ended::Done(_) => Presence::Here,
            Ended::Refused => Presence::Gone,
            Ended::Cut => Presence::Unknown,
        };
        self.world.with(name, |it| it.presence = presence);
        Ok(())
    }

    fn remove(&mut self) -> Result<()> {
        let few = self.here() < MOST / 2;
        // Also such as are in use: it has to be refused.
        // A client that lost its connection uses none.
        let again = self.hours.again;
        let may = |it: &Replica| if it.used { !again } else { !few && !it.kept };
        let any = self.world.any_replica(&mut self.rng, may);
        let Some((name, replica)) = any else { return Ok(()) };
        let Some(_claim) = self.world.claim(format!("replica/{name}")) else { return Ok(()) };
        if self.world.with(&name, |it| it.presence) != Some(Presence::Here) {
            return Ok(());
        }
        let presence = match self.call("rm", &["replica", "rm", &name])? {
            Ended::Done(_) if replica.used => {
                bail!("replica {name} was removed while a client had it open")
            }
            Ended::Done(_) => Presence::Gone,
            Ended::Refused => Presence::Here,
            Ended::Cut => Presence::Unknown,
        };
        self.world.with(&name, |it| it.presence = presence);
        Ok(())
    }

    fn migrate(&mut self) -> Result<()> {
        let any = self.world.any_replica(&mut self.rng, |_| true);
        let Some((name, _)) = any else { return Ok(()) };
        let (to, rate) = (self.disk(), self.rate());
        let _ =
            self.call("migrate", &["replica", "migrate", &name, "--to", &to, "--rate", &rate])?;
        Ok(())
    }

    fn flatten(&mut self) -> Result<()> {
        let any =
            self.world.any_replica(&mut self.rng, |it| !it.kept && it.stands != Stands::Alone);
        let Some((name, _)) = any else { return Ok(()) };
        let Some(_claim) = self.world.claim(format!("flatten/{name}")) else { return Ok(()) };
        let rate = self.rate();
        self.world.with(&name, |it| it.stands = Stands::Maybe);
        let stands = match self.call("flatten", &["replica", "flatten", &name, "--rate", &rate])? {
            Ended::Done(_) => Stands::Alone,
            // One that was given up may have gone on.
            Ended::Refused | Ended::Cut => return Ok(()),
        };
        self.world.with(&name, |it| it.stands = stands);
        Ok(())
    }

    fn resize(&mut self) -> Result<()> {
        let any = self.world.any_replica(&mut self.rng, |_| true);
        let Some((name, _)) = any else { return Ok(()) };
        let Some(_claim) = self.world.claim(format!("size/{name}")) else { return Ok(()) };
        let size = self.world.with(&name, |it| {
            let image = self.world.sources[it.source].content.len() as u64;
            let now = it.sizes.iter().max().copied().unwrap_or(0);
            (now < image + LARGEST).then(|| {
                it.sizes.push(now + GROWTH);
                (now, now + GROWTH)
            })
        });
        let Some(Some((old, new))) = size else { return Ok(()) };
        let ended = self.call("resize", &["replica", "resize", &name, &new.to_string()])?;
        self.world.with(&name, |it| match ended {
            Ended::Done(_) => {
                it.sizes = vec![new];
                it.content.lock().unwrap_or_else(PoisonError::into_inner).grow(new);
            }
            // What was cut short before may still happen.
            Ended::Refused => it.sizes.retain(|size| *size <= old),
            Ended::Cut => {}
        });
        Ok(())
    }

    fn import_image(&mut self) -> Result<()> {
        // Now and then one that is there: it has to be refused.
        let presence = if self.rng.u8(..6) == 0 { Presence::Here } else { Presence::Gone };
        let any = self.world.any_image(&mut self.rng, presence, |source| !source.kept);
        let Some(source) = any else { return Ok(()) };
        let Some(_claim) = self.world.claim(format!("image/{source}")) else { return Ok(()) };
        if self.world.state().images[source] != presence {
            return Ok(());
        }
        let image = &self.world.sources[source];
        let (name, disk) =
            (format!("--name={}", image.name), format!("--disk={}", self.any_disk()));
        let sent = self.rng.bool();
        let from = if sent { "-" } else { text(&image.file)? };
        let mut args = vec!["image", "import", from, &name, &disk, "--format=raw"];
        if self.rng.u8(..3) == 0 {
            args.push("--copies=2");
        }
        self.world.state().images[source] = Presence::Unknown;
        let input = sent.then(|| image.content.to_vec());
        let now = match self.call_with("import", &args, input)? {
            Ended::Done(_) => Presence::Here,
            // The image may be there, and a second copy of it not.
            Ended::Refused if args.len() > 6 || presence == Presence::Here => Presence::Unknown,
            Ended::Refused => Presence::Gone,
            Ended::Cut => Presence::Unknown,
        };
        let now = if presence == Presence::Here { Presence::Here } else { now };
        self.world.state().images[source] = now;
        Ok(())
    }

    fn remove_image(&mut self) -> Result<()> {
        let any = self.world.any_image(&mut self.rng, Presence::Here, |source| !source.kept);
        let Some(source) = any else { return Ok(()) };
        let Some(_claim) = self.world.claim(format!("image/{source}")) else { return Ok(()) };
        if self.world.state().images[source] != Presence::Here {
            return Ok(());
        }
        let image = &self.world.sources[source];
        let away = self.world.away.load(Ordering::SeqCst);
        let now = match self.call("image rm", &["image", "rm", &image.name])? {
            Ended::Done(_) if away || self.world.away.load(Ordering::SeqCst) => Presence::Unknown,
            Ended::Done(_) => Presence::Gone,
            Ended::Refused => Presence::Here,
            Ended::Cut => Presence::Unknown,
        };
        self.world.state().images[source] = now;
        Ok(())
    }

    fn copy(&mut self) -> Result<()> {
        // So many are wanted from then on: of an image that is kept they would never be fewer again.
        let any = self.world.any_image(&mut self.rng, Presence::Here, |source| !source.kept);
        let Some(source) = any else { return Ok(()) };
        let (image, disk) = (&self.world.sources[source], self.any_disk());
        let _ = self.call("copy", &["image", "copy", &image.name, "--to", &disk])?;
        Ok(())
    }

    fn uncopy(&mut self) -> Result<()> {
        let any = self.world.any_image(&mut self.rng, Presence::Here, |source| !source.kept);
        let Some(source) = any else { return Ok(()) };
        let (image, disk) = (&self.world.sources[source], self.any_disk());
        let mut args = vec!["image", "uncopy", &image.name, "--from", &disk];
        if self.rng.bool() {
            args.push("--force");
        }
        let _ = self.call("uncopy", &args)?;
        Ok(())
    }

    fn drain(&mut self) -> Result<()> {
        let disk = self.any_disk();
        let Some(_claim) = self.world.claim(format!("disk/{disk}")) else { return Ok(()) };
        let rate = self.rate();
        if let Ended::Done(done) = self.call("drain", &["disk", "drain", &disk, "--rate", &rate])? {
            let left = (&done["disk"]["replicas"], &done["disk"]["images"]);
            let left = (left.0.as_u64(), left.1.as_u64());
            ensure!(left == (Some(0), Some(0)), "disk {disk} is drained, but has {left:?}: {done}");
        }
        Ok(())
    }

    fn undrain(&mut self) -> Result<()> {
        let disk = self.any_disk();
        let Some(_claim) = self.world.claim(format!("disk/{disk}")) else { return Ok(()) };
        let _ = self.call("undrain", &["disk", "undrain", &disk])?;
        Ok(())
    }

    /// A replica is exported, and imported under another name.
    fn carry(&mut self) -> Result<()> {
        let idle = |it: &Replica| !it.used && it.stands == Stands::On && it.sizes.len() == 1;
        let any = self.world.any_replica(&mut self.rng, idle);
        let (Some((from, replica)), Some(name)) = (any, self.free_name()) else { return Ok(()) };
        let world = self.world;
        let names = [format!("replica/{name}"), format!("replica/{from}"), format!("size/{from}")];
        let claims: Vec<_> = names.into_iter().filter_map(|name| world.claim(name)).collect();
        let content = replica.content.lock().unwrap_or_else(PoisonError::into_inner).clone();
        if claims.len() < 3 || !content.is_sure() {
            return Ok(());
        }
        let file = self.dir.join(format!("{name}.overlay"));
        let exported =
            self.call("export", &["replica", "export", &from, "--overlay", text(&file)?])?;
        if !matches!(exported, Ended::Done(_)) {
            return Ok(());
        }
        let new = Replica {
            presence: Presence::Unknown,
            stands: Stands::On,
            content: Arc::new(Mutex::new(content)),
            kept: false,
            ..replica
        };
        let disk = self.disk();
        self.made(
            &name,
            new,
            "carry",
            &["replica", "import", text(&file)?, &name, "--disk", &disk],
        )?;
        // One that was cut short may leave none.
        let _ = fs::remove_file(&file);
        Ok(())
    }

    fn cache(&mut self) -> Result<()> {
        if self.rng.u8(..3) == 0 {
            return self.plain("cache", &["cache", "clear"]);
        }
        let any = self.world.any_image(&mut self.rng, Presence::Here, |_| true);
        let Some(source) = any else { return Ok(()) };
        let (image, disk) = (&self.world.sources[source], self.disk());
        self.plain("cache", &["cache", "warm", &image.name, "--disk", &disk, "--all"])
    }

    fn verify(&mut self) -> Result<()> {
        let any = self.world.any_image(&mut self.rng, Presence::Here, |_| true);
        let Some(source) = any else { return Ok(()) };
        self.plain("verify", &["image", "verify", &self.world.sources[source].name])
    }

    fn here(&self) -> usize {
        let state = self.world.state();
        state.replicas.values().filter(|it| !it.kept && it.presence != Presence::Gone).count()
    }

    /// A name that no replica has, if there are not enough of them.
    fn free_name(&mut self) -> Option<String> {
        if self.here() >= MOST {
            return None;
        }
        let state = self.world.state();
        let free =
            |name: &String| state.replicas.get(name).is_none_or(|it| it.presence == Presence::Gone);
        let names: Vec<_> = (0..NAMES).map(|at| format!("r{at}")).filter(free).collect();
        drop(state);
        self.rng.choice(names)
    }

    fn disk(&mut self) -> String {
        self.rng.choice(&self.world.disks).cloned().unwrap_or_default()
    }

    fn any_disk(&mut self) -> String {
        self.rng.choice(&self.world.all_disks).cloned().unwrap_or_default()
    }

    /// Slow enough to be killed in the midst of it, or as fast as it goes.
    fn rate(&mut self) -> String {
        self.rng.choice(["0", "2M", "8M", "32M"]).unwrap_or("0").to_owned()
    }
}
