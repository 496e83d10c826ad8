//! What a guest tells its host: one JSON object a line, through a virtio port of its own, so that the
//! kernel's messages on the console don't mix with it.
//!
//! The guest's write returns when the host has the line. Nobody trusts the last line of a guest that
//! was killed: only lines with their end are read.

use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow};
use serde_json::{Value, json};

use crate::tool;

/// The name of the port.
pub const PORT: &str = "underlay.results";

/// What a guest tells.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// The driver runs; so long after the kernel's start, in seconds.
    Up(f64),
    /// This test begins.
    Begin(String),
    /// A check came out.
    Check {
        /// The test and the check.
        name: String,
        /// ok, failed or skipped.
        state: State,
        /// Figures, or what went wrong.
        detail: String,
        /// How long it took.
        seconds: f64,
    },
    /// The test wants this kept outside of the guest; see `Guest::tell`.
    Ledger(String),
    /// Something was measured; see `Guest::figure`.
    Figure(Value),
    /// The power may be cut.
    Ready,
    /// A test has failed: nothing else runs in this guest, and it switches itself off.
    Spoilt,
    /// The test is over.
    End(String),
    /// So are all.
    Done,
}

/// How a check came out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// As it must be.
    Ok,
    /// Not as it must be.
    Failed,
    /// This guest can't tell.
    Skipped,
}

impl Event {
    fn line(&self) -> String {
        let value = match self {
            Event::Up(seconds) => json!({"up": seconds}),
            Event::Begin(test) => json!({"begin": test}),
            Event::Check { name, state, detail, seconds } => {
                let state = match state {
                    State::Ok => "ok",
                    State::Failed => "failed",
                    State::Skipped => "skipped",
                };
                json!({"name": name, "state": state, "detail": detail, "seconds": seconds})
            }
            Event::Ledger(line) => json!({"ledger": line}),
            Event::Figure(value) => json!({"figure": value}),
            Event::Ready => json!({"ready": true}),
            Event::Spoilt => json!({"spoilt": true}),
            Event::End(test) => json!({"end": test}),
            Event::Done => json!({"done": true}),
        };
        format!("{value}\n")
    }

    fn parse(line: &str) -> Result<Event> {
        let value = tool::json(line)?;
        let text = |key: &str| value[key].as_str().map(String::from);
        let foreign = || anyhow!("the guest told something unknown: {line}");
        if let Some(name) = text("name") {
            let state = match value["state"].as_str() {
                Some("ok") => State::Ok,
                Some("failed") => State::Failed,
                Some("skipped") => State::Skipped,
                _ => return Err(foreign()),
            };
            let seconds = value["seconds"].as_f64().unwrap_or(0.0);
            return Ok(Event::Check {
                name,
                state,
                detail: text("detail").unwrap_or_default(),
                seconds,
            });
        }
        let single = value.as_object().and_then(|object| object.iter().next());
        let (key, value) = single.ok_or_else(foreign)?;
        let word = || value.as_str().map(String::from).ok_or_else(foreign);
        match (key.as_str(), value) {
            ("up", value) => Ok(Event::Up(value.as_f64().ok_or_else(foreign)?)),
            ("begin", _) => Ok(Event::Begin(word()?)),
            ("ledger", _) => Ok(Event::Ledger(word()?)),
            ("figure", value) => Ok(Event::Figure(value.clone())),
            ("end", _) => Ok(Event::End(word()?)),
            ("ready", Value::Bool(true)) => Ok(Event::Ready),
            ("spoilt", Value::Bool(true)) => Ok(Event::Spoilt),
            ("done", Value::Bool(true)) => Ok(Event::Done),
            _ => Err(foreign()),
        }
    }
}

/// The guest's end.
pub struct Speaker {
    port: File,
}

impl Speaker {
    /// Finds the port among those of the machine.
    pub fn open() -> Result<Speaker> {
        let ports = "/sys/class/virtio-ports";
        for entry in fs::read_dir(ports).with_context(|| format!("reading {ports}"))?.flatten() {
            let name = fs::read_to_string(entry.path().join("name")).unwrap_or_default();
            if name.trim() == PORT {
                let path = Path::new("/dev").join(entry.file_name());
                let port = File::options().write(true).open(&path);
                let port = port.with_context(|| format!("opening {}", path.display()))?;
                return Ok(Speaker { port });
            }
        }
        Err(anyhow!("this machine has no port {PORT}: it is no guest of cargo xtask vm"))
    }

    /// Tells the host; it knows when this returns.
    pub fn say(&mut self, event: &Event) -> Result<()> {
        self.port.write_all(event.line().as_bytes()).context("telling the host")
    }
}

/// The host's end: the file into which the emulator writes what comes.
pub struct Listener {
    path: PathBuf,
    read: u64,
    partial: Vec<u8>,
}

impl Listener {
    /// Listens to what is written to `path`, from its beginning.
    pub fn new(path: &Path) -> Listener {
        Listener { path: path.to_path_buf(), read: 0, partial: Vec::new() }
    }

    /// The events that came since the last call.
    pub fn events(&mut self) -> Result<Vec<Event>> {
        // The emulator makes the file when it starts.
        let Ok(mut file) = File::open(&self.path) else { return Ok(Vec::new()) };
        file.seek(SeekFrom::Start(self.read))?;
        let count = file.read_to_end(&mut self.partial).context("reading the guest's results")?;
        self.read += count as u64;
        let Some(end) = self.partial.iter().rposition(|byte| *byte == b'\n') else {
            return Ok(Vec::new());
        };
        let rest = self.partial.split_off(end + 1);
        let whole = std::mem::replace(&mut self.partial, rest);
        let whole = String::from_utf8_lossy(&whole).into_owned();
        whole.lines().map(Event::parse).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_event_comes_through_and_a_broken_line_waits() {
        let check = Event::Check {
            name: "smoke: \"x\"".into(),
            state: State::Skipped,
            detail: "a\nb".into(),
            seconds: 1.5,
        };
        let events = [
            Event::Up(5.25),
            Event::Begin("smoke".into()),
            check,
            Event::Ledger("w 1 2 3".into()),
            Event::Figure(json!({"name": "x", "per_second": 0.5})),
            Event::Ready,
            Event::Spoilt,
            Event::End("smoke".into()),
            Event::Done,
        ];
        let file = std::env::temp_dir().join(format!("underlay-wire-{}", std::process::id()));
        let mut listener = Listener::new(&file);
        assert!(listener.events().unwrap().is_empty(), "no file yet");
        let all: String = events.iter().map(Event::line).collect();
        let (head, tail) = all.split_at(all.len() - 4);
        fs::write(&file, head).unwrap();
        assert_eq!(listener.events().unwrap(), events[..8]);
        File::options().append(true).open(&file).unwrap().write_all(tail.as_bytes()).unwrap();
        assert_eq!(listener.events().unwrap(), events[8..]);
        fs::write(&file, format!("{all}nonsense\n")).unwrap();
        assert!(listener.events().is_err());
        fs::remove_file(&file).unwrap();
    }
}
