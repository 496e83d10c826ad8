//! block_split: a bio too large for one request goes in two parts, each looked up by its own start.

use aya_ebpf::macros::tracepoint;
use aya_ebpf::programs::TracePointContext;
use underlay_agent_ebpf::{Pending, REQUESTS, key};

use crate::maps::{BIO_SPLIT, PENDING};
use crate::record::Record;

/// The entry point.
#[tracepoint]
pub fn bio_split(context: TracePointContext) -> u32 {
    split(&context);
    0
}

#[inline(always)]
fn split(context: &TracePointContext) -> Option<()> {
    let (record, watched) = Record::of(context, &BIO_SPLIT)?;
    let direction = record.direction()?;
    if watched.kind != REQUESTS {
        // A flight is known by its end, and the part that keeps the bio keeps its end.
        return None;
    }
    let (sector, second) = (record.sector(), record.new_sector());
    let first = key(watched.slot, direction, sector);
    // SAFETY: the entry is this submitter's own, who is here and nowhere else; it is copied at once.
    let whole = unsafe { *PENDING.get_ptr(&first)? };
    let length = second.checked_sub(sector)?;
    let rest = u64::from(whole.sectors).checked_sub(length)?;
    if length == 0 || rest == 0 {
        return None;
    }
    let part = Pending { sectors: rest as u32, own: whole.own & 1, ..whole };
    let _ = PENDING.insert(&key(watched.slot, direction, second), &part, 0);
    let part = Pending { sectors: length as u32, ..whole };
    let _ = PENDING.insert(&first, &part, 0);
    Some(())
}
