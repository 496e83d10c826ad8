//! The devices that are measured, and what stands behind them.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, ensure};

use super::measure::fill;
use super::{Guest, SIZE};
use crate::bench::ublk::plan::Lane;
use crate::daemon::Daemon;
use crate::pattern;
use crate::place::Profile;
use crate::subject::text;
use crate::tool::{NO_ARGS, Process, tool};

/// How long a server may take to come up.
const START: Duration = Duration::from_secs(20);
/// Where devices are compared with the image before they are measured, and how much.
const LOOKS: u64 = 8;
const LOOK: usize = 64 << 10;

/// A device under test.
pub struct Subject {
    /// Which.
    pub lane: Lane,
    /// Its node.
    pub device: PathBuf,
    /// The process that serves it, if one does.
    pub server: Option<u32>,
    behind: Behind,
}

/// What makes a device.
enum Behind {
    /// An attachment of a daemon: which, and of what.
    Ublk(Images, &'static str),
    /// device-mapper.
    Mapped(&'static str),
    /// The kernel's NBD client; qemu-nbd, where that is its server.
    Nbd(Option<Process>),
    /// A loop device.
    Loop,
}

/// How a daemon reads its images.
#[derive(Clone, Copy)]
enum Images {
    Cached,
    Direct,
}

/// Everything that outlives a round.
pub struct Stage {
    /// The daemon whose images are cached: the default.
    pub daemon: Daemon,
    direct: Daemon,
    dir: PathBuf,
    overlays: PathBuf,
    image: PathBuf,
    /// What is beneath snapshots: a loop device of their own, or what they read would be counted as
    /// read from `LoopCached`.
    origin: PathBuf,
    copies: [PathBuf; 2],
    lasting: Vec<Subject>,
}

impl Stage {
    /// Two daemons with the image, and every device that lasts.
    pub fn new(guest: &Guest) -> Result<Stage> {
        let (a, b) = (guest.format("a")?, guest.format("b")?);
        let raw = guest.dir().join("base.raw");
        pattern::noise(&raw, SIZE, guest.seed)?;
        let daemon = |name: &str, settings: &str| -> Result<Daemon> {
            let daemon = Daemon::start(&guest.lab, guest.dir(), name, Profile::Release, settings)?;
            let (images, overlays) = (a.join(name), b.join(name));
            for (disk, path) in [("images", &images), ("overlays", &overlays)] {
                fs::create_dir_all(path)?;
                daemon.ok(&["disk", "add", text(path)?, "--name", disk])?;
            }
            daemon.ok(&["image", "import", text(&raw)?, "--name", name, "--disk", "images"])?;
            Ok(daemon)
        };
        let cached = daemon("cached", "image_io = \"cached\"\noverlay_io = \"direct\"\n")?;
        let direct = daemon("direct", "image_io = \"direct\"\noverlay_io = \"direct\"\n")?;
        fs::remove_file(&raw)?;
        let image = data(&a.join("cached"))?;
        let mut stage = Stage {
            origin: attach_loop(&image, &["-r", "--direct-io=off"])?,
            image,
            daemon: cached,
            direct,
            dir: guest.dir().to_path_buf(),
            overlays: b,
            copies: [guest.device("c")?, guest.device("d")?],
            lasting: Vec::new(),
        };
        let uncached = data(&a.join("direct"))?;
        stage.last(&uncached)?;
        Ok(stage)
    }

    /// Makes the devices that last; those that are direct have a copy of the image for themselves.
    fn last(&mut self, uncached: &Path) -> Result<()> {
        // All of it in the page cache, and nothing of the other copy.
        tool("sync", NO_ARGS).run()?;
        fs::write("/proc/sys/vm/drop_caches", "1").context("dropping the page cache")?;
        std::io::copy(&mut File::open(&self.image)?, &mut std::io::sink())?;
        let loops = [
            self.looped(Lane::LoopCached, &self.image, &["-r", "--direct-io=off"])?,
            self.looped(Lane::LoopDirect, uncached, &["-r", "--direct-io=on"])?,
        ];
        let bases = [
            self.ublk(Lane::BaseCached, Images::Cached, "image/cached")?,
            self.ublk(Lane::BaseDirect, Images::Direct, "image/direct")?,
        ];
        self.create("written")?;
        let replica = self.ublk(Lane::ReplicaWritten, Images::Cached, "replica/written")?;
        let nbd = self.nbd(Lane::NbdBase, "image/cached")?;
        let raw = |file: &Path, direct: &str| {
            format!("driver=raw,read-only=on,{}", file_node("file.", file, direct))
        };
        let qemu = [
            self.qemu(Lane::QemuCached, &["-r"], &raw(&self.image, "off"))?,
            self.qemu(Lane::QemuDirect, &["-r"], &raw(uncached, "on"))?,
        ];
        let overlay = self.overlay(Lane::QemuWritten)?;
        self.lasting.extend(loops.into_iter().chain(bases).chain([nbd]).chain(qemu));
        for subject in &self.lasting {
            same(&subject.device, &self.image).with_context(|| subject.lane.key())?;
        }
        for written in [replica, overlay] {
            fill(&written.device, 0, SIZE)?;
            self.lasting.push(written);
        }
        Ok(())
    }

    /// The devices that last.
    pub fn lasting(&self) -> &[Subject] {
        &self.lasting
    }

    /// The device of a lane that lasts.
    pub fn find(&self, lane: Lane) -> Result<&Subject> {
        let found = self.lasting.iter().find(|subject| subject.lane == lane);
        found.ok_or_else(|| anyhow!("{lane:?} is not there"))
    }

    /// The devices that last a round, with nothing written.
    pub fn fresh(&self) -> Result<Vec<Subject>> {
        self.create("ublk")?;
        self.create("nbd")?;
        let sparse = self.overlays.join("sparse");
        File::create(&sparse)?.set_len(SIZE)?;
        let all = vec![
            self.ublk(Lane::Replica, Images::Cached, "replica/ublk")?,
            self.snapshot(Lane::SnapshotN, "snapshot-n", &self.copies[0])?,
            self.snapshot(Lane::SnapshotP, "snapshot-p", &self.copies[1])?,
            self.nbd(Lane::NbdReplica, "replica/nbd")?,
            self.overlay(Lane::QemuOverlay)?,
            self.looped(Lane::LoopSparse, &sparse, &["--direct-io=on"])?,
        ];
        for subject in all.iter().filter(|subject| subject.lane != Lane::LoopSparse) {
            same(&subject.device, &self.image).with_context(|| subject.lane.key())?;
        }
        Ok(all)
    }

    /// Removes what lasted a round.
    pub fn discard(&self, fresh: Vec<Subject>) -> Result<()> {
        fresh.into_iter().try_for_each(|subject| self.remove(subject))?;
        for name in ["ublk", "nbd"] {
            self.daemon.ok(&["replica", "rm", name])?;
        }
        fs::remove_file(self.overlays.join("sparse"))?;
        fs::remove_file(self.qcow2(Lane::QemuOverlay))?;
        Ok(())
    }

    /// Has the cached base device attached once more, now with its data copied.
    pub fn copying(&mut self) -> Result<()> {
        self.daemon.ok(&["detach", "image/cached"])?;
        let told = self.daemon.json(&["attach", "image/cached", "--copy"])?;
        ensure!(told["zero_copy"] == false, "{told}");
        let device = told["device"].as_str().with_context(|| format!("no device in {told}"))?;
        let base = self.lasting.iter_mut().find(|subject| subject.lane == Lane::BaseCached);
        base.context("no cached base device")?.device = PathBuf::from(device);
        Ok(())
    }

    /// Removes and stops everything.
    pub fn close(mut self) -> Result<()> {
        let lasting = std::mem::take(&mut self.lasting);
        lasting.into_iter().try_for_each(|subject| self.remove(subject))?;
        tool("losetup", ["-d"]).args([&self.origin]).run()?;
        for daemon in [&mut self.daemon, &mut self.direct] {
            daemon.healthy()?;
            daemon.stop()?;
        }
        Ok(())
    }

    fn remove(&self, subject: Subject) -> Result<()> {
        match subject.behind {
            Behind::Ublk(images, export) => self.daemon(images).ok(&["detach", export]).map(drop),
            Behind::Mapped(name) => tool("dmsetup", ["remove", "--noudevsync", name]).run(),
            Behind::Loop => tool("losetup", ["-d"]).args([&subject.device]).run(),
            Behind::Nbd(server) => {
                tool("nbd-client", ["-d"]).args([&subject.device]).run()?;
                server.map_or(Ok(()), |mut server| server.kill())
            }
        }
    }

    fn daemon(&self, images: Images) -> &Daemon {
        match images {
            Images::Cached => &self.daemon,
            Images::Direct => &self.direct,
        }
    }

    fn create(&self, replica: &str) -> Result<()> {
        let on = ["--image", "cached", "--disk", "overlays"];
        self.daemon.ok(&[&["replica", "create", replica], &on[..]].concat()).map(drop)
    }

    fn ublk(&self, lane: Lane, images: Images, export: &'static str) -> Result<Subject> {
        let daemon = self.daemon(images);
        let told = daemon.json(&["attach", export])?;
        ensure!(told["zero_copy"] == true, "{export} is not attached in zero copy: {told}");
        let device = told["device"].as_str().with_context(|| format!("no device in {told}"))?;
        let (device, server) = (PathBuf::from(device), Some(daemon.id()?));
        Ok(Subject { lane, device, server, behind: Behind::Ublk(images, export) })
    }

    fn looped(&self, lane: Lane, file: &Path, how: &[&str]) -> Result<Subject> {
        let device = attach_loop(file, how)?;
        Ok(Subject { lane, device, server: None, behind: Behind::Loop })
    }

    fn nbd(&self, lane: Lane, export: &str) -> Result<Subject> {
        let device = connect(self.daemon.nbd(), export)?;
        let server = Some(self.daemon.id()?);
        Ok(Subject { lane, device, server, behind: Behind::Nbd(None) })
    }

    /// A qcow2 overlay on the image, served by qemu-nbd; the overlay direct, the image cached.
    fn overlay(&self, lane: Lane) -> Result<Subject> {
        let file = self.qcow2(lane);
        tool("qemu-img", ["create", "-q", "-f", "qcow2", "-F", "raw", "-b"])
            .args([&self.image, &file])
            .run()?;
        let node = format!(
            "driver=qcow2,cache.direct=on,{},backing.driver=raw,{}",
            file_node("file.", &file, "on"),
            file_node("backing.file.", &self.image, "off")
        );
        self.qemu(lane, &[], &node)
    }

    fn qcow2(&self, lane: Lane) -> PathBuf {
        self.overlays.join(format!("{lane:?}.qcow2"))
    }

    fn qemu(&self, lane: Lane, how: &[&str], node: &str) -> Result<Subject> {
        let socket = self.dir.join(format!("{lane:?}.sock"));
        let _ = fs::remove_file(&socket);
        let mut server = tool("qemu-nbd", ["-t", "-e", "4", "-x", "bench"])
            .args(how)
            .args(["--image-opts", "-k"])
            .args([&socket])
            .args([node])
            .background(&self.dir.join("qemu-nbd.log"))?;
        server.until(START, || socket.exists())?;
        let (device, id) = (connect(&socket, "bench")?, server.id());
        Ok(Subject { lane, device, server: Some(id), behind: Behind::Nbd(Some(server)) })
    }

    fn snapshot(&self, lane: Lane, name: &'static str, copies: &Path) -> Result<Subject> {
        // What an earlier round left would be taken for a snapshot's state.
        File::options().write(true).open(copies)?.write_all_at(&[0; 4096], 0)?;
        let how = if lane == Lane::SnapshotP { "P" } else { "N" };
        let (origin, copies) = (self.origin.display(), copies.display());
        let table = format!("0 {} snapshot {origin} {copies} {how} 8\n", SIZE / 512);
        tool("dmsetup", ["create", "--noudevsync", name]).input(table).run()?;
        tool("dmsetup", ["mknodes", name]).run()?;
        let device = Path::new("/dev/mapper").join(name);
        Ok(Subject { lane, device, server: None, behind: Behind::Mapped(name) })
    }
}

fn attach_loop(file: &Path, how: &[&str]) -> Result<PathBuf> {
    let device = tool("losetup", ["--find", "--show"]).args(how).args([file]).out()?;
    Ok(PathBuf::from(device.trim()))
}

/// Connects the kernel's NBD client to an export, the same way whoever serves it; the device's node.
fn connect(socket: &Path, export: &str) -> Result<PathBuf> {
    let free = |index: &u32| {
        let device = PathBuf::from(format!("/sys/block/nbd{index}"));
        device.exists() && !device.join("pid").exists()
    };
    let index = (0..64).find(free).context("every NBD device is in use")?;
    let device = PathBuf::from(format!("/dev/nbd{index}"));
    tool("nbd-client", ["-unix"]).args([socket]).args(["-N", export]).args([&device]).run()?;
    Ok(device)
}

/// A file as qemu's options have it.
fn file_node(prefix: &str, file: &Path, direct: &str) -> String {
    let file = file.display();
    format!(
        "{prefix}driver=file,{prefix}filename={file},{prefix}aio=io_uring,{prefix}cache.direct={direct}"
    )
}

/// The image's file on a disk that holds one.
fn data(disk: &Path) -> Result<PathBuf> {
    let images = disk.join("underlay/images");
    let entries = fs::read_dir(&images).with_context(|| format!("reading {}", images.display()))?;
    let mut files = entries.flatten().map(|entry| entry.path().join("data"));
    files.find(|file| file.is_file()).with_context(|| format!("no image in {}", images.display()))
}

/// Compares a device with the image, here and there: nothing else is worth measuring.
fn same(device: &Path, image: &Path) -> Result<()> {
    let (device, image) = (File::open(device)?, File::open(image)?);
    let (mut left, mut right) = (vec![0; LOOK], vec![0; LOOK]);
    for at in (0..LOOKS).map(|look| look * (SIZE / LOOKS)) {
        device.read_exact_at(&mut left, at)?;
        image.read_exact_at(&mut right, at)?;
        ensure!(left == right, "it is not the image at byte {at}");
    }
    Ok(())
}
