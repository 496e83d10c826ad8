//! System calls that no crate wraps.

use std::{
    fs::File,
    io::{Error, Result},
    os::fd::{AsRawFd, RawFd},
};

use super::{Buf, batch::Batch};

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
        return Err(Error::last_os_error());
    }
    let told = stat.stx_mask & libc::STATX_DIOALIGN != 0 && stat.stx_dio_offset_align != 0;
    Ok(told.then(|| u64::from(stat.stx_dio_offset_align.max(stat.stx_dio_mem_align))))
}

/// Fills the front of `buf` with what the page cache has of `file` from `offset` on, and tells how many
/// bytes that was. It waits for nothing.
pub(super) fn read_cached(file: RawFd, buf: &Buf, offset: u64) -> usize {
    let Ok(offset) = i64::try_from(offset) else { return 0 };
    let window = libc::iovec { iov_base: buf.as_ptr().cast(), iov_len: buf.len() };
    // SAFETY: the window is the buffer's own memory, which outlives the call.
    let read = unsafe { libc::preadv2(file, &raw const window, 1, offset, libc::RWF_NOWAIT) };
    // Whatever is wrong will be told to whoever reads the rest.
    usize::try_from(read).unwrap_or(0)
}

/// Sends as much of the batch as the socket has room for. It waits for nothing.
pub(super) fn send_now(socket: RawFd, batch: &mut Batch) -> Result<()> {
    let flags = libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT;
    // SAFETY: the batch owns all that the message points at.
    let sent = unsafe { libc::sendmsg(socket, batch.message(), flags) };
    batch.advance(usize::try_from(sent).map_err(|_| Error::last_os_error())?);
    Ok(())
}
