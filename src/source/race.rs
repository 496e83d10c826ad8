//! A read of one chunk, from whoever has it.

use std::{future::Future, pin::pin, sync::Arc, sync::atomic::Ordering, time::Duration};

use futures_util::{
    StreamExt,
    future::{Either, select},
    stream::FuturesUnordered,
};

use super::{Copy, Sources};
use crate::{
    catalog::Tier,
    error::{Error, Kind, Result},
    io::{Buf, Io},
    units::Chunk,
};

/// Chunks in a row that are read from the same one of several equal copies: longer than what is read ahead.
const STRIPE: u64 = 64;

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

/// The copies in the order in which they are to be asked for a chunk. Those that are equally good share the
/// load by stripes: whoever reads a chunk finds it verified, and in the page cache once.
fn order<I: Io>(copies: &[Arc<Copy<I>>], chunk: Chunk) -> Vec<&Copy<I>> {
    let rank = |copy: &&Copy<I>| {
        let disk = copy.disk();
        (!copy.is_sound(chunk), disk.trouble().is_some(), disk.tier().unwrap_or(Tier::Ssd))
    };
    let mut order: Vec<&Copy<I>> = copies.iter().map(|copy| &**copy).collect();
    order.sort_by_key(rank);
    let first = order.first().map(rank);
    let peers = order.iter().take_while(|copy| Some(rank(copy)) == first).count();
    if peers > 1 {
        order[..peers].rotate_left((chunk.0 / STRIPE % peers as u64) as usize);
    }
    order
}

/// What `future` gives, unless it takes longer than `time`.
async fn within<I: Io, T>(io: &I, future: impl Future<Output = T>, time: Duration) -> Option<T> {
    match select(pin!(future), pin!(io.sleep(time))).await {
        Either::Left((value, _)) => Some(value),
        Either::Right(_) => None,
    }
}

#[cfg(test)]
mod tests {
    //! Checked: who is asked first.

    use super::*;
    use crate::{
        io::sim::Sim,
        source::disk::{Disk, Trouble},
    };

    #[test]
    fn equal_copies_share_an_image_by_stripes() {
        let sim = Sim::new(1);
        let file = sim.create(512, &[], 4096);
        let tiers = [("hdd", Tier::Hdd), ("a", Tier::Ssd), ("b", Tier::Ssd)];
        let copies = tiers.map(|(name, tier)| {
            let disk = Arc::new(Disk::new(name, Some(tier), 64));
            Arc::new(Copy::<Sim>::new(disk, (0, 0), file, file, 1000))
        });
        let asked = |chunk| {
            let order = order(&copies, Chunk(chunk));
            order.iter().map(|copy| copy.disk().name()).collect::<Vec<_>>()
        };
        assert_eq!(asked(0), ["a", "b", "hdd"]);
        assert_eq!((asked(STRIPE - 1), asked(2 * STRIPE)), (asked(0), asked(0)));
        assert_eq!(asked(STRIPE), ["b", "a", "hdd"]);
        copies[1].disk().set_trouble(Some(Trouble::Slow));
        assert_eq!((asked(0), asked(STRIPE)), (vec!["b", "hdd", "a"], vec!["b", "hdd", "a"]));
    }
}
