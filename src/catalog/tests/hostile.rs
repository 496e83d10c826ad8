//! Invariants checked: whatever a disk holds, it leads nowhere out of itself, costs bounded memory
//! and time, panics nothing, and keeps neither the node nor the other disks from working.

use std::{os::unix::fs::symlink, time::Instant};

use nix::fcntl::OFlag;

use super::{
    scenario::{IMAGE, Snapshot, start},
    *,
};
use crate::{
    catalog::{CopyState, DiskState, Repair, ReplicaState},
    error::Kind,
};

fn debian(bench: &Bench) -> PathBuf {
    bench.home("a").join("images").join(digest(IMAGE).to_string())
}

fn huge(path: &Path) {
    let _ = fs::remove_file(path);
    fs::File::create(path).unwrap().set_len(10 << 30).unwrap();
}

#[test]
fn links_lead_nowhere() {
    let bench = start();
    let secret = bench.temp.path().join("secret");
    fs::write(&secret, vec![b's'; 8192]).unwrap();
    let node = bench.open();
    let vm1 = node.replica(&name("vm1")).unwrap().id.to_string();
    let opened = node.open_replica(&name("vm1")).unwrap();
    // Planted while the node is open ...
    let replica = bench.home("a").join("replicas").join(&vm1);
    for file in ["data", "map"] {
        fs::remove_file(replica.join(file)).unwrap();
        symlink(&secret, replica.join(file)).unwrap();
    }
    fs::remove_file(debian(&bench).join("data")).unwrap();
    symlink(&secret, debian(&bench).join("data")).unwrap();
    assert_eq!(opened.open_data(OFlag::empty()).unwrap_err().kind(), Kind::Corrupt);
    assert_eq!(opened.open_map(OFlag::O_DIRECT).unwrap_err().kind(), Kind::Corrupt);
    let error = node.open_copy(&name("debian")).unwrap_err();
    assert_eq!(error.kind(), Kind::Corrupt);
    assert!(error.to_string().contains("image debian"), "{error}");
    drop(node);
    // ... and found there at the start.
    let node = bench.open();
    assert_eq!(node.replica(&name("vm1")).unwrap().state, ReplicaState::Failed);
    assert_eq!(node.open_replica(&name("vm1")).unwrap_err().kind(), Kind::Corrupt);
    assert_eq!(node.image(&name("debian")).unwrap().copies[0].state, CopyState::Failed);
    node.remove_replica(&name("vm1")).unwrap();
    assert_eq!(fs::read(&secret).unwrap(), vec![b's'; 8192], "removal takes the link alone");
}

#[test]
fn linked_directories_are_refused() {
    let bench = start();
    let common = Snapshot::of(&bench);
    for (link, target) in
        [("images", "/"), ("replicas", "/etc"), ("images", ".."), ("", "../b/underlay")]
    {
        common.restore(&bench);
        let at = bench.home("a").join(link);
        fs::rename(&at, bench.temp.path().join("kept")).unwrap();
        let at = PathBuf::from(at.to_str().unwrap().trim_end_matches('/'));
        symlink(target, &at).unwrap();
        let node = bench.open();
        let a = node.disk(&name("a")).unwrap();
        assert_eq!(a.state, DiskState::Failed, "{link}");
        assert!(a.reason.unwrap().contains("follows no link"), "{link}");
        assert_eq!(node.image(&name("spare")).unwrap().copies[0].state, CopyState::Ready);
        assert_eq!(node.disk(&name("b")).unwrap().state, DiskState::Present);
        let error = node.stage_copy(Some(&name("a")), 1).err().unwrap();
        assert_eq!(error.kind(), Kind::Unavailable);
        assert!(bench.add(&node, "a").is_err());
    }
    // One image or replica that is a link is foreign; its neighbours work.
    common.restore(&bench);
    symlink("/etc", bench.home("a").join("images").join("00".repeat(32))).unwrap();
    symlink("/etc", bench.home("a").join("replicas").join(Uuid::new_v4().to_string())).unwrap();
    fs::rename(debian(&bench).join("refs"), debian(&bench).join("refs2")).unwrap();
    symlink("refs2", debian(&bench).join("refs")).unwrap();
    let node = bench.open();
    assert_eq!(node.disk(&name("a")).unwrap().state, DiskState::Present);
    // Who refers to it can't be told, so it is neither used nor removed.
    assert_eq!(node.image(&name("debian")).unwrap_err().kind(), Kind::NotFound);
    let problems = node.fsck(Repair::Mend).unwrap().problems;
    assert!(problems.len() >= 3 && problems.iter().all(|p| !p.mended), "{problems:?}");
    assert!(debian(&bench).join("refs2").exists() && Path::new("/etc/passwd").exists());
}

#[test]
fn hostile_records_fail_their_object_alone() {
    let bench = start();
    let common = Snapshot::of(&bench);
    let vm1 = bench.open().replica(&name("vm1")).unwrap().id;
    let records = [
        bench.home("a").join("disk.json"),
        debian(&bench).join("image.json"),
        debian(&bench).join("refs").join(format!("{vm1}.json")),
        bench.home("a").join("replicas").join(vm1.to_string()).join("replica.json"),
    ];
    type Harm = fn(&Path);
    let harms: [(&str, Harm); 6] = [
        ("a sparse 10 GB", huge),
        ("nothing", |path| fs::write(path, "").unwrap()),
        ("brackets", |path| fs::write(path, "[".repeat(200_000)).unwrap()),
        ("a later format", |path| fs::write(path, r#"{"format": 2, "x": 1}"#).unwrap()),
        ("noise", |path| fs::write(path, [0xff; 5000]).unwrap()),
        ("a directory", |path| {
            fs::remove_file(path).unwrap();
            fs::create_dir(path).unwrap();
        }),
    ];
    for record in &records {
        for (what, harm) in harms {
            common.restore(&bench);
            harm(record);
            let begun = Instant::now();
            let node = bench.open();
            let report = node.fsck(Repair::Mend).unwrap();
            let file = record.file_name().unwrap().to_str().unwrap();
            let a = node.disk(&name("a")).unwrap();
            if file == "disk.json" {
                assert_eq!(a.state, DiskState::Failed, "{what}");
                assert!(a.reason.unwrap().contains("disk.json"));
            } else {
                assert!(
                    report
                        .problems
                        .iter()
                        .any(|p| p.object.contains(file) || p.what.contains(file)),
                    "{what} as {file}: {report:?}"
                );
            }
            assert!(node.open_copy(&name("spare")).is_ok());
            assert!(node.remove_image(&name("debian")).is_err(), "{what} as {file}");
            assert!(begun.elapsed().as_secs() < 10, "{what} as {file}");
        }
    }
    common.restore(&bench);
    huge(&bench.state().join("disks.json"));
    let error = Node::open(&bench.state()).err().unwrap();
    assert!(error.to_string().contains("disks.json"), "{error}");
    fs::write(bench.state().join("disks.json"), r#"{"format": 9}"#).unwrap();
    assert_eq!(Node::open(&bench.state()).err().unwrap().kind(), Kind::Unsupported);
}

/// Each byte of each record flipped in turn, and mending asked for: no panic, and nothing is
/// removed that the record, brought back, needs.
#[test]
fn a_flipped_byte_loses_nothing() {
    let bench = start();
    let common = Snapshot::of(&bench);
    // Once more from the snapshot, whose files are not sparse: what they take is compared.
    common.restore(&bench);
    let before = tree(bench.temp.path());
    let node = bench.open();
    let (images, replicas) = (node.images(), node.replicas());
    drop(node);
    let vm1 = replicas[0].id;
    let records = [
        bench.home("a").join("disk.json"),
        debian(&bench).join("image.json"),
        debian(&bench).join("refs").join(format!("{vm1}.json")),
        bench.home("a").join("replicas").join(vm1.to_string()).join("replica.json"),
    ];
    let mut flips = 0;
    for record in records {
        let good = fs::read(&record).unwrap();
        for at in 0..good.len() {
            let mut bad = good.clone();
            bad[at] ^= [0x01, 0x04, 0x10][at % 3];
            fs::write(&record, &bad).unwrap();
            let node = bench.open();
            node.fsck(Repair::Mend).unwrap();
            assert!(node.remove_image(&name("debian")).is_err(), "{record:?} at {at}");
            drop((node.status(), node.disks(), node.images(), node.replicas()));
            drop(node);
            let after = tree(bench.temp.path());
            assert_eq!(after, before, "{record:?} at {at}: nothing went");
            fs::write(&record, &good).unwrap();
            let node = bench.open();
            let same = serde_json::to_value((&images, &replicas)).unwrap();
            assert_eq!(serde_json::to_value((node.images(), node.replicas())).unwrap(), same);
            flips += 1;
        }
        common.restore(&bench);
    }
    println!("{flips} flips");
}

#[test]
fn crowds_are_bounded() {
    let bench = start();
    for i in 0..2000 {
        fs::write(debian(&bench).join(format!("x{i}")), "").unwrap();
    }
    let node = bench.open();
    assert_eq!(node.disk(&name("a")).unwrap().state, DiskState::Present);
    let problems = node.fsck(Repair::Report).unwrap().problems;
    assert!(problems.iter().any(|problem| problem.what.contains("more than 1024")));
    drop(node);
    for i in 0..2000 {
        fs::write(bench.home("b").join(format!("x{i}")), "").unwrap();
    }
    let node = bench.open();
    let b = node.disk(&name("b")).unwrap();
    assert_eq!(b.state, DiskState::Failed);
    assert!(b.reason.unwrap().contains("more than 1024"));
}

#[test]
fn a_disk_that_fails_in_use_says_which() {
    let bench = start();
    let node = bench.open();
    fs::remove_dir_all(bench.path("b")).unwrap();
    let error = create(&node, "vm3", "debian", "b").unwrap_err();
    assert!(error.to_string().contains("replica vm3"), "{error}");
    let error = node.open_copy(&name("spare")).unwrap_err();
    assert!(error.to_string().contains("image spare"), "{error}");
    assert!(node.open_replica(&name("vm2")).is_err());
    create(&node, "vm3", "debian", "a").unwrap();
    let refs = fs::read_dir(debian(&bench).join("refs")).unwrap().count();
    assert_eq!(refs, 3, "the reference of what could not be made was taken back");
}
