//! What the contestants are run on: reads of chunks, second by second.

use std::collections::HashSet;
use std::io::{BufRead, BufReader};
use std::path::Path;

use anyhow::{Context, Result, ensure};

/// One read of one chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Access {
    pub second: u64,
    pub chunk: u64,
}

/// How repeated reads of a chunk are counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Counting {
    /// Every I/O, as if none was answered by the page cache.
    Every,
    /// The first of a chunk in each second: the page cache, or a merged request, answers the rest.
    OneASecond,
}

impl Counting {
    pub const ALL: [Counting; 2] = [Counting::OneASecond, Counting::Every];

    pub fn name(self) -> &'static str {
        match self {
            Counting::Every => "every I/O",
            Counting::OneASecond => "one a second",
        }
    }
}

/// A load: its name and its reads, in bytes, in the order of time.
pub struct Load {
    pub name: String,
    pub reads: Vec<Read>,
}

/// A read of a device.
#[derive(Clone, Copy, Debug)]
pub struct Read {
    pub second: u64,
    pub offset: u64,
    pub len: u64,
}

impl Load {
    /// The reads of a trace of CloudPhysics, as CSV: version, time, SCSI operation, size, sector.
    ///
    /// The time counts seconds, whatever the README beside it says: as microseconds the two hours
    /// would be 7 ms.
    pub fn cloudphysics(path: &Path) -> Result<Load> {
        let file =
            std::fs::File::open(path).with_context(|| format!("opening {}", path.display()))?;
        let lines = BufReader::new(flate2::read::GzDecoder::new(file)).lines();
        let mut reads = Vec::new();
        for (number, line) in lines.enumerate().skip(1) {
            let line = line.with_context(|| format!("reading {}", path.display()))?;
            let fields: Vec<&str> = line.split(',').collect();
            let wrong = || format!("{}: line {}: {line:?}", path.display(), number + 1);
            ensure!(fields.len() == 5, wrong());
            if fields[2] != "28" {
                continue;
            }
            let (second, len) = (fields[1].parse::<u64>(), fields[3].parse::<u64>());
            let (second, len) = (second.with_context(wrong)?, len.with_context(wrong)?);
            let sector: u64 = fields[4].parse().with_context(wrong)?;
            ensure!(len > 0 && sector < 1 << 48, wrong());
            let late = reads.last().is_some_and(|read: &Read| read.second > second);
            ensure!(!late, "{}: time runs backwards", wrong());
            reads.push(Read { second, offset: sector * 512, len });
        }
        ensure!(!reads.is_empty(), "{}: it holds no reads", path.display());
        Ok(Load { name: "cloudphysics".into(), reads })
    }

    /// Two hours: Zipf's law (0.9) over 64 Ki blocks of 64 KiB at random places, 512 of its
    /// favourites replaced every twenty minutes; and every ten minutes a scan of 1 GiB at 128
    /// MiB/s, each time of another range.
    pub fn synthetic(seed: u64) -> Load {
        const BLOCKS: u64 = 1 << 16;
        const BLOCK: u64 = 64 * 1024;
        const SECONDS: u64 = 7200;
        let mut random = fastrand::Rng::with_seed(seed);
        let mut weights = Vec::new();
        let mut sum = 0.0;
        for rank in 1..=BLOCKS {
            sum += 1.0 / (rank as f64).powf(0.9);
            weights.push(sum);
        }
        let mut places: Vec<u64> = (0..BLOCKS).collect();
        random.shuffle(&mut places);
        let mut reads = Vec::new();
        for second in 0..SECONDS {
            if second % 1200 == 1199 {
                places.rotate_left(512);
            }
            for _ in 0..random.u64(0..64) {
                let pick = random.f64() * sum;
                let rank = weights.partition_point(|&weight| weight < pick).min(places.len() - 1);
                for _ in 0..random.u64(1..4) {
                    let within = random.u64(0..16) * 4096;
                    let offset = places[rank] * BLOCK + within;
                    reads.push(Read { second, offset, len: 4096 });
                }
            }
            let (round, at) = (second / 600, second % 600);
            if (300..308).contains(&at) {
                let start = BLOCKS * BLOCK + round * (1 << 30) + (at - 300) * (128 << 20);
                let parts = (0..512).map(|part| start + part * (256 << 10));
                reads.extend(parts.map(|offset| Read { second, offset, len: 256 << 10 }));
            }
        }
        Load { name: format!("zipf and scans, seed {seed}"), reads }
    }

    /// The chunks that are read, counted so.
    pub fn accesses(&self, chunk: u64, counting: Counting) -> Vec<Access> {
        let mut all = Vec::new();
        let (mut second, mut seen) = (0, HashSet::new());
        for read in &self.reads {
            if read.second != second {
                seen.clear();
                second = read.second;
            }
            for chunk in read.offset / chunk..=(read.offset + read.len - 1) / chunk {
                if seen.insert(chunk) || counting == Counting::Every {
                    all.push(Access { second, chunk });
                }
            }
        }
        all
    }
}
