//! `underlay doctor`: what of kernel, privileges and tools is there, and what follows.

use std::{env, fs, os::unix::fs::PermissionsExt, path::PathBuf, process::Stdio, time::Duration};

use clap::Args;
use nix::{
    sys::{
        memfd::{MFdFlags, memfd_create},
        resource::{Resource, getrlimit},
        utsname::uname,
    },
    unistd::Uid,
};
use serde::Serialize;

use super::{
    Outcome, Setting,
    out::{Side, Table},
    size,
};
use crate::{
    blockdev::ublk::device as ublk_device,
    control::{agent, paths::Paths},
    error::{Context, Error, Kind, Result},
    io::{Io, RingFile, Rings},
};

/// The first kernel whose io_uring has all that the rings use (DEFER_TASKRUN).
const KERNEL: (u32, u32) = (6, 1);
/// Open files that a node with a thousand replicas needs.
const FILES: u64 = 4096;

/// Look at kernel, privileges and tools: what is there, what is missing, what follows.
///
/// Needs no daemon and changes nothing. Exit code 1 when the daemon cannot run here.
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  underlay doctor --json")]
pub struct Doctor {}

/// How one thing stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
enum State {
    /// There, and it works.
    Ok,
    /// Not there, and something follows from that.
    Missing,
    /// Not there, and the daemon cannot run without.
    Fatal,
}

/// One thing that was looked at.
#[derive(Debug, Serialize)]
struct Finding {
    what: &'static str,
    state: State,
    found: String,
    follows: String,
}

impl Finding {
    fn ok(what: &'static str, found: impl Into<String>) -> Finding {
        Finding { what, state: State::Ok, found: found.into(), follows: String::new() }
    }

    fn missing(what: &'static str, found: impl Into<String>, follows: &str) -> Finding {
        Finding { what, state: State::Missing, found: found.into(), follows: follows.to_owned() }
    }

    fn fatal(what: &'static str, found: impl Into<String>, follows: &str) -> Finding {
        Finding { what, state: State::Fatal, found: found.into(), follows: follows.to_owned() }
    }
}

impl Doctor {
    pub(super) async fn run(self, setting: &Setting) -> Result<Outcome> {
        let mut findings = vec![kernel(), io_uring().await];
        findings.extend([user(), files(), state(), daemon(setting).await, ublk(), probes()]);
        findings.extend(tools());
        setting.show(&findings, |findings| text(findings))?;
        let fatal = findings.iter().any(|finding| finding.state == State::Fatal);
        Ok(if fatal { Outcome::Amiss } else { Outcome::Well })
    }
}

fn text(findings: &[Finding]) -> String {
    let mut table = Table::new(&[
        ("", Side::Left),
        ("WHAT", Side::Left),
        ("FOUND", Side::Left),
        ("WHAT FOLLOWS", Side::Left),
    ]);
    for finding in findings {
        let mark = match finding.state {
            State::Ok => "ok",
            State::Missing => "--",
            State::Fatal => "!!",
        };
        let cells = [mark, finding.what, &finding.found, &finding.follows];
        table.row(cells.map(str::to_owned));
    }
    table.text("")
}

fn kernel() -> Finding {
    let release = match uname() {
        Ok(name) => name.release().to_string_lossy().into_owned(),
        Err(error) => {
            return Finding::missing("kernel", error.to_string(), "its version is unknown");
        }
    };
    let mut numbers = release.split(['.', '-']).map_while(|part| part.parse::<u32>().ok());
    let version = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    match version >= KERNEL {
        true => Finding::ok("kernel", release),
        false => Finding::fatal("kernel", release, "Linux 6.1 or later is needed"),
    }
}

/// Starts a ring as the daemon does, and has it write, sync and read a file.
async fn io_uring() -> Finding {
    let what = "io_uring";
    let tried = async {
        let mut rings = Rings::start(1, Duration::ZERO).context(|| "starting a ring")?;
        let file = memfd_create(c"doctor", MFdFlags::MFD_CLOEXEC).context(|| "a file in memory")?;
        let file = RingFile::new(fs::File::from(file)).context(|| "a file in memory")?;
        let done = rings.run(0, move |ring| async move {
            let buf = ring.alloc(8192);
            buf.fill(0x5a);
            ring.write(&file, buf.clone(), 4096).await?;
            ring.sync(&file).await?;
            ring.punch(&file, 4096..8192).await?;
            ring.read(&file, buf.clone(), 4096).await?;
            Ok::<_, std::io::Error>(buf.to_vec())
        });
        let gone = || Error::new(Kind::Io, "the ring's thread ended");
        let bytes = done.await.ok_or_else(gone)?.context(|| "file I/O on a ring")?;
        rings.stop(Duration::from_secs(5));
        match bytes.iter().enumerate().all(|(at, byte)| *byte == if at < 4096 { 0 } else { 0x5a }) {
            true => Ok(()),
            false => Err(Error::new(Kind::Corrupt, "a ring read back what was not written")),
        }
    };
    match tried.await {
        Ok(()) => Finding::ok(what, "ring, write, sync, punch and read tried: they work"),
        Err(error) => {
            let disabled = fs::read_to_string("/proc/sys/kernel/io_uring_disabled");
            let remedy = match disabled.as_deref().map(str::trim) {
                Ok("1" | "2") => {
                    "set sysctl kernel.io_uring_disabled=0 (or add the daemon's group \
                                  to kernel.io_uring_group)"
                }
                _ => {
                    "the daemon cannot run: allow the io_uring system calls (containers often \
                      filter them), or take Linux 6.1 or later"
                }
            };
            Finding::fatal(what, error.to_string(), remedy)
        }
    }
}

fn user() -> Finding {
    let uid = Uid::effective();
    match uid.is_root() {
        true => Finding::ok("user", "root"),
        false => Finding::missing(
            "user",
            format!("uid {uid}"),
            "disks must be directories that this user may write; state and sockets are in its home",
        ),
    }
}

fn files() -> Finding {
    match getrlimit(Resource::RLIMIT_NOFILE) {
        Ok((_, hard)) if hard >= FILES => Finding::ok("open files", format!("{hard} at most")),
        Ok((_, hard)) => Finding::missing(
            "open files",
            format!("{hard} at most"),
            "an open replica takes two: raise the limit (LimitNOFILE=) for many of them",
        ),
        Err(error) => Finding::missing("open files", error.to_string(), "the limit is unknown"),
    }
}

/// Whether the usual state directory can be made or written.
fn state() -> Finding {
    let what = "state";
    let paths = match Paths::of_this_user() {
        Ok(paths) => paths,
        Err(error) => return Finding::missing(what, error.to_string(), "name the paths"),
    };
    let shown = paths.state.display().to_string();
    let existing = paths.state.ancestors().find(|path| path.exists());
    let writable = existing
        .is_some_and(|path| nix::unistd::access(path, nix::unistd::AccessFlags::W_OK).is_ok());
    match writable {
        true => Finding::ok(what, shown),
        false => {
            Finding::missing(what, format!("{shown} can't be written"), "give another: --state")
        }
    }
}

async fn daemon(setting: &Setting) -> Finding {
    let what = "daemon";
    let asked = async { setting.client()?.get::<crate::control::api::Status>("/v1/status").await };
    match asked.await {
        Ok(status) => Finding::ok(
            what,
            format!(
                "version {}, {} disks, {} images, {} replicas, {} stored",
                status.daemon.version,
                status.disks.len(),
                status.images.len(),
                status.replicas.len(),
                size::format(status.node.stored_bytes)
            ),
        ),
        Err(_) => Finding::missing(what, "none answers", "start it: underlay serve"),
    }
}

fn ublk() -> Finding {
    match ublk_device::features() {
        Ok(features) if ublk_device::can_zero_copy(features) => {
            Finding::ok("ublk", format!("features {features:#x}: block devices without copying"))
        }
        Ok(features) => Finding::missing(
            "ublk",
            format!("features {features:#x}"),
            "block devices copy their data (Linux 6.16 need not)",
        ),
        Err(error) => Finding::missing(
            "ublk",
            error.to_string(),
            "no `underlay attach`; clients connect to the NBD socket",
        ),
    }
}

/// Whether the agent can run its probes here, as it says itself.
fn probes() -> Finding {
    let what = "probes";
    let follows = "latencies of disks are the service's own timing of its reads";
    let asked = agent::program().and_then(|program| {
        std::process::Command::new(program).args(["check", "--json"]).stdin(Stdio::null()).output()
    });
    let output = match asked {
        Ok(output) => output,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            return Finding::missing(what, "underlay-agent is not installed", follows);
        }
        Err(error) => return Finding::missing(what, format!("underlay-agent: {error}"), follows),
    };
    let said: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap_or_default();
    match (said["works"].as_bool(), said["problem"].as_str()) {
        (Some(true), _) => Finding::ok(what, "underlay-agent can load them"),
        (_, Some(problem)) => Finding::missing(what, problem, follows),
        (_, None) => Finding::missing(what, "underlay-agent does not say why", follows),
    }
}

fn tools() -> Vec<Finding> {
    let tools = [
        ("qemu-system-x86_64", "no virtual machine to boot from a replica here"),
        ("qemu-nbd", "no other server to compare with"),
        ("qemu-img", "no conversion and comparison of images; underlay needs none"),
        ("nbdinfo", "no look at exports from outside"),
        ("nbdcopy", "no copying to and from exports"),
        ("nbd-client", "no /dev/nbdN of an export"),
        ("mke2fs", "`underlay demo` makes an image without a file system"),
    ];
    tools
        .into_iter()
        .map(|(name, follows)| match tool(name) {
            Some(path) => Finding::ok(name, path.display().to_string()),
            None => Finding::missing(name, "not installed", follows),
        })
        .collect()
}

/// Where a program is: in PATH, or where administrators' tools are.
pub fn tool(name: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    let usual = ["/usr/sbin", "/sbin", "/usr/local/sbin"].map(PathBuf::from);
    env::split_paths(&path).chain(usual).map(|directory| directory.join(name)).find(|file| {
        let metadata = fs::metadata(file);
        metadata.is_ok_and(|it| it.is_file() && it.permissions().mode() & 0o111 != 0)
    })
}
