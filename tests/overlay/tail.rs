//! Invariants checked: what was acknowledged and not flushed is there for the next process that finds
//! the tail, however much came at once; a tail that another session has overtaken is not replayed,
//! whatever that one wrote.

use std::sync::{Arc, atomic::AtomicU64};

use underlay::cow::{
    Provision,
    tail::{BYTES, Place},
};

use super::*;

fn place() -> Place {
    let words: Box<[AtomicU64]> = (0..BYTES / 8).map(|_| AtomicU64::new(0)).collect();
    Place { memory: Arc::new(words), boot: Uuid::from_u128(1) }
}

fn open(disk: &Disk, tail: Option<Place>) -> Overlay<Sim> {
    disk.run(Overlay::open(&disk.sim, disk.data, disk.map, ID, tail)).expect("it opens")
}

#[test]
fn the_next_process_finds_what_was_acknowledged() {
    let disk = Disk::new(64 * BLOCK, 8);
    let tail = place();
    let first = open(&disk, Some(tail.clone()));
    disk.write(&first, 5 * BLOCK + 512, &[7; 9000]).unwrap();
    disk.run(first.discard(&disk.sim, 5 * BLOCK, BLOCK)).unwrap();
    drop(first);
    let second = open(&disk, Some(tail));
    assert_eq!(disk.read(&second, 5 * BLOCK, 4096).unwrap(), [0; 4096]);
    assert_eq!(disk.read(&second, 6 * BLOCK, 4096).unwrap(), [7; 4096]);
    drop(second);
    let without = open(&disk, None);
    assert_eq!(disk.read(&without, 6 * BLOCK, 1).unwrap(), [disk.base.byte(6 * BLOCK)]);
}

#[test]
fn a_tail_that_was_overtaken_in_place_is_not_replayed() {
    let disk = Disk::new(64 * BLOCK, 8);
    let before = open(&disk, None);
    disk.write(&before, 3 * BLOCK, &[1; 4096]).unwrap();
    disk.run(before.close(&disk.sim)).unwrap();
    drop(before);
    let tail = place();
    let killed = open(&disk, Some(tail.clone()));
    disk.run(killed.discard(&disk.sim, 3 * BLOCK, BLOCK)).unwrap();
    drop(killed);
    // This one does not know of the tail, changes no block's state, and flushes.
    let other = open(&disk, None);
    disk.write(&other, 3 * BLOCK, &[2; 4096]).unwrap();
    disk.flush(&other).unwrap();
    drop(other);
    let next = open(&disk, Some(tail));
    assert_eq!(disk.read(&next, 3 * BLOCK, 4096).unwrap(), [2; 4096]);
}

#[test]
fn however_much_is_zeroed_at_once_the_tail_holds_it() {
    const PAGE: u64 = format::BLOCKS_PER_PAGE * BLOCK;
    const PAGES: u64 = 20;
    let mut disk = Disk::new(PAGES * PAGE, format::RECORDS);
    disk.base.size = PAGES * PAGE;
    let tail = place();
    let overlay = open(&disk, Some(tail.clone()));
    // Each is more than 4,000 runs, all are more than the tail has room for. They begin within a
    // block, which takes time: all have begun before the first gets on.
    let zero = |page| {
        let (from, len) = (page * PAGE + 512, PAGE - 512);
        overlay.write_zeroes(&disk.sim, &disk.base, from, len, Provision::Release)
    };
    for zeroed in disk.run(futures_util::future::join_all((0..PAGES).map(zero))) {
        zeroed.unwrap();
    }
    drop(overlay);
    let next = open(&disk, Some(tail));
    for at in (0..PAGES).flat_map(|page| [page * PAGE + 512, (page + 1) * PAGE - 512]) {
        assert!(disk.read(&next, at, 512).unwrap() == [0; 512], "at {at}");
    }
    assert_eq!(disk.read(&next, 0, 1).unwrap(), [disk.base.byte(0)]);
}
