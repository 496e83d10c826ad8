//! Whether probes can run here, and if not, why: for people, and for `underlay doctor`.

use serde::{Deserialize, Serialize};

use crate::capabilities;
use crate::error::Result;
use crate::probes::{Probes, embedded};

/// What was found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Findings {
    /// Whether the programs were loaded and attached.
    pub works: bool,
    /// The agent's version.
    pub version: String,
    /// Whether the agent was built with the programs.
    pub built: bool,
    /// Capabilities that are missing, by name.
    pub missing: Vec<String>,
    /// Kernel memory of the programs and their maps, in bytes, once loaded.
    pub memory: u64,
    /// The kind of what stands in the way.
    pub kind: Option<String>,
    /// What stands in the way, and what to do.
    pub problem: Option<String>,
}

/// Loads and attaches the programs for real, and lets them go again.
pub fn check(slots: u32) -> Result<Findings> {
    let missing = capabilities::missing()?;
    let mut findings = Findings {
        works: false,
        version: env!("CARGO_PKG_VERSION").into(),
        built: embedded(),
        missing: missing.into_iter().map(String::from).collect(),
        memory: 0,
        kind: None,
        problem: None,
    };
    match Probes::load(slots) {
        Ok(probes) => {
            findings.works = true;
            findings.memory = probes.memory();
        }
        Err(error) => {
            findings.kind = Some(error.kind().into());
            findings.problem = Some(error.to_string());
        }
    }
    Ok(findings)
}
