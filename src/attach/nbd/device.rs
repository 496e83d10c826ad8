//! What sysfs and procfs tell of the kernel's NBD devices. Opens no device.
//!
//! The paths of both are parameters, so that tests need neither root nor devices.

use std::{
    collections::HashSet,
    fmt, fs,
    io::ErrorKind,
    os::unix::fs::{FileTypeExt, MetadataExt},
    path::Path,
    time::Duration,
};

use nix::sys::stat::{major, minor};

use crate::{
    error::{Context, Result},
    units::SECTOR,
};

/// Where the kernel shows its block devices.
pub const SYSFS: &str = "/sys/block";
/// Where the kernel shows its processes.
pub const PROCFS: &str = "/proc";

/// An NBD device that is attached to something with a name, ours or not.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Device {
    /// Its number.
    pub index: u32,
    /// The name it was attached with: our exports' names begin with `image/` and `replica/`.
    pub backend: String,
    /// Bytes.
    pub size: u64,
    /// It can't be written.
    pub read_only: bool,
}

/// Who uses a device, as far as can be told from outside.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum User {
    /// A file system, mounted there.
    Mount(String),
    /// Another block device stands on it: device-mapper, md.
    Holder(String),
    /// Memory is swapped to it.
    Swap,
    /// A process has it open.
    Process {
        /// Its number.
        id: u32,
        /// Its program's name.
        name: String,
    },
}

impl fmt::Display for User {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            User::Mount(at) => write!(f, "mounted at {at}"),
            User::Holder(name) => write!(f, "held by /dev/{name}"),
            User::Swap => f.write_str("swap"),
            User::Process { id, name } => write!(f, "open in {name} (pid {id})"),
        }
    }
}

/// The NBD devices that are attached with a name, in order of their numbers. None where there is
/// no NBD client.
pub fn attached(sysfs: &Path) -> Result<Vec<Device>> {
    let reading = || format!("listing block devices in {}", sysfs.display());
    let entries = match fs::read_dir(sysfs) {
        Ok(entries) => entries,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error).context(reading),
    };
    let mut devices = Vec::new();
    for entry in entries {
        let name = entry.context(reading)?.file_name();
        let index = name.to_str().and_then(|name| name.strip_prefix("nbd")?.parse().ok());
        if let Some(index) = index
            && let Some(device) = find(sysfs, index)?
        {
            devices.push(device);
        }
    }
    devices.sort_by_key(|device| device.index);
    Ok(devices)
}

/// The device of this number, if it is attached with a name.
pub fn find(sysfs: &Path, index: u32) -> Result<Option<Device>> {
    let directory = sysfs.join(format!("nbd{index}"));
    let (Some(backend), Some(size), Some(read_only)) = (
        line(&directory.join("backend"))?,
        line(&directory.join("size"))?,
        line(&directory.join("ro"))?,
    ) else {
        return Ok(None);
    };
    // Sectors of 512 bytes, whatever the device's own are.
    let size = size.parse::<u64>().ok().and_then(|sectors| sectors.checked_mul(SECTOR));
    Ok(size.map(|size| Device { index, backend, size, read_only: read_only != "0" }))
}

/// How many queues a device has: one for each connection.
pub fn queues(sysfs: &Path, index: u32) -> usize {
    let queues = fs::read_dir(sysfs.join(format!("nbd{index}/mq")));
    queues.map_or(1, |entries| entries.flatten().count())
}

/// How many requests of a device are under way; `None` if that can't be told.
pub fn in_flight(sysfs: &Path, index: u32) -> Option<u64> {
    // Reads and writes, each a number.
    let counts = line(&sysfs.join(format!("nbd{index}/inflight"))).ok()??;
    counts.split_whitespace().map(|count| count.parse::<u64>().ok()).sum()
}

/// How many requests of a device have ended since it was made; `None` if that can't be told.
pub fn completed(sysfs: &Path, index: u32) -> Option<u64> {
    let stat = line(&sysfs.join(format!("nbd{index}/stat"))).ok()??;
    let fields: Vec<&str> = stat.split_whitespace().collect();
    // Reads, writes, discards, flushes; older kernels have not all of them.
    let counts = [0, 4, 11, 15].into_iter().filter_map(|at| fields.get(at));
    counts.map(|count| count.parse::<u64>().ok()).sum()
}

/// Sets how long the block layer waits for a request before it asks the driver what became of it.
pub fn set_io_timeout(sysfs: &Path, index: u32, time: Duration) -> Result<()> {
    let file = sysfs.join(format!("nbd{index}/queue/io_timeout"));
    let milliseconds = time.as_millis().to_string();
    fs::write(&file, milliseconds).context(|| format!("writing {}", file.display()))
}

/// Who uses a device, in order. Best effort: what holds it inside the kernel without a sign (a
/// loop device, an NFS export) is not seen, nor, without privilege, other users' processes.
pub fn users(sysfs: &Path, procfs: &Path, index: u32) -> Result<Vec<User>> {
    let parts = parts(sysfs, index)?;
    let mut users: Vec<User> = parts.holders.iter().cloned().map(User::Holder).collect();
    let swaps = fs::read_to_string(procfs.join("swaps")).unwrap_or_default();
    let on_swap = |line: &str| line.split_whitespace().next().is_some_and(|at| parts.is_path(at));
    if swaps.lines().any(on_swap) {
        users.push(User::Swap);
    }
    let reading = || format!("listing processes in {}", procfs.display());
    let mut spaces = HashSet::new();
    for entry in fs::read_dir(procfs).context(reading)? {
        let entry = entry.context(reading)?;
        let Some(id) = entry.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else {
            continue;
        };
        let process = entry.path();
        // A process may end while it is looked at: what can't be read is no user any more.
        let space = fs::read_link(process.join("ns/mnt")).ok();
        if space.is_none_or(|space| spaces.insert(space)) {
            let mounts = fs::read_to_string(process.join("mountinfo")).unwrap_or_default();
            users.extend(mounts.lines().filter_map(|line| parts.mounted(line)).map(User::Mount));
        }
        let descriptors = fs::read_dir(process.join("fd"));
        if descriptors.into_iter().flatten().flatten().any(|entry| parts.is_open(&entry.path())) {
            let name = line(&process.join("comm")).ok().flatten().unwrap_or_default();
            users.push(User::Process { id, name });
        }
    }
    users.sort();
    users.dedup();
    Ok(users)
}

/// A disk and its partitions.
struct Parts {
    names: Vec<String>,
    numbers: Vec<(u64, u64)>,
    holders: Vec<String>,
}

fn parts(sysfs: &Path, index: u32) -> Result<Parts> {
    let disk = format!("nbd{index}");
    let directory = sysfs.join(&disk);
    let mut parts = Parts { names: Vec::new(), numbers: Vec::new(), holders: Vec::new() };
    let mut places = vec![(disk.clone(), directory.clone())];
    let entries = fs::read_dir(&directory).context(|| format!("looking at /dev/{disk}"))?;
    for entry in entries.flatten() {
        let partition = entry.file_name().into_string().unwrap_or_default();
        let number = partition.strip_prefix(&disk).and_then(|rest| rest.strip_prefix('p'));
        if number.is_some_and(|number| number.parse::<u32>().is_ok()) {
            places.push((partition, entry.path()));
        }
    }
    for (name, place) in places {
        let number = line(&place.join("dev"))?;
        parts.numbers.extend(number.as_deref().and_then(device_number));
        parts.names.push(name);
        let holders = fs::read_dir(place.join("holders")).into_iter().flatten().flatten();
        parts.holders.extend(holders.filter_map(|entry| entry.file_name().into_string().ok()));
    }
    Ok(parts)
}

impl Parts {
    /// `path` is a device node's usual name.
    fn is_path(&self, path: &str) -> bool {
        path.strip_prefix("/dev/").is_some_and(|name| self.names.iter().any(|own| own == name))
    }

    /// The mount point, if a line of mountinfo mounts one of these. btrfs shows a number of its
    /// own there, but tells the path.
    fn mounted(&self, line: &str) -> Option<String> {
        let (mount, source) = line.split_once(" - ")?;
        let mut fields = mount.split(' ');
        let number = fields.nth(2).and_then(device_number)?;
        let at = fields.nth(1)?;
        let source = source.split(' ').nth(1).unwrap_or_default();
        (self.numbers.contains(&number) || self.is_path(source)).then(|| unescape(at))
    }

    /// A link in a process's `fd` leads to one of these. Only what lies in /dev is looked at: a
    /// file elsewhere may be on a file system that hangs.
    fn is_open(&self, link: &Path) -> bool {
        let in_dev = fs::read_link(link).is_ok_and(|target| target.starts_with("/dev"));
        let Ok(metadata) = (if in_dev { fs::metadata(link) } else { return false }) else {
            return false;
        };
        let number = (major(metadata.rdev()), minor(metadata.rdev()));
        metadata.file_type().is_block_device() && self.numbers.contains(&number)
    }
}

/// "43:0" as two numbers.
fn device_number(text: &str) -> Option<(u64, u64)> {
    let (major, minor) = text.split_once(':')?;
    Some((major.parse().ok()?, minor.parse().ok()?))
}

/// mountinfo writes blanks and the like as `\040`.
fn unescape(text: &str) -> String {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((first, more)) = rest.split_first() {
        let octal = more.get(..3).and_then(|digits| std::str::from_utf8(digits).ok());
        match octal.and_then(|digits| u8::from_str_radix(digits, 8).ok()) {
            Some(byte) if *first == b'\\' => {
                bytes.push(byte);
                rest = &more[3..];
            }
            _ => {
                bytes.push(*first);
                rest = more;
            }
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

/// A file's only line; `None` where there is no such file, or no longer.
fn line(file: &Path) -> Result<Option<String>> {
    match fs::read_to_string(file) {
        Ok(text) => Ok(Some(text.trim_end_matches('\n').to_owned())),
        Err(error) if gone(&error) => Ok(None),
        Err(error) => Err(error).context(|| format!("reading {}", file.display())),
    }
}

fn gone(error: &std::io::Error) -> bool {
    error.kind() == ErrorKind::NotFound
        || matches!(error.raw_os_error(), Some(libc::ENODEV | libc::ESRCH))
}

#[cfg(test)]
mod tests;
