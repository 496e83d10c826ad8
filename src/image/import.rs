//! Importing: a source becomes `data` and `chunks` in a directory, in one pass.
//!
//! ```text
//! feeder ──tasks──> workers ──pieces──> io::bulk ──> data
//!    ^                 │  └─> TableBuilder ──> chunks      (at the end)
//!    └────spare buffers┴────────────┘
//! ```
//!
//! The feeder says what to do (a chunk of a stream, or a range to read of a file that can be read
//! at any offset); workers read or decompress, hash, and drop zeros; one thread writes. Buffers
//! circulate: there are [`BUFFERS`] of them, whatever the image's size.
//!
//! Invariants:
//! - Success means: `data` and `chunks` are complete, synced and read-only, and the source had the
//!   SHA-256 that was asked for. After an error the directory holds fragments; its owner removes
//!   it.
//! - Only blocks that are not all zeros are written.

use std::{
    fs::{File, OpenOptions, Permissions},
    io,
    ops::Range,
    os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt},
    path::Path,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
        mpsc::{Sender, channel},
    },
    thread,
};

use sha2::{Digest as _, Sha256};
use tokio::sync::mpsc;

use super::{
    CHUNKS_FILE, DATA_FILE, MAX_IMAGE, TableBuilder,
    checksum::ChunkSum,
    content::{Content, Format, Scratch, padded_size, read_exact},
    intake::{Body, Decoded, Intake, Original},
    pipeline::{Control, Phase, Progress, Queue, locked, tell_of_full_disk, workers},
    source::Source,
    stream::{Received, cancelled},
};
use crate::{
    catalog::Digest,
    error::{Context, Error, Kind, Result},
    io::bulk::{Piece, write_pieces},
    units::{CHUNK, Chunk, SECTOR, round_down},
};

/// Chunks in memory at once: 16 MiB in all.
const BUFFERS: usize = 64;
/// Tasks that wait for a worker.
const TASKS: usize = 16;
/// What a worker reads at a time, in bytes. Not less than a compressed cluster of any format, so
/// that none is decompressed twice.
const UNIT: u64 = 2 << 20;

/// What to import.
#[derive(Debug)]
pub struct ImportRequest {
    /// What the image will be called; for messages only.
    pub name: String,
    /// Where it comes from.
    pub source: Source,
    /// What its bytes are, once decompressed.
    pub format: Format,
    /// The SHA-256 that the source's bytes must have, as they are (compressed or not).
    pub sha256: Option<Digest>,
}

/// What was imported.
#[derive(Clone, Debug, serde::Serialize)]
pub struct Imported {
    /// The image's identity.
    pub digest: Digest,
    /// The image's size in bytes, a multiple of 512.
    pub size: u64,
    /// Bytes that `data` and `chunks` occupy on the disk.
    pub stored_bytes: u64,
    /// What the source was.
    pub format: Format,
    /// The source's name, fit to be shown and recorded.
    pub source: String,
    /// SHA-256 of the source's bytes: of streams always, of files if it was asked for.
    pub source_sha256: Option<Digest>,
}

enum Task {
    /// A chunk of a stream.
    Chunk(Chunk, Vec<u8>),
    /// A range to read, of whole chunks but for the end.
    Read(Arc<Content>, Range<u64>),
}

/// Imports `request.source` into the directory `stage`, where neither `data` nor `chunks` exist
/// yet.
///
/// `progress` is called on this thread, about twenty times a second. Setting `cancel` ends the
/// import with [`Kind::Cancelled`] within a fraction of a second. Blocks; not for async threads.
pub fn import(
    request: ImportRequest,
    stage: &Path,
    progress: &dyn Fn(Progress),
    cancel: &AtomicBool,
) -> Result<Imported> {
    let name = request.name.clone();
    let job = Job {
        control: Control::new(cancel),
        received: Arc::default(),
        tasks: Queue::new(TASKS),
        spare: Queue::new(BUFFERS),
        table: Mutex::default(),
        stage,
    };
    job.run(request, progress).map_err(|error| error.within(format!("importing image {name}")))
}

struct Job<'a> {
    control: Control<'a>,
    received: Arc<Received>,
    tasks: Queue<Task>,
    spare: Queue<Vec<u8>>,
    table: Mutex<TableBuilder>,
    stage: &'a Path,
}

impl Job<'_> {
    fn run(self, request: ImportRequest, progress: &dyn Fn(Progress)) -> Result<Imported> {
        let report = |phase| progress(self.progress(phase));
        report(Phase::Receiving);
        let Intake { name, format, body, original } = Intake::open(
            request.source,
            request.format,
            self.received.clone(),
            self.control.cancel,
        )?
        .spool(self.stage, || report(Phase::Receiving))?;

        let data = self.create(DATA_FILE)?;
        let to_hash = original.as_ref().filter(|_| request.sha256.is_some());
        let (size, source_sha256) =
            self.copy(body, to_hash, &name, &data, || report(Phase::Importing))?;
        if let Some(original) = original {
            original.check_unchanged(&name)?;
        }
        if let (Some(wanted), Some(found)) = (request.sha256, source_sha256)
            && wanted != found
        {
            return Err(Error::new(
                Kind::Corrupt,
                format!(
                    "{name} has SHA-256 {found}, but {wanted} was asked for: \
                     get it again, or correct --sha256"
                ),
            ));
        }

        report(Phase::Syncing);
        let table = std::mem::take(&mut *locked(&self.table)).finish(size);
        let chunks = self.create(CHUNKS_FILE)?;
        data.set_len(size).context(|| self.writing(DATA_FILE))?;
        table
            .store(&chunks, &self.stage.join(CHUNKS_FILE).display().to_string())
            .map_err(|error| tell_of_full_disk(error, self.stage, "only the table is missing"))?;
        let mut stored_bytes = 0;
        for (file, name) in [(&data, DATA_FILE), (&chunks, CHUNKS_FILE)] {
            file.set_permissions(Permissions::from_mode(0o400)).context(|| self.writing(name))?;
            file.sync_all().map_err(|error| self.write_failure(name, error))?;
            stored_bytes += file.metadata().context(|| self.writing(name))?.blocks() * 512;
        }
        if self.control.cancel.load(Relaxed) {
            return Err(cancelled());
        }
        Ok(Imported {
            digest: table.digest(),
            size,
            stored_bytes,
            format,
            source: name,
            source_sha256,
        })
    }

    /// Copies the content of `body` into `data` and its sums into the table, and hashes `original`
    /// meanwhile. Returns the image's size, and the source's SHA-256 as far as it is known.
    fn copy(
        &self,
        body: Body<'_>,
        original: Option<&Original>,
        name: &str,
        data: &File,
        report: impl FnMut(),
    ) -> Result<(u64, Option<Digest>)> {
        for _ in 0..BUFFERS {
            self.spare.push(Vec::new());
        }
        let size = AtomicU64::new(0);
        let sha256 = Mutex::new(None);
        let (pieces, written) = mpsc::channel(BUFFERS);
        let (alive, running) = channel();
        thread::scope(|scope| {
            let start = |name, work| self.start(scope, name, alive.clone(), work);
            start(
                "import-write",
                Box::new(|| {
                    let spent = |buf| {
                        self.spare.push(buf);
                    };
                    write_pieces(data, written, spent)
                        .map_err(|error| self.write_failure(DATA_FILE, error))
                }),
            );
            for _ in 0..workers() {
                let pieces = pieces.clone();
                start("import-hash", Box::new(move || self.work(&pieces)));
            }
            drop(pieces);
            start(
                "import-read",
                Box::new(|| {
                    let fed = match body {
                        Body::Content { content, source_sha256 } => {
                            self.feed_content(content).map(|size| (size, source_sha256))
                        }
                        Body::Stream(stream) => self.feed_stream(stream),
                    };
                    // The workers end when there is no more to do, and the writer ends with them.
                    self.tasks.close();
                    let (bytes, digest) = fed?;
                    size.store(padded_size(bytes, name)?, Relaxed);
                    if digest.is_some() {
                        *locked(&sha256) = digest;
                    }
                    Ok(())
                }),
            );
            if let Some(original) = original {
                start(
                    "import-sha256",
                    Box::new(|| {
                        *locked(&sha256) = Some(self.hash(original, name)?);
                        Ok(())
                    }),
                );
            }
            drop(alive);
            self.control.watch(&running, report, || {
                self.tasks.abort();
                self.spare.abort();
            })
        })?;
        let sha256 = *locked(&sha256);
        Ok((size.into_inner(), sha256))
    }

    /// Runs `work` on a thread that holds `alive` until it ends; its failure is the import's.
    fn start<'scope>(
        &'scope self,
        scope: &'scope thread::Scope<'scope, '_>,
        name: &str,
        alive: Sender<()>,
        work: Box<dyn FnOnce() -> Result<()> + Send + 'scope>,
    ) {
        let spawned = thread::Builder::new().name(name.to_owned()).spawn_scoped(scope, move || {
            let _alive = alive;
            work().unwrap_or_else(|error| self.control.fail(error));
        });
        if let Err(error) = spawned {
            self.control.fail(Error::io("starting a thread for the import", error));
        }
    }

    /// Makes tasks of what holds data; returns the content's size in bytes.
    fn feed_content(&self, content: Content) -> Result<u64> {
        let size = content.size();
        self.control.total.store(size, Relaxed);
        let content = Arc::new(content);
        let mut scratch = Scratch::default();
        // What was looked through, and what is queued or known to be zeros: whole chunks.
        let (mut at, mut next) = (0, 0);
        while let Some(data) = content.next_data(at, &mut scratch)? {
            if self.control.stopped() {
                return Ok(size);
            }
            at = data.end;
            let start = round_down(data.start, CHUNK).max(next);
            self.control.done.fetch_add(start - next, Relaxed);
            next = start;
            if data.is_empty() {
                continue;
            }
            let end = data.end.next_multiple_of(CHUNK).min(size);
            while next < end {
                let stop = (round_down(next, UNIT) + UNIT).min(end);
                if !self.tasks.push(Task::Read(content.clone(), next..stop)) {
                    return Ok(size);
                }
                next = stop;
            }
            at = at.max(next);
        }
        self.control.done.fetch_add(size - next, Relaxed);
        Ok(size)
    }

    /// Makes tasks of the chunks of a stream; returns its size in bytes and its source's SHA-256.
    fn feed_stream(&self, mut stream: Decoded<'_>) -> Result<(u64, Option<Digest>)> {
        self.control.total.store(stream.length.unwrap_or(0), Relaxed);
        let mut size = 0;
        while let Some(mut buf) = self.spare.pop() {
            buf.resize(CHUNK as usize, 0);
            let count = stream.fill(&mut buf)?;
            buf.truncate(count);
            // An image that grows past what is served is noticed here, not at its end.
            if count == 0 || size + count as u64 > MAX_IMAGE {
                size += count as u64;
                break;
            }
            buf.resize(count.next_multiple_of(SECTOR as usize), 0);
            if !self.tasks.push(Task::Chunk(Chunk::at(size), buf)) {
                break;
            }
            size += count as u64;
        }
        Ok((size, stream.source_sha256()))
    }

    /// Does tasks until there are no more.
    fn work(&self, pieces: &mpsc::Sender<Piece>) -> Result<()> {
        let mut scratch = Scratch::default();
        while let Some(task) = self.tasks.pop() {
            match task {
                Task::Chunk(chunk, buf) => {
                    if !self.settle(chunk, buf, pieces) {
                        break;
                    }
                }
                Task::Read(content, range) => {
                    let size = content.size().next_multiple_of(SECTOR);
                    let mut at = range.start;
                    while at < range.end {
                        let Some(mut buf) = self.spare.pop() else { return Ok(()) };
                        buf.resize((size - at).min(CHUNK) as usize, 0);
                        content.read(at, &mut buf, &mut scratch)?;
                        if !self.settle(Chunk::at(at), buf, pieces) {
                            return Ok(());
                        }
                        at += CHUNK;
                    }
                }
            }
        }
        Ok(())
    }

    /// Records the sums of a chunk and has its data written; `false` if the import has ended.
    fn settle(&self, chunk: Chunk, buf: Vec<u8>, pieces: &mpsc::Sender<Piece>) -> bool {
        let sum = ChunkSum::of(&buf);
        self.control.done.fetch_add(buf.len() as u64, Relaxed);
        if sum.is_zero() {
            return self.spare.push(buf);
        }
        locked(&self.table).set(chunk, &sum);
        let runs = sum.data_runs(buf.len());
        pieces.blocking_send(Piece { buf, offset: chunk.offset(), runs }).is_ok()
    }

    /// The SHA-256 of a file that is read at any offset too.
    fn hash(&self, original: &Original, name: &str) -> Result<Digest> {
        let mut hasher = Sha256::new();
        let mut buf = vec![0; UNIT as usize];
        let mut at = 0;
        while at < original.length && !self.control.stopped() {
            let count = (original.length - at).min(UNIT) as usize;
            read_exact(&original.file, &mut buf[..count], at, name)?;
            hasher.update(&buf[..count]);
            at += count as u64;
        }
        Ok(Digest(hasher.finalize().into()))
    }

    fn progress(&self, phase: Phase) -> Progress {
        let known = |bytes| (bytes != 0).then_some(bytes);
        let total = self.control.total.load(Relaxed);
        let done = self.control.done.load(Relaxed);
        Progress {
            phase,
            done_bytes: if total == 0 { done } else { done.min(total) },
            total_bytes: known(total),
            source_bytes: self.received.bytes(),
            source_total: self.received.total(),
        }
    }

    fn create(&self, name: &str) -> Result<File> {
        OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(self.stage.join(name))
            .context(|| self.writing(name))
    }

    fn writing(&self, name: &str) -> String {
        format!("writing {}", self.stage.join(name).display())
    }

    fn write_failure(&self, name: &str, error: io::Error) -> Error {
        let done = self.control.done.load(Relaxed);
        let need = match self.control.total.load(Relaxed) {
            0 => format!("{done} bytes of the image are done, more are to come"),
            total => format!(
                "{done} bytes of the image are done, up to {} more are needed",
                total.saturating_sub(done)
            ),
        };
        tell_of_full_disk(Error::io(self.writing(name), error), self.stage, &need)
    }
}
