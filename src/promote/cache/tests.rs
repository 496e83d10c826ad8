//! The cache on the simulated disk: readers, one task that fills and empties, faults, damage, crashes.
//!
//! Checked always: what a read returns is the image's content. And without faults and damage nothing
//! is ever doubted: the sums only cover for the disk, never for a race of our own.

use std::cell::{Cell, RefCell};

use super::*;
use crate::io::sim::{Cut, End, Faults, Sim, SimFile, Task};

const CHUNKS: u64 = 6;
/// The last chunk is short, and ends within a block.
const SIZE: u64 = (CHUNKS - 1) * CHUNK + 3 * BLOCK + 512;
const DIGEST: Digest = Digest([7; 32]);

fn image(offset: u64, len: usize) -> Vec<u8> {
    (offset..offset + len as u64).map(|at| (at ^ at >> 9 ^ at >> 18) as u8).collect()
}

fn content(cache: &Cache<Sim>, chunk: Chunk) -> Buf {
    Buf::from_bytes(&image(chunk.offset(), cache.len_of(chunk)))
}

struct Node {
    sim: Sim,
    data: SimFile,
    chunks: SimFile,
}

impl Node {
    fn new(seed: u64) -> Node {
        let sim = Sim::new(seed);
        let align = if seed.is_multiple_of(2) { 1 } else { 512 };
        let data = sim.create(align, &[], SIZE.next_multiple_of(BLOCK));
        let len = entry::position(Chunk(CHUNKS));
        let chunks = sim.create(1, &entry::header(&DIGEST, SIZE), len);
        Node { sim, data, chunks }
    }

    fn cache(&self) -> Cache<Sim> {
        Cache::new("test", self.data, self.chunks, DIGEST, SIZE)
    }

    /// The bytes of the data file that are stored and not zeros, outside these chunks.
    fn strays(&self, inside: &[Chunk]) -> usize {
        let bytes = self.sim.peek(self.data);
        let chunks = bytes.chunks(CHUNK as usize).zip((0..).map(Chunk));
        let outside = chunks.filter(|(_, chunk)| !inside.contains(chunk));
        outside.map(|(bytes, _)| bytes.iter().filter(|byte| **byte != 0).count()).sum()
    }

    fn run(&self, task: impl Future<Output = ()>, steps: Option<u64>) -> End {
        self.sim.run(vec![Box::pin(task)], steps)
    }

    /// How many chunks are whole of what an earlier life left, and how many are not.
    fn load(&self, cache: &Cache<Sim>) -> (u64, u64) {
        let loaded = Cell::new((0, 0));
        let end = self.run(load(&self.sim, cache, &loaded), None);
        assert!(matches!(end, End::Done(_)));
        loaded.get()
    }
}

async fn load(sim: &Sim, cache: &Cache<Sim>, loaded: &Cell<(u64, u64)>) {
    let claims = cache.claims(sim).await.unwrap();
    let claimed: Vec<Chunk> = claims.iter().map(|(chunk, _)| *chunk).collect();
    cache.clean(sim, &claimed).await.unwrap();
    for chunk in claimed {
        let (there, gone) = loaded.get();
        let sum = ChunkSum::of(&image(chunk.offset(), cache.len_of(chunk)));
        loaded.set(match cache.admit(sim, chunk, &sum).await {
            true => (there + 1, gone),
            false => (there, gone + 1),
        });
    }
}

/// Reads at random, from the cache if it can and else from the image, as a replica does.
async fn reader(sim: &Sim, cache: &Cache<Sim>, seed: u64, reads: usize, hits: &Cell<u64>) {
    let mut rng = fastrand::Rng::with_seed(seed);
    for _ in 0..reads {
        let chunk = Chunk(rng.u64(0..CHUNKS));
        let len = cache.len_of(chunk) as u64 / 512;
        let start = rng.u64(0..len);
        let most = if rng.bool() { 24 } else { 512 };
        let sectors = rng.u64(1..=most.min(len - start));
        let offset = chunk.offset() + start * 512;
        let Some(lease) = cache.lease(chunk) else {
            // The image's copy would be read: some other operation, which takes its time.
            drop(sim.data_after(&cache.data, 0).await);
            continue;
        };
        let buf = sim.alloc((sectors * 512) as usize);
        if cache.read(sim, lease, offset, buf.clone()).await.is_ok() {
            assert_eq!(buf.to_vec(), image(offset, buf.len()), "{offset}");
            hits.set(hits.get() + 1);
        }
    }
}

/// Fills and empties at random, and never holds more than four chunks.
async fn mover(sim: &Sim, cache: &Cache<Sim>, seed: u64, rounds: usize) {
    let mut rng = fastrand::Rng::with_seed(seed);
    for _ in 0..rounds {
        if cache.stored() < 4 {
            let mut batch: Vec<Chunk> = (0..CHUNKS).map(Chunk).collect();
            rng.shuffle(&mut batch);
            batch.truncate(rng.usize(1..=(4 - cache.stored()) as usize));
            let batch: Vec<_> =
                batch.into_iter().map(|chunk| (chunk, content(cache, chunk))).collect();
            drop(cache.fill(sim, &batch).await);
            assert!(cache.stored() <= 4);
        }
        if rng.bool() {
            cache.withdraw(Chunk(rng.u64(0..CHUNKS)));
        }
        cache.sweep(sim).await;
    }
}

fn crowd<'a>(
    node: &'a Node,
    cache: &'a Cache<Sim>,
    hits: &'a Cell<u64>,
    seed: u64,
) -> Vec<Task<'a>> {
    let mut tasks: Vec<Task> = vec![Box::pin(mover(&node.sim, cache, seed, 30))];
    for number in 0..3 {
        let seed = seed * 10 + number;
        tasks.push(Box::pin(reader(&node.sim, cache, seed, 60, hits)));
    }
    tasks
}

#[test]
fn readers_and_the_mover_never_meet_in_a_chunk() {
    let hits = Cell::new(0);
    for seed in 0..150 {
        let node = Node::new(seed);
        let cache = node.cache();
        let end = node.sim.run(crowd(&node, &cache, &hits, seed), None);
        assert!(matches!(end, End::Done(_)), "seed {seed}: {end:?}");
        assert_eq!(cache.doubts(), 0, "seed {seed}: nothing was damaged, yet doubted");
    }
    assert!(hits.get() > 5_000, "only {} reads were answered by the cache", hits.get());
}

#[test]
fn a_failing_disk_costs_the_cache_and_nothing_else() {
    let (hits, closed) = (Cell::new(0), Cell::new(0));
    for seed in 0..150 {
        let node = Node::new(seed);
        let cache = node.cache();
        let read = if seed.is_multiple_of(3) { 960 } else { 60 };
        node.sim.set_faults(Faults { read, write: 60, sync: 60 });
        let end = node.sim.run(crowd(&node, &cache, &hits, seed), None);
        assert!(matches!(end, End::Done(_)), "seed {seed}: {end:?}");
        closed.set(closed.get() + u64::from(cache.is_closed()));
        node.sim.set_faults(Faults::default());
        node.run(async { drop(cache.sweep(&node.sim).await) }, None);
        assert_eq!(cache.stored(), cache.present().len() as u64, "seed {seed}: space is lost");
        assert_eq!(cache.withdrawn(), 0, "seed {seed}");
    }
    assert!(hits.get() > 1_000 && closed.get() > 0, "{} {}", hits.get(), closed.get());
}

#[test]
fn what_a_crash_leaves_is_whole_or_gone() {
    let (present, dropped) = (Cell::new(0), Cell::new(0));
    for seed in 0..400 {
        let mut rng = fastrand::Rng::with_seed(seed);
        let node = Node::new(seed);
        let cache = node.cache();
        let hits = Cell::new(0);
        // Several lives: each is ended at any step, the last of them in its loading too.
        for life in 0..3 {
            let cache = if life == 0 { &cache } else { &node.cache() };
            let mut end = End::Done(0);
            if life > 0 {
                let steps = rng.bool().then(|| rng.u64(0..20));
                end = node.run(load(&node.sim, cache, &Cell::default()), steps);
            }
            if matches!(end, End::Done(_)) {
                let steps = rng.u64(0..120);
                node.sim.run(crowd(&node, cache, &hits, seed + life), Some(steps));
            }
            assert_eq!(cache.doubts(), 0, "seed {seed}, life {life}");
            match rng.u8(0..4) {
                0 => node.sim.kill(),
                1 => node.sim.power_cut(Cut::LoseAll),
                _ => node.sim.power_cut(Cut::Any),
            }
        }
        let after = node.sim.fork(seed);
        let node = Node { sim: after, ..node };
        let cache = node.cache();
        let (there, gone) = node.load(&cache);
        present.set(present.get() + there);
        dropped.set(dropped.get() + gone);
        assert_eq!(node.strays(&cache.present()), 0, "seed {seed}: space that nobody counts");
        let hits = Cell::new(0);
        node.run(reader(&node.sim, &cache, seed, 100, &hits), None);
        assert_eq!(cache.doubts(), 0, "seed {seed}: what was loaded is not whole");
    }
    assert!(present.get() > 100 && dropped.get() > 10, "{} {}", present.get(), dropped.get());
}

#[test]
fn damage_is_found_by_whoever_reads_it() {
    for seed in 0..100 {
        let node = Node::new(seed);
        let cache = node.cache();
        let all: Vec<_> =
            (0..CHUNKS).map(Chunk).map(|chunk| (chunk, content(&cache, chunk))).collect();
        node.run(async { cache.fill(&node.sim, &all).await.unwrap() }, None);
        let mut rng = fastrand::Rng::with_seed(seed);
        let at = rng.u64(0..SIZE);
        node.sim.poke(node.data, at, &[!image(at, 1)[0]]);
        let chunk = Chunk::at(at);
        let failed = RefCell::new(None);
        let block = units::round_down(at, BLOCK);
        node.run(
            async {
                let lease = cache.lease(chunk).unwrap();
                let buf = node.sim.alloc(512);
                *failed.borrow_mut() = Some(cache.read(&node.sim, lease, block, buf).await);
            },
            None,
        );
        let error = failed.take().unwrap().unwrap_err();
        assert_eq!(error.kind(), Kind::Corrupt);
        assert!(cache.lease(chunk).is_none() && cache.doubts() == 1);
        // At rest it is found too, and the rest is believed.
        let again = node.cache();
        assert_eq!(node.load(&again), (CHUNKS - 1, 1));
        assert!(again.lease(chunk).is_none());
        let foreign = Cache::<Sim>::new("test", node.data, node.chunks, Digest([8; 32]), SIZE);
        node.run(
            async {
                let claims = foreign.claims(&node.sim).await;
                assert_eq!(claims.unwrap_err().kind(), Kind::Corrupt);
            },
            None,
        );
    }
}

#[test]
fn space_waits_for_the_last_reader() {
    let node = Node::new(1);
    let cache = node.cache();
    let sim = &node.sim;
    node.run(
        async {
            let first = [(Chunk(0), content(&cache, Chunk(0)))];
            cache.fill(sim, &first).await.unwrap();
            let lease = cache.lease(Chunk(0)).unwrap();
            assert_eq!(cache.withdrawn(), 0);
            cache.withdraw(Chunk(0));
            cache.withdraw(Chunk(0));
            assert!(cache.lease(Chunk(0)).is_none());
            assert_eq!(cache.sweep(sim).await, (vec![], 1));
            assert_eq!(cache.withdrawn(), 1, "it is to be swept again");
            // Not filled anew either while it waits.
            cache.fill(sim, &first).await.unwrap();
            assert!(cache.lease(Chunk(0)).is_none());
            let buf = sim.alloc(4096);
            cache.read(sim, lease, 0, buf.clone()).await.unwrap();
            assert_eq!(buf.to_vec(), image(0, 4096));
            assert_eq!(cache.sweep(sim).await, (vec![Chunk(0)], 0));
            assert_eq!(cache.withdrawn(), 0);
            assert_eq!((cache.stored(), sim.peek(node.data)[0..9].to_vec()), (0, vec![0; 9]));
            assert!(cache.lease(Chunk(CHUNKS)).is_none());
        },
        None,
    );
}

#[test]
fn nothing_is_present_that_is_not_durable() {
    let node = Node::new(1);
    let cache = node.cache();
    node.sim.set_faults(Faults { sync: 1024, ..Faults::default() });
    let all: Vec<_> = (0..CHUNKS).map(Chunk).map(|chunk| (chunk, content(&cache, chunk))).collect();
    node.run(
        async {
            cache.fill(&node.sim, &all).await.unwrap_err();
        },
        None,
    );
    assert_eq!((cache.present(), cache.stored()), (vec![], 0));
    node.sim.set_faults(Faults::default());
    node.run(async { cache.fill(&node.sim, &all).await.unwrap() }, None);
    node.sim.power_cut(Cut::LoseAll);
    let hits = Cell::new(0);
    node.run(reader(&node.sim, &cache, 1, 100, &hits), None);
    assert_eq!((hits.get(), cache.doubts()), (100, 0));
}

#[test]
fn failures_are_forgiven_where_most_reads_are_good() {
    let node = Node::new(2);
    let cache = node.cache();
    let sim = &node.sim;
    let read = async || {
        cache.fill(sim, &[(Chunk(0), content(&cache, Chunk(0)))]).await.unwrap();
        cache.sweep(sim).await;
        let Some(lease) = cache.lease(Chunk(0)) else { return false };
        cache.read(sim, lease, 0, sim.alloc(4096)).await.is_ok()
    };
    node.run(
        async {
            for failure in 0..10 * FAILURES {
                sim.set_read_faults(node.data, 1024);
                assert!(!read().await, "{failure}");
                sim.set_read_faults(node.data, 0);
                for _ in 0..=AMENDS {
                    cache.sweep(sim).await;
                    read().await;
                }
            }
            assert!(!cache.is_closed());
            sim.set_read_faults(node.data, 1024);
            for _ in 0..FAILURES {
                assert!(!cache.is_closed() && !read().await);
                cache.sweep(sim).await;
            }
            assert!(cache.is_closed() && !read().await);
        },
        None,
    );
}

#[test]
fn what_lies_outside_of_a_chunk_is_refused_and_says_nothing_of_it() {
    let node = Node::new(1);
    let cache = node.cache();
    let last = Chunk(CHUNKS - 1);
    node.run(
        async {
            cache.fill(&node.sim, &[(last, content(&cache, last))]).await.unwrap();
            for (offset, len) in
                [(SIZE - 512, 1024), (SIZE, 512), (SIZE + BLOCK, 512), (last.offset() - 512, 1024)]
            {
                let lease = cache.lease(last).unwrap();
                let read = cache.read(&node.sim, lease, offset, node.sim.alloc(len)).await;
                assert_eq!(read.unwrap_err().kind(), Kind::Invalid, "{offset} {len}");
            }
        },
        None,
    );
    assert_eq!((cache.present(), cache.doubts()), (vec![last], 0));
}

#[test]
fn a_chunk_that_only_has_the_right_crc_is_not_admitted() {
    let node = Node::new(1);
    let cache = node.cache();
    let first = Chunk(0);
    let here = image(0, cache.len_of(first));
    node.run(
        async {
            cache.fill(&node.sim, &[(first, content(&cache, first))]).await.unwrap();
            let again = node.cache();
            let sum = ChunkSum { sha256: Digest([1; 32]), ..ChunkSum::of(&here) };
            assert!(!again.admit(&node.sim, first, &sum).await);
            assert_eq!((again.stored(), node.strays(&[])), (0, 0));
        },
        None,
    );
}

#[test]
fn what_is_under_way_in_a_cache_that_was_given_up_makes_nothing_present() {
    for seed in 0..50 {
        let node = Node::new(seed);
        let cache = node.cache();
        let closes: Task = Box::pin(async {
            for _ in 0..seed % 7 {
                node.sim.sleep(Default::default()).await;
            }
            cache.close();
        });
        let fills: Task = Box::pin(async {
            for chunk in (0..CHUNKS).map(Chunk) {
                drop(cache.fill(&node.sim, &[(chunk, content(&cache, chunk))]).await);
                let sum = ChunkSum::of(&image(chunk.offset(), cache.len_of(chunk)));
                cache.admit(&node.sim, chunk, &sum).await;
            }
        });
        assert!(matches!(node.sim.run(vec![closes, fills], None), End::Done(_)));
        assert_eq!(cache.present(), [], "seed {seed}");
    }
}

/// The policy, and a mover that does what the disk's task does: orders, and a sweep whenever something is
/// withdrawn. Readers stay in chunks for as long as they like, punches fail.
#[test]
fn a_full_cache_turns_over_though_chunks_leave_late() {
    use crate::promote::{Decisions, Key, Policy, Settings, Tick, gain::CopyLatency, tick::Touch};
    for seed in 0..20 {
        let node = Node::new(seed);
        let (cache, sim) = (node.cache(), &node.sim);
        let mut rng = fastrand::Rng::with_seed(seed);
        let mut policy = Policy::new(Settings::default()).unwrap();
        let key = |chunk| Key { image: 0, chunk };
        let mut written = 0;
        node.run(
            async {
                let mut reader = None;
                for second in 0..400_u64 {
                    // What is hot moves on: there is always something to swap.
                    let hot = (0..2).map(|n| Chunk((second / 20 + n) % CHUNKS));
                    let touch = |chunk| Touch { key: key(chunk), reads: 1, nanos: 20_000_000 };
                    let there = cache.present();
                    let (hits, touches): (Vec<_>, Vec<_>) =
                        hot.map(touch).partition(|touch| there.contains(&touch.key.chunk));
                    let Decisions { evict, promote } = policy.tick(&Tick {
                        elapsed: std::time::Duration::from_secs(1),
                        touches: &touches,
                        hits: &hits,
                        copies: &[CopyLatency { image: 0, nanos: 20_000_000 }],
                        local: 200_000,
                        capacity: 2 * CHUNK,
                        free: 1 << 30,
                        budget: 1 << 30,
                    });
                    // A reader is in the chunk at the very moment that it is to leave.
                    if let Some(lease) = evict.first().and_then(|key| cache.lease(key.chunk)) {
                        reader = Some(lease);
                    }
                    if rng.u8(0..4) == 0 {
                        cache.withdraw(Chunk(rng.u64(0..CHUNKS)));
                    }
                    let write = if rng.bool() { 200 } else { 0 };
                    sim.set_faults(Faults { write, ..Faults::default() });
                    evict.iter().for_each(|key| cache.withdraw(key.chunk));
                    if cache.withdrawn() > 0 {
                        let (gone, _) = cache.sweep(sim).await;
                        gone.into_iter().for_each(|chunk| policy.dropped(key(chunk)));
                    }
                    for it in promote {
                        let bytes = content(&cache, it.chunk);
                        drop(cache.fill(sim, &[(it.chunk, bytes)]).await);
                        match cache.lease(it.chunk).is_some() {
                            true => policy.promoted(it),
                            false => policy.failed(it),
                        }
                        written = second;
                    }
                    if rng.u8(0..3) == 0 {
                        reader = None;
                    }
                }
                drop(reader);
            },
            None,
        );
        assert!(written > 350, "seed {seed}: nothing was promoted after second {written}");
    }
}
