//! Transmission: one connection's requests and replies, on the ring of one thread.
//!
//! Three kinds of tasks share a session: the reader parses every request that a receive
//! brought; workers, started as they are needed and used again, serve one request each at a time;
//! the sender puts every reply that is ready into one vectored send. In steady state a request costs
//! no allocation, no lock and no system call of its own.
//!
//! Invariants:
//! - A request holds credit from its header on until its reply is sent: at most
//!   [`MAX_REQUESTS`] of them, and [`MAX_BYTES`] of data unless one alone needs more.
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

use super::{
    context::{Context, Contexts},
    task::{Durability, Refusal, Task, Terms},
    wire::{Answer, Command, Headers, MAX_PAYLOAD, Place, REQUEST_HEADER, Request, error},
};
use crate::{
    blockdev::{
        Device, Extent, Grain, Holder, Provision,
        device::caught,
        figures::{Operation, Operations},
    },
    error::{Error, Kind, Result},
    io::{
        Buf, Io, Ring,
        batch::{Batch, Part},
        signal::Signal,
    },
};

/// Requests that a connection may have under way.
pub const MAX_REQUESTS: usize = 128;

/// Bytes of requests and replies that a connection may have in memory, unless one request alone
/// is larger.
pub const MAX_BYTES: usize = 8 << 20;

/// The longest payload of a BLOCK_STATUS that can be one: a length, and every context there is.
const FILTER: usize = 8 + 4 * Context::ALL.len();

/// What one BLOCK_STATUS looks at, in bytes, at most: clients ask again from where an answer ends.
const STATUS: u64 = 1 << 40;

/// Reads of so many bytes and more are answered without data where there are only zeros.
const HOLE: u32 = 64 << 10;

/// Bytes of the receive buffer: some thirty writes of 4 KiB.
const RECEIVE: usize = 128 << 10;

/// Why a session ended.
#[derive(Debug)]
pub enum End {
    /// The client said goodbye, or closed the connection between two requests.
    Clean,
    /// The connection broke, or the client did not speak the protocol.
    Broken(io::Error),
}

/// Serves a connection until it ends. `early` is what the client sent behind its handshake; what is
/// served is counted in `figures`.
pub async fn serve<D: Device<Ring>>(
    ring: Ring,
    socket: Arc<OwnedFd>,
    device: Arc<D>,
    terms: Terms,
    early: Vec<u8>,
    figures: Arc<Operations>,
) -> End {
    let session = Rc::new(Session {
        ring: ring.clone(),
        socket,
        device,
        terms,
        figures,
        phase: Cell::new(Phase::Open),
        requests: Cell::new(0),
        bytes: Cell::new(0),
        credit: Signal::new(),
        queue: RefCell::default(),
        idle: RefCell::default(),
        workers: Cell::new(0),
        replies: RefCell::default(),
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
    /// Bytes of data that they hold.
    bytes: Cell<usize>,
    /// Told when requests or bytes get less.
    credit: Signal,
    /// Requests that wait for a worker.
    queue: RefCell<VecDeque<Work>>,
    /// Workers that wait for a request, the last to finish first.
    idle: RefCell<Vec<Waker>>,
    workers: Cell<usize>,
    replies: RefCell<VecDeque<Reply>>,
    /// Told when there are replies to send, or the session is closed.
    ready: Signal,
}

/// A request to serve: what it asks, and the data it brought.
struct Work {
    answer: Answer,
    task: Task,
    /// The data of a write; the memory for a read; empty otherwise.
    buf: Option<Buf>,
    /// Bytes of credit it holds.
    bytes: usize,
    /// When all of it was here.
    arrived: Instant,
}

struct Reply {
    part: Part,
    bytes: usize,
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
                self.take_credit(0).await;
                self.reply(0, failure(answer, request.command, error, message));
                return Ok(());
            }
        };
        let bytes = match task {
            Task::Read { len, .. } | Task::Write { len, .. } => len as usize,
            // What the answer may take, of two words each.
            Task::BlockStatus { contexts, limit, .. } => contexts.len() * limit * 16,
            _ => 0,
        };
        self.take_credit(bytes).await;
        let has_data = matches!(task, Task::Read { .. } | Task::Write { .. });
        let buf = has_data.then(|| self.ring.alloc(bytes));
        if let (Task::Write { .. }, Some(buf)) = (task, &buf)
            && let Err(error) = input.fill(buf).await
        {
            self.give_credit(1, bytes);
            return Err(error);
        }
        let arrived = Instant::now();
        self.queue.borrow_mut().push_back(Work { answer, task, buf, bytes, arrived });
        let idle = self.idle.borrow_mut().pop();
        match idle {
            Some(worker) => worker.wake(),
            None if self.workers.get() < MAX_REQUESTS => {
                self.workers.set(self.workers.get() + 1);
                self.ring.spawn(self.clone().work());
            }
            None => {}
        }
        Ok(())
    }

    async fn take_credit(&self, bytes: usize) {
        let fits = || {
            self.requests.get() == 0
                || self.requests.get() < MAX_REQUESTS && self.bytes.get() + bytes <= MAX_BYTES
        };
        if !fits() {
            self.credit.wait(fits).await;
        }
        self.requests.set(self.requests.get() + 1);
        self.bytes.set(self.bytes.get() + bytes);
    }

    fn give_credit(&self, requests: usize, bytes: usize) {
        self.requests.set(self.requests.get() - requests);
        self.bytes.set(self.bytes.get() - bytes);
        self.credit.notify();
    }

    /// A worker: serves requests until the session closes.
    async fn work(self: Rc<Self>) {
        while let Some(Work { answer, task, buf, bytes, arrived }) = self.next_work().await {
            let panicked = || Err(Error::new(Kind::Io, "serving it panicked"));
            let served = caught(self.serve(answer, task, buf)).await.unwrap_or_else(panicked);
            if let Some((operation, len)) = counted(task) {
                self.figures.record(operation, len, arrived.elapsed(), &served);
            }
            let part = match served {
                Ok(part) => part,
                Err(error) => {
                    if code(task, &error) != error::ENOTSUP {
                        tracing::warn!(%error, "request failed");
                    }
                    let command = match task {
                        Task::Read { .. } => Command::Read,
                        Task::BlockStatus { .. } => Command::BlockStatus,
                        _ => Command::Write,
                    };
                    failure(answer, command, code(task, &error), &error.to_string())
                }
            };
            self.reply(bytes, part);
        }
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

    async fn serve(&self, answer: Answer, task: Task, buf: Option<Buf>) -> Result<Part> {
        let (device, ring) = (&*self.device, &self.ring);
        let durability = match (task, buf) {
            (Task::Read { offset, len }, Some(_)) if self.is_hole(answer, offset, len) => {
                return Ok(Part::new(&answer.hole(len), None));
            }
            (Task::Read { offset, len }, Some(buf)) => {
                device.read(ring, offset, buf.clone()).await?;
                return Ok(Part::new(&answer.data(len), Some(buf)));
            }
            (Task::Write { offset, durability, .. }, Some(buf)) => {
                device.write(ring, offset, buf).await?;
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
            (Task::Nothing | Task::Disconnect | Task::Read { .. } | Task::Write { .. }, _) => {
                return Ok(Part::new(&answer.done(), None));
            }
        };
        if durability == Durability::Durable {
            device.flush(ring).await?;
        }
        Ok(Part::new(&answer.done(), None))
    }

    /// Whether to answer a read by a hole: a client that knows chunks asks for much that is zeros.
    fn is_hole(&self, answer: Answer, offset: u64, len: u32) -> bool {
        if answer.headers == Headers::Simple || len < HOLE {
            return false;
        }
        let mut first = Vec::new();
        self.device.extents(offset, len.into(), Grain::Zeros, 1, &mut first);
        let zeros = |extent: &Extent| extent.holder == Holder::Nobody && extent.len >= len.into();
        first.first().is_some_and(zeros)
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

    fn reply(&self, bytes: usize, part: Part) {
        self.replies.borrow_mut().push_back(Reply { part, bytes });
        self.ready.notify();
    }

    /// The sender: sends replies until the session closes.
    async fn send_replies(self: Rc<Self>) {
        let mut batch = Box::new(Batch::new());
        loop {
            let something =
                || !self.replies.borrow().is_empty() || self.phase.get() == Phase::Closed;
            self.ready.wait(something).await;
            if self.phase.get() == Phase::Closed {
                return;
            }
            let (mut requests, mut bytes) = (0, 0);
            while !batch.is_full()
                && let Some(reply) = self.replies.borrow_mut().pop_front()
            {
                batch.push(reply.part);
                requests += 1;
                bytes += reply.bytes;
            }
            if self.phase.get() == Phase::Open {
                let (sent, back) = self.ring.send(&self.socket, batch).await;
                batch = back;
                if sent.is_err() {
                    self.phase.set(Phase::Broken);
                    // The reader may be waiting for a client that is gone: this ends its receive.
                    let _ = shutdown(self.fd(), Shutdown::Both);
                }
            }
            batch.clear();
            self.give_credit(requests, bytes);
        }
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

/// The stream of requests: what was received and not yet taken.
struct Input<'a, D> {
    session: &'a Session<D>,
    buf: Buf,
    start: usize,
    end: usize,
}

impl<'a, D> Input<'a, D> {
    fn new(session: &'a Session<D>, early: Vec<u8>) -> Input<'a, D> {
        let buf = Buf::heap(RECEIVE.max(early.len()));
        buf.copy_from(&early);
        Input { session, buf, start: 0, end: early.len() }
    }

    /// Takes as many bytes as there is room for; false at a clean end of the stream.
    async fn take(&mut self, bytes: &mut [u8]) -> io::Result<bool> {
        while self.end - self.start < bytes.len() {
            let rest = self.buf.slice(self.start..self.end);
            self.buf.copy_from_buf(&rest);
            (self.start, self.end) = (0, rest.len());
            if self.receive().await? == 0 {
                return match self.end {
                    0 => Ok(false),
                    _ => Err(io::ErrorKind::UnexpectedEof.into()),
                };
            }
        }
        self.buf.slice(self.start..self.start + bytes.len()).copy_to(bytes);
        self.start += bytes.len();
        Ok(true)
    }

    async fn receive(&mut self) -> io::Result<usize> {
        let room = self.buf.slice(self.end..self.buf.len());
        let received = self.session.ring.recv(&self.session.socket, room).await?;
        self.end += received;
        Ok(received)
    }

    /// The payload of a write: what was received of it, and the rest straight from the socket.
    async fn fill(&mut self, buf: &Buf) -> io::Result<()> {
        let here = buf.len().min(self.end - self.start);
        buf.copy_from_buf(&self.buf.slice(self.start..self.start + here));
        self.start += here;
        if here == buf.len() {
            return Ok(());
        }
        let rest = buf.slice(here..buf.len());
        self.session.ring.recv_exact(&self.session.socket, rest).await
    }

    /// Takes `len` bytes from the stream and forgets them.
    async fn skip(&mut self, mut len: u64) -> io::Result<()> {
        loop {
            let here = len.min((self.end - self.start) as u64);
            self.start += here as usize;
            len -= here;
            if len == 0 {
                return Ok(());
            }
            (self.start, self.end) = (0, 0);
            if self.receive().await? == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
    }
}

#[cfg(test)]
mod tests;
