//! What any dashboard expects of a process, by the names that all of Prometheus's clients use; left out
//! where /proc does not tell.

use std::fmt;

use nix::{
    sys::resource::{Resource, getrlimit},
    unistd::{SysconfVar, sysconf},
};
use prometheus_client::{collector::Collector, encoding::DescriptorEncoder};

use super::page::{About, Of, Page};

/// This process, asked when it is told of.
#[derive(Debug)]
pub(super) struct Process;

/// Fields of /proc/self/stat behind the command, from 0.
const USER_TICKS: usize = 11;
const SYSTEM_TICKS: usize = 12;
const THREADS: usize = 17;
const START: usize = 19;
const VIRTUAL: usize = 20;
const RESIDENT: usize = 21;

const CPU: About = About("process_cpu", Of::Seconds, "Processor time used");
const RESIDENT_MEMORY: About = About("process_resident_memory", Of::Bytes, "Memory in use");
const VIRTUAL_MEMORY: About = About("process_virtual_memory", Of::Bytes, "Address space in use");
const STARTED: About =
    About("process_start_time", Of::Seconds, "When the process started, since 1970");
const RUNNING: About = About("process_threads", Of::Things, "Threads of the process");
const OPEN: About = About("process_open_fds", Of::Things, "Open file descriptors");
const MOST: About = About("process_max_fds", Of::Things, "File descriptors that may be open");

impl Collector for Process {
    fn encode(&self, encoder: DescriptorEncoder) -> fmt::Result {
        let mut page = Page(encoder);
        if let Ok(stat) = std::fs::read_to_string("/proc/self/stat") {
            tell(&mut page, &stat, boot_time())?;
        }
        if let Ok(open) = std::fs::read_dir("/proc/self/fd") {
            // One of them is the look itself.
            page.one(OPEN, (open.count() as u64).saturating_sub(1))?;
        }
        match getrlimit(Resource::RLIMIT_NOFILE) {
            Ok((limit, _)) => page.one(MOST, limit),
            Err(_) => Ok(()),
        }
    }
}

fn tell(page: &mut Page<'_>, stat: &str, boot: Option<u64>) -> fmt::Result {
    // The command, in parentheses, may hold spaces: fields are counted behind it.
    let rest = stat.rsplit_once(')').map_or("", |(_, rest)| rest);
    let fields: Vec<u64> =
        rest.split_whitespace().map(|field| field.parse().unwrap_or_default()).collect();
    let field = |number: usize| fields.get(number).copied();
    let unit = |of| sysconf(of).ok().flatten().and_then(|unit| u64::try_from(unit).ok());
    let tick = unit(SysconfVar::CLK_TCK).unwrap_or(100) as f64;
    if let (Some(user), Some(system)) = (field(USER_TICKS), field(SYSTEM_TICKS)) {
        page.count(CPU, (user + system) as f64 / tick)?;
    }
    if let (Some(start), Some(boot)) = (field(START), boot) {
        page.one(STARTED, boot as f64 + start as f64 / tick)?;
    }
    if let Some(pages) = field(RESIDENT) {
        page.one(RESIDENT_MEMORY, pages * unit(SysconfVar::PAGE_SIZE).unwrap_or(4096))?;
    }
    if let Some(bytes) = field(VIRTUAL) {
        page.one(VIRTUAL_MEMORY, bytes)?;
    }
    field(THREADS).map_or(Ok(()), |threads| page.one(RUNNING, threads))
}

/// When the kernel started, in seconds since 1970.
fn boot_time() -> Option<u64> {
    let stat = std::fs::read_to_string("/proc/stat").ok()?;
    stat.lines().find_map(|line| line.strip_prefix("btime ")?.trim().parse().ok())
}
