//! Invariants checked: what was acknowledged and not flushed is there for the next process that finds
//! the tail; a tail that another session has overtaken is not replayed, whatever that one wrote.

use std::sync::{Arc, atomic::AtomicU64};

use underlay::cow::tail::{BYTES, Place};

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
