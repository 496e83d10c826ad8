//! Scenarios with a name: what the policy is for, each told as a load, tick by tick.
//!
//! Invariants checked: scans don't displace the hot set, a slow pass earns nothing, a boot that is
//! read again does; the hot set may move; promotion stops when the copy's disk recovers; a cache
//! that shrinks gives up the coldest; pins and warm lists come in their order; a failure is no
//! loop; a lost chunk comes back.

use std::time::Duration;

use super::gain::CopyLatency;
use super::heat::State;
use super::policy::MOVES;
use super::tick::{Decisions, Tick, Touch};
use super::{Key, Policy, Settings};
use crate::units::{CHUNK, Chunk};

const LOCAL: u64 = 200_000;
const SLOW: u64 = 20_000_000;
const IMAGE: u32 = 5;

pub(super) fn key(chunk: u64) -> Key {
    Key { image: IMAGE, chunk: Chunk(chunk) }
}

/// A disk whose mover does at once what it is told.
struct Disk {
    policy: Policy,
    capacity: u64,
    budget: u64,
    copy: u64,
    last: Decisions,
}

impl Disk {
    fn new(capacity: u64) -> Disk {
        let policy = Policy::new(Settings::default()).unwrap();
        Disk { policy, capacity, budget: 1 << 30, copy: SLOW, last: Decisions::default() }
    }

    fn has(&self, chunk: u64) -> bool {
        self.policy.heat().state(key(chunk)) == Some(State::Cached)
    }

    fn cached(&self) -> usize {
        self.policy.heat().count(State::Cached)
    }

    /// One second in which these chunks are read; the cache answers what it has.
    fn read(&mut self, chunks: impl IntoIterator<Item = u64>) -> &Decisions {
        let touches =
            chunks.into_iter().map(|chunk| Touch { key: key(chunk), reads: 1, nanos: self.copy });
        let (hits, touches): (Vec<_>, Vec<_>) =
            touches.partition(|touch| self.has(touch.key.chunk.0));
        self.last = self.policy.tick(&Tick {
            elapsed: Duration::from_secs(1),
            touches: &touches,
            hits: &hits,
            copies: &[CopyLatency { image: IMAGE, nanos: self.copy }],
            local: LOCAL,
            capacity: self.capacity * CHUNK,
            free: 1 << 40,
            budget: self.budget,
        });
        self.last.evict.iter().for_each(|&key| self.policy.dropped(key));
        self.last.promote.iter().for_each(|&key| self.policy.promoted(key));
        &self.last
    }

    fn rest(&mut self, seconds: u64) {
        (0..seconds).for_each(|_| assert!(self.read([]).promote.is_empty()));
    }

    /// A hot set of these chunks, each read every second.
    fn heat_up(&mut self, chunks: std::ops::Range<u64>, seconds: u64) {
        (0..seconds).for_each(|_| {
            self.read(chunks.clone());
        });
    }
}

#[test]
fn the_second_touch_is_promoted_and_the_first_is_not() {
    let mut disk = Disk::new(10);
    assert!(disk.read([7]).promote.is_empty());
    disk.rest(60);
    assert_eq!(disk.read([7]).promote, [key(7)]);
    disk.read([7]);
    let totals = disk.policy.totals();
    assert_eq!((totals.hits, totals.misses, totals.written), (1, 2, CHUNK));
    assert_eq!((totals.saved, totals.missed), (SLOW - LOCAL, 2 * (SLOW - LOCAL)));
    assert!((totals.saved_per_mib().unwrap() - 4.0 * 19.8).abs() < 1e-9);
}

#[test]
fn every_read_of_a_hit_saves_and_a_tick_is_bounded() {
    let mut disk = Disk::new(5000);
    disk.budget = 1 << 40;
    disk.read(0..3000);
    let (first, second) = (disk.read(0..3000).promote.len(), disk.read([]).promote.len());
    assert_eq!((first, second, disk.cached()), (MOVES, MOVES, 2 * MOVES));
    let saved = disk.policy.totals().saved;
    disk.read([5, 5, 5]);
    disk.policy.tick(&Tick {
        elapsed: Duration::from_secs(1),
        touches: &[],
        hits: &[Touch { key: key(5), reads: 4, nanos: LOCAL }],
        copies: &[],
        local: LOCAL,
        capacity: 0,
        free: 0,
        budget: 0,
    });
    assert_eq!(disk.policy.totals().saved - saved, 7 * (SLOW - LOCAL));
    assert_eq!(disk.policy.heat().count(State::Leaving), MOVES, "no more than that are evicted");
}

#[test]
fn touches_hours_apart_are_no_heat() {
    let mut disk = Disk::new(10);
    disk.read([7]);
    disk.rest(2 * 3600);
    assert!(disk.read([7]).promote.is_empty());
}

#[test]
fn scans_do_not_displace_the_hot_set() {
    let mut disk = Disk::new(64);
    disk.heat_up(0..64, 20);
    assert_eq!(disk.cached(), 64);
    for pass in 0..2 {
        for at in 0..100u64 {
            // Within a scan of another range each, the hot set is read now and then.
            let scan = 100_000 * (1 + pass) + at * 500;
            let hot = (at % 64)..(at % 64 + 1);
            assert_eq!(*disk.read((scan..scan + 500).chain(hot)), Decisions::default());
        }
    }
    assert!((0..64).all(|chunk| disk.has(chunk)));
}

#[test]
fn a_loop_larger_than_the_cache_settles() {
    let mut disk = Disk::new(50);
    for _ in 0..20 {
        (0..20).for_each(|part| {
            disk.read((part * 50..part * 50 + 50).step_by(10));
        });
    }
    let before = disk.policy.totals();
    for _ in 0..20 {
        (0..20).for_each(|part| {
            disk.read((part * 50..part * 50 + 50).step_by(10));
        });
    }
    let after = disk.policy.totals();
    assert!(
        after.hits - before.hits >= 20 * 45,
        "half of the loop stays: {}",
        after.hits - before.hits
    );
    let written = (after.written - before.written) / CHUNK;
    assert!(written <= 20, "no churn among equals: {written} chunks");
}

#[test]
fn a_slow_pass_earns_nothing_and_a_second_boot_does() {
    let mut disk = Disk::new(1000);
    // 64 KiB a second: every chunk is touched in several ticks of the same pass.
    for at in 0..400u64 {
        let chunk = at / 4;
        let promoted = &disk.read([chunk, chunk + 1]).promote;
        assert!(at < 80 || promoted.is_empty(), "at {at}: {promoted:?}");
    }
    // A boot, read fast, twice: the second time all of it comes in, in its order.
    let mut disk = Disk::new(1000);
    (0..10u64).for_each(|at| assert!(disk.read(at * 30..at * 30 + 30).promote.is_empty()));
    disk.rest(300);
    let mut promoted = Vec::new();
    (0..10u64).for_each(|at| promoted.extend(disk.read(at * 30..at * 30 + 30).promote.clone()));
    assert_eq!(promoted, (0..300).map(key).collect::<Vec<_>>());
}

#[test]
fn the_hot_set_may_move() {
    let mut disk = Disk::new(64);
    disk.heat_up(0..64, 3600);
    assert_eq!(disk.cached(), 64);
    let mut seconds = 0;
    while (1000..1064).any(|chunk| !disk.has(chunk)) {
        disk.read(1000..1064);
        seconds += 1;
        assert!(seconds < 600, "an hour's favourites still hold {} places", disk.cached());
    }
}

#[test]
fn promotion_stops_when_the_disk_recovers_and_starts_when_it_is_sick() {
    let mut disk = Disk::new(1000);
    disk.copy = LOCAL;
    disk.heat_up(0..50, 5);
    assert_eq!(disk.policy.totals().written, 0, "it is as fast as the local disk");
    disk.copy = SLOW;
    disk.read([]);
    assert_eq!(disk.cached(), 50, "what was hot already comes at once");
    disk.copy = LOCAL * 11 / 10;
    disk.heat_up(100..150, 5);
    assert_eq!((disk.cached(), disk.policy.totals().written), (50, 50 * CHUNK));
    assert!(!disk.policy.pays(IMAGE));
    let saved = disk.policy.totals().saved;
    disk.read([1]);
    assert_eq!(disk.policy.totals().saved - saved, LOCAL / 10, "a hit saves what it saves now");
}

#[test]
fn a_cache_that_shrinks_gives_up_the_coldest() {
    let mut disk = Disk::new(100);
    disk.heat_up(0..100, 3);
    disk.heat_up(0..30, 3);
    disk.policy.pin(&[key(99)]).unwrap();
    disk.capacity = 31;
    disk.read([]);
    assert_eq!(disk.last.evict.len(), 69);
    assert!((0..30).chain([99]).all(|chunk| disk.has(chunk)));
    disk.capacity = 0;
    disk.read([]);
    assert_eq!((disk.cached(), disk.has(99)), (1, true), "a pin holds");
    disk.policy.unpin(&[key(99)]);
    disk.read([]);
    assert_eq!(disk.cached(), 0);
}

#[test]
fn pins_come_first_then_warm_lists_then_heat() {
    let mut disk = Disk::new(4);
    disk.budget = 0;
    disk.heat_up(0..2, 3);
    disk.policy.warm(&[key(11), key(10), key(12)]).unwrap();
    disk.policy.pin(&[key(21), key(20), key(21)]).unwrap();
    disk.budget = CHUNK;
    let mut order = Vec::new();
    (0..8).for_each(|_| order.extend(disk.read([]).promote.clone()));
    // The cache is full after two warm ones; the hot ones then take their places.
    assert_eq!(order, [21, 20, 11, 10, 0, 1].map(key));
    assert!([21, 20, 0, 1].into_iter().all(|chunk| disk.has(chunk)));
    assert_eq!(disk.policy.waiting(), (0, 0));
    for _ in 0..5 {
        disk.policy.pin(&[key(50)]).unwrap();
        assert_eq!(disk.policy.waiting(), (1, 0), "asked for again, it waits once");
        disk.policy.unpin(&[key(50)]);
    }
}

#[test]
fn a_failure_is_no_loop_and_a_lost_chunk_comes_back() {
    let mut disk = Disk::new(10);
    disk.policy.pin(&[key(1)]).unwrap();
    disk.heat_up(7..8, 1);
    let tick = |disk: &mut Disk| {
        let idle = Tick {
            elapsed: Duration::from_secs(1),
            touches: &[Touch { key: key(7), reads: 1, nanos: SLOW }],
            hits: &[],
            copies: &[],
            local: LOCAL,
            capacity: 10 * CHUNK,
            free: 1 << 40,
            budget: 1 << 30,
        };
        disk.policy.tick(&idle).promote
    };
    assert_eq!(tick(&mut disk), [key(7)]);
    disk.policy.failed(key(7));
    disk.policy.dropped(key(1));
    assert_eq!(tick(&mut disk), [key(1)], "the pin lost; the failed one has to earn it anew");
    disk.policy.failed(key(1));
    assert_eq!(tick(&mut disk), [key(7)]);
    disk.policy.promoted(key(7));
    (0..28).for_each(|_| assert!(tick(&mut disk).is_empty()));
    assert_eq!(tick(&mut disk), [key(1)], "a failed pin is tried again after half a minute");
    disk.policy.promoted(key(1));
    disk.policy.dropped(key(7));
    assert_eq!(tick(&mut disk), [key(7)]);
    assert_eq!(disk.policy.totals().failed, 2);
}

#[test]
fn what_lingers_is_not_written_over() {
    let mut disk = Disk::new(2);
    disk.heat_up(0..2, 20);
    let tick = |disk: &mut Disk, capacity: u64, free: u64| {
        disk.policy.tick(&Tick {
            elapsed: Duration::from_secs(1),
            touches: &[Touch { key: key(9), reads: 1, nanos: SLOW }],
            hits: &[],
            copies: &[],
            local: LOCAL,
            capacity: capacity * CHUNK,
            free,
            budget: 1 << 30,
        })
    };
    assert_eq!(tick(&mut disk, 1, 1 << 40).evict, [key(0)]);
    // A reader holds chunk 0: room for two is room for one more only when it has left.
    assert_eq!(tick(&mut disk, 2, 1 << 40), Decisions::default());
    disk.policy.dropped(key(0));
    assert_eq!(tick(&mut disk, 2, 0), Decisions::default(), "the disk is full");
    assert_eq!(tick(&mut disk, 2, CHUNK).promote, [key(0)], "it is still hot");
}

#[test]
fn an_image_that_is_gone_leaves_nothing() {
    let mut disk = Disk::new(10);
    disk.heat_up(0..5, 3);
    disk.policy.pin(&[key(3), key(70)]).unwrap();
    disk.policy.warm(&[key(80)]).unwrap();
    disk.policy.forget_image(IMAGE);
    assert!(disk.policy.heat().is_empty());
    assert_eq!(disk.policy.waiting(), (0, 0));
    assert_eq!(disk.read([]), &Decisions::default());
    disk.policy.adopt(key(4));
    disk.read([4]);
    assert!(disk.has(4), "a cache that was there already is taken over");
}
