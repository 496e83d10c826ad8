//! A queue of a block device: requests that the kernel hands to a ring, answered by a [`Device`].
//!
//! Each tag is a task: it waits for a request, serves it, and answers with the command that waits
//! for the next. Nothing else is kept of a request, so one that is handed out again after a crash
//! of the server is served again.
//!
//! Invariants:
//! - A request is answered once, whole or with an error, after everything that it asked for has
//!   ended: no operation is under way on pages that were given back.
//! - The queue's mapping and numbers are given back before it is told that it has ended; only then
//!   does the driver let go of the device.

use std::{cell::Cell, fs::File, rc::Rc, sync::Arc, time::Instant};

use tokio::sync::oneshot;

use super::abi::{self, Operation, Request};
use crate::{
    blockdev::{
        Device, Provision,
        device::caught,
        figures::{self, Operations},
    },
    error::{Context, Error, Kind, Result},
    io::{
        Buf, Ring,
        loan::{Loan, withdrawn},
        ring::Address,
        shared::SharedWords,
        signal::Signal,
    },
    units::check_range,
};

/// How the data of requests gets to this server.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Mode {
    /// The ring's operations use the request's own pages.
    ZeroCopy,
    /// The kernel copies it to and from the server's memory.
    Copy,
}

/// What a queue is.
#[derive(Clone, Debug)]
pub(super) struct Shape {
    pub(super) name: String,
    pub(super) file: Arc<File>,
    pub(super) queue: u16,
    pub(super) depth: u16,
    pub(super) max_io: u32,
    pub(super) mode: Mode,
}

/// How a queue comes to life: all of a device's queues do, or none.
pub(super) struct Phases {
    /// Told that it can take requests, or why it can't.
    pub(super) ready: oneshot::Sender<Result<()>>,
    /// Tells it to take them. Without a word it ends.
    pub(super) start: oneshot::Receiver<()>,
}

/// Serves a queue until the driver takes it away; nothing of it is left then. What is served is
/// counted in `figures`.
pub(super) async fn serve<D: Device<Ring>>(
    ring: Ring,
    shape: Shape,
    device: Arc<D>,
    figures: Arc<Operations>,
    phases: Phases,
) {
    let name = shape.name.clone();
    let queue = match Queue::new(ring.clone(), shape, device, figures) {
        Ok(queue) => Rc::new(queue),
        Err(error) => {
            let _ = phases.ready.send(Err(error));
            return;
        }
    };
    let _ = phases.ready.send(Ok(()));
    if phases.start.await.is_ok() {
        queue.live.set(queue.shape.depth);
        for tag in 0..queue.shape.depth {
            ring.spawn(queue.clone().serve_tag(tag));
        }
    }
    queue.idle.wait(|| queue.live.get() == 0).await;
    tracing::debug!(device = %name, queue = queue.shape.queue, "a queue has ended");
    // Its tasks have ended, and dropped their handles with their last step.
    debug_assert_eq!(Rc::strong_count(&queue), 1);
    ring.give_back(queue.numbers.clone());
}

struct Queue<D> {
    ring: Ring,
    shape: Shape,
    device: Arc<D>,
    figures: Arc<Operations>,
    descriptors: SharedWords,
    /// Per tag, the number under which its pages are lent; empty where they are copied.
    numbers: Vec<u16>,
    /// Tags whose tasks run.
    live: Cell<u16>,
    idle: Signal,
}

/// A tag's memory.
enum Memory {
    Lent(Rc<Loan>),
    Own(Buf),
}

impl Memory {
    fn window(&self, len: usize) -> Buf {
        match self {
            Memory::Lent(loan) => Buf::lent(loan, len),
            Memory::Own(buf) => buf.slice(0..len),
        }
    }
}

impl<D: Device<Ring>> Queue<D> {
    fn new(ring: Ring, shape: Shape, device: Arc<D>, figures: Arc<Operations>) -> Result<Queue<D>> {
        let what = || format!("{}: queue {}", shape.name, shape.queue);
        let (offset, words) = abi::descriptors(shape.queue, shape.depth);
        let descriptors = SharedWords::map(&shape.file, offset, words).context(what)?;
        let numbers = match shape.mode {
            Mode::Copy => Vec::new(),
            Mode::ZeroCopy => ring.borrow_numbers(usize::from(shape.depth)).ok_or_else(|| {
                let what = what() + ": too many requests on one I/O thread";
                Error::new(Kind::Unavailable, what + "; attach with a smaller --depth")
            })?,
        };
        let (live, idle) = (Cell::new(0), Signal::new());
        Ok(Queue { ring, shape, device, figures, descriptors, numbers, live, idle })
    }

    async fn serve_tag(self: Rc<Self>, tag: u16) {
        let mut memory = self.memory(tag);
        let (mut number, mut result) = (abi::FETCH, 0);
        loop {
            if let Memory::Lent(loan) = &memory {
                loan.renew();
            }
            match self.exchange(tag, number, result, &memory).await {
                Ok(0) => {}
                // The device goes, or this server does: whoever takes over gets the request.
                Ok(_) => break,
                Err(error) if error.raw_os_error() == Some(libc::ENODEV) => break,
                Err(error) => {
                    tracing::warn!(device = %self.shape.name, tag, %error, "a tag has ended");
                    break;
                }
            }
            let request = Request::decode(tag, |index| self.descriptors.load(index));
            let arrived = Instant::now();
            let served = caught(self.answer(request, &memory)).await;
            if let Some((operation, len)) = counted(&request) {
                let served = served.as_ref().map_or(Err(()), |served| served.as_ref().or(Err(())));
                self.figures.record(operation, len, arrived.elapsed(), &served);
            }
            result = match served {
                Some(Ok(len)) => len,
                Some(Err(error)) => {
                    tracing::warn!(device = %self.shape.name, ?request, %error, "request failed");
                    -error.kind().errno()
                }
                None => {
                    // Operations may be under way on it still: the next request gets other memory.
                    // Pages that were lent the kernel keeps until those have ended.
                    memory = self.memory(tag);
                    -Kind::Io.errno()
                }
            };
            number = abi::COMMIT_AND_FETCH;
        }
        self.live.set(self.live.get() - 1);
        self.idle.notify();
    }

    fn memory(&self, tag: u16) -> Memory {
        match self.numbers.get(usize::from(tag)) {
            Some(&number) => {
                let position = abi::position(self.shape.queue, tag);
                Memory::Lent(Rc::new(Loan::new(number, self.shape.file.clone(), position)))
            }
            None => Memory::Own(Buf::heap(self.shape.max_io as usize)),
        }
    }

    /// Answers the tag's last request, if `number` says so, and waits for its next.
    async fn exchange(
        &self,
        tag: u16,
        number: u32,
        result: i32,
        memory: &Memory,
    ) -> std::io::Result<usize> {
        let (data, address) = match memory {
            Memory::Lent(_) => (0, Address::Number(self.numbers[usize::from(tag)])),
            Memory::Own(buf) => (buf.as_ptr().expose_provenance(), Address::Memory(buf.clone())),
        };
        let command = abi::io_command(self.shape.queue, tag, result, data as u64);
        self.ring.command(&self.shape.file, number, command, address).await
    }

    /// Does what the request asks; the bytes that it moved.
    async fn answer(&self, request: Request, memory: &Memory) -> Result<i32> {
        let Request { operation, offset, len, fua, keep } = request;
        let (device, ring) = (&*self.device, &self.ring);
        if operation != Operation::Flush {
            check_range(offset, len, device.info().size)?;
        }
        let moved = match operation {
            Operation::Read | Operation::Write => {
                if len == 0 || len > u64::from(self.shape.max_io) {
                    let what = format!("a request of {len} bytes");
                    return Err(Error::new(Kind::Invalid, what));
                }
                let buf = memory.window(len as usize);
                match operation {
                    Operation::Read => device.read(ring, offset, buf.clone()).await?,
                    _ => device.write(ring, offset, buf.clone()).await?,
                }
                if buf.is_lost() {
                    return Err(Error::io("moving data", withdrawn()));
                }
                len as i32
            }
            Operation::Flush => {
                device.flush(ring).await?;
                0
            }
            Operation::Discard => {
                device.discard(ring, offset, len).await?;
                0
            }
            Operation::WriteZeroes => {
                let provision = if keep { Provision::Keep } else { Provision::Release };
                device.write_zeroes(ring, offset, len, provision).await?;
                0
            }
            Operation::Unknown(operation) => {
                let what = format!("operation {operation} is not known");
                return Err(Error::new(Kind::Unsupported, what));
            }
        };
        if fua {
            device.flush(ring).await?;
        }
        Ok(moved)
    }
}

/// What a request is counted as, and the bytes that it is about.
fn counted(request: &Request) -> Option<(figures::Operation, u64)> {
    Some(match request.operation {
        Operation::Read => (figures::Operation::Read, request.len),
        Operation::Write => (figures::Operation::Write, request.len),
        Operation::Flush => (figures::Operation::Flush, 0),
        Operation::Discard => (figures::Operation::Discard, request.len),
        Operation::WriteZeroes => (figures::Operation::WriteZeroes, request.len),
        Operation::Unknown(_) => return None,
    })
}
