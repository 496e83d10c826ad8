//! Where a file holds data, as its file system tells; and taking it away.

use std::{fs::File, io, ops::Range};

use nix::{
    errno::Errno,
    fcntl::{FallocateFlags, fallocate},
    unistd::{Whence, lseek},
};

/// The next range at or after `offset` and before `end` that may hold anything but zeros; `None`
/// when there is none. Files that can't tell (block devices, some file systems) are data
/// throughout.
///
/// Moves the file's own position: only for files that are read at explicit offsets.
pub fn next_data(file: &File, offset: u64, end: u64) -> io::Result<Option<Range<u64>>> {
    if offset >= end {
        return Ok(None);
    }
    let Ok(from) = i64::try_from(offset) else {
        return Err(io::Error::from(io::ErrorKind::InvalidInput));
    };
    let start = match lseek(file, from, Whence::SeekData) {
        Ok(start) => start as u64,
        Err(Errno::ENXIO) => return Ok(None),
        Err(Errno::EINVAL | Errno::EOPNOTSUPP | Errno::ESPIPE | Errno::ENOTTY) => {
            return Ok(Some(offset..end));
        }
        Err(errno) => return Err(errno.into()),
    };
    if start >= end {
        return Ok(None);
    }
    let stop = match lseek(file, start as i64, Whence::SeekHole) {
        Ok(stop) => (stop as u64).min(end),
        Err(_) => end,
    };
    // A file that shrinks meanwhile must not make the caller go round in circles.
    Ok((stop > start).then_some(start..stop))
}

/// Makes a hole of a range of a file, whose length stays.
pub fn punch(file: &File, range: Range<u64>) -> io::Result<()> {
    let invalid = |_| io::Error::from(io::ErrorKind::InvalidInput);
    let start = i64::try_from(range.start).map_err(invalid)?;
    let len = i64::try_from(range.end.saturating_sub(range.start)).map_err(invalid)?;
    let mode = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    Ok(fallocate(file, mode, start, len)?)
}
