//! User space's side of the tables that it writes: sets of four entries in an array.
//!
//! Invariant: the kernel's table is what [`Sets`] remembers. An entry is a word or two that the kernel
//! reads as a whole, and never moves while it is in the table: a program that runs meanwhile finds it.

use aya::Pod;
use aya::maps::{Array, MapData};
use underlay_agent_ebpf::{Set, WAYS, set_of};

use super::refused;
use crate::error::{Error, Result};
use crate::sys::Plain;

/// A table of entries whose key 0 means that they are free.
pub struct Sets<T>
where
    Plain<Set<T>>: Pod,
{
    map: Array<MapData, Plain<Set<T>>>,
    sets: Vec<Set<T>>,
    what: &'static str,
}

impl<T: Copy + Default> Sets<T>
where
    Plain<Set<T>>: Pod,
{
    /// The table in `map`, with nothing in it.
    pub fn new(map: Array<MapData, Plain<Set<T>>>, what: &'static str) -> Sets<T> {
        let sets = vec![Set::default(); map.len() as usize];
        Sets { map, sets, what }
    }

    /// Enters `entry`, or replaces the one with its key.
    pub fn put(&mut self, number: u32, entry: T, key: impl Fn(&T) -> u32) -> Result<()> {
        let at = set_of(number, self.sets.len() as u32);
        let ways = &self.sets[at as usize].ways;
        let known = ways.iter().position(|other| key(other) == number);
        let place = known.or_else(|| ways.iter().position(|other| key(other) == 0));
        let Some(place) = place else {
            let problem = format!("{WAYS} others fall together with it already; watch fewer");
            return Err(Error::Refused { what: format!("{} {number}", self.what), problem });
        };
        self.set(at, place, entry)
    }

    /// Takes the entry with this key out, if it is there.
    pub fn remove(&mut self, gone: u32, key: impl Fn(&T) -> u32) -> Result<()> {
        let at = set_of(gone, self.sets.len() as u32);
        match self.sets[at as usize].ways.iter().position(|other| key(other) == gone) {
            Some(place) => self.set(at, place, T::default()),
            None => Ok(()),
        }
    }

    fn set(&mut self, at: u32, place: usize, entry: T) -> Result<()> {
        let mut set = self.sets[at as usize];
        set.ways[place] = entry;
        let done = self.map.set(at, Plain(set), 0);
        done.map_err(|error| refused(format!("setting {}", self.what), &error))?;
        self.sets[at as usize] = set;
        Ok(())
    }
}
