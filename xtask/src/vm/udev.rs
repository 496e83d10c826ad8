//! What is in packaging/: the links of 60-underlay.rules, made for a daemon with no more privileges
//! than underlay.service has, and devices without privileges by 61-underlay-unprivileged.rules.
//!
//! Invariants checked: udev knows the links, of partitions too, and they go with the device; udev's
//! own looking at devices does not get in the way of a detach; a daemon that isn't root makes devices
//! that hold what they should.

use std::fs::{self, OpenOptions};
use std::io::Read;
use std::os::unix::fs::{FileExt, PermissionsExt, symlink};
use std::path::Path;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use super::guest::Guest;
use super::ublk::partition;
use crate::daemon::Daemon;
use crate::image::script;
use crate::pattern;
use crate::tool::{NO_ARGS, Process, tool};

/// The rules, as they are shipped.
const RULES: [(&str, &str); 2] = [
    ("60-underlay.rules", include_str!("../../../packaging/60-underlay.rules")),
    ("61-underlay-unprivileged.rules", UNPRIVILEGED),
];
const UNPRIVILEGED: &str = include_str!("../../../packaging/61-underlay-unprivileged.rules");

/// Where the rules look for names.
const NAMES: &str = "/run/underlay/underlay.devices";
/// Size of the image, in bytes.
const SIZE: u64 = 40 << 20;
/// The user of the guest who is not root, and the group that the rules name.
const USER: u32 = 1000;
const GROUP: u32 = 990;

/// Runs the test; its disk: a (ext4).
pub fn run(guest: &mut Guest) -> Result<()> {
    let disk = guest.format("a")?;
    let raw = guest.dir().join("base.raw");
    pattern::image(&raw, SIZE, guest.seed)?;
    partition(&raw)?;
    let mut udev = None;
    let passed = guest.check("udev runs with the rules of packaging/", |guest| {
        guest.need(&["udevadm"])?;
        udev = Some(start(guest)?);
        Ok(String::new())
    })?;
    if !passed {
        return Ok(());
    }
    links(guest, &disk, &raw)?;
    unprivileged(guest, &disk, &raw)
}

fn links(guest: &mut Guest, disk: &Path, raw: &Path) -> Result<()> {
    // Root, with what packaging/underlay.service leaves of it.
    let program = guest.dir().join("as-service");
    script(&program, &format!("#!/bin/sh\nexec /bin/setpriv {} underlay \"$@\"\n", bounds()?))?;
    let mut daemon = Daemon::start_by(program, &guest.lab, guest.dir(), "udev", "")?;
    let names = guest.lab.socket("udev.devices");
    fs::create_dir_all("/run/underlay")?;
    symlink(&names, NAMES).with_context(|| format!("linking {}", names.display()))?;
    daemon.ok(&["disk", "add", &disk.to_string_lossy(), "--name", "a"])?;
    daemon.ok(&["image", "import", &raw.to_string_lossy(), "--name", "base"])?;
    daemon.ok(&["replica", "create", "vm", "--image", "base", "--disk", "a"])?;
    for via in ["ublk", "nbd"] {
        guest.check(&format!("udev links a device that is attached via {via}"), |_| {
            let told = daemon.json(&["attach", "replica/vm", "--via", via])?;
            let node = told["device"].as_str().unwrap_or_default().to_string();
            settle()?;
            let known = tool("udevadm", ["info", "--query=symlink", &node]).out()?;
            ensure!(known.contains("underlay/replica/vm"), "udev knows of {known:?} only");
            // Written, so that udev looks at it again when it is closed; and then at once.
            let file = OpenOptions::new().write(true).open("/dev/underlay/replica/vm")?;
            file.write_all_at(&[1; 4096], 1 << 20)?;
            drop(file);
            daemon.ok(&["detach", "replica/vm"])?;
            let link = Path::new("/dev/underlay/replica/vm");
            settle()?;
            ensure!(fs::symlink_metadata(link).is_err(), "{} is still there", link.display());
            Ok(String::new())
        })?;
    }
    guest.check("udev links partitions", |_| {
        daemon.ok(&["attach", "image/base", "--scan"])?;
        let link = Path::new("/dev/underlay/image/base-part1");
        for _ in 0..40 {
            settle()?;
            if link.exists() {
                break;
            }
            thread::sleep(Duration::from_millis(50));
        }
        ensure!(link.exists(), "{} is not there", link.display());
        daemon.ok(&["detach", "/dev/underlay/image/base"])?;
        Ok(String::new())
    })?;
    daemon.ok(&["replica", "rm", "vm"])?;
    daemon.healthy()?;
    daemon.stop()?;
    fs::remove_file(NAMES)?;
    Ok(())
}

fn unprivileged(guest: &mut Guest, disk: &Path, raw: &Path) -> Result<()> {
    guest.check("a daemon without privileges attaches, copying", |guest| {
        guest.need(&["setpriv"])?;
        let home = guest.dir().join("user");
        fs::create_dir_all(&home)?;
        let own = disk.join("own");
        fs::create_dir_all(&own)?;
        for place in [&home, &own] {
            std::os::unix::fs::chown(place, Some(USER), Some(USER))?;
        }
        let sockets = guest.lab.socket("x");
        let sockets = sockets.parent().context("a directory of sockets")?;
        for open in [sockets, guest.dir()] {
            fs::set_permissions(open, fs::Permissions::from_mode(0o777))?;
        }
        // By its path: the shell has a lesser one of the same name.
        let program = guest.dir().join("as-user");
        let privileges = format!("--reuid {USER} --regid {USER} --groups {GROUP} --inh-caps=-all");
        script(&program, &format!("#!/bin/sh\nexec /bin/setpriv {privileges} underlay \"$@\"\n"))?;
        let mut daemon = Daemon::start_by(program, &guest.lab, &home, "user", "")?;
        daemon.ok(&["disk", "add", &own.to_string_lossy(), "--name", "own"])?;
        daemon.ok(&["image", "import", &raw.to_string_lossy(), "--name", "base"])?;
        daemon.ok(&["replica", "create", "vm", "--image", "base", "--disk", "own"])?;
        let told = daemon.json(&["attach", "replica/vm"])?;
        ensure!(told["zero_copy"] == false, "{told}");
        let node = told["device"].as_str().unwrap_or_default().to_string();
        let mut truth = fs::read(raw)?;
        let file = OpenOptions::new().read(true).write(true).open(&node)?;
        file.write_all_at(&[9; 10_000], 777)?;
        truth[777..10_777].fill(9);
        file.sync_all()?;
        drop(file);
        let mut all = Vec::new();
        fs::File::open(&node)?.read_to_end(&mut all)?;
        ensure!(pattern::differ(&all, &truth).is_none(), "{node} holds something else");
        // It ends with its daemon, and the next one makes it anew.
        daemon.stop()?;
        ensure!(!Path::new(&node).exists(), "{node} outlived its daemon");
        daemon.restart()?;
        let status = daemon.json(&["status"])?;
        ensure!(status["attachments"][0]["waiting"].is_null(), "{}", status["attachments"]);
        let node = status["attachments"][0]["device"].as_str().unwrap_or_default().to_string();
        let mut all = Vec::new();
        fs::File::open(&node).context("after the restart")?.read_to_end(&mut all)?;
        ensure!(pattern::differ(&all, &truth).is_none(), "{node} lost what was written");
        daemon.ok(&["detach", &node])?;
        daemon.refused(&["attach", "replica/vm", "--via", "nbd"], &["root"])?;
        daemon.healthy()?;
        daemon.stop()?;
        Ok(String::new())
    })?;
    Ok(())
}

/// The unit's capabilities, as setpriv takes them.
fn bounds() -> Result<String> {
    let unit = include_str!("../../../packaging/underlay.service");
    let set = unit.lines().find_map(|line| line.strip_prefix("CapabilityBoundingSet="));
    let names = set.context("the unit has no CapabilityBoundingSet=")?.split_whitespace();
    let names = names.map(|name| format!(",+{}", name.trim_start_matches("CAP_").to_lowercase()));
    Ok(format!("--bounding-set=-all{}", names.collect::<String>()))
}

/// Starts udev with nothing but our rules.
fn start(guest: &Guest) -> Result<Process> {
    let rules = Path::new("/etc/udev/rules.d");
    fs::create_dir_all(rules)?;
    fs::create_dir_all("/run/udev")?;
    for (name, text) in RULES {
        fs::write(rules.join(name), text)?;
    }
    // What it does follows from its name.
    let program = guest.dir().join("systemd-udevd");
    symlink("/bin/udevadm", &program)?;
    let mut process = tool(program, NO_ARGS).background(&guest.dir().join("udevd.log"))?;
    process.until(Duration::from_secs(10), || Path::new("/run/udev/control").exists())?;
    for kind in ["misc", "block"] {
        tool("udevadm", ["trigger", "--action=add", "--subsystem-match", kind]).run()?;
    }
    settle()?;
    let said = fs::read_to_string(guest.dir().join("udevd.log"))?;
    ensure!(!said.contains("underlay"), "it complains: {said}");
    Ok(process)
}

fn settle() -> Result<()> {
    tool("udevadm", ["settle", "--timeout=20"]).run()
}
