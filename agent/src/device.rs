//! Block devices as sysfs has them: from a file system's device number to the whole disk beneath.

use std::collections::HashSet;
use std::fmt;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use crate::SECTOR;
use crate::error::{Error, Result};

/// Where the kernel describes block devices by number.
const SYSFS: &str = "/sys/dev/block";

/// Most numbers of one disk: itself and its partitions.
pub const NUMBERS: usize = 64;

/// A device number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Dev {
    /// The driver's part.
    pub major: u32,
    /// The device's part.
    pub minor: u32,
}

impl Dev {
    /// Of a `st_dev` or `st_rdev`.
    pub fn from_stat(dev: u64) -> Dev {
        Dev { major: libc::major(dev), minor: libc::minor(dev) }
    }

    /// As the kernel itself has it: 12 bits, then 20.
    pub const fn kernel(self) -> u32 {
        self.major << 20 | self.minor & 0xf_ffff
    }
}

impl fmt::Display for Dev {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.major, self.minor)
    }
}

impl FromStr for Dev {
    type Err = Error;

    fn from_str(text: &str) -> Result<Dev> {
        let parts = text.split_once(':').and_then(|(major, minor)| {
            let (major, minor) = (major.parse::<u32>().ok()?, minor.parse::<u32>().ok()?);
            (major < 1 << 12 && minor < 1 << 20).then_some(Dev { major, minor })
        });
        parts.ok_or_else(|| Error::Device {
            dev: text.chars().take(40).collect(),
            problem: "not a device number; give major:minor".into(),
        })
    }
}

/// How a device takes I/O, and with it which tracepoints tell its time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// It has requests, and queues of them.
    Requests,
    /// It takes bios as they are (device-mapper, md) and passes them on.
    Bios,
}

/// A block device that can be watched.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Device {
    /// The device itself: perhaps a partition.
    pub dev: Dev,
    /// The whole disk.
    pub disk: Dev,
    /// The whole disk's name.
    pub name: String,
    /// Where the device begins on the whole disk, in bytes.
    pub start: u64,
    /// How the disk takes I/O.
    pub kind: Kind,
}

impl Device {
    /// Looks a device up.
    pub fn find(dev: Dev) -> Result<Device> {
        Device::beneath(Path::new(SYSFS), dev)
    }

    /// The same in another tree.
    fn beneath(sysfs: &Path, dev: Dev) -> Result<Device> {
        let wrong = |problem: String| Error::Device { dev: dev.to_string(), problem };
        let link = sysfs.join(dev.to_string());
        let path = match fs::canonicalize(&link) {
            Ok(path) => path,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Err(wrong(
                    "no block device has this number; its file system (btrfs, overlayfs, tmpfs, NFS) \
                     stands on none, or on several"
                        .into(),
                ));
            }
            Err(source) => return Err(Error::Unreadable { path: link, source }),
        };
        let partition = path.join("partition").exists();
        let whole = if partition { path.parent().unwrap_or(&path) } else { &path };
        let number = |file: PathBuf| -> Result<u64> {
            let text = fs::read_to_string(&file)
                .map_err(|source| Error::Unreadable { path: file.clone(), source })?;
            let parsed = text.trim().parse().ok();
            parsed.ok_or_else(|| wrong(format!("{} is not a number", file.display())))
        };
        let start = if partition { number(path.join("start"))? } else { 0 };
        let start = start.checked_mul(SECTOR).ok_or_else(|| wrong("begins past 2^64".into()))?;
        let file = whole.join("dev");
        let disk = fs::read_to_string(&file);
        let disk = disk.map_err(|source| Error::Unreadable { path: file, source })?;
        let name = whole.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let kind = if whole.join("mq").is_dir() { Kind::Requests } else { Kind::Bios };
        if kind == Kind::Bios && name.starts_with("nvme") {
            // Its bios end as those of the hidden device of one path: nothing tells them apart.
            return Err(wrong(format!(
                "{name} has several paths (nvme_core.multipath=Y), where I/O can't be followed"
            )));
        }
        Ok(Device { dev, disk: disk.trim().parse()?, name, start, kind })
    }

    /// The numbers under which I/O of the whole disk may come in: its own and its partitions'. A bio
    /// carries its partition's, a request the disk's.
    pub fn numbers(&self) -> Vec<Dev> {
        let mut all = vec![self.disk, self.dev];
        if let Ok(entries) = fs::read_dir(format!("{SYSFS}/{}", self.disk)) {
            let paths = entries.flatten().map(|entry| entry.path());
            let partitions = paths.filter(|path| path.join("partition").exists());
            let numbers = partitions.map(|path| fs::read_to_string(path.join("dev")));
            all.extend(numbers.filter_map(|text| text.ok()?.trim().parse::<Dev>().ok()));
        }
        let mut seen = HashSet::new();
        all.retain(|dev| seen.insert(*dev));
        all.truncate(NUMBERS);
        all
    }

    /// How many requests the disk works on, by the kernel's own count; nothing if it keeps none.
    pub fn in_flight(&self) -> Option<u64> {
        let counts = fs::read_to_string(format!("{SYSFS}/{}/queue/iostats", self.disk));
        if counts.ok()?.trim() != "1" {
            return None;
        }
        let text = fs::read_to_string(format!("{SYSFS}/{}/inflight", self.disk)).ok()?;
        text.split_whitespace().map(|word| word.parse::<u64>().ok()).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    #[test]
    fn numbers_are_written_and_read() {
        let dev: Dev = "259:7".parse().unwrap();
        assert_eq!((dev.to_string().as_str(), dev.kernel()), ("259:7", 259 << 20 | 7));
        assert_eq!(Dev::from_stat(libc::makedev(259, 70_000)), Dev { major: 259, minor: 70_000 });
        for text in ["", ":", "1", "1:", "a:b", "-1:2", "4096:0", "1:1048576", "1:2:3"] {
            assert!(text.parse::<Dev>().is_err(), "{text}");
        }
    }

    #[test]
    fn a_partition_leads_to_its_disk() {
        let dir = tempfile::tempdir().unwrap();
        let (sysfs, disk) = (dir.path().join("dev"), dir.path().join("devices/sdx"));
        let put = |file: &str, text: &str| fs::write(disk.join(file), text).unwrap();
        fs::create_dir_all(disk.join("sdx2")).unwrap();
        fs::create_dir_all(disk.join("mq")).unwrap();
        fs::create_dir_all(&sysfs).unwrap();
        put("dev", "8:16\n");
        put("sdx2/dev", "8:18\n");
        put("sdx2/partition", "2\n");
        put("sdx2/start", "2048\n");
        symlink(&disk, sysfs.join("8:16")).unwrap();
        symlink(disk.join("sdx2"), sysfs.join("8:18")).unwrap();
        let whole = Device::beneath(&sysfs, "8:16".parse().unwrap()).unwrap();
        assert_eq!((whole.name.as_str(), whole.start, whole.kind), ("sdx", 0, Kind::Requests));
        let part = Device::beneath(&sysfs, "8:18".parse().unwrap()).unwrap();
        assert_eq!((part.disk, part.start, &part.name), (whole.disk, 1 << 20, &whole.name));
        fs::remove_dir(disk.join("mq")).unwrap();
        assert_eq!(Device::beneath(&sysfs, whole.dev).unwrap().kind, Kind::Bios);
        put("sdx2/start", "18446744073709551615\n");
        assert!(Device::beneath(&sysfs, part.dev).is_err());
        let error = Device::beneath(&sysfs, "0:41".parse().unwrap()).unwrap_err().to_string();
        assert!(error.contains("0:41") && error.contains("btrfs"), "{error}");
    }
}
