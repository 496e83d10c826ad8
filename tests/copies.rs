//! Invariants checked: a copy whose making was interrupted, by its user or by the daemon's death, is gone on
//! with; nothing of what was there is believed; and it is shown while it is made and while it waits.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{
    fs,
    os::unix::fs::FileExt,
    path::PathBuf,
    process::{Child, Stdio},
};

#[path = "support/node.rs"]
mod node;

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use node::{Daemon, until};
use serde_json::Value;

const MIB: u64 = 1 << 20;
/// How much of a copy goes to the disk at a time, and is noted.
const STEP: u64 = 64 * MIB;
/// The image has no data from here on, for a mebibyte.
const HOLE: u64 = 3 * MIB;

fn content() -> Vec<u8> {
    let mut bytes = vec![0; 4 * STEP as usize];
    fastrand::Rng::with_seed(7).fill(&mut bytes);
    bytes[HOLE as usize..(HOLE + MIB) as usize].fill(0);
    bytes
}

fn begin(daemon: &Daemon) -> Child {
    let copy = ["image", "copy", "base", "--to", "b", "--force", "--rate", "64M"];
    daemon.cli(&copy).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap()
}

/// The directory of the copy in the making.
fn staging(daemon: &Daemon) -> Option<PathBuf> {
    let entries = fs::read_dir(daemon.path("b").join("underlay/images")).unwrap();
    let mut paths = entries.map(|entry| entry.unwrap().path());
    paths.find(|path| path.file_name().unwrap().to_str().unwrap().starts_with(".staging-"))
}

/// How far the copy says that it is.
fn noted(daemon: &Daemon) -> u64 {
    let noted = staging(daemon).map(|dir| fs::read(dir.join("resume.json")));
    let Some(Ok(text)) = noted else { return 0 };
    serde_json::from_slice::<Value>(&text).unwrap()["done"].as_u64().unwrap()
}

fn unfinished(daemon: &Daemon) -> Vec<Value> {
    daemon.json(&["image", "copies", "base"])["unfinished"].as_array().unwrap().clone()
}

#[test]
fn a_copy_that_is_interrupted_goes_on_where_it_was() {
    let mut daemon = Daemon::with_disks();
    let content = content();
    daemon.import("base", &content);

    let mut client = begin(&daemon);
    until("progress", || noted(&daemon) >= STEP);
    let shown = daemon.ok(&["image", "copies", "base"]);
    assert!(shown.contains("being made: ") && shown.contains("asked for"), "{shown}");
    assert!(daemon.ok(&["status"]).contains("image base on disk b: "));
    kill(Pid::from_raw(client.id() as i32), Signal::SIGINT).unwrap();
    assert!(!client.wait().unwrap().success());
    until("an end", || unfinished(&daemon).len() == 1);
    let left = &unfinished(&daemon)[0];
    assert!(left["disk"] == "b" && left["done_bytes"].as_u64().unwrap() >= STEP, "{left}");
    let shown = daemon.ok(&["image", "copies", "base"]);
    assert!(shown.contains("interrupted at 65 MiB: "), "{shown}");

    let mut client = begin(&daemon);
    until("more progress", || noted(&daemon) >= 2 * STEP);
    daemon.kill();
    assert!(!client.wait().unwrap().success());
    let data = staging(&daemon).unwrap().join("data");
    let file = fs::File::options().write(true).open(&data).unwrap();
    file.write_all_at(b"damaged", 5 * MIB + 11).unwrap();
    file.write_all_at(b"no hole", HOLE + 12).unwrap();
    file.set_len(5 * STEP).unwrap();
    daemon.restart();
    assert_eq!(unfinished(&daemon).len(), 1);

    daemon.ok(&["image", "copy", "base", "--to", "b", "--force"]);
    let events = daemon.json(&["events"]);
    let made = events["events"].as_array().unwrap().iter().find(|it| it["kind"] == "copy_made");
    let details = &made.unwrap()["details"];
    assert!(details["resumed_at"].as_u64().unwrap() >= 2 * STEP, "{details}");
    assert!(unfinished(&daemon).is_empty() && staging(&daemon).is_none());
    let digest = details["digest"].as_str().unwrap();
    let copy = daemon.path("b").join("underlay/images").join(digest).join("data");
    assert!(fs::read(copy).unwrap() == content);
    daemon.ok(&["image", "verify", "base"]);
}

#[test]
fn one_that_nobody_goes_on_with_is_given_up() {
    let daemon = Daemon::with_disks();
    daemon.import("base", &content());
    let mut client = begin(&daemon);
    until("progress", || noted(&daemon) >= STEP);
    client.kill().unwrap();
    client.wait().unwrap();
    until("an end", || unfinished(&daemon).len() == 1);
    daemon.ok(&["image", "uncopy", "base", "--from", "b"]);
    assert!(unfinished(&daemon).is_empty() && staging(&daemon).is_none());
    let nothing = daemon.fails(&["image", "uncopy", "base", "--from", "b"]);
    assert!(nothing.contains("disk b has no copy of it"), "{nothing}");
}
