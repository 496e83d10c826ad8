//! Invariants checked: clients of a replica that moves from disk to disk, or is freed of its image, read
//! what they wrote, all the time; whatever is interrupted (by the user, by a crash) has happened or not;
//! a disk that is drained is empty, and goes.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{
    fs,
    path::Path,
    process::Stdio,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

#[path = "support/nbd.rs"]
mod nbd;
#[path = "support/node.rs"]
mod node;

use nbd::{Client, Replies, TRIM, ZEROES};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use node::{Daemon, complaint, until};
use serde_json::json;

const MIB: usize = 1 << 20;
/// Bytes that each client has to itself.
const PART: usize = 2 * MIB;
const CLIENTS: usize = 3;

/// An image whose every other 64 KiB are zeros.
fn image() -> Vec<u8> {
    let byte = |at: usize| (at / 512 + at % 251) as u8 | 1;
    (0..CLIENTS * PART + 3 * MIB).map(|at| if at >> 16 & 1 == 0 { byte(at) } else { 0 }).collect()
}

/// Clients that work on a replica and check all that they read.
struct Load {
    stop: Arc<AtomicBool>,
    clients: Vec<JoinHandle<(Vec<u8>, u64, Duration)>>,
}

impl Load {
    fn start(daemon: &Daemon, replica: &str, content: &[u8]) -> Load {
        let stop = Arc::new(AtomicBool::new(false));
        let clients = (0..CLIENTS).map(|number| {
            let (socket, export) = (daemon.nbd_socket(), format!("replica/{replica}"));
            let mut model = content[number * PART..(number + 1) * PART].to_vec();
            let stop = stop.clone();
            std::thread::spawn(move || {
                let mut rng = fastrand::Rng::with_seed(number as u64);
                let mut client = Client::open(&socket, &export, Replies::Structured);
                let (mut operations, mut longest) = (0, Duration::ZERO);
                while !stop.load(Ordering::Relaxed) {
                    let unit = [1, 512, 4096][rng.usize(0..3)];
                    let at = rng.usize(0..PART - (256 << 10)) / unit * unit;
                    let len = (rng.usize(1..=(64 << 10)) / unit * unit).max(unit);
                    let offset = (number * PART + at) as u64;
                    let started = Instant::now();
                    match rng.u8(0..20) {
                        0..=8 => {
                            let bytes = vec![rng.u8(..); len];
                            client.write(0, offset, &bytes).unwrap();
                            model[at..at + len].copy_from_slice(&bytes);
                        }
                        9..=10 => {
                            client.command(0, ZEROES, offset, len as u32).unwrap();
                            model[at..at + len].fill(0);
                        }
                        11 => {
                            client.command(0, TRIM, offset, len as u32).unwrap();
                            let now = client.read(offset, len as u32).unwrap();
                            let same = now.iter().zip(&model[at..]).all(|(a, b)| a == b || *a == 0);
                            assert!(same, "a discard leaves the old or zeros");
                            model[at..at + len].copy_from_slice(&now);
                        }
                        12..=13 => client.flush().unwrap(),
                        _ => {
                            let now = client.read(offset, len as u32).unwrap();
                            assert!(now == model[at..at + len], "client {number} at {offset}");
                        }
                    }
                    longest = longest.max(started.elapsed());
                    operations += 1;
                }
                client.close();
                (model, operations, longest)
            })
        });
        Load { clients: clients.collect(), stop }
    }

    /// Ends it; what the replica holds now, all of `content` as clients have changed it.
    fn end(self, content: &mut [u8]) -> (u64, Duration) {
        self.stop.store(true, Ordering::Relaxed);
        let (mut operations, mut longest) = (0, Duration::ZERO);
        for (number, client) in self.clients.into_iter().enumerate() {
            let (model, count, wait) = client.join().unwrap();
            content[number * PART..(number + 1) * PART].copy_from_slice(&model);
            operations += count;
            longest = longest.max(wait);
        }
        (operations, longest)
    }
}

fn check(daemon: &Daemon, replica: &str, content: &[u8]) {
    let mut client =
        Client::open(&daemon.nbd_socket(), &format!("replica/{replica}"), Replies::Simple);
    for (number, piece) in content.chunks(MIB).enumerate() {
        let now = client.read((number * MIB) as u64, piece.len() as u32).unwrap();
        let differs = now.iter().zip(piece).position(|(a, b)| a != b);
        assert_eq!(differs, None, "in MiB {number}");
    }
    client.close();
}

fn on_disk(daemon: &Daemon, disk: &str) -> Vec<String> {
    let replicas = daemon.path(disk).join("underlay/replicas");
    let names = fs::read_dir(replicas).unwrap();
    names.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}

fn start() -> (Daemon, Vec<u8>) {
    let daemon = Daemon::with_disks();
    let content = image();
    daemon.import("base", &content);
    daemon.ok(&["replica", "create", "vm1", "--image", "base", "--disk", "b"]);
    (daemon, content)
}

#[test]
fn a_replica_moves_and_is_flattened_under_a_load() {
    let (mut daemon, mut content) = start();
    let load = Load::start(&daemon, "vm1", &content);
    let mut pauses = Vec::new();
    for to in ["c", "a", "b", "c", "b"].into_iter().cycle().take(15) {
        std::thread::sleep(Duration::from_millis(50));
        let moved = daemon.json(&["replica", "migrate", "vm1", "--to", to]);
        assert_eq!(moved["replica"]["disk"], to);
        assert!(moved["replica"]["clients"].as_array().unwrap().len() == CLIENTS, "{moved}");
        pauses.push(moved["paused_ms"].as_f64().unwrap());
        for other in ["a", "b", "c"] {
            assert_eq!(on_disk(&daemon, other).len(), usize::from(other == to), "after {to}");
        }
    }
    let told = daemon.fails(&["replica", "migrate", "vm1", "--to", "b"]);
    assert!(told.contains("disk b already"), "{told}");
    assert!(daemon.fails(&["image", "rm", "base"]).contains("vm1"));
    let flat = daemon.json(&["replica", "flatten", "vm1"]);
    assert!(flat["replica"]["digest"].is_null(), "{flat}");
    daemon.ok(&["image", "rm", "base"]);
    daemon.ok(&["replica", "migrate", "vm1", "--to", "c"]);
    let (operations, longest) = load.end(&mut content);
    pauses.sort_by(f64::total_cmp);
    println!("{operations} operations, the longest took {longest:?}; pauses in ms: {pauses:.1?}");
    assert!(operations > 500);
    check(&daemon, "vm1", &content);
    // What was acknowledged outlives the daemon, unflushed, also in the new place.
    let mut client = Client::open(&daemon.nbd_socket(), "replica/vm1", Replies::Simple);
    client.write(0, 5 * MIB as u64, &[77; 10_000]).unwrap();
    content[5 * MIB..5 * MIB + 10_000].fill(77);
    daemon.kill();
    daemon.restart();
    check(&daemon, "vm1", &content);
    assert_eq!(daemon.json(&["fsck"])["problems"], json!([]));
    let told = daemon.fails(&["replica", "flatten", "vm1"]);
    assert!(told.contains("no image"), "{told}");
    daemon.ok(&["replica", "rm", "vm1"]);
}

#[test]
fn a_replica_that_nobody_uses_moves_too_and_grows_on_the_way() {
    let (daemon, content) = start();
    let mut client = Client::open(&daemon.nbd_socket(), "replica/vm1", Replies::Simple);
    client.write(0, 12_345, &[3; 3 * MIB]).unwrap();
    client.close();
    let mut moving = daemon.cli(&["replica", "migrate", "vm1", "--to", "c", "--rate", "2M"]);
    let moving = moving.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    until("the copy's beginning", || on_disk(&daemon, "c").len() == 1);
    let told = daemon.fails(&["replica", "migrate", "vm1", "--to", "a"]);
    assert!(told.contains("being moved"), "{told}");
    assert!(daemon.fails(&["replica", "rm", "vm1"]).contains("being moved"));
    daemon.ok(&["replica", "resize", "vm1", "64M"]);
    let output = moving.wait_with_output().unwrap();
    assert!(output.status.success(), "{output:?}\n{}", daemon.log());
    let mut content = [content, vec![0; 50 * MIB]].concat();
    content.truncate(64 * MIB);
    content[12_345..12_345 + 3 * MIB].fill(3);
    check(&daemon, "vm1", &content);
    assert_eq!(daemon.json(&["replica", "inspect", "vm1"])["size"], 64 * MIB);
    assert_eq!(daemon.json(&["fsck"])["problems"], json!([]));
}

#[test]
fn what_is_interrupted_has_not_happened() {
    let (daemon, mut content) = start();
    let mut client = Client::open(&daemon.nbd_socket(), "replica/vm1", Replies::Simple);
    client.write(0, 0, &[3; 8 * MIB]).unwrap();
    content[..8 * MIB].fill(3);
    client.close();
    let load = Load::start(&daemon, "vm1", &content);
    for work in [
        &["replica", "migrate", "vm1", "--to", "c", "--rate", "1M"][..],
        &["replica", "flatten", "vm1", "--rate", "100K"],
        &["disk", "drain", "b", "--rate", "1M"],
    ] {
        let mut child = daemon.cli(work);
        let child = child.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        std::thread::sleep(Duration::from_millis(600));
        kill(Pid::from_raw(child.id() as i32), Signal::SIGINT).unwrap();
        let output = child.wait_with_output().unwrap();
        assert!(!output.status.success(), "{work:?}: {output:?}");
        until("the end of the work", || {
            on_disk(&daemon, "c").is_empty() && on_disk(&daemon, "a").is_empty()
        });
        assert_eq!(on_disk(&daemon, "b").len(), 1);
    }
    daemon.ok(&["disk", "undrain", "b"]);
    let (operations, longest) = load.end(&mut content);
    println!("{operations} operations, the longest took {longest:?}");
    check(&daemon, "vm1", &content);
    assert_eq!(daemon.json(&["fsck"])["problems"], json!([]));
    daemon.ok(&["replica", "migrate", "vm1", "--to", "c"]);
    check(&daemon, "vm1", &content);
}

#[test]
fn a_crash_at_any_moment_leaves_it_on_one_disk() {
    let (mut daemon, mut content) = start();
    let mut rng = fastrand::Rng::with_seed(9);
    let mut on = std::collections::BTreeMap::new();
    for round in 0..24u8 {
        let mut client = Client::open(&daemon.nbd_socket(), "replica/vm1", Replies::Simple);
        let at = rng.usize(0..8 * MIB);
        client.write(0, at as u64, &vec![round; MIB]).unwrap();
        content[at..at + MIB].fill(round);
        let from = daemon.json(&["replica", "inspect", "vm1"])["disk"].as_str().unwrap().to_owned();
        let to = if from == "b" { "c" } else { "b" };
        let mut moving = daemon.cli(&["replica", "migrate", "vm1", "--to", to]);
        let mut moving = moving.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        std::thread::sleep(Duration::from_micros(rng.u64(2_000..60_000)));
        // Not flushed: the tail has it, wherever the replica is by now.
        let late = client.write(0, 0, &[round ^ 0x80; 4096]);
        if late.is_ok() {
            content[..4096].fill(round ^ 0x80);
        }
        daemon.kill();
        moving.wait().unwrap();
        daemon.restart();
        check(&daemon, "vm1", &content);
        let now = daemon.json(&["replica", "inspect", "vm1"])["disk"].as_str().unwrap().to_owned();
        assert!(now == from || now == to);
        *on.entry(now == to).or_insert(0) += 1;
        let found = ["a", "b", "c"].map(|disk| on_disk(&daemon, disk).len());
        assert_eq!(found.iter().sum::<usize>(), 1, "round {round}: {found:?}");
        assert_eq!(daemon.json(&["fsck"])["problems"], json!([]), "round {round}");
    }
    println!("moved: {on:?}");
}

#[test]
fn a_disk_that_is_drained_is_empty_and_goes() {
    let (daemon, content) = start();
    for name in ["vm2", "vm3"] {
        daemon.ok(&["replica", "create", name, "--image", "base", "--disk", "b"]);
    }
    let home = || {
        let image = daemon.json(&["image", "inspect", "base"]);
        image["copies"][0]["disk"].as_str().unwrap().to_owned()
    };
    let first = home();
    let drained = daemon.json(&["disk", "drain", "b"]);
    assert_eq!(drained["moved"].as_array().unwrap().len(), 3, "{drained}");
    assert_eq!(drained["copies"].as_array().unwrap().len(), usize::from(first == "b"));
    assert_eq!(drained["disk"]["draining"], true);
    let again = daemon.json(&["disk", "drain", "b"]);
    assert_eq!((&again["moved"], &again["copies"]), (&json!([]), &json!([])));
    let what = ["replica", "create", "vm4", "--image", "base", "--disk", "b"];
    assert!(daemon.fails(&what).contains("drained"));
    daemon.ok(&["disk", "forget", "b"]);
    assert!(!daemon.path("b").join("underlay").exists());
    // The image's copy leaves its disk, too, while replicas stand on it.
    let second = home();
    let drained = daemon.json(&["disk", "drain", &second]);
    assert_eq!(drained["copies"], json!(["base"]));
    let third = home();
    assert!(third != second && third != "b", "{third}");
    daemon.ok(&["image", "verify", "base"]);
    let told = daemon.fails(&["disk", "drain", &third]);
    assert!(told.contains("vm") || told.contains("image base"), "nothing is left to go to: {told}");
    assert_eq!(on_disk_if_there(&daemon, "b"), 0);
    check(&daemon, "vm1", &content);
    let list = daemon.json(&["replica", "list"]);
    assert!(list.as_array().unwrap().iter().all(|replica| replica["disk"] != "b"), "{list}");
}

fn on_disk_if_there(daemon: &Daemon, disk: &str) -> usize {
    let there = Path::exists(&daemon.path(disk).join("underlay"));
    if there { on_disk(daemon, disk).len() } else { 0 }
}

#[test]
fn a_disk_that_may_have_the_replica_is_waited_for_or_given_up() {
    let (mut daemon, content) = start();
    daemon.ok(&["replica", "migrate", "vm1", "--to", "c"]);
    // As a crash right before the rename would leave it, with the new disk away.
    let id = on_disk(&daemon, "c")[0].clone();
    let disk = daemon.json(&["disk", "inspect", "b"])["id"].as_str().unwrap().to_owned();
    daemon.stop();
    let record = daemon.path("c").join("underlay/replicas").join(&id).join("replica.json");
    let text = fs::read_to_string(&record).unwrap();
    let marked =
        text.replacen("\"epoch\": 1,", &format!("\"epoch\": 1,\"moving_to\":\"{disk}\","), 1);
    assert_ne!(text, marked);
    fs::write(&record, marked).unwrap();
    fs::rename(daemon.path("b"), daemon.path("b-away")).unwrap();
    daemon.restart();
    assert_eq!(daemon.json(&["replica", "inspect", "vm1"])["state"], "unsettled");
    let told = daemon.fails(&["replica", "migrate", "vm1", "--to", "a"]);
    assert!(told.contains("disk b") && told.contains("underlay replica settle vm1"), "{told}");
    let problems = daemon.cli(&["fsck", "--json"]).output().unwrap();
    assert!(String::from_utf8_lossy(&problems.stdout).contains("settle"), "{problems:?}");
    daemon.ok(&["replica", "settle", "vm1"]);
    assert_eq!(daemon.json(&["replica", "inspect", "vm1"])["state"], "ready");
    check(&daemon, "vm1", &content);
    let output = daemon.cli(&["replica", "settle", "vm1"]).output().unwrap();
    assert!(complaint(&output).contains("interrupted"), "{output:?}");
}
