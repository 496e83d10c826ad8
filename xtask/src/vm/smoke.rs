//! The rig itself: the guest has what the tests need, and the daemon serves in it as it does on a host.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};

use super::guest::Guest;
use crate::nbd::Client;
use crate::pattern;
use crate::tool::tool;

/// Size of the image, in bytes.
const SIZE: u64 = 32 << 20;

/// Runs the test; its disks: a (ext4), b (xfs).
pub fn run(guest: &mut Guest) -> Result<()> {
    guest.check("the kernel has ublk, NBD and device-mapper", |_| {
        for node in ["/dev/ublk-control", "/dev/nbd0", "/dev/mapper/control", "/dev/loop-control"] {
            ensure!(Path::new(node).exists(), "{node} is not there");
        }
        let version = tool("uname", ["-r"]).out()?;
        let modules = fs::read_to_string("/proc/modules").context("reading /proc/modules")?;
        Ok(format!("Linux {}, {} modules", version.trim(), modules.lines().count()))
    })?;
    guest.check("device-mapper makes and removes a device", |guest| {
        let device = guest.device("a")?;
        let slow = guest.mapped("slow", &format!("0 2048 delay {} 0 1\n", device.display()))?;
        let sectors = tool("blockdev", ["--getsz"]).args([&slow]).out()?;
        tool("dmsetup", ["remove", "--noudevsync", "slow"]).run()?;
        ensure!(sectors.trim() == "2048", "it has {} sectors, not 2048", sectors.trim());
        let targets = tool("dmsetup", ["targets"]).out()?;
        let known = targets.lines().filter_map(|line| line.split_whitespace().next());
        Ok(known.collect::<Vec<_>>().join(" "))
    })?;
    guest.check("image on ext4, replica on xfs, both read back over NBD", |guest| {
        let (a, b) = (guest.format("a")?, guest.format("b")?);
        let raw = guest.dir().join("base.raw");
        pattern::image(&raw, SIZE, 7)?;
        let mut daemon = guest.daemon("")?;
        for (name, path) in [("a", &a), ("b", &b)] {
            let path = path.to_string_lossy();
            daemon.ok(&["disk", "add", &path, "--name", name])?;
        }
        let source = raw.to_string_lossy();
        daemon.ok(&["image", "import", &source, "--name", "base", "--disk", "a"])?;
        daemon.ok(&["replica", "create", "vm", "--image", "base", "--disk", "b"])?;
        let truth = fs::read(&raw)?;
        for export in ["image/base", "replica/vm"] {
            let all = Client::open(daemon.nbd(), export)?.read_all(SIZE)?;
            if let Some(at) = pattern::differ(&all, &truth) {
                anyhow::bail!("{export} differs from the image at byte {at}");
            }
        }
        let mut client = Client::open(daemon.nbd(), "replica/vm")?;
        client.write(12_288, &[0xa5; 8192], 0)?;
        client.flush()?;
        drop(client);
        daemon.stop()?;
        daemon.restart()?;
        let mut found = [0; 8192];
        Client::open(daemon.nbd(), "replica/vm")?.read(12_288, &mut found)?;
        ensure!(found == [0xa5; 8192], "a flushed write is gone after a restart");
        let doctor = daemon.ask(&["doctor", "--json"])?.stdout;
        let doctor = crate::tool::json(&doctor)?;
        let items = doctor.as_array().context("doctor says no list")?;
        let ublk = items.iter().find(|item| item["what"] == "ublk").context("nothing of ublk")?;
        ensure!(ublk["state"] == "ok", "doctor: {ublk}");
        daemon.healthy()?;
        daemon.stop()?;
        Ok(format!("doctor: ublk {}", ublk["found"].as_str().unwrap_or_default()))
    })?;
    guest.check("the outside programs start", |guest| {
        let programs = [
            ("fio", "--version"),
            ("qemu-img", "--version"),
            ("nbdcopy", "--version"),
            ("e2fsck", "-V"),
            ("xfs_repair", "-V"),
            ("dmsetup", "--version"),
        ];
        guest.need(&programs.map(|(program, _)| program))?;
        for (program, argument) in programs {
            tool(program, [argument]).run()?;
        }
        Ok(String::new())
    })?;
    Ok(())
}
