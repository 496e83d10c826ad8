//! Invariants checked: what README.md tells to type works, in its order; the files that README.md and
//! ARCHITECTURE.md name are there.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{
    fs,
    path::Path,
    process::{Command, Stdio},
};

#[path = "support/node.rs"]
mod node;

use node::{Daemon, PROGRAM};

const ROOT: &str = env!("CARGO_MANIFEST_DIR");
const IMAGE: &str = "debian-12-genericcloud-amd64.qcow2";
const SOCKET: &str = "/run/underlay/nbd.sock";

fn document(name: &str) -> String {
    fs::read_to_string(Path::new(ROOT).join(name)).unwrap()
}

/// The lines of a document's shell blocks.
fn shell(text: &str) -> Vec<&str> {
    let blocks = text.split("```sh\n").skip(1).map(|rest| rest.split("```").next().unwrap());
    blocks.flat_map(str::lines).collect()
}

#[test]
fn the_walk_works_as_it_is_written() {
    let daemon = Daemon::start();
    for disk in ["nvme0", "nvme1", "hdd0"] {
        fs::create_dir_all(daemon.path("mnt").join(disk)).unwrap();
    }
    let image: Vec<u8> = (0..3 << 20).map(|at| (at / 512 + at % 251) as u8 | 1).collect();
    fs::write(daemon.path(IMAGE), &image).unwrap();
    let here = |line: &str| {
        line.replace("/mnt/", &format!("{}/", daemon.path("mnt").display()))
            .replace(SOCKET, &daemon.nbd_socket().display().to_string())
    };
    let readme = document("README.md");
    let (mut commands, mut clients) = (0, 0);
    for line in shell(&readme) {
        let word = line.split(' ').next().unwrap();
        if line.contains("/dev/underlay/") || line.starts_with("umount") || attaches(line) {
            // Run by the guest rig, which has the driver; here, that it is told what is missing.
            if attaches(line) && !Path::new("/dev/ublk-control").exists() {
                let (_, rest) = line.split_once(' ').unwrap();
                let told = daemon.fails(&rest.split(' ').collect::<Vec<_>>());
                assert!(
                    told.contains("modprobe ublk_drv") || told.contains("not attached"),
                    "{told}"
                );
            }
            continue;
        }
        let command = match word {
            "underlay" if line == "underlay serve &" => continue,
            "underlay" => {
                commands += 1;
                here(line).replacen("underlay", PROGRAM, 1)
            }
            "nbdinfo" | "nbdcopy" => {
                clients += 1;
                if Command::new(word).arg("--version").output().is_err() {
                    eprintln!("SKIPPED: {word} is not installed: {line}");
                    continue;
                }
                here(line)
            }
            "qemu-system-x86_64" => {
                // Run by `cargo xtask test`, with a guest in the image; here, that it names what is there.
                assert!(line.contains(&format!("nbd+unix:///replica/vm1?socket={SOCKET}")));
                continue;
            }
            "cargo" => continue,
            _ => panic!("README.md tells to type what no test knows: {line}"),
        };
        let output = Command::new("sh")
            .args(["-c", &command])
            .current_dir(daemon.dir.path())
            .env("UNDERLAY_SOCKET", daemon.socket())
            .stdin(Stdio::null())
            .output()
            .unwrap();
        assert!(output.status.success(), "{line}: {output:?}\n{}", daemon.log());
    }
    assert!(commands >= 10 && clients == 2, "{commands} commands, {clients} clients");
    if let Ok(backup) = fs::metadata(daemon.path("backup.raw")) {
        assert_eq!(backup.len(), 20 << 30, "nbdcopy took all of vm1");
    }
}

fn attaches(line: &str) -> bool {
    line.starts_with("underlay attach") || line.starts_with("underlay detach")
}

/// All Rust source of the repository, as one text.
fn sources() -> String {
    let mut text = String::new();
    let mut left = ["src", "tests", "xtask/src"].map(|dir| Path::new(ROOT).join(dir)).to_vec();
    while let Some(dir) = left.pop() {
        for entry in fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path()) {
            if entry.is_dir() {
                left.push(entry);
            } else if entry.extension().is_some_and(|extension| extension == "rs") {
                text += &fs::read_to_string(entry).unwrap();
            }
        }
    }
    text
}

#[test]
fn each_line_of_the_failure_model_and_of_hostile_clients_has_its_test() {
    let sources = sources();
    let failures = tests_of(&document("docs/failure-model.md"), &sources);
    let clients = tests_of(&document("docs/hostile.md"), &sources);
    assert!(failures >= 25 && clients >= 30, "{failures} and {clients} tests");
}

/// Looks that the tests in the last column of a document's table are there; how many they are.
fn tests_of(text: &str, sources: &str) -> usize {
    let mut count = 0;
    for line in text.lines().filter(|line| line.starts_with("| ")) {
        let tests = line.trim_end_matches('|').rsplit('|').next().unwrap().trim();
        if tests == "test" || (tests.is_empty() && line.contains("**not noticed**")) {
            continue;
        }
        assert!(!tests.is_empty(), "no test: {line}");
        for test in tests.split(", ") {
            let found = match test.strip_prefix('`').and_then(|test| test.strip_suffix('`')) {
                Some(function) => sources.contains(&format!("fn {function}()")),
                None => sources.contains(test.trim_end_matches('"')),
            };
            assert!(found, "no such test: {test}");
            count += 1;
        }
    }
    count
}

#[test]
fn what_the_documents_name_is_there() {
    for name in ["README.md", "ARCHITECTURE.md", "CONTRIBUTING.md"] {
        let text = document(name);
        for link in text.split("](").skip(1).map(|rest| rest.split(')').next().unwrap()) {
            assert!(Path::new(ROOT).join(link).exists(), "{name} links to {link}");
        }
        assert!(text.lines().all(|line| line.chars().count() <= 120 || line.starts_with("qemu")));
    }
    let text = document("ARCHITECTURE.md");
    assert!(text.lines().count() <= 200);
    let mut named = 0;
    for word in text.split('`').skip(1).step_by(2).filter(|word| word.ends_with(".rs")) {
        let found = [
            "",
            "src",
            "src/control",
            "src/cow",
            "src/promote",
            "src/source",
            "src/attach",
            "src/io",
            "src/blockdev",
            "src/blockdev/nbd",
            "src/blockdev/ublk",
        ]
        .iter()
        .any(|place| Path::new(ROOT).join(place).join(word).exists());
        assert!(found, "ARCHITECTURE.md names {word}");
        named += 1;
    }
    assert!(named > 20, "{named}");
}
