//! Many replies, one vectored send.
//!
//! A [`Batch`] owns everything that a `sendmsg` points at: headers, payload windows, the vector and
//! the message. It moves into the operation and comes back with its result, so nothing the kernel
//! may still read can change or go.

use crate::io::Buf;

/// Bytes of the longest header that a part can carry.
pub const HEADER: usize = 44;

/// Parts of one send at most: two vector entries each stay below the kernel's limit of 1024.
pub const PARTS: usize = 256;

/// A header and the payload that follows it on the wire.
pub struct Part {
    header: [u8; HEADER],
    header_len: usize,
    payload: Option<Buf>,
}

impl Part {
    /// # Panics
    /// If the header is longer than [`HEADER`].
    pub fn new(header: &[u8], payload: Option<Buf>) -> Part {
        let mut bytes = [0; HEADER];
        bytes[..header.len()].copy_from_slice(header);
        Part { header: bytes, header_len: header.len(), payload }
    }

    /// Bytes on the wire.
    pub fn len(&self) -> usize {
        self.header_len + self.payload.as_ref().map_or(0, Buf::len)
    }

    /// Whether nothing is to be sent.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// The parts of one send, and how far it has come.
pub struct Batch {
    parts: Vec<Part>,
    vector: Vec<libc::iovec>,
    message: Box<libc::msghdr>,
    first: usize,
    left: usize,
}

impl Batch {
    /// An empty batch; its memory is used again and again.
    pub fn new() -> Batch {
        // SAFETY: `msghdr` is plain data for which zeros are a valid, empty value.
        let message = Box::new(unsafe { std::mem::zeroed::<libc::msghdr>() });
        Batch { parts: Vec::new(), vector: Vec::new(), message, first: 0, left: 0 }
    }

    /// Forgets what was sent.
    pub fn clear(&mut self) {
        self.parts.clear();
        self.vector.clear();
        self.first = 0;
        self.left = 0;
    }

    /// Adds a part. All parts are added before the first send.
    pub fn push(&mut self, part: Part) {
        self.left += part.len();
        self.parts.push(part);
    }

    /// Whether another part fits.
    pub fn is_full(&self) -> bool {
        self.parts.len() >= PARTS
    }

    /// Bytes not yet sent.
    pub fn left(&self) -> usize {
        self.left
    }

    /// Records that the kernel took `sent` bytes.
    pub(super) fn advance(&mut self, mut sent: usize) {
        self.left = self.left.saturating_sub(sent);
        while let Some(entry) = self.vector.get_mut(self.first) {
            if sent < entry.iov_len {
                // SAFETY: the entry's memory is longer than `sent`.
                entry.iov_base = unsafe { entry.iov_base.cast::<u8>().add(sent).cast() };
                entry.iov_len -= sent;
                return;
            }
            sent -= entry.iov_len;
            self.first += 1;
        }
    }

    /// The message for the kernel: valid until the batch is changed, dropped or its parts move.
    pub(super) fn message(&mut self) -> *const libc::msghdr {
        if self.vector.is_empty() {
            for part in &mut self.parts {
                self.vector.push(libc::iovec {
                    iov_base: part.header.as_mut_ptr().cast(),
                    iov_len: part.header_len,
                });
                if let Some(payload) = &part.payload {
                    self.vector.push(libc::iovec {
                        iov_base: payload.as_ptr().cast(),
                        iov_len: payload.len(),
                    });
                }
            }
        }
        let rest = &mut self.vector[self.first..];
        self.message.msg_iov = rest.as_mut_ptr();
        self.message.msg_iovlen = rest.len();
        &raw const *self.message
    }
}

impl Default for Batch {
    fn default() -> Batch {
        Batch::new()
    }
}
