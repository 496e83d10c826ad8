//! The Unix sockets the service listens on.
//!
//! Invariants:
//! - One daemon a path: the path's lock file is held for as long as the socket is served, so that
//!   two daemons starting at once never take a socket from each other.
//! - A socket left behind by a daemon that died is replaced; one that somebody answers on, or a
//!   file that is no socket, is left alone and reported.
//! - Nobody outside owner and group can connect, at no moment: mode 0660 from the first.

use std::{
    fs::{self, DirBuilder, File, OpenOptions},
    io::ErrorKind,
    os::unix::{
        fs::{DirBuilderExt, FileTypeExt, MetadataExt, OpenOptionsExt, PermissionsExt},
        net::{UnixListener, UnixStream},
    },
    path::{Path, PathBuf},
};

use nix::{
    fcntl::{Flock, FlockArg},
    sys::stat::{Mode, umask},
    unistd::{Gid, Group, chown},
};

use crate::error::{Context, Error, Kind, Result};

/// Bytes that a Unix socket's path may have (sun_path less its closing NUL).
const PATH_MAX: usize = 107;

/// A listening socket; its path goes away with it.
#[derive(Debug)]
pub struct Socket {
    listener: UnixListener,
    /// `None` for a socket that the service manager owns.
    owned: Option<Owned>,
}

#[derive(Debug)]
struct Owned {
    path: PathBuf,
    inode: (u64, u64),
    _lock: Flock<File>,
}

impl Socket {
    /// Binds a socket at `path`, for the owner and, when one is named, `group`.
    pub fn bind(path: &Path, group: Option<Gid>) -> Result<Socket> {
        let shown = path.display();
        if path.as_os_str().len() > PATH_MAX {
            return Err(Error::new(
                Kind::Invalid,
                format!(
                    "socket {shown}: the path has {} bytes and the kernel takes {PATH_MAX}; choose \
                     a shorter one",
                    path.as_os_str().len()
                ),
            ));
        }
        make_parent(path, group)?;
        let lock = lock(path)?;
        clear_stale(path)?;
        let listener = UnixListener::bind(path).context(|| format!("listening on {shown}"))?;
        chown(path, None, group).context(|| format!("giving {shown} to its group"))?;
        fs::set_permissions(path, fs::Permissions::from_mode(0o660))
            .context(|| format!("setting the mode of {shown}"))?;
        let metadata = fs::symlink_metadata(path).context(|| format!("reading {shown}"))?;
        let inode = (metadata.dev(), metadata.ino());
        Ok(Socket { listener, owned: Some(Owned { path: path.to_owned(), inode, _lock: lock }) })
    }

    /// A socket that the service manager made, and will keep.
    pub fn inherited(listener: UnixListener) -> Socket {
        Socket { listener, owned: None }
    }

    /// A second handle on the listening socket, non-blocking.
    pub fn listener(&self) -> Result<UnixListener> {
        let listener = self.listener.try_clone().context(|| "duplicating a listening socket")?;
        listener.set_nonblocking(true).context(|| "making a listening socket non-blocking")?;
        Ok(listener)
    }

    /// Where clients reach it, if that is known.
    pub fn path(&self) -> Option<PathBuf> {
        match &self.owned {
            Some(owned) => Some(owned.path.clone()),
            None => self.listener.local_addr().ok()?.as_pathname().map(Path::to_owned),
        }
    }
}

impl Drop for Owned {
    fn drop(&mut self) {
        // Only our own socket: somebody may have put another in its place.
        if let Ok(metadata) = fs::symlink_metadata(&self.path)
            && (metadata.dev(), metadata.ino()) == self.inode
        {
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// Files that this process makes from now on are closed to the world, and to the group's writes.
pub fn close_to_the_world() {
    umask(Mode::from_bits_truncate(0o027));
}

/// The group called `name`; `None` for the empty name.
pub fn group(name: &str) -> Result<Option<Gid>> {
    if name.is_empty() {
        return Ok(None);
    }
    match Group::from_name(name).context(|| format!("looking up group {name:?}"))? {
        Some(group) => Ok(Some(group.gid)),
        None => Err(Error::new(
            Kind::NotFound,
            format!("group {name:?} does not exist; create it, or change socket_group"),
        )),
    }
}

fn make_parent(path: &Path, group: Option<Gid>) -> Result<()> {
    let parent = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => return Ok(()),
    };
    if parent.exists() {
        return Ok(());
    }
    DirBuilder::new()
        .recursive(true)
        .mode(0o750)
        .create(parent)
        .context(|| format!("creating {} for a socket", parent.display()))?;
    chown(parent, None, group).context(|| format!("giving {} to its group", parent.display()))
}

fn lock(path: &Path) -> Result<Flock<File>> {
    let mut name = path.as_os_str().to_owned();
    name.push(".lock");
    let name = PathBuf::from(name);
    let file = OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .mode(0o600)
        .custom_flags(libc::O_NOFOLLOW)
        .open(&name)
        .context(|| format!("opening lock file {}", name.display()))?;
    Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|(_, errno)| match errno {
        nix::Error::EWOULDBLOCK => taken(path),
        errno => Error::io(format!("locking {}", name.display()), errno.into()),
    })
}

fn clear_stale(path: &Path) -> Result<()> {
    let shown = path.display();
    let metadata = match fs::symlink_metadata(path) {
        Ok(metadata) => metadata,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(Error::io(format!("looking at {shown}"), error)),
    };
    if !metadata.file_type().is_socket() {
        return Err(Error::new(
            Kind::Exists,
            format!("{shown} exists and is no socket; remove it or choose another path"),
        ));
    }
    if UnixStream::connect(path).is_ok() {
        return Err(taken(path));
    }
    fs::remove_file(path).context(|| format!("removing stale socket {shown}"))
}

fn taken(path: &Path) -> Error {
    Error::new(
        Kind::Locked,
        format!(
            "another daemon serves {}; stop it, or give this one paths of its own with --socket, \
             --nbd-socket and --state",
            path.display()
        ),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stale_sockets_are_replaced_and_live_ones_are_not() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("run/underlay.sock");
        let socket = Socket::bind(&path, None).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o660);
        assert_eq!(fs::metadata(path.parent().unwrap()).unwrap().mode() & 0o007, 0);
        let error = Socket::bind(&path, None).unwrap_err();
        assert_eq!(error.kind(), Kind::Locked, "{error}");
        drop(socket);
        assert!(!path.exists());

        drop(UnixListener::bind(&path).unwrap());
        assert!(path.exists(), "left behind by a daemon that died");
        let socket = Socket::bind(&path, None).unwrap();
        UnixStream::connect(&path).unwrap();
        drop(socket);

        let foreign = UnixListener::bind(&path).unwrap();
        assert_eq!(Socket::bind(&path, None).unwrap_err().kind(), Kind::Locked);
        drop(foreign);
        fs::remove_file(&path).unwrap();
        fs::write(&path, "precious").unwrap();
        assert_eq!(Socket::bind(&path, None).unwrap_err().kind(), Kind::Exists);
        assert_eq!(fs::read(&path).unwrap(), b"precious");
    }

    #[test]
    fn a_path_that_was_taken_over_is_left_alone() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("s");
        let socket = Socket::bind(&path, None).unwrap();
        fs::remove_file(&path).unwrap();
        fs::write(&path, "other").unwrap();
        drop(socket);
        assert!(path.exists());
        let long = directory.path().join("x".repeat(200));
        assert_eq!(Socket::bind(&long, None).unwrap_err().kind(), Kind::Invalid);
    }
}
