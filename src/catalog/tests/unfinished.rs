//! Invariants checked: a copy that was interrupted is gone on with, by one at a time; it is kept no longer than
//! it can be of use; and nothing that a hostile disk calls one makes us write elsewhere.

use std::{
    os::unix::fs::symlink,
    time::{Duration, SystemTime},
};

use super::{
    scenario::{IMAGE, copy_to, interrupted_copy},
    *,
};
use crate::catalog::{Repair, unfinished::RESUME_JSON};

/// What is there of copies, by disk.
fn left(node: &Node) -> Vec<(String, u64)> {
    let image = node.image(&name("debian")).unwrap();
    image.unfinished.iter().map(|it| (it.disk.to_string(), it.done_bytes)).collect()
}

fn staging(bench: &Bench, disk: &str) -> Vec<PathBuf> {
    let entries = fs::read_dir(bench.home(disk).join("images")).unwrap();
    let paths = entries.map(|entry| entry.unwrap().path());
    paths.filter(|path| path.file_name().unwrap().to_str().unwrap().starts_with('.')).collect()
}

fn start() -> (Bench, Node) {
    let (bench, node) = Bench::with(&["a", "b", "c"]);
    import(&node, Some("a"), "debian", IMAGE).unwrap();
    interrupted_copy(&node, "b").unwrap();
    (bench, node)
}

#[test]
fn a_copy_that_was_interrupted_is_gone_on_with() {
    let half = IMAGE.len() / 2;
    let (bench, node) = start();
    let on_b = [("b".to_owned(), half as u64)];
    assert_eq!(left(&node), on_b);
    drop(node);
    let node = bench.open();
    assert_eq!(left(&node), on_b);
    assert_eq!(node.fsck(Repair::Mend).unwrap().problems, []);
    let staged = node.stage_another(digest(IMAGE), Some(&name("b")), true).unwrap();
    assert_eq!(staged.found(), half as u64);
    assert_eq!(fs::read(staged.data_path()).unwrap(), IMAGE[..half]);
    assert_eq!(left(&node), []);
    assert_eq!(node.fsck(Repair::Mend).unwrap().problems, [], "it is under way");
    // One at a time works on it.
    let other = node.stage_another(digest(IMAGE), Some(&name("b")), true).unwrap();
    assert!(other.found() == 0 && other.path() != staged.path());
    drop((other, staged));
    assert_eq!(left(&node), on_b);
    assert_eq!(staging(&bench, "b").len(), 1);
    copy_to(&node, "b").unwrap();
    assert!(left(&node).is_empty() && staging(&bench, "b").is_empty());
    let copy = bench.home("b").join("images").join(digest(IMAGE).to_string());
    assert_eq!(fs::read(copy.join("data")).unwrap(), IMAGE);
    assert!(!copy.join(RESUME_JSON).exists());
    drop(node);
    assert_eq!(bench.open().fsck(Repair::Report).unwrap().problems, []);
}

#[test]
fn what_was_given_up_is_not_kept() {
    let (bench, node) = start();
    let mut staged = node.stage_another(digest(IMAGE), Some(&name("b")), true).unwrap();
    staged.give_up();
    drop(staged);
    assert!(left(&node).is_empty() && staging(&bench, "b").is_empty());
}

#[test]
fn it_is_kept_for_a_day_and_while_it_can_be_of_use() {
    let age = |bench: &Bench| {
        let resume = fs::File::open(staging(bench, "b")[0].join(RESUME_JSON)).unwrap();
        resume.set_modified(SystemTime::now() - Duration::from_secs(25 * 3600)).unwrap();
    };
    let (bench, node) = start();
    assert!(!node.has_ended_unfinished() && left(&node).len() == 1);
    drop(node);
    age(&bench);
    let node = bench.open();
    assert!(left(&node).is_empty() && staging(&bench, "b").is_empty());

    // The disk gets a copy in another way, is to be left, or is forgotten; the image goes.
    interrupted_copy(&node, "b").unwrap();
    node.set_draining(&name("b"), true).unwrap();
    node.sweep_unfinished();
    assert!(staging(&bench, "b").is_empty());
    node.set_draining(&name("b"), false).unwrap();
    interrupted_copy(&node, "b").unwrap();
    node.remove_copy_on(&name("debian"), &name("b"), false).unwrap();
    assert!(left(&node).is_empty() && staging(&bench, "b").is_empty());
    interrupted_copy(&node, "b").unwrap();
    let first = node.stage_another(digest(IMAGE), Some(&name("b")), true).unwrap();
    copy_to(&node, "b").unwrap();
    drop(first);
    node.sweep_unfinished();
    assert!(staging(&bench, "b").is_empty());
    interrupted_copy(&node, "c").unwrap();
    node.remove_disk(&name("c")).unwrap();
    assert!(!bench.home("c").exists(), "nothing of ours is left on it");
    bench.add(&node, "c").unwrap();
    interrupted_copy(&node, "c").unwrap();
    node.remove_image(&name("debian")).unwrap();
    node.sweep_unfinished();
    assert!(staging(&bench, "c").is_empty());
    assert_eq!(node.fsck(Repair::Report).unwrap().problems, []);
}

#[test]
fn it_waits_for_an_image_whose_disk_is_away() {
    let (bench, node) = start();
    drop(node);
    fs::rename(bench.path("a"), bench.path("gone")).unwrap();
    let node = bench.open();
    node.sweep_unfinished();
    assert_eq!(staging(&bench, "b").len(), 1);
    fs::rename(bench.path("gone"), bench.path("a")).unwrap();
    node.awaited().into_iter().for_each(|id| node.take_back(id));
    assert_eq!(left(&node).len(), 1);
    copy_to(&node, "b").unwrap();
}

#[test]
fn what_only_looks_like_one_is_not_written() {
    let victim = b"somebody else's";
    let plant: [fn(&Path, &Path); 4] = [
        |dir, victim| symlink(victim, dir.join("data")).unwrap(),
        |dir, victim| fs::hard_link(victim, dir.join("data")).unwrap(),
        |dir, _| fs::create_dir(dir.join("data")).unwrap(),
        |dir, _| fs::write(dir.join(RESUME_JSON), "{}").unwrap(),
    ];
    for plant in plant {
        let (bench, node) = start();
        drop(node);
        let other = bench.path("b").join("file");
        fs::write(&other, victim).unwrap();
        let dir = staging(&bench, "b").remove(0);
        fs::remove_file(dir.join("data")).unwrap();
        plant(&dir, &other);
        let node = bench.open();
        assert!(left(&node).is_empty() && staging(&bench, "b").is_empty());
        let staged = node.stage_another(digest(IMAGE), Some(&name("b")), true).unwrap();
        assert_eq!(staged.found(), 0);
        assert_eq!(fs::read(&other).unwrap(), victim);
    }
    // What else lies there goes before it is gone on with.
    let (bench, node) = start();
    drop(node);
    let dir = staging(&bench, "b").remove(0);
    symlink(bench.path("b"), dir.join("chunks")).unwrap();
    fs::create_dir(dir.join("refs")).unwrap();
    fs::write(dir.join("refs/x.json"), "x").unwrap();
    let node = bench.open();
    copy_to(&node, "b").unwrap();
    let copy = bench.home("b").join("images").join(digest(IMAGE).to_string());
    assert_eq!(fs::read_dir(copy.join("refs")).unwrap().count(), 0);
}
