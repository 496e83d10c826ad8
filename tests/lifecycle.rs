//! Invariants checked: a daemon that is told to stop flushes and leaves; one that is killed
//! recovers all that was acknowledged; two never share a socket, a state or a disk; systemd is spoken to.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{
    fs,
    io::{BufRead, BufReader, Read},
    net::{TcpListener, TcpStream},
    os::{
        fd::OwnedFd,
        unix::net::{UnixDatagram, UnixListener},
    },
    process::{Command, Stdio},
};

#[path = "support/nbd.rs"]
mod nbd;
#[path = "support/node.rs"]
mod node;

use nbd::{Client, Replies};
use nix::sys::signal::Signal;
use node::{Daemon, PATIENCE, PROGRAM, complaint, until};

const MIB: usize = 1 << 20;

#[test]
fn what_was_acknowledged_survives_a_stop_and_a_kill() {
    let mut daemon = Daemon::with_disks();
    daemon.import("base", &vec![9; MIB]);
    daemon.ok(&["replica", "create", "vm1", "--image", "base", "--disk", "b"]);
    let mut expected = vec![9; MIB];
    for round in 0..6u8 {
        let mut vm1 = Client::open(&daemon.nbd_socket(), "replica/vm1", Replies::Simple);
        assert!(vm1.read(0, MIB as u32).unwrap() == expected, "round {round}");
        let at = usize::from(round) * 100_000 + 77;
        expected[at..at + 20_000].fill(round + 1);
        vm1.write(0, at as u64, &[round + 1; 20_000]).unwrap();
        if round % 2 == 0 {
            // Stopped with the client attached and nothing flushed by it.
            assert_eq!(daemon.stop(), Some(0), "{}", daemon.log());
            assert!(!daemon.socket().exists() && !daemon.nbd_socket().exists());
        } else {
            // Flushed or not: the kernel goes on, and so does what it was given.
            if round % 4 == 1 {
                vm1.flush().unwrap();
            }
            daemon.kill();
            assert!(daemon.socket().exists(), "a stale socket is left, and replaced");
        }
        daemon.restart();
    }
    assert!(daemon.json(&["fsck"])["problems"].as_array().unwrap().is_empty());
    assert_eq!(daemon.json(&["replica", "inspect", "vm1"])["state"], "ready");
}

#[test]
fn sigint_ends_it_too() {
    let mut daemon = Daemon::start();
    daemon.signal(Signal::SIGINT);
    assert_eq!(daemon.ended(), Some(0));
    assert!(daemon.log().contains("SIGINT"));
}

#[test]
fn an_import_under_way_does_not_hold_the_stop_up() {
    let mut daemon = Daemon::with_disks();
    let mut import = daemon
        .cli(&["image", "import", "-", "--name", "half", "--format", "raw"])
        .stdin(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let images = daemon.path("a").join("underlay/images");
    let others = ["b", "c"].map(|disk| daemon.path(disk).join("underlay/images"));
    until("the import's beginning", || {
        let count = |path: &std::path::Path| fs::read_dir(path).unwrap().count();
        count(&images) + others.iter().map(|it| count(it)).sum::<usize>() == 1
    });
    let started = std::time::Instant::now();
    daemon.stop();
    assert!(started.elapsed() < PATIENCE / 6, "it took {:?}", started.elapsed());
    drop(import.stdin.take());
    let output = import.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    complaint(&output);
    daemon.restart();
    assert_eq!(daemon.json(&["image", "list"]), serde_json::json!([]));
    assert!(daemon.json(&["fsck"])["problems"].as_array().unwrap().is_empty());
}

#[test]
fn two_daemons_never_share_anything() {
    let first = Daemon::with_disks();
    let second = Daemon::start();
    let fails = |mut command: Command| {
        let output = command.stdout(Stdio::piped()).stderr(Stdio::piped()).output().unwrap();
        assert_eq!(output.status.code(), Some(1), "{output:?}");
        let told = String::from_utf8(output.stderr).unwrap();
        told.lines().last().unwrap().to_owned()
    };
    let told = fails(first.command());
    assert!(told.contains("u.sock") && told.contains("another daemon"), "{told}");
    let mut command = Command::new(PROGRAM);
    command.arg("serve").arg("--state").arg(first.path("state"));
    command.arg("--socket").arg(first.path("u2.sock")).arg("--nbd-socket");
    command.arg(first.path("n2.sock"));
    let told = fails(command);
    assert!(told.contains("state") && told.contains(&first.pid().to_string()), "{told}");
    assert!(!first.path("u2.sock").exists(), "cleaned up after itself");

    let disk = first.path("a");
    let told = second.fails(&["disk", "add", disk.to_str().unwrap()]);
    assert!(told.contains(disk.to_str().unwrap()) && told.contains("another"), "{told}");
    assert_eq!(first.json(&["disk", "inspect", "a"])["state"], "present");
}

#[test]
fn a_disk_that_is_gone_is_told_and_comes_back() {
    let mut daemon = Daemon::with_disks();
    daemon.import("base", &vec![9; MIB]);
    let on = daemon.json(&["image", "inspect", "base"])["copies"][0]["disk"].clone();
    let other = if on == "b" { "c" } else { "b" };
    daemon.ok(&["replica", "create", "vm1", "--image", "base", "--disk", other]);
    daemon.stop();
    let (here, away) = (daemon.path(other), daemon.path("away"));
    fs::rename(&here, &away).unwrap();
    daemon.restart();
    let disk = daemon.json(&["disk", "inspect", other]);
    assert_eq!(disk["state"], "missing");
    assert!(disk["reason"].as_str().unwrap().len() > 10, "{disk}");
    let told = daemon.fails(&["image", "rm", "base"]);
    assert!(told.contains("vm1"), "its reference holds the image: {told}");
    let mut client = Client::connect(&daemon.nbd_socket());
    client.send(&[0, 0, 0, 3]);
    client.send(&nbd::go("replica/vm1"));
    assert!(client.option_reply().1 & 1 << 31 != 0, "not served");
    daemon.stop();
    fs::rename(&away, &here).unwrap();
    daemon.restart();
    let mut vm1 = Client::open(&daemon.nbd_socket(), "replica/vm1", Replies::Simple);
    assert!(vm1.read(0, MIB as u32).unwrap() == vec![9; MIB]);
}

#[test]
fn systemd_hears_of_start_and_stop() {
    let mut daemon = Daemon::start();
    daemon.stop();
    let notify = UnixDatagram::bind(daemon.path("notify")).unwrap();
    notify.set_read_timeout(Some(PATIENCE)).unwrap();
    let heard = || {
        let mut bytes = [0; 1024];
        let len = notify.recv(&mut bytes).unwrap();
        String::from_utf8_lossy(&bytes[..len]).into_owned()
    };
    let mut command = daemon.command();
    let mut child = command
        .env("NOTIFY_SOCKET", daemon.path("notify"))
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    assert!(heard().contains("READY=1"));
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(child.id() as i32), Signal::SIGTERM).unwrap();
    assert!(heard().contains("STOPPING=1"));
    assert!(child.wait().unwrap().success());
}

#[test]
fn activated_sockets_are_served_and_left_in_place() {
    let daemon = Daemon::start();
    let path = daemon.path("activated.sock");
    let listener = OwnedFd::from(UnixListener::bind(&path).unwrap());
    let serve = |names: &str| {
        let mut command = activated(&listener, names);
        command.arg("serve").arg("--state").arg(daemon.path("state2"));
        command.arg("--socket").arg(daemon.path("unused.sock"));
        command.arg("--nbd-socket").arg(daemon.path("n2.sock"));
        command.stdout(Stdio::null()).stderr(Stdio::piped());
        command
    };
    let mut child = serve("control").spawn().unwrap();
    let status = || {
        let mut command = Command::new(PROGRAM);
        command.args(["status", "--json"]).arg("--socket").arg(&path).output().unwrap()
    };
    // It waits in the kernel's queue until the daemon is there.
    assert!(status().status.success());
    assert!(!daemon.path("unused.sock").exists());
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(child.id() as i32), Signal::SIGTERM).unwrap();
    assert!(child.wait().unwrap().success());
    assert!(path.exists(), "the service manager's socket is its own");

    // One that nobody knows, one of the wrong kind.
    for name in ["telnet", "nbd-tcp"] {
        let output = serve(name).output().unwrap();
        assert_eq!(output.status.code(), Some(1));
        let told = String::from_utf8(output.stderr).unwrap();
        assert!(told.contains(name), "{told}");
    }
}

#[test]
fn an_activated_tcp_socket_is_served_as_the_configuration_says() {
    let daemon = Daemon::start();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let listener = OwnedFd::from(listener);
    let config = daemon.path("activated.toml");
    let serve = |text: &str| {
        std::fs::write(&config, text).unwrap();
        let mut command = activated(&listener, "nbd-tcp");
        command.args(["serve", "--json", "--config"]).arg(&config);
        command.arg("--state").arg(daemon.path("state2")).arg("--socket").arg(daemon.path("s2"));
        command.arg("--nbd-socket").arg(daemon.path("n2.sock"));
        command
    };
    let output = serve("").output().unwrap();
    let told = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.code() == Some(1) && told.contains("nbd_listen"), "{told}");
    // The address is the socket's, whatever the configuration says.
    let mut child = serve("nbd_listen = \"1\"\nnbd_insecure = true\n")
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let mut client = TcpStream::connect(address).unwrap();
    let mut greeting = [0; 18];
    client.read_exact(&mut greeting).unwrap();
    assert_eq!(&greeting[..16], b"NBDMAGICIHAVEOPT");
    let told = BufReader::new(child.stdout.take().unwrap()).lines().map(Result::unwrap);
    let mut told = told.filter(|line| line.contains("nbd_address"));
    assert!(told.next().unwrap().contains(&address.to_string()));
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(child.id() as i32), Signal::SIGTERM).unwrap();
    assert!(child.wait().unwrap().success());
}

/// The program with `listener` handed over as a service manager does: descriptor 3, and the process's own
/// number.
fn activated(listener: &OwnedFd, names: &str) -> Command {
    let mut command = Command::new("sh");
    command.arg("-c").arg("LISTEN_PID=$$ LISTEN_FDS=1 exec \"$0\" \"$@\" 3<&0 0</dev/null");
    command.arg(PROGRAM).env("LISTEN_FDNAMES", names).stdin(listener.try_clone().unwrap());
    command
}
