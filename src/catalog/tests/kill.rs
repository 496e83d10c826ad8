//! Invariants checked: a process that is killed before any of an operation's changes to a disk, or
//! a change that fails there, leaves the state before the operation or the one after it; no
//! reference is lost, nothing half-made is seen, and `fsck` mends what is left.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

use super::{
    scenario::{Snapshot, all, check_after_crash, ends, seen, start},
    *,
};
use crate::{
    catalog::Repair,
    error::{Error, Kind},
};

/// From which of an operation's steps on the disk answers no more.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Fault {
    /// That step and all after it: the process was killed.
    FromThen,
    /// That step alone: the disk was full, or failed once.
    Once,
}

/// Steps that fail once `armed` has counted down to nothing.
pub(super) fn failing(armed: &Arc<AtomicUsize>, fault: Fault) -> Steps {
    let left = armed.clone();
    Steps::hooked(move |step| {
        let fails = match left.load(Ordering::SeqCst) {
            0 => fault == Fault::FromThen,
            1 => {
                left.store(0, Ordering::SeqCst);
                true
            }
            count => {
                // A count that was never armed stays out of reach.
                left.store(count - 1, Ordering::SeqCst);
                false
            }
        };
        if fails { Err(Error::new(Kind::Io, format!("stopped at {step:?}"))) } else { Ok(()) }
    })
}

/// Runs each scenario with a fault at each of its steps, and calls `check` with what came of it.
fn at_every_step(fault: Fault, check: impl Fn(&Bench, Node, usize, &scenario::Scenario, &Ends)) {
    let bench = start();
    let common = Snapshot::of(&bench);
    let mut steps_in_all = 0;
    for scenario in all() {
        common.restore(&bench);
        (scenario.prepare)(&bench);
        let prepared = Snapshot::of(&bench);
        // Leftovers go when the node opens: the steps counted are the operation's own.
        let ends = ends(&bench, &scenario);
        for step in 1.. {
            prepared.restore(&bench);
            let armed = Arc::new(AtomicUsize::new(usize::MAX));
            let node = bench.open_in_steps(failing(&armed, fault));
            armed.store(step, Ordering::SeqCst);
            let done = (scenario.run)(&bench, &node);
            if armed.swap(usize::MAX, Ordering::SeqCst) > 0 && done.is_ok() {
                assert!(step > 2, "{}: it has steps", scenario.label);
                steps_in_all += step - 1;
                break;
            }
            if fault == Fault::FromThen {
                armed.store(0, Ordering::SeqCst);
            }
            check(&bench, node, step, &scenario, &ends);
        }
    }
    println!("{fault:?}: {steps_in_all} steps");
}

type Ends = (scenario::Seen, scenario::Seen);

#[test]
fn a_killed_process_leaves_before_or_after() {
    at_every_step(Fault::FromThen, |bench, node, _, scenario, ends| {
        drop(node);
        check_after_crash(bench, scenario, ends);
    });
}

#[test]
fn a_failed_step_leaves_a_node_that_knows_its_disks() {
    at_every_step(Fault::Once, |bench, node, step, scenario, ends| {
        let label = scenario.label;
        let known = seen(&node);
        assert!(known == ends.0 || known == ends.1, "{label}, step {step}: {known:?}");
        node.fsck(Repair::Report).unwrap();
        if label != "grow a replica's record" {
            assert_eq!(seen(&node), known, "{label}, step {step}: the view is that of the disk");
        }
        drop(node);
        check_after_crash(bench, scenario, ends);
    });
}
