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
//! - A tail that lacks something is void, and is not replayed in part: one that ran over lacks its
//!   oldest runs, one that could not be written a run somewhere. It goes on recording all the same,
//!   and holds again as soon as all that it lacks is durable. That of a poisoned overlay never does.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering, compiler_fence},
};

use uuid::Uuid;

use super::format::{MAX_RUN, Run, State, Superblock};

/// "UNDRTAIL" and the version of the layout.
const MAGIC: u64 = 0x554e_4452_5441_494c ^ 2;

// Words of the head.
pub(super) const AT_MAGIC: usize = 0;
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
pub(super) const AT_VALID: usize = 10;
/// Runs that the ring has room for.
const AT_CAPACITY: usize = 11;
pub(super) const HEAD: usize = 16;

/// Words of a run: its first block; its length and state.
pub(super) const RUN: usize = 2;
const STATE_SHIFT: u32 = 62;
const LEN: u64 = (1 << STATE_SHIFT) - 1;

/// Bytes of a tail's memory: room for all the changes that may be pending or on their way to the map
/// (see `changes.rs`), and for as many again from requests under way.
pub const BYTES: usize = 1 << 20;

/// No number of a run gets there.
const END: u64 = u64::MAX / 2;

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

impl Place {
    /// Whether the tail that is kept here holds all that it should.
    pub(super) fn holds(&self) -> bool {
        self.memory.words()[AT_VALID].load(Ordering::SeqCst) == 1
    }
}

/// The tail of an open overlay.
pub(super) struct Tail {
    place: Option<Place>,
    id: Uuid,
    session: u64,
    /// Numbers of the oldest run that is not durable, and of the next to come; as in the memory.
    first: u64,
    next: u64,
    /// Where the last commit's part ends: what stands before is not added to.
    cut: u64,
    /// All runs from this number on are there.
    whole: u64,
    /// Whether the memory says that it holds.
    holds: bool,
    /// It is never to hold again.
    dead: bool,
}

impl Tail {
    /// Takes up the tail in `place` of the overlay whose map says `superblock`, or begins a new one.
    /// What is to be replayed, in order.
    pub(super) fn open(place: Option<Place>, superblock: &Superblock) -> (Tail, Vec<Run>) {
        let place = usable(place, superblock.id);
        let mut tail = Tail {
            place,
            id: superblock.id,
            session: new_session(),
            first: 0,
            next: 0,
            cut: 0,
            whole: 0,
            holds: true,
            dead: false,
        };
        let runs = tail.take_up(superblock).unwrap_or_else(|| {
            tail.begin(superblock);
            Vec::new()
        });
        (tail, runs)
    }

    /// From now on it is kept in `place`, over whatever stands there: that of an overlay whose place
    /// this one has taken. Nothing is pending.
    pub(super) fn keep_in(&mut self, place: Option<Place>, superblock: &Superblock) {
        self.place = usable(place, superblock.id);
        self.begin(superblock);
    }

    /// What commits of this session put into their superblocks; never 0.
    pub(super) fn session(&self) -> u64 {
        self.session
    }

    fn words(&self) -> Option<&[AtomicU64]> {
        self.place.as_ref().map(|place| place.memory.words())
    }

    /// Goes on with what is kept; `None` if it is not this map's, or not all there.
    fn take_up(&mut self, superblock: &Superblock) -> Option<Vec<Run>> {
        let place = self.place.as_ref()?;
        let words = place.memory.words();
        let word = |at: usize| words[at].load(Ordering::Acquire);
        let pair = |at: usize| (word(at), word(at + 1));
        let capacity = capacity(words);
        let ours = word(AT_MAGIC) == MAGIC
            && word(AT_CAPACITY) == capacity
            && pair(AT_ID) == superblock.id.as_u64_pair()
            && pair(AT_BOOT) == place.boot.as_u64_pair()
            && (superblock.session == word(AT_SESSION)
                || pair(AT_SEEN) == (superblock.generation, superblock.session));
        if !ours {
            return None;
        }
        if !place.holds() {
            tracing::warn!(overlay = %self.id, "the last daemon could not keep all that was not \
                flushed yet: that is lost");
            return None;
        }
        let (first, next) = (word(AT_FIRST), word(AT_NEXT));
        if next >= END || next.checked_sub(first).is_none_or(|count| count > capacity) {
            return None;
        }
        let run = |number| {
            let at = slot(number, capacity);
            if !place.memory.reserve(at) {
                return None;
            }
            let (start, second) = pair(at);
            let state = State::from_bits(second >> STATE_SHIFT)?;
            let len = second & LEN;
            let sound =
                state != State::Base && (1..=MAX_RUN).contains(&len) && start <= u64::MAX - len;
            sound.then_some(Run { start, len, state })
        };
        let runs = (first..next).map(run).collect::<Option<_>>()?;
        let session = word(AT_SESSION);
        (self.session, self.first, self.next) = (session, first, next);
        (self.cut, self.whole) = (next, first);
        Some(runs)
    }

    fn begin(&self, superblock: &Superblock) {
        let Some(place) = &self.place else { return };
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
        put(AT_FIRST, (self.first, self.next));
        words[AT_CAPACITY].store(capacity(words), Ordering::Relaxed);
        words[AT_VALID].store(1, Ordering::SeqCst);
    }

    /// Keeps a change.
    pub(super) fn keep(&mut self, run: Run) {
        let Some(place) = self.place.clone() else { return };
        let words = place.memory.words();
        let capacity = capacity(words);
        if self.next > self.first.max(self.cut).max(self.whole) {
            // Grows with the last run where the list of changes does.
            let last = slot(self.next - 1, capacity);
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
        let at = slot(self.next, capacity);
        let there = place.memory.reserve(at);
        if !there {
            self.lacks_before(self.next + 1, "there is no memory for it");
        } else if self.next - self.first.max(self.whole) >= capacity {
            // Said before the oldest run goes.
            self.lacks_before(self.next + 1 - capacity, "there are too many changes");
        }
        if there {
            words[at].store(run.start, Ordering::Relaxed);
            words[at + 1].store((run.state as u64) << STATE_SHIFT | run.len, Ordering::Relaxed);
        }
        // Also of a run that is lacking: what comes later must not pass for it.
        self.next += 1;
        words[AT_NEXT].store(self.next, Ordering::Release);
    }

    /// Where the tail ends now: what a commit takes ends there.
    pub(super) fn end(&mut self) -> u64 {
        self.cut = self.next;
        self.next
    }

    /// Everything before `end` is durable.
    pub(super) fn drop_before(&mut self, end: u64) {
        self.first = self.first.max(end);
        let Some(words) = self.words() else { return };
        words[AT_FIRST].store(self.first, Ordering::Release);
        if !self.holds && !self.dead && self.first >= self.whole {
            words[AT_VALID].store(1, Ordering::SeqCst);
            self.holds = true;
            tracing::info!(overlay = %self.id, "what is not flushed outlives the daemon again");
        }
    }

    /// It can't be relied on any more, whatever is committed.
    pub(super) fn void(&mut self) {
        self.dead = true;
        self.not_holding();
    }

    /// Runs before the number `whole` are missing.
    fn lacks_before(&mut self, whole: u64, why: &str) {
        self.whole = whole;
        if self.holds {
            self.not_holding();
            tracing::warn!(overlay = %self.id, why, "what is not flushed would be lost should the \
                daemon be killed before the next flush");
        }
    }

    fn not_holding(&mut self) {
        self.holds = false;
        if let Some(words) = self.words() {
            words[AT_VALID].store(0, Ordering::SeqCst);
        }
        // What is written from here on may be over what it held.
        compiler_fence(Ordering::SeqCst);
    }
}

/// `place`, if there is memory to keep a tail in.
fn usable(place: Option<Place>, id: Uuid) -> Option<Place> {
    let place = place.filter(|place| place.memory.words().len() >= HEAD + RUN);
    // Also before it is read: reading takes memory too.
    place.filter(|place| {
        let there = place.memory.reserve(0);
        if !there {
            tracing::warn!(overlay = %id, "no memory for what is not flushed yet: it is lost \
                should the daemon be killed");
        }
        there
    })
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
    use std::sync::atomic::AtomicBool;

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
        let (mut tail, found) = Tail::open(Some(place.clone()), &superblock(7, 0));
        assert_eq!(found, []);
        (0..4).for_each(|start| tail.keep(run(start)));
        let end = tail.end();
        tail.drop_before(end - 2);
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
        let (mut tail, _) = Tail::open(Some(place.clone()), &superblock(7, 0));
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
            let (mut tail, _) = Tail::open(Some(place.clone()), &superblock(7, 0));
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

    fn found(place: &Place) -> Vec<Run> {
        // A session that commits nothing leaves what it found.
        let copy: Box<[AtomicU64]> = place
            .memory
            .words()
            .iter()
            .map(|word| AtomicU64::new(word.load(Ordering::Relaxed)))
            .collect();
        let place = Place { memory: Arc::new(copy), boot: place.boot };
        Tail::open(Some(place), &superblock(7, 0)).1
    }

    #[test]
    fn one_that_ran_over_holds_again_once_what_it_lacks_is_durable() {
        let place = place(4, 1);
        let (mut tail, _) = Tail::open(Some(place.clone()), &superblock(7, 0));
        (0..3).for_each(|start| tail.keep(run(start)));
        let early = tail.end();
        (3..6).for_each(|start| tail.keep(run(start)));
        assert_eq!((found(&place), place.holds()), (vec![], false), "0 and 1 are gone");
        let late = tail.end();
        tail.keep(run(6));
        // What the first commit took was still there, but not all that came before the second.
        tail.drop_before(early);
        assert_eq!((found(&place), place.holds()), (vec![run(3), run(4), run(5), run(6)], true));
        tail.keep(run(7));
        assert!(!place.holds(), "3 is gone");
        tail.drop_before(late);
        assert_eq!(found(&place), [run(6), run(7)]);
        (8..11).for_each(|start| tail.keep(run(start)));
        assert!(!place.holds());
        tail.drop_before(late);
        assert!(!place.holds(), "6 is gone, and not durable");
        tail.void();
        let end = tail.end();
        tail.drop_before(end);
        assert!(!place.holds(), "for ever");
    }

    /// Memory whose words from the second run on are missing while it says so.
    struct Short(Box<[AtomicU64]>, AtomicBool);

    impl Memory for Short {
        fn words(&self) -> &[AtomicU64] {
            &self.0
        }

        fn reserve(&self, word: usize) -> bool {
            word < HEAD + RUN || !self.1.load(Ordering::Relaxed)
        }
    }

    #[test]
    fn one_without_memory_lacks_what_it_could_not_write() {
        let words = (0..HEAD + 4 * RUN).map(|_| AtomicU64::new(0)).collect();
        let memory = Arc::new(Short(words, AtomicBool::new(true)));
        let place = Place { memory: memory.clone(), boot: Uuid::from_u128(1) };
        let (mut tail, _) = Tail::open(Some(place.clone()), &superblock(7, 0));
        tail.keep(run(0));
        let before = tail.end();
        tail.keep(run(1));
        memory.1.store(false, Ordering::Relaxed);
        // It does not grow with a neighbour that is not there.
        tail.keep(Run { start: 13, ..run(1) });
        tail.drop_before(before);
        assert!(!place.holds(), "the run that is lacking came after it");
        let end = tail.end();
        tail.keep(run(3));
        tail.drop_before(end - 1);
        assert_eq!(found(&place), [Run { start: 13, ..run(1) }, run(3)]);
        tail.drop_before(end);
        assert_eq!(found(&place), [run(3)]);
        // What can't be read is not taken for empty.
        memory.1.store(true, Ordering::Relaxed);
        assert_eq!(Tail::open(Some(place), &superblock(7, 0)).1, []);
    }

    #[test]
    fn a_tail_of_another_capacity_is_left_alone() {
        let place = place(4, 1);
        let (mut tail, _) = Tail::open(Some(place.clone()), &superblock(7, 0));
        tail.keep(run(1));
        assert_eq!(found(&place), [run(1)]);
        place.memory.words()[AT_CAPACITY].store(5, Ordering::Relaxed);
        assert_eq!(found(&place), []);
    }

    #[test]
    fn whatever_the_memory_holds_nothing_breaks() {
        let mut rng = fastrand::Rng::with_seed(3);
        for _ in 0..2000 {
            let place = place(3, 1);
            let (mut tail, _) = Tail::open(Some(place.clone()), &superblock(7, 0));
            tail.keep(run(1));
            let words = place.memory.words();
            for _ in 0..rng.usize(0..4) {
                let word = &words[rng.usize(0..words.len())];
                let value = [rng.u64(..), rng.u64(0..5), u64::MAX - rng.u64(0..5)];
                word.store(*rng.choice(&value).expect("three"), Ordering::Relaxed);
            }
            let (mut tail, runs) = Tail::open(Some(place), &superblock(7, 0));
            assert!(runs.iter().all(|run| run.end() > run.start && run.state != State::Base));
            (0..10).for_each(|start| tail.keep(run(start)));
            let end = tail.end();
            tail.drop_before(end);
        }
    }
}
