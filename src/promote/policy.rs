//! The policy of one reader disk: from heat, latencies and limits to what is promoted and evicted.
//!
//! A chunk's score is its heat times what a local read saves. In a tick, in this order: what is
//! beyond capacity is evicted, lowest score first; pinned chunks come in; then warm lists; then the
//! hottest chunks of images that pay, each past admission and, when the cache is full, past the
//! victim's score by a factor.
//!
//! ```text
//!            decided          promoted          decided
//!    known ----------> coming ---------> cached ---------> leaving
//!    ^ ^ ^               | | failed        |                  |
//!    | | +--- (pinned) --+ +--> forgotten  | lost             | dropped
//!  touch +---------------------------------+------------------+
//! ```
//!
//! Invariants:
//! - What is coming and cached is within capacity whenever promotions are decided. What is leaving
//!   takes up room from the tick after its eviction on, for as long as its last reader stays.
//! - Promotions of any stretch of time are within its budget, plus one burst ([`BURST`]).
//! - A pinned chunk is never evicted, not even when capacity shrinks.
//! - Nothing is promoted on its heat alone unless its image pays.
//! - Work is O(touched + decided), each times a logarithm and the number of images; memory is
//!   bounded by [`Heat::limit`], capacity, [`PINS`] and [`WARM`]. No clock: time is the sum of the
//!   ticks.

use std::collections::{BTreeSet, VecDeque};
use std::time::Duration;

use super::gain::Gains;
use super::heat::{Heat, Key, Pin, Rank, State};
use super::runs::Runs;
use super::settings::Settings;
use super::tick::{Decisions, Tick, Totals};
use crate::error::{Error, Kind, Result};
use crate::units::CHUNK;

/// Chunks that one tick may promote, and as many that it may evict.
pub const MOVES: usize = 1024;
/// Chunks that may be pinned on one disk: 256 GiB.
pub const PINS: usize = 1 << 20;
/// Chunks that warm lists may hold: 64 GiB.
pub const WARM: usize = 1 << 18;
/// How long the budget is saved up when nothing is worth promoting.
pub const BURST: Duration = Duration::from_secs(4);
/// Chunks remembered beyond the cache: at least, per chunk of capacity, at most.
const KNOWN: (usize, usize, usize) = (4096, 4, 1 << 19);
/// How long a pinned chunk that could not be promoted waits for its next try.
const RETRY: Duration = Duration::from_secs(30);

/// The policy of one reader disk.
pub struct Policy {
    settings: Settings,
    heat: Heat,
    runs: Runs,
    gains: Gains,
    /// Nanoseconds since the policy was made.
    clock: u64,
    /// Bytes that may be written now.
    tokens: u64,
    /// Pinned chunks that are not in the cache, in the order they were asked for.
    wanted: VecDeque<Key>,
    /// Pinned chunks that failed, and when they are tried again.
    later: VecDeque<(u64, Key)>,
    pins: usize,
    warm: VecDeque<Key>,
    totals: Totals,
}

impl Policy {
    /// A policy for an empty cache.
    ///
    /// # Errors
    /// [`Kind::Invalid`] if a setting makes no sense; the context names it.
    pub fn new(settings: Settings) -> Result<Policy> {
        settings.check()?;
        Ok(Policy {
            settings,
            heat: Heat::new(KNOWN.0),
            runs: Runs::new(settings.long_run),
            gains: Gains::new(settings.margin),
            clock: 0,
            tokens: 0,
            wanted: VecDeque::new(),
            later: VecDeque::new(),
            pins: 0,
            warm: VecDeque::new(),
            totals: Totals::default(),
        })
    }

    /// Takes in what a tick brought and decides. To be called once a tick, also when nothing was
    /// read.
    pub fn tick(&mut self, tick: &Tick) -> Decisions {
        self.advance(tick);
        self.gains.measure(tick.local, tick.copies);
        self.account(tick);
        let capacity = usize::try_from(tick.capacity / CHUNK).unwrap_or(usize::MAX);
        self.heat.set_limit(capacity.saturating_mul(KNOWN.1).clamp(KNOWN.0, KNOWN.2));
        let mut round = Decisions::default();
        self.shrink(capacity, &mut round);
        // What is leaving since an earlier tick still takes up its room: a reader holds it.
        let free = usize::try_from(tick.free / CHUNK).unwrap_or(usize::MAX);
        let on_disk = self.heat.count(State::Cached) + self.heat.count(State::Leaving);
        let held = self.heat.count(State::Leaving) - round.evict.len();
        let room = capacity.min(on_disk.saturating_add(free)).saturating_sub(held);
        self.bring_pinned(room, &mut round);
        self.bring_warm(room, &mut round);
        self.bring_hot(room, &mut round);
        round
    }

    /// The mover's answer: the chunk is in the cache.
    pub fn promoted(&mut self, key: Key) {
        if self.heat.state(key) == Some(State::Coming) {
            self.heat.place(key, State::Cached, self.now());
            self.totals.promoted += 1;
        }
    }

    /// The mover's answer: the chunk could not be promoted. It has to earn its next try anew; a
    /// pinned one is tried again after a while.
    pub fn failed(&mut self, key: Key) {
        if self.heat.state(key) != Some(State::Coming) {
            return;
        }
        self.totals.failed += 1;
        if self.heat.is_pinned(key) {
            self.heat.place(key, State::Known, self.now());
            self.later.push_back((self.clock.saturating_add(nanos(RETRY)), key));
        } else {
            self.heat.forget(key);
        }
    }

    /// The chunk is not in the cache any more and takes up no room: its eviction is done, or the
    /// cache lost it.
    pub fn dropped(&mut self, key: Key) {
        match self.heat.state(key) {
            Some(State::Coming) => self.failed(key),
            Some(State::Cached | State::Leaving) => {
                self.heat.place(key, State::Known, self.now());
                if self.heat.is_pinned(key) {
                    self.wanted.push_back(key);
                }
            }
            Some(State::Known) | None => {}
        }
    }

    /// The chunk was found in the cache when the service started: to be told before anything is pinned.
    pub fn adopt(&mut self, key: Key) {
        if !matches!(self.heat.state(key), Some(State::Cached | State::Leaving)) {
            self.heat.place(key, State::Cached, self.now());
        }
    }

    /// Those of these chunks that are not pinned, if [`Policy::pin`] would pin them.
    ///
    /// # Errors
    /// As there.
    pub fn pinnable(&self, keys: &[Key]) -> Result<BTreeSet<Key>> {
        let fresh: BTreeSet<Key> =
            keys.iter().copied().filter(|&key| !self.heat.is_pinned(key)).collect();
        if fresh.len() > PINS - self.pins {
            let context = format!(
                "pinning {} chunks where {} are pinned: a disk's cache takes {PINS}; unpin others first",
                fresh.len(),
                self.pins
            );
            return Err(Error::new(Kind::NoSpace, context));
        }
        Ok(fresh)
    }

    /// Keeps these chunks in the cache, whatever their heat, and promotes those that are not there.
    ///
    /// # Errors
    /// [`Kind::NoSpace`] if that makes more than [`PINS`]; then none of them is pinned.
    pub fn pin(&mut self, keys: &[Key]) -> Result<()> {
        let fresh = self.pinnable(keys)?;
        self.pins += fresh.len();
        // In the order they were given, so that what is needed first comes first.
        for &key in keys.iter().filter(|key| fresh.contains(key)) {
            if self.heat.is_pinned(key) {
                continue;
            }
            self.heat.set_pin(key, Pin::Held, self.now());
            if self.heat.state(key) == Some(State::Known) {
                self.wanted.push_back(key);
            }
        }
        Ok(())
    }

    /// Lets these chunks compete again; they stay in the cache for as long as they are worth it.
    pub fn unpin(&mut self, keys: &[Key]) {
        for &key in keys {
            if self.heat.is_pinned(key) {
                self.heat.set_pin(key, Pin::Released, self.now());
                self.pins -= 1;
            }
        }
        self.wanted.retain(|&key| self.heat.is_pinned(key));
        self.later.retain(|&(_, key)| self.heat.is_pinned(key));
    }

    /// Promotes these chunks in this order as budget allows, without waiting for touches. When the
    /// cache is full, each counts as touched once and has to be worth more than what it replaces.
    ///
    /// # Errors
    /// [`Kind::NoSpace`] if more than [`WARM`] would wait; then none of them does.
    pub fn warm(&mut self, keys: &[Key]) -> Result<()> {
        if keys.len() > WARM - self.warm.len() {
            let context = format!(
                "warming {} chunks while {} still wait: at most {WARM} may; warm fewer, or later",
                keys.len(),
                self.warm.len()
            );
            return Err(Error::new(Kind::NoSpace, context));
        }
        self.warm.extend(keys);
        Ok(())
    }

    /// The image's cache is gone, with all that was in it. Its chunks keep their heat and their pins;
    /// what is on its way is answered yet.
    pub fn lost(&mut self, image: u32) {
        let inside =
            |key: &Key| matches!(self.heat.state(*key), Some(State::Cached | State::Leaving));
        let keys: Vec<Key> = self.heat.of_image(image).filter(inside).collect();
        keys.into_iter().for_each(|key| self.dropped(key));
    }

    /// Forgets an image: it is gone, and its chunks with it.
    pub fn forget_image(&mut self, image: u32) {
        self.pins -= self.heat.of_image(image).filter(|&key| self.heat.is_pinned(key)).count();
        self.heat.forget_image(image);
        self.gains.forget_image(image);
        self.runs.forget_image(image);
        self.wanted.retain(|key| key.image != image);
        self.later.retain(|(_, key)| key.image != image);
        self.warm.retain(|key| key.image != image);
    }

    /// What the cache was good for so far.
    pub fn totals(&self) -> Totals {
        self.totals
    }

    /// The hottest `count` chunks that are not pinned, with the heat and the state of each, hottest
    /// first.
    pub fn hottest(&self, count: usize) -> Vec<(Key, f64, State)> {
        let all = self.heat.hottest(count).into_iter();
        all.map(|(rank, key, state)| (key, rank.heat(self.now()), state)).collect()
    }

    /// The table, to look at.
    pub fn heat(&self) -> &Heat {
        &self.heat
    }

    /// Whether chunks of an image are promoted for their heat at present.
    pub fn pays(&self, image: u32) -> bool {
        self.gains.pays(image)
    }

    /// How many pinned and how many warm chunks wait for room, budget or their next try.
    pub fn waiting(&self) -> (usize, usize) {
        (self.wanted.len() + self.later.len(), self.warm.len())
    }

    fn now(&self) -> Rank {
        Rank::at(self.clock, nanos(self.settings.half_life))
    }

    fn advance(&mut self, tick: &Tick) {
        self.clock = self.clock.saturating_add(nanos(tick.elapsed));
        let over = |time: Duration| {
            let bytes = u128::from(tick.budget) * time.as_nanos() / 1_000_000_000;
            u64::try_from(bytes).unwrap_or(u64::MAX)
        };
        // A budget of less than a chunk in a burst is saved up for one; none at all never is.
        let most = if tick.budget == 0 { 0 } else { over(BURST).max(CHUNK) };
        self.tokens = self.tokens.saturating_add(over(tick.elapsed)).min(most);
        while let Some(&(due, key)) = self.later.front() {
            if due > self.clock {
                break;
            }
            self.later.pop_front();
            self.wanted.push_back(key);
        }
    }

    fn account(&mut self, tick: &Tick) {
        for hit in tick.hits {
            let saves = self.gains.saves(hit.key.image);
            self.totals.hits += u64::from(hit.reads);
            let saved = saves.saturating_mul(u64::from(hit.reads));
            self.totals.saved = self.totals.saved.saturating_add(saved);
        }
        for miss in tick.touches {
            let local = self.gains.local().saturating_mul(u64::from(miss.reads));
            self.totals.misses += u64::from(miss.reads);
            let missed = miss.nanos.saturating_sub(local);
            self.totals.missed = self.totals.missed.saturating_add(missed);
        }
        let mut touched: Vec<Key> =
            tick.touches.iter().chain(tick.hits).map(|touch| touch.key).collect();
        touched.sort_unstable();
        touched.dedup();
        self.runs.sift(&mut touched);
        let now = self.now();
        touched.into_iter().for_each(|key| self.heat.touch(key, now));
    }

    fn occupied(&self) -> usize {
        self.heat.count(State::Cached) + self.heat.count(State::Coming)
    }

    /// The chunk in the cache that is worth least.
    fn victim(&self) -> Option<(Rank, Key)> {
        let coldest = self.heat.images().filter_map(|image| {
            let (rank, key) = self.heat.coldest_cached(image)?;
            Some((rank.times(self.gains.factor(image)), key))
        });
        coldest.min()
    }

    /// The chunk outside that is worth most, of those that earned it.
    fn candidate(&self) -> Option<(Rank, Key)> {
        let earned = self.now().times(Rank::factor(f64::from(self.settings.admission) - 0.5));
        let paying = self.heat.images().filter(|&image| self.gains.pays(image));
        let hottest = paying.filter_map(|image| {
            let (rank, key) = self.heat.hottest_known(image).filter(|&(rank, _)| rank >= earned)?;
            Some((rank.times(self.gains.factor(image)), key))
        });
        hottest.max_by_key(|&(score, key)| (score, std::cmp::Reverse(key)))
    }

    fn evict(&mut self, key: Key, round: &mut Decisions) {
        self.heat.place(key, State::Leaving, self.now());
        self.totals.evicted += 1;
        round.evict.push(key);
    }

    fn promote(&mut self, key: Key, round: &mut Decisions) {
        self.heat.place(key, State::Coming, self.now());
        self.tokens -= CHUNK;
        self.totals.written += CHUNK;
        round.promote.push(key);
    }

    fn may_promote(&self, round: &Decisions) -> bool {
        self.tokens >= CHUNK && round.promote.len() < MOVES && round.evict.len() < MOVES
    }

    fn shrink(&mut self, capacity: usize, round: &mut Decisions) {
        while self.occupied() > capacity && round.evict.len() < MOVES {
            let Some((_, key)) = self.victim() else { return };
            self.evict(key, round);
        }
    }

    fn bring_pinned(&mut self, room: usize, round: &mut Decisions) {
        while let Some(&key) = self.wanted.front() {
            let waits = self.heat.is_pinned(key) && self.heat.state(key) == Some(State::Known);
            if waits {
                if !self.may_promote(round) {
                    return;
                }
                while self.occupied() >= room && round.evict.len() < MOVES {
                    let Some((_, victim)) = self.victim() else { return };
                    self.evict(victim, round);
                }
                self.promote(key, round);
            }
            self.wanted.pop_front();
        }
    }

    fn bring_warm(&mut self, room: usize, round: &mut Decisions) {
        while let Some(&key) = self.warm.front() {
            if matches!(self.heat.state(key), None | Some(State::Known)) {
                if !self.may_promote(round) {
                    return;
                }
                let score = self.now().times(self.gains.factor(key.image));
                if self.make_room(score, room, round) {
                    self.promote(key, round);
                }
            }
            self.warm.pop_front();
        }
    }

    fn bring_hot(&mut self, room: usize, round: &mut Decisions) {
        while self.may_promote(round) {
            let Some((score, key)) = self.candidate() else { return };
            if !self.make_room(score, room, round) {
                return;
            }
            self.promote(key, round);
        }
    }

    /// Makes room for one chunk of this score, if there is none, by giving up one that is worth
    /// less.
    fn make_room(&mut self, score: Rank, room: usize, round: &mut Decisions) -> bool {
        if self.occupied() < room {
            return true;
        }
        // Only one for one: what is beyond room for want of free space has to leave first.
        let swaps = self.occupied() == room;
        let edge = Rank::factor(self.settings.edge);
        match self.victim().filter(|&(worth, _)| swaps && score > worth.times(edge)) {
            Some((_, victim)) => {
                self.evict(victim, round);
                true
            }
            None => false,
        }
    }
}

fn nanos(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}
