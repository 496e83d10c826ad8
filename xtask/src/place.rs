//! Where things are: the repository, the target directory, the rig's own corner of it.
//!
//! Everything that a rig makes lies beneath `target/rig`: `cache` outlives runs (images, kernels,
//! packages), `run` belongs to the run in progress and is swept before and after it.

use std::env;
use std::path::{Path, PathBuf};

/// The root of the repository.
pub fn root() -> PathBuf {
    let manifest = Path::new(env!("CARGO_MANIFEST_DIR"));
    manifest.parent().unwrap_or(manifest).to_path_buf()
}

/// Cargo's target directory.
pub fn target() -> PathBuf {
    env::var_os("CARGO_TARGET_DIR").map_or_else(|| root().join("target"), |dir| root().join(dir))
}

/// What is kept between runs.
pub fn cache() -> PathBuf {
    target().join("rig/cache")
}

/// What belongs to the run in progress.
pub fn run() -> PathBuf {
    target().join("rig/run")
}

/// The build of `underlay` that a rig puts to the test.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Profile {
    /// `target/debug`: what `cargo test` builds anyway.
    Debug,
    /// `target/release`: for figures.
    Release,
}

impl Profile {
    /// The daemon's program file in this profile; `UNDERLAY_PROGRAM` names one built elsewhere.
    pub fn underlay(self) -> PathBuf {
        if let Some(program) = env::var_os("UNDERLAY_PROGRAM") {
            return PathBuf::from(program);
        }
        match self {
            Profile::Debug => target().join("debug/underlay"),
            Profile::Release => target().join("release/underlay"),
        }
    }
}
