//! What the threads of an import or a verification share: bounded queues, the first failure,
//! and how far they are.

use std::{
    collections::VecDeque,
    num::NonZero,
    path::Path,
    sync::{
        Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
        mpsc::{Receiver, RecvTimeoutError},
    },
    thread,
    time::Duration,
};

use nix::sys::statvfs::statvfs;

use super::stream::cancelled;
use crate::error::{Error, Kind, Result};

/// How often progress is told and cancellation looked for.
const TICK: Duration = Duration::from_millis(50);
/// Threads that hash, at most.
const MAX_WORKERS: usize = 4;

/// What an import or verification is doing.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize, utoipa::ToSchema,
)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// Storing a stream whose format needs reading at any offset.
    Receiving,
    /// Reading, hashing and writing the content.
    Importing,
    /// Making it durable.
    Syncing,
    /// Reading and hashing a copy.
    Verifying,
}

/// How far an import or verification is.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize, utoipa::ToSchema,
)]
pub struct Progress {
    /// What it is doing.
    pub phase: Phase,
    /// Bytes of the image's content that are done, holes included.
    pub done_bytes: u64,
    /// Bytes of the image's content, where that is known before its end.
    pub total_bytes: Option<u64>,
    /// Bytes received of a source that is a stream.
    pub source_bytes: u64,
    /// The length of a source that is a stream, where it is known.
    pub source_total: Option<u64>,
}

/// Shared by the threads of one piece of work.
pub(super) struct Control<'a> {
    pub(super) cancel: &'a AtomicBool,
    failure: Mutex<Option<Error>>,
    /// Bytes of content that are done.
    pub(super) done: AtomicU64,
    /// Bytes of content in all; 0 while unknown.
    pub(super) total: AtomicU64,
}

impl<'a> Control<'a> {
    pub(super) fn new(cancel: &'a AtomicBool) -> Control<'a> {
        Control {
            cancel,
            failure: Mutex::default(),
            done: AtomicU64::new(0),
            total: AtomicU64::new(0),
        }
    }

    /// Records a failure; the first one is what the caller is told.
    pub(super) fn fail(&self, error: Error) {
        locked(&self.failure).get_or_insert(error);
    }

    /// Whether something failed or the caller gave up: what is under way is in vain.
    pub(super) fn stopped(&self) -> bool {
        self.cancel.load(Relaxed) || locked(&self.failure).is_some()
    }

    /// Waits until every thread has dropped its end of `running`; tells progress meanwhile, and
    /// calls `stop` once something failed or the caller gave up, so that nobody waits for a queue.
    pub(super) fn watch(
        &self,
        running: &Receiver<()>,
        mut report: impl FnMut(),
        stop: impl Fn(),
    ) -> Result<()> {
        loop {
            report();
            if self.cancel.load(Relaxed) {
                self.fail(cancelled());
            }
            if self.stopped() {
                stop();
            }
            match running.recv_timeout(TICK) {
                Ok(()) | Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => break,
            }
        }
        match locked(&self.failure).take() {
            Some(error) => Err(error),
            None => Ok(()),
        }
    }
}

/// A bounded queue of any number of threads on either side.
pub(super) struct Queue<T> {
    state: Mutex<(VecDeque<T>, Open)>,
    changed: Condvar,
    bound: usize,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Open {
    Yes,
    No,
}

impl<T> Queue<T> {
    pub(super) fn new(bound: usize) -> Queue<T> {
        Queue {
            state: Mutex::new((VecDeque::with_capacity(bound), Open::Yes)),
            changed: Condvar::new(),
            bound,
        }
    }

    /// Waits for room and appends; `false` if the queue is closed.
    pub(super) fn push(&self, item: T) -> bool {
        let full =
            |state: &mut (VecDeque<T>, Open)| state.0.len() >= self.bound && state.1 == Open::Yes;
        let mut state = self
            .changed
            .wait_while(locked(&self.state), full)
            .unwrap_or_else(PoisonError::into_inner);
        if state.1 == Open::No {
            return false;
        }
        state.0.push_back(item);
        self.changed.notify_all();
        true
    }

    /// Waits for the next item; `None` once the queue is closed and empty.
    pub(super) fn pop(&self) -> Option<T> {
        let empty = |state: &mut (VecDeque<T>, Open)| state.0.is_empty() && state.1 == Open::Yes;
        let mut state = self
            .changed
            .wait_while(locked(&self.state), empty)
            .unwrap_or_else(PoisonError::into_inner);
        let item = state.0.pop_front();
        self.changed.notify_all();
        item
    }

    /// Nothing more will be pushed; what is there is still taken.
    pub(super) fn close(&self) {
        locked(&self.state).1 = Open::No;
        self.changed.notify_all();
    }

    /// Closes the queue and drops what is in it.
    pub(super) fn abort(&self) {
        let mut state = locked(&self.state);
        state.1 = Open::No;
        state.0.clear();
        self.changed.notify_all();
    }
}

/// How many threads hash.
pub(super) fn workers() -> usize {
    thread::available_parallelism().map_or(2, NonZero::get).clamp(2, MAX_WORKERS)
}

/// If `error` is that of a full disk, says what is free where `dir` is and what is needed.
pub(super) fn tell_of_full_disk(error: Error, dir: &Path, need: &str) -> Error {
    if error.kind() != Kind::NoSpace {
        return error;
    }
    let free =
        statvfs(dir).map_or(0, |stat| stat.blocks_available().saturating_mul(stat.fragment_size()));
    error.within(format!(
        "the disk is full ({free} bytes free; {need}): free space, or choose another disk \
         with --disk"
    ))
}

/// A lock whose holders leave the value sound even if they panic.
pub(super) fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
