//! block_split: a bio too large for one request goes in two parts, each looked up by its own start.

use aya_ebpf::macros::tracepoint;
use aya_ebpf::programs::TracePointContext;
use underlay_agent_ebpf::{Pending, REQUESTS, key};

use crate::maps::BIO_SPLIT;
use crate::record::Record;
use crate::table::{pending, put_pending};

/// The entry point.
#[tracepoint]
pub fn bio_split(context: TracePointContext) -> u32 {
    split(&context);
    0
}

#[inline(always)]
fn split(context: &TracePointContext) -> Option<()> {
    let (record, watched) = Record::of(context, &BIO_SPLIT)?;
    let slot = u32::from(watched.slot);
    let direction = record.direction()?;
    if watched.kind != REQUESTS {
        // A flight is known by its end, and the part that keeps the bio keeps its end.
        return None;
    }
    let (sector, second) = (record.sector(), record.new_sector());
    let length = second.checked_sub(sector)?;
    let entry = pending(key(slot, direction, sector))?;
    // SAFETY: the entry is this submitter's own, who is here and nowhere else.
    let whole = unsafe { *entry };
    let rest = u64::from(whole.sectors).checked_sub(length)?;
    if length == 0 || rest == 0 {
        return None;
    }
    // SAFETY: as above.
    unsafe { (*entry).sectors = length as u32 };
    put_pending(Pending { key: key(slot, direction, second), sectors: rest as u32, ..whole })
}
