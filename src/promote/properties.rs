//! Properties, under loads, limits, latencies and outcomes drawn at random; a failure prints its
//! seed.
//!
//! Invariants checked, after every tick:
//! - what was decided is within [`MOVES`], names no chunk twice, evicts only what is in the cache
//!   and not pinned, promotes only what isn't there;
//! - the bytes promoted in any stretch of ticks are within its budget and one burst;
//! - what is coming or cached is within capacity, but for pins; nothing is promoted while it is
//!   beyond;
//! - on its heat alone nothing is promoted whose image does not pay, nor what was not touched
//!   twice;
//! - the table's counts are those of a plain model; its size is bounded; the same inputs decide the
//!   same.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use super::gain::CopyLatency;
use super::heat::State;
use super::policy::{BURST, MOVES};
use super::tick::{Tick, Touch};
use super::{Key, Policy, Settings};
use crate::units::{CHUNK, Chunk};

const SEEDS: u64 = 60;
const TICKS: usize = 300;
/// Images, the last of which is never measured.
const IMAGES: u32 = 4;
/// Chunks of an image.
const CHUNKS: u64 = 400;

/// The disk as a plain map, and what the caller did.
#[derive(Default)]
struct Model {
    states: BTreeMap<Key, State>,
    pins: BTreeSet<Key>,
    warmed: BTreeSet<Key>,
    touched: BTreeMap<Key, u32>,
    /// Bytes allowed, bytes promoted, and bytes that may be saved up at most, tick by tick.
    spent: Vec<(u64, u64, u64)>,
}

impl Model {
    fn count(&self, state: State) -> usize {
        self.states.values().filter(|&&other| other == state).count()
    }

    fn pinned_inside(&self) -> usize {
        let inside =
            |key: &&Key| matches!(self.states.get(key), Some(State::Cached | State::Coming));
        self.pins.iter().filter(inside).count()
    }
}

fn any_key(random: &mut fastrand::Rng) -> Key {
    // The square makes some far hotter than others.
    let chunk = (random.f64() * random.f64() * CHUNKS as f64) as u64;
    Key { image: random.u32(0..IMAGES), chunk: Chunk(chunk) }
}

fn some_keys(random: &mut fastrand::Rng, most: usize) -> Vec<Key> {
    (0..random.usize(0..=most)).map(|_| any_key(random)).collect()
}

/// One run. Returns all that was decided, for comparison with another run of the same seed.
fn run(seed: u64) -> Vec<(Vec<Key>, Vec<Key>)> {
    let mut random = fastrand::Rng::with_seed(seed);
    let settings =
        Settings { half_life: Duration::from_secs(random.u64(1..600)), ..Settings::default() };
    let mut policy = Policy::new(settings).unwrap();
    let mut model = Model::default();
    let mut decided = Vec::new();
    let (mut capacity, mut budget) = (100 * CHUNK, 10 * CHUNK);
    let mut latencies = vec![5_000_000; IMAGES as usize - 1];
    for tick in 0..TICKS {
        if random.u32(0..20) == 0 {
            capacity = random.u64(0..200) * CHUNK + random.u64(0..CHUNK);
        }
        if random.u32(0..20) == 0 {
            budget = [0, 1000, CHUNK, random.u64(0..40 * CHUNK), 1 << 40][random.usize(0..5)];
        }
        if random.u32(0..10) == 0 {
            let image = random.usize(0..latencies.len());
            latencies[image] = [0, 100_000, 300_000, 5_000_000, u64::MAX][random.usize(0..5)];
        }
        act(&mut random, &mut policy, &mut model);
        let (hits, touches) = reads(&mut random, &mut model);
        let elapsed = Duration::from_millis(random.u64(0..2000));
        let copies = latencies.iter().zip(0..).map(|(&nanos, image)| CopyLatency { image, nanos });
        let tick_of = Tick {
            elapsed,
            touches: &touches,
            hits: &hits,
            copies: &copies.collect::<Vec<_>>(),
            local: 200_000,
            capacity,
            free: random.u64(0..400) * CHUNK,
            budget,
        };
        let decisions = policy.tick(&tick_of);
        let context = format!("seed {seed}, tick {tick}");
        check(&decisions.evict, &decisions.promote, &policy, &mut model, &context);
        check_limits(&decisions.promote, &tick_of, &mut model, &context);
        for state in [State::Coming, State::Cached, State::Leaving] {
            assert_eq!(policy.heat().count(state), model.count(state), "{context}: {state:?}");
        }
        assert!(
            policy.heat().len() <= 4 * 4096 + model.states.len() + model.pins.len(),
            "{context}"
        );
        decided.push((decisions.evict, decisions.promote));
    }
    decided
}

/// Outcomes, pins, warm lists and losses.
fn act(random: &mut fastrand::Rng, policy: &mut Policy, model: &mut Model) {
    let under_way: Vec<Key> = model.states.keys().copied().collect();
    for key in under_way {
        match model.states[&key] {
            State::Coming if random.u32(0..3) > 0 => {
                if random.u32(0..8) > 0 {
                    policy.promoted(key);
                    model.states.insert(key, State::Cached);
                } else {
                    policy.failed(key);
                    model.states.remove(&key);
                    model.touched.remove(&key);
                }
            }
            State::Leaving if random.u32(0..3) > 0 => {
                policy.dropped(key);
                model.states.remove(&key);
            }
            State::Cached if random.u32(0..200) == 0 => {
                policy.dropped(key);
                model.states.remove(&key);
            }
            _ => {}
        }
    }
    if random.u32(0..30) == 0 {
        let keys = some_keys(random, 8);
        policy.pin(&keys).unwrap();
        model.pins.extend(keys);
    }
    if random.u32(0..30) == 0 {
        let keys = some_keys(random, 30);
        policy.unpin(&keys);
        keys.iter().for_each(|key| {
            model.pins.remove(key);
        });
    }
    if random.u32(0..30) == 0 {
        let keys = some_keys(random, 20);
        policy.warm(&keys).unwrap();
        model.warmed.extend(keys);
    }
    // Answers to questions that were never asked change nothing.
    let stranger = Key { image: 99, chunk: Chunk(random.u64(..)) };
    policy.promoted(stranger);
    policy.failed(stranger);
    policy.dropped(stranger);
    if random.u32(0..50) == 0 {
        let image = random.u32(0..IMAGES);
        policy.lost(image);
        let inside = |state: &State| matches!(state, State::Cached | State::Leaving);
        model.states.retain(|key, state| key.image != image || !inside(state));
    }
    if random.u32(0..100) == 0 {
        let image = random.u32(0..IMAGES);
        policy.forget_image(image);
        model.states.retain(|key, _| key.image != image);
        model.pins.retain(|key| key.image != image);
        model.warmed.retain(|key| key.image != image);
        model.touched.retain(|key, _| key.image != image);
    }
}

fn reads(random: &mut fastrand::Rng, model: &mut Model) -> (Vec<Touch>, Vec<Touch>) {
    let mut keys = some_keys(random, 60);
    if random.u32(0..5) == 0 {
        let start = random.u64(0..10_000);
        keys.extend((start..start + 100).map(|chunk| Key { image: 0, chunk: Chunk(chunk) }));
    }
    keys.iter().for_each(|&key| *model.touched.entry(key).or_default() += 1);
    let touches =
        keys.into_iter().map(|key| Touch { key, reads: random.u32(..), nanos: random.u64(..) });
    touches.partition(|touch| model.states.get(&touch.key) == Some(&State::Cached))
}

fn check(evict: &[Key], promote: &[Key], policy: &Policy, model: &mut Model, context: &str) {
    assert!(evict.len() <= MOVES && promote.len() <= MOVES, "{context}");
    for &key in evict {
        assert!(!model.pins.contains(&key), "{context}: {key:?} is pinned");
        assert_eq!(
            model.states.insert(key, State::Leaving),
            Some(State::Cached),
            "{context}: {key:?}"
        );
    }
    for &key in promote {
        assert_eq!(model.states.insert(key, State::Coming), None, "{context}: {key:?}");
        let asked = model.pins.contains(&key) || model.warmed.contains(&key);
        assert!(
            asked || policy.pays(key.image),
            "{context}: {key:?} of an image that does not pay"
        );
        assert!(asked || key.image < IMAGES - 1, "{context}: {key:?} of an image nobody measured");
        let touched = model.touched.get(&key).copied().unwrap_or(0);
        assert!(asked || touched >= 2, "{context}: {key:?} was touched {touched} times");
    }
}

fn check_limits(promote: &[Key], tick: &Tick, model: &mut Model, context: &str) {
    let inside = model.count(State::Cached) + model.count(State::Coming);
    let capacity = (tick.capacity / CHUNK) as usize;
    assert!(
        inside <= capacity.max(model.pinned_inside()) || promote.is_empty(),
        "{context}: {inside}"
    );
    // What is coming can't be called back: beyond capacity is only that, and pins.
    let fixed = model.count(State::Coming) + model.pinned_inside();
    assert!(inside <= capacity.max(fixed), "{context}: {inside} inside, room for {capacity}");
    let over = |time: Duration| (u128::from(tick.budget) * time.as_nanos() / 1_000_000_000) as u64;
    let burst = if tick.budget == 0 { 0 } else { over(BURST).max(CHUNK) };
    model.spent.push((over(tick.elapsed), promote.len() as u64 * CHUNK, burst));
    let (mut allowed, mut spent) = (0, 0);
    for stretch in (0..model.spent.len()).rev() {
        allowed += model.spent[stretch].0;
        spent += model.spent[stretch].1;
        // What may have been saved up when the stretch began.
        let saved = stretch.checked_sub(1).map_or(0, |before| model.spent[before].2);
        assert!(
            spent <= allowed + saved,
            "{context}: {spent} bytes, {allowed} and {saved} allowed"
        );
    }
}

#[test]
fn no_seed_breaks_a_promise() {
    let mut moved = (0, 0);
    for seed in 0..SEEDS {
        let decided = run(seed);
        assert_eq!(decided, run(seed), "seed {seed}: not the same twice");
        moved.0 += decided.iter().map(|(evict, _)| evict.len()).sum::<usize>();
        moved.1 += decided.iter().map(|(_, promote)| promote.len()).sum::<usize>();
    }
    assert!(moved.0 > 1000 && moved.1 > 1000, "the load is too dull to prove anything: {moved:?}");
}

#[test]
fn memory_is_bounded_whatever_is_touched() {
    let mut policy = Policy::new(Settings::default()).unwrap();
    let mut random = fastrand::Rng::with_seed(1);
    for _ in 0..20 {
        let touches: Vec<Touch> = (0..5_000)
            .map(|_| Key { image: random.u32(0..50), chunk: Chunk(random.u64(..)) })
            .map(|key| Touch { key, reads: 1, nanos: 1 })
            .collect();
        policy.tick(&Tick {
            elapsed: Duration::from_secs(1),
            touches: &touches,
            hits: &[],
            copies: &[],
            local: 200_000,
            capacity: 2000 * CHUNK,
            free: 1 << 40,
            budget: 1 << 30,
        });
        assert!(policy.heat().len() <= 8000, "{}", policy.heat().len());
    }
    assert_eq!(policy.heat().len(), 8000);
    let many: Vec<Key> = (0..super::policy::PINS as u64 + 1)
        .map(|chunk| Key { image: 1, chunk: Chunk(chunk) })
        .collect();
    assert!(policy.pin(&many).is_err() && policy.warm(&many).is_err());
    assert_eq!((policy.heat().len(), policy.waiting()), (8000, (0, 0)), "all or none");
}
