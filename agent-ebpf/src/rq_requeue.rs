//! block_rq_requeue: the driver gives a request back; it will be issued again, from where it got to.

use aya_ebpf::macros::tracepoint;
use aya_ebpf::programs::TracePointContext;
use underlay_agent_ebpf::{REQUEUED, key};

use crate::maps::{RQ_REQUEUE, add, requeued};
use crate::record::Record;
use crate::table::flight;

/// The entry point.
#[tracepoint]
pub fn rq_requeue(context: TracePointContext) -> u32 {
    requeue(&context);
    0
}

#[inline(always)]
fn requeue(context: &TracePointContext) -> Option<()> {
    let (record, watched) = Record::of(context, &RQ_REQUEUE)?;
    let slot = u32::from(watched.slot);
    let direction = record.direction()?;
    let end = record.sector().wrapping_add(u64::from(record.sectors()));
    let entry = flight(key(slot, direction, end), 0)?;
    // SAFETY: the pointer is a live entry's, and the request's one owner is in this tracepoint.
    unsafe { (*entry).flags |= REQUEUED };
    add(requeued()?, 1);
    Some(())
}
