//! The data of reads and writes, piece by piece, so that what a request has in memory is bounded, whatever it
//! asks for.
//!
//! Invariants:
//! - A request of more than a [`PIECE`] has [`WINDOW`] of them in memory at most, and the credit for them from its
//!   beginning to its end.
//! - A write is answered when its last piece has ended, and every piece is taken from the stream.

use std::{
    cell::{Cell, RefCell},
    io,
    rc::Rc,
    time::Instant,
};

use super::{
    Phase, Session, Work,
    input::Input,
    outbox::{Parcel, Parts, Window},
};
use crate::{
    blockdev::{
        Device, Extent, Grain, Holder,
        nbd::{
            reserve::{LOAN, OWN},
            task::{Chunks, Durability, Task},
            wire::{Answer, Headers, Place},
        },
    },
    error::{Error, Result},
    io::{Buf, Io, Ring, batch::Part, yield_now},
};

/// Bytes that are moved at once.
const PIECE: u32 = 512 << 10;

/// Pieces of a request in memory: one that the disk has, one that the network has.
const WINDOW: usize = 2;

const _: () = assert!(WINDOW * PIECE as usize <= OWN, "every request fits what a session has");

/// As much is answered without data where there are only zeros.
const HOLE: u32 = 64 << 10;

/// Bytes of credit for a request of so much data.
fn credit_for(len: u32) -> usize {
    (len as usize).min(WINDOW * PIECE as usize)
}

/// A write of several pieces.
pub(super) struct Whole {
    offset: u64,
    len: u32,
    durability: Durability,
    /// Pieces that are in memory.
    window: Cell<usize>,
    /// Bytes that have not ended.
    left: Cell<u32>,
    failed: RefCell<Option<Error>>,
}

impl Whole {
    /// The request that it is.
    pub(super) fn task(&self) -> Task {
        let Whole { offset, len, durability, .. } = *self;
        Task::Write { offset, len, durability }
    }
}

/// A range of `len` bytes from `offset` on, piece by piece: where each begins, and its length.
fn pieces(offset: u64, len: u32) -> impl Iterator<Item = (u64, u32)> {
    let starts = (0..len).step_by(PIECE as usize);
    starts.map(move |at| (offset + u64::from(at), (len - at).min(PIECE)))
}

impl<D: Device<Ring>> Session<D> {
    /// Takes the credit for a task: how much, and the memory if it is for a read in one piece.
    pub(super) async fn room_for(&self, task: Task) -> (usize, Option<Buf>) {
        let bytes = match task {
            Task::Read { len, chunks: Chunks::One, .. } if len as usize <= OWN + LOAN => {
                // Only until its first byte is sent an error can be told: it waits for room for all of it,
                // unless that is for others to make.
                let (len, granted) = (len as usize, Cell::new(false));
                let wait = || {
                    granted.set(self.take_credit(len));
                    granted.get() || self.requests.get() == 0
                };
                self.credit.wait(wait).await;
                if granted.get() {
                    return (len, Some(self.ring.alloc(len)));
                }
                credit_for(len as u32)
            }
            Task::Read { len, .. } | Task::Write { len, .. } => credit_for(len),
            // What the answer may take, of two words each.
            Task::BlockStatus { contexts, limit, .. } => contexts.len() * limit * 16,
            _ => 0,
        };
        self.credit.wait(|| self.take_credit(bytes)).await;
        (bytes, None)
    }

    /// Reads what a READ asks for into the memory that it has.
    pub(super) async fn read_whole(
        &self,
        answer: Answer,
        offset: u64,
        len: u32,
        data: Buf,
    ) -> Result<Part> {
        if self.is_hole(answer, offset, len) {
            return Ok(Part::new(&answer.hole(Place::Last, offset, len), None));
        }
        self.device.read(&self.ring, offset, data.clone()).await?;
        Ok(Part::new(&answer.data(Place::Last, offset, len), Some(data)))
    }

    /// Reads what a READ asks for, piece by piece, and sends all parts of the reply but the last, which it
    /// returns. Parts that nothing may come between are in `parts` from the first on.
    pub(super) async fn read(
        &self,
        answer: Answer,
        (offset, len, chunks): (u64, u32, Chunks),
        parts: &mut Option<Parts>,
    ) -> Result<Part> {
        if self.is_hole(answer, offset, len) {
            return Ok(Part::new(&answer.hole(Place::Last, offset, len), None));
        }
        let mut window: Option<Window> = None;
        let mut read = 0;
        loop {
            if let Some(window) = &window {
                self.credit.wait(|| window.get() < WINDOW).await;
            }
            let (at, size) = (offset + u64::from(read), (len - read).min(PIECE));
            let place = if read + size == len { Place::Last } else { Place::Middle };
            let part = match chunks {
                Chunks::Many if self.is_hole(answer, at, size) => {
                    Part::new(&answer.hole(place, at, size), None)
                }
                Chunks::Many => {
                    Part::new(&answer.data(place, at, size), Some(self.read_piece(at, size).await?))
                }
                Chunks::One if read == 0 => {
                    let head = answer.data(Place::Last, offset, len);
                    Part::new(&head, Some(self.read_piece(at, size).await?))
                }
                Chunks::One => Part::new(&[], Some(self.read_piece(at, size).await?)),
            };
            if place == Place::Last || self.phase.get() == Phase::Broken {
                return Ok(part);
            }
            read += size;
            let window = window.get_or_insert_default();
            window.set(window.get() + 1);
            if chunks == Chunks::One && parts.is_none() {
                *parts = Some(self.outbox.borrow_mut().begin());
            }
            self.send(parts.as_ref(), Parcel { part, credit: None, window: Some(window.clone()) });
            yield_now().await;
        }
    }

    async fn read_piece(&self, offset: u64, len: u32) -> Result<Buf> {
        let buf = self.ring.alloc(len as usize);
        self.device.read(&self.ring, offset, buf.clone()).await?;
        Ok(buf)
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

    /// Receives the data of a WRITE, and hands over one piece after the other.
    pub(super) async fn receive(
        self: &Rc<Self>,
        answer: Answer,
        (offset, len, durability): (u64, u32, Durability),
        bytes: usize,
        input: &mut Input<'_, D>,
    ) -> io::Result<()> {
        let whole = (len > PIECE).then(|| {
            let (window, left, failed) = (Cell::new(0), Cell::new(len), RefCell::default());
            Rc::new(Whole { offset, len, durability, window, left, failed })
        });
        let durability = if whole.is_some() { Durability::Cached } else { durability };
        for (offset, len) in pieces(offset, len) {
            if let Some(whole) = &whole {
                self.credit.wait(|| whole.window.get() < WINDOW).await;
            }
            let data = self.ring.alloc(len as usize);
            if let Err(error) = input.fill(&data).await {
                // There will be no answer; what came of it is written.
                if let Some(whole) = &whole {
                    self.credit.wait(|| whole.window.get() == 0).await;
                }
                self.give_credit(1, bytes);
                return Err(error);
            }
            if let Some(whole) = &whole {
                whole.window.set(whole.window.get() + 1);
            }
            let task = Task::Write { offset, len, durability };
            let (data, arrived, whole) = (Some(data), Instant::now(), whole.clone());
            self.hand_over(Work { answer, task, data, bytes, arrived, whole });
        }
        Ok(())
    }

    /// A piece of a write has ended: what became of the whole, if it was the last.
    pub(super) async fn piece_ended(
        &self,
        answer: Answer,
        whole: &Whole,
        piece: Task,
        served: Result<Part>,
    ) -> Option<Result<Part>> {
        if let Task::Write { len, .. } = piece {
            whole.left.set(whole.left.get() - len);
        }
        whole.window.set(whole.window.get() - 1);
        self.credit.notify();
        if let Err(error) = served {
            whole.failed.borrow_mut().get_or_insert(error);
        }
        if whole.left.get() > 0 {
            return None;
        }
        Some(match (whole.failed.take(), whole.durability) {
            (Some(error), _) => Err(error),
            (None, Durability::Cached) => Ok(Part::new(&answer.done(), None)),
            (None, Durability::Durable) => self.serve(answer, Task::Flush, None, &mut None).await,
        })
    }
}
