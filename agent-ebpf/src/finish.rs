//! The two ends of a flight: where it enters its map, and where it leaves it and is counted.

use aya_ebpf::helpers::generated::{bpf_get_smp_processor_id, bpf_ktime_get_ns};
use underlay_agent_ebpf::{
    BUCKETS, CLASSES, Flight, OWN, READ, Touch, UNKNOWN, bucket, class, key,
};

use crate::maps::{COUNTERS, SHARDS, TOUCHES, add, lost, setting};
use crate::record::Record;
use crate::table::{put_flight, take_flight};

/// `BPF_RB_NO_WAKEUP`: user space empties the ring by the clock.
const NO_WAKEUP: u64 = 1;

/// Notes that the device has got it.
#[inline(always)]
pub fn begin(
    slot: u32,
    direction: u32,
    sector: u64,
    sectors: u32,
    own: u32,
    issued: u64,
    waited: u64,
) -> Option<()> {
    let key = key(slot, direction, sector.wrapping_add(u64::from(sectors)));
    let flags = if own != 0 { OWN } else { 0 };
    let entered = put_flight(&Flight { key, issued, waited, sector, sectors, flags });
    if entered.is_none() {
        // SAFETY: only the address of a field of the entry is taken.
        lost(|losses| unsafe { &raw mut (*losses).full });
    }
    entered
}

/// Counts what the record ends, if its beginning was seen. The completion of a first part is passed
/// over: no flight ends there, and the last part's completion counts the whole.
#[inline(always)]
pub fn finish(record: &Record, slot: u32) -> Option<()> {
    let direction = record.direction()?;
    let end = record.sector().wrapping_add(u64::from(record.sectors()));
    let Some(flight) = take_flight(key(slot, direction, end)) else {
        // SAFETY: only the address of a field of the entry is taken.
        lost(|losses| unsafe { &raw mut (*losses).unmatched });
        return None;
    };
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
