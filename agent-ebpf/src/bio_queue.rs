//! block_bio_queue: a bio is submitted, in the context of whoever submits it.

use aya_ebpf::EbpfContext;
use aya_ebpf::macros::btf_tracepoint;
use aya_ebpf::programs::BtfTracePointContext;
use underlay_agent_ebpf::{BIOS, Flight, UNKNOWN, class};

use crate::finish::{begin, now};
use crate::kernel::Bio;
use crate::table::{flight, own, put_pending, watched};

/// The entry point.
#[btf_tracepoint(function = "block_bio_queue")]
pub fn bio_queue(context: BtfTracePointContext) -> i32 {
    queue(&context);
    0
}

#[inline(always)]
fn queue(context: &BtfTracePointContext) -> Option<()> {
    let bio = Bio::argument(context, 0);
    let watched = watched(bio.dev())?;
    let direction = bio.direction()?;
    let sectors = bio.sectors();
    if sectors == 0 {
        return None;
    }
    let own = own(context.tgid());
    if watched.kind != BIOS {
        return put_pending(bio.key(), now() & !1 | u64::from(own));
    }
    let entry = Flight {
        issued: now(),
        waited: UNKNOWN,
        sector: bio.sector(),
        sectors,
        slot: watched.slot,
        class: class(direction, own) as u8,
        requeued: 0,
    };
    begin(bio.key(), flight(bio.key()), &entry);
    Some(())
}
