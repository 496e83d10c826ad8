//! A load on a file system as fsstress makes it, and unlike it one that knows what must come of it.
//!
//! Threads create, write, truncate, punch, rename, link, unlink and sync, each in a directory of its
//! own, for some time. Afterwards [`Tree::check`] finds each directory, each name and each byte as
//! they were left; best on a file system that was unmounted in between.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use fastrand::Rng;
use nix::fcntl::{FallocateFlags, OFlag, fallocate};

use crate::pattern;

/// Threads.
const THREADS: u64 = 4;
/// The most names that each has at a time, and the most that a file holds, in bytes.
const NAMES: usize = 32;
const LONGEST: usize = 512 << 10;
/// The most that one write writes, in bytes.
const PIECE: usize = 160 << 10;

/// What the directories hold.
pub struct Tree {
    directories: Vec<Directory>,
}

/// One thread's part.
struct Directory {
    path: PathBuf,
    /// The names; those of one file hold one number.
    names: BTreeMap<String, u64>,
    files: BTreeMap<u64, Vec<u8>>,
    next: u64,
    operations: u64,
}

/// Puts load on the file system at `root` for `time`.
pub fn load(root: &Path, seed: u64, time: Duration) -> Result<Tree> {
    let until = Instant::now() + time;
    let threads: Vec<_> = (0..THREADS)
        .map(|id| {
            let path = root.join(format!("t{id}"));
            let mut rng = Rng::with_seed(seed << 8 | id);
            thread::spawn(move || -> Result<Directory> {
                fs::create_dir(&path)?;
                let (names, files) = (BTreeMap::new(), BTreeMap::new());
                let mut all = Directory { path, names, files, next: 0, operations: 0 };
                while Instant::now() < until {
                    all.step(&mut rng)?;
                    all.operations += 1;
                }
                Ok(all)
            })
        })
        .collect();
    // All of them, before any is asked how it went.
    let ended: Vec<_> = threads.into_iter().map(thread::JoinHandle::join).collect();
    let directories = ended.into_iter().map(|end| end.map_err(|_| anyhow!("a thread panicked"))?);
    Ok(Tree { directories: directories.collect::<Result<_>>()? })
}

impl Tree {
    /// Everything is as it was left; how much that is.
    pub fn check(&self) -> Result<String> {
        for directory in &self.directories {
            directory.check()?;
        }
        let sum =
            |count: fn(&Directory) -> usize| self.directories.iter().map(count).sum::<usize>();
        let bytes = sum(|it| it.files.values().map(Vec::len).sum());
        Ok(format!(
            "{} operations, {} names, {} MiB",
            sum(|it| it.operations as usize),
            sum(|it| it.names.len()),
            bytes >> 20
        ))
    }
}

impl Directory {
    fn step(&mut self, rng: &mut Rng) -> Result<()> {
        let Some(name) = rng.choice(self.names.keys()).cloned() else { return self.create(rng) };
        let what = rng.u8(..20);
        let step = match what {
            0..=2 if self.names.len() < NAMES => self.create(rng),
            0 | 1 => self.unlink(&name),
            2 => self.rename(&name, rng),
            3 if self.names.len() < NAMES => self.link(&name),
            4 => self.rename(&name, rng),
            5 => self.truncate(&name, rng),
            6 | 7 => self.punch(&name, rng),
            8 => self.open(&name).and_then(|file| file.sync_all()).map_err(Into::into),
            9 => self.write_direct(&name, rng),
            10 => self.unlink(&name),
            11 | 12 => self.read(&name, rng),
            _ => self.write(&name, rng),
        };
        step.with_context(|| format!("step {what} on {}", self.path.join(&name).display()))
    }

    fn create(&mut self, rng: &mut Rng) -> Result<()> {
        let name = self.fresh();
        let mut bytes = vec![0; rng.usize(..LONGEST / 8)];
        rng.fill(&mut bytes);
        fs::write(self.path.join(&name), &bytes)?;
        self.names.insert(name, self.next);
        self.files.insert(self.next, bytes);
        Ok(())
    }

    fn write(&mut self, name: &str, rng: &mut Rng) -> Result<()> {
        let mut data = vec![0; rng.usize(1..=PIECE)];
        rng.fill(&mut data);
        let at = rng.usize(..LONGEST - data.len());
        self.open(name)?.write_all_at(&data, at as u64)?;
        self.put(name, at, &data)
    }

    /// Past the page cache: whole blocks, at an aligned place.
    fn write_direct(&mut self, name: &str, rng: &mut Rng) -> Result<()> {
        let len = rng.usize(1..=PIECE / 4096) * 4096;
        let mut memory = vec![0; len + 4096];
        let skip = memory.as_ptr().align_offset(4096);
        rng.fill(&mut memory);
        let at = rng.usize(..(LONGEST - len) / 4096) * 4096;
        let data = &memory[skip..skip + len];
        let mut options = OpenOptions::new();
        let direct = options.write(true).custom_flags(OFlag::O_DIRECT.bits());
        // Not every file system knows of that.
        let file = direct.open(self.path.join(name)).or_else(|_| self.open(name))?;
        file.write_all_at(data, at as u64)?;
        self.put(name, at, data)
    }

    fn read(&self, name: &str, rng: &mut Rng) -> Result<()> {
        let bytes = self.bytes(name)?;
        let at = rng.usize(..=bytes.len());
        let end = bytes.len().min(at + PIECE);
        let mut found = vec![0; end - at];
        self.open(name)?.read_exact_at(&mut found, at as u64)?;
        let differ = pattern::differ(&found, &bytes[at..end]);
        ensure!(differ.is_none(), "byte {} differs", at + differ.unwrap_or(0));
        Ok(())
    }

    fn truncate(&mut self, name: &str, rng: &mut Rng) -> Result<()> {
        let len = rng.usize(..LONGEST);
        self.open(name)?.set_len(len as u64)?;
        self.bytes_mut(name)?.resize(len, 0);
        Ok(())
    }

    fn punch(&mut self, name: &str, rng: &mut Rng) -> Result<()> {
        let (at, len) = (rng.usize(..LONGEST), rng.usize(1..=PIECE));
        let how = match rng.bool() {
            true => FallocateFlags::FALLOC_FL_PUNCH_HOLE,
            false => FallocateFlags::FALLOC_FL_ZERO_RANGE,
        };
        let how = how | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        fallocate(&self.open(name)?, how, at as i64, len as i64)?;
        let bytes = self.bytes_mut(name)?;
        let end = bytes.len().min(at + len);
        if at < end {
            bytes[at..end].fill(0);
        }
        Ok(())
    }

    fn link(&mut self, name: &str) -> Result<()> {
        let new = self.fresh();
        fs::hard_link(self.path.join(name), self.path.join(&new))?;
        let file = self.number(name)?;
        self.names.insert(new, file);
        Ok(())
    }

    /// To a name of no file, or in the place of another.
    fn rename(&mut self, name: &str, rng: &mut Rng) -> Result<()> {
        let other = rng.choice(self.names.keys()).filter(|_| rng.bool()).cloned();
        let new = other.unwrap_or_else(|| self.fresh());
        let file = self.number(name)?;
        fs::rename(self.path.join(name), self.path.join(&new))?;
        // Two names of one file: then nothing happens at all.
        if self.names.get(&new) != Some(&file) {
            self.names.remove(name);
            let old = self.names.insert(new, file);
            self.forget(old);
        }
        Ok(())
    }

    fn unlink(&mut self, name: &str) -> Result<()> {
        fs::remove_file(self.path.join(name))?;
        let old = self.names.remove(name);
        self.forget(old);
        Ok(())
    }

    fn forget(&mut self, file: Option<u64>) {
        if let Some(file) = file
            && !self.names.values().any(|other| *other == file)
        {
            self.files.remove(&file);
        }
    }

    fn fresh(&mut self) -> String {
        self.next += 1;
        format!("f{}", self.next)
    }

    fn open(&self, name: &str) -> io::Result<File> {
        OpenOptions::new().read(true).write(true).open(self.path.join(name))
    }

    fn number(&self, name: &str) -> Result<u64> {
        self.names.get(name).copied().context("no such name")
    }

    fn bytes(&self, name: &str) -> Result<&Vec<u8>> {
        self.files.get(&self.number(name)?).context("no such file")
    }

    fn bytes_mut(&mut self, name: &str) -> Result<&mut Vec<u8>> {
        let number = self.number(name)?;
        self.files.get_mut(&number).context("no such file")
    }

    fn put(&mut self, name: &str, at: usize, data: &[u8]) -> Result<()> {
        let bytes = self.bytes_mut(name)?;
        bytes.resize(bytes.len().max(at + data.len()), 0);
        bytes[at..at + data.len()].copy_from_slice(data);
        Ok(())
    }

    fn check(&self) -> Result<()> {
        let mut found = BTreeSet::new();
        for entry in fs::read_dir(&self.path)? {
            found.insert(entry?.file_name().to_string_lossy().into_owned());
        }
        let names: BTreeSet<_> = self.names.keys().cloned().collect();
        let wrong: Vec<_> = names.symmetric_difference(&found).collect();
        ensure!(wrong.is_empty(), "{}: {wrong:?} lost or too many", self.path.display());
        for (name, file) in &self.names {
            let path = self.path.join(name);
            let links = self.names.values().filter(|other| *other == file).count();
            let counted = fs::metadata(&path)?.nlink();
            ensure!(counted == links as u64, "{}: {counted} links, not {links}", path.display());
            let bytes = fs::read(&path).with_context(|| path.display().to_string())?;
            if let Some(at) = pattern::differ(&bytes, self.bytes(name)?) {
                return Err(anyhow!("{}: byte {at} differs", path.display()));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_left_is_there_and_damage_is_found() {
        let root = std::env::temp_dir().join(format!("stress-{}", std::process::id()));
        fs::create_dir(&root).unwrap();
        let tree = load(&root, 1, Duration::from_millis(300)).unwrap();
        tree.check().unwrap();
        let directory = &tree.directories[0];
        let (name, _) =
            directory.names.iter().find(|(_, it)| !directory.files[it].is_empty()).unwrap();
        let file = directory.open(name).unwrap();
        let first = directory.bytes(name).unwrap()[0];
        file.write_all_at(&[!first], 0).unwrap();
        assert!(tree.check().is_err());
        file.write_all_at(&[first], 0).unwrap();
        tree.check().unwrap();
        fs::remove_file(directory.path.join(name)).unwrap();
        assert!(tree.check().is_err());
        fs::remove_dir_all(&root).unwrap();
    }
}
