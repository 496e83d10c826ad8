//! The programs in the kernel: load, attach, set what they look at, read what they counted.
//!
//! Invariants:
//! - Dropping [`Probes`] detaches and unloads everything: the kernel does, when its descriptors close,
//!   also for an agent that was killed.
//! - Once loaded, nothing here needs more than CAP_BPF and CAP_PERFMON, but for [`Probes::account`].
//! - What is read are totals since the load; differences are the caller's.

mod load;
mod sets;

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::fd::OwnedFd;

use aya::Ebpf;
use aya::maps::{Array, MapData, RingBuf};
use aya::programs::BtfTracePoint;
use aya::programs::tp_btf::BtfTracePointLinkId;
use aya::sys::{Stats, enable_stats};
use nix::time::{ClockId, clock_gettime};
use underlay_agent_ebpf as layout;
use underlay_agent_ebpf::{Class, Counters, Losses, Touch, Watched};

use crate::device::{Dev, Kind};
use crate::error::{Error, Result};
use crate::kernel::{self, Tracepoint};
use crate::report::Cost;
use crate::sys::{self, Plain, Table};
pub use load::embedded;
use sets::Sets;

/// The programs and the tracepoint of each, in the order in which they are attached. Completion comes first:
/// a request whose issue is seen will then be seen to end. Of two on one tracepoint the second sees what the
/// first can't.
const PROGRAMS: [(&str, Tracepoint); 8] = [
    RQ_COMPLETE[0],
    RQ_COMPLETE[1],
    BIO_COMPLETE[0],
    BIO_COMPLETE[1],
    ("rq_requeue", kernel::RQ_REQUEUE),
    ("rq_issue", kernel::RQ_ISSUE),
    ("bio_split", kernel::BIO_SPLIT),
    ("bio_queue", kernel::BIO_QUEUE),
];
const RQ_COMPLETE: [(&str, Tracepoint); 2] =
    [("rq_complete", kernel::RQ_COMPLETE), ("rq_complete_2", kernel::RQ_COMPLETE)];
/// These are attached only while a device needs them.
const BIO_COMPLETE: [(&str, Tracepoint); 2] =
    [("bio_complete", kernel::BIO_COMPLETE), ("bio_complete_2", kernel::BIO_COMPLETE)];
/// After this time in flight a request is looked at twice, in nanoseconds.
pub const LONG: u64 = 1_000_000_000;

/// Loaded and attached programs.
pub struct Probes {
    ebpf: Ebpf,
    watched: Sets<Watched>,
    owners: Sets<u32>,
    tgids: Vec<u32>,
    flights: Table,
    counters: Array<MapData, Plain<Counters>>,
    losses: Array<MapData, Plain<Losses>>,
    ring: RingBuf<MapData>,
    slots: u32,
    shards: u32,
    ends: Vec<BtfTracePointLinkId>,
    account: Option<OwnedFd>,
}

/// A request that has not come back.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct InFlight {
    at: usize,
    key: u64,
    issued: u64,
    /// The slot of its disk.
    pub slot: u32,
    /// For how long the device has had it, in nanoseconds.
    pub age: u64,
}

impl Probes {
    /// Loads and attaches the programs, with room for `slots` disks (up to [`layout::SLOTS`]).
    pub fn load(slots: u32) -> Result<Probes> {
        load::load(slots)
    }

    /// How many disks can be watched at once.
    pub fn slots(&self) -> u32 {
        self.slots
    }

    /// Lets I/O of `dev` count for `slot`.
    pub fn watch(&mut self, dev: Dev, slot: u32, kind: Kind) -> Result<()> {
        let kind = match kind {
            Kind::Requests => layout::REQUESTS,
            Kind::Bios => layout::BIOS,
        };
        let entry = Watched { dev: dev.kernel(), slot: slot as u16, kind };
        self.watched.put(entry.dev, entry, |other| other.dev)
    }

    /// I/O of `dev` counts no longer.
    pub fn unwatch(&mut self, dev: Dev) -> Result<()> {
        self.watched.remove(dev.kernel(), |other| other.dev)
    }

    /// Attaches the programs that see the ends of bios, or detaches them.
    pub fn follow_bios(&mut self, needed: Needed) -> Result<()> {
        if needed == Needed::Yes && self.ends.is_empty() {
            for (name, tracepoint) in BIO_COMPLETE {
                self.ends.push(load::attach(program(&mut self.ebpf, name)?, &tracepoint)?);
            }
        }
        if needed == Needed::No {
            for ((name, tracepoint), link) in BIO_COMPLETE.into_iter().zip(self.ends.drain(..)) {
                let detached = program(&mut self.ebpf, name)?.detach(link);
                let what = format!("detaching from {}", tracepoint.name);
                detached.map_err(|error| refused(what, &error))?;
            }
        }
        Ok(())
    }

    /// Makes `tgids` the processes whose I/O is our own.
    pub fn own(&mut self, tgids: &[u32]) -> Result<()> {
        let before = std::mem::take(&mut self.tgids);
        for gone in before.iter().filter(|tgid| !tgids.contains(tgid)) {
            self.owners.remove(*gone, |other| *other)?;
        }
        for tgid in tgids.iter().filter(|tgid| **tgid != 0) {
            self.owners.put(*tgid, *tgid, |other| *other)?;
            self.tgids.push(*tgid);
        }
        Ok(())
    }

    /// Takes the completed reads out of the ring, at most as many as fit into it.
    pub fn drain(&mut self, mut see: impl FnMut(Touch)) {
        for _ in 0..layout::RING / 32 {
            let Some(item) = self.ring.next() else { return };
            if let Some(touch) = sys::touch(&item) {
                see(touch);
            }
        }
    }

    /// The totals of a slot over all its shards.
    pub fn counters(&self, slot: u32) -> Result<Counters> {
        let mut sum = Counters::default();
        for shard in 0..self.shards {
            let part = self.counters.get(&(slot * self.shards + shard), 0);
            let Plain(part) = part.map_err(|error| refused("reading counters".into(), &error))?;
            for (sum, part) in sum.classes.iter_mut().zip(&part.classes) {
                add(sum, part);
            }
        }
        Ok(sum)
    }

    /// The requests that have not come back.
    pub fn in_flight(&self) -> Result<Vec<InFlight>> {
        let now = now()?;
        let mut found: Vec<InFlight> =
            (0..Table::ENTRIES).filter_map(|at| self.read(at, now)).collect();
        // An entry that is being taken shows its key before its time. It can't be so for long: what
        // seems old must still be the same.
        found.retain(|flight| {
            let same = |again: InFlight| (again.key, again.issued) == (flight.key, flight.issued);
            flight.age < LONG || self.read(flight.at, now).is_some_and(same)
        });
        Ok(found)
    }

    fn read(&self, at: usize, now: u64) -> Option<InFlight> {
        let (key, flight) = self.flights.read(at)?;
        Some(InFlight {
            at,
            key,
            issued: flight.issued,
            slot: u32::from(flight.slot),
            age: now.saturating_sub(flight.issued),
        })
    }

    /// Forgets a request whose completion was not seen.
    pub fn forget(&mut self, flight: &InFlight) {
        self.flights.free(flight.at, flight.key);
    }

    /// What was not counted.
    pub fn losses(&self) -> Result<Losses> {
        let losses = self.losses.get(&0, 0);
        losses.map(|Plain(all)| all).map_err(|error| refused("reading losses".into(), &error))
    }

    /// Lets the kernel keep account of the programs' time, for as long as this lives. Needs
    /// CAP_SYS_ADMIN; sysctl kernel.bpf_stats_enabled=1 does the same for all.
    pub fn account(&mut self) -> Result<()> {
        let what = "keeping account of the programs' time (CAP_SYS_ADMIN)";
        let enabled = enable_stats(Stats::RunTime);
        self.account = Some(enabled.map_err(|error| refused(what.into(), &error))?);
        Ok(())
    }

    /// What the programs cost since an account is kept; nothing if none is.
    pub fn cost(&self) -> Option<Cost> {
        let sysctl = || fs::read_to_string("/proc/sys/kernel/bpf_stats_enabled");
        if self.account.is_none() && sysctl().ok()?.trim() != "1" {
            return None;
        }
        let mut cost = Cost::default();
        for info in self.programs().filter_map(|program| program.info().ok()) {
            cost.run_ns += u64::try_from(info.run_time().as_nanos()).unwrap_or(u64::MAX);
            cost.runs += info.run_count();
        }
        Some(cost)
    }

    /// Kernel memory of this process's maps and programs, in bytes, by the kernel's own account.
    pub fn memory(&self) -> u64 {
        let Ok(entries) = fs::read_dir("/proc/self/fdinfo") else { return 0 };
        let infos = entries.flatten().filter_map(|entry| fs::read_to_string(entry.path()).ok());
        let objects = infos.filter_map(|info| {
            let id = field(&info, "map_id").map(|id| ("map", id));
            let id = id.or_else(|| field(&info, "prog_id").map(|id| ("program", id)))?;
            Some((id, field(&info, "memlock")?))
        });
        objects.collect::<BTreeMap<_, _>>().into_values().sum()
    }

    fn programs(&self) -> impl Iterator<Item = &BtfTracePoint> {
        self.ebpf.programs().filter_map(|(_, program)| program.try_into().ok())
    }
}

/// Whether something is wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Needed {
    /// It is.
    Yes,
    /// It is not.
    No,
}

fn program<'a>(ebpf: &'a mut Ebpf, name: &str) -> Result<&'a mut BtfTracePoint> {
    let missing = || Error::Refused {
        what: format!("program {name}"),
        problem: "not in the embedded object; build it again: cargo xtask build-ebpf".into(),
    };
    let program = ebpf.program_mut(name).ok_or_else(missing)?;
    program.try_into().map_err(|_| missing())
}

/// The kernel's monotonic clock, which the programs read as well, in nanoseconds.
fn now() -> Result<u64> {
    let time = clock_gettime(ClockId::CLOCK_MONOTONIC);
    let time = time.map_err(|error| Error::io("reading the monotonic clock", error))?;
    let (seconds, nanos) = (time.tv_sec().cast_unsigned(), time.tv_nsec().cast_unsigned());
    Ok(seconds.saturating_mul(1_000_000_000).saturating_add(nanos))
}

/// A number in what the kernel tells of a descriptor.
fn field(info: &str, name: &str) -> Option<u64> {
    let line = info.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
    line.trim().parse().ok()
}

fn add(sum: &mut Class, part: &Class) {
    sum.count = sum.count.wrapping_add(part.count);
    sum.bytes = sum.bytes.wrapping_add(part.bytes);
    sum.errors = sum.errors.wrapping_add(part.errors);
    sum.device_ns = sum.device_ns.wrapping_add(part.device_ns);
    sum.queue_ns = sum.queue_ns.wrapping_add(part.queue_ns);
    sum.queued = sum.queued.wrapping_add(part.queued);
    let pairs = sum.device.iter_mut().zip(&part.device);
    for (sum, part) in pairs.chain(sum.queue.iter_mut().zip(&part.queue)) {
        *sum = sum.wrapping_add(*part);
    }
}

/// Tells a lack of privileges (EPERM, however deep it lies) from a refusal. EACCES is none: that is
/// what the verifier answers, with its log.
fn refused(what: String, error: &(dyn std::error::Error + 'static)) -> Error {
    let mut at = Some(error);
    let mut problem = error.to_string();
    while let Some(error) = at {
        let code = error.downcast_ref::<io::Error>().and_then(io::Error::raw_os_error);
        if code == Some(libc::EPERM) {
            return Error::Permission { what, source: io::Error::from_raw_os_error(libc::EPERM) };
        }
        at = error.source();
        if let Some(deeper) = at {
            let deeper = deeper.to_string();
            if !problem.contains(&deeper) {
                problem = format!("{problem}: {deeper}");
            }
        }
    }
    // A verifier's log may have thousands of lines; its end says why.
    let from = problem.len().saturating_sub(2000);
    let from = (from..problem.len()).find(|at| problem.is_char_boundary(*at)).unwrap_or(0);
    Error::Refused { what, problem: problem[from..].to_string() }
}
