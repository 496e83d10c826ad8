//! What a client has beside others: one reads 4 KiB at a time from the page cache, alone and beside a client
//! that does what it should not, or as much as it can.
//!
//! Every round measures it alone and beside each neighbour; what counts is the median of the ratios within a
//! round. One of two that are alike has half of what one has alone, where clients and server share processors.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use super::{Options, machine, median};
use crate::daemon::Daemon;
use crate::lab::Lab;
use crate::nbd::{Client, FUA, READ, request};
use crate::pattern;
use crate::place::Profile;
use crate::subject::text;

/// Bytes of the image: it fits the page cache, not a processor's.
const SIZE: u64 = 256 << 20;
const BLOCK: usize = 4096;

/// What the neighbour does, until it is over; each call once more.
type Deed = fn(&Path) -> Result<()>;

const NEIGHBOURS: [(&str, Deed); 8] = [
    ("reads as we do", reads_alike),
    ("reads 64 KiB, 128 at a time", reads_many),
    ("reads 32 MiB, one after the other", reads_long),
    ("asks for 32 MiB again and again, and reads no reply", reads_nothing),
    ("writes 1 MiB with FUA", writes),
    ("sends garbage, and comes again", sends_garbage),
    ("comes and goes", comes_and_goes),
    ("stalls in 500 handshakes and requests", stalls),
];

/// How long a neighbour goes on before it looks whether it is over.
const BOUT: Duration = Duration::from_millis(50);

/// Runs the bench.
pub fn run(lab: &Lab, options: &Options) -> Result<String> {
    let dir = lab.dir("beside")?;
    let disk = dir.join("disk");
    std::fs::create_dir_all(&disk)?;
    pattern::image(&dir.join("base.raw"), SIZE, 3)?;
    let mut daemon = Daemon::start(lab, &dir, "beside", Profile::Release, "")?;
    daemon.ok(&["disk", "add", text(&disk)?, "--name", "disk"])?;
    daemon.ok(&["image", "import", text(&dir.join("base.raw"))?, "--name", "base"])?;
    daemon.ok(&["replica", "create", "vm", "--image", "base", "--disk", "disk"])?;
    let socket = daemon.nbd().to_owned();
    Client::open(&socket, "image/base")?.read_all(SIZE)?;
    let time = Duration::from_secs_f64(options.seconds());
    let chosen: Vec<_> =
        NEIGHBOURS.iter().filter(|(name, _)| name.contains(&options.only)).collect();
    let mut ratios: Vec<Vec<(f64, f64)>> = vec![Vec::new(); chosen.len()];
    let mut alone = Vec::new();
    for _ in 0..options.rounds {
        let (mut rate, mut late) = reads(&socket, time)?;
        alone.push(rate);
        for ((_, deed), ratios) in chosen.iter().zip(&mut ratios) {
            let (beside, slowest) = beside(&socket, *deed, time)?;
            ratios.push((beside / rate, slowest / late));
            (rate, late) = reads(&socket, time)?;
            alone.push(rate);
        }
    }
    daemon.healthy()?;
    daemon.stop()?;
    let mut told = format!(
        "`cargo xtask bench beside --rounds {} --seconds {}`: {}. Alone: {:.0} reads/s.\n\n\
         | a neighbour that | reads/s, of those alone | p99 of a read, of that alone |\n|---|---:|---:|\n",
        options.rounds,
        options.seconds(),
        machine()?,
        median(alone)
    );
    for ((name, _), ratios) in chosen.iter().zip(ratios) {
        let (rates, slowest): (Vec<f64>, Vec<f64>) = ratios.into_iter().unzip();
        told += &format!("| {name} | {:.2} | {:.1} |\n", median(rates), median(slowest));
    }
    Ok(told)
}

/// Reads a second of ours, and the p99 of a read in seconds, beside a neighbour.
fn beside(socket: &Path, deed: Deed, time: Duration) -> Result<(f64, f64)> {
    let over = AtomicBool::new(false);
    thread::scope(|scope| {
        let neighbour = scope.spawn(|| {
            while !over.load(Ordering::Relaxed) {
                deed(socket)?;
            }
            Ok::<_, anyhow::Error>(())
        });
        thread::sleep(BOUT);
        let told = reads(socket, time);
        over.store(true, Ordering::Relaxed);
        neighbour.join().ok().context("the neighbour panicked")?.context("the neighbour")?;
        told
    })
}

fn reads(socket: &Path, time: Duration) -> Result<(f64, f64)> {
    let mut client = Client::open(socket, "image/base")?;
    let mut rng = fastrand::Rng::with_seed(5);
    let (start, mut buf, mut took) = (Instant::now(), [0; BLOCK], Vec::new());
    while start.elapsed() < time {
        let asked = Instant::now();
        client.read(rng.u64(..SIZE / BLOCK as u64) * BLOCK as u64, &mut buf)?;
        took.push(asked.elapsed().as_secs_f64());
    }
    let rate = took.len() as f64 / start.elapsed().as_secs_f64();
    took.sort_by(f64::total_cmp);
    Ok((rate, took[took.len() * 99 / 100]))
}

fn reads_alike(socket: &Path) -> Result<()> {
    reads(socket, BOUT).map(drop)
}

/// Keeps 128 reads under way for a while.
fn reads_many(socket: &Path) -> Result<()> {
    const LEN: usize = 64 << 10;
    let mut client = Client::open(socket, "image/base")?;
    let stream = client.stream();
    let offset = |cookie: u64| cookie * 7 % (SIZE / LEN as u64) * LEN as u64;
    let ask = |cookie: u64| request(READ, 0, cookie, offset(cookie), LEN as u32);
    let first: Vec<u8> = (0..128).flat_map(ask).collect();
    stream.write_all(&first)?;
    let (start, mut reply, mut cookie) = (Instant::now(), vec![0; 16 + LEN], 128);
    while start.elapsed() < BOUT {
        stream.read_exact(&mut reply)?;
        stream.write_all(&ask(cookie))?;
        cookie += 1;
    }
    Ok(())
}

fn reads_long(socket: &Path) -> Result<()> {
    let mut client = Client::open(socket, "image/base")?;
    let (start, mut buf) = (Instant::now(), vec![0; 32 << 20]);
    while start.elapsed() < BOUT {
        client.read(0, &mut buf)?;
    }
    Ok(())
}

fn reads_nothing(socket: &Path) -> Result<()> {
    let mut client = Client::open(socket, "image/base")?;
    let stream = client.stream();
    for cookie in 0..100 {
        stream.write_all(&request(READ, 0, cookie, 0, 32 << 20))?;
    }
    thread::sleep(Duration::from_millis(5));
    Ok(())
}

fn writes(socket: &Path) -> Result<()> {
    let mut client = Client::open(socket, "replica/vm")?;
    let (start, data) = (Instant::now(), vec![7; 1 << 20]);
    for index in 0.. {
        client.write((index % 64) << 20, &data, FUA)?;
        if start.elapsed() >= BOUT {
            break;
        }
    }
    Ok(())
}

fn sends_garbage(socket: &Path) -> Result<()> {
    let mut client = Client::open(socket, "image/base")?;
    let stream = client.stream();
    // It may hang up before it has read all.
    let _ = stream.write_all(&[0xff; 64 << 10]);
    Ok(())
}

fn comes_and_goes(socket: &Path) -> Result<()> {
    let start = Instant::now();
    while start.elapsed() < BOUT {
        let stream = UnixStream::connect(socket)?;
        stream.shutdown(Shutdown::Both)?;
    }
    Ok(())
}

fn stalls(socket: &Path) -> Result<()> {
    let (mut strangers, mut clients) = (Vec::new(), Vec::new());
    for _ in 0..250 {
        let mut stream = UnixStream::connect(socket)?;
        stream.write_all(&[0, 0, 0])?;
        strangers.push(stream);
        let mut client = Client::open(socket, "image/base")?;
        client.stream().write_all(&request(READ, 0, 1, 0, 4096)[..27])?;
        clients.push(client);
    }
    thread::sleep(4 * BOUT);
    Ok(())
}
