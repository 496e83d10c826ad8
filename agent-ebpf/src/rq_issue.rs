//! block_rq_issue: a request goes to the device, with one bio or several that were merged.

use aya_ebpf::helpers::generated::bpf_ktime_get_ns;
use aya_ebpf::macros::tracepoint;
use aya_ebpf::programs::TracePointContext;
use underlay_agent_ebpf::{REQUESTS, UNKNOWN, key};

use crate::finish::begin;
use crate::maps::{PENDING, RQ_ISSUE, lost};
use crate::record::Record;

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
    let direction = record.direction()?;
    let (sector, sectors) = (record.sector(), record.sectors());
    if sectors == 0 || watched.kind != REQUESTS {
        return None;
    }
    let (mut own, mut first) = (0, UNKNOWN);
    let (mut at, end) = (sector, sector.wrapping_add(u64::from(sectors)));
    // The bios of a request lie end to end. The request is the first one's, and has waited as long
    // as the one that waited longest.
    for _ in 0..MERGED {
        let key = key(watched.slot, direction, at);
        let Some(entry) = PENDING.get_ptr_mut(&key) else { break };
        // SAFETY: the pointer is a live entry's; of a race with its eviction or with a bio for the
        // same place comes a time that belongs to that place, never a wild one.
        let pending = unsafe { *entry };
        if at == sector {
            own = pending.own & 1;
        }
        first = first.min(pending.queued);
        if pending.own > 1 {
            // SAFETY: as above; the entry stays for the others that wait.
            unsafe { (*entry).own = pending.own - 2 };
        } else {
            let _ = PENDING.remove(&key);
        }
        at = at.wrapping_add(u64::from(pending.sectors));
        if at >= end {
            break;
        }
    }
    // SAFETY: the helper has no preconditions.
    let now = unsafe { bpf_ktime_get_ns() };
    let waited = if first == UNKNOWN { UNKNOWN } else { now.saturating_sub(first) };
    if begin(watched.slot, direction, sector, sectors, own, waited) && waited == UNKNOWN {
        // SAFETY: only the address of a field of the entry is taken.
        lost(|losses| unsafe { &raw mut (*losses).orphans });
    }
    Some(())
}
