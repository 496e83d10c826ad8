//! The main job: a guest boots from one of three replicas, writes, powers off; nobody else notices.
//!
//! Invariants checked:
//! - the image, and every replica before its first write, are bit for bit the qcow2's content;
//! - a guest boots from a replica over NBD, and what it wrote is there: its own digests say so, the
//!   file system is clean and its journal empty;
//! - the image and the other replicas are still what they were, also after a restart.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Result, bail, ensure};

use crate::image::{self, Kernel};
use crate::lab::{Fs, Lab, LoopDisk, loop_disks};
use crate::report::Report;
use crate::setup;
use crate::subject::{Against, Subject};
use crate::tool::tool;

/// Size of each disk, in bytes: xfs and btrfs want some hundred MiB for themselves.
const DISK: u64 = 2 << 30;
/// How long a guest may take under TCG on a busy machine.
const BOOT: Duration = Duration::from_secs(300);
/// The disks, their file systems and the replica on each.
const REPLICAS: [(&str, Fs, &str); 3] =
    [("a", Fs::Ext4, "vm1"), ("b", Fs::Xfs, "vm2"), ("c", Fs::Btrfs, "vm3")];

/// Runs the rig.
pub fn run(lab: &Lab, against: Against, report: &mut Report) {
    if let Err(error) = ready() {
        report.skip("guest", &format!("{error:#}"));
        return;
    }
    let guest = match image::debian().and_then(|disk| Ok((disk, image::kernel()?))) {
        Ok(guest) => guest,
        Err(error) => return report.skip("guest", &format!("{error:#}")),
    };
    if let Err(error) = job(lab, against, &guest.0, &guest.1, report) {
        report.broken("guest", &error);
    }
}

fn ready() -> Result<()> {
    loop_disks()?;
    setup::need(&["mkfs.ext4", "mkfs.xfs", "mkfs.btrfs", "losetup", "nbdcopy", "qemu-img"])?;
    setup::need(&["qemu-system-x86_64", "e2fsck", "dumpe2fs", "debugfs"])
}

fn job(
    lab: &Lab,
    against: Against,
    image: &Path,
    kernel: &Kernel,
    report: &mut Report,
) -> Result<()> {
    let dir = lab.dir("guest")?;
    let disks = REPLICAS.iter().map(|(name, fs, _)| LoopDisk::new(&dir, name, DISK, *fs));
    let disks = disks.collect::<Result<Vec<_>>>()?;
    let paths = REPLICAS.iter().zip(&disks).map(|((name, ..), disk)| (*name, disk.path.as_path()));
    let mut subject = Subject::start(lab, &dir, against, &paths.collect::<Vec<_>>())?;
    subject.import(image, "debian", "a")?;
    for (disk, _, replica) in REPLICAS {
        subject.replica(replica, "debian", disk)?;
    }
    let raw = dir.join("image.raw");
    tool("qemu-img", ["convert", "-O", "raw"]).args([image, &raw]).run()?;
    let truth = sha256(&raw)?;
    fs::remove_file(&raw)?;

    report.check("guest: image and fresh replicas equal the qcow2", || {
        for export in ["image/debian", "replica/vm1", "replica/vm2", "replica/vm3"] {
            unchanged(&subject, &dir, export, &truth)?;
        }
        Ok(format!("sha256 {truth}"))
    });
    let booted = report.check("guest: boots from a replica on xfs, writes, powers off", || {
        boot(&subject.uri("replica/vm2"), kernel, &dir)
    });
    if booted {
        report.check("guest: what it wrote is whole, its file system clean", || {
            written(&subject.uri("replica/vm2"), &dir)
        });
    }
    report.check("guest: image and other replicas are bit for bit what they were", || {
        for export in ["image/debian", "replica/vm1", "replica/vm3"] {
            unchanged(&subject, &dir, export, &truth)?;
        }
        Ok(String::new())
    });
    report.check("guest: all of it holds after a restart", || {
        subject.stop()?;
        subject.restart()?;
        for export in ["image/debian", "replica/vm1", "replica/vm3"] {
            unchanged(&subject, &dir, export, &truth)?;
        }
        subject.healthy()?;
        if booted { written(&subject.uri("replica/vm2"), &dir) } else { Ok(String::new()) }
    });
    report.check("guest: boots from the two other replicas at once", || {
        let boots: Vec<Result<String>> = std::thread::scope(|scope| {
            let others = ["vm1", "vm3"].map(|name| {
                let (uri, dir) = (subject.uri(&format!("replica/{name}")), dir.join(name));
                scope.spawn(move || {
                    fs::create_dir_all(&dir)?;
                    boot(&uri, kernel, &dir)?;
                    written(&uri, &dir)
                })
            });
            others.map(|other| other.join().unwrap_or_else(|_| bail!("panicked"))).into()
        });
        boots.into_iter().collect::<Result<Vec<_>>>()?;
        unchanged(&subject, &dir, "image/debian", &truth)?;
        subject.healthy()?;
        Ok(String::new())
    });
    subject.stop()
}

/// Boots a guest from `uri`, to its end.
fn boot(uri: &str, kernel: &Kernel, dir: &Path) -> Result<String> {
    let console = tool("qemu-system-x86_64", ["-accel", "tcg,thread=multi", "-cpu", "max"])
        .args(["-m", "1024", "-smp", "2", "-nographic", "-no-reboot", "-nic", "none"])
        .args(["-kernel".as_ref(), kernel.vmlinuz.as_os_str()])
        .args(["-initrd".as_ref(), kernel.initrd.as_os_str()])
        .args(["-append", "console=ttyS0 panic=-1 quiet"])
        .args(["-drive", &format!("file={uri},format=raw,if=virtio")])
        .limit(BOOT)
        .out()?;
    fs::write(dir.join("guest.console"), &console)?;
    // The firmware's control characters may stand before the guest's first words.
    match console.split_once("GUEST-WROTE ") {
        Some((_, rest)) if console.contains("GUEST-OK") => {
            Ok(rest.lines().next().unwrap_or_default().trim().to_string())
        }
        _ => {
            let lines: Vec<_> = console.lines().collect();
            let end = lines[lines.len().saturating_sub(12)..].join(" | ");
            bail!("the guest did not get to its end: {end}")
        }
    }
}

/// Checks from outside what the guest wrote.
fn written(uri: &str, dir: &Path) -> Result<String> {
    let raw = dir.join("after.raw");
    tool("nbdcopy", [uri.as_ref(), raw.as_os_str()]).run()?;
    let partition = format!("{}?offset={}", raw.display(), image::PARTITION);
    tool("e2fsck", ["-fn", &partition]).run()?;
    // e2fsck -n is content with a dirty journal: that would hide an unclean end.
    let header = tool("dumpe2fs", ["-h", &partition]).out()?;
    ensure!(!header.contains("needs_recovery"), "the journal is dirty");
    let files = dir.join("files");
    let _ = fs::remove_dir_all(&files);
    fs::create_dir_all(&files)?;
    let fetch = format!("rdump /var/guest /var/guest.sha256 {}", files.display());
    tool("debugfs", ["-R", &fetch, &partition]).run()?;
    tool("sha256sum", ["-c", "--quiet", "../guest.sha256"]).within(&files.join("guest")).run()?;
    let count = fs::read_to_string(files.join("guest.sha256"))?.lines().count();
    ensure!(count == 53, "the guest should have written 53 files, not {count}");
    fs::remove_file(&raw)?;
    Ok(format!("{count} files"))
}

fn unchanged(subject: &Subject, dir: &Path, export: &str, truth: &str) -> Result<()> {
    let raw: PathBuf = dir.join("copy.raw");
    tool("nbdcopy", [subject.uri(export).as_ref(), raw.as_os_str()]).run()?;
    let sum = sha256(&raw)?;
    fs::remove_file(&raw)?;
    ensure!(sum == truth, "{export} has sha256 {sum}, not {truth}");
    Ok(())
}

fn sha256(file: &Path) -> Result<String> {
    let line = tool("sha256sum", ["--binary"]).args([file]).out()?;
    Ok(line.split_whitespace().next().unwrap_or_default().to_string())
}
