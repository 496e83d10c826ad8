//! What the eBPF probes saw of the devices below, and what they cost.

use std::fmt;

use super::page::{About, Latency, Of, Page};

/// The probes as they stand.
#[derive(Clone, Debug, Default)]
pub struct Probes {
    /// Whether an agent reports. While none does, what the last one said of the disks' present is left
    /// out below; what was counted stays.
    pub up: bool,
    /// Runs of the programs in the kernel, where the kernel tells.
    pub runs: Option<u64>,
    /// Processor time that these took, in seconds.
    pub run_seconds: Option<f64>,
    /// Events that were not counted, or not fully.
    pub dropped: u64,
    /// Reads that lay in no known file, or in one whose place on the disk isn't known.
    pub unresolved: u64,
    /// Every disk that they watch.
    pub disks: Vec<ProbedDisk>,
}

/// A disk as the probes see it; what is counted, since the daemon's start.
#[derive(Clone, Debug, Default)]
pub struct ProbedDisk {
    /// Its name.
    pub disk: String,
    /// Reads and writes of this daemon.
    pub own: DeviceReads,
    /// Reads and writes of everybody else.
    pub foreign: DeviceReads,
    /// Requests in flight now; `None` while no agent reports.
    pub in_flight: Option<u64>,
    /// The age of the oldest of these, in seconds.
    pub oldest_seconds: Option<f64>,
}

/// What one origin asked of one device.
#[derive(Clone, Debug, Default)]
pub struct DeviceReads {
    /// Its reads.
    pub reads: Served,
    /// Its writes.
    pub writes: Served,
}

/// What a device did.
#[derive(Clone, Debug, Default)]
pub struct Served {
    /// Bytes of the requests.
    pub bytes: u64,
    /// Requests that failed.
    pub errors: u64,
    /// Time from issue to completion.
    pub device: Latency,
    /// Time from the request's making to its issue.
    pub queue: Latency,
}

const UP: About = About("probes_up", Of::Things, "Whether the agent of the probes reports");
const RUNS: About = About("probe_runs", Of::Things, "Runs of the probes in the kernel");
const RUN_TIME: About = About("probe_run", Of::Seconds, "Processor time that the probes took");
const DROPPED: About =
    About("probe_dropped_events", Of::Things, "Events that were not counted, or not fully");
const UNRESOLVED: About =
    About("probe_unresolved_reads", Of::Things, "Device reads that lay in no known file");
const READ: About = About("device_read", Of::Seconds, "Time that reads took in the device");
const WRITE: About = About("device_write", Of::Seconds, "Time that writes took in the device");
const QUEUE: About =
    About("device_queue", Of::Seconds, "Time that requests waited before the device had them");
const READ_BYTES: About = About("device_read", Of::Bytes, "Bytes read from the device");
const WRITE_BYTES: About = About("device_write", Of::Bytes, "Bytes written to the device");
const ERRORS: About = About("device_errors", Of::Things, "Requests that the device failed");
const IN_FLIGHT: About = About("device_in_flight", Of::Things, "Requests that the device works on");
const OLDEST: About =
    About("device_oldest_request", Of::Seconds, "Age of the oldest request in flight, 0 of none");

type Labels<'a> = [(&'static str, &'a str); 2];
type OpLabels<'a> = [(&'static str, &'a str); 3];

pub(super) fn tell(page: &mut Page<'_>, probes: Option<&Probes>) -> fmt::Result {
    let Some(probes) = probes else { return Ok(()) };
    page.one(UP, u64::from(probes.up))?;
    if let Some(runs) = probes.runs {
        page.count(RUNS, runs)?;
    }
    if let Some(seconds) = probes.run_seconds {
        page.count(RUN_TIME, seconds)?;
    }
    page.count(DROPPED, probes.dropped)?;
    page.count(UNRESOLVED, probes.unresolved)?;
    let all = || probes.disks.iter().flat_map(origins);
    page.latency(READ, all().map(|(labels, did)| (labels, &did.reads.device)))?;
    page.latency(WRITE, all().map(|(labels, did)| (labels, &did.writes.device)))?;
    page.counter(READ_BYTES, all().map(|(labels, did)| (labels, did.reads.bytes)))?;
    page.counter(WRITE_BYTES, all().map(|(labels, did)| (labels, did.writes.bytes)))?;
    let each = || all().flat_map(operations);
    page.latency(QUEUE, each().map(|(labels, served)| (labels, &served.queue)))?;
    page.counter(ERRORS, each().map(|(labels, served)| (labels, served.errors)))?;
    let now = || probes.disks.iter().map(|disk| ([("disk", disk.disk.as_str())], disk));
    let in_flight = now().filter_map(|(labels, disk)| Some((labels, disk.in_flight?)));
    page.gauge(IN_FLIGHT, in_flight)?;
    let oldest = now().filter_map(|(labels, disk)| Some((labels, disk.oldest_seconds?)));
    page.gauge(OLDEST, oldest)
}

fn origins(disk: &ProbedDisk) -> [(Labels<'_>, &DeviceReads); 2] {
    [("own", &disk.own), ("foreign", &disk.foreign)]
        .map(|(origin, did)| ([("disk", disk.disk.as_str()), ("origin", origin)], did))
}

fn operations<'a>(
    ([disk, origin], did): (Labels<'a>, &'a DeviceReads),
) -> [(OpLabels<'a>, &'a Served); 2] {
    [("read", &did.reads), ("write", &did.writes)]
        .map(|(op, served)| ([disk, origin, ("op", op)], served))
}
