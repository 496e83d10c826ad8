//! Long work of the API: it runs on a thread of its own and tells its progress in lines.
//!
//! Invariants:
//! - The work is told to stop as soon as nobody listens any more, or the daemon stops.
//! - A client that reads slowly loses progress lines, never the last line; it holds nothing up.

use std::{
    convert::Infallible,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, Weak,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use axum::{
    body::{Body, Bytes},
    http::{Response, header},
};
use serde::Serialize;
use tokio::sync::{mpsc, watch};
use tokio_stream::StreamExt;

use crate::{
    control::event::{Event, Progress},
    error::{Error, Kind, Result},
};

/// How often progress is told. It also is how soon a client that vanished without a word is noticed.
const BEAT: Duration = Duration::from_millis(500);

/// The work that is under way, so that all of it can be told to stop.
#[derive(Default)]
pub struct Jobs(Mutex<Vec<Weak<AtomicBool>>>);

impl Jobs {
    /// Tells every piece of work to stop.
    pub fn cancel(&self) {
        for flag in self.flags().iter().filter_map(Weak::upgrade) {
            flag.store(true, Ordering::Release);
        }
    }

    fn enter(&self) -> Arc<AtomicBool> {
        let flag = Arc::new(AtomicBool::new(false));
        let mut flags = self.flags();
        flags.retain(|flag| flag.strong_count() > 0);
        flags.push(Arc::downgrade(&flag));
        flag
    }

    fn flags(&self) -> MutexGuard<'_, Vec<Weak<AtomicBool>>> {
        // A list of flags is whole after any panic.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What a piece of work needs to know of the world.
pub struct Job {
    progress: watch::Sender<Option<Progress>>,
    cancel: Arc<AtomicBool>,
}

impl Job {
    /// Says how far the work is. Cheap: only the latest word within half a second is told.
    pub fn report(&self, progress: Progress) {
        self.progress.send_replace(Some(progress));
    }

    /// Set once the work is to stop.
    pub fn cancel(&self) -> &Arc<AtomicBool> {
        &self.cancel
    }
}

/// Sets its flag when it goes: the answer's body holds it, and goes with the connection.
struct CancelOnDrop(Arc<AtomicBool>);

impl Drop for CancelOnDrop {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Release);
    }
}

/// Runs `work` on a thread that may block, and answers with its events, a line each.
pub fn stream<T, F>(jobs: &Jobs, work: F) -> Response<Body>
where
    T: Serialize + Send + 'static,
    F: FnOnce(&Job) -> Result<T> + Send + 'static,
{
    let (lines, answer) = mpsc::channel::<Bytes>(4);
    let (progress, told) = watch::channel(None);
    let cancel = jobs.enter();
    let guard = CancelOnDrop(cancel.clone());
    let job = Job { progress, cancel };
    let work = tokio::task::spawn_blocking(move || work(&job));
    tokio::spawn(tell(work, told, lines));
    let body = tokio_stream::wrappers::ReceiverStream::new(answer).map(move |line| {
        let _held_by_the_body = &guard;
        Ok::<_, Infallible>(line)
    });
    let mut response = Response::new(Body::from_stream(body));
    let kind = header::HeaderValue::from_static("application/x-ndjson");
    response.headers_mut().insert(header::CONTENT_TYPE, kind);
    response
}

async fn tell<T: Serialize>(
    work: tokio::task::JoinHandle<Result<T>>,
    mut told: watch::Receiver<Option<Progress>>,
    lines: mpsc::Sender<Bytes>,
) {
    let mut work = work;
    let mut beat = tokio::time::interval(BEAT);
    let last = loop {
        tokio::select! {
            result = &mut work => break result,
            _ = beat.tick() => {
                let progress = told.borrow_and_update().clone();
                if let Some(progress) = progress {
                    let _ = lines.try_send(line(&Event::<T>::Progress(progress)));
                }
            }
        }
    };
    let event = match last {
        Ok(Ok(result)) => Event::Done(result),
        Ok(Err(error)) => {
            // What of it concerns others is an event, told by the work itself.
            tracing::debug!(%error, "request failed");
            Event::Error((&error).into())
        }
        Err(panic) => {
            tracing::error!(%panic, "a job died");
            Event::Error((&Error::new(Kind::Io, "internal error; see the daemon's log")).into())
        }
    };
    // Nobody to hear it is fine: the client has gone.
    let _ = lines.send(line(&event)).await;
}

/// A line of a streamed answer.
pub(super) fn line(event: &impl Serialize) -> Bytes {
    let mut line = serde_json::to_vec(event).unwrap_or_else(|error| {
        // A type of ours that JSON has no words for; the client sees the line as broken.
        tracing::error!(%error, "an event that can't be told");
        Vec::new()
    });
    line.push(b'\n');
    line.into()
}
