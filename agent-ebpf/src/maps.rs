//! The maps, and what user space sets before the programs are loaded.
//!
//! Why each is of its kind:
//! - All tables are arrays of sets (see [`crate::table`]), and not hash maps: one look-up and a few
//!   comparisons where a hash map takes its lock, its lists and several times as long; and user space
//!   reads them in place.
//! - A full set of `PENDING` gives up its oldest entry: a bio that never reaches a request (it failed
//!   before) leaves its entry behind, and such entries must fade by themselves. What that costs
//!   another: its request has no queue time and counts as foreign ([`Losses::orphans`]).
//! - A full set of `FLIGHTS` takes nothing more ([`Losses::full`]): the oldest is the one that hangs.
//! - `COUNTERS` is an array with a shard for each of up to 16 processors and one for all, not a per-CPU
//!   array: its size stays the same on a machine with a hundred processors.

use core::intrinsics::{AtomicOrdering, atomic_cxchg, atomic_xadd};

use aya_ebpf::macros::map;
use aya_ebpf::maps::{Array, RingBuf};
use underlay_agent_ebpf as layout;
use underlay_agent_ebpf::{Bios, Counters, Flights, Losses, Offsets, Set, Watched};

/// Watched devices by number.
#[map]
pub static WATCHED: Array<Set<Watched>> = Array::with_max_entries(layout::WATCHED, 0);

/// The thread groups whose I/O is our own.
#[map]
pub static OWNERS: Array<Set<u32>> = Array::with_max_entries(layout::OWNERS, 0);

/// Bios by address.
#[map]
pub static PENDING: Array<Bios> = Array::with_max_entries(layout::PENDING, 0);

/// Requests by address. User space maps it into its memory.
#[map]
pub static FLIGHTS: Array<Flights> = Array::with_max_entries(layout::FLIGHTS, MMAPABLE);

/// Counters by slot and shard. User space sets the number of entries.
#[map]
pub static COUNTERS: Array<Counters> = Array::with_max_entries(1, 0);

/// Completed reads.
#[map]
pub static TOUCHES: RingBuf = RingBuf::with_byte_size(layout::RING, 0);

/// What was not counted.
#[map]
pub static LOSSES: Array<Losses> = Array::with_max_entries(1, 0);

/// `BPF_F_MMAPABLE`.
const MMAPABLE: u32 = 1 << 10;

/// Where the members of the kernel's structures are.
#[unsafe(no_mangle)]
pub static OFFSETS: Offsets = NOWHERE;
/// How many shards a slot has, beside the one for all: a power of two.
#[unsafe(no_mangle)]
pub static SHARDS: u32 = 1;
/// 1: each shard is one processor's alone.
#[unsafe(no_mangle)]
pub static ALONE: u32 = 0;

const NOWHERE: Offsets = Offsets {
    bio_next: 0,
    bio_bdev: 0,
    bio_opf: 0,
    bio_status: 0,
    bio_sector: 0,
    bio_size: 0,
    bio_private: 0,
    bdev_dev: 0,
    request_queue: 0,
    request_opf: 0,
    request_bytes: 0,
    request_sector: 0,
    request_bio: 0,
    queue_disk: 0,
    disk_major: 0,
    disk_minor: 0,
};

/// What user space set in the place of `global`.
#[inline(always)]
pub fn setting<T: Copy>(global: &'static T) -> T {
    // SAFETY: a reference to a static is valid for reads. The read is volatile because its value in
    // the object file is not the one that it has when the program runs.
    unsafe { core::ptr::read_volatile(global) }
}

/// Adds to a counter of a map that other processors add to as well.
///
/// The compiler's own operation: core offers none of its atomics' arithmetic for this target, which
/// lacks compare-and-swap in its oldest version, though it has had this addition from the start.
#[inline(always)]
pub fn add<T: Copy>(counter: *mut T, much: T) {
    // SAFETY: the callers' pointers come from a map look-up, are aligned by the layout's repr(C), and
    // map memory outlives the program's run.
    unsafe { atomic_xadd::<T, T, { AtomicOrdering::Relaxed }>(counter, much) };
}

/// Replaces `old` by `new` if it is still there; tells whether it was.
#[inline(always)]
pub fn exchange(word: *mut u64, old: u64, new: u64) -> bool {
    // SAFETY: as in `add`.
    let (_, was) = unsafe {
        atomic_cxchg::<u64, { AtomicOrdering::SeqCst }, { AtomicOrdering::SeqCst }>(word, old, new)
    };
    was
}

/// Counts one loss in the field that `which` picks.
#[inline(always)]
pub fn lost(which: impl FnOnce(*mut Losses) -> *mut u64) {
    if let Some(losses) = LOSSES.get_ptr_mut(0) {
        add(which(losses), 1);
    }
}
