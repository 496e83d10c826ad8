//! Where this crate meets the kernel: every `unsafe` line of it.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

/// Extents that one call of FIEMAP brings: 28 KiB of answer.
pub const EXTENTS: usize = 512;

/// The kernel's `struct fiemap` with room for its answer.
#[repr(C)]
pub struct Fiemap {
    /// Where in the file to begin, in bytes.
    pub start: u64,
    /// How far to look.
    pub length: u64,
    /// Flags asked for.
    pub flags: u32,
    /// How many extents came.
    pub mapped: u32,
    /// How many have room.
    pub count: u32,
    reserved: u32,
    /// The extents.
    pub extents: [FiemapExtent; EXTENTS],
}

/// The kernel's `struct fiemap_extent`.
#[derive(Clone, Copy, Default)]
#[repr(C)]
pub struct FiemapExtent {
    /// Its offset in the file, in bytes.
    pub logical: u64,
    /// Its offset on the device, in bytes.
    pub physical: u64,
    /// Its length, in bytes.
    pub length: u64,
    reserved64: [u64; 2],
    /// FIEMAP_EXTENT_*.
    pub flags: u32,
    reserved: [u32; 3],
}

const _: () = assert!(size_of::<FiemapExtent>() == 56 && size_of::<Fiemap>() == 32 + 56 * EXTENTS);
/// The size that the call's number tells is that of the head alone.
const FIEMAP: libc::Ioctl = nix::request_code_readwrite!(b'f', 11, 32);

/// Asks for the extents of `file` from `start` on.
pub fn fiemap(file: &File, start: u64, flags: u32) -> io::Result<Box<Fiemap>> {
    let mut map = Box::new(Fiemap {
        start,
        length: u64::MAX - start,
        flags,
        mapped: 0,
        count: EXTENTS as u32,
        reserved: 0,
        extents: [FiemapExtent::default(); EXTENTS],
    });
    // SAFETY: the descriptor is open as long as `file`; the kernel writes the head and at most `count`
    // extents, for which the box has room, and keeps no pointer to it.
    let done = unsafe { libc::ioctl(file.as_raw_fd(), FIEMAP, &raw mut *map) };
    if done < 0 { Err(io::Error::last_os_error()) } else { Ok(map) }
}

#[cfg(feature = "probes")]
pub use with_probes::*;

#[cfg(feature = "probes")]
mod with_probes {
    use std::io;
    use std::num::NonZero;
    use std::os::fd::AsFd;
    use std::ptr::NonNull;
    use std::sync::atomic::{AtomicU64, Ordering};

    use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};
    use underlay_agent_ebpf::{
        Counters, FLIGHTS, Flight, Flights, Losses, Offsets, PLACES, Set, Touch, Watched,
    };

    /// A layout of the programs as aya takes it: plain bytes.
    #[derive(Clone, Copy, Debug, Default)]
    #[repr(transparent)]
    pub struct Plain<T>(pub T);

    // SAFETY: repr(C) or transparent over it, integers only, no padding, valid for all bits; likewise
    // below.
    unsafe impl aya::Pod for Plain<Set<Watched>> {}
    // SAFETY: as above.
    unsafe impl aya::Pod for Plain<Set<u32>> {}
    // SAFETY: as above.
    unsafe impl aya::Pod for Plain<Counters> {}
    // SAFETY: as above.
    unsafe impl aya::Pod for Plain<Losses> {}
    // SAFETY: as above.
    unsafe impl aya::Pod for Plain<Offsets> {}

    /// The table of requests under way, in the programs' own memory.
    pub struct Table {
        at: NonNull<Flights>,
    }

    impl Table {
        /// Entries of the table.
        pub const ENTRIES: usize = FLIGHTS as usize * PLACES;
        const BYTES: NonZero<usize> =
            NonZero::new(size_of::<Flights>() * FLIGHTS as usize).unwrap();

        /// Maps it.
        pub fn map(fd: impl AsFd) -> io::Result<Table> {
            let may = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
            // SAFETY: a new mapping at a place of the kernel's choice. The map is an array of so
            // many sets (the kernel refuses a longer mapping), and lives as long as the mapping.
            let at = unsafe { mmap(None, Table::BYTES, may, MapFlags::MAP_SHARED, fd, 0) }?;
            Ok(Table { at: at.cast() })
        }

        /// An entry as it is now, and its key; nothing if it is free or past the end. The kernel may
        /// be writing it.
        pub fn read(&self, at: usize) -> Option<(u64, Flight)> {
            let (key, flight) = self.entry(at)?;
            // SAFETY: within the mapping, which lives as long as `self`; integers, valid for all bits.
            let key = unsafe { key.read_volatile() };
            // SAFETY: as above.
            (key != 0).then(|| (key, unsafe { flight.read_volatile() }))
        }

        /// Frees an entry if it still has this key.
        pub fn free(&self, at: usize, key: u64) {
            let Some((word, _)) = self.entry(at) else { return };
            // SAFETY: as above; the field is aligned, and the kernel's side of it is atomic too.
            let word = unsafe { AtomicU64::from_ptr(word) };
            let _ = word.compare_exchange(key, 0, Ordering::SeqCst, Ordering::SeqCst);
        }

        fn entry(&self, at: usize) -> Option<(*mut u64, *const Flight)> {
            if at >= Table::ENTRIES {
                return None;
            }
            // SAFETY: within the mapping, as the comparison says; only addresses are taken.
            unsafe {
                let set = self.at.add(at / PLACES).as_ptr();
                let key = (&raw mut (*set).keys).cast::<u64>().add(at % PLACES);
                Some((key, (&raw const (*set).flights).cast::<Flight>().add(at % PLACES)))
            }
        }
    }

    impl Drop for Table {
        fn drop(&mut self) {
            // SAFETY: the mapping is ours and nobody borrows from it.
            let _ = unsafe { munmap(self.at.cast(), Table::BYTES.get()) };
        }
    }

    // SAFETY: it is reached by volatile and atomic accesses alone, from whatever thread owns it.
    unsafe impl Send for Table {}

    /// A record of the ring; nothing if it has not the size of one.
    pub fn touch(bytes: &[u8]) -> Option<Touch> {
        if bytes.len() != size_of::<Touch>() {
            return None;
        }
        // SAFETY: the slice has the size of the type, which is valid for all bits; the read needs no
        // alignment.
        Some(unsafe { bytes.as_ptr().cast::<Touch>().read_unaligned() })
    }

    /// The sets of capabilities of this thread, as `capget` and `capset` have them.
    #[derive(Clone, Copy, Default, Debug, PartialEq, Eq)]
    pub struct Capabilities {
        /// In force.
        pub effective: u64,
        /// May be put in force.
        pub permitted: u64,
    }

    #[repr(C)]
    struct Header {
        version: u32,
        pid: i32,
    }

    /// _LINUX_CAPABILITY_VERSION_3: two words a set.
    const VERSION: u32 = 0x2008_0522;

    /// What this thread may.
    pub fn capabilities() -> io::Result<Capabilities> {
        let mut header = Header { version: VERSION, pid: 0 };
        let mut sets = [[0u32; 3]; 2];
        // SAFETY: both structures are live and have the layout of version 3.
        let done = unsafe { libc::syscall(libc::SYS_capget, &raw mut header, &raw mut sets) };
        if done < 0 {
            return Err(io::Error::last_os_error());
        }
        let join = |at: usize| u64::from(sets[1][at]) << 32 | u64::from(sets[0][at]);
        Ok(Capabilities { effective: join(0), permitted: join(1) })
    }

    /// Leaves this thread, and whatever it starts, with `keep` alone, and no way back.
    pub fn keep_only(keep: u64) -> io::Result<()> {
        for capability in 0..64u64 {
            if keep >> capability & 1 == 0 {
                // SAFETY: takes numbers alone. EINVAL past the last capability that the kernel knows,
                // EPERM without CAP_SETPCAP: the sets below bind all the same.
                unsafe { libc::prctl(libc::PR_CAPBSET_DROP, capability, 0, 0, 0) };
            }
        }
        let mut header = Header { version: VERSION, pid: 0 };
        let (low, high) = (keep as u32, (keep >> 32) as u32);
        let sets = [[low, low, 0u32], [high, high, 0u32]];
        // SAFETY: both structures are live and have the layout of version 3; the kernel only reads.
        let done = unsafe { libc::syscall(libc::SYS_capset, &raw mut header, &raw const sets) };
        if done < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: takes numbers alone.
        let done = unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) };
        if done < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }
}
