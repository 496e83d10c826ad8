//! block_bio_complete: the end of a bio, for devices that have no requests. It fires for every bio of
//! the machine, so user space attaches it only while such a device is watched.

use aya_ebpf::macros::tracepoint;
use aya_ebpf::programs::TracePointContext;
use underlay_agent_ebpf::BIOS;

use crate::finish::finish;
use crate::maps::BIO_COMPLETE;
use crate::record::Record;

/// The entry point.
#[tracepoint]
pub fn bio_complete(context: TracePointContext) -> u32 {
    if let Some((record, watched)) = Record::of(&context, &BIO_COMPLETE)
        && watched.kind == BIOS
    {
        finish(&record, u32::from(watched.slot));
    }
    0
}
