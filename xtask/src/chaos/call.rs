//! A command of an actor, and what came of it: done, refused, or cut short.
//!
//! Invariants checked: a refusal says why, by a kind that is no failure of the node, unless disks are ill; no
//! command takes for ever, and none ends by a panic.

use std::sync::atomic::Ordering;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::acts::Actor;
use crate::daemon::last_json;
use crate::tool::json;

/// Refusals that say that something else stands in the way.
const GOOD_REASONS: [&str; 6] = ["not_found", "exists", "in_use", "locked", "invalid", "no_space"];
/// And such as are known by their words: no disk takes anything new; an export, once its answer has begun,
/// can only tell in words why it ends.
const GOOD_WORDS: [&str; 2] = ["no disk is there to hold", "; wait for that, or interrupt it"];
/// Besides, where disks are ill.
const ILL_REASONS: [&str; 4] = ["io", "unavailable", "corrupt", "read_only"];
/// Of how many commands one is given up, and after how many milliseconds at most.
const GIVEN_UP: u8 = 12;
const GIVEN_UP_AFTER: u64 = 600;

/// What came of a command.
pub enum Ended {
    /// This is its result.
    Done(Value),
    /// Nothing has changed.
    Refused,
    /// The daemon was killed meanwhile, or the client went away: it may have happened, or may yet.
    Cut,
}

impl Actor<'_> {
    /// Runs a command whose outcome changes nothing that is known.
    pub fn plain(&mut self, act: &'static str, args: &[&str]) -> Result<()> {
        self.call(act, args).map(drop)
    }

    /// Runs a command, and counts it.
    pub fn call(&mut self, act: &'static str, args: &[&str]) -> Result<Ended> {
        self.call_with(act, args, None)
    }

    /// Runs a command, which may be given up in the midst of it, and counts it.
    pub fn call_with(
        &mut self,
        act: &'static str,
        args: &[&str],
        input: Option<Vec<u8>>,
    ) -> Result<Ended> {
        let mut all = args.to_vec();
        all.push("--json");
        let mut command = self.control.command(&all);
        if let Some(input) = input {
            command = command.input(input);
        }
        let given_up = self.rng.u8(..GIVEN_UP) == 0;
        if given_up {
            command = command.limit(Duration::from_millis(self.rng.u64(20..GIVEN_UP_AFTER)));
        }
        let (began, deaths) = (self.hours.is_dying(), self.hours.deaths.load(Ordering::SeqCst));
        let line = args.join(" ");
        let Some(outcome) = command.outcome_within()? else {
            ensure!(given_up, "underlay {line}: it takes for ever");
            self.world.count(act, 2);
            return Ok(Ended::Cut);
        };
        if outcome.code == 0 {
            self.world.count(act, 0);
            return Ok(Ended::Done(last_json(&outcome.stdout).unwrap_or(Value::Null)));
        }
        ensure!(
            outcome.code == 1,
            "underlay {line}: exit code {}: {}",
            outcome.code,
            outcome.said()
        );
        if began || self.hours.is_dying() || self.hours.deaths.load(Ordering::SeqCst) != deaths {
            self.world.count(act, 2);
            return Ok(Ended::Cut);
        }
        if ["fsck", "verify"].contains(&act) && self.world.ill {
            // They tell what can't be mended, or read, while a disk is ill.
            self.world.count(act, 1);
            return Ok(Ended::Cut);
        }
        let last = outcome.stderr.trim().lines().last().unwrap_or_default();
        let error = json(last).with_context(|| format!("underlay {line}: {}", outcome.said()))?;
        let error = &error["error"];
        let kind = error["kind"].as_str().unwrap_or_default();
        let says = |why: &&str| error["message"].as_str().is_some_and(|it| it.contains(why));
        let told = GOOD_WORDS.iter().any(says);
        let good =
            told || GOOD_REASONS.contains(&kind) || (self.world.ill && ILL_REASONS.contains(&kind));
        ensure!(good, "underlay {line}: {error}");
        self.world.count(act, 1);
        // After a failure of a disk nobody can be sure.
        Ok(if told || GOOD_REASONS.contains(&kind) { Ended::Refused } else { Ended::Cut })
    }
}
