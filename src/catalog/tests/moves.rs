//! Invariants checked: a move that was stopped at any of its steps leaves a replica that is on one of
//! the two disks, also when either of them is away at the next start, and whatever `fsck` does then;
//! it is never served where it may be stale, and its image is held throughout. What is settled by hand
//! counts, whatever comes back.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

use super::{
    kill::{Fault, failing},
    scenario::{Scenario, Snapshot, all, check_after_crash, ends, migrate, start},
    *,
};
use crate::{
    catalog::{Repair, ReplicaState},
    error::Kind,
};

fn scenario() -> Scenario {
    all().into_iter().find(|scenario| scenario.label == "move a replica").unwrap()
}

fn take_away(bench: &Bench, disk: &str) {
    fs::rename(bench.path(disk), bench.path(&format!("{disk}-away"))).unwrap();
}

fn bring_back(bench: &Bench, disk: &str) {
    fs::rename(bench.path(&format!("{disk}-away")), bench.path(disk)).unwrap();
}

/// Stops the move of vm1 from a to c before each of its steps, and calls `check` with what is left.
fn stopped_everywhere(check: impl Fn(&Bench, usize)) {
    let bench = start();
    let prepared = Snapshot::of(&bench);
    for step in 1.. {
        prepared.restore(&bench);
        let armed = Arc::new(AtomicUsize::new(usize::MAX));
        let node = bench.open_in_steps(failing(&armed, Fault::FromThen));
        armed.store(step, Ordering::SeqCst);
        let done = migrate(&node, "vm1", "c");
        if armed.load(Ordering::SeqCst) > 0 {
            done.unwrap();
            assert!(step > 15, "it has steps");
            return;
        }
        drop(node);
        check(&bench, step);
    }
}

#[test]
fn a_move_settles_when_a_disk_that_was_away_is_back() {
    let bench = start();
    let ends = ends(&bench, &scenario());
    for away in ["a", "c"] {
        let states = std::cell::RefCell::new(Vec::new());
        stopped_everywhere(|bench, step| {
            take_away(bench, away);
            let node = bench.open();
            let now = node.replica(&name("vm1"));
            // The image's only copy is on a: while that is away, so is all that is known of a replica
            // on it.
            let state = now.as_ref().map(|status| status.state);
            states.borrow_mut().push(state.as_ref().ok().copied());
            match (away, &now) {
                ("a", Err(error)) => assert_eq!(error.kind(), Kind::NotFound),
                ("a", Ok(status)) => {
                    assert_eq!(status.disk, name("c"), "step {step}");
                    assert_eq!(status.state, ReplicaState::BaseMissing);
                }
                (_, Ok(status)) => match status.state {
                    ReplicaState::Ready => assert_eq!(status.disk, name("a"), "step {step}"),
                    ReplicaState::DiskMissing => assert_eq!(status.disk, name("c"), "step {step}"),
                    ReplicaState::Unsettled => {
                        let error = node.open_replica(&name("vm1")).unwrap_err();
                        assert_eq!(error.kind(), Kind::Unavailable);
                        assert!(error.to_string().contains("disk c"), "{error}");
                        let error = node.remove_replica(&name("vm1")).unwrap_err();
                        assert_eq!(error.kind(), Kind::Unavailable);
                        let error = node.remove_disk(&name("c")).unwrap_err();
                        assert_eq!(error.kind(), Kind::InUse, "{error}");
                    }
                    other => panic!("step {step}: {other:?}"),
                },
                (_, Err(error)) => panic!("step {step}: {error}"),
            }
            node.fsck(Repair::Mend).unwrap();
            if away == "c" {
                let error = node.remove_image(&name("debian")).unwrap_err();
                assert_eq!(error.kind(), Kind::InUse, "step {step}: its image is held");
            }
            drop(node);
            bring_back(bench, away);
            check_after_crash(bench, &scenario(), &ends);
        });
        let states = states.into_inner();
        println!("{away} away: {states:?}");
        if away == "c" {
            for state in [ReplicaState::Ready, ReplicaState::Unsettled, ReplicaState::DiskMissing] {
                assert!(states.contains(&Some(state)), "{state:?}");
            }
        }
    }
}

#[test]
fn a_disk_that_comes_back_to_a_node_that_runs_settles_it() {
    let bench = start();
    let ends = ends(&bench, &scenario());
    stopped_everywhere(|bench, _| {
        take_away(bench, "c");
        let node = bench.open();
        bring_back(bench, "c");
        bench.add(&node, "c").unwrap();
        let status = node.replica(&name("vm1")).unwrap();
        assert_eq!(status.state, ReplicaState::Ready, "{status:?}");
        drop(node);
        check_after_crash(bench, &scenario(), &ends);
    });
}

#[test]
fn what_is_settled_by_hand_counts() {
    let mut settled = AtomicUsize::new(0);
    stopped_everywhere(|bench, step| {
        take_away(bench, "c");
        let node = bench.open();
        let status = node.replica(&name("vm1")).unwrap();
        if status.state != ReplicaState::Unsettled {
            assert!(node.settle_replica(&name("vm1")).is_err());
            return;
        }
        settled.fetch_add(1, Ordering::SeqCst);
        let status = node.settle_replica(&name("vm1")).unwrap();
        assert_eq!((status.state, status.disk), (ReplicaState::Ready, name("a")), "step {step}");
        bring_back(bench, "c");
        bench.add(&node, "c").unwrap();
        node.fsck(Repair::Mend).unwrap();
        drop(node);
        let node = bench.open();
        let status = node.replica(&name("vm1")).unwrap();
        assert_eq!((status.state, status.disk), (ReplicaState::Ready, name("a")), "step {step}");
    });
    assert!(*settled.get_mut() > 2);
}

#[test]
fn a_disk_is_left_when_what_was_on_its_way_there_has_arrived() {
    let (_bench, node) = Bench::with(&["a", "b"]);
    import(&node, Some("a"), "debian", &[7; 8192]).unwrap();
    create(&node, "vm1", "debian", "a").unwrap();
    let mut staged = node.stage_move(&name("vm1"), &name("b"), 8192, blank_map).unwrap();
    staged.prepare().unwrap();
    node.set_draining(&name("b"), true).unwrap();
    std::thread::scope(|scope| {
        let left = scope.spawn(|| node.is_left(&name("b")));
        std::thread::sleep(std::time::Duration::from_millis(50));
        assert!(!left.is_finished(), "somebody is on his way there");
        staged.publish().unwrap().remove().unwrap();
        assert!(!left.join().unwrap().unwrap(), "vm1 has arrived");
    });
    migrate(&node, "vm1", "a").unwrap();
    assert!(node.is_left(&name("b")).unwrap());
    node.set_draining(&name("b"), false).unwrap();
    assert_eq!(node.is_left(&name("b")).unwrap_err().kind(), Kind::InUse);
}

#[test]
fn a_disk_is_drained_and_undrained_by_several_at_once() {
    let (bench, node) = Bench::with(&["a", "b"]);
    std::thread::scope(|scope| {
        for draining in [true, false, true, false] {
            let node = &node;
            scope.spawn(move || {
                for _ in 0..20 {
                    node.set_draining(&name("b"), draining).unwrap();
                }
            });
        }
    });
    let known = node.disk(&name("b")).unwrap().draining;
    drop(node);
    assert_eq!(bench.open().disk(&name("b")).unwrap().draining, known);
}

#[test]
fn what_one_move_left_is_cleared_before_another_back_is_given_up() {
    let (bench, node) = Bench::with(&["a", "b"]);
    import(&node, Some("a"), "debian", &[7; 8192]).unwrap();
    let id = create(&node, "vm1", "debian", "a").unwrap().id.to_string();
    let dir = |disk: &str| bench.path(disk).join("underlay/replicas").join(&id);
    let left = bench.temp.path().join("left");
    let copy = |from: &Path, to: &Path| {
        fs::create_dir(to).unwrap();
        for entry in fs::read_dir(from).unwrap().map(|entry| entry.unwrap()) {
            fs::copy(entry.path(), to.join(entry.file_name())).unwrap();
        }
    };
    copy(&dir("a"), &left);
    migrate(&node, "vm1", "b").unwrap();
    let ids = ["a", "b"].map(|disk| bench.add(&node, disk).unwrap().id.to_string());
    // As if the first move could not end.
    copy(&left, &dir("a"));
    let error = migrate(&node, "vm1", "a").unwrap_err();
    assert!(error.to_string().contains("fsck --repair"), "{error}");
    drop(node);
    // And as if one back had been stopped when it was prepared.
    for (disk, to) in [("a", &ids[1]), ("b", &ids[0])] {
        let path = dir(disk).join("replica.json");
        let mut record: serde_json::Value =
            serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        record["moving_to"] = to.as_str().into();
        fs::write(&path, serde_json::to_vec(&record).unwrap()).unwrap();
    }
    let node = bench.open();
    let status = node.replica(&name("vm1")).unwrap();
    assert_eq!((status.state, status.disk), (ReplicaState::Ready, name("b")));
    assert!(!dir("a").exists());
    assert_eq!(node.fsck(Repair::Report).unwrap().problems, []);
    migrate(&node, "vm1", "a").unwrap();
}

#[test]
fn what_cannot_move_is_refused_and_leaves_nothing() {
    let (bench, node) = Bench::with(&["a", "b"]);
    bench.add_pool(&node, "pool");
    import(&node, Some("a"), "debian", &[7; 8192]).unwrap();
    create(&node, "vm1", "debian", "a").unwrap();
    let before = tree(bench.temp.path());
    let refused = |to: &str| migrate(&node, "vm1", to).unwrap_err();
    assert_eq!(refused("a").kind(), Kind::Exists);
    assert_eq!(refused("pool").kind(), Kind::Invalid);
    assert_eq!(refused("nowhere").kind(), Kind::NotFound);
    node.set_draining(&name("b"), true).unwrap();
    let error = refused("b");
    assert!(error.to_string().contains("undrain"), "{error}");
    assert!(create(&node, "vm2", "debian", "b").is_err());
    assert!(import(&node, Some("b"), "other", b"other").is_err());
    bench.add(&node, "b").unwrap();
    let mut staged = node.stage_move(&name("vm1"), &name("b"), 8192, blank_map).unwrap();
    let again = node.stage_move(&name("vm1"), &name("b"), 8192, blank_map).map(drop).unwrap_err();
    assert_eq!(again.kind(), Kind::InUse);
    staged.prepare().unwrap();
    drop(staged);
    assert_eq!(tree(bench.temp.path()), before, "given up, nothing has happened");
    assert_eq!(node.fsck(Repair::Report).unwrap().problems, []);
    migrate(&node, "vm1", "b").unwrap();
    migrate(&node, "vm1", "a").unwrap();
    assert_eq!(tree(bench.temp.path()), before);
}

#[test]
fn a_replica_without_an_image_needs_none() {
    let (_bench, node) = Bench::with(&["a", "b"]);
    import(&node, Some("a"), "debian", &[7; 8192]).unwrap();
    create(&node, "vm1", "debian", "b").unwrap();
    node.flatten_replica(&name("vm1")).unwrap();
    assert_eq!(node.flatten_replica(&name("vm1")).unwrap_err().kind(), Kind::Exists);
    node.remove_image(&name("debian")).unwrap();
    let status = node.replica(&name("vm1")).unwrap();
    assert_eq!((status.state, status.digest), (ReplicaState::Ready, None));
    assert_eq!(node.open_replica(&name("vm1")).unwrap().digest, None);
    assert_eq!(node.fsck(Repair::Report).unwrap().problems, []);
    migrate(&node, "vm1", "a").unwrap();
    node.remove_replica(&name("vm1")).unwrap();
}
