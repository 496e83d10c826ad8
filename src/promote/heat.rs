//! How hot each chunk is: touches that fade, in an order that never has to be refreshed.
//!
//! A touch is worth one when it happens and half of that a half-life later. Instead of fading every
//! entry at every tick, an entry keeps its [`Rank`]: the base-2 logarithm of its touches, each
//! weighted by 2^(time of the touch / half-life). Heat now is 2^(rank - now). As time passes all
//! entries fade by the same factor, so the order of ranks is the order of heats for as long as
//! nothing is touched: a touch costs O(log n), the hottest and the coldest are exact, and nothing
//! ever walks the table.
//!
//! Heat saturates at [`MOST`] touches, so that a favourite of many days does not hold its place for
//! hours after its day; among the saturated the one touched last is the hottest.
//!
//! Invariants:
//! - One chunk, one entry, in one [`State`]; an entry that is not pinned is in the order of its
//!   image and state (known or cached), a pinned one, or one on its way in or out, in none.
//! - Entries that are merely known are at most [`Heat::limit`]; the coldest are forgotten first.
//!   What is cached, on its way or pinned is never forgotten.
//! - No clock: the caller says what time it is, and time doesn't run backwards.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};

use crate::units::Chunk;

/// The most that a chunk's heat comes to.
pub const MOST: f64 = 16.0;

/// A chunk of an image, by the handle under which the caller knows the image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Key {
    /// The caller's handle of the image.
    pub image: u32,
    /// Which chunk of the image.
    pub chunk: Chunk,
}

/// A logarithm of base 2, in units of 2^-20: of heat at time zero, of a factor, or of time in
/// half-lives.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Rank(i64);

impl Rank {
    const UNIT: f64 = (1 << 20) as f64;

    /// `nanos` of time, of which a half-life is `half_life` (not zero): what one touch then is
    /// worth.
    pub fn at(nanos: u64, half_life: u64) -> Rank {
        let units = (u128::from(nanos) << 20) / u128::from(half_life.max(1));
        Rank(i64::try_from(units).unwrap_or(i64::MAX / 4).min(i64::MAX / 4))
    }

    /// The logarithm of a factor; of nothing, or less than one in 2^40, that of 2^-40.
    pub fn factor(times: f64) -> Rank {
        Rank((times.max(0.0).log2().clamp(-40.0, 64.0) * Rank::UNIT).round() as i64)
    }

    /// The product, as ranks are logarithms.
    #[must_use]
    pub fn times(self, factor: Rank) -> Rank {
        Rank(self.0.saturating_add(factor.0))
    }

    /// What is left of it at time `now`, as a plain number.
    pub fn heat(self, now: Rank) -> f64 {
        (self.0.saturating_sub(now.0) as f64 / Rank::UNIT).exp2()
    }

    /// The sum, as of two heats.
    fn plus(self, other: Rank) -> Rank {
        let (high, low) = (self.0.max(other.0), self.0.min(other.0));
        let apart = high.saturating_sub(low) as f64 / Rank::UNIT;
        Rank(high.saturating_add(((-apart).exp2().ln_1p() / 2f64.ln() * Rank::UNIT).round() as i64))
    }
}

/// Where a chunk is, as far as the cache is concerned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// Not in the cache; it was touched, or somebody wants it there.
    Known,
    /// Being copied into the cache.
    Coming,
    /// In the cache.
    Cached,
    /// Being evicted; its space is not free yet.
    Leaving,
}

#[derive(Clone, Copy, Debug)]
struct Entry {
    rank: Rank,
    /// When it was last touched; a second touch at the same time is none.
    touched: Option<Rank>,
    state: State,
    pinned: bool,
}

/// The entries of one image that compete with others, coldest first. Of equals among the known, the
/// first of the image is the hottest, so that a boot is promoted in its order.
#[derive(Default)]
struct Orders {
    known: BTreeSet<(Rank, Reverse<Chunk>)>,
    cached: BTreeSet<(Rank, Chunk)>,
}

/// The table.
pub struct Heat {
    limit: usize,
    entries: BTreeMap<Key, Entry>,
    orders: BTreeMap<u32, Orders>,
    ordered: usize,
    coming: usize,
    cached: usize,
    leaving: usize,
}

impl Heat {
    /// An empty table that remembers at most `limit` chunks beyond those in the cache.
    pub fn new(limit: usize) -> Heat {
        let (entries, orders) = (BTreeMap::new(), BTreeMap::new());
        Heat { limit, entries, orders, ordered: 0, coming: 0, cached: 0, leaving: 0 }
    }

    /// Changes how many chunks are remembered, and forgets the coldest of those beyond.
    pub fn set_limit(&mut self, limit: usize) {
        self.limit = limit;
        self.forget_beyond();
    }

    /// How many chunks may be remembered beyond those in the cache, coming, leaving or pinned.
    pub fn limit(&self) -> usize {
        self.limit
    }

    /// How many chunks the table holds in all.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether it holds none.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// How many chunks are in this state, pinned or not.
    pub fn count(&self, state: State) -> usize {
        match state {
            State::Known => self.entries.len() - self.coming - self.cached - self.leaving,
            State::Coming => self.coming,
            State::Cached => self.cached,
            State::Leaving => self.leaving,
        }
    }

    /// The state of a chunk, if the table knows it.
    pub fn state(&self, key: Key) -> Option<State> {
        self.entries.get(&key).map(|entry| entry.state)
    }

    /// Whether a chunk is pinned.
    pub fn is_pinned(&self, key: Key) -> bool {
        self.entries.get(&key).is_some_and(|entry| entry.pinned)
    }

    /// The rank of a chunk, if it was ever touched or placed.
    pub fn rank(&self, key: Key) -> Option<Rank> {
        self.entries.get(&key).map(|entry| entry.rank)
    }

    /// Adds one touch, unless the chunk had one at this very time; a stranger becomes known.
    pub fn touch(&mut self, key: Key, now: Rank) {
        let Some(entry) = self.entries.get(&key).copied() else {
            self.insert(key, now, Some(now), State::Known);
            return self.forget_beyond();
        };
        if entry.touched != Some(now) {
            let sum = if entry.touched.is_some() { entry.rank.plus(now) } else { now };
            let rank = sum.min(now.times(Rank::factor(MOST)));
            self.change(key, |entry| (entry.rank, entry.touched) = (rank, Some(now)));
        }
    }

    /// Puts a chunk into a state, whatever it was in; a stranger comes in with the rank `cold`.
    pub fn place(&mut self, key: Key, state: State, cold: Rank) {
        if self.entries.contains_key(&key) {
            self.change(key, |entry| entry.state = state);
        } else {
            self.insert(key, cold, None, state);
        }
        self.forget_beyond();
    }

    /// Takes a chunk out of the competition, or lets it in again.
    pub fn set_pin(&mut self, key: Key, pin: Pin, cold: Rank) {
        if !self.entries.contains_key(&key) {
            if pin == Pin::Released {
                return;
            }
            self.insert(key, cold, None, State::Known);
        }
        self.change(key, |entry| entry.pinned = pin == Pin::Held);
        self.forget_beyond();
    }

    /// Forgets a chunk, in whatever state it was.
    pub fn forget(&mut self, key: Key) {
        if let Some(entry) = self.entries.get(&key).copied() {
            self.take_out(key, entry);
            self.entries.remove(&key);
        }
    }

    /// Forgets an image, in whatever states its chunks were.
    pub fn forget_image(&mut self, image: u32) {
        let keys: Vec<Key> = self.of_image(image).collect();
        keys.into_iter().for_each(|key| self.forget(key));
    }

    /// Every chunk of an image that the table holds, in the order of the image.
    pub fn of_image(&self, image: u32) -> impl Iterator<Item = Key> {
        let first = Key { image, chunk: Chunk(0) };
        let last = Key { image, chunk: Chunk(u64::MAX) };
        self.entries.range(first..=last).map(|(&key, _)| key)
    }

    /// The images that have chunks in the competition.
    pub fn images(&self) -> impl Iterator<Item = u32> {
        self.orders.keys().copied()
    }

    /// The hottest chunk of an image that is not in the cache, nor on its way.
    pub fn hottest_known(&self, image: u32) -> Option<(Rank, Key)> {
        let &(rank, Reverse(chunk)) = self.orders.get(&image)?.known.last()?;
        Some((rank, Key { image, chunk }))
    }

    /// The coldest chunk of an image that is in the cache and not pinned.
    pub fn coldest_cached(&self, image: u32) -> Option<(Rank, Key)> {
        let &(rank, chunk) = self.orders.get(&image)?.cached.first()?;
        Some((rank, Key { image, chunk }))
    }

    /// The hottest `count` chunks that compete, cached or not, hottest first.
    pub fn hottest(&self, count: usize) -> Vec<(Rank, Key, State)> {
        let mut all = Vec::new();
        for (&image, orders) in &self.orders {
            let known = orders.known.iter().rev().take(count);
            all.extend(
                known.map(|&(rank, chunk)| (rank, Key { image, chunk: chunk.0 }, State::Known)),
            );
            let cached = orders.cached.iter().rev().take(count);
            all.extend(cached.map(|&(rank, chunk)| (rank, Key { image, chunk }, State::Cached)));
        }
        all.sort_by_key(|&(rank, key, _)| (Reverse(rank), key));
        all.truncate(count);
        all
    }

    fn forget_beyond(&mut self) {
        while self.ordered > self.limit {
            let coldest = self.orders.iter().filter_map(|(&image, orders)| {
                orders.known.first().map(|&(rank, Reverse(chunk))| (rank, Key { image, chunk }))
            });
            let Some((_, key)) = coldest.min() else { return };
            self.forget(key);
        }
    }

    fn insert(&mut self, key: Key, rank: Rank, touched: Option<Rank>, state: State) {
        let entry = Entry { rank, touched, state, pinned: false };
        self.entries.insert(key, entry);
        self.put_in(key, entry);
    }

    /// The one way that an entry changes, so that the orders and the counts follow.
    fn change(&mut self, key: Key, change: impl FnOnce(&mut Entry)) {
        let Some(&before) = self.entries.get(&key) else { return };
        self.take_out(key, before);
        let mut after = before;
        change(&mut after);
        self.entries.insert(key, after);
        self.put_in(key, after);
    }

    fn put_in(&mut self, key: Key, entry: Entry) {
        self.tally(entry.state, 1);
        if entry.pinned {
            return;
        }
        match entry.state {
            State::Known => {
                self.orders
                    .entry(key.image)
                    .or_default()
                    .known
                    .insert((entry.rank, Reverse(key.chunk)));
                self.ordered += 1;
            }
            State::Cached => {
                self.orders.entry(key.image).or_default().cached.insert((entry.rank, key.chunk));
            }
            State::Coming | State::Leaving => {}
        }
    }

    fn take_out(&mut self, key: Key, entry: Entry) {
        self.tally(entry.state, -1);
        let Some(orders) = self.orders.get_mut(&key.image) else { return };
        if orders.known.remove(&(entry.rank, Reverse(key.chunk))) {
            self.ordered -= 1;
        }
        orders.cached.remove(&(entry.rank, key.chunk));
        if orders.known.is_empty() && orders.cached.is_empty() {
            self.orders.remove(&key.image);
        }
    }

    fn tally(&mut self, state: State, by: isize) {
        let count = match state {
            State::Known => return,
            State::Coming => &mut self.coming,
            State::Cached => &mut self.cached,
            State::Leaving => &mut self.leaving,
        };
        *count = count.saturating_add_signed(by);
    }
}

/// Whether a chunk is kept whatever its heat.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pin {
    /// It stays in the cache, and comes first on the way there.
    Held,
    /// It competes like any other.
    Released,
}

#[cfg(test)]
mod tests {
    use super::*;

    const HALF_LIFE: u64 = 1_000;

    fn key(chunk: u64) -> Key {
        Key { image: 1, chunk: Chunk(chunk) }
    }

    fn at(nanos: u64) -> Rank {
        Rank::at(nanos, HALF_LIFE)
    }

    #[test]
    fn touches_fade_by_half_in_a_half_life() {
        let mut heat = Heat::new(10);
        heat.touch(key(1), at(0));
        heat.touch(key(1), at(0));
        assert!((heat.rank(key(1)).unwrap().heat(at(0)) - 1.0).abs() < 1e-5, "one touch a time");
        heat.touch(key(1), at(1_000));
        let rank = heat.rank(key(1)).unwrap();
        assert!((rank.heat(at(1_000)) - 1.5).abs() < 1e-5);
        assert!((rank.heat(at(3_000)) - 0.375).abs() < 1e-5);
    }

    #[test]
    fn heat_saturates_and_then_the_last_touch_decides() {
        let mut heat = Heat::new(10);
        (0..1_000).for_each(|time| heat.touch(key(1), at(time)));
        assert!((heat.rank(key(1)).unwrap().heat(at(999)) - MOST).abs() < 1e-3);
        (980..1_100).for_each(|time| heat.touch(key(2), at(time)));
        assert_eq!(heat.hottest_known(1).unwrap().1, key(2));
    }

    #[test]
    fn the_order_of_ranks_is_the_order_of_heats_after_a_year_too() {
        let year = 365 * 24 * 3600 * 1_000_000_000;
        let half_life = 60 * 1_000_000_000;
        let mut heat = Heat::new(10);
        for tick in 0..8u64 {
            let now = Rank::at(year + tick * 1_000_000_000, half_life);
            heat.touch(key(tick % 2), now);
            heat.touch(key(9), now);
        }
        let now = Rank::at(year + 8_000_000_000, half_life);
        assert_eq!(heat.hottest_known(1).unwrap().1, key(9));
        let ratio = heat.rank(key(9)).unwrap().heat(now) / heat.rank(key(1)).unwrap().heat(now);
        assert!((1.9..2.1).contains(&ratio), "{ratio}");
    }

    #[test]
    fn only_what_is_merely_known_is_forgotten_and_the_coldest_first() {
        let mut heat = Heat::new(2);
        for (time, chunk) in [(0, 1), (1, 2), (2, 3)] {
            heat.touch(key(chunk), at(time));
            if chunk == 1 {
                heat.place(key(1), State::Cached, at(time));
            }
        }
        heat.touch(key(4), at(3));
        assert_eq!(heat.state(key(1)), Some(State::Cached));
        assert_eq!(heat.state(key(2)), None);
        heat.set_pin(key(3), Pin::Held, at(3));
        heat.touch(key(5), at(4));
        assert_eq!((heat.len(), heat.count(State::Known)), (4, 3), "a pinned one does not count");
        heat.set_pin(key(3), Pin::Released, at(4));
        assert_eq!((heat.state(key(3)), heat.len()), (None, 3));
    }
}
