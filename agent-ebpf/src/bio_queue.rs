//! block_bio_queue: a bio is submitted, in the context of whoever submits it.

use aya_ebpf::EbpfContext;
use aya_ebpf::helpers::generated::bpf_ktime_get_ns;
use aya_ebpf::macros::tracepoint;
use aya_ebpf::programs::TracePointContext;
use underlay_agent_ebpf::{BIOS, Pending, UNKNOWN, key};

use crate::finish::begin;
use crate::maps::{BIO_QUEUE, OWNERS, PENDING};
use crate::record::Record;

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
        begin(watched.slot, direction, sector, sectors, own, UNKNOWN);
        return None;
    }
    // SAFETY: the helper has no preconditions.
    let queued = unsafe { bpf_ktime_get_ns() };
    let key = key(watched.slot, direction, sector);
    // Two reads of one place may wait at the same time. The later's figures serve both; what matters
    // is that the first to be issued does not take the entry of the second away.
    let others = match PENDING.get_ptr(&key) {
        // SAFETY: the pointer is a live entry's. A write by another processor may mix the two, which
        // are of one place and one moment.
        Some(other) => (unsafe { (*other).own } & !1).saturating_add(2).min(MOST),
        None => 0,
    };
    let _ = PENDING.insert(&key, &Pending { queued, sectors, own: own | others }, 0);
    Some(())
}

/// An entry whose bio never reached a request would otherwise be waited for by more and more.
const MOST: u32 = 2 * 64;
