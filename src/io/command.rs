//! Commands of drivers, given through a ring of their own, one at a time, and waited for.
//!
//! Invariant: the memory that a command names is the driver's until it has answered. Should it be
//! impossible to wait for that, the memory is never given back, and the ring takes no more commands.

use std::{
    fs::File,
    io::{Error, ErrorKind, Result},
    os::fd::AsRawFd,
};

use io_uring::{IoUring, cqueue, opcode, squeue, types};

use super::ring::for_now;

/// Bytes of a command.
pub const COMMAND: usize = 80;

/// What a command is about: bytes that the driver reads, or writes.
pub struct Operand<'a> {
    /// The bytes.
    pub bytes: &'a mut [u8],
    /// Where in the command their number is told, 16 bits.
    pub length_at: usize,
    /// Where in the command their address is told, 64 bits.
    pub address_at: usize,
}

/// A ring for commands. It waits in the kernel: not for threads that serve guests.
pub struct Commands {
    ring: IoUring<squeue::Entry128, cqueue::Entry>,
    /// A command was given up; it may be under way still.
    broken: bool,
}

impl Commands {
    /// Makes the ring.
    pub fn new() -> Result<Commands> {
        Ok(Commands { ring: IoUring::builder().build(2)?, broken: false })
    }

    /// Gives `command` to the driver behind `file` and waits for its answer, 0 or more. The driver
    /// may read and write the operand, whose length and address are put into the command.
    #[expect(clippy::host_endian_bytes, reason = "a driver on this machine reads it")]
    pub fn run(
        &mut self,
        file: &File,
        number: u32,
        mut command: [u8; COMMAND],
        operand: Option<Operand<'_>>,
    ) -> Result<u32> {
        if self.broken {
            return Err(Error::other("an earlier command was not answered"));
        }
        // Of its own, so that it can outlive the caller's.
        let mut memory: Box<[u8]> =
            operand.as_ref().map_or(&[][..], |operand| &*operand.bytes).into();
        if let Some(Operand { length_at, address_at, .. }) = &operand {
            let len = u16::try_from(memory.len()).map_err(|_| ErrorKind::InvalidInput)?;
            command[*length_at..length_at + 2].copy_from_slice(&len.to_ne_bytes());
            let address = memory.as_mut_ptr().expose_provenance() as u64;
            command[*address_at..address_at + 8].copy_from_slice(&address.to_ne_bytes());
        }
        let entry = opcode::UringCmd80::new(types::Fd(file.as_raw_fd()), number).cmd(command);
        // SAFETY: the file is open, and `memory` is let go only after the command has ended, below;
        // the ring holds nothing else.
        unsafe { self.ring.submission().push(&entry.build()) }
            .map_err(|_| Error::from(ErrorKind::WouldBlock))?;
        let answer = loop {
            if let Err(error) = self.ring.submit_and_wait(1).map(drop).or_else(for_now) {
                self.broken = true;
                std::mem::forget(memory);
                return Err(error);
            }
            if let Some(answer) = self.ring.completion().next() {
                break answer.result();
            }
        };
        if let Some(Operand { bytes, .. }) = operand {
            bytes.copy_from_slice(&memory);
        }
        u32::try_from(answer).map_err(|_| Error::from_raw_os_error(-answer))
    }
}
