//! Disks on device-mapper, whose behaviour a test changes while they are in use.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow};

use super::guest::Guest;
use crate::lab::Fs;
use crate::tool::{NO_ARGS, tool};

/// A device-mapper device on a part of a drive, and the file system on it once it has one.
pub struct Mapped {
    /// The device.
    pub path: PathBuf,
    name: String,
    below: PathBuf,
    /// Where its part of the drive begins, and its length, in sectors.
    start: u64,
    sectors: u64,
}

impl Mapped {
    /// Maps `size` bytes from `start` on of the test's disk `disk`, as they are.
    pub fn new(guest: &Guest, name: &str, disk: &str, start: u64, size: u64) -> Result<Mapped> {
        let below = guest.device(disk)?;
        let (start, sectors) = (start / 512, size / 512);
        let table = format!("0 {sectors} linear {} {start}\n", below.display());
        let path = guest.mapped(name, &table)?;
        Ok(Mapped { path, name: name.to_string(), below, start, sectors })
    }

    /// Makes a file system on it and mounts it at `at`, with `options`.
    pub fn format(&self, fs: Fs, at: &Path, options: &str) -> Result<()> {
        make(fs, &self.path)?;
        self.mount(at, options)
    }

    /// Mounts it at `at`.
    pub fn mount(&self, at: &Path, options: &str) -> Result<()> {
        std::fs::create_dir_all(at)?;
        tool("mount", ["-o", options]).args([&self.path, at]).run()
    }

    /// From now on it is what `target` makes of its part of the drive: `BELOW` and `START` stand for
    /// those. I/O that is under way ends as before.
    pub fn become_target(&self, target: &str) -> Result<()> {
        let target = target.replace("BELOW", &self.below.display().to_string());
        let target = target.replace("START", &self.start.to_string());
        self.load(&format!("0 {} {target}\n", self.sectors))
    }

    /// From now on its block `block` (of 4 KiB) fails, and no other.
    pub fn lose(&self, block: u64) -> Result<()> {
        let (below, start) = (self.below.display(), self.start);
        let (from, to) = (block * 8, (block + 1) * 8);
        let mut table = format!("{from} 8 error\n");
        if from > 0 {
            table = format!("0 {from} linear {below} {start}\n{table}");
        }
        if to < self.sectors {
            table += &format!("{to} {} linear {below} {}\n", self.sectors - to, start + to);
        }
        self.load(&table)
    }

    fn load(&self, table: &str) -> Result<()> {
        self.hang()?;
        let loaded = tool("dmsetup", ["load", "--noudevsync", &self.name]).input(table).run();
        self.go_on()?;
        loaded.with_context(|| format!("table {table}"))
    }

    /// It is a plain disk again.
    pub fn heal(&self) -> Result<()> {
        self.become_target("linear BELOW START")
    }

    /// Lets requests wait, and what is under way too.
    pub fn hang(&self) -> Result<()> {
        // Without a flush, and with the file system left as it is: a disk does not announce itself.
        tool("dmsetup", ["suspend", "--noudevsync", "--noflush", "--nolockfs", &self.name]).run()
    }

    /// Lets them go on.
    pub fn go_on(&self) -> Result<()> {
        tool("dmsetup", ["resume", "--noudevsync", &self.name]).run()
    }

    /// Removes it; nothing uses it any more.
    pub fn remove(self) -> Result<()> {
        tool("dmsetup", ["remove", "--noudevsync", &self.name]).run()
    }
}

/// Makes a file system on a device or a file; nothing is written behind the test's back later.
pub fn make(fs: Fs, device: &Path) -> Result<()> {
    let (program, args): (_, &[&str]) = match fs {
        Fs::Ext4 => ("mkfs.ext4", &["-q", "-F", "-m", "0", "-E", "lazy_itable_init=0"]),
        Fs::Xfs => ("mkfs.xfs", &["-q", "-f"]),
        Fs::Btrfs => ("mkfs.btrfs", &["-q", "-f"]),
    };
    tool(program, args).args([device]).run()
}

/// Where block `block` (of 4 KiB) of a file stands on its device, in such blocks.
pub fn place_on_device(file: &Path, block: u64) -> Result<u64> {
    let text = tool("filefrag", ["-v", "-b4096"]).args([file]).out()?;
    find_extent(&text, block).with_context(|| format!("block {block} of {}", file.display()))
}

/// Finds the block in filefrag's table: `0: 16.. 31: 34816.. 34831: 16: ...`.
fn find_extent(text: &str, block: u64) -> Result<u64> {
    for line in text.lines() {
        let columns: Vec<_> = line.split(':').collect();
        let [number, logical, physical, ..] = columns[..] else { continue };
        let range = |text: &str| -> Option<(u64, u64)> {
            let (first, last) = text.split_once("..")?;
            Some((first.trim().parse().ok()?, last.trim().parse().ok()?))
        };
        let (Ok(_), Some((first, last)), Some((start, _))) =
            (number.trim().parse::<u64>(), range(logical), range(physical))
        else {
            continue;
        };
        if (first..=last).contains(&block) {
            return Ok(start + block - first);
        }
    }
    Err(anyhow!("filefrag shows no extent with it: {text}"))
}

/// Forgets what the kernel has read and not changed.
pub fn drop_caches() -> Result<()> {
    tool("sync", NO_ARGS).run()?;
    std::fs::write("/proc/sys/vm/drop_caches", "3").context("dropping caches")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn filefrag_tells_where_a_block_is() {
        let text = "Filesystem type is: ef53\nFile size of data is 33554432 (8192 blocks)\n \
             ext:     logical_offset:        physical_offset: length:   expected: flags:\n   \
             0:        0..       4:      34816..     34820:      5:            \n   \
             1:       16..      31:      40000..     40015:     16:      34832: last,eof\n";
        assert_eq!(find_extent(text, 3).unwrap(), 34819);
        assert_eq!(find_extent(text, 16).unwrap(), 40000);
        assert!(find_extent(text, 5).is_err());
    }
}
