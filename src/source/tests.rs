//! Checked: as long as one source has a chunk, reads of it are the image's content, whatever the others
//! do; nothing that lost a race touches memory that was given back; what is damaged is made whole.

use std::cell::{Cell, RefCell};

use super::*;
use crate::{
    io::sim::{End, Sim, SimFile, Task},
    source::repair::Repair,
};

const CHUNKS: u64 = 5;
const SIZE: u64 = CHUNKS * CHUNK - 3584;
/// The chunk that is zeros.
const ZERO: Chunk = Chunk(3);

fn content() -> Vec<u8> {
    let byte = |at: u64| match Chunk::at(at) == ZERO {
        true => 0,
        false => (at >> 7 ^ at >> 16 ^ at) as u8 | 1,
    };
    (0..SIZE).map(byte).collect()
}

fn sums(content: &[u8]) -> Vec<Content> {
    let sum = |(chunk, bytes): (usize, &[u8])| match chunk as u64 == ZERO.0 {
        true => Content { zeros: u64::MAX, crc: 0 },
        false => Content { zeros: 0, crc: crc32fast::hash(bytes) },
    };
    content.chunks(CHUNK as usize).enumerate().map(sum).collect()
}

/// An image in the simulator.
struct Rig {
    sim: Sim,
    files: Vec<SimFile>,
    disks: Vec<Arc<Disk>>,
    sources: Sources<Sim>,
    content: Vec<u8>,
}

impl Rig {
    fn new(seed: u64, copies: usize, verify: Verify) -> Rig {
        let sim = Sim::new(seed);
        let content = content();
        let files: Vec<_> = (0..copies).map(|_| sim.create(512, &content, SIZE)).collect();
        let disk = |number: usize| Arc::new(Disk::new(format!("disk{number}"), None, 64));
        let disks: Vec<_> = (0..copies).map(disk).collect();
        let copy = |(file, disk): (&SimFile, &Arc<Disk>)| {
            Arc::new(Copy::new(disk.clone(), (0, 0), *file, *file, CHUNKS))
        };
        let open = files.iter().zip(&disks).map(copy).collect();
        let sources = Sources::new("test", SIZE, sums(&content), open, verify).unwrap();
        Rig { sim, files, disks, sources, content }
    }

    fn damage(&self, copy: usize, chunk: Chunk) {
        self.sim.poke(self.files[copy], chunk.offset() + 77_777, b"flipped");
    }

    fn part(&self, offset: u64, len: usize) -> &[u8] {
        &self.content[offset as usize..offset as usize + len]
    }

    /// Reads a range, in a run of its own.
    fn read(&self, offset: u64, len: usize) -> Result<Vec<u8>> {
        let buf = self.sim.alloc(len);
        let read = self.sim.run_one(self.sources.read(&self.sim, offset, buf.clone()), None);
        read.expect("it ends").map(|()| buf.to_vec())
    }
}

struct Elsewhere(Vec<u8>);

impl Rescue for Elsewhere {
    fn chunk(&self, chunk: Chunk) -> Pin<Box<dyn Future<Output = Option<Vec<u8>>> + Send>> {
        let start = chunk.offset() as usize;
        let end = self.0.len().min(start + CHUNK as usize);
        let bytes = self.0.get(start..end).map(<[u8]>::to_vec);
        Box::pin(async move { bytes })
    }
}

#[test]
fn one_good_copy_is_enough() {
    let (mut raced, mut hedged, mut failovers) = (0, 0, 0);
    for seed in 0..150 {
        let mut rng = fastrand::Rng::with_seed(seed);
        let verify = if seed % 5 == 0 { Verify::Always } else { Verify::First };
        let rig = Rig::new(seed, 3, verify);
        let good = rng.usize(0..3);
        for copy in (0..3).filter(|copy| *copy != good) {
            match rng.u32(0..4) {
                0 => rig.sim.set_hung(rig.files[copy], true),
                1 => rig.sim.set_read_faults(rig.files[copy], 1024),
                2 => rig.sim.set_read_faults(rig.files[copy], 300),
                _ => (0..CHUNKS).for_each(|chunk| rig.damage(copy, Chunk(chunk))),
            }
        }
        let held = RefCell::new(Vec::new());
        let mut tasks: Vec<Task> = Vec::new();
        for reader in 0..3 {
            let (rig, held) = (&rig, &held);
            tasks.push(Box::pin(async move {
                let mut rng = fastrand::Rng::with_seed(seed * 3 + reader);
                for _ in 0..25 {
                    let offset = rng.u64(0..SIZE / 512) * 512;
                    let most = if rng.bool() { 64 } else { 2048 };
                    let len = (rng.u64(1..=most) * 512).min(SIZE - offset) as usize;
                    let buf = rig.sim.alloc(len);
                    rig.sources.read(&rig.sim, offset, buf.clone()).await.unwrap();
                    assert!(buf.to_vec() == rig.part(offset, len), "seed {seed}: {offset}, {len}");
                    held.borrow_mut().push((offset, buf));
                }
            }));
        }
        assert!(matches!(rig.sim.run(tasks, None), End::Done(_)), "seed {seed}");
        // Those that hung end at last: nothing that was answered long ago may change.
        rig.files.iter().for_each(|file| rig.sim.set_hung(*file, false));
        rig.sim.run(Vec::new(), None);
        for (offset, buf) in held.into_inner() {
            assert!(buf.to_vec() == rig.part(offset, buf.len()), "seed {seed}: written after");
        }
        let figures = rig.sources.figures();
        assert_eq!((figures.failed, figures.rescued), (0, 0));
        assert!(figures.hedges <= figures.raced / 20 + 33, "{figures:?}");
        raced += figures.raced;
        hedged += figures.hedges;
        failovers += figures.failovers;
    }
    assert!(raced > 5000 && hedged > 100 && failovers > 1000, "{raced} {hedged} {failovers}");
}

#[test]
fn copies_come_and_go_under_readers() {
    for seed in 0..60 {
        let rig = Rig::new(seed, 3, Verify::First);
        let all = rig.sources.copies();
        rig.damage(0, Chunk(0));
        rig.sim.set_read_faults(rig.files[1], 200);
        let done = Cell::new(0);
        let mut tasks: Vec<Task> = vec![Box::pin(async {
            let mut rng = fastrand::Rng::with_seed(seed);
            while done.get() < 3 {
                let mut some: Vec<_> = all.iter().filter(|_| rng.bool()).cloned().collect();
                some.push(all[2].clone());
                some.dedup_by(|one, other| Arc::ptr_eq(one, other));
                rig.sources.set_copies(some);
                rig.sim.sleep(std::time::Duration::ZERO).await;
            }
        })];
        for reader in 0..3 {
            let (rig, done) = (&rig, &done);
            tasks.push(Box::pin(async move {
                let mut rng = fastrand::Rng::with_seed(seed * 3 + reader);
                for _ in 0..20 {
                    let offset = rng.u64(0..SIZE / 512) * 512;
                    let len = (rng.u64(1..=1024) * 512).min(SIZE - offset) as usize;
                    let buf = rig.sim.alloc(len);
                    rig.sources.read(&rig.sim, offset, buf.clone()).await.unwrap();
                    assert!(buf.to_vec() == rig.part(offset, len), "seed {seed}: {offset}, {len}");
                }
                done.set(done.get() + 1);
            }));
        }
        assert!(matches!(rig.sim.run(tasks, None), End::Done(_)), "seed {seed}");
    }
}

#[test]
fn with_one_copy_what_is_damaged_fails_and_nothing_else() {
    let rig = Rig::new(1, 1, Verify::First);
    rig.damage(0, Chunk(1));
    let error = rig.read(CHUNK + 4096, 4096).unwrap_err();
    assert_eq!(error.kind(), Kind::Corrupt);
    assert!(error.to_string().contains("image test: disk disk0: chunk 1"), "{error}");
    assert_eq!(rig.read(0, 4096).unwrap(), rig.part(0, 4096));
    assert_eq!(rig.read(ZERO.offset(), 8192).unwrap(), [0; 8192]);
    assert!(rig.read(0, 2 * CHUNK as usize).is_err());
    let copies = rig.sources.copies();
    assert_eq!(copies[0].unsound(), [Chunk(1)]);
    // Nothing else has it, and nothing is written.
    let repair = rig.sources.repair(&rig.sim, &copies[0], Chunk(1), &rig.files[0]);
    let error = rig.sim.run_one(repair, None).unwrap().unwrap_err();
    assert_eq!(error.kind(), Kind::Unavailable);
    // Never verified, it goes unnoticed: that is what was asked for.
    let blind = Rig::new(1, 1, Verify::Never);
    blind.damage(0, Chunk(1));
    assert_ne!(blind.read(CHUNK, 2 * 77_777).unwrap(), blind.part(CHUNK, 2 * 77_777));
}

#[test]
fn when_no_copy_answers_the_rescue_is_asked_and_verified() {
    let rig = Rig::new(2, 2, Verify::First);
    rig.files.iter().for_each(|file| rig.sim.set_read_faults(*file, 1024));
    let mut elsewhere = rig.content.clone();
    elsewhere[2 * CHUNK as usize] ^= 1;
    rig.sources.set_rescue(Box::new(Elsewhere(elsewhere)));
    assert_eq!(rig.read(CHUNK - 512, 1024).unwrap(), rig.part(CHUNK - 512, 1024));
    assert_eq!(rig.read(2 * CHUNK, 512).unwrap_err().kind(), Kind::Io);
    assert_eq!(rig.sources.figures().rescued, 2);
}

#[test]
fn what_is_damaged_is_made_whole() {
    for seed in 0..40 {
        let rig = Rig::new(seed, 2, Verify::First);
        let (bad, last) = (Chunk(seed % CHUNKS), Chunk(CHUNKS - 1));
        for chunk in [bad, last] {
            rig.damage(0, Chunk(chunk.0.min(CHUNKS - 1)));
        }
        let copy = rig.sources.copies()[0].clone();
        for chunk in (0..CHUNKS).map(Chunk).filter(|chunk| *chunk != ZERO) {
            // Readers would do; but whether one of them asks this copy is for the seed to say.
            drop(rig.sim.run_one(copy.examine(&rig.sim, rig.sources.image(), chunk), None));
        }
        let unsound = copy.unsound();
        assert!(unsound.contains(&last) && unsound.contains(&bad) != (bad == ZERO));
        // Somebody reads all the while.
        let mut tasks: Vec<Task> = vec![Box::pin(async {
            for chunk in unsound {
                let repair = rig.sources.repair(&rig.sim, &copy, chunk, &rig.files[0]);
                assert_eq!(repair.await.unwrap(), Repair::Written);
            }
        })];
        tasks.push(Box::pin(async {
            for chunk in 0..CHUNKS {
                let buf = rig.sim.alloc(4096);
                rig.sources.read(&rig.sim, chunk * CHUNK, buf.clone()).await.unwrap();
                assert!(buf.to_vec() == rig.part(chunk * CHUNK, 4096), "seed {seed}");
            }
        }));
        assert!(matches!(rig.sim.run(tasks, None), End::Done(_)));
        // A reader may have met a chunk half written; then it is sound all the same.
        for chunk in copy.unsound() {
            let repair = rig.sources.repair(&rig.sim, &copy, chunk, &rig.files[0]);
            assert_eq!(rig.sim.run_one(repair, None).unwrap().unwrap(), Repair::Sound);
        }
        assert!(copy.unsound().is_empty());
        for chunk in (0..CHUNKS).map(Chunk).filter(|chunk| *chunk != ZERO) {
            let start = chunk.offset() as usize;
            let end = (start + CHUNK as usize).min(SIZE as usize);
            assert!(rig.sim.peek(rig.files[0])[start..end] == rig.content[start..end]);
        }
    }
}

#[test]
fn a_silent_disk_is_left_alone_and_a_failing_one_too() {
    let rig = Rig::new(3, 2, Verify::First);
    rig.sim.set_hung(rig.files[0], true);
    for read in 0..60 {
        let offset = read % 3 * CHUNK + read * 512;
        assert_eq!(rig.read(offset, 4096).unwrap(), rig.part(offset, 4096));
    }
    assert_eq!(rig.disks[0].trouble(), Some(Trouble::Silent));
    let rig = Rig::new(4, 2, Verify::First);
    rig.sim.set_read_faults(rig.files[0], 1024);
    for read in 0..20 {
        rig.read(read % 3 * CHUNK, 512).unwrap();
    }
    assert_eq!(rig.sources.copies()[0].unsound().len(), 3);
    assert_eq!(
        rig.disks[0].trouble(),
        None,
        "the chunks are known, the disk was asked three times"
    );
}
