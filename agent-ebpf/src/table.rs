//! Tables: sets of four entries in an array. Watched devices and owners, which user space writes; bios
//! and requests under way, which are taken and left here.
//!
//! Invariants:
//! - An entry is taken by exchanging its key, 0 for the I/O's or the I/O's for 0: of two processors one
//!   gets it. What stands beside the key belongs to who took it.
//! - Two I/Os of one place at one time are two entries. Which of them ends first is not told apart: the
//!   sum of their times is right, and so is their number. The newest is taken first: an older one may be
//!   one whose completion was missed, and would lend its age to every later I/O of its place.

use underlay_agent_ebpf::{self as layout, Flight, Pending, Watched, set_of, sets_of};

use crate::maps::{FLIGHTS, OWNERS, PENDING, WATCHED, exchange};

/// After so many nanoseconds a bio has either got its request or lost its way.
const FADED: u64 = 10_000_000_000;

/// The watched device of this number.
#[inline(always)]
pub fn watched(dev: u32) -> Option<Watched> {
    let set = WATCHED.get_ptr(set_of(u64::from(dev), layout::WATCHED))?.cast::<Watched>();
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
    let set = OWNERS.get_ptr(set_of(u64::from(tgid), layout::OWNERS)).map(|set| set.cast::<u32>());
    let Some(set) = set else { return 0 };
    for at in 0..layout::WAYS {
        // SAFETY: the set is live map memory of that many entries.
        if unsafe { *set.add(at) } == tgid {
            return 1;
        }
    }
    0
}

/// The place of a pending bio with this key.
#[inline(always)]
pub fn pending(key: u64) -> Option<*mut Pending> {
    for set in sets_of(key, layout::PENDING) {
        let set = PENDING.get_ptr_mut(set)?.cast::<Pending>();
        let (mut found, mut newest) = (None, 0);
        for at in 0..layout::WAYS {
            // SAFETY: the set is live map memory of that many entries.
            let way = unsafe { set.add(at) };
            // SAFETY: as above; a torn key is impossible, it is one aligned word.
            if unsafe { (&raw const (*way).key).read_volatile() } == key {
                // SAFETY: as above.
                let queued = unsafe { (*way).queued };
                if queued >= newest {
                    (found, newest) = (Some(way), queued);
                }
            }
        }
        if found.is_some() {
            return found;
        }
    }
    None
}

/// Takes a pending bio with this key out of the table.
#[inline(always)]
pub fn take_pending(key: u64) -> Option<Pending> {
    let way = pending(key)?;
    // SAFETY: the pointer is an entry's. Should another take it in the meantime, the exchange fails.
    let entry = unsafe { *way };
    // SAFETY: only the field's address is taken.
    exchange(unsafe { &raw mut (*way).key }, key, 0).then_some(entry)
}

/// Enters a bio: at a free place, or at that of one which has waited too long to be still on its way,
/// or in place of the oldest of the second set.
#[inline(always)]
pub fn put_pending(entry: Pending) -> Option<()> {
    let faded = entry.queued.saturating_sub(FADED);
    let (mut place, mut oldest) = (core::ptr::null_mut::<Pending>(), u64::MAX);
    for set in sets_of(entry.key, layout::PENDING) {
        let set = PENDING.get_ptr_mut(set)?.cast::<Pending>();
        (place, oldest) = (set, u64::MAX);
        for at in 0..layout::WAYS {
            // SAFETY: the set is live map memory of that many entries.
            let way = unsafe { set.add(at) };
            // SAFETY: as above. Two that choose one place at the same moment lose one of both: it will
            // count as an orphan.
            let (key, queued) = unsafe { ((*way).key, (*way).queued) };
            let age = if key == 0 { 0 } else { queued };
            if age < oldest {
                (place, oldest) = (way, age);
            }
        }
        if oldest <= faded {
            break;
        }
    }
    if place.is_null() || oldest == u64::MAX {
        return None;
    }
    // SAFETY: `place` is an entry of one of the sets.
    unsafe {
        (*place).queued = entry.queued;
        (*place).sectors = entry.sectors;
        (*place).own = entry.own;
        (&raw mut (*place).key).write_volatile(entry.key);
    }
    Some(())
}

/// The place of a flight with this key whose flags have `flags` set.
#[inline(always)]
pub fn flight(key: u64, flags: u32) -> Option<*mut Flight> {
    for set in sets_of(key, layout::FLIGHTS) {
        let set = FLIGHTS.get_ptr_mut(set)?.cast::<Flight>();
        let (mut found, mut newest) = (None, 0);
        for at in 0..layout::WAYS {
            // SAFETY: the set is live map memory of that many entries.
            let way = unsafe { set.add(at) };
            // SAFETY: as above; a torn key is impossible, it is one aligned word.
            if unsafe { (&raw const (*way).key).read_volatile() } == key {
                // SAFETY: as above.
                let (issued, has) = unsafe { ((*way).issued, (*way).flags) };
                if has & flags == flags && issued >= newest {
                    (found, newest) = (Some(way), issued);
                }
            }
        }
        if found.is_some() {
            return found;
        }
    }
    None
}

/// Takes a flight with this key out of the table.
#[inline(always)]
pub fn take_flight(key: u64) -> Option<Flight> {
    let way = flight(key, 0)?;
    // SAFETY: the pointer is an entry's. Should another take it in the meantime, the exchange fails.
    let entry = unsafe { *way };
    // SAFETY: only the field's address is taken.
    exchange(unsafe { &raw mut (*way).key }, key, 0).then_some(entry)
}

/// Enters a flight; nothing if both its sets are full.
#[inline(always)]
pub fn put_flight(entry: &Flight) -> Option<()> {
    for set in sets_of(entry.key, layout::FLIGHTS) {
        let set = FLIGHTS.get_ptr_mut(set)?.cast::<Flight>();
        for at in 0..layout::WAYS {
            // SAFETY: the set is live map memory of that many entries.
            let way = unsafe { set.add(at) };
            // SAFETY: as above. Who exchanges the key owns the rest; the request it is for is not
            // issued yet, so that nobody looks for it.
            unsafe {
                let key = &raw mut (*way).key;
                if key.read_volatile() != 0 || !exchange(key, 0, entry.key) {
                    continue;
                }
                (*way).issued = entry.issued;
                (*way).waited = entry.waited;
                (*way).sector = entry.sector;
                (*way).sectors = entry.sectors;
                (*way).flags = entry.flags;
            }
            return Some(());
        }
    }
    None
}
