//! The two ends of a flight: where it enters its map, and where it leaves it and is counted.

use aya_ebpf::helpers::generated::{bpf_get_smp_processor_id, bpf_ktime_get_ns};
use underlay_agent_ebpf::{
    BUCKETS, CLASSES, Flight, OWN, READ, REQUEUED, Touch, UNKNOWN, bucket, class, key,
};

use crate::maps::{COUNTERS, FLIGHTS, SHARDS, TOUCHES, add, lost, setting};
use crate::record::Record;

/// `BPF_RB_NO_WAKEUP`: user space empties the ring by the clock.
const NO_WAKEUP: u64 = 1;

/// Notes that the device has got it. Returns whether it is new, not issued again.
#[inline(always)]
pub fn begin(slot: u32, direction: u32, sector: u64, sectors: u32, own: u32, waited: u64) -> bool {
    // SAFETY: the helper has no preconditions.
    let issued = unsafe { bpf_ktime_get_ns() };
    let key = key(slot, direction, sector.wrapping_add(u64::from(sectors)));
    if let Some(other) = FLIGHTS.get_ptr_mut(&key) {
        // SAFETY: the pointer is a live entry's. Of two that end at one place at the same time the
        // figures may mix; their number stays right but for a race of a few nanoseconds.
        unsafe {
            (*other).issued = issued;
            if (*other).flags & REQUEUED != 0 {
                (*other).flags &= !REQUEUED;
                return false;
            }
            // Not a wrong one: the earlier of the two is given the later's start.
            (*other).twins = (*other).twins.saturating_add(1);
        }
        return true;
    }
    let flags = if own != 0 { OWN } else { 0 };
    let flight = Flight { issued, waited, sector, sectors, flags, twins: 0 };
    if FLIGHTS.insert(&key, &flight, 0).is_err() {
        // SAFETY: only the address of a field of the entry is taken.
        lost(|losses| unsafe { &raw mut (*losses).full });
    }
    true
}

/// Counts what the record ends, if its beginning was seen. The completion of a first part is passed
/// over: no flight ends there, and the last part's completion counts the whole.
#[inline(always)]
pub fn finish(record: &Record, slot: u32) -> Option<()> {
    let direction = record.direction()?;
    let end = record.sector().wrapping_add(u64::from(record.sectors()));
    let key = key(slot, direction, end);
    let Some(entry) = FLIGHTS.get_ptr_mut(&key) else {
        // SAFETY: only the address of a field of the entry is taken.
        lost(|losses| unsafe { &raw mut (*losses).unmatched });
        return None;
    };
    // SAFETY: the pointer is a live entry's, copied before the entry goes.
    let flight = unsafe { *entry };
    if flight.twins > 0 {
        // SAFETY: as above.
        unsafe { (*entry).twins = flight.twins - 1 };
    } else {
        let _ = FLIGHTS.remove(&key);
    }
    // SAFETY: the helper has no preconditions.
    let ns = unsafe { bpf_ktime_get_ns() }.saturating_sub(flight.issued);
    let own = u32::from(flight.flags & OWN);
    count(slot, class(direction, own), &flight, ns, record.failed());
    if direction == READ {
        let touch = Touch {
            sector: flight.sector,
            ns,
            sectors: flight.sectors,
            slot: slot as u16,
            own: own as u8,
            failed: u8::from(record.failed()),
        };
        if TOUCHES.output::<Touch>(&touch, NO_WAKEUP).is_err() {
            // SAFETY: only the address of a field of the entry is taken.
            lost(|losses| unsafe { &raw mut (*losses).ring });
        }
    }
    Some(())
}

#[inline(always)]
fn count(slot: u32, class: u32, flight: &Flight, ns: u64, failed: bool) -> Option<()> {
    // SAFETY: the helper has no preconditions.
    let processor = unsafe { bpf_get_smp_processor_id() };
    let shards = setting(&SHARDS);
    let entry = COUNTERS.get_ptr_mut(slot * shards + (processor & (shards - 1)))?;
    // The bounds are there already; said once more, the verifier sees them.
    let class = (class as usize) & (CLASSES - 1);
    let device = (bucket(ns) as usize).min(BUCKETS - 1);
    // SAFETY: the entry is live for the whole run, and both indices are in bounds.
    unsafe {
        let class = (&raw mut (*entry).classes).cast::<underlay_agent_ebpf::Class>().add(class);
        add(&raw mut (*class).count, 1);
        add(&raw mut (*class).bytes, u64::from(flight.sectors) * 512);
        add(&raw mut (*class).device_ns, ns);
        add((&raw mut (*class).device).cast::<u32>().add(device), 1);
        if failed {
            add(&raw mut (*class).errors, 1);
        }
        if flight.waited != UNKNOWN {
            let queue = (bucket(flight.waited) as usize).min(BUCKETS - 1);
            add(&raw mut (*class).queue_ns, flight.waited);
            add(&raw mut (*class).queued, 1);
            add((&raw mut (*class).queue).cast::<u32>().add(queue), 1);
        }
    }
    Some(())
}
