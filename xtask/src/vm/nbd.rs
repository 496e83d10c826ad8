//! The kernel's NBD client on our server: /dev/nbdN that outlives the daemon, by way of
//! `examples/nbd_device`.
//!
//! Invariants checked: the device is what the export is; no request fails and no acknowledged write
//! is lost when the daemon is killed or stopped under load; a daemon that is merely slow is not given
//! up; the device grows under load; it is not detached under its user.

use std::fs::{self, File, OpenOptions};
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::guest::Guest;
use crate::daemon::Daemon;
use crate::pattern;
use crate::tool::{Process, tool};

/// Size of the image, in bytes.
const SIZE: u64 = 32 << 20;
/// How often the daemon is killed, and how often it is stopped and started in good order.
const KILLS: usize = 6;
const STOPS: usize = 3;
/// How long fio's requests may take at the most when the daemon is away, in all.
const LIMIT: Duration = Duration::from_secs(120);

/// Runs the test; its disk: a (ext4).
pub fn run(guest: &mut Guest) -> Result<()> {
    guest.need(&["nbd_device", "fio"])?;
    let disk = guest.format("a")?;
    let raw = guest.dir().join("base.raw");
    pattern::image(&raw, SIZE, 7)?;
    let mut daemon = guest.daemon("")?;
    daemon.ok(&["disk", "add", &disk.to_string_lossy(), "--name", "a"])?;
    daemon.ok(&["image", "import", &raw.to_string_lossy(), "--name", "base", "--disk", "a"])?;
    for name in ["fio", "ext4", "grown"] {
        daemon
            .ok(&["replica", "create", name, "--image", "base", "--disk", "a", "--size", "96M"])?;
    }
    guest.check("an image is a read-only device, byte for byte", |_| {
        let device = Device::attach(&daemon, "image/base")?;
        let mut all = Vec::new();
        File::open(device.path())?.read_to_end(&mut all)?;
        if let Some(at) = pattern::differ(&all, &fs::read(&raw)?) {
            bail!("it differs at byte {at}");
        }
        let writer = OpenOptions::new().write(true).open(device.path());
        ensure!(writer.and_then(|it| it.write_at(&[1; 512], 0)).is_err(), "a write was taken");
        device.detach()?;
        Ok(format!("{} MiB", all.len() >> 20))
    })?;
    guest.check("kill -9 and restart under fio --verify: no error, nothing lost", |guest| {
        let device = Device::attach(&daemon, "replica/fio")?;
        let keeper = device.keep(&daemon, guest.dir())?;
        let mut load = fio(&device, guest.dir(), 4 * KILLS + 4)?;
        for _ in 0..KILLS {
            thread::sleep(Duration::from_secs(2));
            daemon.kill()?;
            daemon.restart()?;
        }
        let code = load.wait(LIMIT)?;
        ensure!(code == 0, "fio ended with {code}: {}", load.said());
        drop(keeper);
        device.detach()?;
        Ok(format!("{KILLS} kills"))
    })?;
    guest.check("ext4 lives through kills and orderly restarts, fsck clean", |guest| {
        guest.need(&["mkfs.ext4", "e2fsck"])?;
        let device = Device::attach(&daemon, "replica/ext4")?;
        let keeper = device.keep(&daemon, guest.dir())?;
        tool("mkfs.ext4", ["-q", "-F"]).args([device.path()]).run()?;
        let at = guest.dir().join("mounted");
        fs::create_dir_all(&at)?;
        guest.mount_device(&device.path(), &at)?;
        let refused = tool("nbd_device", ["detach", &device.index]).outcome()?;
        ensure!(refused.code == 1, "it was detached under its file system");
        ensure!(refused.said().contains("mounted at"), "{}", refused.said());
        let log = OpenOptions::new().create(true).append(true).open(at.join("log"))?;
        let mut lines = 0_u64;
        for round in 0..STOPS * 2 {
            for _ in 0..50 {
                log.write_all_at(format!("{lines:07}\n").as_bytes(), lines * 8)?;
                log.sync_data().context("fsync with the daemon restarted")?;
                lines += 1;
            }
            if round.is_multiple_of(2) {
                daemon.kill()?
            } else {
                daemon.stop()?
            }
            daemon.restart()?;
        }
        drop(log);
        tool("umount", [&at]).run()?;
        tool("e2fsck", ["-fn"]).args([device.path()]).run()?;
        guest.mount_device(&device.path(), &at)?;
        let text = fs::read_to_string(at.join("log"))?;
        ensure!(text.lines().count() as u64 == lines, "{} of {lines} lines", text.lines().count());
        tool("umount", [&at]).run()?;
        drop(keeper);
        device.detach()?;
        Ok(format!("{lines} lines, {STOPS} kills, {STOPS} restarts"))
    })?;
    guest.check("a slow daemon is waited for, and a device grows under load", |guest| {
        let device = Device::attach(&daemon, "replica/grown")?;
        // Nobody reconnects it: were it given up, fio would hang.
        let mut load = fio(&device, guest.dir(), 14)?;
        thread::sleep(Duration::from_secs(1));
        let pid = Pid::from_raw(daemon.id()? as i32);
        kill(pid, Signal::SIGSTOP)?;
        thread::sleep(Duration::from_secs(5));
        kill(pid, Signal::SIGCONT)?;
        daemon.ok(&["replica", "resize", "grown", "128M"])?;
        let socket = daemon.nbd().to_string_lossy().into_owned();
        tool("nbd_device", ["resize", &socket, "replica/grown", &device.index]).run()?;
        let sectors = fs::read_to_string(format!("/sys/block/nbd{}/size", device.index))?;
        ensure!(sectors.trim() == "262144", "it has {} sectors", sectors.trim());
        let code = load.wait(LIMIT)?;
        ensure!(code == 0, "fio ended with {code}: {}", load.said());
        device.detach()?;
        Ok("stopped for 5 s; 96 MiB to 128 MiB".into())
    })?;
    daemon.healthy()?;
    daemon.stop()
}

/// An attached device; it is detached, whoever uses it, when the guard goes.
struct Device {
    index: String,
    export: &'static str,
}

impl Device {
    fn attach(daemon: &Daemon, export: &'static str) -> Result<Device> {
        let socket = daemon.nbd().to_string_lossy().into_owned();
        let index = tool("nbd_device", ["attach", &socket, export]).out()?.trim().to_string();
        Ok(Device { index, export })
    }

    fn path(&self) -> PathBuf {
        Path::new("/dev").join(format!("nbd{}", self.index))
    }

    /// Reconnects it for as long as the guard is held.
    fn keep(&self, daemon: &Daemon, dir: &Path) -> Result<Process> {
        let socket = daemon.nbd().to_string_lossy().into_owned();
        let log = dir.join(format!("keep-{}.log", self.index));
        tool("nbd_device", ["keep", &socket, self.export, &self.index]).background(&log)
    }

    fn detach(&self) -> Result<()> {
        tool("nbd_device", ["detach", &self.index]).run()
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        // After an orderly detach there is nothing left to do.
        let _ = tool("nbd_device", ["detach", &self.index, "force"]).outcome();
    }
}

/// Random writes of mixed sizes, read back and compared, for so many seconds.
fn fio(device: &Device, dir: &Path, seconds: usize) -> Result<Process> {
    let (file, runtime) = (device.path(), format!("--runtime={seconds}"));
    tool("fio", ["--name=v", "--direct=1", "--ioengine=libaio", "--iodepth=8", "--rw=randwrite"])
        .args(["--bssplit=512/10:3k/10:4k/60:60k/20", "--size=64m", "--time_based", &runtime])
        .args(["--verify=crc32c", "--verify_backlog=200", "--verify_fatal=1"])
        .args([format!("--filename={}", file.display())])
        .background(&dir.join(format!("fio-{}.log", device.index)))
}
