//! Prometheus and promtool: found or fetched, started, asked over HTTP.
//!
//! Debian's package is unpacked and not installed: installing it would start a server of its own.

use std::fs;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use super::{packaging, read};
use crate::apt::Apt;
use crate::place;
use crate::tool::{Process, find, json, tool};

/// How long an answer over HTTP may take.
const ANSWER: Duration = Duration::from_secs(20);
/// How long it may take to start.
const START: Duration = Duration::from_secs(30);

/// The two programs.
pub struct Programs {
    prometheus: PathBuf,
    /// Checks rules and pages.
    pub promtool: PathBuf,
}

impl Programs {
    /// Those that are installed, or those of Debian's package.
    pub fn get() -> Result<Programs> {
        if let (Some(prometheus), Some(promtool)) = (find("prometheus"), find("promtool")) {
            return Ok(Programs { prometheus, promtool });
        }
        let into = place::cache().join("prometheus");
        let bin = into.join("usr/bin");
        let programs =
            Programs { prometheus: bin.join("prometheus"), promtool: bin.join("promtool") };
        if !programs.promtool.exists() || !programs.prometheus.exists() {
            fs::create_dir_all(&into)?;
            let apt = Apt::unprivileged()?;
            apt.unpack(&apt.codename, "prometheus", |_| false, &into)?;
        }
        tool(&programs.promtool, ["--version"]).run()?;
        Ok(programs)
    }
}

/// A server that scrapes one daemon once a second, by the packaged configuration otherwise.
pub struct Prometheus {
    address: String,
    _process: Process,
}

impl Prometheus {
    /// Starts it, with its files in `dir`.
    pub fn start(programs: &Programs, dir: &Path, target: &str) -> Result<Prometheus> {
        let config = read(&packaging("prometheus/scrape.yml"))?;
        let config = config.replace("127.0.0.1:9500", target).replace("15s", "1s");
        ensure!(config.contains(target), "packaging/prometheus/scrape.yml names no target");
        fs::write(dir.join("scrape.yml"), config)?;
        // A rig has no ten minutes: what is true is true at once.
        let rules = read(&packaging("prometheus/underlay.rules.yml"))?;
        let rules = rules.lines().filter(|line| !line.trim().starts_with("for: "));
        fs::write(dir.join("underlay.rules.yml"), rules.collect::<Vec<_>>().join("\n") + "\n")?;
        let address = free_port()?;
        let mut process = tool(&programs.prometheus, ["--log.level=warn"])
            .args([format!("--config.file={}", dir.join("scrape.yml").display())])
            .args([format!("--storage.tsdb.path={}", dir.join("tsdb").display())])
            .args([format!("--web.listen-address={address}")])
            .background(&dir.join("prometheus.log"))?;
        process.until(START, || get(&address, "/-/ready", "").is_ok())?;
        Ok(Prometheus { address, _process: process })
    }

    /// What its API answers at `path`.
    pub fn api(&self, path: &str) -> Result<Value> {
        let text = get(&self.address, &format!("/api/v1/{path}"), "")?;
        let answer = json(&text)?;
        ensure!(answer["status"] == "success", "{path}: {}", answer["error"]);
        Ok(answer["data"].clone())
    }

    /// The series that an expression finds now.
    pub fn query(&self, expression: &str) -> Result<Vec<Value>> {
        let mut path = "query?query=".to_string();
        for byte in expression.bytes() {
            match byte {
                b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'_' => path.push(byte.into()),
                _ => path.push_str(&format!("%{byte:02X}")),
            }
        }
        let data = self.api(&path).with_context(|| expression.to_string())?;
        Ok(data["result"].as_array().cloned().unwrap_or_default())
    }

    /// Asks again and again until there is an answer.
    pub fn until<T>(
        &self,
        limit: Duration,
        what: &str,
        mut ask: impl FnMut(&Prometheus) -> Result<Option<T>>,
    ) -> Result<T> {
        let began = Instant::now();
        loop {
            if let Some(answer) = ask(self).with_context(|| what.to_string())? {
                return Ok(answer);
            }
            if began.elapsed() > limit {
                bail!("{what}: not within {} s", limit.as_secs());
            }
            thread::sleep(Duration::from_millis(250));
        }
    }
}

/// An address of this host that nobody listens at just now.
pub fn free_port() -> Result<String> {
    Ok(TcpListener::bind("127.0.0.1:0")?.local_addr()?.to_string())
}

/// The body of a page, for one who takes `accept`.
pub fn get(address: &str, path: &str, accept: &str) -> Result<String> {
    let asking = || format!("http://{address}{path}");
    let mut stream = TcpStream::connect(address).with_context(asking)?;
    stream.set_read_timeout(Some(ANSWER))?;
    // Of the older HTTP, so that the body ends where the connection does.
    write!(stream, "GET {path} HTTP/1.0\r\nhost: {address}\r\naccept: {accept}\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).with_context(asking)?;
    let (head, body) = answer.split_once("\r\n\r\n").with_context(asking)?;
    let status = head.split(' ').nth(1).unwrap_or_default();
    // Errors of the API come with a body that tells them.
    ensure!(matches!(status, "200" | "400" | "422"), "{}: status {status}", asking());
    Ok(body.to_string())
}
