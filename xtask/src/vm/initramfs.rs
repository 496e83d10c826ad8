//! What a guest of `cargo xtask vm` has in it: the programs under test, those that tests call, each
//! with its libraries, and the kernel's modules in an order in which they can be loaded.
//!
//! Debian's package of the kernel brings no modules.dep when it is only unpacked: each module names
//! what it needs in a section of its own, and that is read. A program that the host lacks isn't in
//! the guest either; a test that needs it is skipped there, with its name.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, bail};

use super::probes::AGENT;
use crate::image::{self, Kernel};
use crate::place;
use crate::tool::{find, tool};

/// The programs that tests may call, beside busybox's.
const PROGRAMS: &[&str] = &[
    "blkdiscard",
    "blkid",
    "blockdev",
    "cmp",
    "dd",
    "dmsetup",
    "dumpe2fs",
    "e2fsck",
    "fallocate",
    "filefrag",
    "fio",
    "losetup",
    "mkfs.btrfs",
    "mkfs.ext4",
    "mkfs.xfs",
    "mount",
    "nbd-client",
    "nbdcopy",
    "nbdinfo",
    "qemu-img",
    "qemu-io",
    "qemu-nbd",
    "resize2fs",
    "setpriv",
    "sfdisk",
    "sha256sum",
    "strace",
    "sync",
    "udevadm",
    "umount",
    "xfs_growfs",
    "xfs_io",
    "xfs_repair",
];

/// The modules that are loaded before the tests start; what they need comes before them.
const MODULES: &[&str] = &[
    "virtio_blk",
    "loop",
    "nbd",
    "ublk_drv",
    "dm-mod",
    "dm-delay",
    "dm-flakey",
    "dm-dust",
    "dm-log-writes",
    "dm-snapshot",
    "xfs",
];

/// Modules that [`super::guest::Guest::load`] loads for a test that wants them: the boot is a second
/// shorter without.
const ON_DEMAND: &[&str] = &["btrfs"];

/// Modules that a kernel may be without: a test skips what needs them.
const SPARE: &[&str] = &["dm-dust", "btrfs"];

/// The first steps. Everything after the modules is the driver's, which is xtask itself.
const INIT: &str = r#"#!/bin/sh
mount -t devtmpfs dev /dev
mount -t proc proc /proc
mount -t sysfs sys /sys
mkdir -p /dev/shm /dev/pts
mount -t tmpfs shm /dev/shm
mount -t tmpfs -o size=75% tmp /tmp
ip link set lo up
ulimit -c 0
while read module; do insmod /modules/$module.ko || echo "init: $module does not load"; done </modules/order
export HOME=/root CARGO_TARGET_DIR=/rig UNDERLAY_PROGRAM=/bin/underlay RUST_BACKTRACE=1
export PATH=/bin:/sbin:/usr/bin:/usr/sbin
xtask inside
echo "init: the driver ended with $?"
sync
poweroff -f
"#;

/// Builds the initramfs in `dir` around the programs under test.
pub fn build(dir: &Path, kernel: &Kernel, underlay: &Path) -> Result<PathBuf> {
    let root = dir.join("root");
    for made in ["bin", "dev", "etc", "modules", "proc", "rig", "root", "sys", "tmp", "usr", "var"]
    {
        fs::create_dir_all(root.join(made)).with_context(|| format!("making {made}"))?;
    }
    for alias in ["sbin", "usr/bin", "usr/sbin"] {
        symlink("/bin", root.join(alias))?;
    }
    fs::write(
        root.join("etc/passwd"),
        "root:x:0:0::/root:/bin/sh\nuser:x:1000:1000::/tmp:/bin/sh\n",
    )?;
    fs::write(root.join("etc/group"), "root:x:0:\ndisk:x:6:\nuser:x:1000:\nunderlay:x:990:\n")?;
    symlink("/proc/self/mounts", root.join("etc/mtab"))?;
    applets(&root)?;
    let mut libraries = BTreeSet::new();
    for name in PROGRAMS {
        let Some(program) = find(name) else { continue };
        let target = root.join("bin").join(name);
        if target.is_symlink() {
            fs::remove_file(&target)?;
        }
        fs::copy(&program, &target).with_context(|| format!("copying {}", program.display()))?;
        libraries.extend(needed(&program)?);
    }
    let xtask = std::env::current_exe().context("finding this program")?;
    let agent = place::target().join("debug/underlay-agent");
    let mut own = vec![("bin/underlay", underlay), ("bin/xtask", &xtask)];
    if agent.is_file() {
        own.push((AGENT.trim_start_matches('/'), &agent));
    }
    for (name, program) in own {
        libraries.extend(needed(program)?);
        let target = root.join(name);
        // Without what debuggers want it is a quarter in size, and the guest unpacks it sooner.
        let strip = tool("strip", ["-o"]).args([&target]).args([program]);
        if find("strip").is_none() || strip.run().is_err() {
            fs::copy(program, &target).with_context(|| format!("copying {}", program.display()))?;
        }
    }
    for library in libraries {
        let target = root.join(library.strip_prefix("/").unwrap_or(&library));
        if let Some(parent) = target.parent() {
            fs::create_dir_all(parent)?;
        }
        // Follows links: the name that the loader looks for holds the library itself.
        fs::copy(&library, &target).with_context(|| format!("copying {}", library.display()))?;
    }
    modules(&root, kernel)?;
    image::script(&root.join("init"), INIT)?;
    let initrd = dir.join("initrd");
    let names = tool("find", [".", "-mindepth", "1"]).within(&root).out()?;
    tool("cpio", ["--create", "--format=newc", "--quiet", "-F"])
        .args([&initrd])
        .within(&root)
        .input(names)
        .run()?;
    fs::remove_dir_all(&root)?;
    Ok(initrd)
}

/// busybox under each of its names.
fn applets(root: &Path) -> Result<()> {
    let busybox = image::busybox()?;
    fs::copy(&busybox, root.join("bin/busybox"))?;
    for name in tool(&busybox, ["--list"]).out()?.lines() {
        if name != "busybox" {
            symlink("busybox", root.join("bin").join(name))?;
        }
    }
    Ok(())
}

/// The libraries of a program, its loader among them, as the loader itself finds them.
fn needed(program: &Path) -> Result<Vec<PathBuf>> {
    let outcome = tool("ldd", [program]).outcome()?;
    if outcome.stdout.contains("not found") {
        bail!("{} lacks a library: {}", program.display(), outcome.said());
    }
    let words = outcome.stdout.split_whitespace().filter(|word| word.starts_with('/'));
    Ok(words.map(|word| PathBuf::from(word.trim_end_matches(':'))).collect())
}

/// Unpacks the modules and what they need into `root/modules`, and writes their order.
fn modules(root: &Path, kernel: &Kernel) -> Result<()> {
    let mut files = BTreeMap::new();
    let found = tool("find", [&kernel.modules]).args(["-name", "*.ko*", "-type", "f"]).out()?;
    for path in found.lines().map(PathBuf::from) {
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        let name = name.split(".ko").next().unwrap_or_default();
        files.insert(plain(name), path);
    }
    let dir = root.join("modules");
    let mut order = Vec::new();
    for name in MODULES.iter().filter(|name| there(&files, name)) {
        load(&plain(name), &files, &dir, &mut order)?;
    }
    fs::write(dir.join("order"), order.join("\n") + "\n")?;
    for name in ON_DEMAND.iter().filter(|name| there(&files, name)) {
        let mut order = order.clone();
        let before = order.len();
        load(&plain(name), &files, &dir, &mut order)?;
        fs::write(dir.join(format!("{name}.order")), order[before..].join("\n") + "\n")?;
    }
    Ok(())
}

/// Whether the module is there, or must be.
fn there(files: &BTreeMap<String, PathBuf>, name: &str) -> bool {
    !SPARE.contains(&name) || files.contains_key(&plain(name))
}

/// A module's name as the kernel has it.
fn plain(name: &str) -> String {
    name.replace('-', "_")
}

fn load(
    name: &str,
    files: &BTreeMap<String, PathBuf>,
    dir: &Path,
    order: &mut Vec<String>,
) -> Result<()> {
    if order.iter().any(|known| known == name) {
        return Ok(());
    }
    let file = files.get(name).ok_or_else(|| anyhow!("the kernel has no module {name}"))?;
    let into = dir.join(format!("{name}.ko"));
    match file.extension().and_then(|end| end.to_str()) {
        Some("xz") => tool("xz", ["-dc"]).args([file]).into_file(&into)?,
        _ => drop(fs::copy(file, &into)?),
    }
    let code = fs::read(&into).with_context(|| format!("reading {}", into.display()))?;
    for dependency in dependencies(&code) {
        load(&dependency, files, dir, order)?;
    }
    order.push(name.to_string());
    Ok(())
}

/// What a module says that it depends on: `depends=a,b` among the zero-ended words of its .modinfo.
fn dependencies(code: &[u8]) -> Vec<String> {
    const KEY: &[u8] = b"\0depends=";
    let Some(at) = code.windows(KEY.len()).position(|word| word == KEY) else { return Vec::new() };
    let list = code[at + KEY.len()..].split(|byte| *byte == 0).next().unwrap_or_default();
    let names = plain(&String::from_utf8_lossy(list));
    names.split(',').filter(|name| !name.is_empty()).map(String::from).collect()
}

/// A sparse file of `size` bytes: a drive of the guest.
pub fn drive(file: &Path, size: u64) -> Result<()> {
    let made = File::create(file).and_then(|file| file.set_len(size));
    made.with_context(|| format!("making {}", file.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_module_names_what_it_needs() {
        let code = b"ELF\0license=GPL\0depends=dm-mod,libcrc32c\0name=x\0";
        assert_eq!(dependencies(code), ["dm_mod", "libcrc32c"]);
        assert!(dependencies(b"\0depends=\0").is_empty());
        assert!(dependencies(b"no such word").is_empty());
    }
}
