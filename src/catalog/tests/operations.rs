//! Invariants checked: every operation does what it says, leaves what a restart finds again, and
//! refuses with an error that names the object and those concerned.

use std::{collections::BTreeSet, fs, os::unix::fs::MetadataExt, thread};

use nix::fcntl::OFlag;

use super::*;
use crate::{
    catalog::{DiskState, Forgotten, Removed, ReplicaState, Tier, Unnamed, UserState},
    error::Kind,
};

const IMAGE: &[u8] = &[7; 8192];

#[test]
fn a_node_comes_back_as_it_was() {
    let (bench, node) = Bench::with(&["a", "b", "c"]);
    let image = import(&node, Some("a"), "debian", IMAGE).unwrap();
    assert_eq!(image.names, [name("debian")]);
    assert_eq!((image.size, image.digest), (8192, digest(IMAGE)));
    for (replica, disk) in [("vm1", "a"), ("vm2", "b"), ("vm3", "c")] {
        let made = create(&node, replica, "debian", disk).unwrap();
        assert_eq!((made.state, made.size), (ReplicaState::Ready, 8192));
        assert_eq!(made.image, [name("debian")]);
    }
    let before = serde_json::to_value((node.images(), node.replicas(), node.disks())).unwrap();
    drop(node);
    let node = bench.open();
    let after = serde_json::to_value((node.images(), node.replicas(), node.disks())).unwrap();
    // Free space is everybody's; the rest is ours.
    let without_free = |mut value: serde_json::Value| {
        for disk in value[2].as_array_mut().unwrap() {
            disk["free_bytes"] = 0.into();
        }
        value
    };
    assert_eq!(without_free(before), without_free(after));
    assert!(node.fsck(crate::catalog::Repair::Report).unwrap().problems.is_empty());
    let users = node.image(&name("debian")).unwrap().users;
    assert_eq!(
        users.iter().map(|user| user.name.as_str()).collect::<Vec<_>>(),
        ["vm1", "vm2", "vm3"]
    );
}

#[test]
fn files_are_private_and_whole() {
    let (bench, node) = Bench::with(&["a", "b"]);
    import(&node, Some("a"), "debian", IMAGE).unwrap();
    let made = create(&node, "vm1", "debian", "b").unwrap();
    for disk in ["a", "b"] {
        for file in tree(&bench.home(disk)) {
            let meta = fs::metadata(bench.home(disk).join(&file)).unwrap();
            let right = match file.rsplit('/').next().unwrap() {
                _ if meta.is_dir() => 0o700,
                "data" | "chunks" if file.starts_with("images") => 0o400,
                _ => 0o600,
            };
            assert_eq!(meta.mode() & 0o777, right, "{file}");
            assert!(!file.contains(".tmp-") && !file.contains(".staging-"), "{file}");
        }
    }
    let opened = node.open_replica(&name("vm1")).unwrap();
    assert_eq!((opened.id, opened.digest, opened.size), (made.id, Some(digest(IMAGE)), 8192));
    let data = opened.open_data(OFlag::empty()).unwrap();
    assert_eq!(data.metadata().unwrap().len(), 8192);
    assert_eq!(data.metadata().unwrap().blocks(), 0, "nothing but a hole");
    let map = fs::read(opened.path().join("map")).unwrap();
    assert_eq!(map, blank_map(made.id, 8192));
    opened.open_map(OFlag::O_CLOEXEC).unwrap();
    let copy = node.open_copy(&name("debian")).unwrap();
    assert_eq!(std::io::read_to_string(copy.chunks).unwrap(), "chunk table");
    assert_eq!((copy.size, copy.disk), (8192, name("a")));
    assert_eq!(node.open_copy(&name(&digest(IMAGE).to_string())).unwrap().digest, digest(IMAGE));
}

#[test]
fn one_content_is_one_image() {
    let (bench, node) = Bench::with(&["a", "b"]);
    import(&node, Some("a"), "one", IMAGE).unwrap();
    let both = import(&node, Some("b"), "two", IMAGE).unwrap();
    assert_eq!(both.names, [name("one"), name("two")]);
    assert_eq!(both.copies.len(), 1);
    assert_eq!(tree(&bench.home("b").join("images")), [""; 0]);
    assert_eq!(import(&node, None, "two", IMAGE).unwrap().names.len(), 2, "and it is idempotent");
    let taken = import(&node, None, "two", b"other").unwrap_err();
    assert_eq!(taken.kind(), Kind::Exists);
    drop(node);
    let node = bench.open();
    assert_eq!(node.remove_image(&name("one")).unwrap(), Unnamed::Kept);
    assert_eq!(node.image(&name("one")).unwrap_err().kind(), Kind::NotFound);
    create(&node, "vm1", "two", "b").unwrap();
    let error = node.remove_image(&name("two")).unwrap_err();
    assert_eq!(error.kind(), Kind::InUse);
    assert!(error.to_string().contains("vm1"), "{error}");
    assert_eq!(node.remove_replica(&name("vm1")).unwrap(), Removed::Whole);
    assert_eq!(node.remove_image(&name("two")).unwrap(), Unnamed::Removed);
    assert_eq!(tree(&bench.home("a").join("images")), [""; 0]);
    assert_eq!(tree(&bench.home("b").join("replicas")), [""; 0]);
    assert_eq!(node.status().images, 0);
}

#[test]
fn a_dropped_stage_leaves_nothing() {
    let (bench, node) = Bench::with(&["a"]);
    let staged = stage(&node, None, IMAGE).unwrap();
    assert_eq!(tree(&bench.home("a").join("images")).len(), 3);
    assert!(node.images().is_empty());
    drop(staged);
    assert_eq!(tree(&bench.home("a").join("images")), [""; 0]);
    // An import that left less than it said is not published, and cleaned up.
    let staged = stage(&node, None, IMAGE).unwrap();
    fs::write(staged.data_path(), b"short").unwrap();
    assert_eq!(staged.publish(meta("debian", IMAGE)).unwrap_err().kind(), Kind::Invalid);
    let staged = stage(&node, None, IMAGE).unwrap();
    fs::remove_file(staged.chunks_path()).unwrap();
    assert!(staged.publish(meta("debian", IMAGE)).is_err());
    assert_eq!(tree(&bench.home("a").join("images")), [""; 0]);
}

#[test]
fn a_place_is_chosen_by_kind_then_tier() {
    let (bench, node) = Bench::with(&["a"]);
    bench.add_pool(&node, "p");
    assert_eq!(node.stage_copy(None, 1).unwrap().disk(), &name("p"));
    assert_eq!(node.stage_copy(Some(&name("a")), 1).unwrap().disk(), &name("a"));
    node.set_placement(Placement::Direct);
    assert_eq!(node.stage_copy(None, 1).unwrap().disk(), &name("a"));
    for (disk, tier) in [("slow", Tier::Hdd), ("fast", Tier::Nvme)] {
        fs::create_dir_all(bench.path(disk)).unwrap();
        let options = DiskOptions { tier: Some(tier), ..DiskOptions::default() };
        node.add_disk(&bench.path(disk), options).unwrap();
    }
    assert_eq!(node.stage_copy(None, 1).unwrap().disk(), &name("fast"));
    let full = node.stage_copy(None, u64::MAX).err().unwrap();
    assert_eq!(full.kind(), Kind::NoSpace);
    assert!(full.to_string().contains(&u64::MAX.to_string()), "{full}");
    import(&node, None, "debian", IMAGE).unwrap();
    let error = create(&node, "vm1", "debian", "p").unwrap_err();
    assert_eq!(error.kind(), Kind::Invalid);
    assert!(error.to_string().contains("pool"), "{error}");
    create(&node, "vm1", "debian", "a").unwrap();
    let options = DiskOptions { placement: Some(Placement::Pool), ..DiskOptions::default() };
    let error = node.add_disk(&bench.path("a"), options).unwrap_err();
    assert_eq!(error.kind(), Kind::InUse);
}

#[test]
fn sizes_are_checked() {
    let (_bench, node) = Bench::with(&["a"]);
    import(&node, None, "debian", IMAGE).unwrap();
    let sized = |size| {
        let new = NewReplica {
            name: name("vm1"),
            image: name("debian"),
            disk: name("a"),
            size: Some(size),
        };
        node.create_replica(new, blank_map)
    };
    for bad in [0, 4096, 8191, 8193, (64 << 40) + 512, u64::MAX, u64::MAX - 511] {
        assert_eq!(sized(bad).unwrap_err().kind(), Kind::Invalid, "{bad}");
    }
    assert_eq!(sized(1 << 40).unwrap().size, 1 << 40);
    node.set_replica_size(&name("vm1"), 2 << 40).unwrap();
    assert_eq!(node.open_replica(&name("vm1")).unwrap().size, 2 << 40);
}

#[test]
fn names_belong_to_one() {
    let (_bench, node) = Bench::with(&["a", "b"]);
    import(&node, None, "debian", IMAGE).unwrap();
    let vm1 = create(&node, "vm1", "debian", "a").unwrap();
    assert_eq!(create(&node, "vm1", "debian", "b").unwrap_err().kind(), Kind::Exists);
    assert_eq!(create(&node, "vm2", "absent", "b").unwrap_err().kind(), Kind::NotFound);
    assert_eq!(create(&node, "vm2", "debian", "z").unwrap_err().kind(), Kind::NotFound);
    let by_id = name(&vm1.id.to_string());
    assert_eq!(node.replica(&by_id).unwrap().name, name("vm1"));
    assert_eq!(create(&node, by_id.as_str(), "debian", "b").unwrap_err().kind(), Kind::Invalid);
    // By its digest an image may be used, and removed whatever its names.
    let by_digest = digest(IMAGE).to_string();
    create(&node, "vm2", &by_digest, "b").unwrap();
    assert_eq!(node.remove_image(&name(&by_digest)).unwrap_err().kind(), Kind::InUse);
    node.remove_replica(&by_id).unwrap();
    node.remove_replica(&name("vm2")).unwrap();
    assert_eq!(node.remove_image(&name(&by_digest)).unwrap(), Unnamed::Removed);
    assert_eq!(node.remove_replica(&name("vm2")).unwrap_err().kind(), Kind::NotFound);
}

#[test]
fn adding_a_disk_is_idempotent_and_exact() {
    let (bench, node) = Bench::with(&["a"]);
    let first = node.disk(&name("a")).unwrap();
    let again = bench.add(&node, "a").unwrap();
    assert_eq!((first.id, node.disks().len()), (again.id, 1));
    let options = |disk: &str| DiskOptions { name: Some(name(disk)), ..DiskOptions::default() };
    let other = node.add_disk(&bench.path("a"), options("z")).unwrap_err();
    assert_eq!(other.kind(), Kind::Exists, "{other}");
    fs::create_dir_all(bench.path("b/inner")).unwrap();
    assert_eq!(node.add_disk(&bench.path("b"), options("a")).unwrap_err().kind(), Kind::Exists);
    node.add_disk(&bench.path("b"), options("z")).unwrap();
    let nested = node.add_disk(&bench.path("b/inner"), options("n")).unwrap_err();
    assert_eq!(nested.kind(), Kind::Invalid);
    assert!(nested.to_string().contains("nested with disk z"), "{nested}");
    let around = node.add_disk(bench.temp.path(), options("n")).unwrap_err();
    assert_eq!(around.kind(), Kind::Invalid);
    fs::write(bench.path("file"), "").unwrap();
    assert_eq!(node.add_disk(&bench.path("file"), options("f")).unwrap_err().kind(), Kind::Invalid);
    let absent = node.add_disk(&bench.path("absent"), options("f")).unwrap_err();
    assert_eq!(absent.kind(), Kind::NotFound);
    // A tier that was set stays set; a directory that holds something else is left alone.
    let tier = DiskOptions { tier: Some(Tier::Hdd), ..DiskOptions::default() };
    assert_eq!(node.add_disk(&bench.path("a"), tier).unwrap().tier, Some(Tier::Hdd));
    fs::create_dir_all(bench.path("c/underlay/photos")).unwrap();
    assert!(bench.add(&node, "c").is_err());
    assert_eq!(tree(&bench.path("c")), ["underlay", "underlay/lock", "underlay/photos"]);
    drop(node);
    let disks = bench.open().disks();
    assert_eq!(disks.len(), 2);
    assert_eq!(disks[0].tier, Some(Tier::Hdd));
    assert_eq!(disks[0].fails_with, [name("z")], "two directories of one file system");
}

#[test]
fn a_disk_in_use_is_not_forgotten() {
    let (bench, node) = Bench::with(&["a", "b", "c"]);
    import(&node, Some("a"), "debian", IMAGE).unwrap();
    create(&node, "vm1", "debian", "b").unwrap();
    let base = node.remove_disk(&name("a")).unwrap_err();
    assert_eq!(base.kind(), Kind::InUse);
    assert!(base.to_string().contains("vm1") && base.to_string().contains("debian"), "{base}");
    let home = node.remove_disk(&name("b")).unwrap_err();
    assert!(home.to_string().contains("replica vm1 on it"), "{home}");
    assert_eq!(node.remove_disk(&name("c")).unwrap(), Forgotten::Erased);
    assert_eq!(tree(&bench.path("c")), [""; 0]);
    node.remove_replica(&name("vm1")).unwrap();
    assert_eq!(node.remove_disk(&name("a")).unwrap(), Forgotten::Kept);
    assert!(node.images().is_empty());
    assert_eq!(bench.add(&node, "a").unwrap().images, 1, "and it comes back with what it holds");
}

#[test]
fn what_a_missing_disk_holds_is_held_for_it() {
    let (bench, node) = Bench::with(&["a", "b", "c"]);
    import(&node, Some("a"), "debian", IMAGE).unwrap();
    create(&node, "vm1", "debian", "b").unwrap();
    create(&node, "vm2", "debian", "c").unwrap();
    drop(node);
    fs::rename(bench.path("b"), bench.path("elsewhere")).unwrap();
    fs::create_dir(bench.path("b")).unwrap();
    let node = bench.open();
    let b = node.disk(&name("b")).unwrap();
    assert_eq!((b.state, b.replicas), (DiskState::Missing, 1));
    assert_eq!(tree(&bench.path("b")), [""; 0], "an empty mount point stays empty");
    assert_eq!(node.replica(&name("vm1")).unwrap().state, ReplicaState::DiskMissing);
    assert_eq!(node.replica(&name("vm2")).unwrap().state, ReplicaState::Ready);
    assert_eq!(node.open_replica(&name("vm1")).unwrap_err().kind(), Kind::NotFound);
    assert_eq!(create(&node, "vm1", "debian", "c").unwrap_err().kind(), Kind::Exists);
    assert_eq!(create(&node, "vm9", "debian", "b").unwrap_err().kind(), Kind::Unavailable);
    assert!(bench.add(&node, "b").is_err(), "a missing disk is not made anew");
    assert!(node.remove_disk(&name("b")).unwrap_err().to_string().contains("vm1"));
    node.remove_replica(&name("vm2")).unwrap();
    let report = node.fsck(crate::catalog::Repair::Mend).unwrap();
    assert_eq!((report.problems.len(), report.missing), (0, vec![name("b")]));
    let held = node.remove_image(&name("debian")).unwrap_err();
    assert!(held.to_string().contains("vm1 on disk b, which isn't there"), "{held}");
    assert_eq!(node.image(&name("debian")).unwrap().users[0].state, UserState::Away);
    // It comes back at another place.
    let back = node.add_disk(&bench.path("elsewhere"), DiskOptions::default()).unwrap();
    assert_eq!((back.name, back.id, back.state), (name("b"), b.id, DiskState::Present));
    assert_eq!(node.replica(&name("vm1")).unwrap().state, ReplicaState::Ready);
    drop(node);
    assert_eq!(bench.open().disks().len(), 3);
}

#[test]
fn a_replica_of_a_lost_disk_can_be_given_up() {
    let (bench, node) = Bench::with(&["a", "b"]);
    import(&node, Some("a"), "debian", IMAGE).unwrap();
    create(&node, "vm1", "debian", "b").unwrap();
    drop(node);
    fs::rename(bench.path("b"), bench.path("lost")).unwrap();
    let node = bench.open();
    assert_eq!(node.remove_replica(&name("vm1")).unwrap(), Removed::OnReturn);
    assert_eq!(node.remove_disk(&name("b")).unwrap(), Forgotten::Kept);
    assert_eq!(node.remove_image(&name("debian")).unwrap(), Unnamed::Removed);
    // Found again after all: nothing of it was lost, and it says what it lacks.
    node.add_disk(&bench.path("lost"), DiskOptions::default()).unwrap();
    let vm1 = node.replica(&name("vm1")).unwrap();
    assert_eq!(vm1.state, ReplicaState::BaseMissing);
    assert!(vm1.reason.unwrap().contains("debian"));
    import(&node, Some("a"), "debian", IMAGE).unwrap();
    assert_eq!(node.replica(&name("vm1")).unwrap().state, ReplicaState::Ready);
    let users = node.image(&name("debian")).unwrap().users;
    assert_eq!(users.len(), 1, "a replica without a reference holds its image all the same");
}

#[test]
fn a_disk_that_has_returned_is_taken_in() {
    let (bench, node) = Bench::with(&["a", "b"]);
    import(&node, Some("b"), "debian", IMAGE).unwrap();
    create(&node, "vm1", "debian", "b").unwrap();
    drop(node);
    fs::rename(bench.path("b"), bench.path("gone")).unwrap();
    let node = bench.open();
    let take_back = |node: &Node| node.awaited().into_iter().for_each(|id| node.take_back(id));
    take_back(&node);
    let state = |node: &Node| node.disk(&name("b")).unwrap().state;
    assert_eq!(state(&node), DiskState::Missing);
    // Another is mounted there.
    let (other, elsewhere) = Bench::with(&["b"]);
    drop(elsewhere);
    fs::rename(other.path("b"), bench.path("b")).unwrap();
    take_back(&node);
    assert_ne!(state(&node), DiskState::Present);
    fs::rename(bench.path("b"), bench.path("other")).unwrap();
    // Its record can't be read, then it can.
    fs::rename(bench.path("gone"), bench.path("b")).unwrap();
    let record = bench.home("b").join("disk.json");
    let text = fs::read(&record).unwrap();
    fs::write(&record, "{").unwrap();
    take_back(&node);
    assert_ne!(state(&node), DiskState::Present);
    fs::write(&record, text).unwrap();
    thread::scope(|scope| {
        // Whoever says so by hand meanwhile is not in the way.
        scope.spawn(|| take_back(&node));
        node.add_disk(&bench.path("b"), DiskOptions::default()).unwrap();
    });
    assert_eq!(state(&node), DiskState::Present);
    assert_eq!(node.replica(&name("vm1")).unwrap().state, ReplicaState::Ready);
    assert!(node.open_copy(&name("debian")).is_ok());
}

#[test]
fn a_disk_that_another_daemon_had_is_not_taken_when_that_ends() {
    let (bench, node) = Bench::with(&["a"]);
    let other = Bench::new();
    drop(node);
    fs::create_dir_all(other.state()).unwrap();
    fs::copy(bench.state().join("disks.json"), other.state().join("disks.json")).unwrap();
    let node = bench.open();
    let second = other.open();
    assert_eq!(second.disk(&name("a")).unwrap().state, DiskState::Locked);
    assert!(second.awaited().is_empty());
    drop(node);
    assert_eq!(second.disk(&name("a")).unwrap().state, DiskState::Locked);
    second.add_disk(&bench.path("a"), DiskOptions::default()).unwrap();
    assert_eq!(second.disk(&name("a")).unwrap().state, DiskState::Present);
    // Nor one that came back while another daemon had it.
    drop(second);
    fs::rename(bench.path("a"), bench.path("gone")).unwrap();
    let second = other.open();
    fs::rename(bench.path("gone"), bench.path("a")).unwrap();
    let node = bench.open();
    second.awaited().into_iter().for_each(|id| second.take_back(id));
    assert_eq!(second.disk(&name("a")).unwrap().state, DiskState::Locked);
    drop(node);
    assert!(second.awaited().is_empty());
}

#[test]
fn a_lost_base_is_told_with_its_disk() {
    let (bench, node) = Bench::with(&["a", "b"]);
    import(&node, Some("a"), "debian", IMAGE).unwrap();
    create(&node, "vm1", "debian", "b").unwrap();
    drop(node);
    fs::rename(bench.path("a"), bench.path("lost")).unwrap();
    let node = bench.open();
    let vm1 = node.replica(&name("vm1")).unwrap();
    assert_eq!(vm1.state, ReplicaState::BaseMissing);
    assert!(vm1.reason.unwrap().contains("on disk a"));
    let error = node.open_copy(&name("debian")).unwrap_err();
    assert!(error.to_string().contains("disk that isn't there (a)"), "{error}");
    let problems = node.fsck(crate::catalog::Repair::Mend).unwrap().problems;
    assert_eq!(problems.len(), 1);
    assert!(!problems[0].mendable && problems[0].object == "replica vm1");
}

#[test]
fn one_daemon_per_disk_and_state() {
    let (bench, node) = Bench::with(&["a"]);
    let again = Node::open(&bench.state()).err().unwrap();
    assert_eq!(again.kind(), Kind::Locked);
    assert!(again.to_string().contains("used by this underlay already"), "{again}");
    let other = Node::open(&bench.temp.path().join("state2")).unwrap();
    let error = bench.add(&other, "a").unwrap_err();
    assert_eq!(error.kind(), Kind::Locked);
    bench.add(&other, "b").unwrap();
    drop(node);
    bench.add(&other, "a").unwrap();
    let node = bench.open();
    let a = node.disk(&name("a")).unwrap();
    assert_eq!(a.state, DiskState::Locked);
    // Who holds it is told by the lock file: here it is this process, under another name.
    assert!(a.reason.unwrap().contains("used by this underlay already"));
    fs::write(bench.home("a").join("lock"), "4711\n").unwrap();
    let error = bench.add(&node, "a").unwrap_err();
    assert!(error.to_string().contains("used by another underlay (process 4711)"), "{error}");
    assert_eq!(bench.add(&node, "a").unwrap_err().kind(), Kind::Locked);
    drop(other);
    assert_eq!(bench.add(&node, "a").unwrap().state, DiskState::Present);
}

#[test]
fn disks_brought_together_keep_what_they_hold() {
    let (bench, node) = Bench::with(&["a"]);
    import(&node, None, "debian", IMAGE).unwrap();
    let old = create(&node, "vm1", "debian", "a").unwrap();
    let other = Node::open(&bench.temp.path().join("state2")).unwrap();
    bench.add(&other, "b").unwrap();
    import(&other, None, "debian", b"another debian..").unwrap();
    import(&other, None, "same", IMAGE).unwrap();
    let new =
        NewReplica { name: name("vm1"), image: name("same"), disk: name("b"), size: Some(16384) };
    let new = other.create_replica(new, blank_map).unwrap();
    drop(other);
    bench.add(&node, "b").unwrap();
    assert_eq!(node.replicas().len(), 2);
    // Both were made in the same second, perhaps: then the ids decide.
    let (holder, hidden) =
        if node.replica(&name("vm1")).unwrap().id == old.id { (&old, &new) } else { (&new, &old) };
    let told = node.replica(&name(&hidden.id.to_string())).unwrap();
    assert!(told.reason.unwrap().contains("reached by its id"));
    let image = node.image(&name(&digest(IMAGE).to_string())).unwrap();
    assert_eq!((image.copies.len(), image.users.len()), (2, 2));
    let problems = node.fsck(crate::catalog::Repair::Mend).unwrap().problems;
    assert_eq!(problems.len(), 2, "{problems:?}");
    node.remove_replica(&name(&holder.id.to_string())).unwrap();
    assert_eq!(node.replica(&name("vm1")).unwrap().id, hidden.id, "the name has an heir");
    node.remove_replica(&name("vm1")).unwrap();
    node.remove_image(&name("same")).unwrap();
    assert_eq!(node.fsck(crate::catalog::Repair::Report).unwrap().problems.len(), 1);
}

#[test]
fn figures_add_up() {
    let (_bench, node) = Bench::with(&["a", "b", "c"]);
    let content = vec![1; 1 << 20];
    import(&node, Some("a"), "debian", &content).unwrap();
    let status = node.status();
    assert_eq!((status.copies, status.saved_bytes), (1, 0));
    assert_eq!(status.per_disk_bytes, status.image_bytes);
    for (replica, disk) in [("vm1", "a"), ("vm2", "b"), ("vm3", "c"), ("vm4", "c")] {
        create(&node, replica, "debian", disk).unwrap();
    }
    let status = node.status();
    assert_eq!((status.disks, status.images, status.replicas), (3, 1, 4));
    assert!(status.image_bytes >= 1 << 20);
    assert_eq!(status.per_disk_bytes, 3 * status.image_bytes);
    assert_eq!(status.saved_bytes, 2 * status.image_bytes);
    let on_disks: u64 = node.disks().iter().map(|disk| disk.stored_bytes).sum();
    assert_eq!(status.stored_bytes, on_disks);
}

#[test]
fn many_at_once_agree_with_the_disk() {
    let (bench, node) = Bench::with(&["a", "b", "c"]);
    import(&node, Some("a"), "debian", IMAGE).unwrap();
    let made: BTreeSet<String> = thread::scope(|scope| {
        let jobs: Vec<_> = (0..6)
            .map(|job| {
                let node = node.clone();
                scope.spawn(move || {
                    let mut made = BTreeSet::new();
                    for i in 0..8 {
                        let disk = ["a", "b", "c"][(job + i) % 3];
                        // Some names are fought for: one of them wins.
                        let vm = format!("vm{}", job / 2 * 8 + i);
                        match create(&node, &vm, "debian", disk) {
                            Ok(_) => drop(made.insert(vm.clone())),
                            Err(error) => assert_eq!(error.kind(), Kind::Exists, "{error}"),
                        }
                        let content = format!("image {}", i % 2);
                        import(&node, None, &format!("i{}", i % 2), content.as_bytes()).unwrap();
                        if i % 4 == 3 {
                            node.fsck(crate::catalog::Repair::Mend).unwrap();
                            match node.remove_replica(&name(&vm)) {
                                Ok(_) => drop(made.remove(&vm)),
                                Err(error) => assert_eq!(error.kind(), Kind::NotFound, "{error}"),
                            }
                            let error = node.remove_image(&name("debian")).unwrap_err();
                            assert_eq!(error.kind(), Kind::InUse);
                        }
                    }
                    made
                })
            })
            .collect();
        jobs.into_iter().flat_map(|job| job.join().unwrap()).collect()
    });
    let names = |node: &Node| -> BTreeSet<String> {
        node.replicas().iter().map(|replica| replica.name.to_string()).collect()
    };
    let seen = names(&node);
    assert!(seen.is_subset(&made) && seen.len() >= 24 - 12, "{seen:?} {made:?}");
    assert_eq!(node.images().len(), 3);
    drop(node);
    let node = bench.open();
    assert_eq!(names(&node), seen);
    assert!(node.fsck(crate::catalog::Repair::Report).unwrap().problems.is_empty());
}

#[test]
fn an_image_has_as_many_copies_as_it_is_given() {
    let (bench, node) = Bench::with(&["a", "b", "c"]);
    import(&node, Some("a"), "debian", scenario::IMAGE).unwrap();
    import(&node, Some("a"), "twelve", scenario::IMAGE).unwrap();
    create(&node, "vm1", "debian", "b").unwrap();
    let refs = |disk: &str| {
        let copy = bench.home(disk).join("images").join(digest(scenario::IMAGE).to_string());
        fs::read_dir(copy.join("refs")).map_or(0, Iterator::count)
    };
    // Disks of one device fail together.
    let (of, to) = (digest(scenario::IMAGE), name("b"));
    let refused = node.stage_another(of, Some(&to), false).err().unwrap();
    assert_eq!(refused.kind(), Kind::Invalid);
    assert!(refused.to_string().contains("together with disk a"), "{refused}");
    let nowhere = node.stage_another(of, None, false).err().unwrap();
    assert_eq!(nowhere.kind(), Kind::Unavailable);
    let status = scenario::copy_to(&node, "b").unwrap();
    assert_eq!(status.copies.len(), 2);
    assert_eq!(scenario::copy_to(&node, "b").unwrap_err().kind(), Kind::Exists);
    create(&node, "vm2", "twelve", "c").unwrap();
    assert_eq!((refs("a"), refs("b")), (2, 2));
    // Names and the wanted number are those of all copies.
    node.want_copies(&name("debian"), 2).unwrap();
    let short = node.remove_copy_on(&name("debian"), &name("a"), false).unwrap_err();
    assert!(short.to_string().contains("2 copies are wanted"), "{short}");
    node.remove_copy_on(&name("debian"), &name("a"), true).unwrap();
    let last = node.remove_copy_on(&name("debian"), &name("b"), true).unwrap_err();
    assert_eq!(last.kind(), Kind::InUse);
    assert!(last.to_string().contains("underlay image copy debian --to DISK"), "{last}");
    drop(node);
    let node = bench.open();
    let image = node.image(&name("twelve")).unwrap();
    assert_eq!((image.copies.len(), image.wanted_copies, image.users.len()), (1, Some(1), 2));
    assert!(node.remove_image(&name("debian")).is_ok() && node.image(&name("twelve")).is_ok());
}

#[test]
fn a_copy_that_was_away_learns_what_happened() {
    let (bench, node) = Bench::with(&["a", "b", "c"]);
    import(&node, Some("a"), "debian", scenario::IMAGE).unwrap();
    create(&node, "old", "debian", "c").unwrap();
    scenario::copy_to(&node, "b").unwrap();
    drop(node);
    fs::rename(bench.path("b"), bench.path("gone")).unwrap();
    let node = bench.open();
    create(&node, "new", "debian", "c").unwrap();
    node.remove_replica(&name("old")).unwrap();
    node.want_copies(&name("debian"), 3).unwrap();
    drop(node);
    fs::rename(bench.path("gone"), bench.path("b")).unwrap();
    let node = bench.open();
    let of = digest(scenario::IMAGE);
    assert!(node.align_copies(of).unwrap() && !node.align_copies(of).unwrap());
    drop(node);
    // What it learnt it knows by itself.
    fs::rename(bench.path("a"), bench.path("gone")).unwrap();
    let node = bench.open();
    let image = node.image(&name("debian")).unwrap();
    let users: Vec<_> = image.users.iter().map(|user| user.name.to_string()).collect();
    assert_eq!((users, image.wanted_copies), (vec!["new".to_owned()], Some(3)));
}
