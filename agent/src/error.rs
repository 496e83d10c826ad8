//! What can go wrong with probes. Each message names the object and what to do about it.

use std::io;
use std::path::PathBuf;

/// The library's result.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why there are no probes, or no figures of one device.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The agent was built without the programs.
    #[error("no probes: run cargo xtask build-ebpf, then build the agent again")]
    NotBuilt,
    /// The kernel does not describe its types.
    #[error("no BTF at {}: this kernel was built without CONFIG_DEBUG_INFO_BTF", path.display())]
    NoBtf {
        /// Where it would be.
        path: PathBuf,
    },
    /// A file of sysfs can't be read.
    #[error("{}: can't be read", path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The kernel has no such tracepoint, or none for programs.
    #[error(
        "tracepoint {name}: this kernel has none; it was built without TRACEPOINTS or BPF_EVENTS"
    )]
    NoTracepoint {
        /// Its name.
        name: &'static str,
    },
    /// A tracepoint or a structure is not one that the programs can use.
    #[error(
        "{what}: {problem}; the probes need Linux 5.15 or newer, and a newer kernel may need a newer underlay-agent"
    )]
    Layout {
        /// What it is.
        what: String,
        /// What is missing or different.
        problem: String,
    },
    /// The kernel refused an operation for want of privileges.
    #[error("{what}: not permitted; give the agent CAP_BPF and CAP_PERFMON")]
    Permission {
        /// The operation.
        what: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// eBPF is not in this kernel, or refuses these programs.
    #[error("{what}: {problem}")]
    Refused {
        /// The operation.
        what: String,
        /// What the kernel or the verifier said.
        problem: String,
    },
    /// A device that is not there or has no block device beneath.
    #[error("device {dev}: {problem}")]
    Device {
        /// Its number, `major:minor`.
        dev: String,
        /// What is wrong with it.
        problem: String,
    },
    /// More disks than slots.
    #[error(
        "disk {name}: {slots} disks are watched already; start the agent with a larger --slots"
    )]
    Full {
        /// The disk that found no slot.
        name: String,
        /// How many there are.
        slots: u32,
    },
    /// The daemon can't be reached or answers what nobody can use.
    #[error("socket {}: {problem}", path.display())]
    Daemon {
        /// Its socket.
        path: PathBuf,
        /// What went wrong.
        problem: String,
    },
    /// A system call failed.
    #[error("{what}")]
    Io {
        /// What was tried.
        what: String,
        /// How it failed.
        source: io::Error,
    },
}

impl Error {
    /// A failed system call, with what it was for; a lack of privileges is told apart.
    pub fn io(what: impl Into<String>, source: impl Into<io::Error>) -> Error {
        let (what, source) = (what.into(), source.into());
        match source.kind() {
            io::ErrorKind::PermissionDenied => Error::Permission { what, source },
            _ => Error::Io { what, source },
        }
    }

    /// The name of its kind, for programs.
    pub const fn kind(&self) -> &'static str {
        match self {
            Error::NotBuilt => "not_built",
            Error::NoBtf { .. } => "no_btf",
            Error::Unreadable { .. } => "unreadable",
            Error::NoTracepoint { .. } => "no_tracepoint",
            Error::Layout { .. } => "layout",
            Error::Permission { .. } => "permission",
            Error::Refused { .. } => "refused",
            Error::Device { .. } => "device",
            Error::Full { .. } => "full",
            Error::Daemon { .. } => "daemon",
            Error::Io { .. } => "io",
        }
    }
}
