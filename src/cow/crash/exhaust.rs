//! All short sequences of operations, crashed at every step.

use std::{
    ops::Range,
    sync::atomic::{AtomicUsize, Ordering},
};

use super::{
    Outcome, Violation,
    guest::{Action, Guests},
    node::{Layout, Node},
    on_all_processors,
};
use crate::{
    cow::Provision,
    io::sim::{Cut, End},
    units::{BLOCK, SECTOR},
};

/// What the sequences are made of. Block 0 is durable data when they begin, block 1 is durably
/// zero, the others are base; the device ends within block 4.
const ALPHABET: [Action; 11] = [
    Action::Write(0, BLOCK),
    Action::Write(SECTOR, SECTOR),
    Action::Write(BLOCK, BLOCK),
    Action::Write(2 * BLOCK + SECTOR, 2 * SECTOR),
    Action::Write(BLOCK - SECTOR, BLOCK + 3 * SECTOR),
    Action::Zero(0, 2 * BLOCK, Provision::Release),
    Action::Zero(2 * BLOCK, 2 * BLOCK, Provision::Keep),
    Action::Discard(0, 3 * BLOCK),
    Action::Flush,
    Action::Close,
    Action::Grow(3 * SECTOR),
];

const SIZE: u64 = 4 * BLOCK + 2 * SECTOR;

/// Runs that the tail has room for.
const TAIL: usize = 2;

/// What is done, without a crash, right before each sequence: nothing, so that its first flush is a
/// checkpoint; or what brings the journal to where its next flush appends the last record that fits.
const WARM_UPS: [&[Action]; 2] = [
    &[],
    &[
        Action::Write(3 * BLOCK, BLOCK),
        Action::Flush,
        Action::Discard(3 * BLOCK, BLOCK),
        Action::Flush,
        Action::Write(3 * BLOCK, SECTOR),
    ],
];

/// How each course ends; `None` is a kill.
const CRASHES: [Option<Cut>; 6] = [
    Some(Cut::LoseAll),
    Some(Cut::KeepAll),
    Some(Cut::KeepEven),
    Some(Cut::KeepOdd),
    Some(Cut::Any),
    None,
];

/// What is done to the replica while a sequence is played.
#[derive(Clone, Copy, Debug)]
enum Meanwhile {
    Nothing,
    Move,
    Flatten,
}

/// Plays every sequence of up to `depth` operations, crashes it at every step in every way, checks,
/// writes and flushes once more, cuts the power, and checks again; those of fewer than `depth` also
/// while the replica moves or is flattened. On all processors.
pub fn exhaust(depth: usize) -> Result<Outcome, Violation> {
    let next = AtomicUsize::new(0);
    let worker = || {
        let mut outcome = Outcome::default();
        let start = prepared(&mut outcome)?;
        loop {
            // Each takes the sequences that begin with one operation; the first the empty one too.
            let turn = next.fetch_add(1, Ordering::Relaxed);
            let Some(first) = ALPHABET.get(turn) else { return Ok(outcome) };
            if turn == 0 {
                descend(&start, &mut Vec::new(), 0, &mut outcome)?;
            }
            if depth > 0 {
                descend(&start, &mut vec![*first], depth, &mut outcome)?;
            }
        }
    };
    on_all_processors(worker)
}

fn violation(course: impl Into<String>) -> impl FnOnce(String) -> Violation {
    move |found| Violation { course: course.into(), found }
}

fn prepared(outcome: &mut Outcome) -> Result<Node, Violation> {
    let mut node = Node::new(Layout {
        seed: 0,
        size: SIZE,
        image: 3 * BLOCK + 100,
        records: 2,
        align: (512, 4096),
        areas: Vec::from_iter([Range { start: 0, end: SIZE + 10 * SECTOR }]),
    });
    // A write over an edge and a zeroing make it run over.
    node.keep_tail(TAIL);
    let script = [ALPHABET[0], Action::Zero(BLOCK, BLOCK, Provision::Release), Action::Flush];
    play(&mut node, &[], &script, Meanwhile::Nothing, None, outcome)
        .and_then(|_| node.power_cut(Cut::LoseAll))
        .map_err(violation("preparing"))?;
    Ok(node)
}

fn descend(
    start: &Node,
    sequence: &mut Vec<Action>,
    depth: usize,
    outcome: &mut Outcome,
) -> Result<(), Violation> {
    for warm_up in WARM_UPS {
        crash_everywhere(start, warm_up, sequence, Meanwhile::Nothing, outcome)?;
    }
    if sequence.len() < depth {
        for meanwhile in [Meanwhile::Move, Meanwhile::Flatten] {
            crash_everywhere(start, &[], sequence, meanwhile, outcome)?;
        }
    }
    if sequence.len() < depth {
        for action in ALPHABET {
            sequence.push(action);
            descend(start, sequence, depth, outcome)?;
            sequence.pop();
        }
    }
    Ok(())
}

fn crash_everywhere(
    start: &Node,
    warm_up: &[Action],
    sequence: &[Action],
    meanwhile: Meanwhile,
    outcome: &mut Outcome,
) -> Result<(), Violation> {
    for step in 0.. {
        let mut reached = true;
        for crash in CRASHES {
            let mut node = start.fork(step);
            let course =
                || format!("{warm_up:?}, {sequence:?}, {meanwhile:?}, {crash:?} at step {step}");
            let end = play(&mut node, warm_up, sequence, meanwhile, Some(step), outcome)
                .map_err(violation(course()))?;
            reached = end == End::Stopped;
            crash_once(&mut node, crash, outcome)
                .and_then(|()| {
                    let again = [Action::Write(2 * BLOCK, BLOCK), Action::Flush];
                    play(&mut node, &[], &again, Meanwhile::Nothing, None, outcome)
                })
                .and_then(|_| crash_once(&mut node, Some(Cut::LoseAll), outcome))
                .map_err(violation(course()))?;
        }
        if !reached {
            return Ok(());
        }
    }
    Ok(())
}

fn crash_once(node: &mut Node, crash: Option<Cut>, outcome: &mut Outcome) -> Result<(), String> {
    match crash {
        Some(cut) => {
            outcome.cuts += 1;
            node.power_cut(cut)
        }
        None => {
            outcome.kills += 1;
            node.kill()
        }
    }
}

fn play(
    node: &mut Node,
    warm_up: &[Action],
    script: &[Action],
    meanwhile: Meanwhile,
    steps: Option<u64>,
    outcome: &mut Outcome,
) -> Result<End, String> {
    outcome.runs += 1;
    let Some(overlay) = node.open()? else { return Err("the disk is sound".to_owned()) };
    let errand = match meanwhile {
        Meanwhile::Nothing => None,
        Meanwhile::Move => Some(node.plan_move((512, 4096), 2)),
        Meanwhile::Flatten => Some(node.plan_flatten()),
    };
    let guests = Guests::new(node, overlay, fastrand::Rng::with_seed(1));
    guests.play(warm_up, None);
    let end = match errand {
        Some(errand) => guests.play_meanwhile(errand, script, steps),
        None => guests.play(script, steps),
    };
    guests.report(outcome)?;
    match end {
        End::Stuck => Err("an operation never ends".to_owned()),
        End::Done(_) => guests.check_at_rest().map(|()| end),
        End::Stopped => Ok(end),
    }
}
