//! What the tracepoints' arguments point at: the kernel's own bios and requests.
//!
//! Members are read where they are, at the offsets that user space found in the kernel's BTF. They are
//! constants to the verifier (read-only data, frozen before the load), which so knows each member's type,
//! and that the pointers read here are the kernel's: a load through one that leads nowhere gives 0.
//!
//! An address is also the name of a bio or request, for as long as it is under way. To the verifier it
//! stays a pointer: it may be stored and compared; [`low`] makes a number of half of it.

use core::arch::asm;

use aya_ebpf::programs::BtfTracePointContext;
use underlay_agent_ebpf::{READ, WRITE};

use crate::maps::{OFFSETS, setting};

/// Any structure of the kernel.
pub enum Opaque {}

/// A bio.
#[derive(Clone, Copy)]
pub struct Bio(*const Opaque);

impl Bio {
    /// The argument with this number.
    #[inline(always)]
    pub fn argument(context: &BtfTracePointContext, number: usize) -> Bio {
        Bio(context.arg(number))
    }

    /// Its address.
    #[inline(always)]
    pub fn key(self) -> u64 {
        self.0 as u64
    }

    /// Its device's number: perhaps a partition's.
    #[inline(always)]
    pub fn dev(self) -> u32 {
        let bdev: *const Opaque = load(self.0, &OFFSETS.bio_bdev);
        load(bdev, &OFFSETS.bdev_dev)
    }

    /// [`READ`] or [`WRITE`].
    #[inline(always)]
    pub fn direction(self) -> Option<u32> {
        direction(load(self.0, &OFFSETS.bio_opf))
    }

    /// The first sector, absolute on the disk.
    #[inline(always)]
    pub fn sector(self) -> u64 {
        load(self.0, &OFFSETS.bio_sector)
    }

    /// The length.
    #[inline(always)]
    pub fn sectors(self) -> u32 {
        load::<u32>(self.0, &OFFSETS.bio_size) >> 9
    }

    /// Whether it ended with an error.
    #[inline(always)]
    pub fn failed(self) -> bool {
        load::<u8>(self.0, &OFFSETS.bio_status) != 0
    }

    /// The next one of its request; its address is 0 past the last.
    #[inline(always)]
    pub fn next(self) -> Bio {
        Bio(load(self.0, &OFFSETS.bio_next))
    }

    /// Of one that was split off: the address of the one that has the rest.
    #[inline(always)]
    pub fn rest(self) -> u64 {
        load(self.0, &OFFSETS.bio_private)
    }
}

/// A request.
#[derive(Clone, Copy)]
pub struct Request(*const Opaque);

impl Request {
    /// The first argument.
    #[inline(always)]
    pub fn argument(context: &BtfTracePointContext) -> Request {
        Request(context.arg(0))
    }

    /// Its address.
    #[inline(always)]
    pub fn key(self) -> u64 {
        self.0 as u64
    }

    /// Its disk's number; 0 if its queue has no disk.
    #[inline(always)]
    pub fn dev(self) -> u32 {
        let queue: *const Opaque = load(self.0, &OFFSETS.request_queue);
        let disk: *const Opaque = load(queue, &OFFSETS.queue_disk);
        let (major, minor) = (&OFFSETS.disk_major, &OFFSETS.disk_minor);
        load::<u32>(disk, major) << 20 | load::<u32>(disk, minor)
    }

    /// [`READ`] or [`WRITE`].
    #[inline(always)]
    pub fn direction(self) -> Option<u32> {
        direction(load(self.0, &OFFSETS.request_opf))
    }

    /// The first sector.
    #[inline(always)]
    pub fn sector(self) -> u64 {
        load(self.0, &OFFSETS.request_sector)
    }

    /// What is left of its length, in bytes.
    #[inline(always)]
    pub fn bytes(self) -> u32 {
        load(self.0, &OFFSETS.request_bytes)
    }

    /// The first of its bios.
    #[inline(always)]
    pub fn bio(self) -> Bio {
        Bio(load(self.0, &OFFSETS.request_bio))
    }
}

/// Nothing for a flush, a discard or a command. The operation is the lowest byte, and the numbers of
/// these two are older than the byte is.
#[inline(always)]
fn direction(opf: u32) -> Option<u32> {
    match opf & 0xff {
        0 => Some(READ),
        1 => Some(WRITE),
        _ => None,
    }
}

/// The lower half of an address, as a number: the verifier lets nobody calculate with a whole one.
#[inline(always)]
pub fn low(address: u64) -> u32 {
    let low: u32;
    // SAFETY: copies a register. The compiler knows no way to say that this may not be left out.
    unsafe { asm!("{0} = {1}", lateout(wreg) low, in(wreg) address as u32, options(pure, nomem)) };
    low
}

#[inline(always)]
fn load<T: Copy>(from: *const Opaque, offset: &'static u64) -> T {
    // SAFETY: user space loads the programs only with offsets of members that have the size of T, and the
    // verifier proves it again. A pointer that leads nowhere is read as 0, and 0 is a valid T.
    unsafe { from.cast::<u8>().add(setting(offset) as usize).cast::<T>().read() }
}
