//! block_rq_issue: a request goes to the device, with one bio or several that were merged.

use aya_ebpf::macros::btf_tracepoint;
use aya_ebpf::programs::BtfTracePointContext;
use underlay_agent_ebpf::{Flight, REQUESTS, UNKNOWN, class};

use crate::finish::{begin, now};
use crate::kernel::Request;
use crate::maps::lost;
use crate::table::{flight, take_pending, watched};

/// Most bios of one request whose entries are taken along: as many as the usual limit on a request's
/// segments allows. Those of a longer one fade.
const MERGED: u32 = 128;

/// The entry point.
#[btf_tracepoint(function = "block_rq_issue")]
pub fn rq_issue(context: BtfTracePointContext) -> i32 {
    issue(Request::argument(&context));
    0
}

#[inline(always)]
fn issue(request: Request) -> Option<()> {
    let watched = watched(request.dev())?;
    let direction = request.direction()?;
    let sectors = request.bytes() >> 9;
    if sectors == 0 || watched.kind != REQUESTS {
        return None;
    }
    let there = flight(request.key());
    if let Some(there) = there {
        // SAFETY: the pointer is an entry's; a request is issued by one processor at a time.
        unsafe {
            if (*there).requeued != 0 {
                // Its time begins anew, all else of it is known.
                (*there).requeued = 0;
                (*there).issued = now();
                return Some(());
            }
        }
    }
    // The request is its first bio's, and has waited as long as the one that waited longest.
    let mut bio = request.bio();
    let first = take_pending(bio.key());
    let mut since = first.unwrap_or(UNKNOWN);
    for _ in 1..MERGED {
        bio = bio.next();
        if bio.key() == 0 {
            break;
        }
        since = since.min(take_pending(bio.key()).unwrap_or(UNKNOWN));
    }
    if since == UNKNOWN {
        // SAFETY: only the address of a field of the entry is taken.
        lost(|losses| unsafe { &raw mut (*losses).orphans });
    }
    let issued = now();
    let waited = if since == UNKNOWN { UNKNOWN } else { issued.saturating_sub(since) };
    let own = first.map_or(0, |queued| queued as u32 & 1);
    let entry = Flight {
        issued,
        waited,
        sector: request.sector(),
        sectors,
        slot: watched.slot,
        class: class(direction, own) as u8,
        requeued: 0,
    };
    begin(request.key(), there, &entry);
    Some(())
}
