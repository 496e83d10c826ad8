//! A guest: one client that writes, trims, flushes and reads a replica, and compares what it reads.

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Error, Result};
use fastrand::Rng;

use super::model::{Content, SECTOR, ZEROS, fill, number};
use crate::nbd::{Client, FUA, Failure};

/// Between two requests: moves must be able to catch up.
const PAUSE: std::ops::Range<u64> = 0..4000;
/// The most sectors of a request, as a power of two.
const LONGEST: u32 = 8;
/// Of sixteen requests those below this are reads (and a flush); the next trims, and the next zeroes.
const READS: u8 = 7;
const ZEROING: u8 = READS + 1;
/// How often a guest tries to connect again, and for how long.
const AGAIN: Duration = Duration::from_millis(50);
const PATIENCE: Duration = Duration::from_secs(90);

/// What the guests of a run share.
pub struct Hours {
    /// The daemon is about to be killed, or dead: connections may be lost.
    pub dying: AtomicBool,
    /// How often it was killed. The kernel may cut a connection long after that: when the rings of the dead
    /// have got answers from a disk that is ill.
    pub deaths: AtomicU64,
    /// Guests are to go home.
    pub over: AtomicBool,
    /// Whether guests connect again, or their day ends with their connection.
    pub again: bool,
}

impl Hours {
    /// A day that begins.
    pub fn new(again: bool) -> Hours {
        let (dying, deaths, over) = Default::default();
        Hours { dying, deaths, over, again }
    }

    /// The daemon is killed now.
    pub fn die(&self) {
        self.deaths.fetch_add(1, Ordering::SeqCst);
        self.dying.store(true, Ordering::SeqCst);
    }

    /// Whether the daemon may be gone.
    pub fn is_dying(&self) -> bool {
        self.dying.load(Ordering::SeqCst)
    }
}

/// What guests have seen.
#[derive(Default)]
pub struct Seen {
    /// Requests that were answered.
    pub requests: AtomicU64,
    /// Of those, reads, all of them compared; in bytes.
    pub compared: AtomicU64,
    /// Requests that failed.
    pub errors: AtomicU64,
    /// The longest that a read took, in microseconds.
    pub worst: AtomicU64,
}

/// A guest at a replica.
pub struct Guest {
    /// The NBD socket.
    pub socket: PathBuf,
    /// The replica's name.
    pub replica: String,
    /// What it holds.
    pub content: Arc<Mutex<Content>>,
    /// What becomes of its figures.
    pub seen: Arc<Seen>,
    /// Whether requests may fail: nothing else has the image's content.
    pub may_fail: bool,
    /// It writes to the first of so many parts: what it reads of the others is the image's.
    pub parts: usize,
    /// Decides what it does.
    pub rng: Rng,
    /// The connection to begin with.
    pub client: Option<Client>,
}

impl Guest {
    /// Goes on until it is over, or the daemon is killed and guests don't connect again.
    pub fn run(mut self, hours: &Hours) -> Result<()> {
        let who = format!("a client of replica {}", self.replica);
        while !hours.over.load(Ordering::SeqCst) {
            let deaths = hours.deaths.load(Ordering::SeqCst);
            let client = match self.client.take() {
                Some(client) => Some(client),
                None => self.connect(hours).with_context(|| who.clone())?,
            };
            let Some(mut client) = client else { return Ok(()) };
            let ended = self.visit(&mut client, hours);
            if let Some(lost) = ended.with_context(|| who.clone())? {
                if hours.deaths.load(Ordering::SeqCst) == deaths {
                    return Err(lost.context(who));
                }
                if !hours.again {
                    return Ok(());
                }
            }
        }
        Ok(())
    }

    fn connect(&self, hours: &Hours) -> Result<Option<Client>> {
        let export = format!("replica/{}", self.replica);
        let started = Instant::now();
        loop {
            // Told apart from one that is refused while the daemon is well.
            let dying = hours.is_dying();
            match Client::open(&self.socket, &export) {
                Ok(client) => return Ok(Some(client)),
                Err(_) if hours.over.load(Ordering::SeqCst) => return Ok(None),
                Err(_) if hours.is_dying() && !hours.again => return Ok(None),
                Err(_)
                    if (dying || hours.is_dying() || self.may_fail)
                        && started.elapsed() < PATIENCE =>
                {
                    thread::sleep(AGAIN);
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// One connection, until it is over, or lost: then why. The error is for what must not be.
    fn visit(&mut self, client: &mut Client, hours: &Hours) -> Result<Option<Error>> {
        self.content(|content| content.grow(client.size()));
        let sectors = client.size() as usize / SECTOR;
        while !hours.over.load(Ordering::SeqCst) {
            match self.request(client, sectors)? {
                Ok(()) => {
                    self.seen.requests.fetch_add(1, Ordering::Relaxed);
                }
                Err(Failure::Lost(error)) => return Ok(Some(error)),
                Err(Failure::Refused(_)) if self.may_fail => {
                    self.seen.errors.fetch_add(1, Ordering::Relaxed);
                }
                Err(failure) => {
                    return Err(Error::from(failure).context("a request failed"));
                }
            }
            thread::sleep(Duration::from_micros(self.rng.u64(PAUSE)));
        }
        Ok(None)
    }

    /// One request. The outer error is for content that is wrong.
    fn request(&mut self, client: &mut Client, sectors: usize) -> Result<Result<(), Failure>> {
        let kind = self.rng.u8(..16);
        let within = if kind < READS { sectors } else { sectors / self.parts };
        let longest = 1 << self.rng.u32(..=LONGEST);
        let (mut first, mut count) = (self.rng.usize(..within), self.rng.usize(1..=longest));
        if self.rng.u8(..3) > 0 {
            // As file systems do it.
            (first, count) = (first / 8 * 8, count.next_multiple_of(8));
        }
        count = count.min(within - first);
        let flags = if self.rng.u8(..16) == 0 { FUA } else { 0 };
        let (offset, len) = ((first * SECTOR) as u64, count * SECTOR);
        match kind {
            0 => Ok(client.flush()),
            1..READS => {
                let mut found = vec![0; len];
                let started = Instant::now();
                let read = client.read(offset, &mut found);
                if read.is_ok() {
                    let took = started.elapsed().as_micros() as u64;
                    self.seen.worst.fetch_max(took, Ordering::Relaxed);
                    self.content(|content| content.compare(first, &found))?;
                    self.seen.compared.fetch_add(len as u64, Ordering::Relaxed);
                }
                Ok(read)
            }
            kind => {
                let number = if kind < READS + 2 { ZEROS } else { number() };
                self.content(|content| content.begin(first, count, number));
                let done = match kind {
                    READS => client.trim(offset, len, flags),
                    ZEROING => client.zero(offset, len, flags),
                    _ => {
                        let data: Vec<u8> =
                            (first..first + count).flat_map(|at| fill(number, at)).collect();
                        client.write(offset, &data, flags)
                    }
                };
                // A trim may leave what was there.
                if done.is_ok() && kind != READS {
                    self.content(|content| content.done(first, count, number));
                }
                Ok(done)
            }
        }
    }

    fn content<T>(&self, with: impl FnOnce(&mut Content) -> T) -> T {
        with(&mut self.content.lock().unwrap_or_else(PoisonError::into_inner))
    }
}
