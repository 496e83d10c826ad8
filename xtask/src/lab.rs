//! The laboratory of one run: its lock, its directories, its loop disks; and the sweep that leaves
//! the machine as it was, also after a run that was killed.
//!
//! Invariants:
//! - One run at a time in one target directory: the lock is held while a [`Lab`] lives.
//! - Whatever is mounted, attached or started lies beneath `target/rig/run` (or the run's directory
//!   of sockets), is found there by [`sweep`], and nothing else is touched.

use std::fs::{self, DirBuilder, File};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use anyhow::{Context, Result, anyhow, bail};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use crate::tool::{self, tool};
use crate::{place, report};

/// How the directories of sockets begin. They are in the system's temporary directory because the
/// path of a Unix socket has room for 107 bytes only.
const SOCKETS: &str = "underlay-rig-";

/// Whether this process has the place.
static OURS: AtomicBool = AtomicBool::new(false);

/// The place where one run of the rigs happens.
pub struct Lab {
    run: PathBuf,
    sockets: PathBuf,
    _lock: File,
}

impl Lab {
    /// Takes the lock and clears away what an earlier run left.
    pub fn open() -> Result<Lab> {
        let run = place::run();
        fs::create_dir_all(&run).with_context(|| format!("creating {}", run.display()))?;
        fs::create_dir_all(place::cache())?;
        let lock = File::create(place::target().join("rig/lock")).context("creating rig/lock")?;
        if lock.try_lock().is_err() {
            report::say("waiting for another cargo xtask in this target directory");
            lock.lock().context("locking rig/lock")?;
        }
        OURS.store(true, Ordering::SeqCst);
        sweep()?;
        fs::create_dir_all(&run)?;
        let sockets = std::env::temp_dir().join(format!("{SOCKETS}{}", std::process::id()));
        let made = DirBuilder::new().mode(0o700).recursive(true).create(&sockets);
        made.with_context(|| format!("creating {}", sockets.display()))?;
        Ok(Lab { run, sockets, _lock: lock })
    }

    /// A new, empty directory of this run.
    pub fn dir(&self, name: &str) -> Result<PathBuf> {
        let dir = self.run.join(name);
        if dir.exists() {
            fs::remove_dir_all(&dir).with_context(|| format!("removing {}", dir.display()))?;
        }
        fs::create_dir_all(&dir).with_context(|| format!("creating {}", dir.display()))?;
        Ok(dir)
    }

    /// A path for a Unix socket, short enough to be one.
    pub fn socket(&self, name: &str) -> PathBuf {
        self.sockets.join(name)
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        if let Err(error) = sweep() {
            report::say(&format!("not everything could be cleared away: {error:#}"));
        }
    }
}

/// Cleans up when the run is interrupted.
pub fn heed_signals() -> Result<()> {
    let mut signals = Signals::new([SIGINT, SIGTERM, SIGHUP]).context("heeding signals")?;
    thread::spawn(move || {
        if let Some(signal) = signals.forever().next() {
            report::say(&format!("interrupted (signal {signal}): clearing away"));
            tool::kill_all();
            // Who only waits for the place has left nothing there.
            if OURS.load(Ordering::SeqCst)
                && let Err(error) = sweep()
            {
                report::say(&format!("not everything could be cleared away: {error:#}"));
            }
            std::process::exit(128 + signal);
        }
    });
    Ok(())
}

/// Ends the processes, mounts and loop devices of the run, and removes its files.
fn sweep() -> Result<()> {
    let run = place::run();
    tool::end_recorded()?;
    for mount in mounts_beneath(&run)?.iter().rev() {
        let plain = tool("umount", [mount]).run();
        if plain.is_err() {
            tool("umount", ["-l".as_ref(), mount.as_os_str()]).run()?;
        }
    }
    for device in loops_beneath(&run) {
        tool("losetup", ["-d", &device]).run()?;
    }
    if run.exists() {
        keep_logs(&run)?;
        fs::remove_dir_all(&run).with_context(|| format!("removing {}", run.display()))?;
    }
    for entry in fs::read_dir(std::env::temp_dir())?.flatten() {
        let name = entry.file_name();
        let id = name.to_str().and_then(|name| name.strip_prefix(SOCKETS)?.parse::<u32>().ok());
        if let Some(id) = id
            && (id == std::process::id() || !Path::new(&format!("/proc/{id}")).exists())
        {
            let _ = fs::remove_dir_all(entry.path());
        }
    }
    Ok(())
}

/// Copies the logs of the run to `target/rig/logs`, where they stay until the next run.
fn keep_logs(run: &Path) -> Result<()> {
    let logs = place::target().join("rig/logs");
    let _ = fs::remove_dir_all(&logs);
    fs::create_dir_all(&logs).with_context(|| format!("creating {}", logs.display()))?;
    for rig in fs::read_dir(run)?.flatten() {
        let Ok(files) = fs::read_dir(rig.path()) else { continue };
        for file in files.flatten().map(|entry| entry.path()) {
            if file.extension().is_some_and(|end| end == "log" || end == "console") {
                let name = file.file_name().unwrap_or_default().to_string_lossy();
                let name = format!("{}-{name}", rig.file_name().to_string_lossy());
                fs::copy(&file, logs.join(name))?;
            }
        }
    }
    Ok(())
}

/// Mount points beneath `dir`, in the order in which they were mounted.
fn mounts_beneath(dir: &Path) -> Result<Vec<PathBuf>> {
    let table = fs::read_to_string("/proc/self/mountinfo").context("reading mountinfo")?;
    let points = table.lines().filter_map(|line| line.split(' ').nth(4));
    let points = points.map(|point| PathBuf::from(point.replace("\\040", " ")));
    Ok(points.filter(|point| point.starts_with(dir)).collect())
}

/// Loop devices whose backing file is, or was, beneath `dir`.
fn loops_beneath(dir: &Path) -> Vec<String> {
    let Ok(entries) = fs::read_dir("/sys/block") else { return Vec::new() };
    let names = entries.flatten().filter_map(|entry| entry.file_name().into_string().ok());
    let ours = |name: &String| {
        let file = fs::read_to_string(format!("/sys/block/{name}/loop/backing_file"));
        name.starts_with("loop") && file.is_ok_and(|file| Path::new(file.trim()).starts_with(dir))
    };
    names.filter(ours).map(|name| format!("/dev/{name}")).collect()
}

/// A file system that a loop disk may hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fs {
    /// ext4, its tables initialised at once, so that nothing is written behind a measurement.
    Ext4,
    /// xfs.
    Xfs,
    /// btrfs.
    Btrfs,
}

/// A file attached to a loop device with a mounted file system: one disk, one failure domain.
pub struct LoopDisk {
    /// Where it is mounted.
    pub path: PathBuf,
    device: String,
    file: PathBuf,
}

impl LoopDisk {
    /// Makes the disk `name` of `size` bytes (sparse) in `dir`, and mounts it at `dir/name`.
    pub fn new(dir: &Path, name: &str, size: u64, fs: Fs) -> Result<LoopDisk> {
        let file = dir.join(format!("{name}.disk"));
        let made = File::create(&file).and_then(|file| file.set_len(size));
        made.with_context(|| format!("making {}", file.display()))?;
        match fs {
            Fs::Ext4 => tool("mkfs.ext4", ["-q", "-F", "-m", "0"])
                .args(["-E", "lazy_itable_init=0,lazy_journal_init=0"])
                .args([&file])
                .run()?,
            Fs::Xfs => tool("mkfs.xfs", ["-q", "-f"]).args([&file]).run()?,
            Fs::Btrfs => tool("mkfs.btrfs", ["-q", "-f"]).args([&file]).run()?,
        }
        LoopDisk::attach(dir, name)
    }

    /// Attaches and mounts a disk made before.
    pub fn attach(dir: &Path, name: &str) -> Result<LoopDisk> {
        let file = dir.join(format!("{name}.disk"));
        let path = dir.join(name);
        let device = tool("losetup", ["--find", "--show"]).args([&file]).out()?.trim().to_string();
        // From here on the guard takes the device along if mounting fails.
        let disk = LoopDisk { path, device, file };
        fs::create_dir_all(&disk.path)?;
        tool("mount", [&disk.device]).args([&disk.path]).run()?;
        Ok(disk)
    }

    /// Lets its I/O go past the page cache of what it stands on: only then is it as slow as that.
    pub fn direct(&self) -> Result<()> {
        tool("losetup", ["--direct-io=on", &self.device]).run()
    }

    /// Mounts it again with other options (`ro`, `rw`).
    pub fn remount(&self, options: &str) -> Result<()> {
        tool("mount", ["-o", &format!("remount,{options}")]).args([&self.path]).run()
    }

    /// Bytes written to the device since it was attached.
    pub fn written(&self) -> Result<u64> {
        let name = self.device.trim_start_matches("/dev/");
        let path = format!("/sys/block/{name}/stat");
        let stat = fs::read_to_string(&path).with_context(|| format!("reading {path}"))?;
        let sectors = stat.split_whitespace().nth(6).and_then(|field| field.parse::<u64>().ok());
        sectors.map(|count| count * 512).ok_or_else(|| anyhow!("{path}: no 7th field: {stat}"))
    }

    /// Bytes that its file system holds.
    pub fn used(&self) -> Result<u64> {
        let all = nix::sys::statvfs::statvfs(&self.path).context("statvfs")?;
        Ok((all.blocks() - all.blocks_free()) * all.fragment_size())
    }

    fn detach(&self) -> Result<()> {
        if mounts_beneath(&self.path)?.is_empty() {
            return self.release();
        }
        if tool("umount", [&self.path]).run().is_err() {
            tool("umount", ["-l".as_ref(), self.path.as_os_str()]).run()?;
        }
        self.release()
    }

    fn release(&self) -> Result<()> {
        let name = self.device.trim_start_matches("/dev/");
        if !Path::new(&format!("/sys/block/{name}/loop")).exists() {
            return Ok(());
        }
        tool("losetup", ["-d", &self.device]).run()
    }
}

impl Drop for LoopDisk {
    fn drop(&mut self) {
        if let Err(error) = self.detach() {
            report::say(&format!("disk {}: {error:#}", self.file.display()));
        }
    }
}

/// Whether loop devices can be used here; if not, why.
pub fn loop_disks() -> Result<()> {
    if !nix::unistd::geteuid().is_root() {
        bail!("loop disks need root");
    }
    if !Path::new("/dev/loop-control").exists() {
        bail!("this kernel offers no loop devices (/dev/loop-control)");
    }
    Ok(())
}
