//! Damaged map files.

use underlay::{
    Kind,
    cow::{Provision, format},
    io::sim::Cut,
};

use crate::{BLOCK, Disk, ID};

const SIZE: u64 = 24 * BLOCK;

/// A disk after a crash: a checkpoint, two records behind it, a page in each area.
fn worn() -> (Disk, Vec<u8>) {
    let disk = Disk::new(SIZE, 4);
    let overlay = disk.open().expect("it is new");
    for round in 0..8u8 {
        let at = u64::from(round) * 2 * BLOCK;
        disk.write(&overlay, at, &vec![round + 1; 5000]).expect("the disk is sound");
        disk.run(overlay.write_zeroes(
            &disk.sim,
            &disk.base,
            at + BLOCK,
            BLOCK,
            Provision::Release,
        ))
        .expect("the disk is sound");
        disk.flush(&overlay).expect("the disk is sound");
    }
    assert_eq!(overlay.stats().checkpoints, 2);
    let content = disk.read(&overlay, 0, SIZE as usize).expect("the disk is sound");
    drop(overlay);
    disk.sim.power_cut(Cut::LoseAll);
    (disk, content)
}

/// The same disk with other bytes at `at` of its map.
fn with_bytes(disk: &Disk, at: u64, bytes: &[u8]) -> Disk {
    let fork = Disk { sim: disk.sim.fork(1), base: crate::Pattern { ..disk.base }, ..*disk };
    fork.sim.poke(fork.map, at, bytes);
    fork
}

/// The same disk with another map.
fn with_map(disk: &Disk, map: &[u8]) -> Disk {
    let fork = disk.sim.fork(1);
    let map = fork.create(4096, map, 0);
    Disk { sim: fork, data: disk.data, map, base: crate::Pattern { size: disk.base.size } }
}

/// Opens it and, if that works, checks that it holds `content` and goes on working.
fn opens_right_or_not(disk: &Disk, content: &[u8], what: impl std::fmt::Display) -> bool {
    let overlay = match disk.open() {
        Ok(overlay) => overlay,
        Err(error) => {
            assert_eq!(error.kind(), Kind::Corrupt, "{what}: {error}");
            assert!(error.to_string().contains(&ID.to_string()), "{error}");
            return false;
        }
    };
    let read = disk.read(&overlay, 0, SIZE as usize).expect("the disk is sound");
    assert!(read == content, "{what}: other content");
    disk.write(&overlay, SIZE - 512, &[0xee; 512]).expect("the disk is sound");
    disk.flush(&overlay).expect("the disk is sound");
    disk.sim.power_cut(Cut::LoseAll);
    let again = disk.read(&disk.open().expect("flushed"), 0, SIZE as usize);
    let again = again.expect("the disk is sound");
    assert!(again[..SIZE as usize - 512] == content[..SIZE as usize - 512], "{what}: later");
    assert!(again[SIZE as usize - 512..].iter().all(|byte| *byte == 0xee), "{what}: later");
    true
}

#[test]
fn no_flipped_byte_changes_what_is_read() {
    let (disk, content) = worn();
    assert!(opens_right_or_not(&with_map(&disk, &disk.sim.peek(disk.map)), &content, "whole"));
    let map = disk.sim.peek(disk.map);
    let (mut opened, mut refused) = (0, 0);
    let pages = format::Layout { records: 4 };
    let live = [0..pages.bitmap() + 4096, pages.page(1, 0)..pages.page(1, 0) + 4096];
    for at in live.into_iter().flatten() {
        for flip in [1, 0xff] {
            let damaged = with_bytes(&disk, at, &[map[at as usize] ^ flip]);
            match opens_right_or_not(&damaged, &content, at) {
                true => opened += 1,
                false => refused += 1,
            }
        }
    }
    // Superblocks, records and the idle area stand it; the page that counts does not.
    assert_eq!(refused, 2 * 4096, "{opened} opened");
}

#[test]
fn no_lost_sector_or_page_changes_what_is_read_unnoticed() {
    let (disk, content) = worn();
    let map = disk.sim.peek(disk.map);
    let mut refused = Vec::new();
    for at in (0..map.len()).step_by(512) {
        if map[at..at + 512].iter().all(|byte| *byte == 0) {
            continue;
        }
        if !opens_right_or_not(&with_bytes(&disk, at as u64, &[0; 512]), &content, at) {
            refused.push(at / 4096);
        }
    }
    refused.dedup();
    assert_eq!(refused.len(), 1, "the bitmap page alone: {refused:?}");
    for page in [0, 1, refused[0]] {
        let damaged = with_bytes(&disk, page as u64 * 4096, &[0; 4096]);
        assert!(!opens_right_or_not(&damaged, &content, page), "page {page}");
    }
    // A record with an acknowledged one behind it.
    let damaged = with_bytes(&disk, 2 * 4096, &[0xff; 4096]);
    assert!(!opens_right_or_not(&damaged, &content, "first record"));
}

#[test]
fn a_truncated_map_is_refused_or_right() {
    let (disk, content) = worn();
    let map = disk.sim.peek(disk.map);
    for len in (0..map.len()).step_by(512) {
        let cut = with_map(&disk, &map[..len]);
        // Records that are cut off look like a crash in the middle of their commit only if they
        // are the last.
        if len < 2 * 4096 {
            assert!(!opens_right_or_not(&cut, &content, len));
        } else if let Ok(overlay) = cut.open() {
            let lost = cut.read(&overlay, 0, SIZE as usize).expect("the disk is sound");
            assert!(lost == content || len < 4 * 4096, "cut at {len}");
        }
    }
}

#[test]
fn random_damage_is_never_a_panic() {
    let (disk, _) = worn();
    let map = disk.sim.peek(disk.map);
    let mut rng = fastrand::Rng::with_seed(3);
    for _ in 0..500 {
        let mut map = map.clone();
        for _ in 0..rng.usize(1..20) {
            let at = rng.usize(0..map.len());
            let end = map.len().min(at + rng.usize(1..9000));
            match rng.u8(0..3) {
                0 => rng.fill(&mut map[at..end]),
                1 => map[at..end].fill(0),
                _ => map.copy_within(at..end, rng.usize(0..=at)),
            }
        }
        let damaged = with_map(&disk, &map);
        if let Ok(overlay) = damaged.open() {
            damaged
                .read(&overlay, 0, overlay.size().min(SIZE) as usize)
                .expect("the disk is sound");
            damaged.write(&overlay, 0, &[1; 600]).expect("the disk is sound");
            damaged.flush(&overlay).expect("the disk is sound");
        }
    }
}

#[test]
fn another_overlays_map_is_refused_by_name() {
    let map = format::blank(uuid::Uuid::from_u128(43), SIZE, 4);
    let error = Disk::with_map(SIZE, &map).open().err().expect("not ours");
    assert_eq!(error.kind(), Kind::Corrupt);
    assert!(error.to_string().contains(&uuid::Uuid::from_u128(43).to_string()), "{error}");
}
