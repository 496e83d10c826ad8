//! Memory of somebody else's: the pages of a request that the kernel lends to the ring by number.
//!
//! The ring's operations read and write it like any registered buffer. The processor cannot see it;
//! what must be copied goes through the file that lends it, at the position where it maps the pages.
//! A loan may be withdrawn at any time (its device is torn down, its client was killed): then copies
//! move nothing, and it is *lost*, which whoever answers the request has to ask.

use std::{
    cell::Cell,
    fs::File,
    io::{Error, ErrorKind, Result},
    os::unix::fs::FileExt,
    sync::Arc,
};

/// Pages that are lent under a number of the ring's table of buffers.
#[derive(Debug)]
pub struct Loan {
    index: u16,
    file: Arc<File>,
    position: u64,
    lost: Cell<bool>,
}

impl Loan {
    /// The buffer `index` of the thread's ring, which `file` maps at `position`.
    pub fn new(index: u16, file: Arc<File>, position: u64) -> Loan {
        Loan { index, file, position, lost: Cell::new(false) }
    }

    /// The pages belong to a new request now.
    pub fn renew(&self) {
        self.lost.set(false);
    }

    /// Whether a copy failed since the last request began.
    pub fn is_lost(&self) -> bool {
        self.lost.get()
    }

    /// Its number in the ring's table.
    pub(super) fn index(&self) -> u16 {
        self.index
    }

    /// Copies from `offset` on into `bytes`; zeros if the loan is lost.
    pub(super) fn take(&self, offset: usize, bytes: &mut [u8]) {
        if self.check(self.file.read_exact_at(bytes, self.position + offset as u64)).is_err() {
            bytes.fill(0);
        }
    }

    /// Copies `bytes` to `offset`.
    pub(super) fn put(&self, offset: usize, bytes: &[u8]) {
        // A failure is remembered; there is nobody to tell it to here.
        let _ = self.check(self.file.write_all_at(bytes, self.position + offset as u64));
    }

    /// Sets `len` bytes from `offset` on.
    pub(super) fn fill(&self, offset: usize, byte: u8, len: usize) {
        let bytes = [byte; 16 << 10];
        for at in (0..len).step_by(bytes.len()) {
            self.put(offset + at, &bytes[..bytes.len().min(len - at)]);
        }
    }

    fn check(&self, copied: Result<()>) -> Result<()> {
        copied.inspect_err(|error| {
            tracing::debug!(buffer = self.index, %error, "a loan was withdrawn");
            self.lost.set(true);
        })
    }
}

/// What an operation on a lost loan ends in.
pub(crate) fn withdrawn() -> Error {
    Error::new(ErrorKind::BrokenPipe, "the request's memory was withdrawn by the kernel")
}

#[cfg(test)]
mod tests {
    use std::rc::Rc;

    use super::*;
    use crate::io::Buf;

    #[test]
    fn copies_go_through_the_file_and_a_failed_one_is_remembered() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(1 << 20).unwrap();
        let file = Arc::new(file);
        let loan = Rc::new(Loan::new(7, file.clone(), 1000));
        let buf = Buf::lent(&loan, 100_000);
        buf.fill(1);
        buf.slice(10..20).copy_from_buf(&Buf::from_bytes(b"0123456789"));
        let copy = Buf::heap(12);
        copy.copy_from_buf(&buf.slice(9..21));
        assert_eq!(copy.to_vec(), b"\x010123456789\x01");
        let mut all = vec![9; 100_002];
        file.read_exact_at(&mut all, 999).unwrap();
        assert_eq!((all[0], all[1], all[100_000], all[100_001]), (0, 1, 1, 0));
        assert!(!buf.is_lost());
        file.set_len(1010).unwrap();
        copy.copy_from_buf(&buf.slice(9..21));
        assert_eq!(copy.to_vec(), [0; 12], "nothing of what was there before");
        assert!(buf.is_lost() && !Buf::heap(1).is_lost());
        loan.renew();
        assert!(!buf.is_lost());
    }
}
