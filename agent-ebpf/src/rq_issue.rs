//! block_rq_issue: a request goes to the device, with one bio or several that were merged.

use aya_ebpf::helpers::generated::bpf_ktime_get_ns;
use aya_ebpf::macros::tracepoint;
use aya_ebpf::programs::TracePointContext;
use underlay_agent_ebpf::{REQUESTS, REQUEUED, UNKNOWN, key};

use crate::finish::begin;
use crate::maps::{RQ_ISSUE, add, lost, requeued};
use crate::record::Record;
use crate::table::{flight, take_pending};

/// Most bios of one request whose entries are taken along: as many as the usual limit on a request's
/// segments allows. Those of a longer one fade.
const MERGED: u32 = 128;

/// The entry point.
#[tracepoint]
pub fn rq_issue(context: TracePointContext) -> u32 {
    issue(&context);
    0
}

#[inline(always)]
fn issue(context: &TracePointContext) -> Option<()> {
    let (record, watched) = Record::of(context, &RQ_ISSUE)?;
    let slot = u32::from(watched.slot);
    let direction = record.direction()?;
    let (sector, sectors) = (record.sector(), record.sectors());
    if sectors == 0 || watched.kind != REQUESTS {
        return None;
    }
    let (mut at, end) = (sector, sector.wrapping_add(u64::from(sectors)));
    if again(key(slot, direction, end)).is_some() {
        return None;
    }
    let (mut own, mut first) = (0, UNKNOWN);
    // The bios of a request lie end to end. The request is the first one's, and has waited as long
    // as the one that waited longest.
    for _ in 0..MERGED {
        let Some(pending) = take_pending(key(slot, direction, at)) else { break };
        if at == sector {
            own = pending.own;
        }
        first = first.min(pending.queued);
        at = at.wrapping_add(u64::from(pending.sectors));
        if at >= end {
            break;
        }
    }
    // SAFETY: the helper has no preconditions.
    let now = unsafe { bpf_ktime_get_ns() };
    let waited = if first == UNKNOWN { UNKNOWN } else { now.saturating_sub(first) };
    if waited == UNKNOWN {
        // SAFETY: only the address of a field of the entry is taken.
        lost(|losses| unsafe { &raw mut (*losses).orphans });
    }
    begin(slot, direction, sector, sectors, own, now, waited)
}

/// A request that the driver had given back: its time begins anew, all else of it is known.
#[inline(always)]
fn again(key: u64) -> Option<()> {
    // Hardly ever is there one: the search for it is not every request's.
    let requeued = requeued()?;
    // SAFETY: the pointer is the live entry's of an array; one aligned word.
    if unsafe { requeued.read_volatile() } == 0 {
        return None;
    }
    let entry = flight(key, REQUEUED)?;
    add(requeued, u64::MAX);
    // SAFETY: the pointer is an entry's; a request is issued by one processor at a time.
    unsafe {
        (*entry).issued = bpf_ktime_get_ns();
        (*entry).flags &= !REQUEUED;
    }
    Some(())
}
