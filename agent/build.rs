//! Embeds the eBPF programs where `cargo xtask build-ebpf` has built them.
//!
//! Everything builds without them: the agent then says so and how to get them.

use std::env;
use std::path::{Path, PathBuf};

fn main() {
    println!("cargo::rustc-check-cfg=cfg(embedded)");
    println!("cargo::rerun-if-env-changed=UNDERLAY_PROBES");
    let Some(object) = object() else { return };
    // Also of a path where nothing is yet: cargo then looks at it again with every build.
    println!("cargo::rerun-if-changed={}", object.display());
    if object.is_file() {
        println!("cargo::rustc-cfg=embedded");
        println!("cargo::rustc-env=UNDERLAY_PROBES_OBJECT={}", object.display());
    }
}

/// `UNDERLAY_PROBES` names one built elsewhere; else it is where xtask puts it.
fn object() -> Option<PathBuf> {
    if let Some(named) = env::var_os("UNDERLAY_PROBES") {
        return Some(PathBuf::from(named));
    }
    let manifest = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR")?);
    let root = manifest.parent()?;
    let target =
        env::var_os("CARGO_TARGET_DIR").map_or_else(|| root.join("target"), |dir| root.join(dir));
    Some(target.join(Path::new("ebpf/underlay-probes.o")))
}
