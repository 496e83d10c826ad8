//! block_bio_complete: the end of a bio, for devices that have no requests. It fires for every bio of
//! the machine, so user space attaches it only while such a device is watched.
//!
//! Whose bio it is, its flight knows: by now it may carry the number of the device beneath. That there is
//! none says nothing: also the parts of a bio that was split end here.

use aya_ebpf::macros::btf_tracepoint;
use aya_ebpf::programs::BtfTracePointContext;

use crate::finish::{Turn, finish};
use crate::kernel::Bio;

/// The entry point.
#[btf_tracepoint(function = "block_bio_complete")]
pub fn bio_complete(context: BtfTracePointContext) -> i32 {
    complete(&context, Turn::First);
    0
}

/// The entry point of the second.
#[btf_tracepoint(function = "block_bio_complete")]
pub fn bio_complete_2(context: BtfTracePointContext) -> i32 {
    complete(&context, Turn::Second);
    0
}

#[inline(always)]
fn complete(context: &BtfTracePointContext, turn: Turn) -> Option<()> {
    let bio = Bio::argument(context, 1);
    finish(bio.key(), bio.failed(), turn)
}
