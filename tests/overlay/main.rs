//! Invariants checked: what an overlay holds agrees with a `Vec<u8>`; bad input from the map file
//! gives an error or the right content, never a panic or the image's content; failures of the disk
//! are told, and leave a replica that works or is poisoned; flushes share commits; threads that
//! share a replica do not disturb each other.

mod damage;
mod failures;
mod files;
mod model;
mod tail;
mod threads;

use underlay::{
    Result,
    cow::{Base, Overlay, format},
    io::{
        Buf, Io,
        sim::{Sim, SimFile},
    },
    units::Block,
};
use uuid::Uuid;

const ID: Uuid = Uuid::from_u128(42);
const BLOCK: u64 = 4096;

/// An image of `size` bytes, each its offset's, but for every fourth block, which is zeros.
struct Pattern {
    size: u64,
}

impl Pattern {
    fn byte(&self, offset: u64) -> u8 {
        if offset >= self.size || self.is_zero_block(offset / BLOCK) {
            return 0;
        }
        (offset % 253) as u8 | 1
    }

    fn is_zero_block(&self, block: u64) -> bool {
        block % 4 == 3
    }
}

impl<I: Io> Base<I> for Pattern {
    fn size(&self) -> u64 {
        self.size
    }

    fn is_zero(&self, block: Block) -> bool {
        self.is_zero_block(block.0)
    }

    async fn read(&self, _: &I, offset: u64, buf: Buf) -> Result<()> {
        assert!(offset + buf.len() as u64 <= self.size, "the image is not read past its end");
        let end = offset + buf.len() as u64;
        buf.copy_from(&(offset..end).map(|at| self.byte(at)).collect::<Vec<u8>>());
        Ok(())
    }
}

/// A simulated disk with a new, empty overlay.
struct Disk {
    sim: Sim,
    data: SimFile,
    map: SimFile,
    base: Pattern,
}

impl Disk {
    fn new(size: u64, records: u32) -> Disk {
        Disk::with_map(size, &format::blank(ID, size, records))
    }

    fn with_map(size: u64, map: &[u8]) -> Disk {
        let sim = Sim::new(7);
        let (data, map) = (sim.create(512, &[], size), sim.create(4096, map, 0));
        Disk { sim, data, map, base: Pattern { size: 10 * BLOCK + 700 } }
    }

    fn open(&self) -> Result<Overlay<Sim>> {
        self.run(Overlay::open(&self.sim, self.data, self.map, ID, None))
    }

    fn run<T>(&self, task: impl Future<Output = T>) -> T {
        self.sim.run_one(task, None).expect("the task ends")
    }

    fn write(&self, overlay: &Overlay<Sim>, offset: u64, bytes: &[u8]) -> Result<()> {
        self.run(overlay.write(&self.sim, &self.base, offset, Buf::from_bytes(bytes)))
    }

    fn read(&self, overlay: &Overlay<Sim>, offset: u64, len: usize) -> Result<Vec<u8>> {
        let buf = Buf::heap(len);
        self.run(overlay.read(&self.sim, &self.base, offset, buf.clone()))?;
        Ok(buf.to_vec())
    }

    fn flush(&self, overlay: &Overlay<Sim>) -> Result<()> {
        self.run(overlay.flush(&self.sim))
    }
}
