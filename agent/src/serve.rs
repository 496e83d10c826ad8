//! Serving the daemon: what to watch comes from its socket, what was seen goes there, once a second.
//!
//! Invariants:
//! - The ring is emptied by the clock, however long the daemon takes: the socket has a thread of its
//!   own, and a report that it has no room for is not taken, so that the next covers both times.
//! - A daemon that is not there, or not yet, or not any more, is waited for, for ever.
//! - After an answer that failed the watch is asked for anew, and nothing counted under an earlier one is
//!   sent any more: a daemon that came back counts its generations from elsewhere.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
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
    let (outlet, inlet) = way();
    let (changes, watches) = sync_channel(1);
    let daemon = Daemon::at(socket);
    // Ends with the process, or when this end of its channels goes.
    thread::spawn(move || talk(&daemon, &inlet, &changes));
    let (mut last, mut epoch) = (Instant::now(), 0);
    loop {
        if signals.tick()? == Go::Home {
            return Ok(());
        }
        follower.drain();
        if let Ok(watch) = watches.try_recv() {
            follower.watch(&watch)?;
            epoch += 1;
            // What was counted under the watch before is not this one's.
            follower.sample()?;
            last = Instant::now();
        }
        if last.elapsed() >= SECOND && follower.generation() > 0 {
            last = Instant::now();
            outlet.offer(&mut follower, epoch)?;
        }
    }
}

/// A report and the number of the watch, of all that came, under which it was taken.
type Parcel = (u64, Report);

/// Where reports go: to a thread that says when it waits for one, because what was taken out of the
/// counters can't be put back.
struct Outlet {
    reports: SyncSender<Parcel>,
    wanted: Arc<AtomicBool>,
}

/// Where they come out.
struct Inlet {
    reports: Receiver<Parcel>,
    wanted: Arc<AtomicBool>,
}

/// Reports that were wanted and came too late wait here: one a wait, and each wait takes one.
const LATE: usize = 4;

fn way() -> (Outlet, Inlet) {
    let (give, take) = sync_channel(LATE);
    let wanted = Arc::new(AtomicBool::new(false));
    (Outlet { reports: give, wanted: wanted.clone() }, Inlet { reports: take, wanted })
}

impl Outlet {
    /// Takes a report if there is somebody to have it.
    fn offer(&self, follower: &mut Follower, epoch: u64) -> Result<()> {
        if self.wanted.swap(false, Ordering::AcqRel) {
            // Never full; and a thread that ended takes nothing more, which ends nothing here.
            let _ = self.reports.try_send((epoch, follower.sample()?));
        }
        Ok(())
    }
}

impl Inlet {
    fn wait(&self, limit: Duration) -> Result<Parcel, RecvTimeoutError> {
        self.wanted.store(true, Ordering::Release);
        let got = self.reports.recv_timeout(limit);
        self.wanted.store(false, Ordering::Release);
        got
    }
}

/// Talks to the daemon until the other end goes.
fn talk(daemon: &Daemon, reports: &Inlet, changes: &SyncSender<Watch>) {
    let mut known = Known::default();
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
                known.generation = None;
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

/// What the daemon said last.
#[derive(Default)]
struct Known {
    generation: Option<u64>,
    /// How many watches came so far.
    epoch: u64,
}

/// One second's exchange.
fn exchange(
    daemon: &Daemon,
    known: &mut Known,
    reports: &Inlet,
    changes: &SyncSender<Watch>,
) -> Result<Go> {
    let target = match known.generation {
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
            if known.generation != Some(watch.generation) {
                known.generation = Some(watch.generation);
                known.epoch += 1;
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
        match reports.wait(left) {
            // Taken before the last change reached the probes.
            Ok((epoch, _)) if epoch != known.epoch => {}
            Ok((_, report)) => {
                let json = serde_json::to_vec(&report)
                    .map_err(|error| daemon.error(format!("writing a report: {error}")))?;
                let answer = daemon.post(REPORT_PATH, &json)?;
                if !(200..300).contains(&answer.status) {
                    let status = answer.status;
                    return Err(daemon.error(format!("POST {REPORT_PATH}: status {status}")));
                }
                return Ok(Go::On);
            }
            Err(RecvTimeoutError::Timeout) => return Ok(Go::On),
            Err(RecvTimeoutError::Disconnected) => return Ok(Go::Home),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::os::unix::net::UnixListener;

    /// Answers one connection; returns the request's first line and body.
    fn serve(listener: &UnixListener, answer: &str) -> (String, Vec<u8>) {
        let (mut stream, _) = listener.accept().unwrap();
        let (mut text, mut piece) = (Vec::new(), [0; 4096]);
        loop {
            let count = stream.read(&mut piece).unwrap();
            text.extend_from_slice(&piece[..count]);
            let Some(end) = text.windows(4).position(|four| four == b"\r\n\r\n") else { continue };
            let head = String::from_utf8_lossy(&text[..end]).into_owned();
            let length = head.lines().find_map(|line| line.strip_prefix("Content-Length: "));
            let length: usize = length.unwrap().parse().unwrap();
            if text.len() >= end + 4 + length {
                stream.write_all(answer.as_bytes()).unwrap();
                let first = head.lines().next().unwrap().to_string();
                return (first, text[end + 4..].to_vec());
            }
        }
    }

    #[test]
    fn a_daemon_is_asked_told_and_asked_anew_after_it_failed() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("s");
        let daemon = Daemon::at(&socket);
        let (Outlet { reports, .. }, to_send) = way();
        let (changes, watches) = sync_channel(1);
        // Nobody there yet: it is waited for.
        let mut known = Known::default();
        assert!(exchange(&daemon, &mut known, &to_send, &changes).is_err());
        let listener = UnixListener::bind(&socket).unwrap();
        let talk = thread::spawn(move || talk(&daemon, &to_send, &changes));

        let json = r#"{"generation":5,"tgids":[7],"disks":[]}"#;
        let ok = format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{json}", json.len());
        let none = "HTTP/1.1 204 No Content\r\n\r\n";
        assert_eq!(serve(&listener, &ok).0, "GET /v1/probes/watch HTTP/1.1");
        let watch = watches.recv().unwrap();
        assert_eq!((watch.generation, watch.tgids), (5, vec![7]));
        reports.send((0, Report::default())).unwrap();
        reports.send((1, Report { generation: 5, ..Report::default() })).unwrap();
        let (first, body) = serve(&listener, none);
        assert_eq!(first, "POST /v1/probes/report HTTP/1.1");
        assert_eq!(serde_json::from_slice::<Report>(&body).unwrap().generation, 5);
        assert_eq!(serve(&listener, none).0, "GET /v1/probes/watch?generation=5 HTTP/1.1");
        reports.send((1, Report::default())).unwrap();
        serve(&listener, "HTTP/1.1 500 Oops\r\ncontent-length: 0\r\n\r\n");
        // What it knew of this daemon is void.
        assert_eq!(serve(&listener, &ok).0, "GET /v1/probes/watch HTTP/1.1");
        assert_eq!(watches.recv().unwrap().generation, 5);
        drop(reports);
        talk.join().unwrap();
    }
}
