//! block_split: a bio too large for one request goes in two parts. The first is a new bio, chained to the
//! one that keeps the rest.

use aya_ebpf::macros::btf_tracepoint;
use aya_ebpf::programs::BtfTracePointContext;
use underlay_agent_ebpf::REQUESTS;

use crate::kernel::Bio;
use crate::table::{pending, put_pending, watched};

/// The entry point.
#[btf_tracepoint(function = "block_split")]
pub fn bio_split(context: BtfTracePointContext) -> i32 {
    split(&context);
    0
}

#[inline(always)]
fn split(context: &BtfTracePointContext) -> Option<()> {
    let first = Bio::argument(context, 0);
    // Where there are no requests, the bio that keeps the rest ends last, and counts as the whole.
    if watched(first.dev())?.kind != REQUESTS {
        return None;
    }
    put_pending(first.key(), pending(first.rest())?)
}
