//! A read of one chunk, from whoever has it.

use std::{future::Future, pin::pin, sync::Arc, sync::atomic::Ordering, time::Duration};

use futures_util::{
    StreamExt,
    future::{Either, select},
    stream::FuturesUnordered,
};

use super::{Copy, Sources};
use crate::{
    error::{Error, Kind, Result},
    io::{Buf, Io},
    units::Chunk,
};

impl<I: Io> Sources<I> {
    /// Fills `buf` from `offset`; all of it lies within one chunk.
    pub(super) async fn read_chunk(
        &self,
        io: &I,
        copies: &[Arc<Copy<I>>],
        offset: u64,
        buf: Buf,
    ) -> Result<()> {
        let chunk = Chunk::at(offset);
        if self.image.crc(chunk).is_none() {
            buf.fill(0);
            return Ok(());
        }
        let read = match copies {
            [only] => only.read(io, &self.image, offset, buf.clone()).await,
            _ => self.race(io, &order(copies, chunk), offset, &buf).await,
        };
        let Err(error) = read else { return Ok(()) };
        if buf.is_lost() {
            return Err(error);
        }
        self.last_resort(io, copies, offset, &buf, error).await
    }

    /// Asks the copies of `order`, the next one when those before fail or take too long; each has memory
    /// of its own, and the first that answers fills `buf`.
    async fn race(&self, io: &I, order: &[&Copy<I>], offset: u64, buf: &Buf) -> Result<()> {
        self.counters.raced.fetch_add(1, Ordering::Relaxed);
        self.budget.earn();
        let ask = |number: usize| async move {
            let own = io.alloc(buf.len());
            let read = order[number].read(io, &self.image, offset, own.clone()).await;
            (number, read.map(|()| own))
        };
        let mut asked = FuturesUnordered::new();
        let mut error = Error::new(Kind::Unavailable, "it has no copy that could be read");
        // The newest of those asked: how many there are, the wait for it, and what its disk had done.
        let (mut count, mut wait, mut ended) = (0, Wait::Hedge, 0);
        // Those asked because another was slow, rather than because it failed.
        let mut hedge = None;
        loop {
            if asked.is_empty() {
                let Some(copy) = order.get(count) else { return Err(error) };
                ended = copy.disk().ended();
                asked.push(ask(count));
                (count, wait) = (count + 1, Wait::Hedge);
            }
            let newest = order[count - 1].disk();
            let answer = if count < order.len() {
                let patience = newest.patience();
                within(io, asked.next(), wait.of(patience.hedge, patience.late)).await
            } else {
                Some(asked.next().await)
            };
            match answer {
                Some(Some((number, Ok(own)))) => {
                    buf.copy_from_buf(&own);
                    if hedge == Some(number) {
                        self.counters.hedges_won.fetch_add(1, Ordering::Relaxed);
                    }
                    return Ok(());
                }
                Some(Some((number, Err(failed)))) => {
                    let disk = order[number].disk().name();
                    tracing::debug!(image = self.image.name, disk, error = %failed, "a copy failed");
                    error = failed;
                    // Others that are being asked may still answer; the next is asked all the same.
                    if let Some(copy) = order.get(count) {
                        self.counters.failovers.fetch_add(1, Ordering::Relaxed);
                        ended = copy.disk().ended();
                        asked.push(ask(count));
                        (count, wait) = (count + 1, Wait::Hedge);
                    }
                    continue;
                }
                Some(None) => continue,
                None => {}
            }
            let next = order[count].disk();
            match wait {
                Wait::Hedge if next.trouble().is_some() || !self.budget.spend() => {
                    wait = Wait::Late;
                    continue;
                }
                Wait::Hedge => {
                    self.counters.hedges.fetch_add(1, Ordering::Relaxed);
                }
                Wait::Late => {
                    newest.late(ended);
                    self.counters.failovers.fetch_add(1, Ordering::Relaxed);
                }
            }
            hedge = Some(count);
            ended = next.ended();
            asked.push(ask(count));
            (count, wait) = (count + 1, Wait::Hedge);
        }
    }

    /// When no copy could answer: something else that has the chunk, and then, unverified, just the
    /// bytes that were asked for, where a disk can read these though not all of the chunk.
    async fn last_resort(
        &self,
        io: &I,
        copies: &[Arc<Copy<I>>],
        offset: u64,
        buf: &Buf,
        error: Error,
    ) -> Result<()> {
        let chunk = Chunk::at(offset);
        let skip = (offset - chunk.offset()) as usize;
        if let Some(rescue) = self.rescue.get()
            && let Some(bytes) = rescue.chunk(chunk).await
            && bytes.len() == self.image.len_of(chunk)
            && self.image.crc(chunk) == Some(crc32fast::hash(&bytes))
        {
            self.counters.rescued.fetch_add(1, Ordering::Relaxed);
            buf.copy_from(&bytes[skip..skip + buf.len()]);
            return Ok(());
        }
        for copy in copies.iter().filter(|copy| !copy.is_corrupt(chunk)) {
            if copy.read_plain(io, offset, buf.clone()).await.is_ok() {
                return Ok(());
            }
        }
        self.counters.failed.fetch_add(1, Ordering::Relaxed);
        Err(error.within(format!("image {}", self.image.name)))
    }
}

/// What the newest of those asked is waited for.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Wait {
    /// Until it takes longer than usual.
    Hedge,
    /// Until it is late.
    Late,
}

impl Wait {
    /// How long from here, if a hedge is due after `hedge` and all are late after `late`.
    fn of(self, hedge: Duration, late: Duration) -> Duration {
        match self {
            Wait::Hedge => hedge,
            Wait::Late => late.saturating_sub(hedge),
        }
    }
}

/// The copies in the order in which they are to be asked for a chunk.
fn order<I: Io>(copies: &[Arc<Copy<I>>], chunk: Chunk) -> Vec<&Copy<I>> {
    let mut order: Vec<&Copy<I>> = copies.iter().map(|copy| &**copy).collect();
    order.sort_by_key(|copy| (!copy.is_sound(chunk), copy.disk().trouble().is_some()));
    order
}

/// What `future` gives, unless it takes longer than `time`.
async fn within<I: Io, T>(io: &I, future: impl Future<Output = T>, time: Duration) -> Option<T> {
    match select(pin!(future), pin!(io.sleep(time))).await {
        Either::Left((value, _)) => Some(value),
        Either::Right(_) => None,
    }
}
