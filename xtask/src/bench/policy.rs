//! What the promotion policy saves and what it writes, beside other caches: benches/policy of the
//! root package.
//!
//! The policy is in the library, and xtask builds without that: cargo runs the bench. It counts and
//! times nothing, so the development profile, which is built already, does.

use anyhow::Result;

use super::Options;
use crate::place;
use crate::tool::{hand_over, tool};

/// Runs it; its tables are its output.
pub fn run(options: &Options) -> Result<()> {
    let cargo = std::env::var("CARGO").unwrap_or_else(|_| "cargo".into());
    let bench = ["bench", "--quiet", "--profile", "dev", "--package", "underlay"];
    let mut bench = tool(cargo, bench).args(["--bench", "policy", "--"]);
    if options.json {
        bench = bench.args(["--json"]);
    }
    if let Some(trace) = &options.trace {
        // Where the user stands, not where cargo runs the bench.
        let trace = std::path::absolute(trace)?;
        bench = bench.args(["--trace".as_ref(), trace.as_os_str()]);
    }
    hand_over(bench.within(&place::root()))
}
