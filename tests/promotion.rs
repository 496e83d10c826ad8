//! Invariants checked: what is promoted, and pinned, outlives a start without the copy's disk; what is
//! removed leaves nothing behind, on disk or open.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{fs, path::Path};

#[path = "support/nbd.rs"]
mod nbd;
#[path = "support/node.rs"]
mod node;

use nbd::{Client, Replies};
use node::{Daemon, until};

/// Three chunks and a half.
const SIZE: usize = 7 << 17;

/// Content without a zero block.
fn content() -> Vec<u8> {
    (0..SIZE).map(|at| (at / 512 + at % 251) as u8 | 1).collect()
}

/// A daemon with an image on A, and a replica of it on B, whose cache holds all of it.
fn pinned() -> Daemon {
    let daemon = Daemon::with_disks();
    let file = daemon.path("import.raw");
    fs::write(&file, content()).unwrap();
    let file = file.to_str().unwrap();
    daemon.ok(&["image", "import", file, "--name", "base", "--format", "raw", "--disk", "a"]);
    daemon.ok(&["replica", "create", "vm", "--image", "base", "--disk", "b"]);
    daemon.ok(&["cache", "pin", "base", "--disk", "b", "--all"]);
    until("what is pinned", || stored(&daemon) == 4 << 18);
    daemon
}

fn stored(daemon: &Daemon) -> u64 {
    figure(daemon, "/stored_bytes")
}

/// A figure of the cache of B.
fn figure(daemon: &Daemon, name: &str) -> u64 {
    let caches = daemon.json(&["cache", "list"]);
    let b = caches.as_array().unwrap().iter().find(|cache| cache["disk"] == "b");
    b.map_or(0, |cache| cache.pointer(name).unwrap().as_u64().unwrap())
}

fn read(daemon: &Daemon) -> Vec<u8> {
    let mut client = Client::open(&daemon.nbd_socket(), "replica/vm", Replies::Simple);
    client.read(0, SIZE as u32).unwrap()
}

/// The caches on a disk.
fn caches(disk: &Path) -> usize {
    fs::read_dir(disk.join("underlay/cache")).map_or(0, Iterator::count)
}

/// Files below `path` that the daemon has open.
fn open_below(daemon: &Daemon, path: &Path) -> usize {
    let open = fs::read_dir(format!("/proc/{}/fd", daemon.pid())).unwrap().flatten();
    open.filter_map(|fd| fs::read_link(fd.path()).ok()).filter(|to| to.starts_with(path)).count()
}

#[test]
fn a_cache_outlives_a_start_without_its_copy() {
    let mut daemon = pinned();
    assert!(read(&daemon) == content());
    daemon.kill();
    let (a, away) = (daemon.path("a"), daemon.path("away"));
    fs::rename(&a, &away).unwrap();
    daemon.restart();
    // It was looked at, and neither used nor removed.
    until("a look at the cache", || daemon.log().contains("a cache is not used"));
    assert_eq!((caches(&daemon.path("b")), stored(&daemon)), (1, 0));
    fs::rename(&away, &a).unwrap();
    daemon.ok(&["disk", "add", a.to_str().unwrap(), "--name", "a"]);
    until("what is pinned", || stored(&daemon) == 4 << 18);
    assert!(daemon.log().contains("a cache was looked through"), "it was found, not made");
    assert!(read(&daemon) == content());
    // The policy knows of the pins again: what is cleared comes back.
    assert_eq!(figure(&daemon, "/figures/promoted"), 0);
    daemon.ok(&["cache", "clear"]);
    until("what is pinned", || figure(&daemon, "/figures/promoted") == 4);
    assert_eq!(daemon.stop(), Some(0));
}

#[test]
fn what_is_removed_leaves_nothing() {
    let mut daemon = pinned();
    let b = daemon.path("b");
    assert!(read(&daemon) == content() && open_below(&daemon, &b.join("underlay/cache")) > 0);
    daemon.ok(&["replica", "rm", "vm"]);
    daemon.ok(&["image", "rm", "base"]);
    assert_eq!(caches(&b), 0);
    std::thread::sleep(std::time::Duration::from_millis(2500));
    assert_eq!((caches(&b), stored(&daemon)), (0, 0), "nobody makes it again");
    // Again, and this time the disk goes, with the cache on it.
    let file = daemon.path("import.raw");
    let file = file.to_str().unwrap();
    daemon.ok(&["image", "import", file, "--name", "base", "--format", "raw", "--disk", "a"]);
    daemon.ok(&["cache", "pin", "base", "--disk", "b", "--all"]);
    until("what is pinned", || stored(&daemon) == 4 << 18);
    daemon.ok(&["disk", "rm", "b"]);
    until("that it can be unmounted", || open_below(&daemon, &b) == 0);
    // Another with its name begins with nothing.
    let other = daemon.path("other");
    fs::create_dir(&other).unwrap();
    daemon.ok(&["disk", "add", other.to_str().unwrap(), "--name", "b"]);
    daemon.ok(&["replica", "create", "vm", "--image", "base", "--disk", "b"]);
    assert!(read(&daemon) == content());
    assert_eq!((stored(&daemon), caches(&other)), (0, 0));
    daemon.ok(&["cache", "pin", "base", "--disk", "b", "--all"]);
    until("what is pinned there", || stored(&daemon) == 4 << 18 && caches(&other) == 1);
    assert_eq!(daemon.stop(), Some(0));
}
