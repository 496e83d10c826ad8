//! Side by side in one run: the raw file, underlay, qemu's two servers, nbdkit, under the same loads of fio.
//!
//! Figures from this kind of machine are noisy, so nothing is compared across runs: every round runs
//! every contestant, in an order that rotates, and what is reported is the median of the rounds, the
//! spread, and the median of the ratios within a round. Direct is compared with direct, cached with
//! cached. Each round of first-touch writes has a fresh overlay. The images lie beneath `target`, on
//! the real disk. A server's processor time is that of its process, kernel threads that work for it
//! included; the raw file has no server.

mod chart;
mod loads;
mod table;

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nix::unistd::{SysconfVar, sysconf};
use serde_json::Value;

use self::loads::{Kind, LANES, LOADS, Lane, Load, Way, Who};
use self::table::{Row, Sample};
use super::{Options, machine};
use crate::daemon::Daemon;
use crate::lab::Lab;
use crate::place::{self, Profile};
use crate::subject::text;
use crate::tool::{self, Process, tool};
use crate::{pattern, setup};

/// Size of the image, in bytes.
const SIZE: u64 = 1 << 30;
/// The part that overwrites fall on: written once before, in bytes.
const HOT: u64 = 128 << 20;
/// How long a server may take to come up.
const START: Duration = Duration::from_secs(20);

/// How long the page cache may take to be written out.
const SYNC: Duration = Duration::from_secs(300);

/// Measures, and puts the figures in words.
pub fn run(lab: &Lab, options: &Options) -> Result<String> {
    setup::need(&["fio", "qemu-nbd", "qemu-storage-daemon", "qemu-img", "nbdkit"])?;
    tool("cargo", ["build", "--release", "--bin", "underlay"])
        .within(&place::root())
        .limit(Duration::from_secs(3600))
        .run()?;
    let (stage, mut rows) = (Stage::new(lab)?, Vec::new());
    for round in 0..options.rounds {
        stage.round(options, round, &mut rows)?;
    }
    let machine = machine()?;
    let page = table::as_markdown(&machine, options, &rows);
    if let Some(dir) = &options.write {
        fs::create_dir_all(dir)?;
        fs::write(dir.join("nbd.md"), &page)?;
        fs::write(dir.join("nbd.svg"), chart::svg(&machine, &rows))?;
    }
    Ok(match options.json {
        true => serde_json::to_string_pretty(&table::as_json(&machine, options, &rows))?,
        false => page,
    })
}

/// The files and daemons that all rounds share.
struct Stage<'a> {
    lab: &'a Lab,
    dir: PathBuf,
    base: PathBuf,
    direct: Daemon,
    cached: Daemon,
}

/// What fio is pointed at, and what must live meanwhile.
struct Target {
    args: Vec<String>,
    /// Whose processor time counts.
    server: Option<u32>,
    _process: Option<Process>,
}

impl Stage<'_> {
    fn new(lab: &Lab) -> Result<Stage<'_>> {
        let dir = lab.dir("bench")?;
        let base = dir.join("base.raw");
        pattern::noise(&base, SIZE, 1)?;
        let daemon = |name: &str, settings: &str| -> Result<Daemon> {
            let disk = dir.join(format!("{name}.disk"));
            fs::create_dir_all(&disk)?;
            let daemon = Daemon::start(lab, &dir, name, Profile::Release, settings)?;
            daemon.ok(&["disk", "add", text(&disk)?, "--name", "disk"])?;
            daemon.ok(&["image", "import", text(&base)?, "--name", "base"])?;
            Ok(daemon)
        };
        let direct = daemon("direct", "image_io = \"direct\"\noverlay_io = \"direct\"\n")?;
        let cached = daemon("cached", "image_io = \"cached\"\noverlay_io = \"cached\"\n")?;
        Ok(Stage { lab, dir, base, direct, cached })
    }

    /// Every load on every lane, once.
    fn round(&self, options: &Options, round: u32, rows: &mut Vec<Row>) -> Result<()> {
        let loads: Vec<_> = LOADS.iter().enumerate().collect();
        let wanted = |load: &Load| load.name.contains(&options.only);
        let mut lanes = LANES;
        lanes.rotate_left(round as usize % LANES.len());
        let mut note = |load: usize, lane: Lane, sample: Sample| {
            let (way, who) = lane;
            eprintln!(
                "round {}: {way:?} {who:?}: {}: {:.0}/s",
                round + 1,
                LOADS[load].name,
                sample.per_second
            );
            match rows.iter_mut().find(|row| row.load == load && row.lane == lane) {
                Some(row) => row.samples.push(sample),
                None => rows.push(Row { load, lane, samples: vec![sample] }),
            }
        };
        if LOADS.iter().any(|load| load.kind == Kind::Read && wanted(load)) {
            for lane in lanes.into_iter().filter(|(way, _)| *way == Way::Cached) {
                self.base(lane)?.fill("read", "1m", SIZE)?;
            }
        }
        for (number, load) in loads.iter().filter(|(_, load)| load.kind == Kind::Read) {
            for lane in lanes {
                if wanted(load) {
                    note(*number, lane, self.base(lane)?.measure(load, options, round)?);
                }
            }
        }
        for lane in lanes {
            let mut filled: Option<Target> = None;
            for (number, load) in loads.iter().filter(|(_, load)| load.kind != Kind::Read) {
                if !wanted(load) || !load.kind.suits(lane) {
                    continue;
                }
                let fresh = || self.overlay(lane, &format!("{round}-{number}"));
                let overlay = match load.kind {
                    Kind::Touch => fresh()?,
                    Kind::Half => {
                        let overlay = fresh()?;
                        overlay.fill("write:4k", "4k", SIZE)?;
                        overlay
                    }
                    Kind::Again => {
                        drop(filled.take());
                        note(*number, lane, self.base(lane)?.measure(load, options, round)?);
                        continue;
                    }
                    Kind::Over | Kind::Mixed | Kind::Read => {
                        let overlay = match filled.take() {
                            Some(overlay) => overlay,
                            None => {
                                let overlay = fresh()?;
                                overlay.fill("write", "1m", HOT)?;
                                overlay
                            }
                        };
                        note(*number, lane, overlay.measure(load, options, round)?);
                        filled = Some(overlay);
                        continue;
                    }
                };
                drop(filled.take());
                note(*number, lane, overlay.measure(load, options, round)?);
            }
            drop(filled);
            // What the page cache still holds must not be written under the next lane's figures.
            // The overlay stays until the end: where the file system is mounted with `discard`,
            // removing it would hold up every sync for seconds.
            tool("sync", ["-f".as_ref(), self.dir.as_os_str()]).limit(SYNC).run()?;
        }
        Ok(())
    }

    /// The base, read only.
    fn base(&self, (way, who): Lane) -> Result<Target> {
        match who {
            Who::Raw => Ok(Target::file(&self.base, way)),
            Who::Underlay => self.export(way, "image/base"),
            Who::QemuNbd => self.qemu_nbd(way, &["-r", "-f", "raw"], &self.base),
            Who::StorageDaemon => self.storage_daemon(way, "raw", &self.base),
            Who::Nbdkit => self.nbdkit(&["-r"], &self.base),
        }
    }

    /// A fresh overlay; of the raw file, where there is none to be had, a fresh sparse file.
    fn overlay(&self, (way, who): Lane, name: &str) -> Result<Target> {
        let file = self.dir.join(format!("{name}-{way:?}-{who:?}"));
        match who {
            Who::Raw => File::create(&file)?.set_len(SIZE)?,
            Who::QemuNbd | Who::StorageDaemon => {
                tool("qemu-img", ["create", "-q", "-f", "qcow2", "-F", "raw", "-b"])
                    .args([&self.base, &file])
                    .run()?;
            }
            Who::Underlay => {
                let name = format!("r{name}");
                let create = ["replica", "create", &name, "--image", "base", "--disk", "disk"];
                self.daemon(way).ok(&create)?;
                return self.export(way, &format!("replica/{name}"));
            }
            Who::Nbdkit => return self.nbdkit(&["--filter=cow"], &self.base),
        }
        match who {
            Who::StorageDaemon => self.storage_daemon(way, "qcow2", &file),
            Who::QemuNbd => self.qemu_nbd(way, &["--discard=unmap", "-f", "qcow2"], &file),
            Who::Raw | Who::Underlay | Who::Nbdkit => Ok(Target::file(&file, way)),
        }
    }

    fn export(&self, way: Way, export: &str) -> Result<Target> {
        let daemon = self.daemon(way);
        Ok(Target::uri(daemon.uri(export), daemon.id()?, None))
    }

    fn daemon(&self, way: Way) -> &Daemon {
        match way {
            Way::Direct => &self.direct,
            Way::Cached => &self.cached,
        }
    }

    fn qemu_nbd(&self, way: Way, args: &[&str], file: &Path) -> Result<Target> {
        let how = match way {
            Way::Direct => ["--cache=none", "--aio=io_uring"],
            Way::Cached => ["--cache=writeback", "--aio=io_uring"],
        };
        let (server, socket) = (tool("qemu-nbd", ["-t", "-e", "64"]), self.socket());
        let server = server.args(how).args(args).args(["-k".as_ref(), socket.as_os_str()]);
        self.serve(server.args([file]), &socket, "")
    }

    fn storage_daemon(&self, way: Way, format: &str, file: &Path) -> Result<Target> {
        let direct = if way == Way::Direct { "on" } else { "off" };
        let socket = self.socket();
        let file = format!(
            "driver=file,filename={},node-name=file,aio=io_uring,discard=unmap,cache.direct={direct}",
            text(file)?
        );
        let node = format!("driver={format},file=file,node-name=node,cache.direct={direct}");
        let export = "type=nbd,id=export,node-name=node,name=disk,writable=on";
        let export = if format == "raw" { export.replace("=on", "=off") } else { export.into() };
        let node = if format == "raw" { node + ",read-only=on" } else { node };
        let file = if format == "raw" { file + ",read-only=on" } else { file };
        let server = format!("addr.type=unix,addr.path={},max-connections=64", text(&socket)?);
        let daemon = tool("qemu-storage-daemon", ["--blockdev", &file, "--blockdev", &node])
            .args(["--nbd-server", &server, "--export", &export]);
        self.serve(daemon, &socket, "disk")
    }

    fn nbdkit(&self, args: &[&str], file: &Path) -> Result<Target> {
        let socket = self.socket();
        let server = tool("nbdkit", ["-f", "-U"]).args([&socket]).args(args);
        self.serve(server.args(["file"]).args([file]), &socket, "")
    }

    fn socket(&self) -> PathBuf {
        self.lab.socket("bench.sock")
    }

    fn serve(&self, server: tool::Tool, socket: &Path, export: &str) -> Result<Target> {
        let _ = fs::remove_file(socket);
        let mut server = server.background(&self.dir.join("servers.log"))?;
        server.until(START, || socket.exists())?;
        let uri = format!("nbd+unix:///{export}?socket={}", socket.display());
        Ok(Target::uri(uri, server.id(), Some(server)))
    }
}

impl Target {
    fn file(file: &Path, way: Way) -> Target {
        let direct = if way == Way::Direct { "--direct=1" } else { "--direct=0" };
        let name = format!("--filename={}", file.display());
        // fio would drop the file's cached pages first, and with them those of every other lane.
        let keep = "--invalidate=0".to_string();
        let args = vec!["--ioengine=io_uring".into(), direct.into(), keep, name];
        Target { args, server: None, _process: None }
    }

    fn uri(uri: String, server: u32, process: Option<Process>) -> Target {
        let args = vec!["--ioengine=nbd".into(), format!("--uri={uri}")];
        Target { args, server: Some(server), _process: process }
    }

    /// Reads or writes the first `size` bytes once.
    fn fill(&self, how: &str, block: &str, size: u64) -> Result<()> {
        let fio = tool("fio", ["--name=fill", "--iodepth=16", "--end_fsync=1"]);
        let how = [format!("--rw={how}"), format!("--bs={block}"), format!("--size={size}")];
        let fio = fio.args(how).args(&self.args);
        fio.limit(Duration::from_secs(300)).run()
    }

    fn measure(&self, load: &Load, options: &Options, round: u32) -> Result<Sample> {
        let size = match load.kind {
            Kind::Over | Kind::Mixed => HOT,
            Kind::Read | Kind::Touch | Kind::Half | Kind::Again => SIZE,
        };
        let fio = tool("fio", ["--name=bench", "--output-format=json"])
            .args([
                format!("--runtime={:.0}ms", options.seconds() * 1000.0),
                format!("--size={size}"),
            ])
            .args([format!("--randseed={}", round + 1)])
            .args(load.args)
            .args(&self.args);
        // A first touch can't be repeated: that load ends early where every block was written.
        let repeated: &[&str] = match load.kind {
            Kind::Touch => &[],
            _ => &["--time_based", "--ramp_time=1"],
        };
        let limit = Duration::from_secs_f64(options.seconds() + 120.0);
        let (began, before) = (Instant::now(), self.server.map(worked).transpose()?);
        let said = fio.args(repeated).limit(limit).out()?;
        let after = self.server.map(worked).transpose()?;
        let report = tool::json(&said[said.find('{').context("fio printed no JSON")?..])?;
        // fio's own start is in both.
        let share = after
            .zip(before)
            .map(|(after, before)| (after - before).as_secs_f64() / began.elapsed().as_secs_f64());
        let resident = self.server.map(resident).transpose()?;
        Ok(Sample { resident, ..sample(&report, share)? })
    }
}

/// The memory that a process has, in bytes.
fn resident(pid: u32) -> Result<f64> {
    let pages = fs::read_to_string(format!("/proc/{pid}/statm"))?;
    let pages: f64 = pages.split_whitespace().nth(1).context("statm")?.parse()?;
    Ok(pages * sysconf(SysconfVar::PAGE_SIZE)?.context("no page size")? as f64)
}

/// The processor time that a process has had.
fn worked(pid: u32) -> Result<Duration> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let fields: Vec<&str> = stat.rsplit(')').next().context("stat")?.split_whitespace().collect();
    let ticks: u64 = [11, 12].iter().filter_map(|at| fields.get(*at)?.parse::<u64>().ok()).sum();
    let second = sysconf(SysconfVar::CLK_TCK)?.context("no clock")?;
    Ok(Duration::from_secs_f64(ticks as f64 / second as f64))
}

/// `share`: processor seconds of the server a second.
fn sample(report: &Value, share: Option<f64>) -> Result<Sample> {
    let job = &report["jobs"][0];
    ensure!(job["error"] == 0, "fio: error {}", job["error"]);
    let both = [&job["read"], &job["write"]];
    let sum = |of: &str| both.iter().filter_map(|it| it[of].as_f64()).sum::<f64>();
    let per_second = sum("iops");
    if per_second <= 0.0 {
        bail!("fio did nothing: {job}");
    }
    let main = both[usize::from(both[0]["iops"].as_f64() <= both[1]["iops"].as_f64())];
    let latency = |percentile: &str| -> f64 {
        main["clat_ns"]["percentile"][percentile].as_f64().unwrap_or(f64::NAN) / 1000.0
    };
    let gibs = sum("bw_bytes") / f64::from(1 << 30);
    Ok(Sample {
        per_second,
        median_us: latency("50.000000"),
        p99_us: latency("99.000000"),
        cpu_per_gib: share.map(|share| share / gibs),
        resident: None,
    })
}
