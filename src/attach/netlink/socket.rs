//! A socket to the kernel's generic netlink.
//!
//! Invariants:
//! - [`Socket::request`] returns with the kernel's acknowledgement of that very request. Answers to
//!   an earlier one that was given up are known by their sequence number and dropped.
//! - Only the kernel is listened to: a datagram from another process is dropped.
//!
//! The time limit bounds the wait for an answer. It does not bound the call: the kernel runs a
//! command inside `send`, and whoever sends one that blocks, blocks with it, as does, on the whole
//! machine, every generic netlink family that takes the common lock.

use std::{
    io::{IoSlice, IoSliceMut},
    os::fd::{AsRawFd, OwnedFd},
    time::{Duration, Instant},
};

use nix::{
    errno::Errno,
    sys::{
        socket::{
            AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recvmsg,
            sendmsg, setsockopt, socket, sockopt,
        },
        time::{TimeVal, TimeValLike},
    },
};

use super::{
    Attributes, CONTROL, CONTROL_VERSION, FAMILY_NAME, GET_FAMILY, Malformed, Message, Received,
    Refused, family_of, messages,
};
use crate::error::{Context, Error, Kind, Result};

/// The largest datagram that is taken: room for the state of three thousand devices.
const DATAGRAM: usize = 64 << 10;
/// The most datagrams looked at for one answer.
const MAX_DATAGRAMS: usize = 256;

mod option {
    use nix::{setsockopt_impl, sockopt_impl};

    sockopt_impl!(CapAck, SetOnly, libc::SOL_NETLINK, libc::NETLINK_CAP_ACK, bool);
    sockopt_impl!(ExtendedAck, SetOnly, libc::SOL_NETLINK, libc::NETLINK_EXT_ACK, bool);
}

/// Why a request came to nothing.
#[derive(Debug)]
pub enum Failure {
    /// The kernel refused it.
    Refused(Refused),
    /// There is no telling what became of it.
    Broken(Error),
}

/// What came from the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Heard<'a> {
    /// Some messages.
    Datagram(&'a [u8]),
    /// Nothing in time.
    Nothing,
    /// There was more than the socket holds: some was lost.
    Overrun,
}

/// A socket to the kernel's generic netlink.
#[derive(Debug)]
pub struct Socket {
    descriptor: OwnedFd,
    sequence: u32,
    limit: Duration,
    buffer: Vec<u8>,
}

impl Socket {
    /// Opens one. `limit` bounds every wait for an answer.
    pub fn open(limit: Duration) -> Result<Socket> {
        let opening = || "opening a generic netlink socket";
        let protocol = SockProtocol::NetlinkGeneric;
        let flags = SockFlag::SOCK_CLOEXEC;
        let descriptor =
            socket(AddressFamily::Netlink, SockType::Raw, flags, protocol).map_err(|errno| {
                match errno {
                    Errno::EAFNOSUPPORT | Errno::EPROTONOSUPPORT => Error::caused(
                        Kind::Unsupported,
                        "this kernel has no generic netlink; the NBD client can't be reached",
                        errno,
                    ),
                    errno => Error::io(opening(), errno.into()),
                }
            })?;
        bind(descriptor.as_raw_fd(), &NetlinkAddr::new(0, 0)).context(opening)?;
        // Old kernels have neither; answers are longer then, and refusals have no words.
        let _: nix::Result<()> = setsockopt(&descriptor, option::CapAck, &true);
        let _: nix::Result<()> = setsockopt(&descriptor, option::ExtendedAck, &true);
        Ok(Socket { descriptor, sequence: 0, limit, buffer: vec![0; DATAGRAM] })
    }

    /// Asks the kernel for a family, which makes it load the family's module where it may.
    /// `None` if it has no such family.
    pub fn family(&mut self, name: &str) -> Result<Option<u16>> {
        let asking = format!("asking the kernel for its netlink family {name}");
        let question = Message::new(CONTROL, GET_FAMILY, CONTROL_VERSION).string(FAMILY_NAME, name);
        let mut found = None;
        let result = self.request(question, |_, attributes| {
            found = family_of(attributes)?;
            Ok(())
        });
        match result {
            Ok(()) => Ok(found),
            Err(Failure::Refused(Refused { errno: Errno::ENOENT, .. })) => Ok(None),
            Err(Failure::Refused(refused)) => Err(Error::io(asking, refused.errno.into())),
            Err(Failure::Broken(error)) => Err(error.within(asking)),
        }
    }

    /// Sends a request and waits for its acknowledgement; `answer` is given what comes before that.
    pub fn request(
        &mut self,
        message: Message,
        mut answer: impl FnMut(u8, Attributes<'_>) -> Result<(), Malformed>,
    ) -> Result<(), Failure> {
        self.sequence = self.sequence.wrapping_add(1).max(1);
        let own = self.sequence;
        self.send(&message.seal(own)).map_err(Failure::Broken)?;
        let until = Instant::now() + self.limit;
        for _ in 0..MAX_DATAGRAMS {
            let left = until.saturating_duration_since(Instant::now());
            let datagram = match self.receive(left).map_err(Failure::Broken)? {
                Heard::Datagram(datagram) => datagram,
                Heard::Overrun => continue,
                Heard::Nothing => break,
            };
            for received in messages(datagram) {
                match received.map_err(garbled)? {
                    Received::Data { sequence, command, attributes, .. } if sequence == own => {
                        answer(command, attributes).map_err(garbled)?;
                    }
                    Received::Ack { sequence, result } if sequence == own => {
                        return result.map_err(Failure::Refused);
                    }
                    _ => (),
                }
            }
        }
        let late = format!("the kernel did not answer within {:?}", self.limit);
        Err(Failure::Broken(Error::new(Kind::Unavailable, late)))
    }

    /// What the kernel sends within `limit`.
    fn receive(&mut self, limit: Duration) -> Result<Heard<'_>> {
        let receiving = || "receiving from the kernel by netlink";
        let until = Instant::now() + limit;
        let len = loop {
            // A time-out of zero would mean none at all.
            let left = until.saturating_duration_since(Instant::now());
            let left = left.max(Duration::from_millis(1));
            let wait = TimeVal::microseconds(i64::try_from(left.as_micros()).unwrap_or(i64::MAX));
            setsockopt(&self.descriptor, sockopt::ReceiveTimeout, &wait).context(receiving)?;
            let mut parts = [IoSliceMut::new(&mut self.buffer)];
            let received = recvmsg::<NetlinkAddr>(
                self.descriptor.as_raw_fd(),
                &mut parts,
                None,
                MsgFlags::empty(),
            );
            match received {
                Ok(received) if received.flags.contains(MsgFlags::MSG_TRUNC) => {
                    let what = format!("the kernel's answer is longer than {DATAGRAM} bytes");
                    return Err(Error::new(Kind::Unsupported, what));
                }
                Ok(received) => match received.address {
                    Some(sender) if sender.pid() == 0 => break received.bytes,
                    // Another process may send to this socket; nothing makes us listen.
                    _ if Instant::now() >= until => return Ok(Heard::Nothing),
                    _ => (),
                },
                Err(Errno::EAGAIN) => return Ok(Heard::Nothing),
                Err(Errno::ENOBUFS) => return Ok(Heard::Overrun),
                Err(Errno::EINTR) => (),
                Err(errno) => return Err(Error::io(receiving(), errno.into())),
            }
        };
        Ok(Heard::Datagram(&self.buffer[..len]))
    }

    fn send(&self, bytes: &[u8]) -> Result<()> {
        let kernel = NetlinkAddr::new(0, 0);
        let parts = [IoSlice::new(bytes)];
        loop {
            let descriptor = self.descriptor.as_raw_fd();
            match sendmsg(descriptor, &parts, &[], MsgFlags::empty(), Some(&kernel)) {
                Err(Errno::EINTR) => (),
                sent => return sent.map(drop).context(|| "sending to the kernel by netlink"),
            }
        }
    }
}

fn garbled(malformed: Malformed) -> Failure {
    Failure::Broken(Error::caused(Kind::Corrupt, "the kernel's answer makes no sense", malformed))
}

#[cfg(test)]
mod tests;
