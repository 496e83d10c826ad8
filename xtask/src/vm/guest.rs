//! What a test has inside of the guest: its disks, the daemon, and a way to tell how it went.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use anyhow::{Context, Result, anyhow, bail};
use serde_json::Value;

use super::wire::{Event, Speaker, State};
use super::{Disk, Test};
use crate::daemon::Daemon;
use crate::lab::{Fs, Lab};
use crate::place::Profile;
use crate::report::Unfit;
use crate::setup;
use crate::tool::tool;

/// The name of the drive that holds what a test told before a power cut.
pub const LEDGER: &str = "ledger";

/// The guest, as one test sees it.
pub struct Guest {
    /// The laboratory within: directories, sockets, and their sweep.
    pub lab: Lab,
    /// How often the power was cut before.
    pub phase: u64,
    /// Whether it will not be cut again: the test ends by itself.
    pub last: bool,
    /// The seed of what is random.
    pub seed: u64,
    /// Whether a test that can shall promise more than it was promised, and so must fail.
    pub overclaim: bool,
    /// How many of its checks failed.
    pub failed: u64,
    test: &'static Test,
    dir: PathBuf,
    speaker: Arc<Mutex<Speaker>>,
}

impl Guest {
    /// Prepares the guest for `test`.
    pub fn new(test: &'static Test, speaker: Arc<Mutex<Speaker>>) -> Result<Guest> {
        let lab = Lab::open()?;
        let dir = lab.dir(test.name)?;
        Ok(Guest {
            lab,
            phase: 0,
            last: true,
            seed: 1,
            overclaim: false,
            failed: 0,
            test,
            dir,
            speaker,
        })
    }

    /// Runs one check; it passes, fails or is skipped (with [`Unfit`] as its error) as in `Report`.
    /// Returns whether it passed.
    pub fn check(
        &mut self,
        name: &str,
        check: impl FnOnce(&mut Guest) -> Result<String>,
    ) -> Result<bool> {
        let start = Instant::now();
        let outcome = check(self);
        let seconds = start.elapsed().as_secs_f64();
        let (state, detail) = match outcome {
            Ok(figures) => (State::Ok, figures),
            Err(error) if error.is::<Unfit>() => (State::Skipped, error.to_string()),
            Err(error) => (State::Failed, format!("{error:#}")),
        };
        self.failed += u64::from(state == State::Failed);
        let name = format!("{}: {name}", self.test.name);
        self.say(&Event::Check { name, state, detail, seconds })?;
        Ok(state == State::Ok)
    }

    /// Skips the check (as its error) unless each of `programs` is in the guest.
    pub fn need(&self, programs: &[&str]) -> Result<()> {
        setup::need(programs).map_err(|error| Unfit(format!("{error:#}")).into())
    }

    /// A line for the ledger: the host has it when this returns, and gives it to the next boot.
    pub fn tell(&self, line: &str) -> Result<()> {
        self.say(&Event::Ledger(line.to_string()))
    }

    /// Gives the host something that was measured.
    pub fn figure(&self, value: Value) -> Result<()> {
        self.say(&Event::Figure(value))
    }

    /// What the kernel's command line says of `key`.
    pub fn word(&self, key: &str) -> Option<String> {
        let line = fs::read_to_string("/proc/cmdline").ok()?;
        let mut words = line.split_whitespace();
        words.find_map(|word| Some(word.strip_prefix(key)?.strip_prefix('=')?.to_string()))
    }

    /// What was told in earlier boots.
    pub fn told(&self) -> Result<String> {
        let device = by_name(LEDGER)?;
        let bytes = fs::read(&device).with_context(|| format!("reading {}", device.display()))?;
        String::from_utf8(bytes).context("the ledger is not text")
    }

    /// Lets the host cut the power from now on.
    pub fn ready(&self) -> Result<()> {
        self.say(&Event::Ready)
    }

    /// The block device of a disk that the test asked for.
    pub fn device(&self, disk: &str) -> Result<PathBuf> {
        by_name(&format!("disk{}", self.disk(disk)?.0))
    }

    fn disk(&self, name: &str) -> Result<(usize, &'static Disk)> {
        let found = self.test.disks.iter().enumerate().find(|(_, disk)| disk.name == name);
        found.ok_or_else(|| anyhow!("test {} has no disk {name:?}", self.test.name))
    }

    /// Makes the file system that the test asked for on a disk, and mounts it.
    pub fn format(&self, disk: &str) -> Result<PathBuf> {
        let known = self.disk(disk)?.1;
        let device = self.device(disk)?;
        let (program, args): (_, &[&str]) = match known.fs {
            Fs::Ext4 => ("mkfs.ext4", &["-q", "-F", "-m", "0"]),
            Fs::Xfs => ("mkfs.xfs", &["-q", "-f"]),
            Fs::Btrfs => ("mkfs.btrfs", &["-q", "-f"]),
        };
        self.need(&[program])?;
        tool(program, args).args([&device]).run()?;
        self.mount(disk)
    }

    /// Loads a module that is kept for those who ask; skips the check if the kernel has none.
    pub fn load(&self, module: &str) -> Result<()> {
        let Ok(order) = fs::read_to_string(format!("/modules/{module}.order")) else {
            return Err(Unfit(format!("the guest's kernel has no {module}")).into());
        };
        for name in order.lines() {
            if !Path::new("/sys/module").join(name).exists() {
                tool("insmod", [format!("/modules/{name}.ko")]).run()?;
            }
        }
        Ok(())
    }

    /// Mounts a disk that was formatted before.
    pub fn mount(&self, disk: &str) -> Result<PathBuf> {
        if self.disk(disk)?.1.fs == Fs::Btrfs {
            self.load("btrfs")?;
        }
        let path = self.dir.join(disk);
        self.mount_device(&self.device(disk)?, &path)?;
        Ok(path)
    }

    /// Makes the device-mapper device `name` of a table; skips the check if a target of it is not
    /// there. The test removes it (`dmsetup remove --noudevsync NAME`).
    pub fn mapped(&self, name: &str, table: &str) -> Result<PathBuf> {
        self.need(&["dmsetup"])?;
        let known = tool("dmsetup", ["targets"]).out()?;
        for target in table.lines().filter_map(|line| line.split_whitespace().nth(2)) {
            if !known.lines().any(|line| line.split_whitespace().next() == Some(target)) {
                return Err(Unfit(format!("the guest's kernel has no dm-{target}")).into());
            }
        }
        tool("dmsetup", ["create", "--noudevsync", name]).input(table).run()?;
        // There is no udev that would make the node.
        tool("dmsetup", ["mknodes", name]).run()?;
        Ok(Path::new("/dev/mapper").join(name))
    }

    /// Mounts any device at `path`; it is unmounted after the test, whatever happens.
    pub fn mount_device(&self, device: &Path, path: &Path) -> Result<()> {
        fs::create_dir_all(path)?;
        tool("mount", [device, path]).run()
    }

    /// A directory for this test, in memory; all of it goes when the test is over.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Starts the daemon on an empty state in memory, with these lines of TOML as its settings.
    pub fn daemon(&self, settings: &str) -> Result<Daemon> {
        self.daemon_in(&self.dir, settings)
    }

    /// Starts the daemon with its state and log in `dir`, which may be on a disk and hold those of
    /// an earlier one.
    pub fn daemon_in(&self, dir: &Path, settings: &str) -> Result<Daemon> {
        // No promotion: what is read from a disk that fails must come from that disk.
        let settings = format!("cache_percent = 0\nprobes = false\n{settings}");
        Daemon::start(&self.lab, dir, self.test.name, Profile::Release, &settings)
    }

    fn say(&self, event: &Event) -> Result<()> {
        self.speaker.lock().unwrap_or_else(PoisonError::into_inner).say(event)
    }
}

/// The virtio disk with this serial number.
fn by_name(name: &str) -> Result<PathBuf> {
    for entry in fs::read_dir("/sys/block").context("reading /sys/block")?.flatten() {
        let serial = fs::read_to_string(entry.path().join("serial")).unwrap_or_default();
        if serial.trim() == name {
            return Ok(Path::new("/dev").join(entry.file_name()));
        }
    }
    bail!("this machine has no drive {name:?}")
}
