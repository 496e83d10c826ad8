//! The kernel's NBD client on our server: /dev/nbdN that outlives the daemon (`attach --via nbd`).
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
    guest.need(&["fio"])?;
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
        let device = Device::attach(&daemon, "image/base", 1)?;
        let mut all = Vec::new();
        File::open(device.path())?.read_to_end(&mut all)?;
        if let Some(at) = pattern::differ(&all, &fs::read(&raw)?) {
            bail!("it differs at byte {at}");
        }
        let writer = OpenOptions::new().write(true).open(device.path());
        ensure!(writer.and_then(|it| it.write_at(&[1; 512], 0)).is_err(), "a write was taken");
        device.detach(&daemon)?;
        Ok(format!("{} MiB", all.len() >> 20))
    })?;
    guest.check("kill -9 and restart under fio --verify: no error, nothing lost", |guest| {
        let device = Device::attach(&daemon, "replica/fio", 1)?;
        let mut load = fio(&device, guest.dir(), 4 * KILLS + 4)?;
        for _ in 0..KILLS {
            thread::sleep(Duration::from_secs(2));
            daemon.kill()?;
            daemon.restart()?;
        }
        let code = load.wait(LIMIT)?;
        ensure!(code == 0, "fio ended with {code}: {}", load.said());
        device.detach(&daemon)?;
        Ok(format!("{KILLS} kills"))
    })?;
    guest.check("an image by four connections, through a kill", |guest| {
        let device = Device::attach(&daemon, "image/base", 4)?;
        let log = guest.dir().join("fio.log");
        let mut load = tool("fio", ["--name=r", "--direct=1", "--ioengine=libaio", "--iodepth=8"])
            .args(["--rw=randread", "--bs=4k", "--time_based", "--runtime=6", "--readonly"])
            .args([format!("--filename={}", device.path().display())])
            .background(&log)?;
        thread::sleep(Duration::from_secs(2));
        daemon.kill()?;
        daemon.restart()?;
        let code = load.wait(LIMIT)?;
        ensure!(code == 0, "fio ended with {code}: {}", load.said());
        ensure!(fs::read(device.path())? == fs::read(&raw)?, "it reads as something else");
        device.detach(&daemon)?;
        Ok(String::new())
    })?;
    guest.check("ext4 lives through kills and orderly restarts, fsck clean", |guest| {
        guest.need(&["mkfs.ext4", "e2fsck"])?;
        let device = Device::attach(&daemon, "replica/ext4", 1)?;
        tool("mkfs.ext4", ["-q", "-F"]).args([device.path()]).run()?;
        let at = guest.dir().join("mounted");
        fs::create_dir_all(&at)?;
        guest.mount_device(&device.path(), &at)?;
        daemon.refused(&["detach", "replica/ext4"], &["mounted at", "--force"])?;
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
        device.detach(&daemon)?;
        Ok(format!("{lines} lines, {STOPS} kills, {STOPS} restarts"))
    })?;
    guest.check("a slow daemon is waited for, and a device grows under load", |guest| {
        let device = Device::attach(&daemon, "replica/grown", 1)?;
        let mut load = fio(&device, guest.dir(), 14)?;
        thread::sleep(Duration::from_secs(1));
        let pid = Pid::from_raw(daemon.id()? as i32);
        kill(pid, Signal::SIGSTOP)?;
        thread::sleep(Duration::from_secs(5));
        kill(pid, Signal::SIGCONT)?;
        daemon.ok(&["replica", "resize", "grown", "128M"])?;
        let name = device.path().file_name().unwrap_or_default().to_string_lossy().into_owned();
        let sectors = fs::read_to_string(format!("/sys/block/{name}/size"))?;
        ensure!(sectors.trim() == "262144", "it has {} sectors", sectors.trim());
        let code = load.wait(LIMIT)?;
        ensure!(code == 0, "fio ended with {code}: {}", load.said());
        device.detach(&daemon)?;
        Ok("stopped for 5 s; 96 MiB to 128 MiB".into())
    })?;
    guest.check(
        "one that was detached behind the daemon's back is seen, and attached again",
        |guest| {
            guest.need(&["nbd-client"])?;
            let device = Device::attach(&daemon, "replica/fio", 1)?;
            tool("nbd-client", ["-d"]).args([device.path()]).run()?;
            let told = until(|| {
                let status = daemon.json(&["status"])?;
                Ok(Some(status["attachments"][0]["waiting"].to_string()).filter(|it| it != "null"))
            })?;
            ensure!(told.contains("somebody else"), "{told}");
            let again = Device::attach(&daemon, "replica/fio", 1)?;
            File::open(again.path())?.read_exact(&mut [0; 4096])?;
            again.detach(&daemon)?;
            Ok(String::new())
        },
    )?;
    guest.check("by force it is detached from under its user, and attached again", |_| {
        let device = Device::attach(&daemon, "replica/fio", 1)?;
        let open = File::open(device.path())?;
        daemon.refused(&["detach", "replica/fio"], &["is open", "--force"])?;
        daemon.ok(&["detach", "replica/fio", "--force"])?;
        let read = open.read_at(&mut [0; 4096], 48 << 20);
        ensure!(!matches!(read, Ok(1..)), "{read:?} could be read");
        drop(open);
        let again = Device::attach(&daemon, "replica/fio", 1)?;
        File::open(again.path())?.read_exact(&mut [0; 4096])?;
        again.detach(&daemon)?;
        Ok(String::new())
    })?;
    guest.check("what it can't do is refused", |_| {
        let refused = |export: &str, more: &[&str], words: &[&str]| {
            let args = [&["attach", export, "--via", "nbd"], more].concat();
            let outcome = daemon.ask(&args)?;
            let told = words.iter().all(|word| outcome.said().contains(word));
            ensure!(outcome.code == 1 && told, "{args:?}: {}", outcome.said());
            Ok(())
        };
        refused("replica/fio", &["--copy"], &["--via nbd"])?;
        refused("image/base", &["--queues", "17"], &["1 to 16"])?;
        refused("replica/fio", &["--queues", "2"], &["--queues 1"])?;
        Ok(String::new())
    })?;
    daemon.healthy()?;
    daemon.stop()
}

/// An attached device.
struct Device {
    export: &'static str,
    node: PathBuf,
}

impl Device {
    fn attach(daemon: &Daemon, export: &'static str, connections: u32) -> Result<Device> {
        let connections = connections.to_string();
        let told = daemon.json(&["attach", export, "--via", "nbd", "--queues", &connections])?;
        let node = PathBuf::from(told["device"].as_str().unwrap_or_default());
        ensure!(node.starts_with("/dev") && told["zero_copy"] == false, "{told}");
        ensure!(fs::canonicalize(Path::new("/dev/underlay").join(export))? == node, "its link");
        Ok(Device { export, node })
    }

    fn path(&self) -> PathBuf {
        self.node.clone()
    }

    fn detach(&self, daemon: &Daemon) -> Result<()> {
        daemon.ok(&["detach", self.export])?;
        let link = Path::new("/dev/underlay").join(self.export);
        ensure!(fs::symlink_metadata(&link).is_err(), "{} is still there", link.display());
        Ok(())
    }
}

/// Waits for something to come about.
fn until<T>(mut look: impl FnMut() -> Result<Option<T>>) -> Result<T> {
    for _ in 0..100 {
        if let Some(found) = look()? {
            return Ok(found);
        }
        thread::sleep(Duration::from_millis(50));
    }
    bail!("it did not come about within 5 s")
}

/// Random writes of mixed sizes, read back and compared, for so many seconds.
fn fio(device: &Device, dir: &Path, seconds: usize) -> Result<Process> {
    let (file, runtime) = (device.path(), format!("--runtime={seconds}"));
    tool("fio", ["--name=v", "--direct=1", "--ioengine=libaio", "--iodepth=8", "--rw=randwrite"])
        .args(["--bssplit=512/10:3k/10:4k/60:60k/20", "--size=64m", "--time_based", &runtime])
        .args(["--verify=crc32c", "--verify_backlog=200", "--verify_fatal=1"])
        .args([format!("--filename={}", file.display())])
        .background(&dir.join("fio.log"))
}
