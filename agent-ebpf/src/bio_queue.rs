//! block_bio_queue: a bio is submitted, in the context of whoever submits it.

use aya_ebpf::EbpfContext;
use aya_ebpf::helpers::generated::bpf_ktime_get_ns;
use aya_ebpf::macros::tracepoint;
use aya_ebpf::programs::TracePointContext;
use underlay_agent_ebpf::{BIOS, Pending, UNKNOWN, key};

use crate::finish::begin;
use crate::maps::BIO_QUEUE;
use crate::record::Record;
use crate::table::{own, put_pending};

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
    let slot = u32::from(watched.slot);
    // SAFETY: the helper has no preconditions.
    let now = unsafe { bpf_ktime_get_ns() };
    let own = own(context.tgid());
    if watched.kind == BIOS {
        return begin(slot, direction, sector, sectors, own, now, UNKNOWN);
    }
    let (key, queued) = (key(slot, direction, sector), now);
    put_pending(Pending { key, queued, sectors, own })
}
