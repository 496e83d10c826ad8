//! block_bio_queue: a bio is submitted, in the context of whoever submits it.

use aya_ebpf::EbpfContext;
use aya_ebpf::helpers::generated::bpf_ktime_get_ns;
use aya_ebpf::macros::tracepoint;
use aya_ebpf::programs::TracePointContext;
use underlay_agent_ebpf::{BIOS, Pending, UNKNOWN, key};

use crate::finish::begin;
use crate::maps::{BIO_QUEUE, OWNERS};
use crate::record::Record;
use crate::table::put_pending;

/// The entry point.
#[tracepoint]
pub fn bio_queue(context: TracePointContext) -> u32 {
    queue(&context);
    0
}

#[inline(always)]
fn queue(context: &TracePointContext) -> Option<()> {
    let (record, watched) = Record::of(context, &BIO_QUEUE)?;
    let direction = record.direction()?;
    let (sector, sectors) = (record.sector(), record.sectors());
    if sectors == 0 {
        return None;
    }
    let own = u32::from(OWNERS.get_ptr(&context.tgid()).is_some());
    if watched.kind == BIOS {
        return begin(watched.slot, direction, sector, sectors, own, UNKNOWN);
    }
    // SAFETY: the helper has no preconditions.
    let queued = unsafe { bpf_ktime_get_ns() };
    let key = key(watched.slot, direction, sector);
    put_pending(Pending { key, queued, sectors, own })
}
