//! Disks that are read-only, full, or gone: a clear error that names them, and nobody else suffers.
//!
//! Invariants checked:
//! - what was flushed is there once the disk is well again, and reads go on where they can;
//! - a replica on a healthy disk works on, whatever becomes of the others;
//! - writes that can't be kept fail with an error code; the daemon stays.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Result, bail, ensure};

use crate::daemon::Daemon;
use crate::lab::{Fs, Lab, LoopDisk, loop_disks};
use crate::nbd::{Client, EIO, ENOSPC, EPERM, Failure};
use crate::place::Profile;
use crate::report::Report;
use crate::subject::text;
use crate::tool::{Process, tool};
use crate::{pattern, setup};

/// Size of the image, in bytes.
const SIZE: u64 = 48 << 20;
/// Size of a healthy disk, in bytes.
const DISK: u64 = 256 << 20;
/// Size of the disk that is filled, in bytes.
const SMALL: u64 = 64 << 20;
/// One write, in bytes.
const PIECE: usize = 64 << 10;

/// Runs the rig.
pub fn run(lab: &Lab, report: &mut Report) {
    let ready = loop_disks().and_then(|()| setup::need(&["mkfs.ext4", "e2fsck"]));
    if let Err(error) = ready {
        return report.skip("sick disks", &format!("{error:#}"));
    }
    report.check("sick disks: read-only", || read_only(lab));
    report.check("sick disks: read-only all of a sudden", || aborted(lab));
    report.check("sick disks: full", || full(lab));
    match setup::need(&["nbdfuse", "nbdkit"]) {
        Err(error) => report.skip("sick disks: removed", &format!("{error:#}")),
        Ok(()) => {
            report.check("sick disks: removed", || removed(lab));
        }
    }
}

/// A node with the image on disk `well`, a replica there and one on disk `sick`.
struct Node {
    dir: PathBuf,
    daemon: Daemon,
    _well: LoopDisk,
}

impl Node {
    fn new(lab: &Lab, dir: PathBuf, name: &str, sick: &Path) -> Result<Node> {
        let raw = dir.join("base.raw");
        pattern::image(&raw, SIZE, 6)?;
        let well = LoopDisk::new(&dir, "well", DISK, Fs::Ext4)?;
        let daemon = Daemon::start(lab, &dir, name, Profile::Debug, "")?;
        daemon.ok(&["disk", "add", text(&well.path)?, "--name=well"])?;
        daemon.ok(&["disk", "add", text(sick)?, "--name=sick"])?;
        daemon.ok(&["image", "import", text(&raw)?, "--name=base", "--disk=well"])?;
        daemon.ok(&["replica", "create", "far", "--image=base", "--disk=well"])?;
        daemon.ok(&["replica", "create", "near", "--image=base", "--disk=sick"])?;
        let mut node = Node { dir, daemon, _well: well };
        node.write("near", 1, 0)?;
        node.write("far", 1, 0)?;
        Ok(node)
    }

    fn open(&self, replica: &str) -> Result<Client> {
        Client::open(self.daemon.nbd(), &format!("replica/{replica}"))
    }

    /// Writes and flushes a piece that says `byte`, at the piece's number.
    fn write(&mut self, replica: &str, byte: u8, piece: u64) -> Result<()> {
        let mut client = self.open(replica)?;
        client.write(piece * PIECE as u64, &[byte; PIECE], 0)?;
        Ok(client.flush()?)
    }

    fn holds(&self, replica: &str, byte: u8, piece: u64) -> Result<()> {
        let mut found = vec![0; PIECE];
        self.open(replica)?.read(piece * PIECE as u64, &mut found)?;
        match pattern::differ(&found, &[byte; PIECE]) {
            None => Ok(()),
            Some(at) => bail!("replica {replica}, piece {piece}: byte {at} is not {byte}"),
        }
    }

    /// The replica on the healthy disk takes a write, and the image is what it was.
    fn others_work(&mut self, byte: u8) -> Result<()> {
        self.write("far", byte, 2)?;
        self.holds("far", byte, 2)?;
        let found = Client::open(self.daemon.nbd(), "image/base")?.read_all(SIZE)?;
        let same = found == fs::read(self.dir.join("base.raw"))?;
        ensure!(same, "the image is not what it was");
        self.daemon.healthy()
    }

    /// What `status` says of the state of the sick disk.
    fn state(&self) -> Result<String> {
        let list = self.daemon.json(&["disk", "list"])?;
        let disks = list.as_array().cloned().unwrap_or_default();
        let sick = disks.into_iter().find(|disk| disk["name"] == "sick");
        Ok(sick.map(|disk| disk["state"].as_str().unwrap_or_default().into()).unwrap_or_default())
    }
}

fn read_only(lab: &Lab) -> Result<String> {
    let dir = lab.dir("read-only")?;
    let sick = LoopDisk::new(&dir, "sick", DISK, Fs::Ext4)?;
    let mut node = Node::new(lab, dir, "read-only", &sick.path)?;
    node.daemon.stop()?;
    sick.remount("ro")?;
    node.daemon.restart()?;
    let state = node.state()?;
    ensure!(state == "read_only", "the disk's state is {state:?}, not read_only");
    node.daemon.refused(&["replica", "create", "x", "--image=base", "--disk=sick"], &["sick"])?;
    let source = node.dir.join("base.raw");
    fs::write(node.dir.join("small.raw"), [5; 8192])?;
    let small = node.dir.join("small.raw");
    node.daemon
        .refused(&["image", "import", text(&small)?, "--name=y", "--disk=sick"], &["sick"])?;
    ensure!(source.exists(), "the source is gone");
    // Its replica may be refused or served for reading, but never take a write.
    if let Ok(mut client) = node.open("near") {
        match client.write(0, &[3; 512], 0).and_then(|()| client.flush()) {
            Err(Failure::Refused(EPERM | EIO)) => {}
            other => bail!("a write to a read-only disk: {other:?}"),
        }
    }
    node.others_work(2)?;
    let fresh = node.dir.join("fresh");
    fs::create_dir_all(&fresh)?;
    tool("mount", ["-t", "tmpfs", "-o", "ro", "tmpfs"]).args([&fresh]).run()?;
    let refusal =
        node.daemon.refused(&["disk", "add", text(&fresh)?, "--name=z"], &[text(&fresh)?]);
    tool("umount", [&fresh]).run()?;
    refusal?;
    node.daemon.stop()?;
    sick.remount("rw")?;
    node.daemon.restart()?;
    node.holds("near", 1, 0)?;
    node.write("near", 4, 1)?;
    node.daemon.ok(&["fsck"])?;
    node.daemon.stop()?;
    Ok(String::new())
}

/// What ext4 does on an error: the file system turns read-only under open files.
fn aborted(lab: &Lab) -> Result<String> {
    let dir = lab.dir("aborted")?;
    let sick = LoopDisk::new(&dir, "sick", DISK, Fs::Ext4)?;
    let mut node = Node::new(lab, dir.clone(), "aborted", &sick.path)?;
    let mut client = node.open("near")?;
    sick.remount("abort")?;
    let mut codes = Vec::new();
    for piece in 0..64 {
        let done = client.write(piece * 4096 + (8 << 20), &[3; 4096], 0);
        match done.and_then(|()| client.flush()) {
            Ok(()) => bail!("a flush on a dead file system was acknowledged"),
            Err(Failure::Refused(code)) => codes.push(code),
            Err(Failure::Lost(error)) => bail!("instead of an error code: {error:#}"),
        }
    }
    codes.sort_unstable();
    codes.dedup();
    node.holds("near", 1, 0)?;
    node.others_work(2)?;
    drop(client);
    node.daemon.kill()?;
    drop(sick);
    let file = dir.join("sick.disk");
    // It mends the journal: exit code 1 says so.
    let mended = tool("e2fsck", ["-fy"]).args([&file]).outcome()?;
    ensure!(mended.code <= 1, "e2fsck: {}", mended.said());
    let _sick = LoopDisk::attach(&dir, "sick")?;
    node.daemon.restart()?;
    node.holds("near", 1, 0)?;
    node.write("near", 4, 1)?;
    node.others_work(3)?;
    node.daemon.stop()?;
    Ok(format!("error codes {codes:?}"))
}

fn full(lab: &Lab) -> Result<String> {
    let dir = lab.dir("full")?;
    let sick = LoopDisk::new(&dir, "sick", SMALL, Fs::Ext4)?;
    let mut node = Node::new(lab, dir, "full", &sick.path)?;
    let filler = sick.path.join("filler");
    fill(&filler, 4 << 20)?;
    let mut client = node.open("near")?;
    let (mut taken, mut refused) = (Vec::new(), 0);
    for piece in 10..200 {
        match client.write(piece * PIECE as u64, &[6; PIECE], 0) {
            Ok(()) => taken.push(piece),
            Err(Failure::Refused(ENOSPC)) => refused += 1,
            Err(failure) => bail!("piece {piece}: {failure:?}, not ENOSPC"),
        }
    }
    ensure!(!taken.is_empty() && refused > 0, "{} taken, {refused} refused", taken.len());
    // Whether there is room to make them durable or not: the answer must be true.
    let flushed = client.flush().is_ok();
    for piece in &taken {
        node.holds("near", 6, *piece)?;
    }
    node.others_work(2)?;
    node.daemon
        .refused(
            &["image", "import", text(&node.dir.join("base.raw"))?, "--name=b2", "--disk=sick"],
            &[],
        )
        // The content is known on disk `well`: then the new name costs nothing and is fine.
        .or_else(|_| node.daemon.ok(&["image", "inspect", "b2"]).map(|_| String::new()))?;
    let other = node.dir.join("other.raw");
    pattern::noise(&other, SIZE, 17)?;
    node.daemon
        .refused(&["image", "import", text(&other)?, "--name=c", "--disk=sick"], &["sick"])?;
    fs::remove_file(&filler)?;
    client.write(0, &[8; PIECE], 0)?;
    client.flush()?;
    drop(client);
    node.daemon.kill()?;
    node.daemon.restart()?;
    node.holds("near", 8, 0)?;
    for piece in &taken {
        node.holds("near", 6, *piece)?;
    }
    // Not a byte left: a new replica is refused, and nothing of it stays.
    fill(&filler, 0)?;
    node.daemon.refused(&["replica", "create", "x", "--image=base", "--disk=sick"], &["sick"])?;
    node.daemon.refused(&["replica", "inspect", "x"], &["x"])?;
    fs::remove_file(&filler)?;
    node.daemon.ok(&["fsck"])?;
    node.daemon.stop()?;
    Ok(format!("{} pieces taken, {refused} refused, flush {flushed}", taken.len()))
}

/// Fills the file's disk but for `leave` bytes.
fn fill(file: &Path, leave: u64) -> Result<()> {
    let mut filler = File::create(file)?;
    // Ever smaller pieces, and to the disk each time: what is promised must have its place.
    for piece in [1 << 20, 64 << 10, 4096] {
        while filler.write_all(&vec![1; piece]).and_then(|()| filler.sync_data()).is_ok() {}
    }
    let size = filler.metadata()?.len();
    filler.set_len(size.saturating_sub(leave))?;
    Ok(filler.sync_all()?)
}

/// A disk on nbdkit through FUSE and a loop device: killing nbdfuse pulls it for real.
fn removed(lab: &Lab) -> Result<String> {
    let dir = lab.dir("removed")?;
    let backing = dir.join("backing");
    File::create(&backing)?.set_len(DISK)?;
    tool("mkfs.ext4", ["-q", "-F"]).args([&backing]).run()?;
    let mut pulled = Pullable::new(&dir, &backing)?;
    let mut node = Node::new(lab, dir.clone(), "removed", &pulled.mount)?;
    let mut client = node.open("near")?;
    pulled.server.kill()?;
    let flush = client.write(8 << 20, &[3; PIECE], 0).and_then(|()| client.flush());
    match flush {
        Err(Failure::Refused(EIO)) => {}
        other => bail!("a flushed write to a disk that is gone: {other:?}, not EIO"),
    }
    node.others_work(2)?;
    drop(client);
    node.daemon.kill()?;
    drop(pulled);
    node.daemon.restart()?;
    let state = node.state()?;
    ensure!(state == "missing", "the disk's state is {state:?}, not missing");
    node.daemon.refused(&["image", "rm", "base"], &["near"])?;
    node.daemon.refused(&["replica", "create", "x", "--image=base", "--disk=sick"], &["sick"])?;
    ensure!(node.open("near").is_err(), "a replica on a missing disk was opened");
    let repaired = node.daemon.ask(&["fsck", "--repair"])?;
    ensure!(repaired.code <= 1, "fsck --repair: {}", repaired.said());
    node.others_work(3)?;
    node.daemon.stop()?;
    let _back = Pullable::new(&dir, &backing)?;
    node.daemon.restart()?;
    node.holds("near", 1, 0)?;
    node.write("near", 4, 1)?;
    node.daemon.ok(&["fsck"])?;
    node.daemon.stop()?;
    Ok(String::new())
}

/// A mounted disk whose device can vanish.
struct Pullable {
    mount: PathBuf,
    fuse: PathBuf,
    device: String,
    server: Process,
}

impl Pullable {
    fn new(dir: &Path, backing: &Path) -> Result<Pullable> {
        let (fuse, mount) = (dir.join("fuse"), dir.join("sick"));
        for made in [&fuse, &mount] {
            fs::create_dir_all(made)?;
        }
        let file = fuse.join("disk");
        let mut server = tool("nbdfuse", [text(&file)?, "--command", "nbdkit", "-s"])
            .args(["--exit-with-parent", "file", text(backing)?])
            .background(&dir.join("nbdfuse.log"))?;
        server.until(Duration::from_secs(10), || file.exists())?;
        let device = tool("losetup", ["--find", "--show"]).args([&file]).out()?.trim().to_string();
        let disk = Pullable { mount, fuse, device, server };
        tool("mount", [&disk.device]).args([&disk.mount]).run()?;
        Ok(disk)
    }
}

impl Drop for Pullable {
    fn drop(&mut self) {
        // Each step is tried: where the device is gone, only some of them can succeed.
        let _ = tool("umount", ["-l".as_ref(), self.mount.as_os_str()]).outcome();
        let _ = tool("losetup", ["-d", &self.device]).outcome();
        let _ = self.server.kill();
        let _ = tool("umount", ["-l".as_ref(), self.fuse.as_os_str()]).outcome();
    }
}
