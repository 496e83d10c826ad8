//! The daemon under test: started, asked over its command line, killed, restarted.
//!
//! Everything goes through the program as a user has it; no part of the library is linked in.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::lab::Lab;
use crate::place::Profile;
use crate::tool::{Outcome, Process, Tool, json, tool};

/// How long a start may take: recovery is < 100 ms per 100 GiB, the machine may be busy.
const START: Duration = Duration::from_secs(20);
/// How long draining and closing may take.
const STOP: Duration = Duration::from_secs(30);
/// How long one command may take.
const COMMAND: Duration = Duration::from_secs(300);

/// The command line of a daemon, whoever holds the daemon itself.
#[derive(Clone, Debug)]
pub struct Control {
    program: PathBuf,
    socket: PathBuf,
}

impl Control {
    /// A command that was not run yet.
    pub fn command(&self, args: &[&str]) -> Tool {
        tool(&self.program, args).env("UNDERLAY_SOCKET", &self.socket).limit(COMMAND)
    }

    /// Runs a command; it must succeed.
    pub fn ok(&self, args: &[&str]) -> Result<Outcome> {
        let outcome = self.command(args).outcome()?;
        if outcome.code != 0 {
            bail!("underlay {}: exit code {}: {}", args.join(" "), outcome.code, outcome.said());
        }
        Ok(outcome)
    }

    /// Runs a command with `--json`; returns the last line that it printed, which is its result
    /// (those before tell of progress).
    pub fn json(&self, args: &[&str]) -> Result<Value> {
        let mut all = args.to_vec();
        all.push("--json");
        last_json(&self.ok(&all)?.stdout)
    }
}

/// The last line of what a command printed, which is its result, as JSON.
pub fn last_json(text: &str) -> Result<Value> {
    json(text).or_else(|_| json(text.trim().lines().last().unwrap_or_default()))
}

/// A daemon with its state in a directory of its own.
pub struct Daemon {
    control: Control,
    config: PathBuf,
    state: PathBuf,
    nbd: PathBuf,
    log: PathBuf,
    process: Option<Process>,
}

impl Daemon {
    /// Starts a daemon called `name`, with its state and log in `dir`, and nothing but `settings`
    /// (lines of TOML) in its configuration: the machine's own is not read.
    pub fn start(
        lab: &Lab,
        dir: &Path,
        name: &str,
        profile: Profile,
        settings: &str,
    ) -> Result<Daemon> {
        Daemon::start_by(profile.underlay(), lab, dir, name, settings)
    }

    /// Starts a daemon by another program, which is given the arguments of `underlay`.
    pub fn start_by(
        program: PathBuf,
        lab: &Lab,
        dir: &Path,
        name: &str,
        settings: &str,
    ) -> Result<Daemon> {
        if !program.exists() {
            bail!("{} is not built", program.display());
        }
        let config = dir.join(format!("{name}.toml"));
        fs::write(&config, settings)?;
        let socket = lab.socket(&format!("{name}.control"));
        let mut daemon = Daemon {
            control: Control { program, socket },
            config,
            state: dir.join(format!("{name}.state")),
            nbd: lab.socket(&format!("{name}.nbd")),
            log: dir.join(format!("{name}.log")),
            process: None,
        };
        daemon.restart()?;
        Ok(daemon)
    }

    /// Another daemon on the same state, as one would start by mistake; it is not expected to live.
    pub fn twin(&self, lab: &Lab, name: &str) -> Result<Outcome> {
        let control = lab.socket(&format!("{name}.control"));
        let nbd = lab.socket(&format!("{name}.nbd"));
        self.serve(&self.state, &control, &nbd).limit(START).outcome()
    }

    /// Starts it again after [`Daemon::kill`] or [`Daemon::stop`].
    pub fn restart(&mut self) -> Result<()> {
        let mut process =
            self.serve(&self.state, &self.control.socket, &self.nbd).background(&self.log)?;
        let (control, nbd) = (&self.control.socket, &self.nbd);
        process.until(START, || {
            UnixStream::connect(control).is_ok() && UnixStream::connect(nbd).is_ok()
        })?;
        self.process = Some(process);
        Ok(())
    }

    fn serve(&self, state: &Path, control: &Path, nbd: &Path) -> Tool {
        tool(&self.control.program, ["serve"])
            .args(["--config".as_ref(), self.config.as_os_str()])
            .args(["--state".as_ref(), state.as_os_str()])
            .args(["--socket".as_ref(), control.as_os_str()])
            .args(["--nbd-socket".as_ref(), nbd.as_os_str()])
            .env("RUST_BACKTRACE", "1")
    }

    /// Kills it as SIGKILL does.
    pub fn kill(&mut self) -> Result<()> {
        self.process.as_mut().map_or(Ok(()), Process::kill)
    }

    /// Ends it as SIGTERM does; it must drain, close and leave with code 0.
    pub fn stop(&mut self) -> Result<()> {
        let Some(process) = &mut self.process else { return Ok(()) };
        let code = process.terminate(STOP)?;
        if code != 0 {
            bail!("the daemon ended with code {code} after SIGTERM: {}", process.said());
        }
        Ok(())
    }

    /// Fails if it is not alive, or ever panicked.
    pub fn healthy(&mut self) -> Result<()> {
        let log = self.log_text();
        if let Some(line) = log.lines().find(|line| line.contains("panicked at")) {
            bail!("the daemon panicked: {line}");
        }
        let process = self.process.as_mut().context("the daemon was never started")?;
        if !process.alive() {
            bail!("the daemon is gone: {}", process.said());
        }
        Ok(())
    }

    /// All that it logged.
    pub fn log_text(&self) -> String {
        String::from_utf8_lossy(&fs::read(&self.log).unwrap_or_default()).into_owned()
    }

    /// Its process id.
    pub fn id(&self) -> Result<u32> {
        self.process.as_ref().map(Process::id).context("the daemon was never started")
    }

    /// The memory that it holds (resident, anonymous), in bytes.
    pub fn memory(&self) -> Result<u64> {
        let path = format!("/proc/{}/status", self.id()?);
        let status = fs::read_to_string(&path).with_context(|| format!("reading {path}"))?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
        let kib = line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok());
        kib.map(|kib| kib * 1024).with_context(|| format!("{path} has no VmRSS"))
    }

    /// The socket that serves NBD.
    pub fn nbd(&self) -> &Path {
        &self.nbd
    }

    /// The address of an export, as NBD clients take it.
    pub fn uri(&self, export: &str) -> String {
        format!("nbd+unix:///{export}?socket={}", self.nbd.display())
    }

    /// Its command line.
    pub fn control(&self) -> &Control {
        &self.control
    }

    /// From its next start on it has these settings.
    pub fn configure(&self, settings: &str) -> Result<()> {
        Ok(fs::write(&self.config, settings)?)
    }

    /// Runs a command of the command line to its end.
    pub fn ask(&self, args: &[&str]) -> Result<Outcome> {
        self.control.command(args).outcome()
    }

    /// Runs a command; it must succeed.
    pub fn ok(&self, args: &[&str]) -> Result<Outcome> {
        self.control.ok(args)
    }

    /// Runs a command with `--json`; returns its result.
    pub fn json(&self, args: &[&str]) -> Result<Value> {
        self.control.json(args)
    }

    /// The sum of a metric's samples, as the control socket has them.
    pub fn metric(&self, name: &str) -> Result<f64> {
        let mut stream = UnixStream::connect(&self.control.socket).context("the control socket")?;
        stream.set_read_timeout(Some(START))?;
        write!(stream, "GET /metrics HTTP/1.1\r\nHost: underlay\r\nConnection: close\r\n\r\n")?;
        let mut page = String::new();
        stream.read_to_string(&mut page)?;
        let samples = page.lines().filter(|line| {
            line.strip_prefix(name).is_some_and(|rest| rest.starts_with(['{', ' ']))
        });
        let value =
            |line: &str| line.rsplit(' ').next().and_then(|value| value.parse::<f64>().ok());
        Ok(samples.filter_map(value).sum())
    }

    /// Runs a command that must be refused: exit code 1 or 2, an error that names each of `names`,
    /// no panic, and the daemon is as well as before.
    pub fn refused(&mut self, args: &[&str], names: &[&str]) -> Result<String> {
        let outcome = self.ask(args)?;
        let short: String = args.join(" ").chars().take(120).collect();
        if !matches!(outcome.code, 1 | 2) {
            bail!("underlay {short}: exit code {}, should be refused", outcome.code);
        }
        let said = outcome.stderr.trim();
        if said.is_empty() || said.contains("panicked at") {
            bail!("underlay {short}: a refusal must say why: {said:?}");
        }
        if let Some(name) = names.iter().find(|name| !said.contains(**name)) {
            bail!("underlay {short}: the error does not name {name:?}: {said}");
        }
        self.healthy()?;
        Ok(said.to_string())
    }
}
