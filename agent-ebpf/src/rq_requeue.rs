//! block_rq_requeue: the driver gives a request back; it will be issued again, from where it got to.

use aya_ebpf::macros::btf_tracepoint;
use aya_ebpf::programs::BtfTracePointContext;

use crate::kernel::Request;
use crate::table::{flight, watched};

/// The entry point.
#[btf_tracepoint(function = "block_rq_requeue")]
pub fn rq_requeue(context: BtfTracePointContext) -> i32 {
    requeue(Request::argument(&context));
    0
}

#[inline(always)]
fn requeue(request: Request) -> Option<()> {
    watched(request.dev())?;
    let entry = flight(request.key())?;
    // SAFETY: the pointer is a live entry's, and the request's one owner is in this tracepoint.
    unsafe { (*entry).requeued = 1 };
    Some(())
}
