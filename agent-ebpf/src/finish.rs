//! The two ends of a flight: where it enters its table, and where it leaves it and is counted.

use core::ops::Add;

use aya_ebpf::helpers::generated::{bpf_get_smp_processor_id, bpf_ktime_get_ns};
use underlay_agent_ebpf::{BUCKETS, CLASSES, Class, Flight, READ, Touch, UNKNOWN, bucket};

use crate::maps::{ALONE, COUNTERS, SHARDS, TOUCHES, add, lost, setting};
use crate::table::{put_flight, take_flight};

/// `BPF_RB_NO_WAKEUP`: user space empties the ring by the clock.
const NO_WAKEUP: u64 = 1;

/// Which of a tracepoint's two programs sees an end.
///
/// The kernel does not run a program within itself: where an interrupt brings an end while its processor's
/// first program sees another, the second does what the first is kept from. Otherwise it finds nothing. Only
/// what interrupts that second one in turn is lost on both.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Turn {
    /// It comes first.
    First,
    /// It comes after the first.
    Second,
}

/// The kernel's monotonic clock, in nanoseconds.
#[inline(always)]
pub fn now() -> u64 {
    // SAFETY: the helper has no preconditions.
    unsafe { bpf_ktime_get_ns() }
}

/// Notes that the device has got it. A flight that is there under its address has ended unseen: the
/// kernel uses the address anew.
#[inline(always)]
pub fn begin(key: u64, there: Option<*mut Flight>, entry: &Flight) {
    if let Some(there) = there {
        // SAFETY: the pointer is an entry's, and whose it was is gone.
        unsafe { *there = *entry };
        // SAFETY: only the address of a field of the entry is taken.
        lost(|losses| unsafe { &raw mut (*losses).replaced });
    } else if put_flight(key, entry).is_none() {
        // SAFETY: only the address of a field of the entry is taken.
        lost(|losses| unsafe { &raw mut (*losses).full });
    }
}

/// Counts the flight that ends; nothing if there is none of this address.
#[inline(always)]
pub fn finish(key: u64, failed: bool, turn: Turn) -> Option<()> {
    let flight = take_flight(key)?;
    let ns = now().saturating_sub(flight.issued);
    count(&flight, ns, failed, turn);
    if u32::from(flight.class >> 1) == READ {
        let touch = Touch {
            sector: flight.sector,
            ns,
            sectors: flight.sectors,
            slot: flight.slot,
            own: flight.class & 1,
            failed: u8::from(failed),
        };
        if TOUCHES.output::<Touch>(&touch, NO_WAKEUP).is_err() {
            // SAFETY: only the address of a field of the entry is taken.
            lost(|losses| unsafe { &raw mut (*losses).ring });
        }
    }
    Some(())
}

#[inline(always)]
fn count(flight: &Flight, ns: u64, failed: bool, turn: Turn) -> Option<()> {
    let shards = setting(&SHARDS);
    // SAFETY: the helper has no preconditions.
    let processor = unsafe { bpf_get_smp_processor_id() };
    let shard = match turn {
        Turn::First => processor & (shards - 1),
        // The one for all: the first program that this one is within may just be adding to its own.
        Turn::Second => shards,
    };
    let entry = COUNTERS.get_ptr_mut(u32::from(flight.slot) * (shards + 1) + shard)?;
    // The bounds are there already; said once more, the verifier sees them.
    let class = usize::from(flight.class) & (CLASSES - 1);
    let device = (bucket(ns) as usize).min(BUCKETS - 1);
    // SAFETY: the entry is live for the whole run, and both indices are in bounds.
    unsafe {
        let class = (&raw mut (*entry).classes).cast::<Class>().add(class);
        increase(&raw mut (*class).count, 1, turn);
        increase(&raw mut (*class).bytes, u64::from(flight.sectors) * 512, turn);
        increase(&raw mut (*class).device_ns, ns, turn);
        increase((&raw mut (*class).device).cast::<u32>().add(device), 1, turn);
        if failed {
            increase(&raw mut (*class).errors, 1, turn);
        }
        if flight.waited != UNKNOWN {
            let queue = (bucket(flight.waited) as usize).min(BUCKETS - 1);
            increase(&raw mut (*class).queue_ns, flight.waited, turn);
            increase(&raw mut (*class).queued, 1, turn);
            increase((&raw mut (*class).queue).cast::<u32>().add(queue), 1, turn);
        }
    }
    Some(())
}

/// Adds to a counter of a shard.
///
/// Where no other processor has the first program's shard, nobody else adds to it: a slot has one kind, so
/// that one program alone counts for it, and the kernel does not run it within itself (since 6.2; before,
/// an interrupt within these few instructions could cost a count).
#[inline(always)]
fn increase<T: Copy + Add<Output = T>>(counter: *mut T, much: T, turn: Turn) {
    if turn == Turn::Second || setting(&ALONE) == 0 {
        return add(counter, much);
    }
    // SAFETY: the pointer is into a live entry of the map. Built for release, additions wrap.
    unsafe { counter.write_volatile(counter.read_volatile() + much) };
}
