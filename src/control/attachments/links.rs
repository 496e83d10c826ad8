//! Names of block devices: `/dev/underlay/replica/NAME`, and what udev needs to make them.
//!
//! The daemon makes the links itself: there may be no udev. Where there is one, its rule
//! (packaging/60-underlay.rules) reads a device's name from a file that is written before the device
//! appears, and makes the same link, which systemd's mount units can then wait for.

use std::{
    fs, io,
    os::unix::fs::DirBuilderExt,
    path::{Path, PathBuf},
};

use super::device::path;
use crate::{
    catalog::Attachment,
    error::{Context, Result},
};

/// Where the links are.
const LINKS: &str = "/dev/underlay";

/// Where names are left for udev.
pub struct Links {
    names: PathBuf,
}

impl Links {
    /// Names are left in a directory beside the control socket.
    pub fn beside(socket: &Path) -> Links {
        Links { names: socket.with_extension("devices") }
    }

    /// Leaves the name of a device that is about to appear. What goes wrong costs a link only.
    pub fn announce(&self, record: &Attachment) {
        let made = || -> io::Result<()> {
            match fs::DirBuilder::new().mode(0o755).create(&self.names) {
                Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
                _ => {}
            }
            fs::write(self.file(record), format!("UNDERLAY_EXPORT={}\n", record.export))
        };
        warn(made().context(|| format!("telling udev of {}", path(record))));
    }

    /// Links to a device that is there.
    pub fn link(&self, record: &Attachment) {
        let made = || -> io::Result<()> {
            let link = link_path(record);
            if let Some(parent) = link.parent() {
                fs::create_dir_all(parent)?;
            }
            if fs::read_link(&link).is_ok_and(|to| leads_to(&to, record)) {
                return Ok(());
            }
            match fs::remove_file(&link) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
            std::os::unix::fs::symlink(path(record), link)
        };
        warn(made().context(|| format!("linking {}", link_path(record).display())));
    }

    /// The device is gone.
    pub fn unlink(&self, record: &Attachment) {
        // What is not there is as good as removed; a link that points elsewhere is somebody else's.
        let _ = fs::remove_file(self.file(record));
        let link = link_path(record);
        if fs::read_link(&link).is_ok_and(|to| leads_to(&to, record)) {
            let _ = fs::remove_file(link);
        }
    }

    fn file(&self, record: &Attachment) -> PathBuf {
        let node = PathBuf::from(path(record));
        self.names.join(node.file_name().unwrap_or_default())
    }
}

/// Whether `what` names the device of `record`: the export, its node or its link.
pub fn names(what: &str, record: &Attachment) -> bool {
    what == record.export || what == path(record) || Path::new(what) == link_path(record)
}

/// Whether a link's target is the device: udev makes relative links.
fn leads_to(target: &Path, record: &Attachment) -> bool {
    target.file_name() == Path::new(&path(record)).file_name()
}

/// `/dev/underlay/replica/NAME`: names have no slashes.
fn link_path(record: &Attachment) -> PathBuf {
    Path::new(LINKS).join(&record.export)
}

fn warn(made: Result<()>) {
    if let Err(error) = made {
        tracing::warn!(%error, "a device lacks its link");
    }
}
