//! What a replica may hold after a power cut, told by its writers and by the marks in the log.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Result, bail, ensure};
use fastrand::Rng;

use super::SECTOR;

/// What each sector may hold: all that was ever written to it, and how much of that is promised.
#[derive(Default)]
pub(super) struct Model {
    /// The numbers of a sector's writes, in order; a sector belongs to one writer.
    sectors: BTreeMap<u64, Vec<u64>>,
    writers: BTreeMap<u64, u64>,
    zeros: BTreeSet<u64>,
    /// For each writer, its last write that an acknowledged flush covers.
    flushed: BTreeMap<u64, u64>,
    /// Writes that were durable by themselves.
    forced: BTreeSet<u64>,
}

impl Model {
    pub(super) fn take(&mut self, change: Change) {
        for sector in change.sectors {
            self.sectors.entry(sector).or_default().push(change.number);
        }
        self.writers.insert(change.number, change.id);
        if change.zero {
            self.zeros.insert(change.number);
        }
    }

    /// A mark: `f-WRITER-NUMBER` or `u-WRITER-NUMBER`.
    pub(super) fn hear(&mut self, mark: &str) -> Result<()> {
        let words: Vec<_> = mark.split('-').collect();
        match words[..] {
            ["f", id, number] => drop(self.flushed.insert(id.parse()?, number.parse()?)),
            ["u", _, number] => drop(self.forced.insert(number.parse()?)),
            ["begin"] | ["dm", "log", "writes", "end"] => {}
            _ => bail!("mark {mark:?} is unknown"),
        }
        Ok(())
    }

    /// How many of a sector's writes are out of the question: the last of them is promised.
    fn promised(&self, numbers: &[u64]) -> usize {
        let durable = |number: &u64| {
            let flushed = self.writers.get(number).and_then(|id| self.flushed.get(id));
            self.forced.contains(number) || flushed.is_some_and(|last| number <= last)
        };
        numbers.iter().rposition(durable).map_or(0, |at| at + 1)
    }

    pub(super) fn check(&self, all: &[u8], base: &[u8], tally: &mut Tally) -> Result<()> {
        for (index, found) in all.chunks_exact(SECTOR as usize).enumerate() {
            let sector = index as u64;
            let base = &base[index * SECTOR as usize..(index + 1) * SECTOR as usize];
            let Some(numbers) = self.sectors.get(&sector) else {
                ensure!(found == base, "sector {sector} was never written, but changed");
                continue;
            };
            let is = |number: &u64| match self.zeros.contains(number) {
                true => found.iter().all(|byte| *byte == 0),
                false => found == fill(*number, sector),
            };
            let promised = self.promised(numbers);
            let allowed = &numbers[promised.saturating_sub(1)..];
            if !(allowed.iter().any(is) || promised == 0 && found == base) {
                let older = numbers.iter().rfind(|number| is(number));
                bail!(
                    "sector {sector} may hold writes {allowed:?}{}, but holds {}",
                    if promised == 0 { " or the image" } else { "" },
                    match older {
                        Some(number) => format!("write {number}"),
                        None if found == base => "the image".to_string(),
                        None => format!("{:02x?}…", &found[..16]),
                    }
                );
            }
            tally.promised += u64::from(promised > 0);
            tally.open += u64::from(allowed.len() > usize::from(promised > 0));
            tally.lost += u64::from(!numbers.last().is_some_and(is));
        }
        Ok(())
    }
}

/// Sectors that a writer changed, in one operation.
pub(super) struct Change {
    pub(super) number: u64,
    pub(super) id: u64,
    pub(super) sectors: Vec<u64>,
    pub(super) zero: bool,
}

/// What the checks saw.
#[derive(Default)]
pub(super) struct Tally {
    pub(super) torn: u64,
    pub(super) promised: u64,
    pub(super) open: u64,
    pub(super) lost: u64,
}

/// The content of a sector in write `number`: no other write's, no other sector's.
pub(super) fn fill(number: u64, sector: u64) -> [u8; SECTOR as usize] {
    let mut bytes = [0; SECTOR as usize];
    Rng::with_seed(number << 20 | sector).fill(&mut bytes);
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn marks_promise_what_came_before_them() {
        let mut model = Model::default();
        for (number, id, sectors, zero) in
            [(1, 0, vec![4, 5], false), (2, 1, vec![9], false), (3, 0, vec![5], true)]
        {
            model.take(Change { number, id, sectors, zero });
        }
        let base = vec![7; 16 * 512];
        let mut disk = base.clone();
        let mut tally = Tally::default();
        // Nothing is promised: the image will do.
        model.check(&disk, &base, &mut tally).unwrap();
        model.hear("f-0-1").unwrap();
        assert!(model.check(&disk, &base, &mut tally).is_err());
        for sector in [4, 5] {
            let at = sector as usize * 512;
            disk[at..at + 512].copy_from_slice(&fill(1, sector));
        }
        model.check(&disk, &base, &mut tally).unwrap();
        // What came later may be there as well.
        disk[5 * 512..6 * 512].fill(0);
        model.check(&disk, &base, &mut tally).unwrap();
        model.hear("u-1-2").unwrap();
        assert!(model.check(&disk, &base, &mut tally).is_err());
        disk[9 * 512..10 * 512].copy_from_slice(&fill(2, 9));
        model.check(&disk, &base, &mut tally).unwrap();
        disk[0] = 1;
        assert!(model.check(&disk, &base, &mut tally).is_err());
        assert!(model.hear("x").is_err());
    }
}
