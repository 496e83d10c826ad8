//! Invariants checked: every command explains itself with an example; bad usage is one line and
//! exit code 2; a daemon that is not there is told with the remedy; the demo shows the main job and
//! leaves nothing behind.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{
    fs,
    process::{Command, Output, Stdio},
};

#[path = "support/node.rs"]
mod node;

use node::{PROGRAM, complaint};
use serde_json::Value;

fn run(arguments: &[&str]) -> Output {
    Command::new(PROGRAM)
        .args(arguments)
        .env("UNDERLAY_SOCKET", "/nonexistent/underlay.sock")
        .stdin(Stdio::null())
        .output()
        .unwrap()
}

#[test]
fn every_command_explains_itself() {
    let commands = [
        "serve",
        "disk add",
        "disk list",
        "disk inspect",
        "disk remove",
        "image import",
        "image list",
        "image inspect",
        "image copies",
        "image copy",
        "image uncopy",
        "image set",
        "image verify",
        "image rm",
        "replica create",
        "replica list",
        "replica inspect",
        "replica resize",
        "replica rm",
        "status",
        "events",
        "fsck",
        "doctor",
        "demo",
    ];
    for command in commands {
        let mut arguments: Vec<&str> = command.split(' ').collect();
        arguments.push("--help");
        let output = run(&arguments);
        assert_eq!(output.status.code(), Some(0), "{command}");
        let help = String::from_utf8(output.stdout).unwrap();
        for part in ["Example", &format!("underlay {command}"), "--json", "--socket", "Usage:"] {
            let flat = help.split_whitespace().collect::<Vec<_>>().join(" ");
            assert!(flat.contains(part), "{command}: no {part:?} in {help}");
        }
        assert!(output.stderr.is_empty());
    }
    assert_eq!(run(&["--version"]).status.code(), Some(0));
}

#[test]
fn bad_usage_is_one_line_and_two() {
    let long = "x".repeat(4000);
    let cases: &[(&[&str], &str)] = &[
        (&["disk", "add"], "<PATH>"),
        (&["replica", "create", "r", "--image", "i"], "--disk"),
        (&["replica", "create", "a/b", "--image", "i", "--disk", "d"], "a/b"),
        (&["replica", "create", "r", "--image", "i", "--disk", "d", "--size", "huge"], "huge"),
        (&["replica", "inspect", ".."], "letter or digit"),
        (&["replica", "inspect", "a\nb"], "letter or digit"),
        (&["replica", "inspect", &long], "128 bytes"),
        (&["image", "import", "x", "--name", "i", "--sha256", "123"], "64 hexadecimal"),
        (&["image", "import", "x", "--name", "i", "--format", "iso"], "qcow2"),
        (&["disk", "add", "/x", "--tier", "tape"], "nvme"),
        (&["serve", "--metrics", "here"], "here"),
        (&["frobnicate"], "frobnicate"),
        (&["status", "--frobnicate"], "--frobnicate"),
    ];
    for (arguments, told) in cases {
        let output = run(arguments);
        assert_eq!(output.status.code(), Some(2), "{arguments:?}");
        let line = complaint(&output);
        assert!(line.contains(told) && line.len() < 600, "{arguments:?}: {line}");
        assert!(output.stdout.is_empty());

        let output = run(&[arguments, &["--json"][..]].concat());
        assert_eq!(output.status.code(), Some(2));
        let error: Value = serde_json::from_str(&complaint(&output)).unwrap();
        assert_eq!(error["error"]["kind"], "invalid");
        assert!(error["error"]["message"].as_str().unwrap().contains(told), "{error}");
    }
    for arguments in [&[][..], &["disk"], &["image"]] {
        assert_eq!(run(arguments).status.code(), Some(2), "{arguments:?}");
    }
}

#[test]
fn a_daemon_that_is_not_there_is_told_with_the_remedy() {
    for arguments in [&["status"][..], &["disk", "list"], &["replica", "rm", "x"], &["fsck"]] {
        let output = run(arguments);
        assert_eq!(output.status.code(), Some(1), "{arguments:?}");
        let line = complaint(&output);
        assert!(line.contains("/nonexistent/underlay.sock"), "{line}");
        assert!(line.contains("underlay serve"), "{line}");
    }
    let output = run(&["status", "--json"]);
    let error: Value = serde_json::from_str(&complaint(&output)).unwrap();
    assert_eq!(error["error"]["kind"], "unavailable");
    // The option wins over the environment.
    let output = run(&["status", "--socket", "/other/place"]);
    assert!(complaint(&output).contains("/other/place"));
}

#[test]
fn mistakes_in_the_configuration_are_told() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("underlay.toml");
    let serve = |text: &str| {
        fs::write(&file, text).unwrap();
        let output = run(&["serve", "--config", file.to_str().unwrap()]);
        assert_eq!(output.status.code(), Some(1), "{text}: {output:?}");
        complaint(&output)
    };
    assert!(serve("log = \"info\"\nmetrix = 1\n").contains("metrix"));
    assert!(serve("metrics = \"x\"").contains("metrics"));
    assert!(serve("log = \"=/=\"").contains("=/="));
    let missing = run(&["serve", "--config", "/nonexistent/underlay.toml"]);
    assert!(complaint(&missing).contains("/nonexistent/underlay.toml"));
}

#[test]
fn doctor_tells_what_is_there() {
    let output = run(&["doctor", "--json"]);
    let findings: Value = serde_json::from_slice(&output.stdout).unwrap();
    let find = |what: &str| {
        findings
            .as_array()
            .unwrap()
            .iter()
            .find(|it| it["what"] == what)
            .unwrap_or_else(|| panic!("doctor tells nothing of {what}: {findings}"))
    };
    for what in ["kernel", "io_uring", "user", "daemon", "ublk", "probes", "qemu-nbd"] {
        let finding = find(what);
        assert!(!finding["found"].as_str().unwrap().is_empty(), "{finding}");
        assert!(finding["state"] == "ok" || finding["follows"] != "", "{finding}");
    }
    assert_eq!(find("daemon")["state"], "missing");
    let fatal = findings.as_array().unwrap().iter().any(|it| it["state"] == "fatal");
    assert_eq!(output.status.code(), Some(i32::from(fatal)));
}

#[test]
fn the_demo_shows_the_main_job_and_leaves_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let demo = |arguments: &[&str]| {
        let output = Command::new(PROGRAM)
            .arg("demo")
            .args(arguments)
            .env("TMPDIR", directory.path())
            .stdin(Stdio::null())
            .output()
            .unwrap();
        assert_eq!(output.status.code(), Some(0), "{output:?}");
        String::from_utf8(output.stdout).unwrap()
    };
    let report: Value = serde_json::from_str(&demo(&["--json"])).unwrap();
    assert_eq!(report["isolated"], true);
    assert_eq!(report["image_unchanged"], true);
    assert_eq!(report["replicas"].as_array().unwrap().len(), 3);
    let bytes = |key: &str| report[key].as_u64().unwrap();
    assert_eq!(bytes("per_disk_bytes"), 3 * bytes("image_bytes"));
    assert_eq!(bytes("saved_bytes"), 2 * bytes("image_bytes"));
    assert!(bytes("stored_bytes") < bytes("image_bytes") + (16 << 20));
    assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 0, "cleaned up");

    // An image of one's own, of an odd size; and it stays.
    let image = directory.path().join("own.raw");
    fs::write(&image, vec![7; 5_000_000 / 512 * 512 + 512]).unwrap();
    let told = demo(&[image.to_str().unwrap(), "--keep"]);
    assert!(told.contains("replicas are isolated, the image is unchanged"), "{told}");
    assert!(told.contains("nbdinfo 'nbd+unix:///replica/vm1?socket="), "{told}");
    let kept: Vec<_> = fs::read_dir(directory.path()).unwrap().map(|it| it.unwrap()).collect();
    assert_eq!(kept.len(), 2, "{kept:?}");

    let missing = run(&["demo", "/nonexistent/x.qcow2"]);
    assert_eq!(missing.status.code(), Some(1));
    assert!(complaint(&missing).contains("/nonexistent/x.qcow2"));
}

#[test]
fn output_that_nobody_reads_is_no_failure() {
    let mut child = Command::new(PROGRAM)
        .args(["serve", "--help"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    assert!(output.stderr.is_empty(), "{output:?}");
}
