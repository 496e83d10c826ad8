//! Metrics, as a real Prometheus sees them: it scrapes a real daemon under load.
//!
//! Invariants checked:
//! - promtool finds no fault with the rules, their tests, the scrape configuration, the page;
//! - every metric of `docs/metrics.md` arrives, but for those that need what isn't there;
//! - every expression of the dashboard is one, and finds something where there is something to find;
//! - the figures are right: requests and bytes are those that the client sent;
//! - the rules load, and when a disk goes bad the alerts that should fire do, with its name.

mod dashboard;
mod prometheus;

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};
use serde_json::Value;

use self::prometheus::{Programs, Prometheus, free_port, get};
use crate::daemon::Daemon;
use crate::lab::{Fs, Lab, LoopDisk, loop_disks};
use crate::nbd::{Client, Failure};
use crate::place::{self, Profile};
use crate::report::Report;
use crate::subject::text;
use crate::tool::tool;
use crate::{pattern, setup};

/// Size of the image, in bytes.
const SIZE: u64 = 16 << 20;
/// Size of a disk, in bytes.
const DISK: u64 = 128 << 20;
/// One request, in bytes.
const PIECE: usize = 64 << 10;
/// How long the load lasts: rates need some scrapes.
const LOAD: Duration = Duration::from_secs(8);
/// How long anything that Prometheus is to notice may take.
const PATIENCE: Duration = Duration::from_secs(40);

/// Metrics that need a kernel with BPF and the agent, or chunks that were promoted; wherever they do
/// arrive, that is fine.
const MAY_BE_ABSENT: [&str; 3] = ["underlay_device_", "underlay_probe_", "underlay_cache_"];
/// Alerts that say something of this machine rather than of the node: it may have no probes, and be so
/// busy that a disk is slow.
const OF_THE_MACHINE: [&str; 2] = ["UnderlayProbesDown", "UnderlayDiskSlow"];

/// Whether there may be nothing of this name, or of this expression.
fn may_be_absent(name: &str) -> bool {
    MAY_BE_ABSENT.iter().any(|prefix| name.contains(prefix))
}

fn is_of_the_machine(alert: &Value) -> bool {
    alert.as_str().is_some_and(|name| OF_THE_MACHINE.contains(&name))
}

/// Runs the rig.
pub fn run(lab: &Lab, report: &mut Report) {
    let programs = match Programs::get() {
        Ok(programs) => programs,
        Err(error) => return report.skip("metrics", &format!("no prometheus: {error:#}")),
    };
    report.check("metrics: promtool takes rules, their tests and the scrape job", || {
        packaged(&programs)
    });
    if let Err(error) = loop_disks().and_then(|()| setup::need(&["mkfs.ext4"])) {
        return report.skip("metrics: scraped", &format!("{error:#}"));
    }
    let mut stage = match Stage::new(lab, &programs) {
        Ok(stage) => stage,
        Err(error) => return report.broken("metrics", &error),
    };
    report.check("metrics: promtool finds no fault with the page", || stage.page(&programs));
    report.check("metrics: figures are those of the load", || stage.load());
    if !report.check("metrics: a Prometheus scrapes it", || stage.scraped()) {
        return;
    }
    report.check("metrics: every one that is listed arrives", || stage.listed());
    report.check("metrics: the rules load and can be evaluated", || stage.rules());
    report.check("metrics: the dashboard's expressions find something", || {
        dashboard::check(&stage.prometheus)
    });
    report.check("metrics: alerts fire when a file system gives up", || stage.poisoned());
    report
        .check("metrics: alerts fire when a daemon goes and a disk is missing", || stage.missing());
    report.check("metrics: the daemon is well", || stage.daemon.healthy().map(|()| String::new()));
}

/// What is in packaging/, by promtool.
fn packaged(programs: &Programs) -> Result<String> {
    let dir = place::root().join("packaging/prometheus");
    let promtool = |words: &[&str]| tool(&programs.promtool, words).within(&dir).out();
    let rules = promtool(&["check", "rules", "--lint=all", "underlay.rules.yml"])?;
    promtool(&["check", "config", "scrape.yml"])?;
    promtool(&["test", "rules", "underlay.rules.test.yml"])?;
    let count = rules.split("SUCCESS: ").nth(1).and_then(|rest| rest.split(' ').next());
    let tests = fs::read_to_string(dir.join("underlay.rules.test.yml"))?;
    let text = fs::read_to_string(dir.join("underlay.rules.yml"))?;
    for line in text.lines().filter_map(|line| line.trim().strip_prefix("- ")) {
        let named = line.strip_prefix("alert: ").or_else(|| line.strip_prefix("record: "));
        let name = named.unwrap_or_default();
        ensure!(tests.contains(name), "no test names {name}");
    }
    Ok(format!("{} rules", count.context("promtool counts no rules")?))
}

/// Three disks, a replica on each of two, and a Prometheus that looks at them once a second.
struct Stage {
    daemon: Daemon,
    address: String,
    sick: LoopDisk,
    spare: Option<LoopDisk>,
    _well: LoopDisk,
    prometheus: Prometheus,
}

impl Stage {
    fn new(lab: &Lab, programs: &Programs) -> Result<Stage> {
        let dir = lab.dir("metrics")?;
        let raw = dir.join("base.raw");
        pattern::noise(&raw, SIZE, 4)?;
        let well = LoopDisk::new(&dir, "well", DISK, Fs::Ext4)?;
        let sick = LoopDisk::new(&dir, "sick", DISK, Fs::Ext4)?;
        let spare = LoopDisk::new(&dir, "spare", DISK, Fs::Ext4)?;
        let address = free_port()?;
        let settings = format!("metrics = \"{address}\"\n");
        let daemon = Daemon::start(lab, &dir, "metrics", Profile::Debug, &settings)?;
        daemon.ok(&["disk", "add", text(&well.path)?, "--name=well", "--tier=ssd"])?;
        daemon.ok(&["disk", "add", text(&sick.path)?, "--name=sick", "--tier=ssd"])?;
        daemon.ok(&["disk", "add", text(&spare.path)?, "--name=spare", "--tier=ssd"])?;
        daemon.ok(&["image", "import", text(&raw)?, "--name=base", "--disk=well"])?;
        daemon.ok(&["replica", "create", "far", "--image=base", "--disk=sick"])?;
        daemon.ok(&["replica", "create", "near", "--image=base", "--disk=well"])?;
        let status = daemon.json(&["status"])?;
        let url = status["daemon"]["metrics"].as_str().context("the daemon tells no metrics")?;
        ensure!(
            url == format!("http://{address}/metrics"),
            "metrics are at {url}, not at {address}"
        );
        let prometheus = Prometheus::start(programs, &dir, &address)?;
        Ok(Stage { daemon, address, sick, spare: Some(spare), _well: well, prometheus })
    }

    /// The page as plain text, which is all that promtool reads.
    fn page(&self, programs: &Programs) -> Result<String> {
        let page = get(&self.address, "/metrics", "text/plain")?;
        let found = tool(&programs.promtool, ["check", "metrics"]).input(page.clone()).outcome()?;
        let said = format!("{}{}", found.stdout, found.stderr);
        ensure!(found.code == 0 && said.trim().is_empty(), "exit {}: {}", found.code, found.said());
        let open = get(&self.address, "/metrics", "application/openmetrics-text;version=1.0.0")?;
        ensure!(open.ends_with("# EOF\n") && !page.contains("# EOF"), "formats are mixed up");
        Ok(format!("{} lines", page.lines().count()))
    }

    /// Puts a load on both replicas; its figures are those that the page tells.
    fn load(&mut self) -> Result<String> {
        let began = Instant::now();
        let mut rounds: u64 = 0;
        let mut clients = Vec::new();
        for replica in ["replica/far", "replica/near"] {
            clients.push(Client::open(self.daemon.nbd(), replica)?);
        }
        let mut piece = vec![0; PIECE];
        let mut image = Client::open(self.daemon.nbd(), "image/base")?;
        while began.elapsed() < LOAD {
            let at = rounds % (SIZE / 2 / PIECE as u64) * PIECE as u64;
            for client in &mut clients {
                // The upper half stays the image's.
                client.read(SIZE / 2 + at, &mut piece)?;
                client.write(at, &vec![7; PIECE], 0)?;
                client.write(at + 512, &[8; 512], 0)?;
                client.flush()?;
                client.trim(at, 4096, 0)?;
                client.zero(at + 8192, 4096, 0)?;
            }
            image.read(at, &mut piece)?;
            rounds += 1;
            thread::sleep(Duration::from_millis(5));
        }
        let page = get(&self.address, "/metrics", "")?;
        let told = |name: &str, export: &str, op: &str| -> Result<u64> {
            let sample = format!("{name}{{export=\"{export}\",front=\"nbd\",op=\"{op}\"}} ");
            let value = page.lines().find_map(|line| line.strip_prefix(&sample));
            value.and_then(|value| value.parse().ok()).ok_or_else(|| anyhow!("no {sample}"))
        };
        let piece = PIECE as u64;
        for export in ["replica/far", "replica/near"] {
            for (op, count, bytes) in [
                ("read", rounds, rounds * piece),
                ("write", 2 * rounds, rounds * (piece + 512)),
                ("flush", rounds, 0),
                ("discard", rounds, rounds * 4096),
                ("write_zeroes", rounds, rounds * 4096),
            ] {
                let asked = told("underlay_export_operations_total", export, op)?;
                let moved = told("underlay_export_bytes_total", export, op)?;
                let timed = told("underlay_export_latency_seconds_count", export, op)?;
                let failed = told("underlay_export_errors_total", export, op)?;
                let all = (asked, moved, timed, failed);
                ensure!(all == (count, bytes, count, 0), "{export} {op}: {all:?}, {count} sent");
            }
        }
        let read = told("underlay_export_operations_total", "image/base", "read")?;
        ensure!(read == rounds, "image/base: {read} reads, {rounds} sent");
        Ok(format!("{} requests", rounds * 13))
    }

    fn scraped(&self) -> Result<String> {
        self.prometheus
            .until(PATIENCE, "the target is up", |prometheus| {
                let targets = prometheus.api("targets?state=active")?;
                let target = &targets["activeTargets"][0];
                let health = target["health"].as_str().unwrap_or_default();
                match health {
                    "up" => Ok(target["lastScrapeDuration"].as_f64()),
                    "down" => bail!("it is down: {}", target["lastError"]),
                    _ => Ok(None),
                }
            })
            .map(|took| format!("a scrape takes {:.1} ms", took * 1e3))
    }

    /// Every metric of docs/metrics.md, by the names that Prometheus has for what it got.
    fn listed(&self) -> Result<String> {
        let text = fs::read_to_string(place::root().join("docs/metrics.md"))?;
        let rows = text.lines().filter_map(|line| {
            let mut cells = line.strip_prefix("| `")?.split('|').map(str::trim);
            let (name, kind) = (cells.next()?.trim_end_matches('`'), cells.next()?);
            Some(format!("{name}{}", if kind == "histogram" { "_bucket" } else { "" }))
        });
        let names: BTreeSet<String> = rows.collect();
        ensure!(names.len() > 40, "docs/metrics.md lists {} metrics", names.len());
        let arrived = self.prometheus.api("label/__name__/values")?;
        let arrived: BTreeSet<&str> =
            arrived.as_array().into_iter().flatten().filter_map(Value::as_str).collect();
        let missing: Vec<&String> = names
            .iter()
            .filter(|name| !arrived.contains(name.as_str()) && !may_be_absent(name))
            .collect();
        ensure!(missing.is_empty(), "missing: {missing:?}");
        let here = names.iter().filter(|name| arrived.contains(name.as_str())).count();
        Ok(format!("{here} of {}; the rest need probes, or promoted chunks", names.len()))
    }

    fn rules(&self) -> Result<String> {
        self.prometheus.until(PATIENCE, "every rule is evaluated", |prometheus| {
            let answer = prometheus.api("rules")?;
            let groups = answer["groups"].as_array().cloned().unwrap_or_default();
            let mut count = 0;
            for rule in
                groups.iter().flat_map(|group| group["rules"].as_array().into_iter().flatten())
            {
                match rule["health"].as_str() {
                    Some("ok") => count += 1,
                    Some("err") => bail!("{}: {}", rule["name"], rule["lastError"]),
                    _ => return Ok(None),
                }
                let sound = rule["state"] != "firing" || is_of_the_machine(&rule["name"]);
                ensure!(sound, "{} fires on a sound node", rule["name"]);
            }
            Ok((count > 0).then(|| format!("{count} rules in {} groups", groups.len())))
        })
    }

    /// The sick disk's file system gives up: its replica is poisoned, and its requests fail.
    fn poisoned(&mut self) -> Result<String> {
        let mut client = Client::open(self.daemon.nbd(), "replica/far")?;
        client.write(0, &[3; 4096], 0)?;
        self.sick.remount("abort")?;
        // What was written can't be made durable any more, and nothing else can be written: more than
        // one in a hundred of all requests of the last five minutes.
        for attempt in 0..512 {
            let done = match attempt {
                0 => client.flush(),
                _ => client.write(4096, &[3; 4096], 0),
            };
            match done {
                Err(Failure::Refused(_)) => {}
                Ok(()) => bail!("request {attempt} on a dead file system was acknowledged"),
                Err(Failure::Lost(error)) => bail!("instead of an error code: {error:#}"),
            }
        }
        self.fire(&[
            ("UnderlayReplicaPoisoned", "replica", "far"),
            ("UnderlayRequestsFail", "export", "replica/far"),
        ])
    }

    /// The daemon comes back without the spare disk.
    fn missing(&mut self) -> Result<String> {
        self.daemon.kill()?;
        self.fire(&[("UnderlayDown", "instance", &self.address)])?;
        self.spare = None;
        self.daemon.restart()?;
        self.fire(&[("UnderlayDiskMissing", "disk", "spare")])
    }

    /// Waits until these alerts fire, each for the object of this label; none may for what is well.
    fn fire(&self, wanted: &[(&str, &str, &str)]) -> Result<String> {
        let began = Instant::now();
        let mut silent = Vec::new();
        let fired = self.prometheus.until(PATIENCE, "alerts fire", |prometheus| {
            let answer = prometheus.api("alerts")?;
            let alerts = answer["alerts"].as_array().cloned().unwrap_or_default();
            let fires = |(name, key, value): &(&str, &str, &str)| {
                alerts.iter().any(|alert| {
                    let labels = &alert["labels"];
                    alert["state"] == "firing"
                        && labels["alertname"] == *name
                        && labels[*key] == *value
                })
            };
            let wrong = alerts.iter().find(|alert| {
                let labels = &alert["labels"];
                (labels["disk"] == "well" || labels["replica"] == "near")
                    && !is_of_the_machine(&labels["alertname"])
            });
            ensure!(wrong.is_none(), "an alert for what is well: {wrong:?}");
            silent =
                wanted.iter().filter(|wanted| !fires(wanted)).map(|(name, ..)| *name).collect();
            Ok(silent.is_empty().then_some(()))
        });
        fired.with_context(|| format!("silent: {}", silent.join(", ")))?;
        let names: Vec<_> = wanted.iter().map(|(name, ..)| *name).collect();
        Ok(format!("{} after {:.1} s", names.join(", "), began.elapsed().as_secs_f64()))
    }
}

/// The packaged file `name` beneath packaging/.
fn packaging(name: &str) -> PathBuf {
    place::root().join("packaging").join(name)
}

/// The text of a packaged file.
fn read(path: &Path) -> Result<String> {
    fs::read_to_string(path).with_context(|| format!("reading {}", path.display()))
}
