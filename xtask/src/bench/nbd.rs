//! Side by side in one run: the raw file, underlay, qemu-nbd, nbdkit, under the same loads of fio.
//!
//! Figures from this kind of machine are noisy, so nothing is compared across runs: every round runs
//! every contestant, in an order that rotates, and what is reported is the median of the rounds, the
//! spread, and the median of the ratios within a round. Direct is compared with direct, cached with
//! cached. Each round of first-touch writes has a fresh overlay. The images lie beneath `target`, on
//! the real disk.

mod table;

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

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

/// How bytes get to the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    /// Past the page cache.
    Direct,
    /// Through the page cache.
    Cached,
}

/// Who is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Who {
    /// fio on the file itself, with io_uring: what the machine can do.
    Raw,
    Underlay,
    /// Raw base, qcow2 overlays.
    QemuNbd,
    /// Raw files, no overlay.
    Nbdkit,
}

/// One row of every table.
type Lane = (Way, Who);

/// Every lane. nbdkit's file plugin knows no direct I/O.
const LANES: [Lane; 7] = [
    (Way::Direct, Who::Raw),
    (Way::Direct, Who::Underlay),
    (Way::Direct, Who::QemuNbd),
    (Way::Cached, Who::Raw),
    (Way::Cached, Who::Underlay),
    (Way::Cached, Who::QemuNbd),
    (Way::Cached, Who::Nbdkit),
];

/// What fio does to a lane.
struct Load {
    name: &'static str,
    args: &'static [&'static str],
    kind: Kind,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// Reads the base.
    Read,
    /// Writes blocks of a fresh overlay, each once.
    Touch,
    /// Writes where the overlay has data already.
    Over,
}

/// Every load, the reads first; the writes in the order in which an overlay lives through them.
const LOADS: [Load; 6] = [
    Load {
        name: "4 KiB random read, QD1",
        args: &["--rw=randread", "--bs=4k", "--iodepth=1", "--norandommap"],
        kind: Kind::Read,
    },
    Load {
        name: "4 KiB random read, QD32",
        args: &["--rw=randread", "--bs=4k", "--iodepth=32", "--norandommap"],
        kind: Kind::Read,
    },
    Load {
        name: "256 KiB sequential read, QD4",
        args: &["--rw=read", "--bs=256k", "--iodepth=4"],
        kind: Kind::Read,
    },
    Load {
        name: "4 KiB random write, QD32, first touch",
        args: &["--rw=randwrite", "--bs=4k", "--iodepth=32", "--random_generator=lfsr"],
        kind: Kind::Touch,
    },
    Load {
        name: "4 KiB random write, QD32, overwrite",
        args: &["--rw=randwrite", "--bs=4k", "--iodepth=32", "--norandommap"],
        kind: Kind::Over,
    },
    Load {
        name: "4 KiB random write, QD1, fsync each",
        args: &["--rw=randwrite", "--bs=4k", "--iodepth=1", "--fsync=1", "--norandommap"],
        kind: Kind::Over,
    },
];

/// Measures, and puts the figures in words.
pub fn run(lab: &Lab, options: &Options) -> Result<String> {
    setup::need(&["fio", "qemu-nbd", "qemu-img", "nbdkit"])?;
    tool("cargo", ["build", "--release", "--bin", "underlay"])
        .within(&place::root())
        .limit(Duration::from_secs(3600))
        .run()?;
    let (stage, mut rows) = (Stage::new(lab)?, Vec::new());
    for round in 0..options.rounds {
        stage.round(options, round, &mut rows)?;
    }
    let machine = machine()?;
    Ok(match options.json {
        true => serde_json::to_string_pretty(&table::as_json(&machine, options, &rows))?,
        false => table::as_markdown(&machine, options, &rows),
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
    _server: Option<Process>,
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
                self.base(lane)?.fill("read", SIZE)?;
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
            let writes = loads.iter().filter(|(_, load)| load.kind != Kind::Read && wanted(load));
            let mut writes = writes.peekable();
            if writes.peek().is_none() {
                continue;
            }
            let overlay = self.overlay(lane, round)?;
            let mut filled = false;
            for (number, load) in writes {
                if load.kind == Kind::Over && !filled {
                    overlay.fill("write", HOT)?;
                    filled = true;
                }
                note(*number, lane, overlay.measure(load, options, round)?);
            }
            drop(overlay);
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
            Who::Underlay => Ok(Target::uri(self.daemon(way).uri("image/base"), None)),
            Who::QemuNbd => self.qemu_nbd(way, &["-r", "-f", "raw"], &self.base),
            Who::Nbdkit => self.nbdkit(&["-r"], &self.base),
        }
    }

    /// A fresh overlay; where there is none to be had, a fresh sparse file.
    fn overlay(&self, (way, who): Lane, round: u32) -> Result<Target> {
        let name = format!("round-{round}");
        let file = self.dir.join(format!("{name}-{way:?}-{who:?}"));
        match who {
            Who::Raw | Who::Nbdkit => File::create(&file)?.set_len(SIZE)?,
            Who::QemuNbd => tool("qemu-img", ["create", "-q", "-f", "qcow2", "-F", "raw", "-b"])
                .args([&self.base, &file])
                .run()?,
            Who::Underlay => {
                let create = ["replica", "create", &name, "--image", "base", "--disk", "disk"];
                self.daemon(way).ok(&create)?;
            }
        }
        match who {
            Who::Raw => Ok(Target::file(&file, way)),
            Who::Underlay => {
                Ok(Target::uri(self.daemon(way).uri(&format!("replica/{name}")), None))
            }
            Who::QemuNbd => self.qemu_nbd(way, &["--discard=unmap", "-f", "qcow2"], &file),
            Who::Nbdkit => self.nbdkit(&[], &file),
        }
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
            Way::Cached => ["--cache=writeback", "--aio=threads"],
        };
        self.serve(tool("qemu-nbd", ["-t", "-e", "8"]).args(how).args(args), "-k", file)
    }

    fn nbdkit(&self, args: &[&str], file: &Path) -> Result<Target> {
        self.serve(tool("nbdkit", ["-f"]).args(args), "-U", file)
    }

    fn serve(&self, server: tool::Tool, option: &str, file: &Path) -> Result<Target> {
        let socket = self.lab.socket("bench.sock");
        let _ = fs::remove_file(&socket);
        let server = server.args([option.as_ref(), socket.as_os_str()]);
        let plugin: &[&str] = if option == "-U" { &["file"] } else { &[] };
        let mut server =
            server.args(plugin).args([file]).background(&self.dir.join("servers.log"))?;
        server.until(START, || socket.exists())?;
        Ok(Target::uri(format!("nbd+unix:///?socket={}", socket.display()), Some(server)))
    }
}

impl Target {
    fn file(file: &Path, way: Way) -> Target {
        let direct = if way == Way::Direct { "--direct=1" } else { "--direct=0" };
        let name = format!("--filename={}", file.display());
        // fio would drop the file's cached pages first, and with them those of every other lane.
        let keep = "--invalidate=0".to_string();
        Target {
            args: vec!["--ioengine=io_uring".into(), direct.into(), keep, name],
            _server: None,
        }
    }

    fn uri(uri: String, server: Option<Process>) -> Target {
        Target { args: vec!["--ioengine=nbd".into(), format!("--uri={uri}")], _server: server }
    }

    /// Reads or writes the first `size` bytes once.
    fn fill(&self, how: &str, size: u64) -> Result<()> {
        let fio = tool("fio", ["--name=fill", "--bs=1m", "--iodepth=4", "--end_fsync=1"]);
        let fio = fio.args([format!("--rw={how}"), format!("--size={size}")]).args(&self.args);
        fio.limit(Duration::from_secs(300)).run()
    }

    fn measure(&self, load: &Load, options: &Options, round: u32) -> Result<Sample> {
        let size = if load.kind == Kind::Over { HOT } else { SIZE };
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
            Kind::Read | Kind::Over => &["--time_based", "--ramp_time=1"],
        };
        let limit = Duration::from_secs_f64(options.seconds() + 120.0);
        let said = fio.args(repeated).limit(limit).out()?;
        let report = tool::json(&said[said.find('{').context("fio printed no JSON")?..])?;
        sample(&report, if load.kind == Kind::Read { "read" } else { "write" })
    }
}

fn sample(report: &Value, direction: &str) -> Result<Sample> {
    let job = &report["jobs"][0];
    ensure!(job["error"] == 0, "fio: error {}", job["error"]);
    let figures = &job[direction];
    let per_second = figures["iops"].as_f64().context("fio gave no iops")?;
    if per_second <= 0.0 {
        bail!("fio did nothing: {figures}");
    }
    let latency = |percentile: &str| -> f64 {
        figures["clat_ns"]["percentile"][percentile].as_f64().unwrap_or(f64::NAN) / 1000.0
    };
    Ok(Sample { per_second, median_us: latency("50.000000"), p99_us: latency("99.000000") })
}
