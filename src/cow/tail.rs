//! The tail: changes of state that no commit has made durable yet, kept where they outlive the process.
//!
//! A power cut takes them, as it takes any disk's volatile cache. The death of the process must not:
//! to a client whose device waits for the next process, or who connects again, the disk never went
//! away, and what it acknowledged is there. The written data is in the kernel's hands by then; what
//! would be missing is which blocks it is in.
//!
//! The memory is shared with the next process (a mapped file, in a directory that does not survive
//! the kernel). It holds a ring of runs of changes, in order; a commit drops those that it took. The
//! next process replays what it finds onto what the map file says: a run that had become durable all
//! the same is replayed to no effect, as long as none that came after it is missing.
//!
//! Invariants:
//! - A change is in the tail before its write is acknowledged, and until it is durable.
//! - A tail is replayed onto exactly the map that it was kept beside: same overlay, same boot of the
//!   kernel, and no session but its own has committed since. Anything else is left alone.
//! - A tail that ran over, or whose overlay was poisoned, is void: it is not replayed in part.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

use uuid::Uuid;

use super::format::{MAX_RUN, Run, State, Superblock};

/// "UNDRTAIL" and the version of the layout.
const MAGIC: u64 = 0x554e_4452_5441_494c ^ 1;

// Words of the head.
const AT_MAGIC: usize = 0;
const AT_ID: usize = 1;
const AT_BOOT: usize = 3;
/// The session that keeps the tail.
const AT_SESSION: usize = 5;
/// What the map's superblock said when the session began: generation and session.
const AT_SEEN: usize = 6;
/// Numbers of the oldest run that is kept, and of the next to come.
const AT_FIRST: usize = 8;
const AT_NEXT: usize = 9;
/// 1 while the tail holds.
const AT_VALID: usize = 10;
const HEAD: usize = 16;

/// Words of a run: its first block; its length and state.
const RUN: usize = 2;
const STATE_SHIFT: u32 = 62;
const LEN: u64 = (1 << STATE_SHIFT) - 1;

/// Bytes of a tail's memory: room for twice the changes after which writers wait for a commit.
pub const BYTES: usize = 1 << 20;

/// Memory that outlives the process, and only this kernel.
pub trait Memory: Send + Sync {
    /// Its words; zeros at first. There is room for the head and a run.
    fn words(&self) -> &[AtomicU64];

    /// Makes sure that a word can be written; false if there is no memory for it.
    fn reserve(&self, word: usize) -> bool;
}

impl Memory for Box<[AtomicU64]> {
    fn words(&self) -> &[AtomicU64] {
        self
    }

    fn reserve(&self, _: usize) -> bool {
        true
    }
}

/// Where an overlay's tail is kept, and the boot of the kernel that the memory belongs to.
#[derive(Clone)]
pub struct Place {
    /// The memory.
    pub memory: Arc<dyn Memory>,
    /// `/proc/sys/kernel/random/boot_id`.
    pub boot: Uuid,
}

/// The tail of an open overlay. All but `first` is changed by one writer at a time.
pub(super) struct Tail {
    place: Option<Place>,
    session: u64,
    /// Where the last commit's part ends: what stands before is not added to.
    cut: AtomicU64,
}

impl Tail {
    /// Takes up the tail in `place` of the overlay whose map says `superblock`, or begins a new one.
    /// What is to be replayed, in order.
    pub(super) fn open(place: Option<Place>, superblock: &Superblock) -> (Tail, Vec<Run>) {
        let Some(place) = place
            .filter(|place| place.memory.words().len() >= HEAD + RUN && place.memory.reserve(0))
        else {
            let cut = AtomicU64::new(0);
            return (Tail { place: None, session: new_session(), cut }, Vec::new());
        };
        let word = |at: usize| place.memory.words()[at].load(Ordering::Acquire);
        let (session, cut) = (word(AT_SESSION), AtomicU64::new(word(AT_NEXT)));
        let tail = Tail { place: Some(place), session, cut };
        match tail.kept(superblock) {
            Some(runs) => (tail, runs),
            None => (tail.begin(superblock), Vec::new()),
        }
    }

    /// What commits of this session put into their superblocks; never 0.
    pub(super) fn session(&self) -> u64 {
        self.session
    }

    fn words(&self) -> Option<&[AtomicU64]> {
        self.place.as_ref().map(|place| place.memory.words())
    }

    /// The runs that are kept; `None` if they are not this map's, or not all there.
    fn kept(&self, superblock: &Superblock) -> Option<Vec<Run>> {
        let place = self.place.as_ref()?;
        let words = place.memory.words();
        let word = |at: usize| words[at].load(Ordering::Acquire);
        let pair = |at: usize| (word(at), word(at + 1));
        let ours = word(AT_MAGIC) == MAGIC
            && word(AT_VALID) == 1
            && pair(AT_ID) == superblock.id.as_u64_pair()
            && pair(AT_BOOT) == place.boot.as_u64_pair()
            && (superblock.session == word(AT_SESSION)
                || pair(AT_SEEN) == (superblock.generation, superblock.session));
        if !ours {
            return None;
        }
        let (first, next) = (word(AT_FIRST), word(AT_NEXT));
        let capacity = capacity(words);
        if next.checked_sub(first).is_none_or(|count| count > capacity) {
            return None;
        }
        (first..next)
            .map(|number| {
                let at = slot(number, capacity);
                let (start, second) = pair(at);
                let state = State::from_bits(second >> STATE_SHIFT)?;
                let len = second & LEN;
                (state != State::Base && len > 0).then_some(Run { start, len, state })
            })
            .collect()
    }

    fn begin(mut self, superblock: &Superblock) -> Tail {
        self.session = new_session();
        self.cut = AtomicU64::new(0);
        if let Some(place) = &self.place {
            let words = place.memory.words();
            words[AT_VALID].store(0, Ordering::SeqCst);
            let put = |at: usize, (first, second): (u64, u64)| {
                words[at].store(first, Ordering::Relaxed);
                words[at + 1].store(second, Ordering::Relaxed);
            };
            words[AT_MAGIC].store(MAGIC, Ordering::Relaxed);
            put(AT_ID, superblock.id.as_u64_pair());
            put(AT_BOOT, place.boot.as_u64_pair());
            words[AT_SESSION].store(self.session, Ordering::Relaxed);
            put(AT_SEEN, (superblock.generation, superblock.session));
            put(AT_FIRST, (0, 0));
            words[AT_VALID].store(1, Ordering::SeqCst);
        }
        self
    }

    /// Keeps a change. One writer at a time.
    pub(super) fn keep(&self, run: Run) {
        let Some(words) = self.words() else { return };
        let (first, next) =
            (words[AT_FIRST].load(Ordering::Acquire), words[AT_NEXT].load(Ordering::Relaxed));
        let capacity = capacity(words);
        if next > first.max(self.cut.load(Ordering::Relaxed)) {
            // Grows with the last run where the list of changes does.
            let last = slot(next - 1, capacity);
            let start = words[last].load(Ordering::Relaxed);
            let second = words[last + 1].load(Ordering::Relaxed);
            let len = second & LEN;
            let grows = second >> STATE_SHIFT == run.state as u64
                && start.checked_add(len) == Some(run.start)
                && len + run.len <= MAX_RUN;
            if grows {
                words[last + 1].store(second + run.len, Ordering::Release);
                return;
            }
        }
        if next.wrapping_sub(first) >= capacity {
            self.void();
            return;
        }
        let at = slot(next, capacity);
        if !self.place.as_ref().is_some_and(|place| place.memory.reserve(at)) {
            self.void();
            return;
        }
        words[at].store(run.start, Ordering::Relaxed);
        words[at + 1].store((run.state as u64) << STATE_SHIFT | run.len, Ordering::Relaxed);
        words[AT_NEXT].store(next + 1, Ordering::Release);
    }

    /// Where the tail ends now: what a commit takes ends there. No writer may be at it.
    pub(super) fn end(&self) -> u64 {
        let end = self.words().map_or(0, |words| words[AT_NEXT].load(Ordering::Relaxed));
        self.cut.store(end, Ordering::Relaxed);
        end
    }

    /// Everything before `end` is durable.
    pub(super) fn drop_before(&self, end: u64) {
        if let Some(words) = self.words() {
            words[AT_FIRST].fetch_max(end, Ordering::AcqRel);
        }
    }

    /// It can't be relied on any more.
    pub(super) fn void(&self) {
        if let Some(words) = self.words() {
            words[AT_VALID].store(0, Ordering::SeqCst);
        }
    }
}

fn new_session() -> u64 {
    Uuid::new_v4().as_u64_pair().0 | 1
}

fn capacity(words: &[AtomicU64]) -> u64 {
    ((words.len() - HEAD) / RUN) as u64
}

fn slot(number: u64, capacity: u64) -> usize {
    HEAD + (number % capacity) as usize * RUN
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place(runs: usize, boot: u128) -> Place {
        let words: Box<[AtomicU64]> = (0..HEAD + runs * RUN).map(|_| AtomicU64::new(0)).collect();
        Place { memory: Arc::new(words), boot: Uuid::from_u128(boot) }
    }

    fn superblock(generation: u64, session: u64) -> Superblock {
        let id = Uuid::from_u128(5);
        Superblock { id, generation, size: 1 << 30, records: 64, pages: 0, session }
    }

    fn run(start: u64) -> Run {
        Run { start: start * 10, len: 3, state: State::Zero }
    }

    #[test]
    fn what_is_not_durable_is_found_by_the_next() {
        let place = place(4, 1);
        let (tail, found) = Tail::open(Some(place.clone()), &superblock(7, 0));
        assert_eq!(found, []);
        (0..4).for_each(|start| tail.keep(run(start)));
        tail.drop_before(tail.end() - 2);
        tail.keep(run(9));
        let session = tail.session();
        drop(tail);
        // As it was found, or as the session's own commit left it.
        for seen in [superblock(7, 0), superblock(8, session), superblock(9, session)] {
            let (tail, found) = Tail::open(Some(place.clone()), &seen);
            assert_eq!(found, [run(2), run(3), run(9)]);
            assert_eq!(tail.session(), session, "it goes on with the same");
        }
    }

    #[test]
    fn neighbours_share_a_run_unless_a_commit_took_it() {
        let place = place(2, 1);
        let (tail, _) = Tail::open(Some(place.clone()), &superblock(7, 0));
        let one = |start| Run { start, len: 1, state: State::Data };
        (0..100).for_each(|start| tail.keep(one(start)));
        let end = tail.end();
        tail.keep(one(100));
        tail.keep(one(101));
        tail.drop_before(end);
        let kept = Run { start: 100, len: 2, state: State::Data };
        assert_eq!(Tail::open(Some(place), &superblock(7, 0)).1, [kept]);
    }

    #[test]
    fn a_tail_of_something_else_is_left_alone() {
        let strangers: [(Superblock, u128); 4] = [
            (superblock(8, 0), 1),
            (superblock(7, 3), 1),
            (Superblock { id: Uuid::from_u128(6), ..superblock(7, 0) }, 1),
            (superblock(7, 0), 2),
        ];
        for (seen, boot) in strangers {
            let place = place(4, 1);
            let (tail, _) = Tail::open(Some(place.clone()), &superblock(7, 0));
            tail.keep(run(1));
            let place = Place { boot: Uuid::from_u128(boot), ..place };
            let (other, found) = Tail::open(Some(place.clone()), &seen);
            assert_eq!(found, [], "{seen:?} {boot}");
            assert_ne!(other.session(), tail.session());
            assert_eq!(
                Tail::open(Some(place), &seen).0.session(),
                other.session(),
                "it began anew"
            );
        }
    }

    #[test]
    fn one_that_ran_over_is_void() {
        let place = place(2, 1);
        let (tail, _) = Tail::open(Some(place.clone()), &superblock(7, 0));
        (0..3).for_each(|start| tail.keep(run(start)));
        assert_eq!(Tail::open(Some(place), &superblock(7, 0)).1, []);
    }

    #[test]
    fn whatever_the_memory_holds_nothing_breaks() {
        let mut rng = fastrand::Rng::with_seed(3);
        for _ in 0..2000 {
            let place = place(3, 1);
            let (tail, _) = Tail::open(Some(place.clone()), &superblock(7, 0));
            tail.keep(run(1));
            let words = place.memory.words();
            for _ in 0..rng.usize(0..4) {
                let word = &words[rng.usize(0..words.len())];
                word.store(if rng.bool() { rng.u64(..) } else { rng.u64(0..5) }, Ordering::Relaxed);
            }
            let (tail, runs) = Tail::open(Some(place), &superblock(7, 0));
            assert!(runs.iter().all(|run| run.len > 0 && run.state != State::Base));
            (0..10).for_each(|start| tail.keep(run(start)));
        }
    }
}
