//! One guest, no faults: every operation against a `Vec<u8>`, over reopenings.

use underlay::cow::{Provision, Source};

use crate::{BLOCK, Disk};

#[test]
fn agrees_with_a_vector() {
    for seed in 0..60 {
        let mut rng = fastrand::Rng::with_seed(seed);
        let mut size = rng.u64(1..=400) * 512;
        let disk = Disk::new(size, if rng.bool() { 2 } else { 64 });
        let mut model: Vec<u8> = (0..size).map(|at| disk.base.byte(at)).collect();
        let mut overlay = disk.open().expect("it is new");
        for _ in 0..150 {
            let start = rng.u64(0..size);
            let len = rng.u64(1..=(size - start).min(12 * BLOCK));
            let range = start as usize..(start + len) as usize;
            match rng.u8(0..20) {
                0..=6 => {
                    let bytes: Vec<u8> = (0..len).map(|_| rng.u8(..)).collect();
                    disk.write(&overlay, start, &bytes).expect("the disk is sound");
                    model[range].copy_from_slice(&bytes);
                }
                7..=12 => {
                    let read = disk.read(&overlay, start, len as usize);
                    assert!(read.expect("the disk is sound") == model[range], "seed {seed}");
                }
                13 | 14 => {
                    let keep = if rng.bool() { Provision::Keep } else { Provision::Release };
                    let zeroed = overlay.write_zeroes(&disk.sim, &disk.base, start, len, keep);
                    disk.run(zeroed).expect("the disk is sound");
                    model[range].fill(0);
                }
                15 => {
                    disk.run(overlay.discard(&disk.sim, start, len)).expect("the disk is sound");
                    // What it does is left to it, but nothing else may appear.
                    let read = disk.read(&overlay, start, len as usize).expect("the disk is sound");
                    for (now, before) in read.iter().zip(&mut model[range]) {
                        assert!(*now == 0 || now == before, "seed {seed}");
                        *before = *now;
                    }
                }
                16 => disk.flush(&overlay).expect("the disk is sound"),
                17 => {
                    let more = rng.u64(1..=20) * 512;
                    disk.run(overlay.resize(&disk.sim, size + more)).expect("it may grow");
                    model.extend((size..size + more).map(|at| disk.base.byte(at)));
                    size += more;
                    assert_eq!(overlay.size(), size);
                }
                18 => {
                    disk.run(overlay.close(&disk.sim)).expect("the disk is sound");
                    overlay = disk.open().expect("it was closed");
                    assert_eq!(overlay.size(), size);
                }
                _ => check_extents(&disk, &overlay, start, len, &model),
            }
        }
    }
}

/// Extents cover the range, and what they call zeros is.
fn check_extents(
    disk: &Disk,
    overlay: &underlay::cow::Overlay<underlay::io::sim::Sim>,
    start: u64,
    len: u64,
    model: &[u8],
) {
    let mut at = start;
    for segment in overlay.extents(&disk.base, start, len).expect("it lies within") {
        assert_eq!(segment.offset, at);
        at += segment.len;
        if segment.source == Source::Zero {
            assert!(model[segment.offset as usize..at as usize].iter().all(|byte| *byte == 0));
        }
    }
    assert_eq!(at, start + len);
}

#[test]
fn ranges_past_the_end_are_refused() {
    let disk = Disk::new(10 * 512, 2);
    let overlay = disk.open().expect("it is new");
    for (offset, len) in [(5120, 1), (5119, 2), (u64::MAX, 1), (1 << 63, 512)] {
        assert!(disk.read(&overlay, offset, len as usize).is_err());
        assert!(disk.write(&overlay, offset, &vec![0; len as usize]).is_err());
        assert!(disk.run(overlay.discard(&disk.sim, offset, len)).is_err());
        let keep = Provision::Keep;
        assert!(disk.run(overlay.write_zeroes(&disk.sim, &disk.base, offset, len, keep)).is_err());
        assert!(overlay.extents(&disk.base, offset, len).is_err());
    }
    assert!(disk.run(overlay.discard(&disk.sim, 0, u64::MAX)).is_err());
    for size in [0, 512, 5121, u64::MAX, 65 << 40] {
        let error = disk.run(overlay.resize(&disk.sim, size)).expect_err("no such size");
        assert_eq!(error.kind(), underlay::Kind::Invalid);
    }
}

#[test]
fn zeroed_space_is_given_back_after_the_flush_and_not_before() {
    let disk = Disk::new(64 * BLOCK, 2);
    let overlay = disk.open().expect("it is new");
    disk.write(&overlay, 0, &vec![9; 16 << 10]).expect("the disk is sound");
    disk.flush(&overlay).expect("the disk is sound");
    disk.run(overlay.discard(&disk.sim, 0, 8 << 10)).expect("the disk is sound");
    assert_eq!(disk.sim.peek(disk.data)[0], 9);
    disk.flush(&overlay).expect("the disk is sound");
    assert_eq!(disk.sim.peek(disk.data)[..16 << 10], [[0; 8 << 10], [9; 8 << 10]].concat());
    assert_eq!(overlay.stats().punched, 2);
}
