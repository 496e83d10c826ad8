//! What a tracepoint says, read from its record at the offsets that tracefs gave.
//!
//! One copy of the record's head to the stack, then plain loads: the offsets are constants to the
//! verifier (read-only data, frozen before the load), so it can prove each load to be in bounds. They
//! are read one by one where they are used: it forgets what goes through the stack in four bytes.

use core::mem::MaybeUninit;

use aya_ebpf::EbpfContext;
use aya_ebpf::helpers::generated::bpf_probe_read_kernel;
use aya_ebpf::programs::TracePointContext;
use underlay_agent_ebpf::{Fields, READ, RECORD, WRITE, Watched};

use crate::maps::setting;
use crate::table::watched;

/// The head of a record.
#[repr(C, align(8))]
pub struct Record {
    bytes: MaybeUninit<[u8; RECORD]>,
    fields: &'static Fields,
}

impl Record {
    /// Reads the record of a tracepoint whose fields are `fields`; nothing if its device is not
    /// watched.
    #[inline(always)]
    pub fn of(context: &TracePointContext, fields: &'static Fields) -> Option<(Record, Watched)> {
        let mut record = Record { bytes: MaybeUninit::uninit(), fields };
        let to = record.bytes.as_mut_ptr();
        // SAFETY: the target is RECORD bytes of this stack; the helper checks the source itself, and
        // fills the target or fails.
        let failed = unsafe { bpf_probe_read_kernel(to.cast(), RECORD as u32, context.as_ptr()) };
        if failed != 0 {
            return None;
        }
        let watched = watched(record.load(setting(&record.fields.dev)))?;
        Some((record, watched))
    }

    /// The first sector, absolute on the disk.
    #[inline(always)]
    pub fn sector(&self) -> u64 {
        self.load(setting(&self.fields.sector))
    }

    /// The length.
    #[inline(always)]
    pub fn sectors(&self) -> u32 {
        self.load(setting(&self.fields.sectors))
    }

    /// Of block_split: where the second part begins.
    #[inline(always)]
    pub fn new_sector(&self) -> u64 {
        self.load(setting(&self.fields.sectors))
    }

    /// Whether it ended with an error.
    #[inline(always)]
    pub fn failed(&self) -> bool {
        self.load::<u32>(setting(&self.fields.error)) != 0
    }

    /// [`READ`] or [`WRITE`]; nothing for a flush, a discard or a command. Data to be written after a
    /// flush begins with an F that is not its operation.
    #[inline(always)]
    pub fn direction(&self) -> Option<u32> {
        let at = setting(&self.fields.rwbs);
        let first: u8 = self.load(at);
        let operation = match first {
            b'F' => self.load(at + 1),
            first => first,
        };
        match operation {
            b'R' => Some(READ),
            b'W' => Some(WRITE),
            _ => None,
        }
    }

    #[inline(always)]
    fn load<T: Copy>(&self, at: u32) -> T {
        // SAFETY: user space loads the programs only with offsets such that the widest field ends
        // within RECORD; the verifier proves it again. Plain integers are valid for all bits.
        unsafe { self.bytes.as_ptr().cast::<u8>().add(at as usize).cast::<T>().read_unaligned() }
    }
}
