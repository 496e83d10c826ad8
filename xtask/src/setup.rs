//! What the rigs need of the machine, and how it gets there.
//!
//! Each program is named with the Debian package that holds it and what is lost without it. On a
//! Debian machine with root (or a `sudo` that asks nothing) the missing ones are installed; anywhere
//! else they are named, and the checks that need them are skipped with that reason.

use anyhow::{Result, bail};

use crate::apt::Apt;
use crate::report::{Report, note};
use crate::tool::find;

/// Every program that a rig calls, the Debian package that has it, and what it is for.
const PROGRAMS: &[(&str, &str, &str)] = &[
    ("qemu-img", "qemu-utils", "images, outside clients"),
    ("qemu-io", "qemu-utils", "outside clients"),
    ("qemu-nbd", "qemu-utils", "the bench"),
    ("qemu-storage-daemon", "qemu-utils", "the bench"),
    ("nbdinfo", "libnbd-bin", "outside clients"),
    ("openssl", "openssl", "certificates"),
    ("nbdcopy", "libnbd-bin", "outside clients"),
    ("nbdfuse", "libnbd-bin", "outside clients"),
    ("nbdsh", "python3-libnbd", "outside clients"),
    ("nbdkit", "nbdkit", "the bench"),
    ("fio", "fio", "load, verification, the bench"),
    ("mkfs.ext4", "e2fsprogs", "disks, the guest's image"),
    ("e2fsck", "e2fsprogs", "checking what a guest wrote"),
    ("addpart", "util-linux", "the probes"),
    ("filefrag", "e2fsprogs", "the probes"),
    ("debugfs", "e2fsprogs", "checking what a guest wrote"),
    ("mkfs.xfs", "xfsprogs", "disks"),
    ("xfs_repair", "xfsprogs", "the guest of cargo xtask vm"),
    ("dmsetup", "dmsetup", "the guest of cargo xtask vm"),
    ("nbd-client", "nbd-client", "the guest of cargo xtask vm"),
    ("udevadm", "udev", "the guest of cargo xtask vm"),
    ("setpriv", "util-linux", "the guest of cargo xtask vm"),
    ("systemd-analyze", "systemd", "checking packaging/"),
    ("mkfs.btrfs", "btrfs-progs", "disks"),
    ("losetup", "mount", "disks"),
    ("sfdisk", "fdisk", "the guest's image"),
    ("mmdebstrap", "mmdebstrap", "the guest's image"),
    ("busybox", "busybox-static", "the guest's first steps"),
    ("cpio", "cpio", "the guest's first steps"),
    ("xz", "xz-utils", "the guest's kernel modules, compressed images"),
    ("zstd", "zstd", "compressed images"),
];

/// The emulator, apart from the others: installing it must not take qemu-utils away.
const EMULATOR: (&str, &str) = ("qemu-system-x86_64", "qemu-system-x86");

/// Fails with the names of those of `programs` that are not installed.
pub fn need(programs: &[&str]) -> Result<()> {
    let missing: Vec<_> = programs.iter().copied().filter(|name| find(name).is_none()).collect();
    if !missing.is_empty() {
        bail!("{} not installed; cargo xtask setup tells why", missing.join(", "));
    }
    Ok(())
}

/// Installs what is missing, as far as this machine allows.
pub fn run(report: &mut Report) {
    let missing: Vec<_> = PROGRAMS.iter().filter(|(name, ..)| find(name).is_none()).collect();
    for (name, package, purpose) in &missing {
        note(&format!("setup: {name} (package {package}) is missing; it serves {purpose}"));
    }
    let mut packages: Vec<&str> = missing.iter().map(|(_, package, _)| *package).collect();
    packages.dedup();
    let emulator = find(EMULATOR.0).is_none() && std::env::consts::ARCH == "x86_64";
    if packages.is_empty() && !emulator {
        return;
    }
    let apt = match Apt::here() {
        Ok(apt) => apt,
        Err(error) => {
            let mut all = packages.join(" ");
            if emulator {
                all = format!("{all} {}", EMULATOR.1);
            }
            report.skip("setup", &format!("{error:#}; install by hand: {}", all.trim()));
            return;
        }
    };
    // Not a failure of ours if a mirror can't be reached or lacks something: what needs it is then
    // skipped, with this reason.
    if !packages.is_empty()
        && let Err(error) = apt.install(&packages)
    {
        report.skip("setup: install programs", &format!("{error:#}"));
    }
    if emulator && let Err(error) = apt.install_beside(EMULATOR.1, "qemu-utils") {
        report.skip("setup: install qemu-system-x86", &format!("{error:#}"));
    }
}
