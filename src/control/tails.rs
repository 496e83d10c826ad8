//! Where replicas' tails are kept: a directory beside the control socket, which is on a file system
//! in memory wherever sockets usually are.
//!
//! A tail holds no data of anybody's, only which blocks were written. Without one a replica works as
//! well, and loses at the daemon's death what was not flushed, as at a power cut.

use std::{
    fs::{self, OpenOptions},
    io,
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::{Path, PathBuf},
    sync::Arc,
};

use uuid::Uuid;

use crate::{
    cow::tail::{BYTES, Place},
    error::Result,
    io::shared::SharedFile,
};

const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";

/// The directory, and the boot of the kernel that its files belong to.
#[derive(Clone)]
pub struct Tails {
    directory: PathBuf,
    boot: Uuid,
}

impl Tails {
    /// The directory beside `socket`; `None`, and a word in the log, where there can be none.
    pub fn beside(socket: &Path) -> Option<Tails> {
        let made = || -> io::Result<Tails> {
            let boot = fs::read_to_string(BOOT_ID)?;
            let boot = boot.trim().parse().map_err(|_| io::ErrorKind::InvalidData)?;
            let directory = socket.with_extension("tails");
            match fs::DirBuilder::new().mode(0o700).create(&directory) {
                Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
                _ => {}
            }
            if !fs::symlink_metadata(&directory)?.is_dir() {
                return Err(io::ErrorKind::NotADirectory.into());
            }
            Ok(Tails { directory, boot })
        };
        made()
            .inspect_err(|error| {
                let socket = socket.display();
                tracing::warn!(%error, "no directory beside {socket} for what is not flushed yet: \
                    it is lost should the daemon be killed");
            })
            .ok()
    }

    /// Where the tail of this replica is kept; `None`, and a word in the log, if that can't be.
    pub fn open(&self, replica: Uuid) -> Result<Option<Place>> {
        let path = self.path(replica);
        let opened = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .custom_flags(libc::O_NOFOLLOW)
            .open(&path)
            .and_then(|file| SharedFile::map(file, BYTES));
        Ok(match opened {
            Ok(memory) => Some(Place { memory: Arc::new(memory), boot: self.boot }),
            Err(error) => {
                tracing::warn!(%error, path = %path.display(), "what is not flushed yet is lost \
                    should the daemon be killed");
                None
            }
        })
    }

    /// The replica is gone for good.
    pub fn remove(&self, replica: Uuid) {
        // What is left of it takes a page of memory until the next boot.
        let _ = fs::remove_file(self.path(replica));
    }

    fn path(&self, replica: Uuid) -> PathBuf {
        self.directory.join(replica.to_string())
    }
}
