//! As much of an HTTP client as talking to the daemon needs: one request a connection, JSON, bounded.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::error::{Error, Result};

/// How long the daemon may take to answer.
const PATIENCE: Duration = Duration::from_secs(5);
/// Longest head of an answer, in bytes.
const HEAD: usize = 16 << 10;
/// Longest body of an answer, in bytes: the extents of some million pieces.
const BODY: u64 = 256 << 20;

/// A daemon behind a Unix socket.
#[derive(Clone, Debug)]
pub struct Daemon {
    socket: PathBuf,
}

/// What it answered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// The HTTP status.
    pub status: u16,
    /// The body.
    pub body: Vec<u8>,
}

impl Daemon {
    /// The daemon that listens at `socket`.
    pub fn at(socket: &Path) -> Daemon {
        Daemon { socket: socket.to_path_buf() }
    }

    /// Asks for `target`.
    pub fn get(&self, target: &str) -> Result<Answer> {
        self.ask("GET", target, &[])
    }

    /// Sends JSON to `target`.
    pub fn post(&self, target: &str, json: &[u8]) -> Result<Answer> {
        self.ask("POST", target, json)
    }

    /// An error that names the daemon's socket.
    pub fn error(&self, problem: impl Into<String>) -> Error {
        Error::Daemon { path: self.socket.clone(), problem: problem.into() }
    }

    fn ask(&self, method: &str, target: &str, body: &[u8]) -> Result<Answer> {
        let failed = |what: &str, error: io::Error| self.error(format!("{what}: {error}"));
        let mut stream = UnixStream::connect(&self.socket).map_err(|error| {
            failed("no daemon answers here; is `underlay serve` running?", error)
        })?;
        let limits =
            [stream.set_read_timeout(Some(PATIENCE)), stream.set_write_timeout(Some(PATIENCE))];
        limits
            .into_iter()
            .collect::<io::Result<()>>()
            .map_err(|error| failed("time-outs", error))?;
        let head = format!(
            "{method} {target} HTTP/1.1\r\nHost: underlay\r\nConnection: close\r\nAccept: application/json\r\n\
             Content-Type: application/json\r\nContent-Length: {}\r\n\r\n",
            body.len()
        );
        let sent = stream.write_all(head.as_bytes()).and_then(|()| stream.write_all(body));
        sent.map_err(|error| failed("sending", error))?;
        answer(&mut stream).map_err(|error| failed("reading the answer", error))
    }
}

/// Reads one answer.
fn answer(stream: &mut impl Read) -> io::Result<Answer> {
    let wrong = |what: &str| io::Error::new(io::ErrorKind::InvalidData, what.to_string());
    let mut text = Vec::new();
    let end = loop {
        if let Some(at) = text.windows(4).position(|four| four == b"\r\n\r\n") {
            break at;
        }
        if text.len() >= HEAD {
            return Err(wrong("its head is too long"));
        }
        let mut piece = [0; 4096];
        match stream.read(&mut piece)? {
            0 => return Err(wrong("it ended within its head")),
            count => text.extend_from_slice(&piece[..count]),
        }
    };
    let mut body = text.split_off(end + 4);
    let head = String::from_utf8_lossy(&text);
    let mut lines = head.split("\r\n");
    let status = lines.next().unwrap_or_default();
    let status = status.strip_prefix("HTTP/1.").and_then(|rest| rest.get(2..5)?.parse().ok());
    let status = status.ok_or_else(|| wrong("not HTTP"))?;
    let mut length = None;
    for (name, value) in lines.filter_map(|line| line.split_once(':')) {
        if name.eq_ignore_ascii_case("content-length") {
            let value: Option<u64> = value.trim().parse().ok();
            length = Some(value.ok_or_else(|| wrong("its length is not a number"))?);
        }
        if name.eq_ignore_ascii_case("transfer-encoding") {
            return Err(wrong("it comes in a transfer encoding"));
        }
    }
    if matches!(status, 204 | 304) {
        return Ok(Answer { status, body: Vec::new() });
    }
    // Without a length, what comes until the connection closes.
    let limit = length.unwrap_or(BODY + 1);
    if length.is_some_and(|length| length > BODY) {
        return Err(wrong("it is too long"));
    }
    let left = limit.saturating_sub(body.len() as u64);
    stream.take(left).read_to_end(&mut body)?;
    match length {
        Some(length) if (body.len() as u64) < length => Err(wrong("it ended too soon")),
        None if body.len() as u64 > BODY => Err(wrong("it is too long")),
        _ => {
            body.truncate(usize::try_from(limit).unwrap_or(usize::MAX));
            Ok(Answer { status, body })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(text: &str) -> io::Result<Answer> {
        answer(&mut text.as_bytes())
    }

    #[test]
    fn answers_with_and_without_a_length_are_read() {
        let ok = of("HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}rest").unwrap();
        assert_eq!(ok, Answer { status: 200, body: b"{}".to_vec() });
        assert_eq!(of("HTTP/1.0 200 OK\r\n\r\nall of it").unwrap().body, b"all of it");
        assert_eq!(of("HTTP/1.1 204 No Content\r\n\r\n").unwrap().status, 204);
    }

    #[test]
    fn anything_else_is_an_error() {
        let long = format!("HTTP/1.1 200 OK\r\nx: {}\r\n\r\n", "y".repeat(HEAD));
        for text in [
            "",
            "HTTP/1.1 200 OK\r\n",
            "SSH-2.0\r\n\r\n",
            "HTTP/1.1 2\r\n\r\n",
            "HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\n{}",
            "HTTP/1.1 200 OK\r\ncontent-length: x\r\n\r\n{}",
            "HTTP/1.1 200 OK\r\ncontent-length: 18446744073709551615\r\n\r\n{}",
            "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n0\r\n",
            &long,
        ] {
            assert!(of(text).is_err(), "{text}");
        }
    }
}
