//! A block device as a client uses it that can't wait for ever: each request within a limit.
//!
//! Past the page cache, so that every answer is the device's own.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};
use nix::fcntl::OFlag;

use crate::pattern;

/// How long a request may take where nothing is slow on purpose.
pub const LIMIT: Duration = Duration::from_secs(20);

/// An open block device.
pub struct Limited {
    file: Arc<File>,
    name: String,
}

/// A request that is under way.
pub struct Request<T> {
    answer: Receiver<io::Result<T>>,
    since: Instant,
    what: String,
}

impl Limited {
    /// Opens a device for reading and writing, or for reading where it takes no writes.
    pub fn open(path: &str) -> Result<Limited> {
        let open = |write| {
            let mut options = OpenOptions::new();
            options.read(true).write(write).custom_flags(OFlag::O_DIRECT.bits()).open(path)
        };
        let file =
            open(true).or_else(|_| open(false)).with_context(|| format!("opening {path}"))?;
        Ok(Limited { file: Arc::new(file), name: path.to_string() })
    }

    /// Stands in the place of a device that is closed for a while.
    pub fn nothing() -> Result<Limited> {
        let file = File::open("/dev/null").context("opening /dev/null")?;
        Ok(Limited { file: Arc::new(file), name: "nothing".to_string() })
    }

    /// Starts to read.
    pub fn begin_read(&self, offset: u64, len: usize) -> Request<Vec<u8>> {
        self.begin(format!("reading {len} bytes at {offset}"), move |file| {
            let mut memory = vec![0; len + 4096];
            let skip = memory.as_ptr().align_offset(4096);
            file.read_exact_at(&mut memory[skip..skip + len], offset)?;
            Ok(memory[skip..skip + len].to_vec())
        })
    }

    /// Starts to write.
    pub fn begin_write(&self, offset: u64, data: &[u8]) -> Request<()> {
        let data = data.to_vec();
        self.begin(format!("writing {} bytes at {offset}", data.len()), move |file| {
            let mut memory = vec![0; data.len() + 4096];
            let skip = memory.as_ptr().align_offset(4096);
            memory[skip..skip + data.len()].copy_from_slice(&data);
            file.write_all_at(&memory[skip..skip + data.len()], offset)
        })
    }

    /// Starts to flush.
    pub fn begin_flush(&self) -> Request<()> {
        self.begin("flushing".to_string(), |file| file.sync_data())
    }

    /// Reads; what the device answered.
    pub fn read(&self, offset: u64, len: usize) -> Result<io::Result<Vec<u8>>> {
        self.begin_read(offset, len).end(LIMIT)
    }

    /// Writes; what the device answered.
    pub fn write(&self, offset: u64, data: &[u8]) -> Result<io::Result<()>> {
        self.begin_write(offset, data).end(LIMIT)
    }

    /// Flushes; what the device answered.
    pub fn flush(&self) -> Result<io::Result<()>> {
        self.begin_flush().end(LIMIT)
    }

    /// Fails unless these bytes are at `offset`.
    pub fn holds(&self, offset: u64, bytes: &[u8]) -> Result<()> {
        let place = || format!("{}: {} bytes at {offset}", self.name, bytes.len());
        let found = self.read(offset, bytes.len())?.with_context(place)?;
        match pattern::differ(&found, bytes) {
            None => Ok(()),
            Some(at) => bail!("{}: byte {} is {:#x}", place(), offset + at as u64, found[at]),
        }
    }

    fn begin<T: Send + 'static>(
        &self,
        what: String,
        work: impl FnOnce(&File) -> io::Result<T> + Send + 'static,
    ) -> Request<T> {
        let (tell, answer) = mpsc::channel();
        let file = self.file.clone();
        // Not joined: one that hangs must not hang the test, which ends with the guest then.
        thread::spawn(move || {
            let answer = work(&file);
            // Who has the answer may close the device, and then it is closed.
            drop(file);
            tell.send(answer)
        });
        Request { answer, since: Instant::now(), what: format!("{}: {what}", self.name) }
    }
}

impl<T> Request<T> {
    /// Waits for its end, until it has been under way for `limit`.
    pub fn end(self, limit: Duration) -> Result<io::Result<T>> {
        let left = limit.saturating_sub(self.since.elapsed());
        let answer = self.answer.recv_timeout(left);
        answer.map_err(|_| anyhow!("{}: no answer after {} s", self.what, limit.as_secs()))
    }

    /// Fails if there is an answer already.
    pub fn waits(&self) -> Result<()> {
        match self.answer.try_recv() {
            Err(mpsc::TryRecvError::Empty) => Ok(()),
            Ok(Ok(_)) => bail!("{}: done, though its disk hangs", self.what),
            Ok(Err(error)) => bail!("{}: {error}, though its disk only hangs", self.what),
            Err(error) => bail!("{}: {error}", self.what),
        }
    }
}

/// Fails unless the answer is this error.
pub fn refused<T>(answer: io::Result<T>, codes: &[i32], what: &str) -> Result<()> {
    let Err(error) = answer else { bail!("{what}: it succeeded") };
    let code = error.raw_os_error().unwrap_or(0);
    ensure!(codes.contains(&code), "{what}: {error}, not one of {codes:?}");
    Ok(())
}
