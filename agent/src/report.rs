//! What daemon and agent tell each other, as JSON over the daemon's socket.
//!
//! The daemon says what to watch ([`Watch`], `GET /v1/probes/watch`), the agent what it saw
//! ([`Report`], `POST /v1/probes/report`), once a second.
//!
//! Invariants:
//! - Every number in a report is of the time since the report before, but for `in_flight` and
//!   `oldest_ns`, which are of now.
//! - A report names the generation of the watch that it belongs to: a file's number means nothing
//!   beyond that.

use serde::{Deserialize, Serialize};

use crate::histogram::Histogram;

/// Where the agent asks what to watch; `?generation=N` says which one it has.
pub const WATCH_PATH: &str = "/v1/probes/watch";
/// Where it reports.
pub const REPORT_PATH: &str = "/v1/probes/report";

/// What to watch.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Watch {
    /// Grows with every change. The agent is told nothing new (204) as long as it has this one.
    pub generation: u64,
    /// The processes whose I/O is the service's own, as the kernel's first PID namespace numbers them.
    pub tgids: Vec<u32>,
    /// The disks.
    pub disks: Vec<Disk>,
}

/// A disk in the daemon's sense: a directory on a file system.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Disk {
    /// The daemon's name for it.
    pub name: String,
    /// The device number of its file system (st_dev), `major:minor`.
    pub dev: String,
    /// The files to which reads are to be attributed.
    #[serde(default)]
    pub files: Vec<File>,
}

/// A file whose reads are followed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct File {
    /// The daemon's number for it, of its own choice.
    pub id: u64,
    /// Where its content lies.
    pub extents: Vec<Extent>,
}

/// A run of a file's content that is contiguous on its device. All in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Extent {
    /// Where it lies on the file system's device (a partition's begin at 0).
    pub device: u64,
    /// Where it belongs in the file.
    pub file: u64,
    /// Its length.
    pub len: u64,
}

/// What was seen.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// The agent's version.
    pub version: String,
    /// The agent's process.
    pub pid: u32,
    /// The generation of the watch that this belongs to.
    pub generation: u64,
    /// How much time it covers.
    pub seconds: f64,
    /// Figures of each watched disk.
    pub disks: Vec<DiskReport>,
    /// Disks that are not watched, and why.
    pub refused: Vec<Refused>,
    /// Chunks that were read from a device.
    pub chunks: Vec<ChunkReport>,
    /// Reads of watched disks that belong to no chunk of any followed file.
    pub unresolved: Heat,
    /// What was not counted.
    pub losses: Losses,
    /// What the programs cost; absent where the kernel keeps no account.
    pub cost: Option<Cost>,
}

/// Figures of a disk.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct DiskReport {
    /// The daemon's name for it.
    pub name: String,
    /// The whole disk's name (`nvme0n1`). Two disks on partitions of one show the same figures: those
    /// of the whole.
    pub device: String,
    /// Reads by the service.
    pub own_reads: Load,
    /// Reads by anybody else.
    pub foreign_reads: Load,
    /// Writes by the service. Those that the kernel wrote back later are foreign.
    pub own_writes: Load,
    /// Writes by anybody else.
    pub foreign_writes: Load,
    /// Requests that the device works on now.
    pub in_flight: u64,
    /// For how long it has worked on the oldest of them; 0 without any.
    pub oldest_ns: u64,
}

/// One class of I/O on one disk.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Load {
    /// Completed requests.
    pub count: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Those that failed.
    pub errors: u64,
    /// Sum of device times: from issue to completion.
    pub device_ns: u64,
    /// Sum of queue times: from submission to issue.
    pub queue_ns: u64,
    /// Requests whose queue time is known.
    pub queued: u64,
    /// Device times.
    pub device: Histogram,
    /// Queue times.
    pub queue: Histogram,
}

impl Load {
    /// Mean device time in nanoseconds; nothing if nothing was done.
    pub fn mean(&self) -> Option<u64> {
        self.device_ns.checked_div(self.count)
    }

    /// Adds another's figures.
    pub fn add(&mut self, other: &Load) {
        self.count += other.count;
        self.bytes += other.bytes;
        self.errors += other.errors;
        self.device_ns += other.device_ns;
        self.queue_ns += other.queue_ns;
        self.queued += other.queued;
        self.device.add(&other.device);
        self.queue.add(&other.queue);
    }
}

/// A disk that is not watched.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Refused {
    /// The daemon's name for it.
    pub name: String,
    /// Why, and what to do.
    pub why: String,
}

/// Device reads of one chunk of one file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChunkReport {
    /// The daemon's number of the file.
    pub file: u64,
    /// The chunk's number: its offset in the file by 256 KiB.
    pub chunk: u64,
    /// Reads by the service.
    pub own: Heat,
    /// Reads by anybody else.
    pub foreign: Heat,
}

/// What reads of one chunk cost.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Heat {
    /// Requests that touched it.
    pub reads: u64,
    /// Bytes of it that they read.
    pub bytes: u64,
    /// Device time. A request that spans several chunks shares it among them by bytes.
    pub ns: u64,
}

impl Heat {
    /// Adds one read's part.
    pub fn add(&mut self, bytes: u64, ns: u64) {
        self.reads += 1;
        self.bytes += bytes;
        self.ns += ns;
    }
}

/// What was not counted, or not fully.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Losses {
    /// Requests not followed: too many in flight.
    pub full: u64,
    /// Reads counted but not attributed: the ring was full.
    pub ring: u64,
    /// Reads counted but not attributed: more chunks in one report than it may name.
    pub chunks: u64,
    /// Completions whose issue was not seen.
    pub unmatched: u64,
    /// Requests counted as foreign because their submission was not seen.
    pub orphans: u64,
    /// Requests whose completion was not seen.
    pub swept: u64,
}

/// What the programs cost, by the kernel's own account.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cost {
    /// Time within the programs.
    pub run_ns: u64,
    /// How often one ran.
    pub runs: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_one_side_writes_the_other_reads() {
        let extents = vec![Extent { device: 4096, file: 0, len: 8192 }];
        let disk =
            Disk { name: "a".into(), dev: "7:0".into(), files: vec![File { id: 9, extents }] };
        let watch = Watch { generation: 3, tgids: vec![1], disks: vec![disk] };
        let text = serde_json::to_string(&watch).unwrap();
        assert_eq!(serde_json::from_str::<Watch>(&text).unwrap(), watch);
        let mut report = Report { generation: 3, cost: Some(Cost::default()), ..Report::default() };
        let device = Histogram::from_counts([0, 3, 0, 1]);
        let own_reads = Load { count: 4, device_ns: 8, device, ..Load::default() };
        assert_eq!((own_reads.mean(), Load::default().mean()), (Some(2), None));
        report.disks.push(DiskReport { name: "a".into(), own_reads, ..DiskReport::default() });
        let text = serde_json::to_string(&report).unwrap();
        assert_eq!(serde_json::from_str::<Report>(&text).unwrap(), report);
    }
}
