//! The driver within the guest: runs the tests that the kernel's command line names, one after the
//! other, each in a laboratory of its own, and tells the host how they went.
//!
//! A test that fails, or outstays its limit, is the last of its boot: what it leaves behind (a device
//! without its server, a mount that hangs) must not fail others. The daemons' logs and the kernel's
//! words go to the console, the guest is switched off, and the host boots another for the tests that
//! are left.

use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};
use nix::sys::reboot::{RebootMode, reboot};

use super::guest::Guest;
use super::wire::{Event, Speaker, State};
use super::{BENCH, TESTS, Test};
use crate::place;
use crate::tool::{NO_ARGS, tool};

/// Runs in the guest; no one calls it by hand.
pub fn run() -> Result<()> {
    let speaker = Arc::new(Mutex::new(Speaker::open()?));
    let uptime = fs::read_to_string("/proc/uptime").context("reading /proc/uptime")?;
    let uptime = uptime.split_whitespace().next().and_then(|word| word.parse().ok());
    say(&speaker, &Event::Up(uptime.unwrap_or(0.0)))?;
    let line = fs::read_to_string("/proc/cmdline").context("reading /proc/cmdline")?;
    let word = |key: &str| {
        let mut words = line.split_whitespace();
        words.find_map(|word| word.strip_prefix(key)?.strip_prefix('='))
    };
    let number = |key: &str, default| word(key).and_then(|n| n.parse().ok()).unwrap_or(default);
    for name in word("underlay.tests").unwrap_or_default().split(',') {
        let Some(test) = TESTS.iter().chain([&BENCH]).find(|test| test.name == name) else {
            return Err(anyhow!("no test is called {name:?}"));
        };
        say(&speaker, &Event::Begin(name.to_string()))?;
        let sound = limited(test, &speaker, |guest| {
            guest.phase = number("underlay.phase", 0);
            guest.last = number("underlay.last", 1) == 1;
            guest.seed = number("underlay.seed", 1);
            guest.overclaim = number("underlay.overclaim", 0) == 1;
        })?;
        if !sound {
            give_up(test, &speaker);
        }
        say(&speaker, &Event::End(name.to_string()))?;
    }
    say(&speaker, &Event::Done)
}

/// Runs a test within its limit. Returns whether all of it went well.
fn limited(
    test: &'static Test,
    speaker: &Arc<Mutex<Speaker>>,
    set: impl FnOnce(&mut Guest),
) -> Result<bool> {
    let (done, waiting) = mpsc::channel::<()>();
    let (limit, voice) = (test.limit, speaker.clone());
    let watch = thread::spawn(move || {
        if waiting.recv_timeout(limit) == Err(RecvTimeoutError::Timeout) {
            expired(test, limit, &voice);
        }
    });
    let mut guest = Guest::new(test, speaker.clone())?;
    set(&mut guest);
    let start = Instant::now();
    let outcome = catch_unwind(AssertUnwindSafe(|| (test.run)(&mut guest)))
        .unwrap_or_else(|_| Err(anyhow!("the test panicked; the console tells where")));
    if let Err(error) = &outcome {
        failed(test, start.elapsed(), format!("{error:#}"), speaker);
    }
    let sound = outcome.is_ok() && guest.failed == 0;
    if sound {
        // Its daemons are gone with what the test held; the sweep takes its mounts.
        drop(guest);
    } else {
        logs(guest.dir());
        tail("dmesg", &tool("dmesg", NO_ARGS).out().unwrap_or_default());
        // What failed may hang the sweep: the guest is going to be switched off.
        std::mem::forget(guest);
    }
    drop(done);
    let _ = watch.join();
    Ok(sound)
}

fn expired(test: &Test, limit: Duration, speaker: &Arc<Mutex<Speaker>>) {
    // w: every task that waits for a disk, with its stack.
    let _ = fs::write("/proc/sys/kernel/printk", "7");
    let _ = fs::write("/proc/sysrq-trigger", "w");
    logs(&place::run().join(test.name));
    thread::sleep(Duration::from_secs(1));
    let why = format!("not done after {} s; the console tells what hangs", limit.as_secs());
    failed(test, limit, why, speaker);
    give_up(test, speaker);
}

fn failed(test: &Test, took: Duration, detail: String, speaker: &Arc<Mutex<Speaker>>) {
    let (name, seconds) = (format!("{}: to its end", test.name), took.as_secs_f64());
    // If the host can't be told, it hears that the guest ended without a word.
    let _ = say(speaker, &Event::Check { name, state: State::Failed, detail, seconds });
}

/// Switches the guest off without a sync, which might hang.
fn give_up(test: &Test, speaker: &Arc<Mutex<Speaker>>) {
    let _ = say(speaker, &Event::Spoilt);
    let _ = say(speaker, &Event::End(test.name.to_string()));
    let _ = reboot(RebootMode::RB_POWER_OFF);
}

/// Shows the end of each log beneath `dir` on the console.
fn logs(dir: &Path) {
    let found = tool("find", [dir]).args(["-maxdepth", "2", "-name", "*.log"]).out();
    for file in found.unwrap_or_default().lines() {
        tail(file, &String::from_utf8_lossy(&fs::read(file).unwrap_or_default()));
    }
}

fn tail(name: &str, text: &str) {
    let lines: Vec<_> = text.lines().collect();
    for line in &lines[lines.len().saturating_sub(20)..] {
        crate::report::say(&format!("{name}: {line}"));
    }
}

fn say(speaker: &Arc<Mutex<Speaker>>, event: &Event) -> Result<()> {
    speaker.lock().unwrap_or_else(PoisonError::into_inner).say(event)
}
