//! Memory that the kernel shares for reading.

use std::{
    fs::File,
    io::{Error, Result},
    num::NonZeroUsize,
    os::raw::c_void,
    ptr::NonNull,
};

use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};

/// An array of words that the kernel writes. Belongs to one thread.
pub struct SharedWords {
    start: NonNull<c_void>,
    /// Bytes that are mapped.
    len: NonZeroUsize,
}

impl SharedWords {
    /// Maps `words` words of `file` from `offset` on, a multiple of the page size.
    pub fn map(file: &File, offset: u64, words: usize) -> Result<SharedWords> {
        let invalid = || Error::from_raw_os_error(libc::EINVAL);
        let len = words.checked_mul(8).and_then(NonZeroUsize::new).ok_or_else(invalid)?;
        let offset = i64::try_from(offset).map_err(|_| invalid())?;
        let flags = MapFlags::MAP_SHARED | MapFlags::MAP_POPULATE;
        // SAFETY: a new mapping, at an address of the kernel's choice, that only this value knows.
        let start = unsafe { mmap(None, len, ProtFlags::PROT_READ, flags, file, offset) }?;
        Ok(SharedWords { start, len })
    }

    /// The word `index`, as it is now.
    ///
    /// # Panics
    /// If there is none.
    pub fn load(&self, index: usize) -> u64 {
        assert!(index < self.len.get() / 8, "a word of the mapping");
        // SAFETY: it lies in the mapping, which is aligned; the kernel may change it meanwhile,
        // hence volatile.
        unsafe { self.start.cast::<u64>().add(index).read_volatile() }
    }
}

impl Drop for SharedWords {
    fn drop(&mut self) {
        // SAFETY: the mapping is this value's own, and no reference into it was ever made.
        let unmapped = unsafe { munmap(self.start, self.len.get()) };
        debug_assert!(unmapped.is_ok());
    }
}
