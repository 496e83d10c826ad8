//! Every change of state passes here: into the map at once, and onto the list of what the next
//! commit makes durable.
//!
//! Invariants:
//! - A commit takes the list as it stands at one moment; what changes later is in neither its
//!   records nor its pages. For pages that is arranged by freezing: whoever changes a frozen page
//!   first saves the copy that the checkpoint will write.
//! - A block is on the list as `data` only after its bytes were written to the data file: the sync
//!   that follows the taking covers them.
//! - The list is bounded: while it is full nothing becomes zero, and the callers commit before they
//!   change anything else. What a commit has taken and not made durable counts too, or a disk on
//!   which commits fail would make the list, and the tail, as long as it goes on.

use std::{
    collections::HashMap,
    ops::Range,
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
};

use bitvec::vec::BitVec;

use super::{
    dirty::Dirty,
    format::{BLOCKS_PER_PAGE, MAX_RUN, RECORDS, RUNS_PER_RECORD, Run, State, Superblock, WORDS},
    map::Map,
    tail::{Place, Tail},
};

/// Pending runs past which nobody changes more before there was a commit, at most: it is as much as the
/// journal holds, and that of a new map holds so many. Past half of it one of the writers commits
/// while the others go on, so that random writes without a flush need a checkpoint every other time.
pub const LIMIT: usize = RECORDS as usize * RUNS_PER_RECORD;

/// How many times the limit may be pending and taken, together.
const TAKEN: usize = 2;

/// The states of an overlay's blocks, and which of them are not durable yet.
pub struct Changes {
    map: Map,
    pending: Mutex<Pending>,
    /// `runs.len()` of the list, to be read without its lock.
    count: AtomicUsize,
    /// Runs that a commit has taken and not made durable yet.
    taken: AtomicUsize,
    limit: usize,
    session: u64,
    /// What a copy lacks that is being made.
    dirty: Dirty,
}

struct Pending {
    taken: Taken,
    /// Per bitmap area, the pages that may differ from what stands there on disk.
    dirty: [BitVec; 2],
    frozen: Option<Frozen>,
    /// The list, and what a commit has taken of it and not made durable yet, for the next process.
    tail: Tail,
}

/// What a commit takes.
#[derive(Default)]
pub struct Taken {
    /// The changes, in order.
    pub runs: Vec<Run>,
    /// Blocks that turned from data to zero: once that is durable their space is given back.
    pub punch: Vec<Range<u64>>,
    /// Where they end in the tail.
    pub end: u64,
}

/// The pages that a checkpoint has yet to write, as they were when it began.
struct Frozen {
    left: BitVec,
    saved: HashMap<u64, Box<[u64; WORDS]>>,
}

/// How a commit makes its changes durable.
pub enum Capture {
    /// There are none.
    Nothing,
    /// As journal records.
    Records(Taken),
    /// As a checkpoint.
    Checkpoint {
        /// The changes, all of them in the frozen pages.
        taken: Taken,
        /// The pages to write, ascending.
        pages: Vec<u64>,
        /// How many pages of the whole map are not all base.
        total: u64,
    },
}

/// What a checkpoint is needed for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Need {
    /// A checkpoint if there are changes and they don't fit this many runs of journal.
    Room(usize),
    /// A checkpoint, whatever there is.
    Checkpoint,
}

/// Which blocks become zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Over {
    /// Those with data only.
    Data,
    /// All.
    Everything,
}

impl Changes {
    /// The changes of an overlay just opened: `map` is what its disk holds.
    ///
    /// `stale` are the pages of each area that are, or may be, on disk otherwise than in `map`;
    /// `punch` are blocks whose space may not have been given back; `lately` are the changes that
    /// the tail has already, in order, and no disk. `room` is how many runs the journal holds.
    pub fn new(
        map: Map,
        room: usize,
        stale: [BitVec; 2],
        punch: Vec<Range<u64>>,
        tail: Tail,
        lately: Vec<Run>,
    ) -> Changes {
        let taken = Taken { punch, ..Taken::default() };
        let session = tail.session();
        let mut pending = Pending { taken, dirty: stale, frozen: None, tail };
        for run in lately {
            let blocks = run.start..run.end();
            if run.state == State::Zero {
                pending.taken.punch_later(blocks.clone());
            }
            pending.change(&map, blocks, run.state);
        }
        let count = AtomicUsize::new(pending.taken.runs.len());
        Changes {
            map,
            pending: Mutex::new(pending),
            count,
            taken: AtomicUsize::new(0),
            limit: room.min(LIMIT),
            session,
            dirty: Dirty::default(),
        }
    }

    /// The session in whose name commits are made.
    pub fn session(&self) -> u64 {
        self.session
    }

    /// What was taken up to `end` is durable.
    pub fn settled(&self, end: u64) {
        let mut pending = self.pending();
        pending.tail.drop_before(end);
        self.taken.store(0, Ordering::Relaxed);
    }

    /// What is not durable is lost: nobody is to find it.
    pub fn void(&self) {
        self.pending().tail.void();
    }

    /// From now on the tail is kept in `place`. Nothing is pending.
    pub fn keep_tail(&self, place: Option<Place>, superblock: &Superblock) {
        self.pending().tail.keep_in(place, superblock);
    }

    /// What a copy lacks that is being made.
    pub fn dirty(&self) -> &Dirty {
        &self.dirty
    }

    /// The states as they are now.
    pub fn map(&self) -> &Map {
        &self.map
    }

    /// Pending runs.
    pub fn count(&self) -> usize {
        self.count.load(Ordering::Relaxed)
    }

    /// Whether there must be a commit before anything else changes.
    pub fn is_full(&self) -> bool {
        let pending = self.count();
        pending >= self.limit || pending + self.taken.load(Ordering::Relaxed) >= TAKEN * self.limit
    }

    /// Whether it is time for a commit.
    pub fn is_half_full(&self) -> bool {
        self.count() >= self.limit / 2
    }

    /// Makes `blocks` data. Their bytes stand in the data file.
    pub fn to_data(&self, blocks: Range<u64>) {
        if self.map.is_all(blocks.clone(), State::Data) {
            return;
        }
        let mut pending = self.pending();
        pending.keep(blocks.clone(), State::Data);
        pending.change(&self.map, blocks.clone(), State::Data);
        self.dirty.mark(blocks);
        self.count.store(pending.taken.runs.len(), Ordering::Relaxed);
    }

    /// Makes those of `blocks` zero that `over` names. Returns where it stopped: short of their end
    /// when the list is full.
    pub fn to_zero(&self, blocks: Range<u64>, over: Over) -> u64 {
        let mut block = blocks.start;
        while block < blocks.end {
            let (state, end) = self.map.run(block..blocks.end);
            if state == State::Data || state == State::Base && over == Over::Everything {
                let mut pending = self.pending();
                if self.is_full() {
                    return block;
                }
                pending.keep(block..end, State::Zero);
                pending.change(&self.map, block..end, State::Zero);
                self.dirty.mark(block..end);
                if state == State::Data {
                    pending.taken.punch_later(block..end);
                }
                self.count.store(pending.taken.runs.len(), Ordering::Relaxed);
            }
            block = end;
        }
        blocks.end
    }

    /// Takes all pending changes, and for a checkpoint to `area` freezes the pages it must write.
    pub fn capture(&self, need: Need, area: usize) -> Capture {
        let mut pending = self.pending();
        let runs = pending.taken.runs.len();
        match need {
            Need::Room(_) if runs == 0 => return Capture::Nothing,
            Need::Room(room) if runs <= room => return Capture::Records(self.take(&mut pending)),
            _ => {}
        }
        let left = std::mem::take(&mut pending.dirty[area]);
        let pages = left.iter_ones().map(|page| page as u64).collect();
        pending.frozen = Some(Frozen { left, saved: HashMap::new() });
        Capture::Checkpoint { taken: self.take(&mut pending), pages, total: self.map.pages() }
    }

    fn take(&self, pending: &mut Pending) -> Taken {
        self.taken.store(pending.taken.runs.len(), Ordering::Relaxed);
        self.count.store(0, Ordering::Relaxed);
        Taken { end: pending.tail.end(), ..std::mem::take(&mut pending.taken) }
    }

    /// A frozen page as it was when it was frozen.
    pub fn frozen_page(&self, page: u64) -> Box<[u64; WORDS]> {
        let mut pending = self.pending();
        let saved = pending.frozen.as_mut().and_then(|frozen| {
            frozen.left.set(page as usize, false);
            frozen.saved.remove(&page)
        });
        saved.unwrap_or_else(|| self.map.copy(page))
    }

    /// Ends a freeze whose pages are all written.
    pub fn thaw(&self) {
        self.pending().frozen = None;
    }

    /// Ends a freeze that failed: `pages` still differ from what is in `area`.
    pub fn thaw_failed(&self, area: usize, pages: &[u64]) {
        let mut pending = self.pending();
        pending.frozen = None;
        for page in pages {
            mark(&mut pending.dirty[area], *page);
        }
    }

    /// Puts what a failed commit took back in front.
    pub fn put_back(&self, mut taken: Taken) {
        let mut pending = self.pending();
        taken.runs.append(&mut pending.taken.runs);
        taken.punch.append(&mut pending.taken.punch);
        pending.taken = taken;
        self.count.store(pending.taken.runs.len(), Ordering::Relaxed);
        self.taken.store(0, Ordering::Relaxed);
    }

    fn pending(&self) -> MutexGuard<'_, Pending> {
        // Nothing in here panics half way; should it, the map is what counts and it is atomic.
        self.pending.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Pending {
    /// Keeps a change in the tail, in pieces that a record could hold.
    fn keep(&mut self, blocks: Range<u64>, state: State) {
        let mut start = blocks.start;
        while start < blocks.end {
            let len = MAX_RUN.min(blocks.end - start);
            self.tail.keep(Run { start, len, state });
            start += len;
        }
    }

    fn change(&mut self, map: &Map, blocks: Range<u64>, state: State) {
        for page in blocks.start / BLOCKS_PER_PAGE..blocks.end.div_ceil(BLOCKS_PER_PAGE) {
            if let Some(frozen) = &mut self.frozen
                && frozen.left.get(page as usize).is_some_and(|left| *left)
            {
                frozen.saved.entry(page).or_insert_with(|| map.copy(page));
            }
            for dirty in &mut self.dirty {
                mark(dirty, page);
            }
        }
        map.set(blocks.clone(), state);
        self.taken.push(blocks, state);
    }
}

impl Taken {
    fn push(&mut self, mut blocks: Range<u64>, state: State) {
        if let Some(last) = self.runs.last_mut()
            && last.state == state
            && last.end() == blocks.start
        {
            let more = (MAX_RUN - last.len).min(blocks.end - blocks.start);
            last.len += more;
            blocks.start += more;
        }
        while !blocks.is_empty() {
            let len = MAX_RUN.min(blocks.end - blocks.start);
            self.runs.push(Run { start: blocks.start, len, state });
            blocks.start += len;
        }
    }

    fn punch_later(&mut self, blocks: Range<u64>) {
        match self.punch.last_mut() {
            Some(last) if last.end == blocks.start => last.end = blocks.end,
            _ => self.punch.push(blocks),
        }
    }
}

/// Sets the bit of `page`, which may lie past the end.
pub(super) fn mark(pages: &mut BitVec, page: u64) {
    let page = page as usize;
    if page >= pages.len() {
        pages.resize(page + 1, false);
    }
    pages.set(page, true);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn changes() -> Changes {
        let superblock = Superblock {
            id: uuid::Uuid::nil(),
            generation: 1,
            size: 1 << 40,
            records: 2,
            pages: 0,
            session: 0,
        };
        let (tail, lately) = Tail::open(None, &superblock);
        Changes::new(Map::new(), 8, Default::default(), Vec::new(), tail, lately)
    }

    #[test]
    fn neighbours_share_a_run() {
        let changes = changes();
        for block in 0..100 {
            changes.to_data(block..block + 1);
            changes.to_data(block..block + 1);
        }
        changes.to_zero(50..120, Over::Data);
        changes.to_zero(120..130, Over::Data);
        let Capture::Records(taken) = changes.capture(Need::Room(2), 0) else {
            panic!("two runs fit")
        };
        let run = |start, len, state| Run { start, len, state };
        assert_eq!(taken.runs, [run(0, 100, State::Data), run(50, 50, State::Zero)]);
        assert_eq!(taken.punch.len(), 1);
        assert_eq!(taken.punch[0], 50..100, "base has nothing to give back");
        assert!(matches!(changes.capture(Need::Room(0), 0), Capture::Nothing));
    }

    #[test]
    fn what_changes_after_the_freeze_is_not_in_the_pages() {
        let changes = changes();
        changes.to_data(0..10);
        changes.to_data(BLOCKS_PER_PAGE..BLOCKS_PER_PAGE + 10);
        let Capture::Checkpoint { pages, total, .. } = changes.capture(Need::Room(1), 1) else {
            panic!("two runs don't fit one place")
        };
        assert_eq!((pages, total), (vec![0, 1], 2));
        changes.to_zero(0..20, Over::Everything);
        changes.to_data(20..30);
        changes.to_data(2 * BLOCKS_PER_PAGE..2 * BLOCKS_PER_PAGE + 1);
        let old = changes.frozen_page(0);
        assert_eq!((old[0], old[1]), (0x55555, 0));
        changes.to_data(30..40);
        assert_eq!(changes.frozen_page(1)[0], 0x55555);
        changes.thaw();
        let Capture::Checkpoint { pages, taken, .. } = changes.capture(Need::Checkpoint, 1) else {
            panic!("asked for")
        };
        assert_eq!(pages, [0, 2], "page 1 has not changed since");
        assert_eq!(taken.runs.len(), 4);
        changes.thaw_failed(1, &pages);
        changes.put_back(taken);
        assert_eq!(changes.count(), 4);
        let Capture::Checkpoint { pages, .. } = changes.capture(Need::Checkpoint, 0) else {
            panic!("asked for")
        };
        assert_eq!(pages, [0, 1, 2], "the other area has seen nothing yet");
    }

    #[test]
    fn a_full_list_takes_no_more_zeros_until_there_was_a_commit() {
        let changes = changes();
        // Every other block is data.
        (0..100).for_each(|n| changes.map.set(2 * n..2 * n + 1, State::Data));
        assert_eq!(changes.to_zero(0..200, Over::Data), 2 * 8);
        assert_eq!(changes.to_zero(16..200, Over::Data), 2 * 8, "full");
        let take = || match changes.capture(Need::Room(100), 0) {
            Capture::Records(taken) => taken,
            _ => panic!("they fit"),
        };
        let first = take();
        assert_eq!(changes.to_zero(16..200, Over::Data), 4 * 8, "one list is under way");
        changes.put_back(first);
        assert_eq!((changes.count(), changes.to_zero(32..200, Over::Data)), (16, 4 * 8));
        let both = take();
        assert_eq!(changes.to_zero(32..200, Over::Data), 4 * 8, "as many as may be are under way");
        changes.settled(both.end);
        assert_eq!(changes.to_zero(32..200, Over::Data), 6 * 8);
    }

    #[test]
    fn long_runs_are_split() {
        let changes = changes();
        changes.to_zero(5..5 + 2 * MAX_RUN, Over::Everything);
        let Capture::Records(taken) = changes.capture(Need::Room(10), 0) else {
            panic!("they fit")
        };
        let lens: Vec<u64> = taken.runs.iter().map(|run| run.len).collect();
        assert_eq!(lens, [MAX_RUN, MAX_RUN]);
    }
}
