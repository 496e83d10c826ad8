//! Commits: how changes become durable, in which order, and what a failure leaves.
//!
//! ```text
//!   take the changes           later ones belong to the next commit
//!   sync data                  fails: poison
//!      |
//!      |- they fit the journal:  write records ---- fails: changes go back on the list
//!      |                         sync map --------- fails: poison
//!      |                         acknowledge
//!      |
//!      `- else a checkpoint:     write the pages that the other area lacks -- fails: go back
//!                                sync map -- fails: poison
//!                                write the other superblock slot, generation + 1 -- fails: in doubt
//!                                sync map -- fails: poison
//!                                acknowledge; the journal starts over
//! ```
//!
//! Invariants:
//! - A flush is answered by a commit that began after it arrived; all that wait share one.
//! - The first commit after an open syncs both files before it writes: what recovery found may have
//!   been in nothing but caches that a killed process left. It ends in a checkpoint, so that its
//!   records can't be followed by those of a torn tail.
//! - A superblock whose write failed may be on disk or not. Until it is, nothing else is written:
//!   the same bytes are written again by the next commit, and only then does work go on.

use std::{ops::Range, sync::atomic::Ordering};

use super::{
    changes::{Capture, Need, Taken},
    format::{Layout, PAGE, RUNS_PER_RECORD, Record, Superblock, encode_page},
    overlay::{Overlay, run_all},
};
use crate::{
    error::{Error, Kind, Result},
    io::{Buf, Io},
    units::{BLOCK, round_up},
};

/// What the map file holds, as its one writer knows it.
pub(super) struct Journal {
    /// The newest that is durable.
    superblock: Superblock,
    /// The number of the next record.
    next: u32,
    /// Records were replayed at the open and no checkpoint has been made since.
    replayed: bool,
    /// Nothing was synced since the open.
    fresh: bool,
    /// There was a checkpoint since the open: records may be appended.
    appends: bool,
    /// How many of the writes to the data file are synced.
    synced: u64,
    /// A superblock that is being written, or whose write failed.
    switch: Option<Switch>,
    /// Blocks that are durably zero now; their space is to be given back.
    freed: Vec<Range<u64>>,
}

/// The last step of a checkpoint, whose pages are durable.
struct Switch {
    superblock: Superblock,
    punch: Vec<Range<u64>>,
    /// Where what it makes durable ends in the tail.
    end: u64,
}

/// What a commit is to achieve beyond making all changes durable.
#[derive(Clone, Copy)]
enum Want {
    Durable,
    EmptyJournal,
    Size(u64),
}

impl Journal {
    pub(super) fn new(superblock: Superblock, replayed: bool) -> Journal {
        Journal {
            superblock,
            next: 0,
            replayed,
            fresh: true,
            appends: false,
            synced: 0,
            switch: None,
            freed: Vec::new(),
        }
    }

    /// The newest that is durable.
    pub(super) fn superblock(&self) -> &Superblock {
        &self.superblock
    }

    /// How many runs fit the rest of the journal.
    fn room(&self) -> usize {
        match self.appends {
            true => (self.superblock.records - self.next) as usize * RUNS_PER_RECORD,
            false => 0,
        }
    }

    fn layout(&self) -> Layout {
        Layout { records: self.superblock.records }
    }
}

impl<I: Io> Overlay<I> {
    /// Makes every write, zeroing and discard that completed before this call durable.
    pub async fn flush(&self, io: &I) -> Result<()> {
        self.commit(io, Want::Durable).await
    }

    /// Flushes, and leaves the journal empty: the next open has nothing to replay.
    pub async fn close(&self, io: &I) -> Result<()> {
        self.commit(io, Want::EmptyJournal).await
    }

    pub(super) async fn commit_size(&self, io: &I, size: u64) -> Result<()> {
        self.commit(io, Want::Size(size)).await
    }

    async fn commit(&self, io: &I, want: Want) -> Result<()> {
        self.check_poison()?;
        let ticket = self.begun.load(Ordering::SeqCst);
        let mut journal = self.journal.lock().await;
        self.check_poison()?;
        if matches!(want, Want::Durable) && self.committed.load(Ordering::SeqCst) > ticket {
            return Ok(());
        }
        let number = self.begun.fetch_add(1, Ordering::SeqCst) + 1;
        let mut half_way = HalfWay { overlay: self, done: false };
        let result = self.commit_steps(io, &mut journal, want).await;
        half_way.done = true;
        if result.is_ok() {
            self.committed.store(number, Ordering::SeqCst);
        }
        let freed = std::mem::take(&mut journal.freed);
        drop(journal);
        self.give_back(io, freed).await;
        result
    }

    async fn commit_steps(&self, io: &I, journal: &mut Journal, want: Want) -> Result<()> {
        if journal.fresh {
            self.sync_data(io, journal).await?;
            self.sync_map(io).await?;
            journal.fresh = false;
        }
        if journal.switch.is_some() {
            self.switch(io, journal).await?;
        }
        let mut size = journal.superblock.size;
        let need = match want {
            Want::Size(wanted) if wanted != size => {
                self.grow_data(io, size, wanted).await?;
                size = wanted;
                Need::Checkpoint
            }
            Want::EmptyJournal if journal.next > 0 || journal.replayed => Need::Checkpoint,
            // Written in place, nothing else: the map must tell that this session did, or the tail of
            // an earlier one would pass for newer.
            _ if journal.superblock.session != self.changes.session()
                && self.writes.load(Ordering::Acquire) > 0 =>
            {
                Need::Checkpoint
            }
            _ => Need::Room(journal.room()),
        };
        let captured = self.changes.capture(need, 1 - journal.superblock.area());
        if self.writes.load(Ordering::Acquire) != journal.synced {
            self.sync_data(io, journal).await?;
        }
        match captured {
            Capture::Nothing => Ok(()),
            Capture::Records(taken) => self.append(io, journal, taken).await,
            Capture::Checkpoint { taken, pages, total } => {
                let superblock = Superblock {
                    generation: journal.superblock.generation + 1,
                    size,
                    pages: total,
                    session: self.changes.session(),
                    ..journal.superblock.clone()
                };
                let end = taken.end;
                self.write_pages(io, journal.layout(), superblock.area(), &pages, taken)
                    .await
                    .map(|punch| journal.switch = Some(Switch { superblock, punch, end }))?;
                self.sync_map(io).await?;
                self.switch(io, journal).await
            }
        }
    }

    /// Writes the changes as records and makes them durable.
    async fn append(&self, io: &I, journal: &mut Journal, taken: Taken) -> Result<()> {
        let count = taken.runs.len().div_ceil(RUNS_PER_RECORD);
        let buf = io.alloc(count * PAGE);
        for ((sequence, runs), at) in
            (journal.next..).zip(taken.runs.chunks(RUNS_PER_RECORD)).zip((0..).step_by(PAGE))
        {
            let record = Record {
                id: self.id,
                generation: journal.superblock.generation,
                sequence,
                first: journal.next,
                runs: runs.to_vec(),
            };
            buf.slice(at..at + PAGE).copy_from(&record.encode());
        }
        if let Err(error) = io.write(&self.map, buf, Layout::record(journal.next)).await {
            self.changes.put_back(taken);
            return Err(self.failed("writing the journal", error));
        }
        self.sync_map(io).await?;
        journal.next += count as u32;
        self.changes.settled(taken.end);
        journal.freed.extend(taken.punch);
        self.counters.commits.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    /// Writes the frozen `pages` to `area`; returns what may be punched once they count.
    async fn write_pages(
        &self,
        io: &I,
        layout: Layout,
        area: usize,
        pages: &[u64],
        taken: Taken,
    ) -> Result<Vec<Range<u64>>> {
        let batches =
            pages.chunk_by(|page, next| page + 1 == *next && Layout::side_by_side(*page) > 1);
        let written = run_all(batches.map(async |batch| {
            let buf: Buf = io.alloc(batch.len() * PAGE);
            for (page, at) in batch.iter().zip((0..).step_by(PAGE)) {
                let states = self.changes.frozen_page(*page);
                buf.slice(at..at + PAGE).copy_from(&encode_page(self.id, *page, &states));
            }
            io.write(&self.map, buf, layout.page(area, batch[0]))
                .await
                .map_err(|error| self.failed("writing the block map", error))
        }))
        .await;
        match written {
            Ok(()) => {
                self.changes.thaw();
                Ok(taken.punch)
            }
            Err(error) => {
                self.changes.thaw_failed(area, pages);
                self.changes.put_back(taken);
                Err(error)
            }
        }
    }

    /// Makes the pending superblock the one that counts.
    async fn switch(&self, io: &I, journal: &mut Journal) -> Result<()> {
        let Some(switch) = &journal.switch else { return Ok(()) };
        let slot = switch.superblock.area() as u64;
        let buf = io.alloc(PAGE);
        buf.copy_from(&switch.superblock.encode());
        io.write(&self.map, buf, Layout::slot(slot))
            .await
            .map_err(|error| self.failed("writing the map's superblock", error))?;
        self.sync_map(io).await?;
        if let Some(Switch { superblock, punch, end }) = journal.switch.take() {
            self.changes.settled(end);
            self.size.store(superblock.size, Ordering::Release);
            journal.superblock = superblock;
            journal.freed.extend(punch);
        }
        journal.next = 0;
        journal.appends = true;
        journal.replayed = false;
        self.counters.commits.fetch_add(1, Ordering::Relaxed);
        self.counters.checkpoints.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    /// Makes the data file long enough for a device of `to` bytes.
    async fn grow_data(&self, io: &I, from: u64, to: u64) -> Result<()> {
        let length = match round_up(to, BLOCK) {
            Some(length) if to > from => length,
            _ => {
                return Err(Error::new(
                    Kind::Invalid,
                    format!("overlay {} has {from} bytes and cannot shrink to {to}", self.id),
                ));
            }
        };
        // Whole blocks: the last one may have been written beyond the old size, never cut it off.
        io.set_len(&self.data, length)
            .await
            .map_err(|error| self.failed(format_args!("growing data to {length} bytes"), error))?;
        self.writes.fetch_add(1, Ordering::Release);
        Ok(())
    }

    async fn sync_data(&self, io: &I, journal: &mut Journal) -> Result<()> {
        // Counted before the sync is issued: it covers what had ended by now.
        let writes = self.writes.load(Ordering::Acquire);
        self.sync(io, &self.data, "data").await?;
        journal.synced = writes;
        Ok(())
    }

    async fn sync_map(&self, io: &I) -> Result<()> {
        self.sync(io, &self.map, "map").await
    }

    async fn sync(&self, io: &I, file: &I::File, name: &str) -> Result<()> {
        io.sync(file).await.map_err(|error| {
            // What was written may be lost, and its pages look clean: whoever comes next must not
            // take it for there.
            self.changes.void();
            self.poison(format!("its {name} file could not be synced ({error})"));
            self.failed(format_args!("syncing {name}"), error)
        })
    }
}

/// A commit under way; dropping it before it is done poisons the overlay.
struct HalfWay<'a, I: Io> {
    overlay: &'a Overlay<I>,
    done: bool,
}

impl<I: Io> Drop for HalfWay<'_, I> {
    fn drop(&mut self) {
        if !self.done {
            self.overlay.poison("a commit was given up half way");
        }
    }
}
