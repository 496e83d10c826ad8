//! The stream of requests, as it is received.

use std::io;

use super::Session;
use crate::io::Buf;

/// Bytes of the receive buffer: some thirty writes of 4 KiB.
const RECEIVE: usize = 128 << 10;

/// What was received and not yet taken.
pub(super) struct Input<'a, D> {
    session: &'a Session<D>,
    buf: Buf,
    start: usize,
    end: usize,
}

impl<'a, D> Input<'a, D> {
    pub(super) fn new(session: &'a Session<D>, early: Vec<u8>) -> Input<'a, D> {
        let buf = Buf::heap(RECEIVE.max(early.len()));
        buf.copy_from(&early);
        Input { session, buf, start: 0, end: early.len() }
    }

    /// Takes as many bytes as there is room for; false at a clean end of the stream.
    pub(super) async fn take(&mut self, bytes: &mut [u8]) -> io::Result<bool> {
        while self.end - self.start < bytes.len() {
            let rest = self.buf.slice(self.start..self.end);
            self.buf.copy_from_buf(&rest);
            (self.start, self.end) = (0, rest.len());
            if self.receive().await? == 0 {
                return match self.end {
                    0 => Ok(false),
                    _ => Err(io::ErrorKind::UnexpectedEof.into()),
                };
            }
        }
        self.buf.slice(self.start..self.start + bytes.len()).copy_to(bytes);
        self.start += bytes.len();
        Ok(true)
    }

    async fn receive(&mut self) -> io::Result<usize> {
        let room = self.buf.slice(self.end..self.buf.len());
        let received = self.session.ring.recv(&self.session.socket, room).await?;
        self.end += received;
        Ok(received)
    }

    /// The payload of a write: what was received of it, and the rest straight from the socket.
    pub(super) async fn fill(&mut self, buf: &Buf) -> io::Result<()> {
        let here = buf.len().min(self.end - self.start);
        buf.copy_from_buf(&self.buf.slice(self.start..self.start + here));
        self.start += here;
        if here == buf.len() {
            return Ok(());
        }
        let rest = buf.slice(here..buf.len());
        self.session.ring.recv_exact(&self.session.socket, rest).await
    }

    /// Takes `len` bytes from the stream and forgets them.
    pub(super) async fn skip(&mut self, mut len: u64) -> io::Result<()> {
        loop {
            let here = len.min((self.end - self.start) as u64);
            self.start += here as usize;
            len -= here;
            if len == 0 {
                return Ok(());
            }
            (self.start, self.end) = (0, 0);
            if self.receive().await? == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
    }
}
