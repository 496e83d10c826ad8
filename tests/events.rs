//! Invariants checked: what happens on the node is told once, in order, to who asks and to who follows;
//! who follows over a restart hears that numbers begin anew; metrics count the same; bad questions are
//! refused.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{
    fs,
    io::{BufRead, BufReader},
    os::unix::fs::{FileExt, PermissionsExt},
    process::{Child, Stdio},
    sync::mpsc::{Receiver, channel},
    thread,
};

#[path = "support/nbd.rs"]
mod nbd;
#[path = "support/node.rs"]
mod node;

use node::{Daemon, PATIENCE};
use serde_json::Value;

const CHUNK: usize = 256 << 10;

/// `underlay events --follow --json`, read by a thread.
struct Follower {
    child: Child,
    lines: Receiver<Value>,
}

impl Follower {
    fn start(daemon: &Daemon) -> Follower {
        let mut child = daemon
            .cli(&["events", "--follow", "--json"])
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let (sender, lines) = channel();
        let out = BufReader::new(child.stdout.take().unwrap());
        thread::spawn(move || {
            for line in out.lines().map_while(Result::ok) {
                if sender.send(serde_json::from_str(&line).unwrap()).is_err() {
                    return;
                }
            }
        });
        Follower { child, lines }
    }

    /// Waits for an event of this kind.
    fn event(&self, kind: &str) -> Value {
        loop {
            let line = self.lines.recv_timeout(PATIENCE).unwrap_or_else(|_| panic!("no {kind}"));
            if line["event"]["kind"] == kind {
                return line["event"].clone();
            }
        }
    }

    fn gap(&self) -> Value {
        loop {
            let line = self.lines.recv_timeout(PATIENCE).expect("no gap");
            if !line["gap"].is_null() {
                return line["gap"].clone();
            }
        }
    }
}

impl Drop for Follower {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn page(daemon: &Daemon) -> Vec<Value> {
    daemon.json(&["events"])["events"].as_array().unwrap().clone()
}

#[test]
fn what_happens_is_told() {
    let mut daemon = Daemon::with_disks();
    let follower = Follower::start(&daemon);
    let started = follower.event("started");
    assert_eq!((&started["seq"], &started["severity"]), (&1.into(), &"info".into()));
    let content: Vec<u8> = (0..4 * CHUNK).map(|at| (at / 7) as u8).collect();
    daemon.import("base", &content);
    assert_eq!(follower.event("image_imported")["object"], "image base");
    daemon.ok(&["image", "copy", "base", "--to", "b", "--force"]);
    let made = follower.event("copy_made");
    assert_eq!((&made["object"], &made["details"]["disk"]), (&"image base".into(), &"b".into()));

    // A damaged chunk: found by a verification, mended from the other copy.
    let digest = made["details"]["digest"].as_str().unwrap();
    let data = daemon.path("b").join("underlay/images").join(digest).join("data");
    fs::set_permissions(&data, fs::Permissions::from_mode(0o600)).unwrap();
    let file = fs::OpenOptions::new().write(true).open(&data).unwrap();
    file.write_all_at(b"damaged", CHUNK as u64 + 5).unwrap();
    daemon.ok(&["image", "verify", "base"]);
    let bad = follower.event("chunks_bad");
    assert_eq!((&bad["severity"], &bad["details"]["chunks"]), (&"warning".into(), &vec![1].into()));
    assert_eq!(follower.event("chunks_repaired")["details"]["chunks"], Value::from(vec![1]));

    daemon.ok(&["replica", "create", "vm1", "--image", "base", "--disk", "a"]);
    assert_eq!(follower.event("replica_created")["object"], "replica vm1");
    daemon.ok(&["replica", "resize", "vm1", "2M"]);
    assert_eq!(follower.event("replica_resized")["details"]["bytes"], 2 << 20);
    daemon.ok(&["replica", "migrate", "vm1", "--to", "c"]);
    assert_eq!(follower.event("replica_moved")["details"]["to"], "c");
    daemon.ok(&["replica", "flatten", "vm1"]);
    follower.event("replica_flattened");
    daemon.ok(&["disk", "drain", "c"]);
    follower.event("replica_moved");
    assert_eq!(follower.event("disk_drained")["details"]["replicas"], 1);
    daemon.ok(&["replica", "rm", "vm1"]);
    follower.event("replica_removed");
    daemon.fails(&["image", "rm", "nothing"]);
    daemon.ok(&["image", "uncopy", "base", "--from", "b", "--force"]);
    assert_eq!(follower.event("copy_removed")["details"]["disk"], "b");
    daemon.ok(&["image", "rm", "base"]);
    follower.event("image_removed");

    let told = page(&daemon);
    for (at, event) in told.iter().enumerate() {
        assert_eq!(event["seq"], at + 1);
        let time = event["time"].as_str().unwrap();
        assert!(time.ends_with('Z') && time.len() == 24, "{time}");
    }
    assert!(told.iter().all(|event| event["kind"] != "failed"), "a refusal is no event");
    let last = told.len();
    let rest = daemon.json(&["events", "--since", &(last - 2).to_string()]);
    assert_eq!((rest["events"].as_array().unwrap().len(), &rest["last"]), (2, &last.into()));
    assert!(daemon.ok(&["events"]).contains("image_removed"));
    let (_, metrics) = daemon.http("GET", "/metrics", b"");
    let counted = |kind: &str| {
        let line = format!("underlay_events_total{{kind=\"{kind}\"}} ");
        let line = metrics.lines().find_map(|it| it.strip_prefix(&line)).unwrap();
        line.parse::<usize>().unwrap()
    };
    for kind in ["started", "replica_moved", "chunks_repaired", "failed"] {
        let count = told.iter().filter(|event| event["kind"] == kind).count();
        assert_eq!(counted(kind), count, "{kind}");
    }
    let in_log = daemon.log().lines().filter(|line| line.contains("chunks_repaired")).count();
    assert_eq!(in_log, 1, "what is told is logged, once");

    // A restart: numbers begin anew, and the follower says so, and goes on.
    assert_eq!(daemon.stop(), Some(0), "followers hold no daemon up");
    daemon.restart();
    assert_eq!(follower.gap()["reason"], "restarted");
    let again = follower.event("started");
    assert_eq!(again["seq"], 1);
    assert_ne!(again["boot"], started["boot"]);
}

#[test]
fn what_no_copy_has_comes_from_the_file_it_was_imported_from() {
    let daemon = Daemon::with_disks();
    let content: Vec<u8> = (0..4 * CHUNK).map(|at| (at / 5) as u8).collect();
    let file = daemon.path("source.raw");
    fs::write(&file, &content).unwrap();
    let source = file.to_str().unwrap();
    daemon.ok(&["image", "import", source, "--name", "base", "--disk", "a", "--format", "raw"]);
    let image = daemon.json(&["image", "inspect", "base"]);
    let data = daemon.path("a").join("underlay/images").join(image["digest"].as_str().unwrap());
    let data = data.join("data");
    fs::set_permissions(&data, fs::Permissions::from_mode(0o600)).unwrap();
    let damage = |chunk: u64| {
        let copy = fs::OpenOptions::new().write(true).open(&data).unwrap();
        copy.write_all_at(b"damaged", chunk * CHUNK as u64 + 5).unwrap();
    };
    let verified = |sound: bool| {
        let output = daemon.cli(&["image", "verify", "base", "--json"]).output().unwrap();
        assert_eq!(output.status.success(), sound, "{output:?}");
    };
    // A client reads as if nothing had happened, and the copy is made whole.
    damage(1);
    let mut client = nbd::Client::open(&daemon.nbd_socket(), "image/base", nbd::Replies::Simple);
    let read = client.read(CHUNK as u64, CHUNK as u32).unwrap();
    assert!(read == content[CHUNK..2 * CHUNK]);
    let told = |kind: &str| page(&daemon).iter().any(|event| event["kind"] == kind);
    node::until("the repair", || told("chunks_repaired") && told("rescued"));
    assert!(fs::read(&data).unwrap() == content);
    drop(client);
    // A file that was changed is not read, not even where it is as it was.
    damage(2);
    let mut changed = content.clone();
    changed[0] ^= 1;
    fs::write(&file, &changed).unwrap();
    verified(false);
    assert!(told("chunks_unrepaired"));
    // Nor is one that was put in its place.
    fs::remove_file(&file).unwrap();
    fs::write(&file, &content).unwrap();
    verified(false);
    let origins = daemon.path("state").join("origins");
    assert_eq!(fs::read_dir(&origins).unwrap().count(), 1);
    daemon.ok(&["image", "rm", "base"]);
    assert_eq!(fs::read_dir(&origins).unwrap().count(), 0);
}

#[test]
fn a_disk_that_vanishes_and_returns_is_told() {
    let mut daemon = Daemon::with_disks();
    assert_eq!(daemon.stop(), Some(0));
    let (there, away) = (daemon.path("c"), daemon.path("away"));
    fs::rename(&there, &away).unwrap();
    daemon.restart();
    let follower = Follower::start(&daemon);
    let gone = follower.event("disk_gone");
    assert_eq!((&gone["object"], &gone["severity"]), (&"disk c".into(), &"error".into()));
    fs::rename(&away, &there).unwrap();
    // Nobody needs to say so.
    assert_eq!(follower.event("disk_back")["object"], "disk c");
}

#[test]
fn bad_questions_are_refused() {
    let daemon = Daemon::start();
    for query in ["since=-1", "since=x", "boot=x", "follow=maybe", "kind=x"] {
        let (status, body) = daemon.http("GET", &format!("/v1/events?{query}"), b"");
        assert_eq!(status, 400, "{query}: {body}");
    }
    let (status, body) = daemon.http("GET", "/v1/events?since=99999", b"");
    let page: Value =
        serde_json::from_str(&body[body.find('{').unwrap()..=body.rfind('}').unwrap()])
            .unwrap_or_else(|error| panic!("{error}: {body}"));
    assert_eq!((status, &page["gap"]["reason"]), (200, &"restarted".into()));
}
