//! The agent is killed, missing, without privileges, or on a kernel without BTF: the service runs, and
//! says so in status and log.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

use crate::daemon::Daemon;
use crate::lab::{Fs, Lab, LoopDisk};
use crate::nbd::Client;
use crate::pattern;
use crate::place::Profile;
use crate::report::Report;
use crate::subject::text;

/// How long a change of the signal may take.
const PATIENCE: Duration = Duration::from_secs(30);
/// The image's size, in bytes.
const SIZE: u64 = 8 << 20;

/// Runs the checks. `works`: the agent can run here.
pub fn run(lab: &Lab, works: bool, report: &mut Report) {
    if works {
        report.check("promotion: the agent is killed, and comes back", || killed(lab));
        report.check("promotion: an agent without privileges", || {
            let drop = "setpriv --bounding-set=-bpf,-perfmon,-sys_admin";
            without(lab, "unprivileged", &format!("exec {drop} \"$UNDERLAY\" \"$@\""), "CAP_BPF")
        });
        report.check("promotion: an agent on a kernel without BTF", || {
            let script = "exec unshare -m sh -c 'mount -t tmpfs none /sys/kernel/btf; exec \
                 \"$UNDERLAY\" \"$@\"' sh \"$@\"";
            without(lab, "no-btf", script, "BTF")
        });
    }
    report.check("promotion: no agent", || {
        let script = "cp \"$UNDERLAY\" \"$0.alone\"; exec \"$0.alone\" \"$@\"";
        without(lab, "no-agent", script, "not installed")
    });
}

/// A daemon with an image on a loop disk.
struct Node {
    daemon: Daemon,
    content: Vec<u8>,
    _disk: LoopDisk,
}

impl Node {
    /// Started by `program`.
    fn new(lab: &Lab, name: &str, program: &Path) -> Result<Node> {
        let name = format!("agent-{name}");
        let dir = program.parent().unwrap_or(Path::new("/"));
        let raw = dir.join("base.raw");
        pattern::noise(&raw, SIZE, 3)?;
        let disk = LoopDisk::new(dir, "a", 64 << 20, Fs::Ext4)?;
        let daemon = Daemon::start_by(program.to_owned(), lab, dir, &name, "")?;
        daemon.ok(&["disk", "add", text(&disk.path)?, "--name=a"])?;
        daemon.ok(&["image", "import", text(&raw)?, "--name=base"])?;
        Ok(Node { daemon, content: fs::read(&raw)?, _disk: disk })
    }

    /// Where latencies are from, once `right` is content with it; reads go on meanwhile.
    fn until(&self, right: impl Fn(&Value) -> bool) -> Result<Value> {
        let started = Instant::now();
        loop {
            let signal = self.daemon.json(&["status"])?["signal"].clone();
            let read = Client::open(self.daemon.nbd(), "image/base")?.read_all(SIZE)?;
            ensure!(read == self.content, "the image is not what it was");
            if right(&signal) {
                return Ok(signal);
            }
            if started.elapsed() > PATIENCE {
                bail!("the signal is {signal} after {PATIENCE:?}");
            }
            thread::sleep(Duration::from_millis(200));
        }
    }
}

fn killed(lab: &Lab) -> Result<String> {
    let program = lab.dir("agent-killed")?.join("underlay");
    // With its agent beside it.
    for (name, from) in [("underlay", "underlay"), ("underlay-agent", "underlay-agent")] {
        let from = Profile::Debug.underlay().with_file_name(from);
        fs::copy(from, program.with_file_name(name))?;
    }
    let mut node = Node::new(lab, "killed", &program)?;
    let agent = |signal: &Value| signal["agent"].as_i64().and_then(|pid| i32::try_from(pid).ok());
    let mut last = 0;
    for _ in 0..3 {
        let signal = node.until(|it| agent(it).is_some_and(|pid| pid != last))?;
        last = agent(&signal).unwrap_or_default();
        kill(Pid::from_raw(last), Signal::SIGKILL)?;
        let signal = node.until(|it| it["source"] == "timing")?;
        ensure!(signal["reason"].as_str().is_some_and(|it| it.contains("ended")), "{signal}");
    }
    // A daemon that is killed leaves no agent behind.
    let signal = node.until(|it| agent(it).is_some())?;
    let last = agent(&signal).unwrap_or_default();
    node.daemon.kill()?;
    let started = Instant::now();
    while kill(Pid::from_raw(last), None).is_ok() {
        ensure!(started.elapsed() < PATIENCE, "the agent outlives its daemon");
        thread::sleep(Duration::from_millis(50));
    }
    node.daemon.restart()?;
    node.until(|it| agent(it).is_some())?;
    node.daemon.healthy()?;
    node.daemon.stop()?;
    Ok(String::new())
}

/// A daemon that a script starts, and whose agent can't work because of what `reason` tells.
fn without(lab: &Lab, name: &str, script: &str, reason: &str) -> Result<String> {
    let program = lab.dir(&format!("agent-{name}"))?.join("start");
    let own = Profile::Debug.underlay();
    // Commands are given by the same program: only `serve` is started in another way.
    let script = format!(
        "#!/bin/sh\nexport UNDERLAY='{}'\ncase \"$*\" in serve*) {script};; *) exec \"$UNDERLAY\" \
         \"$@\";; esac\n",
        own.display()
    );
    fs::write(&program, script)?;
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755))?;
    let mut node = Node::new(lab, name, &program)?;
    let told = |signal: &Value| signal["reason"].as_str().is_some_and(|it| it.contains(reason));
    let signal = node.until(|it| it["source"] == "timing" && told(it))?;
    ensure!(node.daemon.log_text().contains(reason), "the log says nothing of {reason}");
    node.daemon.healthy()?;
    node.daemon.stop()?;
    Ok(signal["reason"].as_str().unwrap_or_default().to_owned())
}
