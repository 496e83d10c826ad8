//! What the tests of crashes do to a node, and what must hold afterwards.

use std::{collections::BTreeMap, collections::BTreeSet, fs, os::unix::fs::PermissionsExt};

use nix::fcntl::OFlag;

use super::*;
use crate::{
    catalog::{CopyState, DiskState, Repair, ReplicaState, ReplicaStatus, UserState},
    error::Kind,
};

pub(super) const IMAGE: &[u8] = &[7; 8192];
pub(super) const SPARE: &[u8] = &[9; 4096];

/// An operation, the state that it starts from, and what it is called in a failure.
pub(super) struct Scenario {
    pub label: &'static str,
    /// Changes the common start, with no node open.
    pub prepare: fn(&Bench),
    pub run: fn(&Bench, &Node) -> Result<()>,
}

/// The start of all scenarios: three disks; image `debian` on a with replicas on a and b; image
/// `spare`, also called `extra`, on b.
pub(super) fn start() -> Bench {
    let bench = Bench::in_memory();
    let node = bench.open_with(&["a", "b", "c"]);
    import(&node, Some("a"), "debian", IMAGE).unwrap();
    import(&node, Some("b"), "spare", SPARE).unwrap();
    import(&node, Some("b"), "extra", SPARE).unwrap();
    create(&node, "vm1", "debian", "a").unwrap();
    create(&node, "vm2", "debian", "b").unwrap();
    fs::create_dir(bench.path("new")).unwrap();
    bench
}

pub(super) fn all() -> Vec<Scenario> {
    let same: fn(&Bench) = |_| {};
    vec![
        Scenario {
            label: "create a replica on another disk",
            prepare: same,
            run: |_, node| create(node, "vm3", "debian", "b").map(drop),
        },
        Scenario {
            label: "create a replica on the copy's disk",
            prepare: same,
            run: |_, node| create(node, "vm3", "debian", "a").map(drop),
        },
        Scenario {
            label: "remove a replica",
            prepare: same,
            run: |_, node| node.remove_replica(&name("vm2")).map(drop),
        },
        Scenario {
            label: "publish an image",
            prepare: same,
            run: |_, node| import(node, Some("c"), "fresh", b"fresh content").map(drop),
        },
        Scenario {
            label: "publish what is there",
            prepare: same,
            run: |_, node| import(node, Some("c"), "again", IMAGE).map(drop),
        },
        Scenario {
            label: "publish in the place of a damaged copy",
            prepare: |bench| {
                let data = bench.home("a").join("images").join(digest(IMAGE).to_string());
                fs::remove_file(data.join("data")).unwrap();
            },
            run: |_, node| import(node, Some("a"), "debian", IMAGE).map(drop),
        },
        Scenario {
            label: "publish beside a damaged copy",
            prepare: |bench| {
                let data = bench.home("a").join("images").join(digest(IMAGE).to_string());
                fs::remove_file(data.join("chunks")).unwrap();
            },
            run: |_, node| import(node, Some("c"), "debian", IMAGE).map(drop),
        },
        Scenario {
            label: "remove one of an image's names",
            prepare: same,
            run: |_, node| node.remove_image(&name("extra")).map(drop),
        },
        Scenario {
            label: "remove an image",
            prepare: same,
            run: |_, node| node.remove_image(&name(&digest(SPARE).to_string())).map(drop),
        },
        Scenario {
            label: "make another copy",
            prepare: same,
            run: |_, node| copy_to(node, "c").map(drop),
        },
        Scenario {
            label: "begin a copy and be interrupted",
            prepare: same,
            run: |_, node| interrupted_copy(node, "c"),
        },
        Scenario {
            label: "go on with a copy",
            prepare: |bench| interrupted_copy(&bench.open(), "c").unwrap(),
            run: |_, node| copy_to(node, "c").map(drop),
        },
        Scenario {
            label: "create a replica of an image with two copies",
            prepare: two_copies,
            run: |_, node| create(node, "vm3", "debian", "b").map(drop),
        },
        Scenario {
            label: "remove a replica of an image with two copies",
            prepare: two_copies,
            run: |_, node| node.remove_replica(&name("vm2")).map(drop),
        },
        Scenario {
            label: "give up a copy",
            prepare: two_copies,
            run: |_, node| node.remove_copy_on(&name("debian"), &name("a"), true),
        },
        Scenario {
            label: "want two copies",
            prepare: two_copies,
            run: |_, node| node.want_copies(&name("debian"), 2).map(drop),
        },
        Scenario {
            label: "bring copies in line",
            prepare: |bench| {
                two_copies(bench);
                let refs = bench.home("c").join("images").join(digest(IMAGE).to_string());
                fs::remove_dir_all(refs.join("refs")).unwrap();
                fs::create_dir(refs.join("refs")).unwrap();
                fs::set_permissions(refs.join("refs"), fs::Permissions::from_mode(0o700)).unwrap();
            },
            run: |_, node| node.align_copies(digest(IMAGE)).map(drop),
        },
        Scenario {
            label: "remove an image while a disk is away",
            prepare: |bench| {
                another_spare(&bench.open());
                take_away(bench);
            },
            run: |_, node| node.remove_image(&name(&digest(SPARE).to_string())).map(drop),
        },
        Scenario {
            label: "remove a name while a disk is away",
            prepare: |bench| {
                another_spare(&bench.open());
                take_away(bench);
            },
            run: |_, node| node.remove_image(&name("extra")).map(drop),
        },
        Scenario {
            label: "remove a replica whose disk is away",
            prepare: |bench| {
                create(&bench.open(), "vm3", "debian", "c").unwrap();
                take_away(bench);
            },
            run: |_, node| node.remove_replica(&name("vm3")).map(drop),
        },
        Scenario {
            label: "remove a replica that has moved from a disk that is away",
            prepare: |bench| {
                moved_from_c(&bench.open());
                take_away(bench);
            },
            run: |_, node| node.remove_replica(&name("vm3")).map(drop),
        },
        Scenario {
            label: "grow a replica's record",
            prepare: same,
            run: |_, node| node.set_replica_size(&name("vm1"), 1 << 30),
        },
        Scenario {
            label: "move a replica",
            prepare: same,
            run: |_, node| migrate(node, "vm1", "c"),
        },
        Scenario {
            label: "move a replica to the copy's disk",
            prepare: same,
            run: |_, node| migrate(node, "vm2", "a"),
        },
        Scenario {
            label: "free a replica of its image",
            prepare: same,
            run: |_, node| node.flatten_replica(&name("vm2")).map(drop),
        },
        Scenario {
            label: "drain a disk",
            prepare: same,
            run: |_, node| node.set_draining(&name("c"), true).map(drop),
        },
        Scenario {
            label: "add a disk",
            prepare: same,
            run: |bench, node| bench.add(node, "new").map(drop),
        },
        Scenario {
            label: "forget an empty disk",
            prepare: same,
            run: |_, node| node.remove_disk(&name("c")).map(drop),
        },
        Scenario {
            label: "mend",
            prepare: |bench| {
                let refs = bench.home("a").join("images").join(digest(IMAGE).to_string());
                let refs = refs.join("refs");
                let one = fs::read_dir(&refs).unwrap().next().unwrap().unwrap().path();
                let leaked = refs.join(format!("{}.json", Uuid::from_u128(1)));
                let text = fs::read_to_string(&one).unwrap();
                let id = one.file_stem().unwrap().to_str().unwrap().to_owned();
                fs::write(leaked, text.replace(&id, &Uuid::from_u128(1).to_string())).unwrap();
                fs::remove_file(one).unwrap();
                fs::create_dir(bench.home("a").join("replicas/.deleting-x")).unwrap();
                fs::write(bench.home("a").join("replicas/.deleting-x/data"), "x").unwrap();
            },
            run: |_, node| node.fsck(Repair::Mend).map(drop),
        },
    ]
}

/// Makes one more copy of image `debian`.
pub(super) fn copy_to(node: &Node, disk: &str) -> Result<ImageStatus> {
    // All disks of these tests are on one device.
    let staged = node.stage_another(digest(IMAGE), Some(&name(disk)), true)?;
    fs::write(staged.data_path(), IMAGE).unwrap();
    fs::write(staged.chunks_path(), b"chunk table").unwrap();
    node.publish_another(staged, digest(IMAGE))
}

/// Makes half of one more copy of image `debian`.
pub(super) fn interrupted_copy(node: &Node, disk: &str) -> Result<()> {
    let mut staged = node.stage_another(digest(IMAGE), Some(&name(disk)), true)?;
    let half = IMAGE.len() / 2;
    fs::write(staged.data_path(), &IMAGE[..half]).unwrap();
    staged.note(digest(IMAGE), half as u64)
}

fn two_copies(bench: &Bench) {
    copy_to(&bench.open(), "c").unwrap();
}

/// Makes one more copy of image `spare`, on disk c.
pub(super) fn another_spare(node: &Node) {
    let staged = node.stage_another(digest(SPARE), Some(&name("c")), true).unwrap();
    fs::write(staged.data_path(), SPARE).unwrap();
    fs::write(staged.chunks_path(), b"chunk table").unwrap();
    node.publish_another(staged, digest(SPARE)).unwrap();
}

/// A replica that has moved from disk c to b, and whose former directory is there still.
pub(super) fn moved_from_c(node: &Node) {
    create(node, "vm3", "debian", "c").unwrap();
    let mut staged = node.stage_move(&name("vm3"), &name("b"), 8192, blank_map).unwrap();
    staged.prepare().unwrap();
    drop(staged.publish().unwrap());
}

/// Takes disk c away, while no node is open.
pub(super) fn take_away(bench: &Bench) {
    fs::rename(bench.path("c"), bench.path("gone")).unwrap();
}

/// Brings disk c back, while no node is open.
pub(super) fn bring_back(bench: &Bench) {
    fs::rename(bench.path("gone"), bench.path("c")).unwrap();
}

/// What a user sees: replicas with their size, images with their names and state, disks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Seen {
    /// Their size, their disk, and whether they stand on an image.
    replicas: BTreeMap<String, (u64, String, bool)>,
    images: BTreeMap<String, (Digest, bool)>,
    disks: BTreeSet<(String, bool)>,
}

pub(super) fn seen(node: &Node) -> Seen {
    let images = node.images();
    let named = images.iter().flat_map(|image| {
        let ready = node.open_copy(&image.names[0]).is_ok();
        image.names.iter().map(move |name| (name.to_string(), (image.digest, ready)))
    });
    Seen {
        replicas: node
            .replicas()
            .iter()
            .map(|r| (r.name.to_string(), (r.size, r.disk.to_string(), r.digest.is_some())))
            .collect(),
        images: named.collect(),
        disks: node.disks().iter().map(|disk| (disk.name.to_string(), disk.draining)).collect(),
    }
}

/// Moves a replica whose overlay is empty.
pub(super) fn migrate(node: &Node, replica: &str, to: &str) -> Result<()> {
    let mut staged = node.stage_move(&name(replica), &name(to), 8192, blank_map)?;
    staged.prepare()?;
    staged.publish()?.remove()
}

/// What a scenario leads from and to, when nothing gets in its way.
pub(super) fn ends(bench: &Bench, scenario: &Scenario) -> (Seen, Seen) {
    let node = bench.open();
    let before = seen(&node);
    (scenario.run)(bench, &node).unwrap();
    drop(node);
    let node = bench.open();
    (before, seen(&node))
}

/// What must hold after a crash: nothing half-made is visible, no reference was lost, the state is
/// that before the operation or after it, and `fsck` mends what was left.
pub(super) fn check_after_crash(bench: &Bench, scenario: &Scenario, ends: &(Seen, Seen)) -> Seen {
    let label = scenario.label;
    let node = bench.open();
    let away = scenario.label.contains("away");
    for disk in node.disks().iter().filter(|disk| !away || disk.name != name("c")) {
        assert_eq!(disk.state, DiskState::Present, "{label}: {:?}", disk.reason);
    }
    let now = seen(&node);
    assert!(now == ends.0 || now == ends.1, "{label}: in between: {now:?}, ends {ends:?}");
    let there = |replica: &ReplicaStatus| replica.state != ReplicaState::DiskMissing;
    for replica in node.replicas().into_iter().filter(there) {
        let opened = node.open_replica(&replica.name).unwrap();
        let data = opened.open_data(OFlag::empty()).unwrap();
        assert!(data.metadata().unwrap().len() == 8192, "{label}: {} is whole", replica.name);
        let map = fs::read(opened.path().join("map")).unwrap();
        assert_eq!(map, blank_map(opened.id, 8192), "{label}: {}", replica.name);
    }
    let report = node.fsck(Repair::Report).unwrap();
    let lost = report.problems.iter().find(|problem| problem.what.contains("has no reference"));
    assert!(lost.is_none() || label == "mend", "{label}: {lost:?}");
    for image in node.images() {
        // A crash may leave a copy without a reference that another has: the next look puts it there.
        node.align_copies(image.digest).unwrap();
        let users = image.users.iter().filter(|user| user.state != UserState::Leaked).count();
        for copy in image.copies.iter().filter(|copy| copy.state == CopyState::Ready) {
            let refs = fs::read_dir(copy.path.join("refs")).unwrap().count();
            assert!(refs >= users || label == "mend", "{label}: {copy:?}");
        }
    }
    let mended = node.fsck(Repair::Mend).unwrap();
    let left = mended.problems.iter().find(|problem| !problem.mended);
    // A damaged copy that the scenario is about stays until it is replaced.
    assert!(left.is_none() || label.contains("damaged"), "{label}: {left:?}");
    let after = node.fsck(Repair::Report).unwrap();
    assert!(after.problems.is_empty() || label.contains("damaged"), "{label}: {after:?}");
    for file in tree(bench.temp.path()) {
        let unfinished = [".tmp-", ".staging-", ".deleting-"];
        // What is under `state`, and on a disk that was not added in the end, is replaced later.
        let ours = !file.starts_with("state/") && !file.starts_with("new/");
        let kept = file.contains("/images/.staging-") && label.contains("a copy");
        assert!(
            !ours || kept || !unfinished.iter().any(|mark| file.contains(mark)),
            "{label}: {file}"
        );
    }
    assert_eq!(seen(&node), now, "{label}: mending changes nothing that is seen");
    if away && now == ends.0 {
        // It was not removed, and all of it is there again.
        drop(node);
        bring_back(bench);
        let node = bench.open();
        assert_eq!(seen(&node), now, "{label}: the disk is back");
        assert_eq!(node.fsck(Repair::Mend).unwrap().problems, [], "{label}");
        return now;
    }
    // What was begun can be done again, unless it was done.
    match (scenario.run)(bench, &node) {
        Ok(()) => {}
        Err(error) => {
            assert!(matches!(error.kind(), Kind::Exists | Kind::NotFound), "{label}: {error}");
            assert_eq!(now, ends.1, "{label}: {error}");
        }
    }
    assert_eq!(seen(&node), ends.1, "{label}: done again");
    if away {
        drop(node);
        bring_back(bench);
        let node = bench.open();
        assert_eq!(seen(&node), ends.1, "{label}: nothing of it comes back with the disk");
        assert_eq!(node.fsck(Repair::Mend).unwrap().problems, [], "{label}");
    }
    now
}

/// A copy of a bench's directory, to start from again and again.
pub(super) struct Snapshot(tempfile::TempDir);

impl Snapshot {
    pub(super) fn of(bench: &Bench) -> Snapshot {
        let snapshot = Snapshot(tempfile::tempdir().unwrap());
        copy(bench.temp.path(), snapshot.0.path());
        snapshot
    }

    pub(super) fn restore(&self, bench: &Bench) {
        clear(bench.temp.path());
        copy(self.0.path(), bench.temp.path());
    }
}

pub(super) fn clear(path: &Path) {
    for entry in fs::read_dir(path).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() { fs::remove_dir_all(path) } else { fs::remove_file(path) }.unwrap();
    }
}

fn copy(from: &Path, to: &Path) {
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let (path, there) = (entry.path(), to.join(entry.file_name()));
        if path.is_dir() {
            fs::create_dir(&there).unwrap();
            fs::set_permissions(&there, fs::metadata(&path).unwrap().permissions()).unwrap();
            copy(&path, &there);
        } else {
            fs::copy(&path, &there).unwrap();
        }
    }
}
