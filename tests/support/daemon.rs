//! A daemon for tests: one disk, the image `base` and replicas of it, in a directory of its own.
//!
//! Everything goes through the program's own command line. The daemon is killed when the value is
//! dropped, and its log printed where the test failed.

#![allow(dead_code, clippy::unwrap_used, reason = "every test file uses a part of it")]

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

/// The program under test.
const PROGRAM: &str = env!("CARGO_BIN_EXE_underlay");
/// How long starting or stopping may take.
const PATIENCE: Duration = Duration::from_secs(30);

/// A running daemon and its directory.
pub struct Daemon {
    pub dir: tempfile::TempDir,
    process: Option<Child>,
}

impl Daemon {
    /// Starts a daemon with nothing in it but the disk `d`.
    pub fn start() -> Daemon {
        let mut daemon = Daemon { dir: tempfile::tempdir().unwrap(), process: None };
        daemon.spawn();
        fs::create_dir(daemon.path("disk")).unwrap();
        daemon.run(&["disk", "add", daemon.path("disk").to_str().unwrap(), "--name", "d"]);
        daemon
    }

    /// Starts the process on the directory's state and waits until it answers.
    pub fn spawn(&mut self) {
        let log = fs::File::options().create(true).append(true).open(self.path("log")).unwrap();
        let child = Command::new(PROGRAM)
            .args(["serve", "--state"])
            .arg(self.path("state"))
            .arg("--socket")
            .arg(self.path("control"))
            .arg("--nbd-socket")
            .arg(self.path("nbd"))
            .args(["--metrics", "127.0.0.1:0"])
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .unwrap();
        self.process = Some(child);
        let deadline = Instant::now() + PATIENCE;
        while !self.command(&["status"]).output().unwrap().status.success() {
            assert!(Instant::now() < deadline, "the daemon does not answer");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Imports `content` as the image `name`.
    pub fn import(&self, name: &str, content: &[u8]) {
        let file = self.path("source");
        fs::write(&file, content).unwrap();
        self.run(&["image", "import", file.to_str().unwrap(), "--name", name, "--disk", "d"]);
        // Otherwise it would be read when no copy can be.
        fs::remove_file(file).unwrap();
    }

    /// Creates the replica `name` of `image`, of `size` as the command line takes it.
    pub fn replica(&self, name: &str, image: &str, size: &str) {
        let what = ["replica", "create", name, "--image", image, "--disk", "d", "--size", size];
        self.run(&what);
    }

    /// Where the NBD exports are.
    pub fn nbd(&self) -> PathBuf {
        self.path("nbd")
    }

    /// A path in the daemon's directory.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Runs a command of the program's that has to succeed; returns what it printed.
    pub fn run(&self, args: &[&str]) -> String {
        let output = self.command(args).output().unwrap();
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "underlay {args:?}: {error}");
        String::from_utf8(output.stdout).unwrap()
    }

    /// Whether a command of the program's succeeds now.
    pub fn does(&self, args: &[&str]) -> bool {
        self.command(args).output().unwrap().status.success()
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(PROGRAM);
        command.args(args).env("UNDERLAY_SOCKET", self.path("control")).stdin(Stdio::null());
        command
    }

    /// A file of the daemon's in /proc.
    pub fn proc(&self, name: &str) -> PathBuf {
        let id = self.process.as_ref().unwrap().id();
        Path::new("/proc").join(id.to_string()).join(name)
    }

    /// Resident memory of the daemon in bytes.
    pub fn memory(&self) -> u64 {
        let status = fs::read_to_string(self.proc("status")).unwrap();
        let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
        line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() * 1024
    }

    /// Open files of the daemon.
    pub fn files(&self) -> usize {
        fs::read_dir(self.proc("fd")).unwrap().count()
    }

    /// Sends SIGTERM and returns how long the daemon took to end with success.
    pub fn terminate(&mut self) -> Duration {
        let mut process = self.process.take().unwrap();
        let began = Instant::now();
        let id = nix::unistd::Pid::from_raw(process.id().try_into().unwrap());
        nix::sys::signal::kill(id, nix::sys::signal::Signal::SIGTERM).unwrap();
        loop {
            if let Some(status) = process.try_wait().unwrap() {
                assert!(status.success(), "the daemon ended with {status}");
                return began.elapsed();
            }
            if began.elapsed() > PATIENCE {
                process.kill().unwrap();
                process.wait().unwrap();
                panic!("the daemon does not end on SIGTERM");
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if let Some(mut process) = self.process.take() {
            let _ = process.kill();
            let _ = process.wait();
        }
        if std::thread::panicking() {
            let log = fs::read_to_string(self.path("log")).unwrap_or_default();
            eprintln!("--- the daemon's log\n{log}---");
        }
    }
}
