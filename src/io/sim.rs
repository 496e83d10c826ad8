//! The simulated disk: files in memory that lose, keep, tear and reorder what was not synced, fail
//! when asked to, and stop dead at any step.
//!
//! One thread, one seed: [`Sim::run`] polls the tasks and completes their operations in an order
//! that the seed decides, so that a run with the same seed takes the same course. What a crash
//! leaves is in `disk`; what it must leave is for the caller to know.
//!
//! Invariants:
//! - Nothing is durable before a sync that was issued after its completion has succeeded; and what
//!   isn't durable may be lost at a power cut, each sector on its own.
//! - An operation takes effect when it completes; one in flight at a crash may have taken effect in
//!   any of its sectors.
//! - After a failed sync, what it covered may be lost for good, and no later sync brings it back.
//! - A direct file refuses what a direct file refuses.

mod disk;
mod tasks;

use std::{
    cell::RefCell,
    collections::BTreeMap,
    future::Future,
    io::{Error, Result},
    ops::Range,
    pin::Pin,
    rc::Rc,
    task::{Context, Poll, Waker},
    time::Duration,
};

pub use disk::Cut;
use disk::File;
pub use tasks::{End, Task};

use super::{Buf, Io};
use crate::units::SECTOR;

/// A simulated node: its files, and what is in flight on them. Clones are handles of the same one.
#[derive(Clone)]
pub struct Sim(Rc<RefCell<World>>);

/// An open file of a [`Sim`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SimFile(usize);

/// How often operations fail, in 1,024ths.
#[derive(Clone, Copy, Debug, Default)]
pub struct Faults {
    /// Reads, with EIO.
    pub read: u32,
    /// Writes, punches, zeroings and changes of length, with EIO or ENOSPC, half done.
    pub write: u32,
    /// Syncs, with EIO.
    pub sync: u32,
}

/// A disk that does not do what it acknowledges: what is built on it must be seen to fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lie {
    /// Syncs are acknowledged and make nothing durable.
    Sync,
}

struct World {
    rng: fastrand::Rng,
    files: Vec<File>,
    in_flight: Vec<Operation>,
    ended: BTreeMap<u64, Outcome>,
    next: u64,
    /// Counts effects on files: a sync covers those before it.
    clock: u64,
    /// Counts operations that change files.
    changes: u64,
    failed_syncs: u64,
    faults: Faults,
}

struct Operation {
    id: u64,
    file: usize,
    kind: Kind,
    waker: Option<Waker>,
}

#[derive(Debug)]
enum Kind {
    Read(Buf, u64),
    Write(Buf, u64),
    Sync {
        seen: u64,
    },
    Punch(Range<u64>),
    Zero(Range<u64>),
    SetLen(u64),
    DataAfter(u64),
    /// Time passes as the seed wants it to: a sleep may end before or after anything else.
    Sleep,
}

impl Kind {
    fn changes(&self) -> bool {
        matches!(self, Kind::Write(..) | Kind::Punch(_) | Kind::Zero(_) | Kind::SetLen(_))
    }
}

type Outcome = Result<Option<Range<u64>>>;

impl Sim {
    /// A node without files, whose every choice follows from `seed`.
    pub fn new(seed: u64) -> Sim {
        Sim(Rc::new(RefCell::new(World {
            rng: fastrand::Rng::with_seed(seed),
            files: Vec::new(),
            in_flight: Vec::new(),
            ended: BTreeMap::new(),
            next: 0,
            clock: 0,
            changes: 0,
            failed_syncs: 0,
            faults: Faults::default(),
        })))
    }

    /// A new file of `len` bytes that durably begins with `content`; `align` as [`Io::align`].
    pub fn create(&self, align: u64, content: &[u8], len: u64) -> SimFile {
        let mut world = self.0.borrow_mut();
        world.files.push(File::new(align, content, len));
        SimFile(world.files.len() - 1)
    }

    /// From now on, how often operations fail.
    pub fn set_faults(&self, faults: Faults) {
        self.0.borrow_mut().faults = faults;
    }

    /// From now on, so many in 1,024 reads of this file fail with EIO, besides those of [`Sim::set_faults`].
    pub fn set_read_faults(&self, file: SimFile, rate: u32) {
        self.0.borrow_mut().files[file.0].read_faults = rate;
    }

    /// From now on, operations on this file don't end; or do again, those under way too.
    pub fn set_hung(&self, file: SimFile, hung: bool) {
        self.0.borrow_mut().files[file.0].hung = hung;
    }

    /// From now on, the file lies.
    pub fn set_lie(&self, file: SimFile, lie: Lie) {
        self.0.borrow_mut().files[file.0].lie = Some(lie);
    }

    /// Lets a power cut tear the file's sectors: one of each write in flight may hold bytes of the
    /// old and of the new content.
    pub fn set_torn_sectors(&self, file: SimFile) {
        self.0.borrow_mut().files[file.0].torn_sectors = true;
    }

    /// The file's bytes as they would be read now, without a task.
    pub fn peek(&self, file: SimFile) -> Vec<u8> {
        let world = self.0.borrow();
        let file = &world.files[file.0];
        file.read(0, file.len() as usize)
    }

    /// Puts durable bytes into a file at rest, as damage does.
    pub fn poke(&self, file: SimFile, offset: u64, bytes: &[u8]) {
        self.0.borrow_mut().files[file.0].poke(offset, bytes);
    }

    /// A node of its own whose files are as these are now. Nothing may be in flight.
    pub fn fork(&self, seed: u64) -> Sim {
        let world = self.0.borrow();
        assert!(world.in_flight.is_empty(), "forked at rest");
        let fork = Sim::new(seed);
        fork.0.borrow_mut().files = world.files.clone();
        fork.0.borrow_mut().clock = world.clock;
        fork
    }

    /// How many operations have changed a file.
    pub fn changes(&self) -> u64 {
        self.0.borrow().changes
    }

    /// How many syncs have failed.
    pub fn failed_syncs(&self) -> u64 {
        self.0.borrow().failed_syncs
    }

    /// The node loses power: of what was not durable, `cut` decides sector by sector.
    pub fn power_cut(&self, cut: Cut) {
        tracing::debug!(?cut, "power cut");
        let mut world = self.0.borrow_mut();
        world.land_in_flight();
        let World { files, rng, .. } = &mut *world;
        files.iter_mut().for_each(|file| file.settle(cut, rng));
    }

    /// The process is killed: what completed is there and no more durable than before; what was in
    /// flight took effect in some sectors.
    pub fn kill(&self) {
        tracing::debug!("killed");
        let mut world = self.0.borrow_mut();
        world.land_in_flight();
        let World { files, rng, .. } = &mut *world;
        files.iter_mut().for_each(|file| file.survive(rng));
    }

    async fn submit(&self, file: &SimFile, kind: Kind) -> Outcome {
        InFlight { sim: self.clone(), file: file.0, kind: Some(kind), id: None }.await
    }
}

impl World {
    /// The operations that may end now, as places in those in flight.
    fn completable(&self) -> impl Iterator<Item = usize> {
        let hangs = |operation: &Operation| {
            !matches!(operation.kind, Kind::Sleep) && self.files[operation.file].hung
        };
        let all = self.in_flight.iter().enumerate();
        all.filter(move |(_, operation)| !hangs(operation)).map(|(index, _)| index)
    }

    /// Completes the operation at `index` of those in flight.
    fn complete(&mut self, index: usize) {
        let operation = self.in_flight.swap_remove(index);
        let outcome = self.perform(operation.file, &operation.kind);
        if let Some(waker) = operation.waker {
            self.ended.insert(operation.id, outcome);
            waker.wake();
        }
    }

    fn perform(&mut self, index: usize, kind: &Kind) -> Outcome {
        if let Kind::Sleep = kind {
            return Ok(None);
        }
        let (file, rng) = (&mut self.files[index], &mut self.rng);
        file.check(kind)?;
        let rate = match kind {
            Kind::Read(..) => self.faults.read.max(file.read_faults),
            Kind::DataAfter(_) => self.faults.read,
            Kind::Sync { .. } => self.faults.sync,
            _ => self.faults.write,
        };
        let fails = rng.u32(0..1024) < rate;
        tracing::trace!(file = index, ?kind, fails, "completes");
        self.clock += 1;
        self.changes += u64::from(kind.changes());
        match kind {
            Kind::Read(buf, offset) if !fails => buf.copy_from(&file.read(*offset, buf.len())),
            Kind::DataAfter(offset) if !fails => return Ok(file.data_after(*offset)),
            Kind::Sync { .. } if file.lie == Some(Lie::Sync) => {}
            Kind::Sync { seen } if fails => {
                self.failed_syncs += 1;
                file.fail_sync(*seen, rng);
            }
            Kind::Sync { seen } => file.sync(*seen),
            Kind::SetLen(len) if !fails => file.set_len(*len, self.clock),
            // A failed one leaves any mixture of old and new sectors.
            Kind::Write(..) | Kind::Punch(_) | Kind::Zero(_) => {
                file.change(kind, self.clock, |_| !fails || rng.bool());
            }
            Kind::Read(..) | Kind::DataAfter(_) | Kind::SetLen(_) | Kind::Sleep => {}
        }
        match fails {
            false => Ok(None),
            true if matches!(kind, Kind::Write(..) | Kind::Zero(_)) && rng.bool() => {
                Err(Error::from_raw_os_error(libc::ENOSPC))
            }
            true => Err(Error::from_raw_os_error(libc::EIO)),
        }
    }

    /// At a crash: what is in flight becomes one more thing that each sector may hold.
    fn land_in_flight(&mut self) {
        let mut operations = std::mem::take(&mut self.in_flight);
        self.rng.shuffle(&mut operations);
        for Operation { file, kind, .. } in operations {
            if let Kind::Sleep = kind {
                continue;
            }
            let file = &mut self.files[file];
            if file.check(&kind).is_ok() {
                self.clock += 1;
                file.land(&kind, self.clock, &mut self.rng);
            }
        }
        self.ended.clear();
    }
}

/// A future operation, submitted when it is first polled.
struct InFlight {
    sim: Sim,
    file: usize,
    kind: Option<Kind>,
    id: Option<u64>,
}

impl Future for InFlight {
    type Output = Outcome;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Outcome> {
        let sim = self.sim.clone();
        let mut world = sim.0.borrow_mut();
        let waker = Some(context.waker().clone());
        if let Some(kind) = self.kind.take() {
            let id = world.next;
            world.next += 1;
            let kind = match kind {
                Kind::Sync { .. } => Kind::Sync { seen: world.clock },
                other => other,
            };
            world.in_flight.push(Operation { id, file: self.file, kind, waker });
            self.id = Some(id);
            return Poll::Pending;
        }
        let Some(id) = self.id else { return Poll::Pending };
        if let Some(outcome) = world.ended.remove(&id) {
            self.id = None;
            return Poll::Ready(outcome);
        }
        if let Some(operation) = world.in_flight.iter_mut().find(|operation| operation.id == id) {
            operation.waker = waker;
        }
        Poll::Pending
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        let Some(id) = self.id else { return };
        let mut world = self.sim.0.borrow_mut();
        world.ended.remove(&id);
        // The operation goes on; nobody hears of its end.
        if let Some(operation) = world.in_flight.iter_mut().find(|operation| operation.id == id) {
            operation.waker = None;
        }
    }
}

impl Io for Sim {
    type File = SimFile;

    fn alloc(&self, len: usize) -> Buf {
        let buf = Buf::heap(len);
        // Arbitrary content: whoever relies on zeros is found out.
        buf.fill(0xa5);
        buf
    }

    fn align(&self, file: &SimFile) -> u64 {
        self.0.borrow().files[file.0].align
    }

    async fn read(&self, file: &SimFile, buf: Buf, offset: u64) -> Result<()> {
        self.submit(file, Kind::Read(buf, offset)).await.map(drop)
    }

    async fn write(&self, file: &SimFile, buf: Buf, offset: u64) -> Result<()> {
        self.submit(file, Kind::Write(buf, offset)).await.map(drop)
    }

    async fn sync(&self, file: &SimFile) -> Result<()> {
        self.submit(file, Kind::Sync { seen: 0 }).await.map(drop)
    }

    async fn punch(&self, file: &SimFile, range: Range<u64>) -> Result<()> {
        self.submit(file, Kind::Punch(range)).await.map(drop)
    }

    async fn zero(&self, file: &SimFile, range: Range<u64>) -> Result<()> {
        self.submit(file, Kind::Zero(range)).await.map(drop)
    }

    async fn set_len(&self, file: &SimFile, len: u64) -> Result<()> {
        self.submit(file, Kind::SetLen(len)).await.map(drop)
    }

    async fn sleep(&self, _: Duration) {
        // It takes effect on no file, and can't fail.
        let _ = self.submit(&SimFile(0), Kind::Sleep).await;
    }

    async fn data_after(&self, file: &SimFile, offset: u64) -> Result<Option<Range<u64>>> {
        self.submit(file, Kind::DataAfter(offset)).await
    }
}

/// The numbers of the sectors that hold any of these bytes.
fn sectors(bytes: &Range<u64>) -> Range<u64> {
    bytes.start / SECTOR..bytes.end.div_ceil(SECTOR)
}

#[cfg(test)]
mod tests;
