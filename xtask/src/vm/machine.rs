//! One run of the guest: the emulator with its drives, and an ear for what it tells.
//!
//! Killing it is a power cut for what its kernel and programs held. A drive is either `Plain`, which
//! keeps what it was given, as a disk without a cache of its own does; or `Volatile`, which keeps it
//! only from a flush (or a write with FUA) on, as the worst of disks with a write cache does: between
//! the emulator and the file stands nbdkit's cache filter, which dies with the power.

use std::fs;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::wire::{Event, Listener, PORT};
use crate::image::Kernel;
use crate::lab::Lab;
use crate::tool::{Process, tool};

/// How long the emulator of a cache may take until it listens.
const START: Duration = Duration::from_secs(20);
/// How long the guest may take to its first word: 6 s alone, longer beside a build.
const BOOT: Duration = Duration::from_secs(180);
/// How often the results are looked at.
const LOOK: Duration = Duration::from_millis(20);
/// How much of the console a failure shows, in lines.
const TAIL: usize = 60;

/// What a drive does at a power cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cache {
    /// It keeps what it acknowledged.
    Plain,
    /// It forgets what was not flushed.
    Volatile,
}

/// A drive of the guest: it finds it by its name.
pub struct Drive {
    /// At most 20 bytes.
    pub name: String,
    /// What it holds.
    pub file: PathBuf,
    /// What a power cut leaves of it.
    pub cache: Cache,
}

/// A guest that runs.
pub struct Machine {
    emulator: Process,
    caches: Vec<Process>,
    listener: Listener,
    results: PathBuf,
    console: PathBuf,
    started: Instant,
}

impl Machine {
    /// Switches a guest on. `words` go onto its kernel's command line; its console and results into
    /// files `name.*` in `dir`.
    pub fn boot(
        lab: &Lab,
        dir: &Path,
        name: &str,
        (kernel, initrd): (&Kernel, &Path),
        drives: &[Drive],
        words: &str,
    ) -> Result<Machine> {
        let console = dir.join(format!("{name}.console"));
        let results = dir.join(format!("{name}.results"));
        let _ = fs::remove_file(&results);
        let words = format!("console=ttyS0 panic=-1 quiet loglevel=5 {words}");
        let mut emulator =
            tool("qemu-system-x86_64", ["-accel", "tcg,thread=multi", "-cpu", "max", "-m", "2048"])
                .args(["-smp", "2", "-nographic", "-no-reboot", "-nic", "none", "-monitor", "none"])
                .args(["-serial", &format!("file:{}", console.display())])
                .args(["-kernel".as_ref(), kernel.vmlinuz.as_os_str()])
                .args(["-initrd".as_ref(), initrd.as_os_str()])
                .args(["-append", &words, "-device", "virtio-serial-pci", "-chardev"])
                .args([format!("file,id=results,path={}", results.display())])
                .args(["-device", &format!("virtserialport,chardev=results,name={PORT}")]);
        let mut caches = Vec::new();
        for (at, drive) in drives.iter().enumerate() {
            let source = match drive.cache {
                Cache::Plain => format!("file={},discard=unmap", drive.file.display()),
                Cache::Volatile => {
                    let socket = lab.socket(&format!("{name}.{at}"));
                    caches.push(cache(&socket, &drive.file, &console.with_extension("log"))?);
                    format!("file=nbd+unix:///?socket={}", socket.display())
                }
            };
            let options = "format=raw,if=none,cache=writeback";
            emulator = emulator
                .args(["-drive", &format!("{source},{options},id=drive{at}"), "-device"])
                .args([format!("virtio-blk-pci,drive=drive{at},serial={}", drive.name)]);
        }
        let emulator = emulator.background(&console.with_extension("log"))?;
        let (listener, started) = (Listener::new(&results), Instant::now());
        Ok(Machine { emulator, caches, listener, results, console, started })
    }

    /// Waits for its first word.
    pub fn up(&mut self) -> Result<()> {
        let results = self.results.clone();
        let left = BOOT.saturating_sub(self.started.elapsed());
        let spoke = || fs::metadata(&results).is_ok_and(|file| file.len() > 0);
        self.emulator.until(left, spoke).context("the guest did not come up")
    }

    /// Waits for what it tells next, until `deadline`; fails if nothing came.
    pub fn events(&mut self, deadline: Instant) -> Result<Vec<Event>> {
        loop {
            // Asked before the results are read: what it told at its end must not be missed.
            let alive = self.emulator.alive();
            let events = self.listener.events()?;
            if !events.is_empty() {
                return Ok(events);
            }
            if !alive {
                bail!("the guest ended without a word");
            }
            if Instant::now() > deadline {
                bail!("the guest is silent beyond the test's limit");
            }
            thread::sleep(LOOK);
        }
    }

    /// Cuts the power. Returns what it had told before.
    pub fn cut(mut self) -> Result<Vec<Event>> {
        self.emulator.kill()?;
        for cache in &mut self.caches {
            cache.kill()?;
        }
        self.listener.events()
    }

    /// Waits for its own end.
    pub fn off(mut self, limit: Duration) -> Result<()> {
        self.emulator.wait(limit).map(drop).context("the guest does not switch itself off")
    }

    /// The end of its console.
    pub fn last_words(&self) -> String {
        let bytes = fs::read(&self.console).unwrap_or_default();
        let text = String::from_utf8_lossy(&bytes);
        let lines: Vec<_> = text.lines().filter(|line| !line.trim().is_empty()).collect();
        let tail = lines[lines.len().saturating_sub(TAIL)..].join("\n        ");
        let emulator = self.emulator.said();
        format!("the end of its console:\n        {tail}\n    of the emulator: {emulator}")
    }
}

/// A disk's write cache, which nothing but a flush empties.
fn cache(socket: &Path, file: &Path, log: &Path) -> Result<Process> {
    let _ = fs::remove_file(socket);
    let mut process = tool("nbdkit", ["-f", "--filter=cache", "-U"])
        .args([socket, "file".as_ref(), file])
        .args(["cache=writeback"])
        .background(log)?;
    process.until(START, || UnixStream::connect(socket).is_ok())?;
    Ok(process)
}
