//! Running other programs: every failure names the program, its arguments and what it said.
//!
//! Invariants:
//! - No program waits for ever: each has a limit, after which its whole process group is killed.
//! - Each program leads a process group of its own, and every live group is known to [`kill_all`]:
//!   an interrupted run leaves no process behind.
//! - Programs that run in the background ([`Process`]) are also recorded on disk, with their start
//!   time, so that the next run can end what a killed run left (see [`end_recorded`]).

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;

use crate::{place, report};

/// How long a program may take unless [`Tool::limit`] says otherwise.
const LIMIT: Duration = Duration::from_secs(120);
/// How much of a program's output an error repeats, in bytes.
const SAID: usize = 800;

/// For programs that take no arguments.
pub const NO_ARGS: [&str; 0] = [];

/// A program about to be run.
pub struct Tool {
    command: Command,
    limit: Duration,
    input: Option<Vec<u8>>,
}

/// How a program ended and what it said.
pub struct Outcome {
    /// Its exit code; 128 + signal if it was killed, as in a shell.
    pub code: i32,
    /// What it wrote to standard output.
    pub stdout: String,
    /// What it wrote to standard error.
    pub stderr: String,
    /// How long it ran.
    pub took: Duration,
}

/// The program `name` with its arguments.
pub fn tool<I>(name: impl AsRef<OsStr>, args: I) -> Tool
where
    I: IntoIterator,
    I::Item: AsRef<OsStr>,
{
    let mut command = Command::new(name);
    command.args(args).env("PATH", path()).env("LC_ALL", "C.UTF-8").stdin(Stdio::null());
    Tool { command, limit: LIMIT, input: None }
}

/// Where the program `name` is, if it is installed.
pub fn find(name: &str) -> Option<PathBuf> {
    path().split(':').map(|dir| Path::new(dir).join(name)).find(|file| file.is_file())
}

/// PATH, with the directories of system programs that an ordinary user's lacks.
fn path() -> String {
    let own = std::env::var("PATH").unwrap_or_else(|_| "/usr/local/bin:/usr/bin:/bin".into());
    format!("{own}:/usr/local/sbin:/usr/sbin:/sbin")
}

impl Tool {
    /// Adds arguments.
    pub fn args<I>(mut self, args: I) -> Tool
    where
        I: IntoIterator,
        I::Item: AsRef<OsStr>,
    {
        self.command.args(args);
        self
    }

    /// Runs it in `dir`.
    pub fn within(mut self, dir: &Path) -> Tool {
        self.command.current_dir(dir);
        self
    }

    /// Sets a variable of its environment.
    pub fn env(mut self, key: &str, value: impl AsRef<OsStr>) -> Tool {
        self.command.env(key, value);
        self
    }

    /// Gives it `input` on standard input.
    pub fn input(mut self, input: impl Into<Vec<u8>>) -> Tool {
        self.input = Some(input.into());
        self
    }

    /// Lets it run for so long and no longer.
    pub fn limit(mut self, limit: Duration) -> Tool {
        self.limit = limit;
        self
    }

    /// Runs it to its end, whatever that is.
    pub fn outcome(self) -> Result<Outcome> {
        let (line, limit) = (self.line(), self.limit);
        let outcome = self.outcome_within()?;
        outcome.with_context(|| format!("{line}: not done after {} s, killed", limit.as_secs()))
    }

    /// Runs it to its end; `None` if it was killed because its limit was over.
    pub fn outcome_within(mut self) -> Result<Option<Outcome>> {
        let start = Instant::now();
        if self.input.is_some() {
            self.command.stdin(Stdio::piped());
        }
        self.command.stdout(Stdio::piped()).stderr(Stdio::piped());
        let (mut child, watch) = self.spawn()?;
        if let (Some(mut pipe), Some(input)) = (child.stdin.take(), self.input.take()) {
            // A program may end without reading all of its input: that is its business.
            thread::spawn(move || pipe.write_all(&input));
        }
        let output = child.wait_with_output().with_context(|| self.line())?;
        if watch.over() {
            return Ok(None);
        }
        Ok(Some(Outcome {
            code: code(output.status),
            stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
            took: start.elapsed(),
        }))
    }

    /// Runs it; it must succeed. Returns its standard output.
    pub fn out(self) -> Result<String> {
        let line = self.line();
        let outcome = self.outcome()?;
        if outcome.code != 0 {
            bail!("{line}: exit code {}: {}", outcome.code, outcome.said());
        }
        Ok(outcome.stdout)
    }

    /// Runs it; it must succeed.
    pub fn run(self) -> Result<()> {
        self.out().map(drop)
    }

    /// Runs it with standard output in `file`; it must succeed.
    pub fn into_file(mut self, file: &Path) -> Result<()> {
        let out = File::create(file).with_context(|| format!("creating {}", file.display()))?;
        self.command.stdout(out).stderr(Stdio::piped());
        let (child, watch) = self.spawn()?;
        let output = child.wait_with_output().with_context(|| self.line())?;
        if watch.over() || !output.status.success() {
            let said = String::from_utf8_lossy(&output.stderr).into_owned();
            bail!("{}: exit code {}: {}", self.line(), code(output.status), tail(&said));
        }
        Ok(())
    }

    /// Runs it and shows each line of its output as it comes, to `see` as well.
    pub fn stream(mut self, mut see: impl FnMut(&str)) -> Result<ExitStatus> {
        self.command.stdout(Stdio::piped());
        let (mut child, watch) = self.spawn()?;
        if let Some(pipe) = child.stdout.take() {
            for line in BufReader::new(pipe).split(b'\n') {
                let line =
                    String::from_utf8_lossy(&line.with_context(|| self.line())?).into_owned();
                report::say(&line);
                see(&line);
            }
        }
        let status = child.wait().with_context(|| self.line())?;
        if watch.over() {
            bail!("{}: not done after {} s, killed", self.line(), self.limit.as_secs());
        }
        Ok(status)
    }

    /// Starts it in the background, its output in `log`. It is killed when the guard goes.
    pub fn background(mut self, log: &Path) -> Result<Process> {
        let out = File::options().create(true).append(true).open(log);
        let out = out.with_context(|| format!("opening {}", log.display()))?;
        self.command.stdout(out.try_clone()?).stderr(out);
        self.command.process_group(0);
        let child = self.command.spawn().with_context(|| self.line())?;
        let group = i32::try_from(child.id())?;
        groups(|all| all.insert(group));
        record(group)?;
        Ok(Process { child, group, line: self.line(), log: log.to_path_buf(), ended: None })
    }

    fn spawn(&mut self) -> Result<(Child, Watch)> {
        self.command.process_group(0);
        let child = self.command.spawn().with_context(|| format!("starting {}", self.line()))?;
        let group = i32::try_from(child.id())?;
        Ok((child, Watch::over_group(group, self.limit)))
    }

    fn line(&self) -> String {
        let mut line = self.command.get_program().to_string_lossy().into_owned();
        for arg in self.command.get_args() {
            line.push(' ');
            let arg = arg.to_string_lossy();
            // A script is known by its first line, a long name by its head.
            line.extend(arg.trim().lines().next().unwrap_or_default().chars().take(160));
        }
        line.chars().take(600).collect()
    }
}

/// Runs a program in place of this one, as far as the caller can tell: its output is ours, and so
/// is its failure.
pub fn hand_over(mut tool: Tool) -> Result<()> {
    let status = tool.command.status().with_context(|| tool.line())?;
    if !status.success() {
        bail!("{}: exit code {}", tool.line(), code(status));
    }
    Ok(())
}

impl Outcome {
    /// The end of what it said, on standard error if there was anything.
    pub fn said(&self) -> String {
        tail(if self.stderr.trim().is_empty() { &self.stdout } else { &self.stderr })
    }
}

/// A program that runs in the background; dropping the guard kills it and whatever it started.
pub struct Process {
    child: Child,
    group: i32,
    line: String,
    log: PathBuf,
    ended: Option<ExitStatus>,
}

impl Process {
    /// Its process id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Whether it still runs.
    pub fn alive(&mut self) -> bool {
        self.poll().is_none()
    }

    /// Kills it, as SIGKILL does, and waits until it is gone.
    pub fn kill(&mut self) -> Result<()> {
        if self.poll().is_none() {
            // ESRCH: it ended in the meantime.
            let _ = killpg(Pid::from_raw(self.group), Signal::SIGKILL);
            let status = self.child.wait().with_context(|| self.line.clone())?;
            self.gone(status);
        }
        Ok(())
    }

    /// Asks it to end, as SIGTERM does; fails if it has not after `limit`. Returns its exit code.
    pub fn terminate(&mut self, limit: Duration) -> Result<i32> {
        if self.poll().is_none() {
            let _ = killpg(Pid::from_raw(self.group), Signal::SIGTERM);
        }
        self.wait(limit).with_context(|| "after SIGTERM")
    }

    /// Waits for its end; fails if it has not come after `limit`. Returns its exit code.
    pub fn wait(&mut self, limit: Duration) -> Result<i32> {
        let start = Instant::now();
        loop {
            if let Some(status) = self.poll() {
                return Ok(code(status));
            }
            if start.elapsed() > limit {
                bail!("{}: still there after {} s; {}", self.line, limit.as_secs(), self.said());
            }
            thread::sleep(Duration::from_millis(5));
        }
    }

    /// Waits until `ready` says so; fails if the program ends before, or after `limit`.
    pub fn until(&mut self, limit: Duration, mut ready: impl FnMut() -> bool) -> Result<()> {
        let start = Instant::now();
        while !ready() {
            if let Some(status) = self.poll() {
                bail!("{}: ended with code {}: {}", self.line, code(status), self.said());
            }
            if start.elapsed() > limit {
                bail!("{}: not ready after {} s: {}", self.line, limit.as_secs(), self.said());
            }
            thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    }

    /// The end of its log.
    pub fn said(&self) -> String {
        tail(&String::from_utf8_lossy(&fs::read(&self.log).unwrap_or_default()))
    }

    fn poll(&mut self) -> Option<ExitStatus> {
        if self.ended.is_none()
            && let Ok(Some(status)) = self.child.try_wait()
        {
            self.gone(status);
        }
        self.ended
    }

    fn gone(&mut self, status: ExitStatus) {
        self.ended = Some(status);
        // Whatever it started and left behind goes with it.
        let _ = killpg(Pid::from_raw(self.group), Signal::SIGKILL);
        groups(|all| all.remove(&self.group));
        let _ = fs::remove_file(records().join(self.group.to_string()));
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.kill();
    }
}

/// Kills every program that is still running on behalf of this one.
pub fn kill_all() {
    groups(|all| {
        for group in all.iter() {
            let _ = killpg(Pid::from_raw(*group), Signal::SIGKILL);
        }
    });
}

/// Kills the background programs that an earlier, killed run left. A process is ours only if it
/// started at the recorded time: ids are used again.
pub fn end_recorded() -> Result<()> {
    let Ok(entries) = fs::read_dir(records()) else { return Ok(()) };
    for entry in entries {
        let file = entry?.path();
        let id = file.file_name().and_then(|name| name.to_str()?.parse::<i32>().ok());
        if let Some(id) = id
            && let Ok(recorded) = fs::read_to_string(&file)
            && start_time(id).is_some_and(|time| time == recorded)
        {
            report::say(&format!("ending process {id}, left by an earlier run"));
            let _ = killpg(Pid::from_raw(id), Signal::SIGKILL);
            thread::sleep(Duration::from_millis(200));
        }
        // Not there any more: its guard went at the same time.
        let _ = fs::remove_file(&file);
    }
    Ok(())
}

fn records() -> PathBuf {
    place::run().join("processes")
}

fn record(id: i32) -> Result<()> {
    let dir = records();
    fs::create_dir_all(&dir).with_context(|| format!("creating {}", dir.display()))?;
    let time = start_time(id).unwrap_or_default();
    fs::write(dir.join(id.to_string()), time).with_context(|| format!("recording process {id}"))
}

/// When the process started, in the kernel's own words: field 22 of its stat.
fn start_time(id: i32) -> Option<String> {
    let stat = fs::read_to_string(format!("/proc/{id}/stat")).ok()?;
    let (_, rest) = stat.rsplit_once(')')?;
    rest.split_whitespace().nth(19).map(String::from)
}

/// Kills a group that outstays its limit.
struct Watch {
    done: Sender<()>,
    thread: thread::JoinHandle<bool>,
    group: i32,
}

impl Watch {
    fn over_group(group: i32, limit: Duration) -> Watch {
        groups(|all| all.insert(group));
        let (done, waiting) = mpsc::channel();
        let thread = thread::spawn(move || {
            let expired = waiting.recv_timeout(limit) == Err(RecvTimeoutError::Timeout);
            if expired {
                let _ = killpg(Pid::from_raw(group), Signal::SIGKILL);
            }
            expired
        });
        Watch { done, thread, group }
    }

    /// Ends the watch; tells whether the limit had passed.
    fn over(self) -> bool {
        groups(|all| all.remove(&self.group));
        let _ = self.done.send(());
        self.thread.join().unwrap_or(false)
    }
}

fn groups<T>(with: impl FnOnce(&mut BTreeSet<i32>) -> T) -> T {
    static GROUPS: Mutex<BTreeSet<i32>> = Mutex::new(BTreeSet::new());
    with(&mut GROUPS.lock().unwrap_or_else(PoisonError::into_inner))
}

fn code(status: ExitStatus) -> i32 {
    status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0))
}

/// The end of what a program said, on one line.
fn tail(text: &str) -> String {
    let lines: Vec<_> = text.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    let text = lines.join(" | ");
    let from = text.len().saturating_sub(SAID);
    let from = (from..text.len()).find(|at| text.is_char_boundary(*at)).unwrap_or(0);
    if text.is_empty() { "it said nothing".into() } else { text[from..].to_string() }
}

/// What `text` holds as JSON.
pub fn json(text: &str) -> Result<serde_json::Value> {
    serde_json::from_str(text).map_err(|error| anyhow!("not JSON ({error}): {}", tail(text)))
}
