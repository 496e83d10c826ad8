//! Serving the daemon: what to watch comes from its socket, what was seen goes there, once a second.
//!
//! Invariants:
//! - The ring is emptied by the clock, however long the daemon takes: the socket has a thread of its
//!   own, and a report that it has no room for is not taken, so that the next covers both times.
//! - A daemon that is not there, or not yet, or not any more, is waited for, for ever.
//! - After an answer that failed the watch is asked for anew: a daemon that came back counts its
//!   generations from elsewhere.

use std::path::Path;
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::thread;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use std::os::fd::AsFd;

use crate::error::{Error, Result};
use crate::follow::Follower;
use crate::http::Daemon;
use crate::report::{REPORT_PATH, Report, WATCH_PATH, Watch};

/// How often the ring is emptied, in milliseconds.
const TICK: u16 = 100;
/// How often the daemon hears from us.
const SECOND: Duration = Duration::from_secs(1);
/// Longest pause between attempts to reach the daemon.
const LONGEST: Duration = Duration::from_secs(5);

/// SIGTERM, SIGINT and SIGHUP, taken in turn with the clock instead of at any moment.
pub struct Signals {
    fd: SignalFd,
    until: Until,
}

/// How long to serve, unless a signal comes first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Until {
    /// Whatever becomes of standard input.
    Signal,
    /// Until standard input is closed: whoever started the agent holds its other end, and is gone then.
    EndOfInput,
}

impl Signals {
    /// From here on they are ours; to be called before any thread is started.
    pub fn take(until: Until) -> Result<Signals> {
        let set: SigSet = [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP].into_iter().collect();
        let wrong = |error| Error::io("taking signals", error);
        set.thread_block().map_err(wrong)?;
        let fd = SignalFd::with_flags(&set, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK);
        Ok(Signals { fd: fd.map_err(wrong)?, until })
    }

    /// Waits for a tick; tells whether it is time to end.
    pub fn tick(&self) -> Result<Go> {
        let input = std::io::stdin();
        let mut fds = vec![PollFd::new(self.fd.as_fd(), PollFlags::POLLIN)];
        if self.until == Until::EndOfInput {
            fds.push(PollFd::new(input.as_fd(), PollFlags::POLLIN));
        }
        match poll(&mut fds, PollTimeout::from(TICK)) {
            Ok(0) | Err(nix::errno::Errno::EINTR) => Ok(Go::On),
            Ok(_) => Ok(Go::Home),
            Err(error) => Err(Error::io("waiting for signals", error)),
        }
    }
}

/// What a tick says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Go {
    /// There is more to do.
    On,
    /// A signal asks to end.
    Home,
}

/// Serves until a signal ends it.
pub fn run(mut follower: Follower, socket: &Path, signals: &Signals) -> Result<()> {
    let (reports, to_send) = sync_channel(1);
    let (changes, watches) = sync_channel(1);
    let daemon = Daemon::at(socket);
    // Ends with the process, or when this end of its channels goes.
    thread::spawn(move || talk(&daemon, &to_send, &changes));
    let mut last = Instant::now();
    loop {
        if signals.tick()? == Go::Home {
            return Ok(());
        }
        follower.drain();
        if let Ok(watch) = watches.try_recv() {
            follower.watch(&watch)?;
            // What was counted under the watch before is not this one's.
            follower.sample()?;
            last = Instant::now();
        }
        if last.elapsed() >= SECOND && follower.generation() > 0 {
            last += SECOND;
            offer(&mut follower, &reports)?;
        }
    }
}

/// Takes a report if there is somebody to have it.
fn offer(follower: &mut Follower, reports: &SyncSender<Option<Report>>) -> Result<()> {
    // A probe of the room first: what was taken out of the counters can't be put back.
    match reports.try_send(None) {
        Ok(()) => {}
        Err(TrySendError::Full(_) | TrySendError::Disconnected(_)) => return Ok(()),
    }
    let report = follower.sample()?;
    // The thread takes the probe at once unless it is busy; then this waits for its time-out at most.
    let _ = reports.send(Some(report));
    Ok(())
}

/// Talks to the daemon until the other end goes.
fn talk(daemon: &Daemon, reports: &Receiver<Option<Report>>, changes: &SyncSender<Watch>) {
    let mut known = None;
    let mut pause = SECOND;
    let mut said = String::new();
    loop {
        match exchange(daemon, &mut known, reports, changes) {
            Ok(Go::Home) => return,
            Ok(Go::On) => {
                if !said.is_empty() {
                    eprintln!("underlay-agent: the daemon answers");
                    said.clear();
                }
                pause = SECOND;
            }
            Err(error) => {
                known = None;
                let problem = error.to_string();
                // Once, not every second: the daemon may be away for days.
                if said != problem {
                    eprintln!("underlay-agent: {problem}; trying again");
                    said = problem;
                }
                thread::sleep(pause);
                pause = (pause * 2).min(LONGEST);
            }
        }
    }
}

/// One second's exchange.
fn exchange(
    daemon: &Daemon,
    known: &mut Option<u64>,
    reports: &Receiver<Option<Report>>,
    changes: &SyncSender<Watch>,
) -> Result<Go> {
    let target = match known {
        Some(generation) => format!("{WATCH_PATH}?generation={generation}"),
        None => WATCH_PATH.to_string(),
    };
    let answer = daemon.get(&target)?;
    match answer.status {
        204 | 304 => {}
        200 => {
            let watch: Watch = serde_json::from_slice(&answer.body).map_err(|error| {
                daemon.error(format!("what to watch is not understood: {error}"))
            })?;
            if *known != Some(watch.generation) {
                *known = Some(watch.generation);
                if changes.send(watch).is_err() {
                    return Ok(Go::Home);
                }
            }
        }
        status => return Err(daemon.error(format!("GET {WATCH_PATH}: status {status}"))),
    }
    let until = Instant::now() + SECOND;
    loop {
        let left = until.saturating_duration_since(Instant::now());
        match reports.recv_timeout(left) {
            Ok(None) => {}
            Ok(Some(report)) => {
                let json = serde_json::to_vec(&report)
                    .map_err(|error| daemon.error(format!("writing a report: {error}")))?;
                let answer = daemon.post(REPORT_PATH, &json)?;
                if !(200..300).contains(&answer.status) {
                    let status = answer.status;
                    return Err(daemon.error(format!("POST {REPORT_PATH}: status {status}")));
                }
                return Ok(Go::On);
            }
            Err(std::sync::mpsc::RecvTimeoutError::Timeout) => return Ok(Go::On),
            Err(std::sync::mpsc::RecvTimeoutError::Disconnected) => return Ok(Go::Home),
        }
    }
}
