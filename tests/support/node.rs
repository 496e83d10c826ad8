//! A daemon of the binary under test, in a directory of its own, and the command line against it.

#![allow(dead_code, clippy::unwrap_used, reason = "every test file uses a part of it")]

use std::{
    fs,
    io::{Read, Write},
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    time::{Duration, Instant},
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::Value;

/// How long anything may take.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// The program under test.
pub const PROGRAM: &str = env!("CARGO_BIN_EXE_underlay");

/// A daemon; killed when it is dropped.
pub struct Daemon {
    pub dir: tempfile::TempDir,
    child: Option<Child>,
}

impl Daemon {
    /// A daemon that is ready, with no disks.
    pub fn start() -> Daemon {
        let dir = tempfile::tempdir().unwrap();
        let mut daemon = Daemon { dir, child: None };
        daemon.restart();
        daemon
    }

    /// A daemon with disks `a`, `b`, `c`.
    pub fn with_disks() -> Daemon {
        let daemon = Daemon::start();
        for disk in ["a", "b", "c"] {
            let path = daemon.path(disk);
            fs::create_dir(&path).unwrap();
            daemon.ok(&["disk", "add", path.to_str().unwrap(), "--name", disk]);
        }
        daemon
    }

    /// Starts it again after [`Daemon::stop`] or [`Daemon::kill`].
    pub fn restart(&mut self) {
        let log = fs::OpenOptions::new().create(true).append(true).open(self.path("log")).unwrap();
        let child = self.command().stderr(log).stdout(Stdio::piped()).spawn().unwrap();
        let child = self.child.insert(child);
        // The one line that it prints says that it is ready.
        let mut out = child.stdout.take().unwrap();
        let mut told = Vec::new();
        let mut byte = [0];
        while !told.ends_with(b"}\n") {
            assert!(
                out.read(&mut byte).unwrap() == 1,
                "the daemon did not start: {}",
                fs::read_to_string(self.path("log")).unwrap()
            );
            told.push(byte[0]);
        }
        let told: Value = serde_json::from_slice(&told).unwrap();
        assert_eq!(told["pid"], self.pid());
    }

    /// The command that starts a daemon here.
    pub fn command(&self) -> Command {
        let mut command = Command::new(PROGRAM);
        command.args(["serve", "--json", "--log", "debug", "--state"]).arg(self.path("state"));
        command.arg("--socket").arg(self.socket()).arg("--nbd-socket").arg(self.nbd_socket());
        if self.path("underlay.toml").exists() {
            command.arg("--config").arg(self.path("underlay.toml"));
        }
        command.env_remove("RUST_LOG").env_remove("UNDERLAY_SOCKET").stdin(Stdio::null());
        command
    }

    /// What the daemon is configured with from its next start on.
    pub fn configure(&self, text: &str) {
        fs::write(self.path("underlay.toml"), text).unwrap();
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn socket(&self) -> PathBuf {
        self.path("u.sock")
    }

    pub fn nbd_socket(&self) -> PathBuf {
        self.path("n.sock")
    }

    pub fn pid(&self) -> u32 {
        self.child.as_ref().unwrap().id()
    }

    /// The daemon's log so far.
    pub fn log(&self) -> String {
        fs::read_to_string(self.path("log")).unwrap()
    }

    /// Sends a signal.
    pub fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.pid() as i32), signal).unwrap();
    }

    /// Ends it as a service manager does; its exit code.
    pub fn stop(&mut self) -> Option<i32> {
        self.signal(Signal::SIGTERM);
        self.wait()
    }

    /// Waits for its end, whatever caused it; its exit code.
    pub fn ended(&mut self) -> Option<i32> {
        self.wait()
    }

    /// Ends it as a crash does.
    pub fn kill(&mut self) {
        self.signal(Signal::SIGKILL);
        assert_eq!(self.wait(), None);
    }

    fn wait(&mut self) -> Option<i32> {
        let mut child = self.child.take().unwrap();
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = child.try_wait().unwrap() {
                return status.code();
            }
            if Instant::now() > deadline {
                child.kill().unwrap();
                panic!("the daemon did not end: {}", self.log());
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// The command line against this daemon.
    pub fn cli(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(PROGRAM);
        command.args(arguments).env("UNDERLAY_SOCKET", self.socket()).stdin(Stdio::null());
        command
    }

    /// Runs a command that succeeds; what it prints.
    pub fn ok(&self, arguments: &[&str]) -> String {
        let output = self.cli(arguments).output().unwrap();
        assert_eq!(output.status.code(), Some(0), "{arguments:?}: {output:?}\n{}", self.log());
        String::from_utf8(output.stdout).unwrap()
    }

    /// Runs a command that succeeds, with `--json`; what it prints.
    pub fn json(&self, arguments: &[&str]) -> Value {
        serde_json::from_str(&self.ok(&[arguments, &["--json"]].concat())).unwrap()
    }

    /// Runs a command that fails with exit code 1; its one line.
    pub fn fails(&self, arguments: &[&str]) -> String {
        let output = self.cli(arguments).output().unwrap();
        assert_eq!(output.status.code(), Some(1), "{arguments:?}: {output:?}");
        complaint(&output)
    }

    /// Imports `bytes` as an image.
    pub fn import(&self, name: &str, bytes: &[u8]) {
        let file = self.path("import.raw");
        fs::write(&file, bytes).unwrap();
        let file = file.to_str().unwrap();
        self.ok(&["image", "import", file, "--name", name, "--format", "raw"]);
        // Otherwise it would be read when no copy can be.
        fs::remove_file(self.path("import.raw")).unwrap();
    }

    /// Sends an HTTP request as it is; status and body of the answer.
    pub fn http(&self, method: &str, path: &str, body: &[u8]) -> (u16, String) {
        let head = format!(
            "{method} {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: {}\r\n\r\n",
            body.len()
        );
        let answer = exchange(&self.socket(), &[head.as_bytes(), body].concat());
        let (head, body) = answer.split_once("\r\n\r\n").expect("an HTTP answer");
        let status = head.split(' ').nth(1).unwrap().parse().unwrap();
        (status, body.to_owned())
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            // It may have ended by itself.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// Sends bytes and returns what comes back until the end.
pub fn exchange(socket: &Path, request: &[u8]) -> String {
    let mut stream = UnixStream::connect(socket).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    // The other side may refuse before it has read everything.
    let _ = stream.write_all(request);
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer);
    String::from_utf8_lossy(&answer).into_owned()
}

/// The one line of a command that failed.
pub fn complaint(output: &Output) -> String {
    let told = String::from_utf8(output.stderr.clone()).unwrap();
    let lines: Vec<&str> = told.lines().filter(|line| !line.starts_with("{\"progress\"")).collect();
    assert_eq!(lines.len(), 1, "one line: {told}");
    assert!(lines[0].starts_with("underlay: ") || lines[0].starts_with("{\"error\""), "{told}");
    lines[0].to_owned()
}

/// Waits until `done`.
pub fn until(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !done() {
        assert!(Instant::now() < deadline, "{what} did not come about");
        std::thread::sleep(Duration::from_millis(10));
    }
}
