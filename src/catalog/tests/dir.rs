//! Invariants checked: no name leads out of its directory, nothing but files is opened, bounds hold.

use std::os::unix::fs::symlink;

use nix::{
    fcntl::{self, FcntlArg, OFlag},
    sys::stat::Mode,
    unistd,
};

use crate::{
    catalog::{
        dir::{DEPTH_MAX, DIR_MODE, Dir, FILE_MODE},
        steps::Steps,
    },
    error::Kind,
};

fn temp() -> (tempfile::TempDir, Dir) {
    let temp = tempfile::tempdir().unwrap();
    let dir = Dir::open_root(temp.path(), Steps::default()).unwrap();
    (temp, dir)
}

#[test]
fn links_pipes_and_paths_are_refused() {
    let (temp, dir) = temp();
    symlink("/etc/passwd", temp.path().join("file")).unwrap();
    symlink("/etc", temp.path().join("dir")).unwrap();
    unistd::mkfifo(&temp.path().join("pipe"), Mode::from_bits_truncate(0o600)).unwrap();
    for name in ["file", "pipe", "dir"] {
        let error = dir.read(name, 10_000).unwrap_err();
        assert_eq!(error.kind(), Kind::Corrupt, "{error}");
        let error = dir.file(name, OFlag::O_RDWR).unwrap_err();
        assert_eq!(error.kind(), Kind::Corrupt, "{error}");
        assert_eq!(dir.open(name).unwrap_err().kind(), Kind::Corrupt);
    }
    for name in ["..", ".", "", "a/b", "/etc"] {
        assert_eq!(dir.open(name).unwrap_err().kind(), Kind::Invalid);
        assert_eq!(dir.read(name, 1).unwrap_err().kind(), Kind::Invalid);
        assert_eq!(dir.rename("file", name).unwrap_err().kind(), Kind::Invalid);
    }
    assert_eq!(dir.open("absent").unwrap_err().kind(), Kind::NotFound);
    assert!(dir.set_mode("file", 0o777).is_err());
}

#[test]
fn removal_takes_links_not_their_targets() {
    let (temp, dir) = temp();
    let outside = tempfile::tempdir().unwrap();
    std::fs::write(outside.path().join("precious"), "x").unwrap();
    let tree = dir.create("tree").unwrap();
    tree.create("sub").unwrap().write_new("f", b"1").unwrap();
    symlink(outside.path(), temp.path().join("tree/sub/link")).unwrap();
    dir.remove_tree("tree").unwrap();
    assert!(dir.stat("tree").unwrap().is_none());
    assert!(outside.path().join("precious").exists());
    dir.remove_tree("tree").unwrap();
}

#[test]
fn bounds_hold() {
    let (_temp, dir) = temp();
    dir.write_sparse("huge", 10 << 30).unwrap();
    assert_eq!(dir.read("huge", 1000).unwrap_err().kind(), Kind::Corrupt);
    dir.replace("ten", b"0123456789").unwrap();
    assert_eq!(dir.read("ten", 10).unwrap(), b"0123456789");
    assert!(dir.read("ten", 9).is_err());
    assert_eq!(dir.entries(2).unwrap().len(), 2);
    assert_eq!(dir.entries(1).unwrap_err().kind(), Kind::Unsupported);
    let mut deep = dir.create("deep").unwrap();
    for _ in 0..DEPTH_MAX {
        deep = deep.create("d").unwrap();
    }
    assert_eq!(dir.remove_tree("deep").unwrap_err().kind(), Kind::Unsupported);
}

#[test]
fn files_open_blocking_and_private() {
    let (_temp, dir) = temp();
    dir.replace("f", b"1").unwrap();
    let file = dir.file("f", OFlag::O_RDWR).unwrap();
    let flags = fcntl::fcntl(&file, FcntlArg::F_GETFL).unwrap();
    assert_eq!(flags & libc::O_NONBLOCK, 0);
    assert_eq!(dir.stat("f").unwrap().unwrap().st_mode & 0o777, FILE_MODE);
    dir.create("d").unwrap();
    assert_eq!(dir.stat("d").unwrap().unwrap().st_mode & 0o777, DIR_MODE);
}
