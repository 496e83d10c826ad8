//! Directories held open, and the few things the catalogue does in them.
//!
//! Invariants:
//! - Below a [`Dir`] every object is reached by one name relative to an open directory, and never
//!   through a symbolic link: a disk that was prepared by somebody else cannot lead out of itself.
//! - What is opened as a file is a regular file: no device, pipe or socket gets in the way.
//! - A file that was replaced holds its old or its new content after a crash, never anything else
//!   ([`Dir::replace`]).
//! - How much is read of a file or a directory is bounded by the caller.
//! - Every change is announced to [`Steps`] first.

use std::{
    ffi::{OsStr, OsString},
    fs::File,
    io::{Read, Write},
    os::{
        fd::OwnedFd,
        unix::{ffi::OsStrExt, fs::FileExt},
    },
    path::{Path, PathBuf},
    thread,
};

use nix::{
    dir::Type,
    errno::Errno,
    fcntl::{self, AtFlags, FcntlArg, OFlag, RenameFlags},
    sys::{
        stat::{self, FileStat, Mode, SFlag},
        statvfs::{FsFlags, fstatvfs},
    },
    unistd::{self, UnlinkatFlags},
};

use super::steps::{Step, Steps};
use crate::error::{Context, Error, Kind, Result};

/// Mode of every directory of the catalogue.
pub(crate) const DIR_MODE: u32 = 0o700;
/// Mode of every file of the catalogue but an image's content.
pub(crate) const FILE_MODE: u32 = 0o600;
/// Mode of a copy's content and checksums, once published.
pub(crate) const SEALED_MODE: u32 = 0o400;

/// Prefix of a file that [`Dir::replace`] has not finished.
pub(crate) const TEMP_PREFIX: &str = ".tmp-";

/// How deep [`Dir::remove_tree`] goes: the catalogue's own trees are three deep.
pub(crate) const DEPTH_MAX: usize = 8;

/// A directory held open. Its path serves messages only.
#[derive(Debug)]
pub(crate) struct Dir {
    fd: OwnedFd,
    path: PathBuf,
    steps: Steps,
}

/// What a name stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum EntryKind {
    File,
    Dir,
    Other,
}

/// One name in a directory.
#[derive(Clone, Debug)]
pub(crate) struct Entry {
    pub name: OsString,
    pub kind: EntryKind,
}

/// Space of a file system, in bytes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Space {
    pub total: u64,
    pub free: u64,
    pub read_only: bool,
}

impl Dir {
    /// Opens the directory at `path`, which may lead through symbolic links.
    pub(crate) fn open_root(path: &Path, steps: Steps) -> Result<Dir> {
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let fd = fcntl::open(path, flags, Mode::empty())
            .map_err(|errno| refusal(errno, path, "directory"))?;
        Ok(Dir { fd, path: path.to_owned(), steps })
    }

    /// Where this directory is, for messages and for other parts that write into it.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// The same directory, held open once more.
    pub(crate) fn again(&self) -> Result<Dir> {
        let fd = self.fd.try_clone().context(|| format!("holding {}", self.path.display()))?;
        Ok(Dir { fd, path: self.path.clone(), steps: self.steps.clone() })
    }

    /// Whom this directory's changes are announced to.
    pub(crate) fn steps(&self) -> Steps {
        self.steps.clone()
    }

    /// Opens a directory in this one.
    pub(crate) fn open(&self, name: impl AsRef<OsStr>) -> Result<Dir> {
        let name = component(name.as_ref())?;
        let path = self.path.join(name);
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let fd = fcntl::openat(&self.fd, name, flags, Mode::empty())
            .map_err(|errno| refusal(errno, &path, "directory"))?;
        Ok(Dir { fd, path, steps: self.steps.clone() })
    }

    /// Makes a directory in this one, and opens it.
    pub(crate) fn create(&self, name: impl AsRef<OsStr>) -> Result<Dir> {
        let name = component(name.as_ref())?;
        let path = self.path.join(name);
        self.steps.take(Step::MakeDir(&path))?;
        stat::mkdirat(&self.fd, name, Mode::from_bits_truncate(DIR_MODE))
            .context(|| format!("making directory {}", path.display()))?;
        self.open(name)
    }

    /// Opens a directory in this one, which is made if it isn't there.
    pub(crate) fn ensure(&self, name: impl AsRef<OsStr>) -> Result<Dir> {
        match self.open(name.as_ref()) {
            Err(error) if error.kind() == Kind::NotFound => self.create(name),
            other => other,
        }
    }

    /// The names in this directory, in no order; more than `limit` of them are an error.
    pub(crate) fn entries(&self, limit: usize) -> Result<Vec<Entry>> {
        let entries = self.first(limit.saturating_add(1))?;
        if entries.len() > limit {
            return Err(Error::new(
                Kind::Unsupported,
                format!(
                    "{} holds more than {limit} entries: move what isn't underlay's away",
                    self.path.display()
                ),
            ));
        }
        Ok(entries)
    }

    /// Some `count` of the names in this directory, or all.
    fn first(&self, count: usize) -> Result<Vec<Entry>> {
        let what = || format!("listing {}", self.path.display());
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let mut dir = nix::dir::Dir::openat(&self.fd, ".", flags, Mode::empty()).context(what)?;
        let mut entries = Vec::new();
        for entry in dir.iter() {
            let entry = entry.context(what)?;
            let name = OsStr::from_bytes(entry.file_name().to_bytes());
            if name == "." || name == ".." {
                continue;
            }
            let kind = match entry.file_type() {
                Some(Type::File) => EntryKind::File,
                Some(Type::Directory) => EntryKind::Dir,
                Some(_) => EntryKind::Other,
                None => match self.stat(name)? {
                    Some(stat) => kind_of(&stat),
                    None => continue,
                },
            };
            entries.push(Entry { name: name.to_owned(), kind });
            if entries.len() == count {
                break;
            }
        }
        Ok(entries)
    }

    /// What is known of a name here; `None` if there is no such name. Links are not followed.
    pub(crate) fn stat(&self, name: impl AsRef<OsStr>) -> Result<Option<FileStat>> {
        let name = component(name.as_ref())?;
        match stat::fstatat(&self.fd, name, AtFlags::AT_SYMLINK_NOFOLLOW) {
            Ok(stat) => Ok(Some(stat)),
            Err(Errno::ENOENT) => Ok(None),
            Err(errno) => Err(Error::io(
                format!("looking at {}", self.path.join(name).display()),
                errno.into(),
            )),
        }
    }

    /// The space of the file system that this directory lies on.
    pub(crate) fn space(&self) -> Result<Space> {
        let vfs = fstatvfs(&self.fd)
            .context(|| format!("asking for the free space of {}", self.path.display()))?;
        let unit = vfs.fragment_size();
        Ok(Space {
            total: unit.saturating_mul(vfs.blocks()),
            free: unit.saturating_mul(vfs.blocks_available()),
            read_only: vfs.flags().contains(FsFlags::ST_RDONLY),
        })
    }

    /// Opens a regular file here, with `flags` beside close-on-exec and no-follow.
    pub(crate) fn file(&self, name: impl AsRef<OsStr>, flags: OFlag) -> Result<File> {
        let name = component(name.as_ref())?;
        let path = self.path.join(name);
        // Non-blocking, so that a pipe planted here does not hold us up; taken back below, because
        // io_uring would answer EAGAIN on such a file.
        let flags = flags | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC | OFlag::O_NONBLOCK;
        let mode = Mode::from_bits_truncate(FILE_MODE);
        let fd = fcntl::openat(&self.fd, name, flags, mode)
            .map_err(|errno| refusal(errno, &path, "file"))?;
        let what = || format!("opening {}", path.display());
        if kind_of(&stat::fstat(&fd).context(what)?) != EntryKind::File {
            return Err(not_a("file", &path));
        }
        let now = OFlag::from_bits_retain(fcntl::fcntl(&fd, FcntlArg::F_GETFL).context(what)?);
        fcntl::fcntl(&fd, FcntlArg::F_SETFL(now - OFlag::O_NONBLOCK)).context(what)?;
        Ok(File::from(fd))
    }

    /// All of a file's content, which must not exceed `limit` bytes.
    pub(crate) fn read(&self, name: impl AsRef<OsStr>, limit: usize) -> Result<Vec<u8>> {
        let path = self.path.join(name.as_ref());
        let mut bytes = Vec::new();
        self.file(name, OFlag::O_RDONLY)?
            .take(limit as u64 + 1)
            .read_to_end(&mut bytes)
            .context(|| format!("reading {}", path.display()))?;
        if bytes.len() > limit {
            return Err(Error::new(
                Kind::Corrupt,
                format!("{} exceeds {limit} bytes: it is not underlay's", path.display()),
            ));
        }
        Ok(bytes)
    }

    /// Makes a new file that holds `bytes`. Neither its content nor its name is durable yet.
    pub(crate) fn write_new(&self, name: impl AsRef<OsStr>, bytes: &[u8]) -> Result<()> {
        let path = self.path.join(name.as_ref());
        self.steps.take(Step::Write { path: &path, bytes })?;
        let flags = OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_EXCL;
        let mut file = self.file(name.as_ref(), flags)?;
        file.write_all(bytes).context(|| format!("writing {}", path.display()))
    }

    /// Makes a new file of `len` bytes, all of it a hole. It is not durable yet.
    pub(crate) fn write_sparse(&self, name: impl AsRef<OsStr>, len: u64) -> Result<()> {
        let path = self.path.join(name.as_ref());
        self.steps.take(Step::SetLen { path: &path, len })?;
        let flags = OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_EXCL;
        let file = self.file(name.as_ref(), flags)?;
        file.set_len(len).context(|| format!("growing {} to {len} bytes", path.display()))
    }

    /// Puts `bytes` in the place of a file's content, durably and whole; or makes the file.
    pub(crate) fn replace(&self, name: impl AsRef<OsStr>, bytes: &[u8]) -> Result<()> {
        let name = name.as_ref();
        let temp = self.write_temp(name, bytes)?;
        let done = self.sync_file(&temp).and_then(|()| self.rename(&temp, name));
        if let Err(error) = done {
            // The error is what matters; what is left here goes at the next replacement or start.
            let _ = self.unlink_if_there(&temp);
            return Err(error);
        }
        self.sync()
    }

    /// Writes what is to take the place of `name`, and tells under which name it is. The caller
    /// syncs that file, renames it to `name` and syncs this directory.
    pub(crate) fn write_temp(&self, name: impl AsRef<OsStr>, bytes: &[u8]) -> Result<OsString> {
        let mut temp = OsString::from(TEMP_PREFIX);
        temp.push(component(name.as_ref())?);
        self.unlink_if_there(&temp)?;
        if let Err(error) = self.write_new(&temp, bytes) {
            let _ = self.unlink_if_there(&temp);
            return Err(error);
        }
        Ok(temp)
    }

    /// Renames within this directory. An existing directory with content is not replaced.
    pub(crate) fn rename(&self, from: impl AsRef<OsStr>, to: impl AsRef<OsStr>) -> Result<()> {
        let (from, to) = (component(from.as_ref())?, component(to.as_ref())?);
        let (old, new) = (self.path.join(from), self.path.join(to));
        self.steps.take(Step::Rename { from: &old, to: &new })?;
        fcntl::renameat(&self.fd, from, &self.fd, to)
            .context(|| format!("renaming {} to {}", old.display(), new.display()))
    }

    /// Exchanges what two names in this directory stand for, in one step.
    pub(crate) fn exchange(&self, a: impl AsRef<OsStr>, b: impl AsRef<OsStr>) -> Result<()> {
        let (a, b) = (component(a.as_ref())?, component(b.as_ref())?);
        let (one, other) = (self.path.join(a), self.path.join(b));
        self.steps.take(Step::Exchange { a: &one, b: &other })?;
        fcntl::renameat2(&self.fd, a, &self.fd, b, RenameFlags::RENAME_EXCHANGE)
            .context(|| format!("exchanging {} and {}", one.display(), other.display()))
    }

    /// Makes the names in this directory durable.
    pub(crate) fn sync(&self) -> Result<()> {
        self.steps.take(Step::SyncDir(&self.path))?;
        unistd::fsync(&self.fd).context(|| format!("syncing {}", self.path.display()))
    }

    /// Makes a file's content durable.
    pub(crate) fn sync_file(&self, name: impl AsRef<OsStr>) -> Result<()> {
        let path = self.path.join(name.as_ref());
        let file = self.file(name, OFlag::O_RDONLY)?;
        self.steps.take(Step::SyncFile(&path))?;
        file.sync_all().context(|| format!("syncing {}", path.display()))
    }

    /// Sets the mode of a file or directory here; never through a link.
    pub(crate) fn set_mode(&self, name: impl AsRef<OsStr>, mode: u32) -> Result<()> {
        let name = name.as_ref();
        let path = self.path.join(name);
        self.steps.take(Step::SetMode { path: &path, mode })?;
        let bits = Mode::from_bits_truncate(mode);
        let what = || format!("setting the mode of {}", path.display());
        match self.stat(name)?.map(|stat| kind_of(&stat)) {
            Some(EntryKind::Dir) => stat::fchmod(&self.open(name)?.fd, bits).context(what),
            _ => stat::fchmod(self.file(name, OFlag::O_RDONLY)?, bits).context(what),
        }
    }

    /// Removes a file; its absence is no error.
    pub(crate) fn unlink_if_there(&self, name: impl AsRef<OsStr>) -> Result<()> {
        let name = component(name.as_ref())?;
        let path = self.path.join(name);
        if self.stat(name)?.is_none() {
            return Ok(());
        }
        self.steps.take(Step::Unlink(&path))?;
        unistd::unlinkat(&self.fd, name, UnlinkatFlags::NoRemoveDir)
            .context(|| format!("removing {}", path.display()))
    }

    /// Removes an empty directory.
    pub(crate) fn remove_dir(&self, name: impl AsRef<OsStr>) -> Result<()> {
        let name = component(name.as_ref())?;
        let path = self.path.join(name);
        self.steps.take(Step::RemoveDir(&path))?;
        unistd::unlinkat(&self.fd, name, UnlinkatFlags::RemoveDir)
            .context(|| format!("removing {}", path.display()))
    }

    /// Removes a file, or a directory with all it holds. Links are removed, not followed.
    pub(crate) fn remove_tree(&self, name: impl AsRef<OsStr>) -> Result<()> {
        self.remove_below(component(name.as_ref())?, DEPTH_MAX)
    }

    fn remove_below(&self, name: &OsStr, depth: usize) -> Result<()> {
        match self.stat(name)?.map(|stat| kind_of(&stat)) {
            None => return Ok(()),
            Some(EntryKind::Dir) => {}
            Some(_) => return self.unlink_if_there(name),
        }
        let dir = self.open(name)?;
        if depth == 0 {
            return Err(Error::new(
                Kind::Unsupported,
                format!("{} is nested too deeply: remove it by hand", dir.path.display()),
            ));
        }
        // In batches, so that memory is bounded whatever is in there.
        loop {
            let entries = dir.first(1024)?;
            if entries.is_empty() {
                return self.remove_dir(name);
            }
            for entry in entries {
                dir.remove_below(&entry.name, depth - 1)?;
            }
        }
    }
}

/// Does several syncs at the same time, all of them whatever comes of one: a file system then makes
/// them durable in one go, and two disks need not wait for each other.
pub(crate) fn sync_together(syncs: &[&(dyn Fn() -> Result<()> + Sync)]) -> Result<()> {
    thread::scope(|scope| {
        let spawn = |sync| thread::Builder::new().name("sync".into()).spawn_scoped(scope, sync);
        let (first, others) = match syncs {
            [first, others @ ..] => (first, others),
            [] => return Ok(()),
        };
        let others: Vec<_> = others.iter().map(|sync| (sync, spawn(sync))).collect();
        let mut done = first();
        for (sync, started) in others {
            let one = match started {
                Ok(thread) => thread.join().unwrap_or_else(|_| {
                    Err(Error::new(Kind::Io, "a sync ended before it was done"))
                }),
                Err(_) => sync(),
            };
            done = done.and(one);
        }
        done
    })
}

/// What a file's mode says it is.
pub(crate) fn kind_of(stat: &FileStat) -> EntryKind {
    match SFlag::from_bits_truncate(stat.st_mode) & SFlag::S_IFMT {
        SFlag::S_IFREG => EntryKind::File,
        SFlag::S_IFDIR => EntryKind::Dir,
        _ => EntryKind::Other,
    }
}

/// Bytes that a file occupies on its disk.
pub(crate) fn allocated(stat: &FileStat) -> u64 {
    u64::try_from(stat.st_blocks).unwrap_or(0).saturating_mul(512)
}

/// Writes `text` over the whole of an open file: who holds a lock, for whoever finds it locked.
pub(crate) fn overwrite(file: &File, text: &str) -> std::io::Result<()> {
    file.set_len(0)?;
    file.write_all_at(text.as_bytes(), 0)
}

/// `name`, if it names something in a directory rather than a path through it.
fn component(name: &OsStr) -> Result<&OsStr> {
    let bytes = name.as_bytes();
    if bytes.is_empty() || bytes == b"." || bytes == b".." || bytes.contains(&b'/') {
        return Err(Error::new(Kind::Invalid, format!("{name:?} is no name in a directory")));
    }
    Ok(name)
}

/// The error of an open: a link or a wrong kind of file is told apart from an absent one.
fn refusal(errno: Errno, path: &Path, wanted: &str) -> Error {
    match errno {
        Errno::ELOOP | Errno::ENOTDIR | Errno::EISDIR | Errno::ENXIO => not_a(wanted, path),
        errno => Error::io(format!("opening {}", path.display()), errno.into()),
    }
}

fn not_a(wanted: &str, path: &Path) -> Error {
    Error::new(
        Kind::Corrupt,
        format!(
            "{} is not a {wanted} (underlay follows no link and opens no device): move it away",
            path.display()
        ),
    )
}
