//! The node of the test: disks on device-mapper, an image and replicas, attached, and what they must
//! hold.

use std::path::PathBuf;
use std::time::Duration;
use std::{fs, io};

use anyhow::{Context, Result, ensure};
use fastrand::Rng;

use crate::daemon::Daemon;
use crate::lab::Fs;
use crate::pattern;
use crate::subject::text;
use crate::tool::tool;
use crate::vm::guest::Guest;
use crate::vm::limited::Limited;
use crate::vm::mapped::Mapped;

/// Size of the image and of the replica on it, in bytes.
pub(super) const SIZE: u64 = 16 << 20;
/// Size of a mapped disk, in bytes.
const DISK: u64 = 320 << 20;
/// Size of the disk that is filled, and where it stands, in bytes.
const SMALL: u64 = 64 << 20;
const BEHIND: u64 = DISK;
/// The part of the replica that is written before anything fails, in bytes.
pub(super) const WRITTEN: std::ops::Range<u64> = 4 << 20..8 << 20;
pub(super) const BLOCK: u64 = 4096;
/// One write, in bytes.
pub(super) const PIECE: usize = 64 << 10;
/// How long who does not need a disk that hangs may take meanwhile.
pub(super) const MEANWHILE: Duration = Duration::from_secs(5);
const VM: &str = "/dev/underlay/replica/vm";

/// Three disks, an image and replicas, attached.
pub(super) struct Node {
    /// On the replica's disk.
    pub(super) fs: Fs,
    pub(super) daemon: Daemon,
    pub(super) image_disk: Mapped,
    pub(super) replica_disk: Mapped,
    pub(super) small_disk: Mapped,
    /// Where they are mounted.
    pub(super) image_at: PathBuf,
    pub(super) replica_at: PathBuf,
    pub(super) small_at: PathBuf,
    pub(super) image: Limited,
    pub(super) vm: Limited,
    /// A replica of another image; both are on disk c.
    pub(super) far: Limited,
    pub(super) base: Vec<u8>,
    /// What the replica `vm` holds.
    pub(super) truth: Vec<u8>,
    /// Blocks that hold something, in the image only; each is used once.
    pub(super) untouched: Vec<u64>,
    pub(super) rng: Rng,
    pub(super) rounds: u8,
}

impl Node {
    pub(super) fn new(guest: &Guest, fs: Fs) -> Result<Node> {
        let at = |name: &str| guest.dir().join(name);
        let well = guest.format("c")?;
        let image_disk = Mapped::new(guest, "sick-image", "a", 0, DISK)?;
        let replica_disk = Mapped::new(guest, "sick-replica", "b", 0, DISK)?;
        let small_disk = Mapped::new(guest, "sick-small", "b", BEHIND, SMALL)?;
        let (image_at, replica_at, small_at) = (at("a"), at("b"), at("small"));
        image_disk.format(Fs::Ext4, &image_at, quiet(Fs::Ext4))?;
        replica_disk.format(fs, &replica_at, quiet(fs))?;
        small_disk.format(Fs::Ext4, &small_at, quiet(Fs::Ext4))?;
        let (raw, other) = (at("base.raw"), at("other.raw"));
        pattern::image(&raw, SIZE, guest.seed)?;
        pattern::noise(&other, 4 << 20, guest.seed)?;
        // A node of its own: nothing is known of disks that are gone.
        let state = at(&format!("{fs:?}"));
        fs::create_dir_all(&state)?;
        let daemon = guest.daemon_in(&state, "")?;
        let disks = [("a", &image_at), ("b", &replica_at), ("c", &well), ("small", &small_at)];
        for (name, path) in disks {
            daemon.ok(&["disk", "add", text(path)?, "--name", name])?;
        }
        for (name, file, disk) in [("base", &raw, "a"), ("other", &other, "c")] {
            daemon.ok(&["image", "import", text(file)?, "--name", name, "--disk", disk])?;
        }
        for (name, image, disk) in
            [("vm", "base", "b"), ("far", "other", "c"), ("full", "base", "small")]
        {
            daemon.ok(&["replica", "create", name, "--image", image, "--disk", disk])?;
        }
        for export in ["image/base", "replica/vm", "replica/far"] {
            daemon.ok(&["attach", export])?;
        }
        let base = fs::read(&raw)?;
        // Otherwise they would be read where the image's disk fails.
        [&raw, &other].map(fs::remove_file).into_iter().collect::<io::Result<()>>()?;
        let mut rng = Rng::with_seed(guest.seed);
        let holds = |block: &u64| {
            let at = (block * BLOCK) as usize;
            let mut sectors = base[at..at + BLOCK as usize].chunks(512);
            !WRITTEN.contains(&(block * BLOCK)) && sectors.all(|it| it.iter().any(|b| *b != 0))
        };
        let mut untouched: Vec<_> = (0..SIZE / BLOCK).filter(holds).collect();
        rng.shuffle(&mut untouched);
        let mut node = Node {
            fs,
            daemon,
            image_disk,
            replica_disk,
            small_disk,
            image_at,
            replica_at,
            small_at,
            image: Limited::open("/dev/underlay/image/base")?,
            vm: Limited::open(VM)?,
            far: Limited::open("/dev/underlay/replica/far")?,
            truth: base.clone(),
            base,
            untouched,
            rng,
            rounds: 0,
        };
        let mut data = vec![0; (WRITTEN.end - WRITTEN.start) as usize];
        node.rng.fill(&mut data);
        node.put(WRITTEN.start, &data)?;
        node.vm.flush()??;
        Ok(node)
    }

    /// Writes what will be there from now on.
    pub(super) fn put(&mut self, offset: u64, data: &[u8]) -> Result<()> {
        self.vm.write(offset, data)?.with_context(|| format!("a write at {offset}"))?;
        self.truth[offset as usize..offset as usize + data.len()].copy_from_slice(data);
        Ok(())
    }

    /// A piece of new content.
    pub(super) fn noise(&mut self) -> Vec<u8> {
        let mut data = vec![0; PIECE];
        self.rng.fill(&mut data);
        data
    }

    /// The offset of a block that is in the image only, and that nobody has read since the caches
    /// were dropped.
    pub(super) fn untouched(&mut self) -> Result<u64> {
        self.untouched.pop().map(|block| block * BLOCK).context("the image is too small")
    }

    /// The offset of a piece that was written, another one each time.
    pub(super) fn written(&mut self) -> u64 {
        let pieces = (WRITTEN.end - WRITTEN.start) / PIECE as u64;
        WRITTEN.start + self.rng.u64(..pieces) * PIECE as u64
    }

    /// The replica has, here, what it should have.
    pub(super) fn holds(&self, offset: u64, len: usize) -> Result<()> {
        self.vm.holds(offset, &self.truth[offset as usize..offset as usize + len])
    }

    /// All of the replica and of the image is what it should be, and both serve.
    pub(super) fn whole(&mut self) -> Result<()> {
        for offset in (0..SIZE).step_by(1 << 20) {
            self.holds(offset, 1 << 20)?;
            self.image.holds(offset, &self.base[offset as usize..offset as usize + (1 << 20)])?;
        }
        self.others()
    }

    /// The replica on the disk that is well serves, and the daemon is there.
    pub(super) fn others(&mut self) -> Result<()> {
        self.rounds = self.rounds.wrapping_add(1);
        let data = vec![self.rounds; PIECE];
        let done = || -> Result<()> {
            self.far.begin_write(1 << 20, &data).end(MEANWHILE)??;
            self.far.begin_flush().end(MEANWHILE)??;
            self.far.holds(1 << 20, &data)
        };
        done().context("the replica on the disk that is well")?;
        self.daemon.healthy()
    }

    /// Why the replica takes no writes, if that is so.
    pub(super) fn poisoned(&self) -> Result<Option<String>> {
        let told = self.daemon.json(&["replica", "inspect", "vm"])?;
        Ok(told["poisoned"].as_str().map(String::from))
    }

    /// Closes and opens the replica's device, by way of `between`.
    pub(super) fn reopened(&mut self, between: impl FnOnce(&mut Node) -> Result<()>) -> Result<()> {
        self.vm = Limited::nothing()?;
        between(self)?;
        self.vm = Limited::open(VM)?;
        Ok(())
    }

    /// The device holds, sector by sector, one of these, and holds it from now on.
    pub(super) fn settle(&mut self, offset: u64, old: &[u8], new: &[u8]) -> Result<u64> {
        let found = self.vm.read(offset, old.len())??;
        let mut kept = 0;
        for (index, sector) in found.chunks(512).enumerate() {
            let range = index * 512..(index + 1) * 512;
            let is_new = *sector == new[range.clone()];
            ensure!(
                is_new || *sector == old[range],
                "sector {index} after byte {offset} is neither old nor new"
            );
            kept += u64::from(is_new);
        }
        self.truth[offset as usize..offset as usize + found.len()].copy_from_slice(&found);
        Ok(kept)
    }

    pub(super) fn close(mut self, guest: &Guest) -> Result<()> {
        for device in [&mut self.vm, &mut self.image, &mut self.far] {
            *device = Limited::nothing()?;
        }
        for export in ["image/base", "replica/vm", "replica/far"] {
            self.daemon.ok(&["detach", export])?;
        }
        self.daemon.ok(&["fsck"])?;
        self.daemon.healthy()?;
        self.daemon.stop()?;
        for at in [&self.image_at, &self.replica_at, &self.small_at, &guest.dir().join("c")] {
            tool("umount", [at]).run()?;
        }
        self.image_disk.remove()?;
        self.replica_disk.remove()?;
        self.small_disk.remove()
    }
}

/// File systems leave their journals alone meanwhile: an error there would end them.
pub(super) fn quiet(fs: Fs) -> &'static str {
    if fs == Fs::Ext4 { "noatime,commit=300" } else { "noatime" }
}
