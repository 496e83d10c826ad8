//! What a replica must hold: for each sector the content that was acknowledged last, and those that it may
//! have instead, because a request was under way when the daemon died, or failed.
//!
//! Invariants:
//! - What was acknowledged is there, flushed or not, whoever kills the daemon: the kernel goes on.
//! - A sector under way is old or new, nothing else, and stays what it was found to be.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Result, bail, ensure};
use fastrand::Rng;

/// Bytes of a sector.
pub const SECTOR: usize = 512;
/// The number that stands for what the image holds.
const BASE: u32 = 0;
/// The number that stands for zeros.
pub const ZEROS: u32 = 1;
/// The first number of a write.
const FIRST: u32 = 2;

/// A number that no other write has.
pub fn number() -> u32 {
    static NEXT: AtomicU32 = AtomicU32::new(FIRST);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

/// What a write of this number puts into a sector: no other write's, no other sector's. It names both.
pub fn fill(number: u32, sector: usize) -> [u8; SECTOR] {
    let mut bytes = [0; SECTOR];
    if number != ZEROS {
        Rng::with_seed(u64::from(number) << 32 | sector as u64).fill(&mut bytes);
        bytes[..4].copy_from_slice(&number.to_le_bytes());
        bytes[4..12].copy_from_slice(&(sector as u64).to_le_bytes());
    }
    bytes
}

/// The content of one replica.
#[derive(Clone)]
pub struct Content {
    /// What it began as; zeros beyond.
    base: Arc<Vec<u8>>,
    /// The number of what each sector holds.
    settled: Vec<u32>,
    /// What sectors may hold besides.
    unsure: BTreeMap<usize, Vec<u32>>,
}

impl Content {
    /// A new replica of `size` bytes.
    pub fn new(base: Arc<Vec<u8>>, size: u64) -> Content {
        let mut content = Content { base, settled: Vec::new(), unsure: BTreeMap::new() };
        content.grow(size);
        content
    }

    /// It has `size` bytes at least.
    pub fn grow(&mut self, size: u64) {
        let sectors = size as usize / SECTOR;
        if sectors > self.settled.len() {
            self.settled.resize(sectors, BASE);
        }
    }

    /// A request puts `number` into these sectors, and may fail, or not be heard of any more.
    pub fn begin(&mut self, first: usize, count: usize, number: u32) {
        for sector in first..first + count {
            self.unsure.entry(sector).or_default().push(number);
        }
    }

    /// It was acknowledged.
    pub fn done(&mut self, first: usize, count: usize, number: u32) {
        for sector in first..first + count {
            self.unsure.remove(&sector);
            self.settled[sector] = number;
        }
    }

    /// Compares what was read at the sector `first` and on.
    pub fn compare(&self, first: usize, found: &[u8]) -> Result<()> {
        for (sector, found) in (first..).zip(found.chunks(SECTOR)) {
            self.which(sector, found)?;
        }
        Ok(())
    }

    /// Compares all of the device; from now on every sector is what it was found to be.
    pub fn settle(&mut self, found: &[u8]) -> Result<()> {
        ensure!(found.len().is_multiple_of(SECTOR), "{} bytes are no device", found.len());
        self.grow(found.len() as u64);
        for (sector, found) in found.chunks(SECTOR).enumerate() {
            self.settled[sector] = self.which(sector, found)?;
        }
        // A device that did not grow after all has nothing beyond its end.
        self.settled.truncate(found.len() / SECTOR);
        self.unsure.clear();
        Ok(())
    }

    /// Whether nothing of it is in doubt.
    pub fn is_sure(&self) -> bool {
        self.unsure.is_empty()
    }

    /// The number of what a sector holds, if it may.
    fn which(&self, sector: usize, found: &[u8]) -> Result<u32> {
        let settled = self.settled.get(sector).copied().unwrap_or(BASE);
        let others = self.unsure.get(&sector).map_or(&[][..], Vec::as_slice);
        let may = others.iter().rev().copied().chain([settled]);
        if let Some(number) = may.clone().find(|number| self.fits(sector, *number, found)) {
            return Ok(number);
        }
        let may: Vec<u32> = may.collect();
        let is = match () {
            () if self.fits(sector, BASE, found) => "the image's content".to_owned(),
            () if self.fits(sector, ZEROS, found) => "zeros".to_owned(),
            () => {
                let number = u32::from_le_bytes([found[0], found[1], found[2], found[3]]);
                let at = u64::from_le_bytes(found[4..12].try_into()?);
                let whole = fill(number, at as usize).as_slice() == found;
                let of = if whole { "all of" } else { "perhaps" };
                format!("{of} write {number} to sector {at}, {:02x?}", &found[..16])
            }
        };
        bail!(
            "sector {sector} may hold {may:?} (0: the image's, 1: zeros, else a write), but is {is}"
        )
    }

    fn fits(&self, sector: usize, number: u32, found: &[u8]) -> bool {
        if number != BASE {
            return found == fill(number, sector).as_slice();
        }
        let at = sector * SECTOR;
        let base = self.base.get(at..(at + SECTOR).min(self.base.len())).unwrap_or_default();
        found.starts_with(base) && found[base.len()..].iter().all(|byte| *byte == 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn old_or_new_while_under_way_and_nothing_else_after() {
        let base = Arc::new(vec![7; 2 * SECTOR]);
        let mut content = Content::new(base.clone(), 4 * SECTOR as u64);
        let mut device = [&base[..], &[0; 2 * SECTOR][..]].concat();
        content.settle(&device).unwrap();
        let number = number();
        content.begin(1, 2, number);
        content.settle(&device).unwrap();
        content.begin(1, 2, number);
        device[SECTOR..2 * SECTOR].copy_from_slice(&fill(number, 1));
        assert!(!content.is_sure());
        content.settle(&device).unwrap();
        assert!(content.is_sure());
        content.begin(2, 1, number);
        content.done(2, 1, number);
        let lost = content.settle(&device).unwrap_err().to_string();
        assert!(lost.contains("sector 2") && lost.contains("is the image's content"), "{lost}");
        device[2 * SECTOR..3 * SECTOR].copy_from_slice(&fill(number, 1));
        let misplaced = content.compare(0, &device).unwrap_err().to_string();
        assert!(misplaced.contains("all of write") && misplaced.contains("to sector 1"));
    }
}
