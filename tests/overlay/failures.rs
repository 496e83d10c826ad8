//! Disks that fail, and what flushes cost.

use underlay::{
    Kind,
    cow::Provision,
    io::{
        Buf,
        sim::{Cut, Faults, Task},
    },
};

use crate::{BLOCK, Disk};

const ALWAYS: u32 = 1024;

#[test]
fn a_failed_write_changes_nothing_but_sectors_it_covers() {
    let disk = Disk::new(16 * BLOCK, 2);
    let overlay = disk.open().expect("it is new");
    let before = disk.read(&overlay, 0, 16 << 12).expect("the disk is sound");
    disk.sim.set_faults(Faults { write: ALWAYS, ..Faults::default() });
    for _ in 0..20 {
        let error = disk.write(&overlay, 700, &[5; 9000]).expect_err("the disk fails");
        assert!([Kind::Io, Kind::NoSpace].contains(&error.kind()), "{error}");
    }
    disk.sim.set_faults(Faults::default());
    assert!(overlay.poisoned().is_none());
    // Nothing was data before: nothing shows.
    assert!(disk.read(&overlay, 0, 16 << 12).expect("the disk is sound") == before);
    disk.write(&overlay, 700, &[5; 9000]).expect("the disk is sound again");
    disk.flush(&overlay).expect("the disk is sound again");
}

#[test]
fn a_full_disk_fails_the_flush_and_the_next_one_makes_it_good() {
    for records in [2, 64] {
        let disk = Disk::new(16 * BLOCK, records);
        let overlay = disk.open().expect("it is new");
        for round in 0..20u8 {
            let at = u64::from(round % 10) * BLOCK;
            disk.write(&overlay, at, &[round + 1; 4096]).expect("the disk is sound");
            disk.run(overlay.write_zeroes(&disk.sim, &disk.base, at, 512, Provision::Release))
                .expect("the disk is sound");
            if round % 3 == 0 {
                disk.run(overlay.discard(&disk.sim, at, BLOCK)).expect("the disk is sound");
            }
            disk.sim.set_faults(Faults { write: ALWAYS, ..Faults::default() });
            if overlay.stats().pending > 0 {
                assert!(disk.flush(&overlay).is_err(), "the map cannot be written");
            }
            disk.sim.set_faults(Faults::default());
            let content = disk.read(&overlay, 0, 16 << 12).expect("the disk is sound");
            disk.flush(&overlay).expect("the disk is sound again");
            assert!(overlay.poisoned().is_none());
            let fork = Disk { sim: disk.sim.fork(9), base: crate::Pattern { ..disk.base }, ..disk };
            fork.sim.power_cut(Cut::LoseAll);
            let again = fork.open().expect("it was flushed");
            assert!(fork.read(&again, 0, 16 << 12).expect("the disk is sound") == content);
        }
    }
}

#[test]
fn a_failed_sync_poisons_and_reads_go_on() {
    let disk = Disk::new(16 * BLOCK, 2);
    let overlay = disk.open().expect("it is new");
    disk.write(&overlay, 0, &[1; 4096]).expect("the disk is sound");
    disk.sim.set_faults(Faults { sync: ALWAYS, ..Faults::default() });
    assert_eq!(disk.flush(&overlay).expect_err("the sync fails").kind(), Kind::Io);
    disk.sim.set_faults(Faults::default());
    assert!(overlay.poisoned().is_some());
    let refused = [
        disk.flush(&overlay),
        disk.write(&overlay, 0, &[2; 512]),
        disk.run(overlay.discard(&disk.sim, 0, BLOCK)),
        disk.run(overlay.write_zeroes(&disk.sim, &disk.base, 0, 1, Provision::Keep)),
        disk.run(overlay.resize(&disk.sim, 32 * BLOCK)),
        disk.run(overlay.close(&disk.sim)),
    ];
    for result in refused {
        let error = result.expect_err("nothing may be lost");
        assert_eq!((error.kind(), error.kind().nbd()), (Kind::Poisoned, 5));
    }
    assert_eq!(disk.read(&overlay, 0, 1).expect("reads go on"), [1]);
}

#[test]
fn a_commit_given_up_half_way_poisons() {
    let disk = Disk::new(16 * BLOCK, 2);
    let overlay = disk.open().expect("it is new");
    disk.write(&overlay, 0, &[1; 4096]).expect("the disk is sound");
    assert!(disk.sim.run_one(overlay.flush(&disk.sim), Some(1)).is_none());
    assert!(overlay.poisoned().is_some());
}

#[test]
fn flushes_that_wait_share_a_commit() {
    let disk = Disk::new(64 * BLOCK, 64);
    let overlay = disk.open().expect("it is new");
    disk.run(overlay.close(&disk.sim)).expect("the disk is sound");
    let guest = |number: u64| -> Task<'_> {
        let (overlay, disk) = (&overlay, &disk);
        Box::pin(async move {
            let buf = Buf::heap(4096);
            overlay.write(&disk.sim, &disk.base, number * BLOCK, buf).await.expect("sound");
            overlay.flush(&disk.sim).await.expect("sound");
        })
    };
    disk.sim.run((0..32).map(guest).collect(), None);
    let commits = overlay.stats().commits;
    assert!((1..=16).contains(&commits), "{commits} commits for 32 flushes");
    assert_eq!(overlay.stats().pending, 0);
}

#[test]
fn a_flush_without_changes_writes_nothing() {
    let disk = Disk::new(16 * BLOCK, 64);
    let overlay = disk.open().expect("it is new");
    disk.write(&overlay, 0, &[1; 8192]).expect("the disk is sound");
    disk.flush(&overlay).expect("the disk is sound");
    disk.write(&overlay, 512, &[2; 512]).expect("the disk is sound");
    let (changes, commits) = (disk.sim.changes(), overlay.stats().commits);
    disk.flush(&overlay).expect("the disk is sound");
    disk.flush(&overlay).expect("the disk is sound");
    assert_eq!((disk.sim.changes(), overlay.stats().commits), (changes, commits));
}

#[test]
fn a_long_list_of_changes_commits_by_itself() {
    let disk = Disk::new(40_000 * BLOCK, 64);
    let overlay = disk.open().expect("it is new");
    for block in (0..40_000).step_by(2) {
        let zero = Provision::Release;
        let done = overlay.write_zeroes(&disk.sim, &disk.base, block * BLOCK, BLOCK, zero);
        disk.run(done).expect("the disk is sound");
        if block < 8 {
            disk.write(&overlay, block * BLOCK, &[1; 512]).expect("the disk is sound");
        } else {
            disk.write(&overlay, block * BLOCK, &[1; 4096]).expect("the disk is sound");
        }
        assert!(overlay.stats().pending <= 8002);
    }
    assert!(overlay.stats().commits >= 2, "{:?}", overlay.stats());
}
