//! What the agent may, and how it gives up what it does not need.

use crate::error::{Error, Result};
use crate::sys;

/// Number of CAP_PERFMON: tracepoints, and the reading of what they point at.
const PERFMON: u64 = 38;
/// Number of CAP_BPF: programs and maps.
const BPF: u64 = 39;
/// Number of CAP_SYS_ADMIN, which includes both.
const SYS_ADMIN: u64 = 21;

/// Names of what is missing to load and attach the programs; empty if nothing is.
pub fn missing() -> Result<Vec<&'static str>> {
    let has = sys::capabilities().map_err(|error| Error::io("reading capabilities", error))?;
    let lacks = |number: u64| has.effective & (1 << number | 1 << SYS_ADMIN) == 0;
    let all = [(BPF, "CAP_BPF"), (PERFMON, "CAP_PERFMON")];
    Ok(all.into_iter().filter(|(number, _)| lacks(*number)).map(|(_, name)| name).collect())
}

/// Gives up everything but CAP_BPF and CAP_PERFMON, as far as they are there.
///
/// Called once all that may need more is done: the programs are attached.
pub fn give_up() -> Result<()> {
    let has = sys::capabilities().map_err(|error| Error::io("reading capabilities", error))?;
    let keep = has.permitted & (1 << BPF | 1 << PERFMON);
    sys::keep_only(keep).map_err(|error| Error::io("giving up capabilities", error))
}
