//! block_rq_complete: the device is done with a request, or with a part of it.

use aya_ebpf::macros::tracepoint;
use aya_ebpf::programs::TracePointContext;
use underlay_agent_ebpf::REQUESTS;

use crate::finish::finish;
use crate::maps::RQ_COMPLETE;
use crate::record::Record;

/// The entry point.
#[tracepoint]
pub fn rq_complete(context: TracePointContext) -> u32 {
    if let Some((record, watched)) = Record::of(&context, &RQ_COMPLETE)
        && watched.kind == REQUESTS
    {
        finish(&record, u32::from(watched.slot));
    }
    0
}
