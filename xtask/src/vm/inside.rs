//! The driver within the guest: runs the tests that the kernel's command line names, one after the
//! other, each in a laboratory of its own, and tells the host how they went.
//!
//! A test that outstays its limit is told as failed, the kernel's blocked tasks are written to the
//! console, and the guest is switched off: the host boots another for the tests that are left.

use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use nix::sys::reboot::{RebootMode, reboot};

use super::guest::Guest;
use super::wire::{Event, Speaker, State};
use super::{TESTS, Test};
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
        let Some(test) = TESTS.iter().find(|test| test.name == name) else {
            return Err(anyhow!("no test is called {name:?}"));
        };
        say(&speaker, &Event::Begin(name.to_string()))?;
        let outcome = limited(test, &speaker, |guest| {
            guest.phase = number("underlay.phase", 0);
            guest.last = number("underlay.last", 1) == 1;
            guest.seed = number("underlay.seed", 1);
        });
        if let Err(error) = outcome {
            let name = format!("{name}: to its end");
            let detail = format!("{error:#}");
            say(&speaker, &Event::Check { name, state: State::Failed, detail, seconds: 0.0 })?;
            dmesg();
        }
        say(&speaker, &Event::End(name.to_string()))?;
    }
    say(&speaker, &Event::Done)
}

fn limited(
    test: &'static Test,
    speaker: &Arc<Mutex<Speaker>>,
    set: impl FnOnce(&mut Guest),
) -> Result<()> {
    let (done, waiting) = mpsc::channel::<()>();
    let (limit, voice) = (test.limit, speaker.clone());
    let watch = thread::spawn(move || {
        if waiting.recv_timeout(limit) == Err(RecvTimeoutError::Timeout) {
            expired(test, limit, &voice);
        }
    });
    let mut guest = Guest::new(test, speaker.clone())?;
    set(&mut guest);
    let outcome = catch_unwind(AssertUnwindSafe(|| (test.run)(&mut guest)));
    // Its daemons are gone with what the test held; the sweep takes its mounts.
    drop(guest);
    drop(done);
    let _ = watch.join();
    outcome.unwrap_or_else(|_| Err(anyhow!("the test panicked; the console tells where")))
}

fn expired(test: &Test, limit: Duration, speaker: &Arc<Mutex<Speaker>>) {
    let detail = format!("not done after {} s; the console tells what hangs", limit.as_secs());
    let name = format!("{}: to its end", test.name);
    // w: every task that waits for a disk; l: what the processors do.
    let _ = fs::write("/proc/sys/kernel/printk", "7");
    for key in ["w", "l"] {
        let _ = fs::write("/proc/sysrq-trigger", key);
    }
    dmesg();
    thread::sleep(Duration::from_secs(1));
    let seconds = limit.as_secs_f64();
    let _ = say(speaker, &Event::Check { name, state: State::Failed, detail, seconds });
    let _ = say(speaker, &Event::Hung);
    let _ = say(speaker, &Event::End(test.name.to_string()));
    let _ = reboot(RebootMode::RB_POWER_OFF);
}

fn dmesg() {
    if let Ok(text) = tool("dmesg", NO_ARGS).out() {
        let lines: Vec<_> = text.lines().collect();
        for line in &lines[lines.len().saturating_sub(30)..] {
            crate::report::say(&format!("dmesg: {line}"));
        }
    }
}

fn say(speaker: &Arc<Mutex<Speaker>>, event: &Event) -> Result<()> {
    speaker.lock().unwrap_or_else(PoisonError::into_inner).say(event)
}
