//! Memory that is shared: with the kernel, for reading; with a later process, by way of a file.

use std::{
    fs::File,
    io::{Error, Result},
    num::NonZeroUsize,
    os::raw::c_void,
    ptr::NonNull,
    sync::atomic::{AtomicU64, Ordering},
};

use nix::{
    fcntl::FallocateFlags,
    sys::mman::{MapFlags, MmapAdvise, ProtFlags, madvise, mmap, munmap},
};

use crate::cow::tail::Memory;

const PAGE: usize = 4096;

/// An array of words in a file: what is in it outlives the process, and as little as the file does.
///
/// The file is nobody else's: cutting it short under the mapping would end the process.
pub struct SharedFile {
    file: File,
    start: NonNull<c_void>,
    /// Bytes that are mapped.
    len: NonZeroUsize,
    /// A bit for each page that is known to be allocated.
    allocated: Box<[AtomicU64]>,
}

// SAFETY: the mapping is reached through atomics only, from any thread, until the last handle goes.
unsafe impl Send for SharedFile {}
// SAFETY: as above.
unsafe impl Sync for SharedFile {}

impl SharedFile {
    /// Maps `bytes` bytes of `file`, a multiple of the page size, which gets that long.
    pub fn map(file: File, bytes: usize) -> Result<SharedFile> {
        let invalid = || Error::from_raw_os_error(libc::EINVAL);
        let len = NonZeroUsize::new(bytes).filter(|len| len.get().is_multiple_of(PAGE));
        let len = len.ok_or_else(invalid)?;
        if file.metadata()?.len() != bytes as u64 {
            file.set_len(bytes as u64)?;
        }
        let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: a new mapping, at an address of the kernel's choice, that only this value knows.
        let start = unsafe { mmap(None, len, protection, MapFlags::MAP_SHARED, &file, 0) }?;
        // Pages that were not asked for would only take memory. Without the advice they do.
        // SAFETY: the mapping is this value's own, and this advice changes no content.
        let _ = unsafe { madvise(start, len.get(), MmapAdvise::MADV_RANDOM) };
        let allocated = (0..(bytes / PAGE).div_ceil(64)).map(|_| AtomicU64::new(0)).collect();
        Ok(SharedFile { file, start, len, allocated })
    }
}

impl Memory for SharedFile {
    fn words(&self) -> &[AtomicU64] {
        // SAFETY: the mapping is aligned, as long as that, and lives as long as `self`; any bytes
        // are valid words, and whoever else maps the file changes them atomically.
        unsafe { std::slice::from_raw_parts(self.start.cast().as_ptr(), self.len.get() / 8) }
    }

    fn reserve(&self, word: usize) -> bool {
        let page = word * 8 / PAGE;
        let Some(known) = self.allocated.get(page / 64) else { return false };
        let bit = 1 << (page % 64);
        if known.load(Ordering::Relaxed) & bit != 0 {
            return true;
        }
        // A page that could not be had when it is written would end the process.
        let at = (page * PAGE) as i64;
        let allocated =
            nix::fcntl::fallocate(&self.file, FallocateFlags::empty(), at, PAGE as i64).is_ok();
        if allocated {
            known.fetch_or(bit, Ordering::Relaxed);
        }
        allocated
    }
}

impl Drop for SharedFile {
    fn drop(&mut self) {
        // SAFETY: the mapping is this value's own, and references into it don't outlive the value.
        let unmapped = unsafe { munmap(self.start, self.len.get()) };
        debug_assert!(unmapped.is_ok());
    }
}

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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_found_by_the_next_mapping() {
        let path = tempfile::NamedTempFile::new().unwrap();
        let open = || SharedFile::map(path.reopen().unwrap(), 16 * PAGE).unwrap();
        let first = open();
        assert!(first.reserve(0) && first.reserve(16 * PAGE / 8 - 1));
        first.words()[7].store(5, Ordering::Relaxed);
        first.words()[16 * PAGE / 8 - 1].store(6, Ordering::Relaxed);
        drop(first);
        let second = open();
        assert_eq!(second.words().len(), 16 * PAGE / 8);
        assert_eq!(second.words()[7].load(Ordering::Relaxed), 5);
        assert_eq!(second.words()[16 * PAGE / 8 - 1].load(Ordering::Relaxed), 6);
        assert!(!second.reserve(100 * PAGE / 8), "past the end");
        assert!(SharedFile::map(path.reopen().unwrap(), 5).is_err());
    }
}
