//! Tables: sets of a few entries in an array. Watched devices and owners, which user space writes; bios
//! and requests under way, which are entered and taken here.
//!
//! Invariants:
//! - The place of a flight is taken and left by exchanging its key, 0 for an address or an address for 0:
//!   two processors never have one place. What stands beside the key belongs to who took it.
//! - A set has at most one flight of an address: who enters one has looked for it.
//! - Bios take their places without an exchange. Two processors that choose one place within the same
//!   few nanoseconds, or a full set's eviction, cost an entry: its request counts as an orphan.

use underlay_agent_ebpf::{self as layout, Bios, Flight, Flights, PLACES, Watched, set_of};

use crate::kernel::low;
use crate::maps::{FLIGHTS, OWNERS, PENDING, WATCHED, exchange};

/// The watched device of this number.
#[inline(always)]
pub fn watched(dev: u32) -> Option<Watched> {
    if dev == 0 {
        return None;
    }
    let set = WATCHED.get_ptr(set_of(dev, layout::WATCHED))?.cast::<Watched>();
    for at in 0..layout::WAYS {
        // SAFETY: the set is live map memory of that many entries, each one aligned word.
        let entry = unsafe { *set.add(at) };
        if entry.dev == dev {
            return Some(entry);
        }
    }
    None
}

/// 1 if I/O of this thread group is our own.
#[inline(always)]
pub fn own(tgid: u32) -> u32 {
    let set = OWNERS.get_ptr(set_of(tgid, layout::OWNERS)).map(|set| set.cast::<u32>());
    let Some(set) = set else { return 0 };
    for at in 0..layout::WAYS {
        // SAFETY: the set is live map memory of that many entries.
        if unsafe { *set.add(at) } == tgid {
            return 1;
        }
    }
    0
}

/// Enters a bio: at its own place if it has one, at a free one, or at that of the oldest. A second entry
/// of an address, from a bio that never got a request, lies behind the new one, and is not found.
#[inline(always)]
pub fn put_pending(key: u64, queued: u64) -> Option<()> {
    let set = PENDING.get_ptr_mut(set_of(low(key), layout::PENDING))?;
    let (keys, times) = parts(set);
    let (mut place, mut oldest) = (0, u64::MAX);
    for at in 0..PLACES {
        // SAFETY: the set is live map memory of that many entries, aligned words.
        let (other, time) = unsafe { (keys.add(at).read_volatile(), times.add(at)) };
        if other == 0 || other == key {
            place = at;
            break;
        }
        // SAFETY: as above.
        let time = unsafe { time.read_volatile() };
        if time < oldest {
            (place, oldest) = (at, time);
        }
    }
    // SAFETY: as above.
    unsafe {
        times.add(place).write_volatile(queued);
        keys.add(place).write_volatile(key);
    }
    Some(())
}

/// When a bio was submitted, as [`Bios::queued`] has it.
#[inline(always)]
pub fn pending(key: u64) -> Option<u64> {
    let (_, times, at) = bio(key)?;
    // SAFETY: a place of a set.
    Some(unsafe { times.add(at).read_volatile() })
}

/// Takes a bio out of the table.
#[inline(always)]
pub fn take_pending(key: u64) -> Option<u64> {
    let (keys, times, at) = bio(key)?;
    // SAFETY: a place of a set. One processor issues the request of a bio.
    unsafe {
        let queued = times.add(at).read_volatile();
        keys.add(at).write_volatile(0);
        Some(queued)
    }
}

#[inline(always)]
fn bio(key: u64) -> Option<(*mut u64, *mut u64, usize)> {
    let set = PENDING.get_ptr_mut(set_of(low(key), layout::PENDING))?;
    let (keys, times) = parts(set);
    Some((keys, times, find(keys, key)?))
}

#[inline(always)]
fn parts(set: *mut Bios) -> (*mut u64, *mut u64) {
    // SAFETY: only addresses of fields are taken.
    unsafe { ((&raw mut (*set).keys).cast(), (&raw mut (*set).queued).cast()) }
}

/// The set in which a flight is or will be: its keys, and what stands beside them.
#[inline(always)]
fn flights(key: u64) -> Option<(*mut u64, *mut Flight)> {
    let set: *mut Flights = FLIGHTS.get_ptr_mut(set_of(low(key), layout::FLIGHTS))?;
    // SAFETY: only addresses of fields are taken.
    Some(unsafe { ((&raw mut (*set).keys).cast(), (&raw mut (*set).flights).cast()) })
}

/// The place of the flight of this address.
#[inline(always)]
pub fn flight(key: u64) -> Option<*mut Flight> {
    let (keys, flights) = flights(key)?;
    // SAFETY: a place of the set.
    find(keys, key).map(|at| unsafe { flights.add(at) })
}

/// Enters a flight whose address is not in the table; nothing if its set is full.
#[inline(always)]
pub fn put_flight(key: u64, entry: &Flight) -> Option<()> {
    let (keys, flights) = flights(key)?;
    for at in 0..PLACES {
        // SAFETY: a place of the set. Who exchanges its key owns the rest; the request it is for is not
        // issued yet, so that nobody looks for it.
        unsafe {
            let key_there = keys.add(at);
            if key_there.read_volatile() == 0 && exchange(key_there, 0, key) {
                *flights.add(at) = *entry;
                return Some(());
            }
        }
    }
    None
}

/// Takes the flight of this address out of the table.
#[inline(always)]
pub fn take_flight(key: u64) -> Option<Flight> {
    let (keys, flights) = flights(key)?;
    let at = find(keys, key)?;
    // SAFETY: a place of the set. Should another take it in the meantime, the exchange fails.
    unsafe {
        let entry = *flights.add(at);
        exchange(keys.add(at), key, 0).then_some(entry)
    }
}

#[inline(always)]
fn find(keys: *mut u64, key: u64) -> Option<usize> {
    for at in 0..PLACES {
        // SAFETY: the set is live map memory of that many keys, aligned words.
        if unsafe { keys.add(at).read_volatile() } == key {
            return Some(at);
        }
    }
    None
}
