//! Invariants checked: what was removed while a disk was away doesn't come back with it, however its
//! return is interrupted; what somebody stands on, or has brought again, stays; a disk that is forgotten
//! keeps what it has; and what waits is bounded.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

use super::{
    kill::{Fault, failing},
    scenario::{
        SPARE, Snapshot, all, another_spare, bring_back, moved_from_c, seen, start, take_away,
    },
    *,
};
use crate::{
    catalog::{Buried, Forgotten, Removal, Removed, Repair, Unnamed, removed::REMOVED_MAX},
    error::Kind,
};

/// The common start with a copy of `spare` on c, which is away.
fn with_c_away() -> Bench {
    let bench = start();
    another_spare(&bench.open());
    take_away(&bench);
    bench
}

/// What waits for disks that are away.
fn waiting(bench: &Bench) -> usize {
    fs::read_dir(bench.state().join("removed")).map_or(0, |entries| entries.count())
}

fn spare() -> Name {
    name(&digest(SPARE).to_string())
}

fn copies(node: &Node) -> Vec<String> {
    node.image(&spare()).unwrap().copies.iter().map(|copy| copy.disk.to_string()).collect()
}

#[test]
fn a_copy_of_a_removed_image_goes_when_its_disk_returns() {
    let bench = with_c_away();
    let node = bench.open();
    assert_eq!(node.remove_image(&spare()).unwrap(), Unnamed::Removed);
    assert_eq!(waiting(&bench), 1);
    drop(node);
    // A start without the disk changes nothing.
    drop(bench.open());
    bring_back(&bench);
    let node = bench.open();
    assert_eq!(node.image(&spare()).unwrap_err().kind(), Kind::NotFound);
    let gone = Buried { disk: name("c"), what: Removal::Copy(digest(SPARE)), kept: None };
    assert_eq!((node.take_buried(), node.take_buried()), (vec![gone], vec![]));
    let left = tree(&bench.home("c").join("images"));
    assert_eq!((left, waiting(&bench)), (vec![], 0));
    assert_eq!(node.fsck(Repair::Report).unwrap().problems, []);
}

#[test]
fn it_goes_from_a_disk_that_is_added_again_too() {
    let bench = with_c_away();
    let node = bench.open();
    node.remove_image(&spare()).unwrap();
    node.add_disk(&bench.path("gone"), DiskOptions::default()).unwrap();
    assert_eq!(node.image(&spare()).unwrap_err().kind(), Kind::NotFound);
    assert_eq!((tree(&bench.path("gone").join("underlay/images")), waiting(&bench)), (vec![], 0));
}

#[test]
fn an_image_that_was_imported_again_keeps_the_copy_that_returns() {
    let bench = with_c_away();
    let node = bench.open();
    node.remove_image(&spare()).unwrap();
    import(&node, Some("a"), "again", SPARE).unwrap();
    assert_eq!(waiting(&bench), 0);
    drop(node);
    bring_back(&bench);
    assert_eq!(copies(&bench.open()), ["a", "c"]);
    // Also if the daemon died between the import and striking it off.
    let bench = with_c_away();
    let node = bench.open();
    node.remove_image(&spare()).unwrap();
    let removed = Snapshot::of(&bench);
    import(&node, Some("a"), "again", SPARE).unwrap();
    drop(node);
    let imported = bench.home("a").join("images").join(digest(SPARE).to_string());
    let kept = bench.temp.path().join("kept");
    fs::rename(imported, &kept).unwrap();
    let elsewhere = tempfile::tempdir_in(bench.temp.path().parent().unwrap()).unwrap();
    let elsewhere = elsewhere.path().join("kept");
    fs::rename(&kept, &elsewhere).unwrap();
    removed.restore(&bench);
    let at = bench.home("a").join("images").join(digest(SPARE).to_string());
    fs::rename(&elsewhere, at).unwrap();
    assert_eq!(waiting(&bench), 1);
    bring_back(&bench);
    assert_eq!((copies(&bench.open()), waiting(&bench)), (vec!["a".into(), "c".into()], 0));
}

#[test]
fn a_copy_that_a_replica_stands_on_stays_and_is_told() {
    let bench = start();
    let node = bench.open();
    another_spare(&node);
    // A replica on c that only c knows of.
    create(&node, "vm9", "spare", "c").unwrap();
    let id = node.replica(&name("vm9")).unwrap().id;
    drop(node);
    let refs = bench.home("b").join("images").join(digest(SPARE).to_string()).join("refs");
    fs::remove_file(refs.join(format!("{id}.json"))).unwrap();
    take_away(&bench);
    let node = bench.open();
    node.remove_image(&spare()).unwrap();
    import(&node, Some("b"), "spare", b"another content").unwrap();
    drop(node);
    bring_back(&bench);
    let node = bench.open();
    let buried = node.take_buried();
    assert!(buried[0].kept.as_ref().unwrap().contains("stands on it"), "{buried:?}");
    assert_eq!(copies(&node), ["c"]);
    node.open_replica(&name("vm9")).unwrap();
    let now = node.image(&name("spare")).unwrap().digest;
    assert_eq!(now, digest(b"another content"), "its name is another's now");
    assert_eq!((waiting(&bench), node.fsck(Repair::Report).unwrap().problems), (0, vec![]));
    // And goes as any other.
    node.remove_replica(&name("vm9")).unwrap();
    node.remove_image(&spare()).unwrap();
}

#[test]
fn a_copy_that_a_replica_on_a_missing_disk_may_need_waits() {
    let bench = start();
    let node = bench.open();
    another_spare(&node);
    create(&node, "vm9", "spare", "a").unwrap();
    let id = node.replica(&name("vm9")).unwrap().id;
    drop(node);
    let refs = bench.home("b").join("images").join(digest(SPARE).to_string()).join("refs");
    fs::remove_file(refs.join(format!("{id}.json"))).unwrap();
    take_away(&bench);
    fs::rename(bench.path("a"), bench.path("a-away")).unwrap();
    bench.open().remove_image(&spare()).unwrap();
    bring_back(&bench);
    let node = bench.open();
    assert_eq!((copies(&node), waiting(&bench)), (vec!["c".to_owned()], 2));
    drop(node);
    fs::rename(bench.path("a-away"), bench.path("a")).unwrap();
    let node = bench.open();
    assert_eq!((copies(&node), waiting(&bench)), (vec!["c".to_owned()], 0));
    node.open_replica(&name("vm9")).unwrap();
}

#[test]
fn a_name_that_was_removed_stays_so_and_one_that_was_given_again_too() {
    let bench = with_c_away();
    let node = bench.open();
    assert_eq!(node.remove_image(&name("extra")).unwrap(), Unnamed::Kept);
    import(&node, Some("a"), "more", SPARE).unwrap();
    node.remove_image(&name("more")).unwrap();
    import(&node, Some("a"), "more", SPARE).unwrap();
    drop(node);
    bring_back(&bench);
    let node = bench.open();
    let names = |node: &Node| {
        let mut names = node.image(&spare()).unwrap().names;
        names.sort();
        names
    };
    assert_eq!(names(&node), [name("more"), name("spare")]);
    drop(node);
    // What the copy on c says by itself.
    fs::rename(bench.path("b"), bench.path("b-away")).unwrap();
    assert_eq!(names(&bench.open()), [name("spare")]);
}

#[test]
fn a_replica_that_was_removed_on_its_new_disk_is_gone_from_the_old_one() {
    let bench = start();
    moved_from_c(&bench.open());
    take_away(&bench);
    let node = bench.open();
    assert_eq!(node.remove_replica(&name("vm3")).unwrap(), Removed::Whole);
    assert_eq!(waiting(&bench), 1);
    drop(node);
    bring_back(&bench);
    let node = bench.open();
    assert_eq!(node.replica(&name("vm3")).unwrap_err().kind(), Kind::NotFound);
    assert_eq!((tree(&bench.home("c").join("replicas")), waiting(&bench)), (vec![], 0));
    assert_eq!(node.fsck(Repair::Report).unwrap().problems, []);
}

#[test]
fn a_replica_that_was_removed_while_its_disk_was_away_goes_when_that_returns() {
    let bench = start();
    create(&bench.open(), "vm3", "debian", "c").unwrap();
    take_away(&bench);
    let node = bench.open();
    assert_eq!(node.remove_replica(&name("vm3")).unwrap(), Removed::OnReturn);
    assert_eq!(node.remove_replica(&name("vm3")).unwrap_err().kind(), Kind::NotFound);
    // Its name is free, and its image too.
    create(&node, "vm3", "debian", "a").unwrap();
    for replica in ["vm1", "vm2", "vm3"] {
        node.remove_replica(&name(replica)).unwrap();
    }
    assert_eq!(node.remove_image(&name("debian")).unwrap(), Unnamed::Removed);
    drop(node);
    bring_back(&bench);
    let node = bench.open();
    assert!(node.replicas().is_empty());
    assert_eq!((tree(&bench.home("c").join("replicas")), waiting(&bench)), (vec![], 0));
}

#[test]
fn a_return_that_is_interrupted_anywhere_brings_nothing_back() {
    for fault in [Fault::FromThen, Fault::Once] {
        let bench = start();
        let common = Snapshot::of(&bench);
        for scenario in all().into_iter().filter(|scenario| scenario.label.contains("away")) {
            let label = scenario.label;
            common.restore(&bench);
            (scenario.prepare)(&bench);
            (scenario.run)(&bench, &bench.open()).unwrap();
            bring_back(&bench);
            let returned = Snapshot::of(&bench);
            let wanted = seen(&bench.open());
            assert_eq!(waiting(&bench), 0, "{label}");
            for step in 1.. {
                returned.restore(&bench);
                let armed = Arc::new(AtomicUsize::new(step));
                drop(Node::open_in_steps(&bench.state(), failing(&armed, fault)));
                if armed.swap(usize::MAX, Ordering::SeqCst) > 0 {
                    assert!(step > 5, "{label}: it has steps");
                    break;
                }
                let node = bench.open();
                assert_eq!(seen(&node), wanted, "{label}, step {step}");
                assert_eq!(node.fsck(Repair::Mend).unwrap().problems, [], "{label}, step {step}");
                assert_eq!(waiting(&bench), 0, "{label}, step {step}");
            }
        }
    }
}

#[test]
fn a_disk_that_is_forgotten_keeps_what_it_has() {
    let bench = with_c_away();
    let node = bench.open();
    node.remove_image(&spare()).unwrap();
    assert_eq!(node.remove_disk(&name("c")).unwrap(), Forgotten::Kept);
    assert_eq!(waiting(&bench), 0);
    node.add_disk(&bench.path("gone"), DiskOptions::default()).unwrap();
    assert_eq!(copies(&node), ["c"]);
}

#[test]
fn what_waits_is_bounded() {
    let bench = with_c_away();
    let node = bench.open();
    for number in 0..REMOVED_MAX {
        let gone = crate::catalog::removed::Gone::Replica(Uuid::from_u128(number as u128));
        let disks = node.0.view().away_disks();
        node.remember_removed(&gone, &disks).unwrap();
    }
    let full = node.remove_image(&spare()).unwrap_err();
    assert_eq!(full.kind(), Kind::Unavailable);
    assert!(full.to_string().contains("forget it"), "{full}");
    assert_eq!(copies(&node), ["b"]);
    drop(node);
    // A record that can't be understood costs what it says, and nothing else.
    let record = fs::read_dir(bench.state().join("removed")).unwrap().next().unwrap().unwrap();
    for text in ["", "{", "{\"format\": 2}"] {
        fs::write(record.path(), text).unwrap();
        assert_eq!(copies(&bench.open()), ["b"]);
    }
}
