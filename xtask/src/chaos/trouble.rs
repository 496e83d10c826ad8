//! What befalls disks, one thing at a time, so that of two copies one is always well: what it is, how it
//! begins, and how it ends.

use std::fmt::{self, Display};
use std::fs::{self, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use fastrand::Rng;

use super::world::World;
use crate::load::CHUNK;
use crate::slow::{Illness, SlowDisk};

/// Chunks that are damaged at a time, at most.
const DAMAGED: usize = 12;

/// What happens.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// Many reads of a disk take longer.
    Slow,
    /// Many of its reads fail.
    Fails,
    /// It answers nothing.
    Silent,
    /// Its device is pulled, and plugged again after the daemon was started without it.
    Pulled,
    /// Bits of a copy flip.
    Damage,
    /// Bits of a cache flip.
    CacheDamage,
    /// The daemon is killed, and started with the agent or without.
    Killed,
}

/// Everything that can happen, what is mild more often.
const ALL: [Kind; 9] = [
    Kind::Slow,
    Kind::Fails,
    Kind::Fails,
    Kind::Silent,
    Kind::Silent,
    Kind::Pulled,
    Kind::Damage,
    Kind::CacheDamage,
    Kind::Killed,
];

impl Kind {
    /// Things in an order that the seed decides: each happens before one happens again.
    pub fn deck(rng: &mut Rng) -> Vec<Kind> {
        let mut deck = ALL.to_vec();
        rng.shuffle(&mut deck);
        deck
    }

    /// What a disk suffers, if it is that.
    pub fn illness(self, rng: &mut Rng) -> Option<Illness> {
        match self {
            Kind::Slow => Some(Illness::Slow(rng.u64(5..60), rng.u32(2..=100))),
            Kind::Fails => Some(Illness::Fails(rng.u32(5..=100))),
            Kind::Silent => Some(Illness::Silent),
            _ => None,
        }
    }
}

impl Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Kind::Slow => "slow",
            Kind::Fails => "fails",
            Kind::Silent => "silent",
            Kind::Pulled => "pulled",
            Kind::Damage => "damage",
            Kind::CacheDamage => "cache damage",
            Kind::Killed => "killed",
        })
    }
}

/// A disk that can be ill, or away.
pub struct Patient {
    /// Its name.
    pub name: &'static str,
    dir: PathBuf,
    disk: Option<SlowDisk>,
}

impl Patient {
    /// Makes the disk in `dir`.
    pub fn new(dir: &Path, name: &'static str, size: u64) -> Result<Patient> {
        let disk = Some(SlowDisk::new(dir, name, size)?);
        Ok(Patient { name, dir: dir.to_owned(), disk })
    }

    /// Where it is mounted.
    pub fn path(&self) -> PathBuf {
        self.dir.join(self.name)
    }

    /// It falls ill, or gets well.
    pub fn suffers(&self, illness: Illness) -> Result<()> {
        self.disk.as_ref().context("the disk is away")?.suffers(illness)
    }

    /// Its device is gone: all that is asked of it fails.
    pub fn pull(&mut self) -> Result<()> {
        self.disk.as_mut().context("the disk is away")?.pull()
    }

    /// Nothing is mounted there any more.
    pub fn leave(&mut self) {
        self.disk = None;
    }

    /// It is back.
    pub fn plug(&mut self) -> Result<()> {
        self.disk = Some(SlowDisk::plug(&self.dir, self.name)?);
        Ok(())
    }
}

/// A copy with bits that flipped.
pub struct Damage {
    file: PathBuf,
    /// The image.
    pub source: usize,
    chunks: Vec<u64>,
}

impl Damage {
    /// Flips bits in some chunks of a copy on the disk at `root`, if there is one: behind everybody's back.
    pub fn copy(world: &World, root: &Path, rng: &mut Rng) -> Result<Option<Damage>> {
        let images = fs::read_dir(root.join("underlay/images"))?;
        let files: Vec<PathBuf> = images.flatten().map(|entry| entry.path().join("data")).collect();
        let Some(file) = rng.choice(files) else { return Ok(None) };
        let Ok(stored) = fs::read(&file) else { return Ok(None) };
        let whole = |at: &usize| *world.sources[*at].content == stored;
        let Some(source) = (0..world.sources.len()).find(whole) else { return Ok(None) };
        // It may have gone meanwhile.
        let Ok(open) = OpenOptions::new().write(true).open(&file) else { return Ok(None) };
        let count = rng.usize(1..=DAMAGED);
        // What is zeros is known without being read.
        let data = |chunk: &u64| {
            let at = (*chunk * CHUNK) as usize;
            stored[at..(at + CHUNK as usize).min(stored.len())].iter().any(|byte| *byte != 0)
        };
        let all = (0..(stored.len() as u64).div_ceil(CHUNK)).filter(data);
        let chunks = rng.choose_multiple(all, count);
        for chunk in &chunks {
            let end = ((chunk + 1) * CHUNK).min(stored.len() as u64);
            let at = rng.u64(chunk * CHUNK..end);
            open.write_all_at(&[stored[at as usize] ^ 1 << rng.u32(..8)], at)?;
        }
        open.sync_all()?;
        Ok(Some(Damage { file, source, chunks }))
    }

    /// How many chunks are damaged.
    pub fn chunks(&self) -> usize {
        self.chunks.len()
    }

    /// Puts what belongs there into its place, where no other copy could have been the source for that.
    pub fn undo(&self, world: &World) -> Result<()> {
        let Ok(open) = OpenOptions::new().write(true).open(&self.file) else { return Ok(()) };
        let content = &world.sources[self.source].content;
        for chunk in &self.chunks {
            let at = (chunk * CHUNK) as usize;
            let end = (at + CHUNK as usize).min(content.len());
            open.write_all_at(&content[at..end], at as u64)?;
        }
        Ok(open.sync_all()?)
    }
}

/// Flips bits all over a cache on the disk at `root`. Whether there is one.
pub fn damage_cache(root: &Path, rng: &mut Rng) -> Result<bool> {
    let caches = fs::read_dir(root.join("underlay/cache"))?;
    let files: Vec<PathBuf> = caches.flatten().map(|entry| entry.path().join("data")).collect();
    let Some(file) = rng.choice(files) else { return Ok(false) };
    let Ok(open) = OpenOptions::new().write(true).open(&file) else { return Ok(false) };
    let len = open.metadata()?.len();
    for _ in 0..40.min(len / 512) {
        open.write_all_at(&[rng.u8(..); 512], rng.u64(..len / 512) * 512)?;
    }
    open.sync_all()?;
    Ok(len > 0)
}
