//! All at once: replicas of one image on three file systems, two of them ublk devices and one a
//! device of the kernel's NBD client, under load, while the image is read and the daemon is killed.
//!
//! Invariants checked: no request fails, every load finds what it wrote, and the image stays what it
//! is.

use std::fs;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};

use super::guest::Guest;
use crate::pattern;
use crate::tool::tool;

/// Size of the image, in bytes.
const SIZE: u64 = 64 << 20;
/// How long the loads last, and how long they may take.
const SECONDS: u64 = 20;
const LIMIT: Duration = Duration::from_secs(120);
/// The replicas: name, disk, what makes the device.
const REPLICAS: [(&str, &str, &str); 3] =
    [("vm1", "a", "ublk"), ("vm2", "b", "ublk"), ("vm3", "c", "nbd")];

/// Runs the test; its disks: a (ext4), b (xfs), c (btrfs).
pub fn run(guest: &mut Guest) -> Result<()> {
    guest.check("three file systems, three devices, one image, one kill", |guest| {
        guest.need(&["fio", "mkfs.btrfs"])?;
        let raw = guest.dir().join("base.raw");
        pattern::image(&raw, SIZE, guest.seed)?;
        let mut daemon = guest.daemon("")?;
        for disk in ["a", "b", "c"] {
            let path = guest.format(disk)?;
            daemon.ok(&["disk", "add", &path.to_string_lossy(), "--name", disk])?;
        }
        daemon.ok(&["image", "import", &raw.to_string_lossy(), "--name", "base", "--disk", "a"])?;
        let mut loads = Vec::new();
        for (name, disk, via) in REPLICAS {
            let create = ["replica", "create", name, "--image", "base", "--disk", disk];
            daemon.ok(&[&create[..], &["--size", "128M"]].concat())?;
            let export = format!("replica/{name}");
            daemon.ok(&["attach", &export, "--via", via])?;
            let load = tool("fio", ["--ioengine=libaio", "--direct=1", "--iodepth=8"])
                .args([format!("--name={name}"), format!("--filename=/dev/underlay/{export}")])
                .args(["--rw=randrw", "--bsrange=512-128k", "--bs_unaligned=0", "--size=96m"])
                .args(["--time_based".to_string(), format!("--runtime={SECONDS}")])
                .args(["--fsync=50", "--verify=crc32c", "--verify_backlog=64"])
                .args(["--verify_fatal=1"])
                .within(guest.dir())
                .background(&guest.dir().join(format!("{name}.log")))?;
            loads.push((name, load));
        }
        daemon.ok(&["attach", "image/base"])?;
        let truth = fs::read(&raw)?;
        let (start, mut reads, mut killed) = (Instant::now(), 0, false);
        while start.elapsed() < Duration::from_secs(SECONDS) {
            let read = fs::read("/dev/underlay/image/base")?;
            if let Some(at) = pattern::differ(&read, &truth) {
                bail!("the image differs at byte {at}");
            }
            reads += 1;
            tool("blockdev", ["--flushbufs", "/dev/underlay/image/base"]).run()?;
            if !killed && start.elapsed() > Duration::from_secs(SECONDS / 3) {
                daemon.kill()?;
                daemon.restart()?;
                killed = true;
            }
            thread::sleep(Duration::from_millis(200));
        }
        for (name, load) in &mut loads {
            let code = load.wait(LIMIT)?;
            ensure!(code == 0, "fio on {name} ended with {code}: {}", load.said());
        }
        for export in REPLICAS.map(|(name, ..)| format!("replica/{name}")) {
            daemon.ok(&["detach", &export])?;
            ensure!(!Path::new("/dev/underlay").join(&export).exists(), "{export} has a link");
        }
        daemon.ok(&["detach", "image/base"])?;
        daemon.healthy()?;
        daemon.stop()?;
        Ok(format!("{reads} reads of the whole image meanwhile"))
    })?;
    Ok(())
}
