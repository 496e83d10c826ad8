//! The guest: a real Debian on a real disk image, and the kernel and first steps to boot it with.
//!
//! The image is what distributions publish in kind: ext4 in a GPT partition, qcow2 with compressed
//! clusters. It is built without mounting anything (mmdebstrap, `mke2fs -d`, sfdisk), and kept in
//! the cache. Its init runs a small job that writes files, their digests and a line to the console,
//! then powers the machine off; what it wrote can be checked from outside.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};

use crate::apt::Apt;
use crate::report::note;
use crate::tool::{find, tool};
use crate::{place, setup};

/// Where the partition starts, in bytes.
pub const PARTITION: u64 = 1 << 20;
/// The size of the disk, in bytes.
const SIZE: u64 = 256 << 20;
/// Part of the file's name: changes whenever the recipe below does.
const RECIPE: &str = "guest-1";
/// The Debian release inside.
const SUITE: &str = "trixie";
/// Where the guest's kernel is looked for, the best first.
const KERNEL_SUITES: [&str; 2] = ["trixie-backports", "trixie"];
/// The meta package that stands for the newest kernel of a suite.
const KERNEL: &str = "linux-image-cloud-amd64";

/// What the guest does, as root: files, their digests, a word to the console.
const JOB: &str = r#"#!/bin/sh
mkdir -p /var/guest && cd /var/guest || exit 1
. /etc/os-release
echo "$PRETTY_NAME $(uname -r)" >boot.log
dd if=/dev/urandom of=blob bs=1M count=8 2>/dev/null
i=0; while [ $i -lt 50 ]; do echo "file $i" >f$i; i=$((i+1)); done
dpkg -l >packages
sha256sum * >/var/guest.sha256
sync
echo "GUEST-WROTE $(wc -l </var/guest.sha256) $(cat boot.log)" >/dev/console
"#;

/// The guest's init. It powers off by reboot(2): sysrq-o races with the disk going away.
const INIT: &str = r#"#!/bin/sh
mount -t proc proc /proc
mount -o remount,rw / && /sbin/guest-job
cd /; sync
mount -o remount,ro / && echo GUEST-OK
exec perl -e 'syscall(169,0xfee1dead,0x28121969,0x4321fedc,0)'
"#;

/// The first steps, in the initramfs: load the disk's driver, mount the root, hand over.
const FIRST_STEPS: &str = r#"#!/busybox sh
b=/busybox
$b mount -t devtmpfs d /dev
$b insmod /virtio_blk.ko
until [ -b /dev/vda1 ]; do $b sleep 0.1; done
$b mount -o ro -t ext4 /dev/vda1 /mnt
$b mount --move /dev /mnt/dev
exec $b switch_root /mnt /sbin/guest-init
"#;

/// The image, from the cache or built now: a compressed qcow2.
pub fn debian() -> Result<PathBuf> {
    let image = place::cache().join(format!("{RECIPE}.qcow2"));
    if image.exists() {
        return Ok(image);
    }
    if !nix::unistd::geteuid().is_root() {
        bail!("building the guest's image needs root");
    }
    let programs = ["mmdebstrap", "sfdisk", "mke2fs", "qemu-img"];
    setup::need(&programs)?;
    let apt = Apt::unprivileged()?;
    note(&format!("image: building a Debian {SUITE} disk image, once"));
    let work = place::run().join("image");
    fs::create_dir_all(&work)?;
    let root = work.join("root");
    tool("mmdebstrap", ["--quiet", "--variant=essential", "--include=mount"])
        .args([SUITE.as_ref(), root.as_os_str()])
        .args([&apt.mirror])
        .limit(Duration::from_secs(600))
        .run()?;
    for waste in ["doc", "man", "locale", "info", "zoneinfo"] {
        let dir = root.join("usr/share").join(waste);
        if dir.exists() {
            fs::remove_dir_all(dir)?;
        }
    }
    // What the build's mirror was is nobody's business in the image.
    fs::write(root.join("etc/apt/sources.list"), "")?;
    fs::write(root.join("etc/hostname"), "guest\n")?;
    script(&root.join("sbin/guest-job"), JOB)?;
    script(&root.join("sbin/guest-init"), INIT)?;
    let raw = work.join("disk.raw");
    File::create(&raw)?.set_len(SIZE)?;
    let sectors = (SIZE - 2 * PARTITION) / 512;
    let table = format!("label: gpt\n1: start=2048, size={sectors}, type=L, name=root\n");
    tool("sfdisk", ["-q"]).args([&raw]).input(table).run()?;
    tool("mke2fs", ["-q", "-F", "-t", "ext4", "-L", "root", "-b", "4096"])
        .args(["-E", &format!("offset={PARTITION},root_owner=0:0"), "-d"])
        .args([&root, &raw])
        .args([(sectors / 8).to_string()])
        .run()?;
    let made = work.join("disk.qcow2");
    tool("qemu-img", ["convert", "-c", "-O", "qcow2", "-o", "compression_type=zstd"])
        .args([&raw, &made])
        .run()?;
    fs::rename(&made, &image).context("moving the image into the cache")?;
    fs::remove_dir_all(&work)?;
    Ok(image)
}

/// A kernel and the initramfs that boots the image with it.
pub struct Kernel {
    /// The kernel's file.
    pub vmlinuz: PathBuf,
    /// The initramfs.
    pub initrd: PathBuf,
    /// Where its modules are: .ko.xz files in directories by subsystem.
    pub modules: PathBuf,
}

/// A Debian cloud kernel, from the cache or unpacked now.
pub fn kernel() -> Result<Kernel> {
    setup::need(&["cpio", "xz", "dpkg"])?;
    let mut missing = Vec::new();
    for suite in KERNEL_SUITES {
        let dir = place::cache().join(format!("kernel-{suite}"));
        if !dir.exists()
            && let Err(error) = fetch(suite, &dir)
        {
            note(&format!("image: no kernel from {suite}: {error:#}"));
            missing.push(format!("{error:#}"));
            continue;
        }
        let modules = modules(&dir)?.join("kernel");
        return Ok(Kernel { vmlinuz: vmlinuz(&dir)?, initrd: initrd(&dir)?, modules });
    }
    bail!("no kernel for the guest: {}", missing.join("; "))
}

fn fetch(suite: &str, dir: &Path) -> Result<()> {
    let apt = Apt::unprivileged()?;
    let partial = dir.with_extension("partial");
    if partial.exists() {
        fs::remove_dir_all(&partial)?;
    }
    fs::create_dir_all(&partial)?;
    let kernel = |name: &str| name.starts_with("linux-") && name.ends_with("-cloud-amd64");
    apt.unpack(suite, KERNEL, kernel, &partial)?;
    vmlinuz(&partial)?;
    fs::rename(&partial, dir).context("moving the kernel into the cache")
}

/// The kernel in an unpacked package: newer ones keep it with its modules.
fn vmlinuz(dir: &Path) -> Result<PathBuf> {
    let beside = modules(dir)?.join("vmlinuz");
    if beside.exists() {
        return Ok(beside);
    }
    first(&dir.join("boot"), |name| name.starts_with("vmlinuz-"))
}

/// The modules' directory in an unpacked package.
fn modules(dir: &Path) -> Result<PathBuf> {
    let homes = ["usr/lib/modules", "lib/modules"].map(|path| dir.join(path));
    let home = homes.iter().find(|path| path.is_dir());
    first(home.ok_or_else(|| anyhow!("no modules in {}", dir.display()))?, |_| true)
}

fn initrd(dir: &Path) -> Result<PathBuf> {
    let initrd = place::cache().join(format!("{RECIPE}.initrd"));
    let work = place::run().join("initrd");
    if work.exists() {
        fs::remove_dir_all(&work)?;
    }
    for made in ["dev", "proc", "mnt"] {
        fs::create_dir_all(work.join(made))?;
    }
    fs::copy(busybox()?, work.join("busybox"))?;
    let module = modules(dir)?.join("kernel/drivers/block/virtio_blk.ko.xz");
    tool("xz", ["-dc"]).args([&module]).into_file(&work.join("virtio_blk.ko"))?;
    script(&work.join("init"), FIRST_STEPS)?;
    let names = ".\ndev\nproc\nmnt\nbusybox\nvirtio_blk.ko\ninit\n";
    tool("cpio", ["--create", "--format=newc", "--quiet", "-F"])
        .args([&initrd])
        .within(&work)
        .input(names)
        .run()?;
    fs::remove_dir_all(&work)?;
    Ok(initrd)
}

/// A busybox that needs no libraries: the machine's own may be another.
pub fn busybox() -> Result<PathBuf> {
    if let Some(own) = find("busybox") {
        let program = fs::read(&own).with_context(|| format!("reading {}", own.display()))?;
        // A program that needs libraries names their loader in its first page.
        let head = &program[..program.len().min(4096)];
        if !head.windows(8).any(|name| name == b"ld-linux") {
            return Ok(own);
        }
    }
    let dir = place::cache().join("busybox");
    let found = ["usr/bin/busybox", "bin/busybox"].map(|path| dir.join(path));
    if !found.iter().any(|file| file.exists()) {
        Apt::unprivileged()?.unpack(SUITE, "busybox-static", |_| false, &dir)?;
    }
    let file = found.into_iter().find(|file| file.exists());
    file.ok_or_else(|| anyhow!("no busybox in the package busybox-static"))
}

/// The first entry of `dir`, in order of names, that `wanted` accepts.
fn first(dir: &Path, wanted: impl Fn(&str) -> bool) -> Result<PathBuf> {
    let entries = fs::read_dir(dir).with_context(|| format!("reading {}", dir.display()))?;
    let names = entries.flatten().filter_map(|entry| entry.file_name().into_string().ok());
    let name = names.filter(|name| wanted(name)).min();
    name.map(|name| dir.join(name)).ok_or_else(|| anyhow!("nothing fitting in {}", dir.display()))
}

/// Writes a program in words.
pub fn script(file: &Path, text: &str) -> Result<()> {
    use std::os::unix::fs::PermissionsExt;
    fs::write(file, text).with_context(|| format!("writing {}", file.display()))?;
    Ok(fs::set_permissions(file, fs::Permissions::from_mode(0o755))?)
}
