//! A disk that can be made ill while it runs: slow, failing, silent, gone. A file that FUSE shows to a loop
//! device. (`nbdkit` has all of these, but fixed at its start, and `nbdfuse` lets a read that waits hold up
//! those behind it, which no disk with a queue does.)
//!
//! The server, `cargo xtask slow-disk`, serves every request by a thread of its own, so that waiting requests
//! wait at the same time.

use std::ffi::OsStr;
use std::fs::{self, File, OpenOptions};
use std::io::ErrorKind;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result, anyhow};
use fuser::{
    Config, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation, INodeNo,
    InitFlags, KernelConfig, LockOwner, MountOption, OpenFlags, ReplyAttr, ReplyData, ReplyEmpty,
    ReplyEntry, ReplyOpen, ReplyWrite, Request, WriteFlags,
};

use crate::tool::{Process, tool};

/// What the one file of the file system is called.
const NAME: &str = "disk";
/// Its number.
const NUMBER: INodeNo = INodeNo(2);
/// Requests that the kernel hands on at the same time.
const QUEUE: u16 = 128;
/// Nothing of it changes.
const TTL: Duration = Duration::from_secs(3600);

/// What a disk suffers from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Illness {
    /// Nothing.
    None,
    /// So many milliseconds longer take so many percent of its reads.
    Slow(u64, u32),
    /// So many percent of its reads fail.
    Fails(u32),
    /// It answers nothing.
    Silent,
}

impl Illness {
    fn write(self) -> String {
        match self {
            Illness::None => "well".to_owned(),
            Illness::Slow(millis, percent) => format!("slow {millis} {percent}"),
            Illness::Fails(percent) => format!("fails {percent}"),
            Illness::Silent => "silent".to_owned(),
        }
    }

    fn read(path: &Path) -> Illness {
        let text = fs::read_to_string(path).unwrap_or_default();
        let words: Vec<&str> = text.split_whitespace().collect();
        let number = |at: usize| words.get(at).and_then(|word| word.parse().ok()).unwrap_or(0_u32);
        match words.first() {
            Some(&"slow") => Illness::Slow(number(1).into(), number(2)),
            Some(&"fails") => Illness::Fails(number(1)),
            Some(&"silent") => Illness::Silent,
            _ => Illness::None,
        }
    }
}

/// Shows `file` as `mount/disk`, until it is killed; what it suffers from the file `illness` says.
pub fn serve(file: &Path, illness: &Path, mount: &Path) -> Result<()> {
    let file = OpenOptions::new().read(true).write(true).open(file).context("opening the file")?;
    let size = file.metadata()?.len();
    let server = Server { file: Arc::new(file), size, illness: illness.to_owned() };
    let mut config = Config::default();
    config.mount_options = vec![MountOption::FSName("slow-disk".into())];
    fuser::mount(server, mount, &config).context("mounting it")
}

/// The file system.
struct Server {
    file: Arc<File>,
    size: u64,
    illness: PathBuf,
}

impl Server {
    fn attributes(&self, number: INodeNo) -> FileAttr {
        let (kind, perm) = match number {
            NUMBER => (FileType::RegularFile, 0o600),
            _ => (FileType::Directory, 0o700),
        };
        let time = SystemTime::UNIX_EPOCH;
        FileAttr {
            ino: number,
            size: self.size,
            blocks: self.size / 512,
            atime: time,
            mtime: time,
            ctime: time,
            crtime: time,
            kind,
            perm,
            nlink: 1,
            uid: 0,
            gid: 0,
            rdev: 0,
            flags: 0,
            blksize: 4096,
        }
    }
}

impl Filesystem for Server {
    fn init(&mut self, _: &Request, config: &mut KernelConfig) -> std::io::Result<()> {
        // The loop device's requests are to wait at the same time, in the kernel, too.
        let _ = config.add_capabilities(InitFlags::FUSE_ASYNC_DIO);
        let _ = config.set_max_background(QUEUE);
        Ok(())
    }

    fn lookup(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        match parent == INodeNo::ROOT && name == NAME {
            true => reply.entry(&TTL, &self.attributes(NUMBER), Generation(0)),
            false => reply.error(Errno::ENOENT),
        }
    }

    fn getattr(&self, _: &Request, number: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        reply.attr(&TTL, &self.attributes(number));
    }

    fn open(&self, _: &Request, _: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        // Past the page cache, and several requests for it at a time.
        let flags = FopenFlags::FOPEN_DIRECT_IO | FopenFlags::FOPEN_PARALLEL_DIRECT_WRITES;
        reply.opened(FileHandle(0), flags);
    }

    fn read(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        offset: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let (file, illness) = (self.file.clone(), self.illness.clone());
        let len = u64::from(size).min(self.size.saturating_sub(offset)) as usize;
        thread::spawn(move || {
            let mut data = vec![0; len];
            match suffer(&illness).and_then(|()| file.read_exact_at(&mut data, offset)) {
                Ok(()) => reply.data(&data),
                Err(_) => reply.error(Errno::EIO),
            }
        });
    }

    fn write(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        offset: u64,
        data: &[u8],
        _: WriteFlags,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let (file, illness, data) = (self.file.clone(), self.illness.clone(), data.to_vec());
        thread::spawn(move || {
            while_silent(&illness);
            match file.write_all_at(&data, offset) {
                Ok(()) => reply.written(data.len() as u32),
                Err(_) => reply.error(Errno::EIO),
            }
        });
    }

    fn fsync(&self, _: &Request, _: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        let (file, illness) = (self.file.clone(), self.illness.clone());
        thread::spawn(move || {
            while_silent(&illness);
            match file.sync_data() {
                Ok(()) => reply.ok(),
                Err(_) => reply.error(Errno::EIO),
            }
        });
    }
}

fn while_silent(illness: &Path) {
    while Illness::read(illness) == Illness::Silent {
        thread::sleep(Duration::from_millis(20));
    }
}

/// What a read suffers; an error if it fails of it.
fn suffer(illness: &Path) -> std::io::Result<()> {
    while_silent(illness);
    match Illness::read(illness) {
        Illness::Slow(millis, percent) if fastrand::u32(..100) < percent => {
            thread::sleep(Duration::from_millis(millis));
        }
        Illness::Fails(percent) if fastrand::u32(..100) < percent => {
            return Err(ErrorKind::Other.into());
        }
        _ => {}
    }
    Ok(())
}

/// A mounted ext4 disk that can be made ill, and whose device can be pulled.
pub struct SlowDisk {
    /// Where it is mounted.
    pub path: PathBuf,
    fuse: PathBuf,
    illness: PathBuf,
    device: String,
    server: Process,
}

impl SlowDisk {
    /// Makes the disk `name` of `size` bytes (sparse) in `dir`, and mounts it at `dir/name`.
    pub fn new(dir: &Path, name: &str, size: u64) -> Result<SlowDisk> {
        let backing = dir.join(format!("{name}.disk"));
        File::create(&backing)?.set_len(size)?;
        tool("mkfs.ext4", ["-q", "-F", "-m", "0"])
            .args(["-E", "lazy_itable_init=0,lazy_journal_init=0"])
            .args([&backing])
            .run()?;
        SlowDisk::plug(dir, name)
    }

    /// Mounts the disk `name` of `dir`, which was made earlier, and is gone since.
    pub fn plug(dir: &Path, name: &str) -> Result<SlowDisk> {
        let backing = dir.join(format!("{name}.disk"));
        let (fuse, path) = (dir.join(format!("{name}.fuse")), dir.join(name));
        for made in [&fuse, &path] {
            fs::create_dir_all(made)?;
        }
        let (file, illness) = (fuse.join(NAME), dir.join(format!("{name}.illness")));
        fs::write(&illness, Illness::None.write())?;
        let own = std::env::current_exe()?;
        let mut server = tool(own, ["slow-disk"])
            .args([&backing, &illness, &fuse])
            .background(&dir.join(format!("{name}.server.log")))?;
        server.until(Duration::from_secs(10), || file.exists())?;
        // Past the page cache: what was read once must be slow again.
        let device = tool("losetup", ["--find", "--show", "--direct-io=on"]).args([&file]).out()?;
        let disk = SlowDisk { path, fuse, illness, device: device.trim().to_owned(), server };
        tool("mount", [&disk.device]).args([&disk.path]).run()?;
        Ok(disk)
    }

    /// From now on every read takes `millis` longer.
    pub fn slow_by(&self, millis: u64) -> Result<()> {
        self.suffers(Illness::Slow(millis, 100))
    }

    /// From now on it suffers from this.
    pub fn suffers(&self, illness: Illness) -> Result<()> {
        // In one step: the server reads it at any time.
        let new = self.illness.with_extension("new");
        fs::write(&new, illness.write())?;
        fs::rename(&new, &self.illness).map_err(|error| anyhow!(error))
    }

    /// Pulls the device: every request fails from now on.
    pub fn pull(&mut self) -> Result<()> {
        self.server.kill()
    }
}

impl Drop for SlowDisk {
    fn drop(&mut self) {
        // Each step is tried: where the device is gone, only some of them can succeed.
        let _ = self.suffers(Illness::None);
        let _ = tool("umount", ["-l".as_ref(), self.path.as_os_str()]).outcome();
        let _ = tool("losetup", ["-d", &self.device]).outcome();
        let _ = self.server.kill();
        let _ = tool("umount", ["-l".as_ref(), self.fuse.as_os_str()]).outcome();
    }
}
