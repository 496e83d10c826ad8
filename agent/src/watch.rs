//! `underlay-agent watch`: disks and files by name, no daemon.

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use underlay_agent::device::Dev;
use underlay_agent::fiemap::extents_of;
use underlay_agent::follow::Follower;
use underlay_agent::probes::Probes;
use underlay_agent::report::{Disk, File as Followed, Report, Watch};
use underlay_agent::serve::{Go, Signals, Until};
use underlay_agent::{capabilities, table};

/// What to watch, and how to show it.
#[derive(clap::Args)]
#[command(after_help = "Examples:\n  underlay-agent watch /srv/disk-a /dev/sdb --own 1234\n  \
    underlay-agent watch /srv/disk-a/image.raw --total --seconds 10 --json")]
pub struct Options {
    /// A directory, a block device, or a file whose reads are to be told chunk by chunk (the
    /// file's number is its place in this list, from 0)
    #[arg(required = true)]
    targets: Vec<PathBuf>,
    /// End after so many seconds
    #[arg(long)]
    seconds: Option<f64>,
    /// One report of the whole time, at the end, instead of one each second
    #[arg(long)]
    total: bool,
    /// A process whose I/O counts as own
    #[arg(long)]
    own: Vec<u32>,
    /// One JSON document a report
    #[arg(long)]
    json: bool,
    /// Keep account of what the programs cost (needs CAP_SYS_ADMIN at the start)
    #[arg(long)]
    account: bool,
}

/// Watches until it is time, or a signal.
pub fn run(options: &Options) -> Result<()> {
    let limit = match options.seconds.map(Duration::try_from_secs_f64) {
        Some(limit) => Some(limit.context("--seconds")?),
        None => None,
    };
    let watch = watch(options)?;
    let signals = Signals::take(Until::Signal)?;
    let mut probes = Probes::load(u32::try_from(watch.disks.len())?)?;
    if options.account {
        probes.account()?;
    }
    let mut follower = Follower::new(probes)?;
    capabilities::give_up()?;
    follower.watch(&watch)?;
    follower.sample()?;
    eprintln!("watching");
    let (start, mut last) = (Instant::now(), Instant::now());
    loop {
        let over =
            signals.tick()? == Go::Home || limit.is_some_and(|limit| start.elapsed() >= limit);
        follower.drain();
        if over || !options.total && last.elapsed() >= Duration::from_secs(1) {
            last = Instant::now();
            show(&follower.sample()?, options.json)?;
        }
        if over {
            return Ok(());
        }
    }
}

fn show(report: &Report, json: bool) -> Result<()> {
    let mut out = std::io::stdout().lock();
    if json {
        serde_json::to_writer(&mut out, report)?;
        writeln!(out)?;
    } else {
        writeln!(out, "{}", table::lines(report))?;
    }
    Ok(out.flush()?)
}

fn watch(options: &Options) -> Result<Watch> {
    let mut disks: Vec<Disk> = Vec::new();
    for (id, target) in (0u64..).zip(&options.targets) {
        let (dev, file) = resolve(target)?;
        let dev = dev.to_string();
        let file = match file {
            Some(file) => Some(Followed {
                id,
                extents: extents_of(&file).with_context(|| target.display().to_string())?,
            }),
            None => None,
        };
        match disks.iter_mut().find(|disk| disk.dev == dev) {
            Some(known) => known.files.extend(file),
            None => {
                let name = target.display().to_string();
                disks.push(Disk { name, dev, files: file.into_iter().collect() });
            }
        }
    }
    Ok(Watch { generation: 1, tgids: options.own.clone(), disks })
}

/// The device of a target, and the file if it is one.
fn resolve(target: &Path) -> Result<(Dev, Option<File>)> {
    let shown = || target.display().to_string();
    let meta = fs::metadata(target).with_context(shown)?;
    let kind = meta.file_type();
    if kind.is_block_device() {
        return Ok((Dev::from_stat(meta.rdev()), None));
    }
    if kind.is_file() {
        return Ok((Dev::from_stat(meta.dev()), Some(File::open(target).with_context(shown)?)));
    }
    if !kind.is_dir() {
        bail!("{}: not a directory, block device or regular file", target.display());
    }
    Ok((Dev::from_stat(meta.dev()), None))
}
