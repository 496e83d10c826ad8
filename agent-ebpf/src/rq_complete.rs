//! block_rq_complete: the device is done with a request, or with a part of it.

use aya_ebpf::macros::btf_tracepoint;
use aya_ebpf::programs::BtfTracePointContext;
use underlay_agent_ebpf::REQUESTS;

use crate::finish::{Turn, finish};
use crate::kernel::Request;
use crate::maps::lost;
use crate::table::{flight, watched};

/// The entry point.
#[btf_tracepoint(function = "block_rq_complete")]
pub fn rq_complete(context: BtfTracePointContext) -> i32 {
    complete(&context);
    0
}

/// The entry point of the second. That there is no flight left is the rule: it asks for nothing else first.
#[btf_tracepoint(function = "block_rq_complete")]
pub fn rq_complete_2(context: BtfTracePointContext) -> i32 {
    let (request, failed, bytes) = arguments(&context);
    if flight(request.key()).is_some() && bytes >= request.bytes() {
        finish(request.key(), failed, Turn::Second);
    }
    0
}

#[inline(always)]
fn complete(context: &BtfTracePointContext) -> Option<()> {
    let (request, failed, bytes) = arguments(context);
    let watched = watched(request.dev())?;
    request.direction()?;
    // What is not the rest is a part: the last one's completion counts the whole.
    if watched.kind != REQUESTS || bytes < request.bytes() {
        return None;
    }
    // Once more, with nothing left, ends what was flushed.
    if finish(request.key(), failed, Turn::First).is_none() && bytes != 0 {
        // SAFETY: only the address of a field of the entry is taken.
        lost(|losses| unsafe { &raw mut (*losses).unmatched });
    }
    Some(())
}

/// The request, whether it failed, and how many bytes of it are done.
#[inline(always)]
fn arguments(context: &BtfTracePointContext) -> (Request, bool, u32) {
    let status: u32 = context.arg(1);
    (Request::argument(context), status != 0, context.arg(2))
}
