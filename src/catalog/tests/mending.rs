//! Invariants checked: `fsck` tells what is wrong, changes nothing unless asked to, mends what can
//! be mended without a loss, and leaves the rest, and whatever is under way, alone.

use std::{
    os::unix::fs::PermissionsExt,
    sync::atomic::{AtomicBool, Ordering},
    thread,
};

use super::{
    scenario::{IMAGE, Snapshot, start},
    *,
};
use crate::{
    catalog::{Problem, Repair, ReplicaState, UserState},
    error::Kind,
};

/// The directory of image `debian` at the common start.
fn debian(bench: &Bench) -> PathBuf {
    bench.home("a").join("images").join(digest(IMAGE).to_string())
}

/// The id of a replica, with no node left open.
fn id_of(bench: &Bench, replica: &str) -> Uuid {
    bench.open().replica(&name(replica)).unwrap().id
}

/// What `fsck` tells when it only tells; it must change nothing.
fn told(bench: &Bench) -> Vec<Problem> {
    let node = bench.open();
    let before = tree(bench.temp.path());
    let problems = node.fsck(Repair::Report).unwrap().problems;
    assert_eq!(tree(bench.temp.path()), before);
    problems
}

/// Mends; all that is left must be told by one of `left`.
fn mended(bench: &Bench, left: &[&str]) -> Node {
    let node = bench.open();
    for problem in node.fsck(Repair::Mend).unwrap().problems {
        assert_eq!(problem.mendable, problem.mended, "{problem:?}");
    }
    let after = node.fsck(Repair::Report).unwrap().problems;
    for problem in &after {
        assert!(left.iter().any(|what| problem.what.contains(what)), "{problem:?}");
    }
    assert_eq!(after.len(), left.len(), "{after:?}");
    node
}

#[test]
fn a_leaked_reference_holds_until_it_is_mended() {
    let bench = start();
    let id = id_of(&bench, "vm2");
    create(&bench.open(), "vm3", "debian", "b").unwrap();
    fs::remove_dir_all(bench.home("b").join("replicas").join(id.to_string())).unwrap();
    let node = bench.open();
    node.remove_replica(&name("vm1")).unwrap();
    node.remove_replica(&name("vm3")).unwrap();
    let error = node.remove_image(&name("debian")).unwrap_err();
    assert_eq!(error.kind(), Kind::InUse);
    assert!(error.to_string().contains("fsck --repair"), "{error}");
    assert_eq!(node.image(&name("debian")).unwrap().users[0].state, UserState::Leaked);
    assert!(node.replica(&name("vm2")).is_err(), "its name is free");
    drop(node);
    let problems = told(&bench);
    assert_eq!(problems.len(), 1);
    assert!(problems[0].object.contains("vm2") && problems[0].mendable, "{problems:?}");
    mended(&bench, &[]).remove_image(&name("debian")).unwrap();
}

#[test]
fn a_lost_reference_is_written_again() {
    let bench = start();
    let id = id_of(&bench, "vm2");
    let reference = debian(&bench).join("refs").join(format!("{id}.json"));
    let before = fs::read(&reference).unwrap();
    fs::remove_file(&reference).unwrap();
    let node = bench.open();
    node.remove_replica(&name("vm1")).unwrap();
    assert_eq!(node.remove_image(&name("debian")).unwrap_err().kind(), Kind::InUse);
    drop(node);
    assert!(told(&bench)[0].what.contains("no reference"));
    mended(&bench, &[]);
    assert_eq!(fs::read(&reference).unwrap(), before);
    // Damaged rather than gone; and all of them gone with their directory.
    fs::write(&reference, "{").unwrap();
    assert_eq!(told(&bench).len(), 2);
    mended(&bench, &[]);
    assert_eq!(fs::read(&reference).unwrap(), before);
    fs::remove_dir_all(reference.parent().unwrap()).unwrap();
    mended(&bench, &[]);
    assert_eq!(fs::read(&reference).unwrap(), before);
}

#[test]
fn leftovers_go_and_work_under_way_stays() {
    let bench = start();
    let places = [
        "a/underlay/.tmp-disk.json",
        "a/underlay/images/.staging-1/data",
        "a/underlay/images/.deleting-1/refs/x.json",
        "b/underlay/replicas/.staging-1/map",
        "b/underlay/replicas/.deleting-1/map",
    ];
    let more = [debian(&bench).join(".tmp-image.json"), debian(&bench).join("refs/.tmp-x.json")];
    let places: Vec<PathBuf> =
        places.iter().map(|place| bench.temp.path().join(place)).chain(more).collect();
    let litter = || {
        for place in &places {
            fs::create_dir_all(place.parent().unwrap()).unwrap();
            fs::write(place, "rest").unwrap();
        }
    };
    litter();
    let node = bench.open();
    for place in &places {
        assert!(!place.exists(), "{place:?} goes at the start");
    }
    // While the node is open nobody cleans by itself: what is under way looks the same.
    litter();
    let staged = stage(&node, Some("a"), b"under way").unwrap();
    let problems = node.fsck(Repair::Mend).unwrap().problems;
    assert_eq!(problems.len(), places.len(), "{problems:?}");
    assert!(problems.iter().all(|problem| problem.mended), "{problems:?}");
    for place in &places {
        assert!(!place.exists(), "{place:?}");
    }
    staged.publish(meta("fresh", b"under way")).unwrap();
}

#[test]
fn what_others_may_use_is_closed() {
    let bench = start();
    let paths: Vec<PathBuf> = tree(bench.temp.path())
        .into_iter()
        .filter(|file| file.contains("/underlay/") && !file.ends_with("/cache"))
        .map(|file| bench.temp.path().join(file))
        .filter(|path| path.parent().unwrap().file_name().unwrap() != "refs")
        .collect();
    let before: Vec<_> =
        paths.iter().map(|path| fs::metadata(path).unwrap().permissions()).collect();
    for path in &paths {
        fs::set_permissions(path, fs::Permissions::from_mode(0o777)).unwrap();
    }
    assert_eq!(told(&bench).len(), paths.len());
    mended(&bench, &[]);
    for (path, before) in paths.iter().zip(before) {
        assert_eq!(fs::metadata(path).unwrap().permissions(), before, "{path:?}");
    }
}

#[test]
fn what_cannot_be_mended_is_told_and_left() {
    let bench = start();
    let (images, replicas) = (bench.home("a").join("images"), bench.home("a").join("replicas"));
    let common = Snapshot::of(&bench);
    let vm1 = id_of(&bench, "vm1").to_string();
    // (what is done, what is told of it, how often)
    type Harm<'a> = (Box<dyn Fn() + 'a>, &'a [&'a str]);
    let harms: Vec<Harm> = vec![
        (
            Box::new(|| fs::remove_file(debian(&bench).join("image.json")).unwrap()),
            &["it has no image.json", "was on disk a", "was on disk a"],
        ),
        (
            Box::new(|| fs::rename(debian(&bench), images.join("ab".repeat(32))).unwrap()),
            &["is that of image", "was on disk a", "was on disk a"],
        ),
        (Box::new(|| fs::create_dir(images.join("AB".repeat(32))).unwrap()), &["not underlay's"]),
        (Box::new(|| fs::write(images.join("notes.txt"), "mine").unwrap()), &["not underlay's"]),
        (Box::new(|| fs::write(bench.home("a").join("photo"), "").unwrap()), &["not underlay's"]),
        (Box::new(|| fs::write(debian(&bench).join("data2"), "").unwrap()), &["not underlay's"]),
        (Box::new(|| fs::write(replicas.join(&vm1).join("x"), "").unwrap()), &["not underlay's"]),
        (
            Box::new(|| fs::remove_file(replicas.join(&vm1).join("map")).unwrap()),
            &["its map is not there"],
        ),
        (
            Box::new(|| fs::remove_file(replicas.join(&vm1).join("replica.json")).unwrap()),
            &["No such file"],
        ),
        (
            Box::new(|| fs::remove_file(debian(&bench).join("chunks")).unwrap()),
            &["its chunks is not there"],
        ),
        (
            Box::new(|| {
                let data = debian(&bench).join("data");
                fs::set_permissions(&data, fs::Permissions::from_mode(0o600)).unwrap();
                fs::File::options().write(true).open(&data).unwrap().set_len(100).unwrap();
            }),
            &["its data has 100 bytes instead of 8192"],
        ),
        (
            Box::new(|| {
                let (from, to) = (replicas.join(&vm1), bench.home("b").join("replicas").join(&vm1));
                fs::create_dir(&to).unwrap();
                for file in ["data", "map", "replica.json"] {
                    fs::copy(from.join(file), to.join(file)).unwrap();
                }
            }),
            &["it is on disks a and b"],
        ),
    ];
    for (harm, what) in harms {
        common.restore(&bench);
        harm();
        let before = tree(bench.temp.path());
        mended(&bench, what);
        assert_eq!(tree(bench.temp.path()), before, "{what:?}: nothing was touched");
    }
}

#[test]
fn a_damaged_copy_is_replaced_and_keeps_its_references() {
    let bench = start();
    fs::remove_file(debian(&bench).join("chunks")).unwrap();
    let node = bench.open();
    let vm1 = node.replica(&name("vm1")).unwrap();
    assert_eq!(vm1.state, ReplicaState::BaseMissing);
    assert!(vm1.reason.unwrap().contains("import it again"));
    let error = create(&node, "vm3", "debian", "a").unwrap_err();
    assert_eq!(error.kind(), Kind::Corrupt);
    assert_eq!(node.open_copy(&name("debian")).unwrap_err().kind(), Kind::Corrupt);
    let image = import(&node, Some("a"), "renewed", IMAGE).unwrap();
    assert_eq!(image.names, [name("renewed"), name("debian")]);
    assert_eq!((image.users.len(), image.copies.len()), (2, 1));
    assert_eq!(node.replica(&name("vm2")).unwrap().state, ReplicaState::Ready);
    drop(node);
    assert!(told(&bench).is_empty());
}

#[test]
fn a_damaged_copy_is_helped_out_by_one_on_another_disk() {
    let bench = start();
    fs::remove_file(debian(&bench).join("chunks")).unwrap();
    let node = bench.open();
    let image = import(&node, Some("c"), "debian", IMAGE).unwrap();
    assert_eq!((image.users.len(), image.copies.len()), (2, 2));
    assert_eq!(node.open_copy(&name("debian")).unwrap().disk, name("c"));
    let refs = bench.home("c").join("images").join(digest(IMAGE).to_string()).join("refs");
    assert_eq!(
        fs::read_dir(&refs).unwrap().count(),
        2,
        "the new copy is referred to as the old was"
    );
    assert_eq!(node.replica(&name("vm1")).unwrap().state, ReplicaState::Ready);
    node.remove_replica(&name("vm1")).unwrap();
    node.remove_replica(&name("vm2")).unwrap();
    node.remove_image(&name("debian")).unwrap();
    assert_eq!(tree(&bench.home("c").join("images")), [""; 0]);
    assert_eq!(tree(&bench.home("a").join("images")), [""; 0]);
}

#[test]
fn nothing_of_a_disk_that_isnt_there_is_touched() {
    let bench = start();
    fs::rename(bench.path("b"), bench.path("away")).unwrap();
    let node = bench.open();
    let report = node.fsck(Repair::Mend).unwrap();
    assert_eq!((report.missing, report.problems), (vec![name("b")], vec![]));
    drop(node);
    // Not even known: the copy was brought here from a node that has disk b.
    let other = Node::open(&bench.temp.path().join("state2")).unwrap();
    other.add_disk(&bench.path("a"), DiskOptions::default()).unwrap();
    let problems = other.fsck(Repair::Mend).unwrap().problems;
    assert_eq!(problems.len(), 1);
    assert!(problems[0].what.contains("doesn't know disk b") && !problems[0].mended);
    other.remove_replica(&name("vm1")).unwrap();
    assert_eq!(other.remove_image(&name("debian")).unwrap_err().kind(), Kind::InUse);
    drop(other);
    fs::rename(bench.path("away"), bench.path("b")).unwrap();
    let node = bench.open();
    assert_eq!(node.replica(&name("vm2")).unwrap().state, ReplicaState::Ready);
}

#[test]
fn mending_and_importing_go_on_at_the_same_time() {
    let bench = start();
    let node = bench.open();
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::SeqCst) {
                let problems = node.fsck(Repair::Mend).unwrap().problems;
                assert!(problems.is_empty(), "{problems:?}");
            }
        });
        let imports: Vec<_> = ["a", "b", "c"]
            .map(|disk| {
                let node = &node;
                scope.spawn(move || {
                    for i in 0..100 {
                        let content = format!("{i} on {disk}");
                        import(node, Some(disk), "fresh", content.as_bytes()).ok();
                        drop(stage(node, Some(disk), b"given up").unwrap());
                        import(node, Some(disk), &format!("{disk}{i}"), content.as_bytes())
                            .unwrap();
                    }
                })
            })
            .into_iter()
            .map(|import| import.join())
            .collect();
        done.store(true, Ordering::SeqCst);
        imports.into_iter().for_each(|import| import.unwrap());
    });
    assert_eq!(node.images().len(), 302);
}

/// A copy that serves elsewhere lets a disk go only if it holds the references of those that can't
/// speak for themselves.
#[test]
fn a_disk_goes_when_another_copy_takes_its_place() {
    let bench = start();
    fs::remove_file(debian(&bench).join("chunks")).unwrap();
    let node = bench.open();
    import(&node, Some("c"), "debian", IMAGE).unwrap();
    node.remove_replica(&name("vm1")).unwrap();
    drop(node);
    // vm2's disk is away, and only the damaged copy on a has its reference.
    let refs = bench.home("c").join("images").join(digest(IMAGE).to_string()).join("refs");
    for reference in fs::read_dir(&refs).unwrap() {
        fs::remove_file(reference.unwrap().path()).unwrap();
    }
    fs::rename(bench.path("b"), bench.path("away")).unwrap();
    let node = bench.open();
    let error = node.remove_disk(&name("a")).unwrap_err();
    assert!(error.to_string().contains("vm2 on disk b"), "{error}");
    node.add_disk(&bench.path("away"), DiskOptions::default()).unwrap();
    node.remove_disk(&name("a")).unwrap();
    assert_eq!(node.replica(&name("vm2")).unwrap().state, ReplicaState::Ready);
    assert_eq!(node.fsck(Repair::Mend).unwrap().problems.len(), 1);
    assert_eq!(fs::read_dir(&refs).unwrap().count(), 1, "fsck wrote the reference");
}
