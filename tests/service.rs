//! Invariants checked: the commands of the README work from disk to replica; images and replicas
//! are served over NBD; hostile names and requests are refused in words; an import that is given up
//! leaves nothing; what is attached is not removed; the API is as its document says.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{
    fs,
    io::{Read, Write},
    os::unix::{fs::PermissionsExt, net::UnixStream},
    process::Stdio,
};

#[path = "support/nbd.rs"]
mod nbd;
#[path = "support/node.rs"]
mod node;

use nbd::{Client, Replies};
use node::{Daemon, exchange, until};
use serde_json::{Value, json};

const MIB: usize = 1 << 20;

/// Content without a zero block.
fn content(len: usize) -> Vec<u8> {
    (0..len).map(|at| (at / 512 + at % 251) as u8 | 1).collect()
}

fn read(daemon: &Daemon, export: &str, offset: u64, len: usize) -> Vec<u8> {
    let mut client = Client::open(&daemon.nbd_socket(), export, Replies::Simple);
    client.read(offset, len as u32).unwrap()
}

#[test]
fn from_a_disk_to_replicas_over_nbd() {
    let daemon = Daemon::with_disks();
    let bytes = content(3 * MIB + 512);
    daemon.import("base", &bytes);
    for (replica, disk) in [("vm1", "a"), ("vm2", "b"), ("vm3", "c")] {
        let told = daemon.json(&["replica", "create", replica, "--image", "base", "--disk", disk]);
        assert_eq!(told["size"], bytes.len());
        assert_eq!(told["export"], format!("replica/{replica}"));
        assert!(told["created_in_ms"].as_f64().unwrap() > 0.0);
    }
    let mut vm1 = Client::open(&daemon.nbd_socket(), "replica/vm1", Replies::Simple);
    assert_eq!(vm1.size, bytes.len() as u64);
    vm1.write(0, 5000, &[0xee; 3000]).unwrap();
    vm1.flush().unwrap();
    let mut expected = bytes.clone();
    expected[5000..8000].fill(0xee);
    assert!(vm1.read(0, bytes.len() as u32).unwrap() == expected);
    assert!(read(&daemon, "replica/vm2", 0, bytes.len()) == bytes, "isolated");
    assert!(read(&daemon, "image/base", 0, bytes.len()) == bytes, "unchanged");

    let status = daemon.json(&["status"]);
    assert_eq!(status["node"]["images"], 1);
    assert_eq!(status["node"]["replicas"], 3);
    let (image, per_disk) = (&status["node"]["image_bytes"], &status["node"]["per_disk_bytes"]);
    assert_eq!(per_disk.as_u64().unwrap(), 3 * image.as_u64().unwrap());
    assert!(daemon.ok(&["status"]).contains("66.7 % of a copy per disk"));
    assert!(daemon.ok(&["image", "verify", "base"]).contains("is what was imported"));

    // What is attached stays, and the refusal says who holds it.
    let told = daemon.fails(&["replica", "rm", "vm1"]);
    assert!(told.contains(&format!("pid {}", std::process::id())), "{told}");
    assert!(daemon.fails(&["image", "rm", "base"]).contains("vm2"));
    assert!(daemon.fails(&["disk", "remove", "a"]).contains("vm1"));
    assert!(read(&daemon, "replica/vm1", 5000, 3000) == [0xee; 3000]);
    drop(vm1);
    until("removal once the client is gone", || {
        daemon.cli(&["replica", "rm", "vm1"]).output().unwrap().status.success()
    });
    assert!(daemon.fails(&["replica", "inspect", "vm1"]).contains("vm1"));
    daemon.ok(&["replica", "rm", "vm2"]);
    daemon.ok(&["replica", "rm", "vm3"]);
    daemon.ok(&["image", "rm", "base"]);
    for disk in ["a", "b", "c"] {
        daemon.ok(&["disk", "remove", disk]);
        assert_eq!(fs::read_dir(daemon.path(disk)).unwrap().count(), 0, "nothing is left");
    }
}

#[test]
fn a_replica_grows_while_it_is_attached() {
    let daemon = Daemon::with_disks();
    daemon.import("base", &content(MIB));
    daemon.ok(&["replica", "create", "vm1", "--image", "base", "--disk", "b", "--size", "2M"]);
    let mut before = Client::open(&daemon.nbd_socket(), "replica/vm1", Replies::Simple);
    before.write(0, 2 * MIB as u64 - 4096, &[1; 4096]).unwrap();
    let grown = daemon.json(&["replica", "resize", "vm1", "1T"]);
    assert_eq!(grown["size"], 1u64 << 40);
    let mut after = Client::open(&daemon.nbd_socket(), "replica/vm1", Replies::Simple);
    assert_eq!(after.size, 1 << 40);
    after.write(0, (1 << 40) - 512, &[2; 512]).unwrap();
    assert_eq!(before.read(2 * MIB as u64 - 4096, 4096).unwrap(), [1; 4096]);
    after.flush().unwrap();
    assert!(daemon.fails(&["replica", "resize", "vm1", "1G"]).contains("grow"));
    assert!(daemon.fails(&["replica", "resize", "vm1", "1099511627777"]).contains("512"));
    let told =
        daemon.fails(&["replica", "create", "s", "--image", "base", "--disk", "a", "--size", "1K"]);
    assert!(told.contains("replica s"), "{told}");
}

#[test]
fn images_come_from_files_and_streams_and_are_one() {
    let daemon = Daemon::with_disks();
    let bytes = content(MIB);
    daemon.import("file", &bytes);
    let mut child = daemon
        .cli(&["image", "import", "-", "--name", "stream", "--format", "raw", "--json"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(&bytes).unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{output:?}");
    let image: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(image["names"], json!(["file", "stream"]));
    for line in String::from_utf8(output.stderr).unwrap().lines() {
        let progress: Value = serde_json::from_str(line).unwrap();
        assert!(progress["progress"]["done_bytes"].is_u64(), "{line}");
    }
    assert_eq!(daemon.json(&["image", "list"]).as_array().unwrap().len(), 1);

    let file = daemon.path("import.raw");
    fs::write(&file, &bytes).unwrap();
    let wrong =
        ["image", "import", file.to_str().unwrap(), "--name", "w", "--sha256", &"0".repeat(64)];
    let told = daemon.fails(&wrong);
    assert!(told.contains(&"0".repeat(64)) && told.contains("image w"), "{told}");
    let told = daemon.fails(&["image", "import", "/nonexistent/x", "--name", "w"]);
    assert!(told.contains("/nonexistent/x"), "{told}");
    let told = daemon.fails(&["image", "import", "/tmp", "--name", "w"]);
    assert!(told.contains("directory"), "{told}");
    let told =
        daemon.fails(&["image", "import", file.to_str().unwrap(), "--name", "w", "--disk", "z"]);
    assert!(told.contains('z'), "{told}");
    fs::write(&file, content(2 * MIB)).unwrap();
    let told = daemon.fails(&["image", "import", file.to_str().unwrap(), "--name", "file"]);
    assert!(told.contains("file") && told.contains("taken"), "{told}");
    assert_eq!(daemon.json(&["image", "list"]).as_array().unwrap().len(), 1);
    assert_nothing_is_staged(&daemon);
}

fn staged(daemon: &Daemon) -> usize {
    let images = ["a", "b", "c"].map(|disk| daemon.path(disk).join("underlay/images"));
    let entries = images.iter().flat_map(|path| fs::read_dir(path).unwrap());
    entries
        .filter(|entry| entry.as_ref().unwrap().file_name().as_encoded_bytes()[0] == b'.')
        .count()
}

fn assert_nothing_is_staged(daemon: &Daemon) {
    until("cleaning up of a failed import", || staged(daemon) == 0);
}

#[test]
fn an_import_that_is_given_up_leaves_nothing() {
    let daemon = Daemon::with_disks();
    let mut child = daemon
        .cli(&["image", "import", "-", "--name", "half", "--format", "raw"])
        .stdin(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let mut stdin = child.stdin.take().unwrap();
    stdin.write_all(&content(8 * MIB)).unwrap();
    until("the import's beginning", || staged(&daemon) == 1);
    child.kill().unwrap();
    child.wait().unwrap();
    assert_nothing_is_staged(&daemon);
    assert_eq!(daemon.json(&["image", "list"]), json!([]));

    // A length that was promised and not kept, and a chunk that breaks off.
    for request in [
        "PUT /v1/images/half?format=raw HTTP/1.1\r\nhost: x\r\ncontent-length: 99999\r\n\r\nabc",
        "PUT /v1/images/half?format=raw HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n5\r\nab",
    ] {
        let mut stream = UnixStream::connect(daemon.socket()).unwrap();
        stream.write_all(request.as_bytes()).unwrap();
        stream.shutdown(std::net::Shutdown::Write).unwrap();
        let mut answer = String::new();
        // Whether an answer comes at all is open: the client broke the protocol.
        let _ = stream.read_to_string(&mut answer);
        assert!(!answer.contains("\"done\""), "{answer}");
    }
    assert_nothing_is_staged(&daemon);
    assert_eq!(daemon.json(&["image", "list"]), json!([]));
}

#[test]
fn names_are_refused_in_words_everywhere() {
    let daemon = Daemon::with_disks();
    daemon.import("base", &content(MIB));
    let long = "x".repeat(4000);
    let names = ["a/b", "/", "..", ".", "", "a\nb", "\u{1b}[31m", "-x", "ü", "a\0b", &long];
    for name in names {
        let escaped: String = name.bytes().map(|byte| format!("%{byte:02X}")).collect();
        for kind in ["disks", "images", "replicas"] {
            for method in ["GET", "DELETE"] {
                let (status, body) = daemon.http(method, &format!("/v1/{kind}/{escaped}"), b"");
                let wanted = if name.is_empty() { 404 } else { 400 };
                assert_eq!(status, wanted, "{method} {kind} {name:?}: {body}");
                assert!(body.contains("\"error\"") && body.len() < 1000, "{body}");
                assert!(name.is_empty() || body.contains("a name is"), "{body}");
            }
        }
        let create = |name: &str, image: &str, disk: &str| {
            json!({"name": name, "image": image, "disk": disk}).to_string()
        };
        for body in [create(name, "base", "a"), create("r", name, "a"), create("r", "base", name)] {
            let (status, body) = daemon.http("POST", "/v1/replicas", body.as_bytes());
            assert_eq!(status, 400, "{name:?}: {body}");
            assert!(body.contains("a name is"), "{body}");
        }
        let disk = json!({"path": daemon.path("a"), "name": name}).to_string();
        assert_eq!(daemon.http("POST", "/v1/disks", disk.as_bytes()).0, 400);
        let upload = format!("/v1/images/{escaped}?format=raw");
        assert!(
            matches!(daemon.http("PUT", &upload, &content(MIB)).0, 400 | 404 | 405),
            "{name:?}"
        );

        // And over NBD: an answer, no export.
        let mut client = Client::connect(&daemon.nbd_socket());
        client.send(&[0, 0, 0, 3]);
        for prefix in ["replica/", "image/", ""] {
            client.send(&nbd::go(&format!("{prefix}{name}")));
            let (_, reply, told) = client.option_reply();
            assert!(reply & 1 << 31 != 0, "{name:?}: {}", String::from_utf8_lossy(&told));
        }
    }
    assert_eq!(daemon.json(&["replica", "list"]), json!([]));
    assert!(daemon.json(&["fsck"])["problems"].as_array().unwrap().is_empty());
}

#[test]
fn hostile_requests_are_refused() {
    let daemon = Daemon::with_disks();
    let big = vec![b' '; 1 << 20];
    for (method, path, body, status) in [
        ("GET", "/v2/status", &b""[..], 404),
        ("GET", "/", b"", 404),
        ("PATCH", "/v1/status", b"", 405),
        ("POST", "/v1/replicas", b"", 400),
        ("POST", "/v1/replicas", b"{", 400),
        ("POST", "/v1/replicas", b"[1,2", 400),
        ("POST", "/v1/replicas", b"\xff\xfe", 400),
        ("POST", "/v1/replicas", br#"{"name":"x","image":"y","disk":"z","colour":"red"}"#, 400),
        ("POST", "/v1/replicas", br#"{"name":"x","image":"y","disk":"a"}"#, 404),
        ("POST", "/v1/replicas/x/resize", br#"{"size":-1}"#, 400),
        ("POST", "/v1/replicas/x/resize", br#"{"size":99999999999999999999}"#, 400),
        ("POST", "/v1/disks", br#"{"path":"relative"}"#, 400),
        ("POST", "/v1/disks", br#"{"path":"/etc/passwd"}"#, 400),
        ("POST", "/v1/images", br#"{"name":"x","source":{"url":"file:///etc/passwd"}}"#, 400),
        ("POST", "/v1/images", br#"{"name":"x","source":{"url":"/etc/passwd"}}"#, 400),
        (
            "POST",
            "/v1/images",
            br#"{"name":"x","source":{"file":{"path":"/etc/passwd","device":1,"inode":1}}}"#,
            404,
        ),
        ("PUT", "/v1/images/x?format=floppy", b"abc", 400),
        ("PUT", "/v1/images/x?colour=red", b"abc", 400),
        ("PUT", "/v1/images/x?sha256=zz", b"abc", 400),
        ("POST", "/v1/fsck", br#"{"repair":"please"}"#, 400),
        ("POST", "/v1/replicas", &big, 400),
        ("GET", "/v1/disks/%ff%fe", b"", 400),
        ("GET", "/v1/disks/none", b"", 404),
    ] {
        let (got, body) = daemon.http(method, path, body);
        assert_eq!(got, status, "{method} {path}: {body}");
        let error: Value = serde_json::from_str(&body).unwrap_or_else(|_| panic!("JSON: {body}"));
        assert!(error["error"]["message"].as_str().unwrap().len() > 5, "{body}");
    }
    for garbage in [&b"\0\0\0\0"[..], b"GET\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", &[b'A'; 1 << 20]] {
        let answer = exchange(&daemon.socket(), garbage);
        assert!(answer.is_empty() || answer.starts_with("HTTP/1.1 4"), "{answer}");
    }
    // A client that says nothing holds nobody up.
    let _silent: Vec<_> = (0..50).map(|_| UnixStream::connect(daemon.socket()).unwrap()).collect();
    assert_eq!(daemon.http("GET", "/v1/status", b"").0, 200);
    assert!(daemon.json(&["fsck"])["problems"].as_array().unwrap().is_empty());
}

#[test]
fn the_document_and_the_metrics_are_served() {
    let daemon = Daemon::with_disks();
    daemon.import("base", &content(MIB));
    daemon.ok(&["replica", "create", "vm1", "--image", "base", "--disk", "a"]);
    let mut vm1 = Client::open(&daemon.nbd_socket(), "replica/vm1", Replies::Simple);
    vm1.write(0, 0, &[1; 4096]).unwrap();
    vm1.flush().unwrap();
    let (status, document) = daemon.http("GET", "/openapi.json", b"");
    assert_eq!(status, 200);
    assert_eq!(document, underlay::control::document());
    let (status, plain) = daemon.http("GET", "/metrics", b"");
    assert_eq!(status, 200);
    assert!(plain.contains("\n# TYPE underlay_replica_commits_total counter\n"), "{plain}");
    let asked = "GET /metrics HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\
                 accept: application/openmetrics-text;version=1.0.0,text/plain;q=0.5\r\n\r\n";
    let text = exchange(&daemon.socket(), asked.as_bytes());
    assert!(text.contains("content-type: application/openmetrics-text; version=1.0.0"), "{text}");
    assert!(text.contains("\n# UNIT underlay_replica_map_bytes bytes\n"), "{text}");
    for sample in [
        "underlay_disk_up{disk=\"a\"} 1",
        "underlay_image_replicas{image=\"base\"} 1",
        "underlay_replica_info{replica=\"vm1\",disk=\"a\",image=\"base\"} 1",
        "underlay_replica_clients{replica=\"vm1\"} 1",
        "underlay_replica_size_bytes{replica=\"vm1\"} 1048576",
        "underlay_replica_commits_total{replica=\"vm1\"} 1",
        "underlay_replica_creation_seconds_count 1",
        "underlay_export_operations_total{export=\"replica/vm1\",front=\"nbd\",op=\"write\"} 1",
        "underlay_export_bytes_total{export=\"replica/vm1\",front=\"nbd\",op=\"write\"} 4096",
        "underlay_nbd_connections 1",
        "process_resident_memory_bytes",
    ] {
        assert!(text.lines().any(|line| line.starts_with(sample)), "no {sample} in {text}");
    }
    assert!(text.ends_with("# EOF\n"));
}

#[test]
fn the_sockets_are_closed_to_the_world() {
    let daemon = Daemon::start();
    for socket in [daemon.socket(), daemon.nbd_socket()] {
        assert_eq!(fs::metadata(socket).unwrap().permissions().mode() & 0o777, 0o660);
    }
}

#[test]
fn a_damaged_image_is_told() {
    let daemon = Daemon::with_disks();
    daemon.import("base", &content(MIB));
    let image = daemon.json(&["image", "inspect", "base"]);
    let data = std::path::Path::new(image["copies"][0]["path"].as_str().unwrap()).join("data");
    fs::set_permissions(&data, fs::Permissions::from_mode(0o600)).unwrap();
    let mut bytes = fs::read(&data).unwrap();
    bytes[300_000] ^= 1;
    fs::write(&data, bytes).unwrap();
    let output = daemon.cli(&["image", "verify", "base", "--json"]).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    let found: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(found["copies"][0]["bad_chunks"], json!([1]));
    assert_eq!(found["sound"], false);
    // Cut short: the copy does not open, and is named.
    fs::OpenOptions::new().write(true).open(&data).unwrap().set_len(4096).unwrap();
    let told = daemon.cli(&["image", "verify", "base"]).output().unwrap();
    assert_eq!(told.status.code(), Some(1));
    let told = String::from_utf8(told.stdout).unwrap();
    assert!(told.contains("image base on disk a could not be verified: "), "{told}");
}

#[test]
fn an_overlay_that_was_cut_short_is_told() {
    let daemon = Daemon::with_disks();
    daemon.import("base", &content(MIB));
    daemon.ok(&["replica", "create", "vm1", "--image", "base", "--disk", "b"]);
    let id = daemon.json(&["replica", "inspect", "vm1"])["id"].as_str().unwrap().to_owned();
    let data = daemon.path("b").join("underlay/replicas").join(id).join("data");
    fs::OpenOptions::new().write(true).open(data).unwrap().set_len(MIB as u64 / 2).unwrap();
    // What is missing would read as zeros.
    let mut client = Client::connect(&daemon.nbd_socket());
    client.send(&[vec![0, 0, 0, 3], nbd::go("replica/vm1")].concat());
    let (_, reply, message) = client.option_reply();
    let message = String::from_utf8(message).unwrap();
    assert_ne!(reply & 0x8000_0000, 0, "{message}");
    assert!(message.contains("replica vm1") && message.contains("cut short"), "{message}");
}
