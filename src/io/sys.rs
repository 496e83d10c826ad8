//! System calls that no crate wraps.

use std::{fs::File, io::Result, os::fd::AsRawFd};

/// The alignment that direct I/O on `file` needs, in bytes: the stricter of memory's and offset's.
/// `None` where the kernel or the file system does not tell.
pub fn direct_align(file: &File) -> Result<Option<u64>> {
    // SAFETY: `statx` is plain data for which zeros are a valid value.
    let mut stat = unsafe { std::mem::zeroed::<libc::statx>() };
    // SAFETY: the descriptor is open, the path is an empty C string, and `stat` outlives the call.
    let result = unsafe {
        libc::statx(
            file.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH,
            libc::STATX_DIOALIGN,
            &raw mut stat,
        )
    };
    if result != 0 {
        return Err(std::io::Error::last_os_error());
    }
    let told = stat.stx_mask & libc::STATX_DIOALIGN != 0 && stat.stx_dio_offset_align != 0;
    Ok(told.then(|| u64::from(stat.stx_dio_offset_align.max(stat.stx_dio_mem_align))))
}
