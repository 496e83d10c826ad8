//! Verifying: a copy's `data` is read whole and compared with its chunk table.
//!
//! Reads bypass the page cache where the file system lets them, because it is the disk that is
//! asked, and because the cache belongs to the guests. Where the table says zeros and the file has
//! a hole, nothing is read. A chunk that can't be read is bad; verifying goes on.

use std::{
    fs::{File, OpenOptions},
    io,
    ops::Range,
    os::{
        fd::AsRawFd,
        unix::fs::{FileExt, MetadataExt, OpenOptionsExt},
    },
    sync::{
        Mutex,
        atomic::{AtomicBool, Ordering::Relaxed},
        mpsc::channel,
    },
    thread,
};

use nix::fcntl::OFlag;

use super::{
    ChunkTable,
    checksum::ChunkSum,
    pipeline::{Control, Phase, Progress, Queue, locked, workers},
};
use crate::{
    catalog::Digest,
    error::{Context, Result},
    io::holes,
    units::{BLOCK, CHUNK, Chunk},
};

/// Chunks that are read at once, as 2 MiB.
const UNIT_CHUNKS: u64 = 8;
/// Ranges that wait for a worker.
const TASKS: usize = 16;

/// What a verification found.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct VerifyReport {
    /// How many chunks the image has.
    pub chunks: u64,
    /// Those whose content isn't what the table says, or can't be read, in order.
    pub bad: Vec<u64>,
    /// Bytes that were read.
    pub bytes: u64,
    /// The digest that follows from the table.
    pub digest: Digest,
    /// Whether that is the digest that the table claims.
    pub digest_matches: bool,
    /// Whether the file is as long as the image.
    pub size_matches: bool,
}

impl VerifyReport {
    /// Whether the copy is what it should be.
    pub fn is_sound(&self) -> bool {
        self.bad.is_empty() && self.digest_matches && self.size_matches
    }
}

/// Reads `data`, the content of the copy that `table` belongs to, and compares. `what` names it in
/// errors; `progress` is called on this thread, about twenty times a second.
pub fn verify(
    data: &File,
    table: &ChunkTable,
    what: &str,
    progress: &dyn Fn(Progress),
    cancel: &AtomicBool,
) -> Result<VerifyReport> {
    let control = Control::new(cancel);
    let tasks = Queue::new(TASKS);
    let bad = Mutex::new(Vec::new());
    let read = std::sync::atomic::AtomicU64::new(0);
    let size = data.metadata().context(|| format!("examining {what}"))?.size();
    let direct = reopen_direct(data);
    let direct = direct.as_ref();
    control.total.store(table.size(), Relaxed);
    let (alive, running) = channel::<()>();
    thread::scope(|scope| {
        for _ in 0..workers() {
            let alive = alive.clone();
            scope.spawn(|| {
                let _alive = alive;
                let mut buf = AlignedBuf::new((UNIT_CHUNKS * CHUNK) as usize);
                while let Some(range) = tasks.pop() {
                    let found = check(data, direct, table, &range, buf.bytes());
                    read.fetch_add(found.read, Relaxed);
                    control.done.fetch_add((range.end - range.start) * CHUNK, Relaxed);
                    locked(&bad).extend(found.bad);
                }
            });
        }
        let (control, tasks) = (&control, &tasks);
        scope.spawn(move || {
            let _alive = alive;
            feed(data, table, tasks, control)
                .context(|| format!("looking for data in {what}"))
                .unwrap_or_else(|error| control.fail(error));
            tasks.close();
        });
        let report = || {
            progress(Progress {
                phase: Phase::Verifying,
                done_bytes: control.done.load(Relaxed).min(table.size()),
                total_bytes: Some(table.size()),
                source_bytes: 0,
                source_total: None,
            });
        };
        control.watch(&running, report, || tasks.abort())
    })?;
    let mut bad = bad.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner);
    bad.sort_unstable();
    let digest = table.compute_digest();
    Ok(VerifyReport {
        chunks: table.chunks(),
        bad,
        bytes: read.into_inner(),
        digest,
        digest_matches: digest == table.digest(),
        size_matches: size == table.size(),
    })
}

/// Queues the chunks that hold data by the table or by the file; the others are zeros in both.
fn feed(
    data: &File,
    table: &ChunkTable,
    tasks: &Queue<Range<u64>>,
    control: &Control<'_>,
) -> io::Result<()> {
    let mut next = 0;
    let mut held = 0..0;
    let mut pending = 0..0;
    while next < table.chunks() && !control.stopped() {
        if held.end <= next {
            let found = holes::next_data(data, next * CHUNK, table.size())?;
            held = found
                .map_or(u64::MAX..u64::MAX, |data| data.start / CHUNK..data.end.div_ceil(CHUNK));
        }
        let from_table = table.next_data(Chunk(next)).map_or(u64::MAX, |chunk| chunk.0);
        let chunk = from_table.min(held.start.max(next)).min(table.chunks());
        control.done.fetch_add((chunk - next) * CHUNK, Relaxed);
        if chunk != pending.end || chunk % UNIT_CHUNKS == 0 || chunk == table.chunks() {
            if !pending.is_empty() && !tasks.push(pending) {
                return Ok(());
            }
            pending = chunk..chunk;
        }
        if chunk < table.chunks() {
            pending.end = chunk + 1;
        }
        next = chunk + 1;
    }
    if !pending.is_empty() {
        tasks.push(pending);
    }
    Ok(())
}

struct Found {
    bad: Vec<u64>,
    read: u64,
}

/// Reads a range of chunks and compares each with the table.
fn check(
    data: &File,
    direct: Option<&File>,
    table: &ChunkTable,
    range: &Range<u64>,
    buf: &mut [u8],
) -> Found {
    let start = range.start * CHUNK;
    let wanted = (range.end * CHUNK).min(table.size()) - start;
    let whole = &mut buf[..((range.end - range.start) * CHUNK) as usize];
    let held = read_past_cache(data, direct, whole, start).unwrap_or(0);
    let mut found = Found { bad: Vec::new(), read: wanted.min(held as u64) };
    for chunk in range.clone().map(Chunk) {
        let at = (chunk.offset() - start) as usize;
        let len = table.chunk_len(chunk);
        let sound = if at + len <= held {
            table.sum(chunk) == Some(ChunkSum::of(&whole[at..at + len]))
        } else {
            // One bad sector fails the read of the range: the others are tried by themselves.
            let part = &mut whole[at..at + CHUNK as usize];
            let again = read_past_cache(data, direct, part, chunk.offset());
            again.is_ok_and(|held| held >= len)
                && table.sum(chunk) == Some(ChunkSum::of(&part[..len]))
        };
        if !sound {
            found.bad.push(chunk.0);
        }
    }
    found
}

/// Reads whole chunks until `buf` is full or the file ends: from the disk where that can be had, since what
/// the page cache holds of a bad sector says nothing of it.
fn read_past_cache(
    data: &File,
    direct: Option<&File>,
    buf: &mut [u8],
    offset: u64,
) -> io::Result<usize> {
    match direct.map(|file| read_up_to(file, buf, offset)) {
        // The file system takes the flag and refuses the reads.
        Some(Err(error)) if error.kind() == io::ErrorKind::InvalidInput => {}
        Some(read) => return read,
        None => {}
    }
    read_up_to(data, buf, offset)
}

/// Reads until `buf` is full or the file ends.
fn read_up_to(file: &File, buf: &mut [u8], offset: u64) -> io::Result<usize> {
    let mut held = 0;
    while held < buf.len() {
        match file.read_at(&mut buf[held..], offset + held as u64) {
            Ok(0) => break,
            Ok(count) => held += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
        if !held.is_multiple_of(BLOCK as usize) {
            break;
        }
    }
    Ok(held)
}

/// The same file, opened so that reads bypass the page cache, where that can be had.
fn reopen_direct(file: &File) -> Option<File> {
    OpenOptions::new()
        .read(true)
        .custom_flags(OFlag::O_DIRECT.bits())
        .open(format!("/proc/self/fd/{}", file.as_raw_fd()))
        .ok()
}

/// Memory aligned for direct reads.
struct AlignedBuf {
    memory: Vec<u8>,
    start: usize,
    len: usize,
}

impl AlignedBuf {
    fn new(len: usize) -> AlignedBuf {
        let memory = vec![0; len + BLOCK as usize];
        let start = memory.as_ptr().align_offset(BLOCK as usize).min(BLOCK as usize);
        AlignedBuf { memory, start, len }
    }

    fn bytes(&mut self) -> &mut [u8] {
        &mut self.memory[self.start..self.start + self.len]
    }
}
