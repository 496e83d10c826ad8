//! `cargo xtask build-ebpf`: the eBPF programs, with whatever their build needs and the machine lacks.
//!
//! Invariants:
//! - The toolchain's own directories are left as they are: what is fetched lies beneath `target`.
//! - The object changes on disk only when its content does, so that the agent that embeds it is not
//!   built again for nothing.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};

use crate::apt::Apt;
use crate::place;
use crate::report::note;
use crate::tool::tool;

/// The linker of eBPF objects, at a version that loads the LLVM of the compiler in use.
const LINKER: (&str, &str) = ("bpf-linker", "0.10.4");
/// The compiler's target.
const TARGET: &str = "bpfel-unknown-none";
/// v3 has compare-and-exchange (Linux 5.12); BTF tells the kernel types and lines.
const FLAGS: [&str; 3] = ["-Ctarget-cpu=v3", "-Cdebuginfo=2", "-Clink-arg=--btf"];
/// Debian suites that may have the source of the compiler's version.
const SUITES: [&str; 4] = ["trixie-backports", "trixie", "forky", "sid"];
/// How long a build may take on two slow processors.
const LIMIT: Duration = Duration::from_secs(1200);

/// Builds the object; returns where it is.
pub fn build() -> Result<PathBuf> {
    let linker = linker()?;
    let dir = place::target().join("ebpf");
    let paths = std::env::var("PATH").unwrap_or_default();
    let mut cargo = tool(cargo(), ["build", "--quiet", "--release", "--locked"])
        .args(["-Z", "build-std=core", "--target", TARGET, "--target-dir"])
        .args([dir.join("build")])
        .within(&place::root().join("agent-ebpf"))
        // The stable compiler builds core with the features of its own version: for that and for
        // nothing else.
        .env("RUSTC_BOOTSTRAP", "1")
        .env("PATH", format!("{}:{paths}", linker.display()))
        .env("CARGO_ENCODED_RUSTFLAGS", FLAGS.join("\x1f"))
        .limit(LIMIT);
    if let Some(library) = library()? {
        cargo = cargo.env("__CARGO_TESTS_ONLY_SRC_ROOT", library.as_os_str());
    }
    cargo.run().context("building agent-ebpf")?;
    let built = dir.join("build").join(TARGET).join("release/underlay-probes");
    let object = dir.join("underlay-probes.o");
    let fresh = fs::read(&built).with_context(|| format!("reading {}", built.display()))?;
    if fs::read(&object).ok().as_ref() != Some(&fresh) {
        fs::write(&object, fresh).with_context(|| format!("writing {}", object.display()))?;
    }
    Ok(object)
}

/// Builds the programs and the agent that embeds them; returns the agent.
pub fn agent() -> Result<PathBuf> {
    build()?;
    tool(cargo(), ["build", "--quiet", "--package", "underlay-agent"])
        .within(&place::root())
        .limit(LIMIT)
        .run()?;
    Ok(place::target().join("debug/underlay-agent"))
}

fn cargo() -> String {
    std::env::var("CARGO").unwrap_or_else(|_| "cargo".into())
}

/// The directory of the linker; installs it there when it is missing or another version.
fn linker() -> Result<PathBuf> {
    let tools = place::target().join("tools");
    let (name, version) = LINKER;
    let installed = fs::read_to_string(tools.join(".crates.toml")).unwrap_or_default();
    if !installed.contains(&format!("\"{name} {version} "))
        || !tools.join("bin").join(name).exists()
    {
        note(&format!("build-ebpf: cargo install {name} {version} (once, some minutes)"));
        tool(cargo(), ["install", "--quiet", "--locked", name, "--version", version, "--root"])
            .args([&tools])
            .limit(LIMIT)
            .run()
            .with_context(|| format!("installing {name}"))?;
    }
    Ok(tools.join("bin"))
}

/// The source of core, where it is not in the toolchain: fetched from Debian, at exactly the
/// compiler's version.
fn library() -> Result<Option<PathBuf>> {
    let sysroot = tool("rustc", ["--print", "sysroot"]).out()?;
    let own = Path::new(sysroot.trim()).join("lib/rustlib/src/rust/library");
    if own.join("Cargo.lock").exists() {
        return Ok(None);
    }
    let verbose = tool("rustc", ["-vV"]).out()?;
    let release = verbose.lines().find_map(|line| line.strip_prefix("release: "));
    let release = release.ok_or_else(|| anyhow!("rustc -vV names no release: {verbose}"))?;
    let library = place::target().join("ebpf").join(format!("library-{release}"));
    if !library.join("Cargo.lock").exists() {
        fetch(release, &library).with_context(|| {
            format!(
                "fetching the source of rustc {release}'s library; `rustup component add rust-src` \
                 is another way to have it"
            )
        })?;
    }
    Ok(Some(library))
}

fn fetch(release: &str, library: &Path) -> Result<()> {
    let apt = Apt::unprivileged()?;
    let unpacked = library.with_extension("unpacked");
    for suite in SUITES {
        let versions = apt.versions(suite, "rust-src").unwrap_or_default();
        let same = |version: &&String| {
            version.strip_prefix(release).is_some_and(|rest| rest.starts_with(['+', '-', '~']))
        };
        let Some(version) = versions.iter().find(same) else { continue };
        let _ = fs::remove_dir_all(&unpacked);
        fs::create_dir_all(&unpacked)?;
        apt.unpack(suite, &format!("rust-src={version}"), |_| false, &unpacked)?;
        let source = unpacked.join(format!("usr/src/rustc-{release}/library"));
        let moved = fs::rename(&source, library);
        moved.with_context(|| format!("moving {} to {}", source.display(), library.display()))?;
        return Ok(fs::remove_dir_all(&unpacked)?);
    }
    bail!("no suite of {} has rust-src {release}: {}", apt.mirror, SUITES.join(", "))
}
