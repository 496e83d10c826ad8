//! Transmission: one connection's requests and replies, on the ring of one thread.
//!
//! Three kinds of tasks share a session: the reader parses every request that a receive
//! brought; workers, started as they are needed and used again, serve one request each at a time;
//! the sender puts every reply that is ready into one vectored send. In steady state a request costs
//! no allocation, no lock and no system call of its own. What is long goes piece by piece (`data`).
//!
//! Invariants:
//! - A request holds credit from its header on until its reply is sent: at most
//!   [`MAX_REQUESTS`] of them, and bytes of data as far as the session's [`Share`] goes.
//! - Every byte of a request's payload is taken from the stream, whether it is served or refused.
//! - The session ends when its last request has ended, whatever the client does meanwhile.

use std::{
    cell::{Cell, RefCell},
    collections::VecDeque,
    future::poll_fn,
    io,
    os::fd::OwnedFd,
    rc::Rc,
    sync::Arc,
    task::{Poll, Waker},
    time::Instant,
};

use nix::sys::socket::{Shutdown, shutdown};

mod data;
mod input;
mod outbox;

use data::Whole;
use input::Input;
use outbox::{Outbox, Parcel, Parts};

use super::{
    context::{Context, Contexts},
    reserve::Share,
    task::{Chunks, Durability, Refusal, Task, Terms},
    wire::{Answer, Command, Headers, MAX_PAYLOAD, Place, REQUEST_HEADER, Request, error},
};
use crate::{
    blockdev::{
        Device, Extent, Provision,
        device::caught,
        figures::{Operation, Operations},
    },
    error::{Error, Kind, Result},
    io::{
        Buf, Ring,
        batch::{Batch, Part},
        signal::Signal,
        yield_now,
    },
};

/// Requests that a connection may have under way.
pub const MAX_REQUESTS: usize = 128;

/// The longest payload of a BLOCK_STATUS that can be one: a length, and every context there is.
const FILTER: usize = 8 + 4 * Context::ALL.len();

/// What one BLOCK_STATUS looks at, in bytes, at most: clients ask again from where an answer ends.
const STATUS: u64 = 1 << 40;

/// What is served of one session, in bytes, before others have their turn: what needs no waiting could keep a
/// thread busy for long.
const TURN: usize = 128 << 10;

/// What a request without data counts as, in bytes.
const LEAST: usize = 4 << 10;

/// Why a session ended.
#[derive(Debug)]
pub enum End {
    /// The client said goodbye, or closed the connection between two requests.
    Clean,
    /// The connection broke, or the client did not speak the protocol.
    Broken(io::Error),
}

/// Serves a connection until it ends. `early` is what the client sent behind its handshake; what is
/// served is counted in `figures`, and what it has in memory in `share`.
pub async fn serve<D: Device<Ring>>(
    ring: Ring,
    socket: Arc<OwnedFd>,
    device: Arc<D>,
    terms: Terms,
    early: Vec<u8>,
    figures: Arc<Operations>,
    share: Share,
) -> End {
    let session = Rc::new(Session {
        ring: ring.clone(),
        socket,
        device,
        terms,
        figures,
        phase: Cell::new(Phase::Open),
        requests: Cell::new(0),
        share,
        credit: Signal::new(),
        served: Cell::new(0),
        queue: RefCell::default(),
        idle: RefCell::default(),
        workers: Cell::new(0),
        outbox: RefCell::default(),
        ready: Signal::new(),
    });
    ring.spawn(session.clone().send_replies());
    let end = match session.read_requests(early).await {
        Ok(()) => End::Clean,
        Err(error) => End::Broken(error),
    };
    session.credit.wait(|| session.requests.get() == 0).await;
    session.close();
    end
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Phase {
    Open,
    /// Replies can't be sent any more: they are dropped.
    Broken,
    /// Nothing is under way: the tasks end.
    Closed,
}

struct Session<D> {
    ring: Ring,
    socket: Arc<OwnedFd>,
    device: Arc<D>,
    terms: Terms,
    figures: Arc<Operations>,
    phase: Cell<Phase>,
    /// Requests under way, from their header until their reply is sent.
    requests: Cell<usize>,
    /// Bytes of data that they may hold.
    share: Share,
    /// Told when what is in memory gets less.
    credit: Signal,
    /// Bytes served since others had their turn.
    served: Cell<usize>,
    /// Requests that wait for a worker.
    queue: RefCell<VecDeque<Work>>,
    /// Workers that wait for a request, the last to finish first.
    idle: RefCell<Vec<Waker>>,
    workers: Cell<usize>,
    outbox: RefCell<Outbox>,
    /// Told when there are replies to send, or the session is closed.
    ready: Signal,
}

/// A request to serve, or a piece of one: what it asks, and the data it brought.
struct Work {
    answer: Answer,
    task: Task,
    /// The data of a write; memory for a read that is answered in one piece.
    data: Option<Buf>,
    /// Bytes of credit it holds.
    bytes: usize,
    /// When all of it was here.
    arrived: Instant,
    /// What it is a piece of.
    whole: Option<Rc<Whole>>,
}

impl<D: Device<Ring>> Session<D> {
    async fn read_requests(self: &Rc<Self>, early: Vec<u8>) -> io::Result<()> {
        let mut input = Input::new(self, early);
        loop {
            let mut header = [0; REQUEST_HEADER];
            let headers = self.terms.headers;
            if !input.take(&mut header[..headers.request()]).await? {
                return Ok(());
            }
            let invalid = |error| io::Error::new(io::ErrorKind::InvalidData, error);
            let request = Request::decode(headers, &header).map_err(invalid)?;
            if request.command == Command::Disconnect {
                return Ok(());
            }
            if headers == Headers::Extended && request.payload > u64::from(MAX_PAYLOAD) {
                // Of 64 bits: it is not waited for until that is skipped.
                let what = format!("a request with a payload of {} bytes", request.payload);
                return Err(io::Error::new(io::ErrorKind::InvalidData, what));
            }
            self.admit(&request, &mut input).await?;
            if self.phase.get() == Phase::Broken {
                // Nobody is there to be answered: what was sent ahead is not served.
                return Ok(());
            }
        }
    }

    /// Takes the request's payload and hands it to a worker, or refuses it.
    async fn admit(self: &Rc<Self>, request: &Request, input: &mut Input<'_, D>) -> io::Result<()> {
        let answer =
            Answer { headers: self.terms.headers, cookie: request.cookie, offset: request.offset };
        let (mut filter, mut payload) = ([0; FILTER], request.payload);
        let mut filtered = 0;
        if request.command == Command::BlockStatus && payload > 0 && payload <= FILTER as u64 {
            filtered = payload as usize;
            if !input.take(&mut filter[..filtered]).await? {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            payload = 0;
        }
        let filter = &filter[..filtered];
        let task = match Task::of(request, filter, self.device.info(), &self.terms) {
            Ok(task) => task,
            Err(Refusal { error, message }) => {
                input.skip(payload).await?;
                self.credit.wait(|| self.take_credit(0)).await;
                let part = failure(answer, request.command, error, message);
                self.send(None, Parcel { part, credit: Some(0), window: None });
                return Ok(());
            }
        };
        let (bytes, data) = self.room_for(task).await;
        if let Task::Write { offset, len, durability } = task {
            return self.receive(answer, (offset, len, durability), bytes, input).await;
        }
        let arrived = Instant::now();
        self.hand_over(Work { answer, task, data, bytes, arrived, whole: None });
        Ok(())
    }

    /// Gives a worker something to do.
    fn hand_over(self: &Rc<Self>, work: Work) {
        self.queue.borrow_mut().push_back(work);
        let idle = self.idle.borrow_mut().pop();
        match idle {
            Some(worker) => worker.wake(),
            None if self.workers.get() < MAX_REQUESTS => {
                self.workers.set(self.workers.get() + 1);
                self.ring.spawn(self.clone().work());
            }
            None => {}
        }
    }

    /// Takes the credit for a request, if it can be had now.
    fn take_credit(&self, bytes: usize) -> bool {
        let has = self.requests.get() < MAX_REQUESTS && self.share.take(bytes);
        self.requests.set(self.requests.get() + usize::from(has));
        has
    }

    fn give_credit(&self, requests: usize, bytes: usize) {
        self.requests.set(self.requests.get() - requests);
        self.share.give(bytes);
        self.credit.notify();
    }

    /// A worker: serves requests until the session closes.
    async fn work(self: Rc<Self>) {
        while let Some(work) = self.next_work().await {
            let Work { answer, mut task, data, bytes, arrived, whole } = work;
            let mut parts = None;
            let mut served = self.serve(answer, task, data, &mut parts).await;
            if let Some(whole) = whole {
                match self.piece_ended(answer, &whole, task, served).await {
                    Some(ended) => (task, served) = (whole.task(), ended),
                    None => continue,
                }
            }
            if let Some((operation, len)) = counted(task) {
                self.figures.record(operation, len, arrived.elapsed(), &served);
            }
            let part = served.unwrap_or_else(|error| self.failed(answer, task, &error, &parts));
            self.send(parts.as_ref(), Parcel { part, credit: Some(bytes), window: None });
            self.served.set(self.served.get() + bytes.max(LEAST));
            if self.served.get() >= TURN {
                self.served.set(0);
                yield_now().await;
            }
        }
    }

    /// The reply to a request that failed; if some of another is sent already, there is none.
    fn failed(&self, answer: Answer, task: Task, error: &Error, begun: &Option<Parts>) -> Part {
        if begun.is_some() {
            tracing::warn!(%error, "request failed when half of it was answered");
            self.break_off();
            return Part::new(&[], None);
        }
        if code(task, error) != error::ENOTSUP {
            tracing::warn!(%error, "request failed");
        }
        let command = match task {
            Task::Read { .. } => Command::Read,
            Task::BlockStatus { .. } => Command::BlockStatus,
            _ => Command::Write,
        };
        failure(answer, command, code(task, error), &error.to_string())
    }

    async fn next_work(&self) -> Option<Work> {
        poll_fn(|context| {
            let mut idle = self.idle.borrow_mut();
            // A wake that was not meant for this wait may have left it listed.
            idle.retain(|waker| !waker.will_wake(context.waker()));
            if let Some(work) = self.queue.borrow_mut().pop_front() {
                return Poll::Ready(Some(work));
            }
            if self.phase.get() == Phase::Closed {
                return Poll::Ready(None);
            }
            idle.push(context.waker().clone());
            Poll::Pending
        })
        .await
    }

    /// Does what a task asks for; if it panics, it failed.
    async fn serve(
        &self,
        answer: Answer,
        task: Task,
        data: Option<Buf>,
        parts: &mut Option<Parts>,
    ) -> Result<Part> {
        let panicked = || Err(Error::new(Kind::Io, "serving it panicked"));
        caught(self.perform(answer, task, data, parts)).await.unwrap_or_else(panicked)
    }

    async fn perform(
        &self,
        answer: Answer,
        task: Task,
        data: Option<Buf>,
        parts: &mut Option<Parts>,
    ) -> Result<Part> {
        let (device, ring) = (&*self.device, &self.ring);
        let durability = match (task, data) {
            (Task::Read { offset, len, chunks: Chunks::One }, Some(data)) => {
                return self.read_whole(answer, offset, len, data).await;
            }
            (Task::Read { offset, len, chunks }, _) => {
                return self.read(answer, (offset, len, chunks), parts).await;
            }
            (Task::Write { offset, durability, .. }, Some(data)) => {
                device.write(ring, offset, data).await?;
                durability
            }
            (Task::Flush, _) => Durability::Durable,
            (Task::Trim { offset, len, durability }, _) => {
                device.discard(ring, offset, len).await?;
                durability
            }
            (Task::WriteZeroes { offset, len, provision, durability }, _) => {
                device.write_zeroes(ring, offset, len, provision).await?;
                durability
            }
            (Task::Cache { offset, len }, _) => {
                device.prefetch(ring, offset, len).await?;
                Durability::Cached
            }
            (Task::BlockStatus { offset, len, contexts, limit }, _) => {
                return Ok(self.status(answer, offset, len, contexts, limit));
            }
            (Task::Nothing | Task::Disconnect | Task::Write { .. }, _) => {
                return Ok(Part::new(&answer.done(), None));
            }
        };
        if durability == Durability::Durable {
            device.flush(ring).await?;
        }
        Ok(Part::new(&answer.done(), None))
    }

    /// A chunk for each context, in one part.
    fn status(
        &self,
        answer: Answer,
        offset: u64,
        len: u64,
        contexts: Contexts,
        limit: usize,
    ) -> Part {
        let len = len.min(STATUS);
        let mut extents: Vec<Extent> = Vec::new();
        self.device.extents(offset, len, contexts.grain(), limit, &mut extents);
        let (mut chunks, mut left) = (Vec::new(), contexts.len());
        for context in contexts.iter() {
            left -= 1;
            let place = if left == 0 { Place::Last } else { Place::Middle };
            answer.status(place, context, &extents, len, limit, &mut chunks);
        }
        Part::new(&[], Some(Buf::from_bytes(&chunks)))
    }

    /// Has a reply sent, or a part of one; among `parts` if it is one of those.
    fn send(&self, parts: Option<&Parts>, parcel: Parcel) {
        match parts {
            Some(parts) => parts.borrow_mut().push_back(parcel),
            None => self.outbox.borrow_mut().push(parcel),
        }
        self.ready.notify();
    }

    /// The sender: sends replies until the session closes.
    async fn send_replies(self: Rc<Self>) {
        let mut batch = Box::new(Batch::new());
        let mut windows = Vec::new();
        loop {
            let something = || self.outbox.borrow().is_ready() || self.phase.get() == Phase::Closed;
            self.ready.wait(something).await;
            if self.phase.get() == Phase::Closed {
                return;
            }
            let (mut requests, mut bytes) = (0, 0);
            while !batch.is_full()
                && let Some(Parcel { part, credit, window }) = self.outbox.borrow_mut().pop()
            {
                batch.push(part);
                requests += usize::from(credit.is_some());
                bytes += credit.unwrap_or(0);
                windows.extend(window);
            }
            if self.phase.get() == Phase::Open {
                let (sent, back) = self.ring.send(&self.socket, batch).await;
                batch = back;
                if sent.is_err() {
                    self.break_off();
                }
            }
            batch.clear();
            for window in windows.drain(..) {
                window.set(window.get() - 1);
            }
            self.give_credit(requests, bytes);
        }
    }

    /// Ends the connection, whatever is under way.
    fn break_off(&self) {
        self.phase.set(Phase::Broken);
        // The reader may be waiting for a client that is gone: this ends its receive.
        let _ = shutdown(self.fd(), Shutdown::Both);
    }

    fn fd(&self) -> std::os::fd::RawFd {
        std::os::fd::AsRawFd::as_raw_fd(&*self.socket)
    }

    fn close(&self) {
        self.phase.set(Phase::Closed);
        self.ready.notify();
        for worker in self.idle.borrow_mut().drain(..) {
            worker.wake();
        }
    }
}

/// Where requests and replies are not extended, what is no question for data fails by a simple reply.
fn failure(answer: Answer, command: Command, code: u32, message: &str) -> Part {
    let chunked = matches!(command, Command::Read | Command::BlockStatus);
    let headers = match answer.headers {
        Headers::Structured if !chunked => Headers::Simple,
        headers => headers,
    };
    let mut reply = Vec::new();
    Answer { headers, ..answer }.failure(code, message, &mut reply);
    Part::new(&[], Some(Buf::from_bytes(&reply)))
}

/// The code of what failed.
fn code(task: Task, failed: &Error) -> u32 {
    match (task, failed.kind()) {
        // The one thing that ENOTSUP stands for.
        (Task::WriteZeroes { provision: Provision::KeepIfFast, .. }, Kind::Unsupported) => {
            error::ENOTSUP
        }
        (_, kind) => kind.nbd(),
    }
}

/// What a task is counted as, and the bytes that it is about; hints and questions are not counted.
fn counted(task: Task) -> Option<(Operation, u64)> {
    Some(match task {
        Task::Read { len, .. } => (Operation::Read, len.into()),
        Task::Write { len, .. } => (Operation::Write, len.into()),
        Task::Flush => (Operation::Flush, 0),
        Task::Trim { len, .. } => (Operation::Discard, len),
        Task::WriteZeroes { len, .. } => (Operation::WriteZeroes, len),
        Task::Cache { .. } | Task::BlockStatus { .. } | Task::Disconnect | Task::Nothing => {
            return None;
        }
    })
}

#[cfg(test)]
mod tests;
