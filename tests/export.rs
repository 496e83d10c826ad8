//! Invariants checked: what is exported is what clients read, as raw and as qcow2, which qemu-img takes
//! for sound; an overlay that was exported comes back on any node that has its image, whole or not at
//! all; a replica that clients have open is not exported by accident.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{
    fs,
    io::{Read, Seek, SeekFrom, Write},
    os::unix::fs::MetadataExt,
    path::Path,
    process::{Command, Stdio},
};

#[path = "support/nbd.rs"]
mod nbd;
#[path = "support/node.rs"]
mod node;

use nbd::{Client, Replies, ZEROES};
use node::{Daemon, until};

const MIB: usize = 1 << 20;
const SIZE: usize = 40 * MIB;

/// A replica of 40 MiB over an image of 6, with data, zeros and the image's content in it.
fn start() -> (Daemon, Vec<u8>, Vec<u8>) {
    let daemon = Daemon::with_disks();
    let byte = |at: usize| (at / 512 + at % 251) as u8 | 1;
    let image: Vec<u8> =
        (0..6 * MIB).map(|at| if at >> 17 & 1 == 0 { byte(at) } else { 0 }).collect();
    daemon.import("base", &image);
    daemon.ok(&["replica", "create", "vm1", "--image", "base", "--disk", "b", "--size", "40M"]);
    let mut content = image.clone();
    content.resize(SIZE, 0);
    let mut client = Client::open(&daemon.nbd_socket(), "replica/vm1", Replies::Simple);
    for (at, len) in [(1000, 5000), (3 * MIB + 7, 2 * MIB), (SIZE - 700, 700), (20 * MIB, 70_000)] {
        client.write(0, at as u64, &vec![at as u8 | 1; len]).unwrap();
        content[at..at + len].fill(at as u8 | 1);
    }
    client.command(0, ZEROES, 131_072 * 4, 300_000).unwrap();
    content[131_072 * 4..131_072 * 4 + 300_000].fill(0);
    client.close();
    (daemon, image, content)
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn qemu_img(arguments: &[&str]) -> bool {
    match Command::new("qemu-img").args(arguments).stdout(Stdio::null()).output() {
        Ok(output) => {
            assert!(output.status.success(), "qemu-img {arguments:?}: {output:?}");
            true
        }
        Err(_) => {
            eprintln!("SKIPPED: qemu-img is not installed: {arguments:?}");
            false
        }
    }
}

#[test]
fn raw_and_qcow2_hold_what_clients_read() {
    let (daemon, image, content) = start();
    let (raw, qcow2) = (daemon.path("vm1.raw"), daemon.path("vm1.qcow2"));
    let told = daemon.json(&["replica", "export", "vm1", text(&raw)]);
    assert_eq!(told["size"], SIZE);
    assert!(fs::read(&raw).unwrap() == content);
    let stored = fs::metadata(&raw).unwrap().blocks() * 512;
    assert!(stored < 9 * MIB as u64, "{stored} bytes: holes stay holes");
    let output = daemon.cli(&["replica", "export", "vm1", "-"]).output().unwrap();
    assert!(output.status.success() && output.stdout == content);
    let told = daemon.fails(&["replica", "export", "vm1", "--format", "qcow2"]);
    assert!(told.contains("name a file"), "{told}");
    daemon.ok(&["replica", "export", "vm1", text(&qcow2), "--format", "qcow2"]);
    if qemu_img(&["check", "-f", "qcow2", text(&qcow2)]) {
        qemu_img(&["compare", "-f", "raw", "-F", "qcow2", text(&raw), text(&qcow2)]);
    }
    // Our own reader takes it, too: the same content is the same image.
    daemon.ok(&["image", "import", text(&qcow2), "--name", "again"]);
    daemon.ok(&["image", "import", text(&raw), "--name", "raw", "--format", "raw"]);
    let digest = |name: &str| daemon.json(&["image", "inspect", name])["digest"].clone();
    assert_eq!(digest("again"), digest("raw"));
    let base = daemon.path("base.raw");
    daemon.ok(&["image", "export", "base", text(&base)]);
    assert!(fs::read(&base).unwrap() == image);
    daemon.ok(&["image", "export", "base", text(&qcow2), "--format", "qcow2"]);
    if qemu_img(&["check", "-f", "qcow2", text(&qcow2)]) {
        qemu_img(&["compare", "-f", "raw", "-F", "qcow2", text(&base), text(&qcow2)]);
    }
    assert!(!fs::exists(daemon.path("vm1.raw.part")).unwrap());
}

#[test]
fn one_that_clients_have_open_is_refused_unless_live() {
    let (daemon, _, content) = start();
    let mut client = Client::open(&daemon.nbd_socket(), "replica/vm1", Replies::Simple);
    let raw = daemon.path("vm1.raw");
    let told = daemon.fails(&["replica", "export", "vm1", text(&raw)]);
    assert!(told.contains("--live") && told.contains("vm1"), "{told}");
    assert!(!raw.exists());
    daemon.ok(&["replica", "export", "vm1", text(&raw), "--live"]);
    assert!(fs::read(&raw).unwrap() == content, "nobody wrote meanwhile");
    // More than is on its way to one who reads slowly.
    for at in (8..32).map(|at| (at * MIB) as u64) {
        client.write(0, at, &vec![at as u8 | 1; MIB]).unwrap();
    }
    client.close();
    until("the client's end", || {
        let clients = daemon.json(&["replica", "inspect", "vm1"])["clients"].clone();
        clients.as_array().unwrap().is_empty()
    });
    // Somebody connects and writes while it is exported, and read slowly.
    let mut export = daemon.cli(&["replica", "export", "vm1", "-"]);
    let mut export = export.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut first = [0; 4096];
    export.stdout.as_mut().unwrap().read_exact(&mut first).unwrap();
    let mut client = Client::open(&daemon.nbd_socket(), "replica/vm1", Replies::Simple);
    client.write(0, 30 * MIB as u64, &[1; 512]).unwrap();
    let output = export.wait_with_output().unwrap();
    let told = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success() && told.contains("--live"), "{told}");
}

#[test]
fn an_overlay_comes_back_where_its_image_is() {
    let (daemon, image, content) = start();
    let file = daemon.path("vm1.overlay");
    daemon.ok(&["replica", "export", "vm1", "--overlay", text(&file)]);
    let bytes = fs::metadata(&file).unwrap().len();
    assert!(bytes < 4 * MIB as u64, "{bytes}: only what was written");
    let other = Daemon::with_disks();
    let import = ["replica", "import", text(&file), "vm9", "--disk", "c"];
    let told = other.fails(&import);
    let digest = daemon.json(&["image", "inspect", "base"])["digest"].as_str().unwrap().to_owned();
    assert!(told.contains("base") && told.contains(&digest), "{told}");
    other.import("renamed", &image);
    other.ok(&import);
    let mut client = Client::open(&other.nbd_socket(), "replica/vm9", Replies::Simple);
    for (number, piece) in content.chunks(MIB).enumerate() {
        let now = client.read((number * MIB) as u64, piece.len() as u32).unwrap();
        assert!(now == piece, "MiB {number}");
    }
    client.close();
    assert!(other.fails(&import).contains("taken"));
    // By way of a pipe.
    let mut child = other.cli(&["replica", "import", "-", "vm8", "--disk", "a"]);
    let mut child = child.stdin(Stdio::piped()).stdout(Stdio::null()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(&fs::read(&file).unwrap()).unwrap();
    assert!(child.wait().unwrap().success());
    // What is damaged leaves nothing.
    let before = other.json(&["replica", "list"]).as_array().unwrap().len();
    let good = fs::read(&file).unwrap();
    for (number, damage) in ["cut", "bit", "header", "none", "image"].into_iter().enumerate() {
        let mut bytes = good.clone();
        match damage {
            "cut" => bytes.truncate(good.len() - 40),
            "bit" => bytes[good.len() / 2] ^= 1,
            "header" => bytes[30] ^= 1,
            "none" => bytes.clear(),
            _ => bytes = image.clone(),
        }
        let mut damaged = fs::File::create(daemon.path("damaged")).unwrap();
        damaged.write_all(&bytes).unwrap();
        damaged.seek(SeekFrom::Start(0)).unwrap();
        let name = format!("x{number}");
        let path = daemon.path("damaged");
        let told = other.fails(&["replica", "import", text(&path), &name, "--disk", "c"]);
        assert!(told.contains(&name), "{damage}: {told}");
    }
    assert_eq!(other.json(&["replica", "list"]).as_array().unwrap().len(), before);
    assert_eq!(other.json(&["fsck"])["problems"], serde_json::json!([]));
    daemon.ok(&["replica", "flatten", "vm1"]);
    let told = daemon.fails(&["replica", "export", "vm1", "--overlay", text(&file)]);
    assert!(told.contains("no image"), "{told}");
}
