//! The kernel's NBD client: /dev/nbdN devices whose requests come to our own NBD server.
//!
//! ```text
//!      connect ------> /dev/nbdN serves; the kernel holds the clients' ends of the connections
//!      one ends -----> its requests wait, for `dead_after` at most
//!      reconnect ----> new connections take the place of the dead ones, requests are sent again
//!      disconnect ---> no more I/O; the device is free once nobody has it open
//! ```
//!
//! The device outlives the daemon: after a crash its requests wait, and the next daemon finds it by
//! its backend's name ([`device::attached`]) and gives it new connections. What was under way is
//! sent again when a request's timer finds its connection replaced. Two timers can do that:
//!
//! - The client's own `timeout` also declares a connection dead whose server is merely slow, and
//!   sends the request a second time while the first is still being served. If that first one, a
//!   write, ends after a later write to the same place, it undoes it. So `timeout` stays 0.
//! - With `timeout` 0 the block layer's timer only looks whether the connection was replaced. Its
//!   period is 30 s, unless sysfs's `io_timeout` says otherwise: [`RESEND`] is written there.
//!
//! With more than one connection a request whose timer fires is sent again by way of another one
//! whatever `timeout` says: harmless to an image, and such a device keeps the 30 s; but not for what is
//! written.
//!
//! Invariants:
//! - A device is reconnected only after the sessions that served its old connections have ended,
//!   and with them every write of theirs. The caller sees to that.
//! - A change of size is sent by itself, after connections and never together with them: it waits
//!   for requests under way, and these may wait for the connections.
//! - Calls block, `resize` for as long as a request of the device takes; see `netlink` on what
//!   else then waits. They belong on a thread for blocking work.
//!
//! Memory: a device whose writes the daemon serves must never be waited for by the daemon's own
//! allocations. The daemon calls [`crate::io::flusher::protect`] before it starts its threads.

pub mod command;
pub mod device;
pub mod served;

use std::{
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use nix::errno::Errno;

pub use command::{BlockSize, Status};

use super::netlink::{Attributes, Failure, Malformed, Message, Refused, Socket};
use crate::error::{Error, Kind, Result};
use command::FAMILY;

/// How often a request looks whether its connection was replaced. Each look of one that waits is a line
/// in the kernel's log.
pub const RESEND: Duration = Duration::from_secs(5);
/// How long requests wait for a new connection unless the caller says otherwise: a day would do as
/// well, but a machine that shuts down waits for it.
pub const DEAD_AFTER: Duration = Duration::from_secs(3600);
/// The most connections of one device.
pub const MAX_CONNECTIONS: usize = 16;
/// The longest backend's name, in bytes.
pub const MAX_BACKEND: usize = 1024;

/// How long the kernel may take to answer.
const ANSWER: Duration = Duration::from_secs(30);
/// While a size changes: how long a request may take, and may then wait for a connection.
const RESIZE_TIMEOUT: Duration = Duration::from_secs(60);
const RESIZE_DEAD_AFTER: Duration = Duration::from_secs(5);
/// How long requests from before are waited for.
const SETTLE: Duration = Duration::from_secs(2);

/// Which device to use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Choice {
    /// Any that is free; the kernel makes one if none is.
    Any,
    /// /dev/nbdN with this N; the kernel makes it if need be.
    Number(u32),
}

/// The clients' ends of connections to one export, ready for requests. Dropping them closes what
/// the kernel did not take.
#[derive(Debug)]
pub struct Links {
    /// The connections.
    pub sockets: Vec<UnixStream>,
    /// The export's size in bytes.
    pub size: u64,
    /// The export's transmission flags.
    pub flags: u16,
}

/// What the kernel is told of a device beside its connections.
#[derive(Clone, Debug)]
pub struct Setup {
    /// The name that sysfs shows and that a later `reconnect` must repeat: our export's.
    pub backend: String,
    /// The smallest request.
    pub block_size: BlockSize,
    /// How long requests wait for a new connection before they fail, in whole seconds.
    pub dead_after: Duration,
}

impl Setup {
    /// A device of this export, with 512-byte sectors and the usual patience.
    pub fn new(export: impl Into<String>) -> Setup {
        Setup { backend: export.into(), block_size: BlockSize::Sector, dead_after: DEAD_AFTER }
    }

    fn check(&self) -> Result<()> {
        let len = self.backend.len();
        if len == 0 || len > MAX_BACKEND || self.backend.contains(['\0', '\n']) {
            let what = format!(
                "backend {:?} of an NBD device: 1 to {MAX_BACKEND} bytes on one line are allowed",
                self.backend
            );
            return Err(Error::new(Kind::Invalid, what));
        }
        Ok(())
    }
}

/// A way to the kernel's NBD client.
#[derive(Debug)]
pub struct Client {
    socket: Socket,
    family: u16,
    sysfs: PathBuf,
}

impl Client {
    /// Opens one. [`Kind::Unsupported`] where the kernel has no NBD client or may not load it.
    pub fn open() -> Result<Client> {
        let mut socket = Socket::open(ANSWER)?;
        let family = find_family(&mut socket)?;
        Ok(Client { socket, family, sysfs: PathBuf::from(device::SYSFS) })
    }

    /// Makes a device of `links`; returns its number. The kernel keeps the connections.
    pub fn connect(&mut self, choice: Choice, what: &Setup, links: Links) -> Result<u32> {
        what.check()?;
        let attaching = || match choice {
            Choice::Any => format!("attaching {} to an NBD device", what.backend),
            Choice::Number(index) => format!("attaching {} to /dev/nbd{index}", what.backend),
        };
        let message = command::connect(self.family, choice, what, &links)
            .map_err(|error| error.within(attaching()))?;
        let mut index = None;
        self.ask(message, |command, attributes| {
            if let Some(answer) = command::connected(command, attributes)? {
                index = Some(answer);
            }
            Ok(())
        })
        .map_err(|failure| explain(failure, Action::Connect).within(attaching()))?;
        // The kernel leaves its answer out when it is short of memory at that moment.
        let index = match (index, choice) {
            (Some(index), _) | (None, Choice::Number(index)) => index,
            (None, Choice::Any) => {
                let at = device::attached(&self.sysfs)?.into_iter().rev();
                let found = at.into_iter().find(|device| device.backend == what.backend);
                let lost = || Error::new(Kind::Unavailable, "the kernel did not tell the number");
                found.ok_or_else(|| lost().within(attaching()))?.index
            }
        };
        self.set_resend(index, links.sockets.len());
        Ok(index)
    }

    /// Gives a device whose connections ended new ones; what was under way is sent again.
    ///
    /// The kernel closes connections that it has no use for, because it has not noticed yet that an
    /// old one ended. Whoever serves them sees them end, and reconnects again.
    pub fn reconnect(&mut self, index: u32, what: &Setup, links: Links) -> Result<()> {
        what.check()?;
        let message = command::reconnect(self.family, index, what, &links);
        self.change(index, what, "reconnecting", message)
    }

    /// Tells the kernel that the export grew to `size` bytes. Its connections must be alive: the
    /// kernel lets every request under way end first.
    ///
    /// Should the daemon die in that moment, its thread waits in the kernel for requests that
    /// nobody serves any more, and keeps the connections, and generic netlink's lock, to itself.
    /// So while the size changes, requests have a time limit, after which they fail with EIO.
    pub fn resize(&mut self, index: u32, what: &Setup, size: u64) -> Result<()> {
        what.check()?;
        let resizing = format!("resizing /dev/nbd{index}");
        let Some(device) = device::find(&self.sysfs, index)? else {
            return Err(not_attached(index, what).within(resizing));
        };
        if size == device.size {
            return Ok(());
        }
        if size < device.size {
            let what =
                format!("{resizing}: from {} to {size} bytes; it can only grow", device.size);
            return Err(Error::new(Kind::Invalid, what));
        }
        command::check_size(size, what.block_size).map_err(|error| error.within(&resizing))?;
        let queues = device::queues(&self.sysfs, index);
        if let Err(error) = self.prepare_resize(index) {
            self.set_resend(index, queues);
            return Err(error.within(resizing));
        }
        let limits = |timeout, dead| command::limits(self.family, index, what, timeout, dead);
        let limited = limits(RESIZE_TIMEOUT, RESIZE_DEAD_AFTER);
        let restored = limits(Duration::ZERO, what.dead_after);
        let resized = command::resize(self.family, index, what, size);
        let resized = self
            .change(index, what, "resizing", limited)
            .and_then(|()| self.change(index, what, "resizing", resized));
        // Also after a failure: the device must not keep the time limit.
        let restored = self.change(index, what, "resizing", restored);
        self.set_resend(index, queues);
        resized.and(restored)
    }

    /// Sees to it that no request under way has a timer of less than [`RESIZE_TIMEOUT`]: it would
    /// declare a live connection dead as soon as there is a time limit. Requests keep the timer that
    /// they began with, so those must end. That is seen when none is under way; while there always
    /// are some, and some end, the old ones are taken to be among these after [`SETTLE`].
    fn prepare_resize(&self, index: u32) -> Result<()> {
        if device::set_io_timeout(&self.sysfs, index, RESIZE_TIMEOUT).is_err() {
            // Then it was not shortened either.
            return Ok(());
        }
        let before = device::completed(&self.sysfs, index);
        let until = Instant::now() + SETTLE;
        while device::in_flight(&self.sysfs, index) != Some(0) {
            if Instant::now() < until {
                thread::sleep(SETTLE / 100);
            } else if device::completed(&self.sysfs, index) == before {
                let what = "none of its requests was answered for a while; see to the disks of \
                            its export, or to its connection, and try again";
                return Err(Error::new(Kind::Unavailable, what));
            } else {
                break;
            }
        }
        Ok(())
    }

    /// Ends a device: I/O on it fails from now on, and its connections are closed. Not an error for
    /// one that is not attached. The kernel does not ask who uses the device: [`device::users`] does.
    pub fn disconnect(&mut self, index: u32) -> Result<()> {
        let message = command::disconnect(self.family, index);
        self.ask(message, |_, _| Ok(())).map_err(|failure| {
            explain(failure, Action::Disconnect).within(format!("detaching /dev/nbd{index}"))
        })
    }

    /// The lowest number from `from` on of a device that is not in use; there may be no such device
    /// yet. Somebody else may take it meanwhile: then `connect` says [`Kind::InUse`].
    pub fn free(&mut self, from: u32) -> Result<u32> {
        Ok(command::free(&self.status()?, from))
    }

    /// Which devices there are, and which are in use: attached, or no longer but still open.
    pub fn status(&mut self) -> Result<Vec<Status>> {
        let mut devices = Vec::new();
        let message = command::status(self.family);
        self.ask(message, |command, attributes| {
            command::statuses(command, attributes, &mut devices)
        })
        .map_err(|failure| explain(failure, Action::Status).within("listing NBD devices"))?;
        Ok(devices)
    }

    fn change(&mut self, index: u32, what: &Setup, doing: &str, message: Message) -> Result<()> {
        self.ask(message, |_, _| Ok(())).map_err(|failure| {
            let error = match failure {
                Failure::Refused(Refused { errno: Errno::EINVAL, message: None }) => {
                    not_attached(index, what)
                }
                failure => explain(failure, Action::Reconfigure),
            };
            error.within(format!("{doing} /dev/nbd{index}"))
        })
    }

    fn ask(
        &mut self,
        message: Message,
        answer: impl FnMut(u8, Attributes<'_>) -> Result<(), Malformed>,
    ) -> Result<(), Failure> {
        self.socket.request(message, answer)
    }

    /// Sets how soon requests are sent again after `reconnect`. Without it they are too, later.
    fn set_resend(&self, index: u32, connections: usize) {
        if connections > 1 {
            return;
        }
        if let Err(error) = device::set_io_timeout(&self.sysfs, index, RESEND) {
            let later = "after a restart of the daemon its requests will wait up to 60 s";
            tracing::warn!(%error, "/dev/nbd{index}: {later}");
        }
    }
}

fn find_family(socket: &mut Socket) -> Result<u16> {
    socket.family(FAMILY)?.ok_or_else(|| {
        let what = "the kernel's NBD client is not there; load it with `modprobe nbd`, or attach \
                    with --via ublk";
        Error::new(Kind::Unsupported, what)
    })
}

fn not_attached(index: u32, what: &Setup) -> Error {
    let text = format!("/dev/nbd{index} is not attached to {}; attach it anew", what.backend);
    Error::new(Kind::NotFound, text)
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Action {
    Connect,
    Reconfigure,
    Disconnect,
    Status,
}

/// What the kernel's refusal means, and what to do about it.
fn explain(failure: Failure, action: Action) -> Error {
    let refused = match failure {
        Failure::Refused(refused) => refused,
        Failure::Broken(error) => return error,
    };
    let (kind, text) = match (refused.errno, action) {
        (Errno::EPERM | Errno::EACCES, _) => (
            Kind::Permission,
            "the kernel's NBD client asks for CAP_SYS_ADMIN; run the daemon as root",
        ),
        (Errno::EBUSY | Errno::EEXIST, Action::Connect) => (
            Kind::InUse,
            "the device is in use, or still open since it was detached; choose another, or none",
        ),
        (Errno::ENOSPC | Errno::ENODEV, Action::Connect) => {
            (Kind::NoSpace, "no NBD device is free, and the kernel can make no more; detach one")
        }
        (Errno::EINVAL, Action::Disconnect) => (Kind::NotFound, "there is no such device"),
        (Errno::EINVAL, _) => (Kind::Invalid, "the kernel's NBD client takes it for nonsense"),
        (Errno::ENOMEM, _) => (Kind::Unavailable, "the kernel is short of memory; try again"),
        (Errno::EOPNOTSUPP, _) => (Kind::Unsupported, "the kernel's NBD client is too old"),
        _ => (Kind::Io, "the kernel's NBD client refused it"),
    };
    Error::caused(kind, text, refused)
}

/// The device node of a device.
pub fn node(index: u32) -> PathBuf {
    Path::new("/dev").join(format!("nbd{index}"))
}

#[cfg(test)]
mod tests;
