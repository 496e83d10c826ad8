//! The agent with the probes, as a process of the daemon's: started where privileges allow, started
//! again when it ends, gone with the daemon.
//!
//! Invariant: nothing waits for it. Without it the service times its own reads, and says why.

use std::{
    path::{Path, PathBuf},
    process::Stdio,
    sync::Weak,
    time::{Duration, Instant},
};

use tokio::{
    io::{AsyncBufReadExt, BufReader},
    process::{Child, Command},
};

use crate::control::promotion::Promotion;

/// The program, beside this one or where PATH leads.
const PROGRAM: &str = "underlay-agent";
/// How long an agent that ended at once waits to be started again: at first, and at most.
const PAUSES: (Duration, Duration) = (Duration::from_secs(2), Duration::from_secs(300));
/// An agent that ran for so long was well.
const WELL: Duration = Duration::from_secs(60);
/// The longest line of its that is told.
const LINE_MAX: usize = 400;

/// Keeps an agent running that serves the daemon at `socket`, for as long as `promotion` is there.
pub async fn keep(socket: PathBuf, promotion: Weak<Promotion>) {
    let mut pause = PAUSES.0;
    loop {
        let started = Instant::now();
        let reason = match start(&socket) {
            Ok(child) => run(child).await,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                format!("{PROGRAM} is not installed: put it beside `underlay`, or into PATH")
            }
            Err(error) => format!("{PROGRAM} can't be started: {error}"),
        };
        let Some(promotion) = promotion.upgrade() else { return };
        tracing::warn!(reason, "no probes: the service times its own reads");
        promotion.no_agent(reason);
        drop(promotion);
        pause = if started.elapsed() > WELL { PAUSES.0 } else { (pause * 2).min(PAUSES.1) };
        tokio::time::sleep(pause).await;
    }
}

/// Where the agent is: beside this program, or where PATH leads.
pub fn program() -> std::io::Result<PathBuf> {
    let beside = std::env::current_exe()?.with_file_name(PROGRAM);
    Ok(if beside.is_file() { beside } else { PathBuf::from(PROGRAM) })
}

fn start(socket: &Path) -> std::io::Result<Child> {
    Command::new(program()?)
        .arg("--socket")
        .arg(socket)
        .arg("--until-end-of-input")
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
}

/// Waits until the agent ends; the last that it said, and how it ended.
async fn run(mut child: Child) -> String {
    let mut said = None;
    if let Some(stderr) = child.stderr.take() {
        let mut lines = BufReader::new(stderr).lines();
        while let Ok(Some(line)) = lines.next_line().await {
            let line: String = line.chars().take(LINE_MAX).collect();
            tracing::info!(agent = child.id(), "{line}");
            said = Some(line);
        }
    }
    let ended = match child.wait().await {
        Ok(status) => format!("{PROGRAM} ended ({status})"),
        Err(error) => format!("{PROGRAM} ended ({error})"),
    };
    said.unwrap_or(ended)
}
