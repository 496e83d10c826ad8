//! Guests: tasks that use one replica at the same time, and tell the model what they do.

use std::{cell::RefCell, ops::Range, rc::Rc, sync::Arc};

use super::{
    Mutant, Outcome,
    errand::{Errand, Runner},
    model::Model,
    node::{Image, Node},
};
use crate::{
    cow::{Gate, Overlay, Provision, format::RUNS_PER_RECORD, tail::Place},
    error::{Kind, Result as IoResult},
    io::{
        Buf,
        sim::{End, Faults, Sim, SimFile, Task},
    },
    units::{BLOCK, SECTOR, round_down},
};

/// What a guest does.
#[derive(Clone, Copy, Debug)]
pub(super) enum Action {
    Write(u64, u64),
    Read(u64, u64),
    Discard(u64, u64),
    Zero(u64, u64, Provision),
    Flush,
    Close,
    Grow(u64),
    /// Makes one block data and zero by turns, until the changes fill more than one record.
    Churn(u64),
}

/// What a replica stands on: replaced when it has moved, or needs its image no longer.
#[derive(Clone)]
pub(super) struct Footing {
    pub(super) overlay: Arc<Overlay<Sim>>,
    pub(super) image: Image,
}

/// All guests of one replica between two crashes.
pub(super) struct Guests {
    sim: Sim,
    gate: Gate<Footing>,
    tail: Option<Place>,
    catalogue: SimFile,
    mutant: Option<Mutant>,
    areas: Vec<Range<u64>>,
    model: Rc<RefCell<Model>>,
    sizes: Rc<RefCell<Vec<u64>>>,
    faulty: bool,
    /// Syncs that had failed before these guests came.
    failed_syncs: u64,
    /// The data file is.
    buffered: bool,
    state: RefCell<State>,
}

struct State {
    rng: fastrand::Rng,
    /// Ranges in flight: a write that covers a sector in part has its edges to itself, because
    /// what two such writes leave together no model could tell.
    busy: Vec<(u64, Range<u64>)>,
    next: u64,
    outcome: Outcome,
    violation: Option<String>,
}

impl Guests {
    pub(super) fn new(node: &Node, overlay: Arc<Overlay<Sim>>, rng: fastrand::Rng) -> Guests {
        Guests {
            sim: node.sim.clone(),
            gate: Gate::new(Footing { overlay, image: node.image.clone() }),
            tail: node.tail.clone(),
            catalogue: node.catalogue,
            mutant: node.mutant,
            areas: node.areas.clone(),
            model: node.model.clone(),
            sizes: node.sizes.clone(),
            faulty: node.is_faulty(),
            failed_syncs: node.sim.failed_syncs(),
            buffered: node.is_buffered(),
            state: RefCell::new(State {
                rng,
                busy: Vec::new(),
                next: 1,
                outcome: Outcome::default(),
                violation: None,
            }),
        }
    }

    /// Lets `count` guests do `actions` random things each, for `steps` steps if given, while an
    /// errand is run.
    pub(super) fn work(
        &self,
        count: usize,
        actions: usize,
        errand: Option<Errand>,
        steps: Option<u64>,
    ) -> End {
        let guest = |_| -> Task<'_> {
            Box::pin(async move {
                for _ in 0..actions {
                    let action = self.choose();
                    self.act(action).await;
                }
            })
        };
        let mut tasks: Vec<_> = (0..count).map(guest).collect();
        if let Some(errand) = errand {
            let patience = self.state.borrow_mut().rng.usize(0..12);
            tasks.push(Box::pin(self.run(errand, patience)));
        }
        self.sim.run(tasks, steps)
    }

    /// Lets one guest do these things in this order, while an errand is run.
    pub(super) fn play_meanwhile(
        &self,
        errand: Errand,
        script: &[Action],
        steps: Option<u64>,
    ) -> End {
        let guest = async {
            for action in script {
                self.act(*action).await;
            }
        };
        self.sim.run(vec![Box::pin(guest), Box::pin(self.run(errand, 1))], steps)
    }

    async fn run(&self, errand: Errand, patience: usize) {
        let (sim, gate, tail) = (&self.sim, &self.gate, self.tail.clone());
        let (catalogue, mutant) = (self.catalogue, self.mutant);
        let runner = Runner { sim, gate, tail, catalogue, mutant, patience };
        tracing::debug!(?errand, "begins");
        // Nothing is at rest meanwhile.
        self.state.borrow_mut().busy.push((0, 0..0));
        let done = runner.run(errand).await;
        self.state.borrow_mut().busy.retain(|(busy, _)| *busy != 0);
        self.state.borrow_mut().outcome.errands += u64::from(done.is_ok());
        tracing::debug!(?errand, ?done, "ended");
        self.settle(done);
    }

    /// Lets one guest do these things in this order.
    pub(super) fn play(&self, script: &[Action], steps: Option<u64>) -> End {
        let guest = async {
            for action in script {
                self.act(*action).await;
            }
        };
        self.sim.run(vec![Box::pin(guest)], steps)
    }

    /// Adds the figures to `outcome`, or says what went wrong. Comes right before the crash.
    pub(super) fn report(&self, outcome: &mut Outcome) -> Result<(), String> {
        if self.has_lost_pages() {
            self.model.borrow_mut().lost_pages();
        }
        let state = self.state.borrow();
        *outcome += state.outcome;
        outcome.checkpoints += self.overlay().stats().checkpoints;
        state.violation.clone().map_or(Ok(()), Err)
    }

    /// When all is quiet every sector is read and compared.
    pub(super) fn check_at_rest(&self) -> Result<(), String> {
        self.sim.set_faults(Faults::default());
        for area in &self.areas {
            let end = area.end.min(self.overlay().size());
            if area.start < end {
                let script = [Action::Read(area.start, end - area.start)];
                if self.play(&script, None) == End::Stuck {
                    return Err("a read never ends".to_owned());
                }
            }
        }
        self.state.borrow().violation.clone().map_or(Ok(()), Err)
    }

    fn overlay(&self) -> Arc<Overlay<Sim>> {
        self.gate.get().overlay
    }

    fn choose(&self) -> Action {
        let mut state = self.state.borrow_mut();
        let rng = &mut state.rng;
        let size = self.overlay().size();
        let area = &self.areas[rng.usize(0..self.areas.len())];
        let area = area.start.min(size - 1)..area.end.min(size);
        let unit = [1, SECTOR, BLOCK][[0, 1, 1, 2, 2][rng.usize(0..5)]];
        let start = round_down(rng.u64(area.clone()), unit).max(area.start);
        let longest = if rng.u8(0..8) == 0 { 40 * BLOCK } else { 4 * BLOCK };
        let len = rng.u64(1..=longest).next_multiple_of(unit).min(area.end - start);
        let provision = if rng.u8(0..3) == 0 { Provision::Keep } else { Provision::Release };
        match rng.u8(0..100) {
            0..45 => Action::Write(start, len),
            45..60 => Action::Read(start, len),
            60..70 => Action::Discard(start, len),
            70..82 => Action::Zero(start, len, provision),
            82..96 => Action::Flush,
            96..98 => Action::Close,
            98 if rng.u8(0..8) == 0 => Action::Churn(round_down(start, BLOCK)),
            _ => Action::Grow(rng.u64(0..6) * SECTOR + rng.u64(0..2) * BLOCK),
        }
    }

    async fn act(&self, action: Action) {
        self.state.borrow_mut().outcome.operations += 1;
        tracing::debug!(?action, "begins");
        match action {
            Action::Write(offset, len) => self.write(offset, len).await,
            Action::Read(offset, len) => self.read(offset, len).await,
            Action::Discard(offset, len) => {
                let zeros = vec![0; len as usize];
                let done = async {
                    let inside = self.gate.enter().await;
                    // A discard may do nothing: as a write, it is never sure.
                    inside.overlay.discard(&self.sim, offset, len).await.map(|()| false)
                };
                self.change(offset, &zeros, done).await;
            }
            Action::Zero(offset, len, provision) => self.zero(offset, len, provision).await,
            Action::Flush => {
                self.flush(async { self.gate.enter().await.overlay.flush(&self.sim).await }).await;
            }
            Action::Close => {
                self.flush(async { self.gate.enter().await.overlay.close(&self.sim).await }).await;
            }
            Action::Grow(by) => self.grow(by).await,
            Action::Churn(offset) => {
                for _ in 0..RUNS_PER_RECORD * 2 / 3 {
                    self.zero(offset, BLOCK, Provision::Release).await;
                    self.zero(offset, BLOCK, Provision::Keep).await;
                }
            }
        }
        tracing::debug!(?action, "ended");
    }

    async fn write(&self, offset: u64, len: u64) {
        let (bytes, skew) = {
            let mut state = self.state.borrow_mut();
            let mut bytes = vec![0; len as usize];
            state.rng.fill(&mut bytes);
            let skew = if state.rng.u8(0..4) == 0 { state.rng.usize(1..600) } else { 0 };
            (bytes, skew)
        };
        let buf = Buf::heap(bytes.len() + skew).slice(skew..bytes.len() + skew);
        buf.copy_from(&bytes);
        let done = async {
            let inside = self.gate.enter().await;
            inside.overlay.write(&self.sim, &inside.image, offset, buf).await.map(|()| true)
        };
        self.change(offset, &bytes, done).await;
    }

    async fn zero(&self, offset: u64, len: u64, provision: Provision) {
        let len = len.min(self.overlay().size() - offset);
        let zeros = vec![0; len as usize];
        let done = async {
            let Footing { overlay, image } = &*self.gate.enter().await;
            overlay.write_zeroes(&self.sim, image, offset, len, provision).await.map(|()| true)
        };
        self.change(offset, &zeros, done).await;
    }

    /// Does something that leaves `bytes` at `offset`, surely if it returns true.
    async fn change(&self, offset: u64, bytes: &[u8], done: impl Future<Output = IoResult<bool>>) {
        let range = offset..offset + bytes.len() as u64;
        let Some(id) = self.reserve(range.clone()) else { return };
        let event = self.model.borrow_mut().begin(offset, bytes);
        tracing::debug!(event, ?range, "is");
        let result = done.await;
        self.model.borrow_mut().end(event, range, *result.as_ref().unwrap_or(&false));
        self.state.borrow_mut().busy.retain(|(busy, _)| *busy != id);
        self.settle(result);
    }

    /// `None` if the range meets another's edges, or its own edges meet another's range.
    fn reserve(&self, range: Range<u64>) -> Option<u64> {
        let mut state = self.state.borrow_mut();
        let clash = state.busy.iter().any(|(_, other)| {
            let reach = |range: &Range<u64>| {
                round_down(range.start, SECTOR)..range.end.next_multiple_of(SECTOR)
            };
            let overlap = |a: &Range<u64>, b: &Range<u64>| a.start < b.end && b.start < a.end;
            let edges = |range: &Range<u64>| {
                let reach = reach(range);
                [reach.start..range.start.min(range.end), range.end..reach.end]
                    .into_iter()
                    .filter(|edge| !edge.is_empty())
                    .map(|edge| round_down(edge.start, SECTOR))
                    .map(|sector| sector..sector + SECTOR)
                    .collect::<Vec<_>>()
            };
            edges(other).iter().any(|edge| overlap(edge, &reach(&range)))
                || edges(&range).iter().any(|edge| overlap(edge, &reach(other)))
        });
        if clash {
            return None;
        }
        let id = state.next;
        state.next += 1;
        state.busy.push((id, range));
        Some(id)
    }

    async fn read(&self, offset: u64, len: u64) {
        let began = self.model.borrow_mut().now();
        let buf = Buf::heap(len as usize);
        let read = async {
            let inside = self.gate.enter().await;
            inside.overlay.read(&self.sim, &inside.image, offset, buf.clone()).await
        };
        match read.await {
            Ok(()) => {
                if self.has_lost_pages() {
                    return;
                }
                let checked = self.model.borrow_mut().check_read(began, offset, &buf.to_vec());
                if let Err(violation) = checked {
                    self.violation(violation);
                }
            }
            Err(error) => self.settle::<()>(Err(error)),
        }
    }

    /// Whether a buffered data file may have lost pages to a failed sync: then nobody can say what
    /// reads return, until the replica is opened again.
    fn has_lost_pages(&self) -> bool {
        self.sim.failed_syncs() > self.failed_syncs && self.buffered
    }

    async fn flush(&self, flush: impl Future<Output = IoResult<()>>) {
        let began = self.model.borrow_mut().now();
        let overlay = self.overlay();
        let (poisoned, size) = (overlay.poisoned().is_some(), overlay.size());
        let still = |state: &State| state.busy.is_empty().then_some(state.next);
        let before = still(&self.state.borrow());
        let result = flush.await;
        if result.is_ok() {
            // Nothing changed meanwhile, so nothing is left that the tail could lack.
            let at_rest = before.is_some() && before == still(&self.state.borrow());
            if at_rest && self.tail.as_ref().is_some_and(|place| !place.holds()) {
                self.violation("all is durable, and the tail does not hold".to_owned());
            }
            if poisoned {
                self.violation("a poisoned overlay acknowledged a flush".to_owned());
            }
            self.state.borrow_mut().outcome.flushes += 1;
            self.model.borrow_mut().flushed(began);
            self.sizes.borrow_mut().retain(|other| *other >= size);
        }
        self.settle(result);
    }

    async fn grow(&self, by: u64) {
        let inside = self.gate.enter().await;
        let size = inside.overlay.size() + by;
        self.sizes.borrow_mut().push(size);
        let result = inside.overlay.resize(&self.sim, size).await;
        if result.is_ok() {
            // What others asked for before is no longer possible if it was less.
            self.sizes.borrow_mut().retain(|other| *other >= size);
        }
        match result {
            // Another guest was faster.
            Err(error) if error.kind() == Kind::Invalid && inside.overlay.size() > size => {}
            result => self.settle(result),
        }
    }

    /// Judges how an operation ended.
    fn settle<T>(&self, result: IoResult<T>) {
        let Err(error) = result else { return };
        tracing::debug!(%error, "failed");
        self.state.borrow_mut().outcome.failures += 1;
        let poisoned = self.overlay().poisoned().is_some();
        match error.kind() {
            Kind::Io | Kind::NoSpace if self.faulty => {}
            Kind::Poisoned if self.faulty && poisoned => {}
            _ => self.violation(format!("an operation failed: {error}")),
        }
    }

    fn violation(&self, found: String) {
        self.state.borrow_mut().violation.get_or_insert(found);
    }
}
