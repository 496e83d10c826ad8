//! What a disk's files lie on: how fast it is, and what fails together with it. Read from sysfs.
//!
//! Nothing here fails: where the kernel doesn't say, the answer is that it is not known.

use std::{
    collections::BTreeSet,
    ffi::OsString,
    fs,
    os::unix::{
        ffi::OsStringExt,
        fs::{FileTypeExt, MetadataExt},
    },
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

/// How fast a disk is taken to be.
#[derive(
    Clone,
    Copy,
    Debug,
    PartialEq,
    Eq,
    PartialOrd,
    Ord,
    Hash,
    Serialize,
    Deserialize,
    utoipa::ToSchema,
)]
#[serde(rename_all = "lowercase")]
pub enum Tier {
    /// Flash on PCIe.
    Nvme,
    /// Other flash, and whatever doesn't turn.
    Ssd,
    /// Turning platters.
    Hdd,
}

/// Devices stack: a logical volume on a RAID on partitions. No sane stack is deeper.
const DEPTH_MAX: usize = 8;

/// What a directory's file system lies on.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Media {
    /// The slowest of the devices; `None` where there is none (tmpfs, a network).
    pub tier: Option<Tier>,
    /// Requests that the least of their queues takes; `None` where there is none.
    pub depth: Option<usize>,
    /// Kernel names of the devices at the bottom of the stack; partitions stand for their disk.
    devices: BTreeSet<String>,
    /// The file system's device number: one file system is one failure domain in any case.
    dev: u64,
}

impl Media {
    /// What the directory at `path` lies on.
    pub(crate) fn of(path: &Path) -> Media {
        let dev = fs::metadata(path).map_or(0, |meta| meta.dev());
        let mounts = fs::read("/proc/self/mountinfo").unwrap_or_default();
        Media::find(Path::new("/sys"), &mounts, path, dev)
    }

    /// Whether the two have a device, or their file system, in common.
    pub(crate) fn fails_with(&self, other: &Media) -> bool {
        self.dev == other.dev || !self.devices.is_disjoint(&other.devices)
    }

    fn find(sys: &Path, mounts: &[u8], path: &Path, dev: u64) -> Media {
        let mut media = Media { tier: None, depth: None, devices: BTreeSet::new(), dev };
        // Btrfs and its like give a file system a number that no device has: the mount knows.
        let found = block_device(sys, dev).or_else(|| {
            let source = mount_source(mounts, path)?;
            let meta = fs::metadata(source).ok()?;
            meta.file_type().is_block_device().then(|| block_device(sys, meta.rdev()))?
        });
        if let Some(device) = found {
            media.add(sys, &device, DEPTH_MAX);
        }
        media
    }

    fn add(&mut self, sys: &Path, device: &Path, depth: usize) {
        let whole = match device.parent() {
            Some(parent) if device.join("partition").exists() => parent,
            _ => device,
        };
        let Some(name) = whole.file_name().and_then(|name| name.to_str()) else { return };
        let below: Vec<_> = fs::read_dir(whole.join("slaves"))
            .map(|entries| entries.flatten().map(|entry| entry.file_name()).collect())
            .unwrap_or_default();
        if !below.is_empty() && depth > 0 {
            for slave in below {
                if let Ok(device) = fs::canonicalize(sys.join("class/block").join(slave)) {
                    self.add(sys, &device, depth - 1);
                }
            }
            return;
        }
        let turns = fs::read_to_string(whole.join("queue/rotational"));
        let tier = match turns.as_deref().map(str::trim) {
            Ok("1") => Tier::Hdd,
            _ if name.starts_with("nvme") => Tier::Nvme,
            _ => Tier::Ssd,
        };
        self.tier = self.tier.max(Some(tier));
        let depth = fs::read_to_string(whole.join("queue/nr_requests"));
        if let Ok(depth) = depth.unwrap_or_default().trim().parse::<usize>() {
            self.depth = Some(self.depth.map_or(depth, |least| least.min(depth)));
        }
        self.devices.insert(name.to_owned());
    }
}

/// The directory of sysfs that describes the block device of this number.
fn block_device(sys: &Path, dev: u64) -> Option<PathBuf> {
    let (major, minor) = (libc::major(dev), libc::minor(dev));
    fs::canonicalize(sys.join(format!("dev/block/{major}:{minor}"))).ok()
}

/// The source of the mount that `path` lies on: the last of those whose mount point leads there.
fn mount_source(mounts: &[u8], path: &Path) -> Option<PathBuf> {
    let mut best: Option<(PathBuf, PathBuf)> = None;
    for line in mounts.split(|byte| *byte == b'\n') {
        let fields: Vec<&[u8]> = line.split(|byte| *byte == b' ').collect();
        let (Some(point), Some(dash)) =
            (fields.get(4), fields.iter().position(|field| *field == b"-"))
        else {
            continue;
        };
        let Some(source) = fields.get(dash + 2) else { continue };
        let point = unescape(point);
        let deeper = |(other, _): &(PathBuf, PathBuf)| {
            point.components().count() >= other.components().count()
        };
        if path.starts_with(&point) && best.as_ref().is_none_or(deeper) {
            best = Some((point, unescape(source)));
        }
    }
    best.map(|(_, source)| source)
}

/// A field of mountinfo: blanks and backslashes come as three octal digits.
fn unescape(field: &[u8]) -> PathBuf {
    let mut bytes = Vec::with_capacity(field.len());
    let mut rest = field;
    while let [first, tail @ ..] = rest {
        let code = match rest {
            [b'\\', a @ b'0'..=b'3', b @ b'0'..=b'7', c @ b'0'..=b'7', ..] => {
                Some(((a - b'0') << 6) | ((b - b'0') << 3) | (c - b'0'))
            }
            _ => None,
        };
        bytes.push(code.unwrap_or(*first));
        rest = if code.is_some() { &rest[4..] } else { tail };
    }
    PathBuf::from(OsString::from_vec(bytes))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    /// A made-up sysfs: disks with the given (name, number, turns), and links to them.
    struct Sys(tempfile::TempDir);

    impl Sys {
        fn new() -> Sys {
            let sys = Sys(tempfile::tempdir().unwrap());
            fs::create_dir_all(sys.path().join("dev/block")).unwrap();
            fs::create_dir_all(sys.path().join("class/block")).unwrap();
            sys
        }

        fn path(&self) -> &Path {
            self.0.path()
        }

        fn device(&self, at: &str, number: &str, file: &str, content: &str) {
            let dir = self.path().join("devices").join(at);
            let file = dir.join(file);
            fs::create_dir_all(file.parent().unwrap()).unwrap();
            fs::write(file, content).unwrap();
            symlink(&dir, self.path().join("dev/block").join(number)).unwrap();
            let name = dir.file_name().unwrap();
            symlink(&dir, self.path().join("class/block").join(name)).unwrap();
        }

        fn media(&self, major: u32, minor: u32) -> Media {
            Media::find(self.path(), b"", Path::new("/x"), libc::makedev(major, minor))
        }
    }

    #[test]
    fn tiers_and_shared_devices_follow_the_stack() {
        let sys = Sys::new();
        sys.device("sda", "8:0", "queue/rotational", "1\n");
        sys.device("sda/sda1", "8:1", "partition", "1\n");
        sys.device("sda/sda2", "8:2", "partition", "2\n");
        sys.device("nvme0n1", "259:0", "queue/rotational", "0\n");
        sys.device("vdb", "254:16", "queue/rotational", "0\n");
        sys.device("dm-0", "253:0", "slaves/sda2", "");
        fs::write(sys.path().join("devices/dm-0/slaves/nvme0n1"), "").unwrap();
        assert_eq!(sys.media(8, 1).tier, Some(Tier::Hdd));
        assert_eq!(sys.media(259, 0).tier, Some(Tier::Nvme));
        assert_eq!(sys.media(254, 16).tier, Some(Tier::Ssd));
        assert_eq!(sys.media(253, 0).tier, Some(Tier::Hdd), "the slowest counts");
        assert!(sys.media(8, 1).fails_with(&sys.media(253, 0)), "partitions of one disk");
        assert!(sys.media(259, 0).fails_with(&sys.media(253, 0)));
        assert!(!sys.media(254, 16).fails_with(&sys.media(253, 0)));
        assert_eq!(sys.media(0, 33).tier, None);
        assert!(sys.media(0, 33).fails_with(&sys.media(0, 33)), "one file system");
    }

    #[test]
    fn stacks_that_bite_their_tail_end() {
        let sys = Sys::new();
        sys.device("dm-1", "253:1", "slaves/dm-2", "");
        sys.device("dm-2", "253:2", "slaves/dm-1", "");
        assert!(!sys.media(253, 1).devices.is_empty());
    }

    #[test]
    fn mounts_are_found_by_the_longest_way() {
        let mounts = b"1 0 0:1 / / rw - ext4 /dev/vda rw\n\
            2 1 0:44 / /mnt/a\\040b rw shared:1 - btrfs /dev/loop7 rw\n\
            3 1 0:45 / /mnt/a rw - btrfs /dev/loop8 rw\nnonsense\n\n";
        let source = |path: &str| mount_source(mounts, Path::new(path));
        assert_eq!(source("/mnt/a b/x"), Some("/dev/loop7".into()));
        assert_eq!(source("/mnt/a/x"), Some("/dev/loop8".into()));
        assert_eq!(source("/mnt/ab"), Some("/dev/vda".into()));
        assert_eq!(unescape(b"\\134\\04"), PathBuf::from("\\\\04"));
    }
}
