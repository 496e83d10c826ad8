//! Connections to our own NBD server, shaken hands: what the kernel's client takes over.
//!
//! The kernel speaks the transmission phase only, and of that only simple replies, so nothing else
//! is negotiated. The server is not trusted blindly: every length is bounded, and the whole
//! handshake has a time limit.

use std::{
    io::{ErrorKind, Read, Write},
    os::{fd::AsRawFd, unix::net::UnixStream},
    path::Path,
    time::{Duration, Instant},
};

use nix::sys::{
    socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, setsockopt, socket, sockopt},
    time::{TimeVal, TimeValLike},
};

use crate::{
    blockdev::nbd::wire::{
        GREETING, MAX_STRING, OPTION_MAGIC, OPTION_REPLY_MAGIC, flag, handshake_flag, info, option,
        reply,
    },
    error::{Context, Error, Kind, Result},
};

/// How long the handshake of one connection may take.
pub const HANDSHAKE: Duration = Duration::from_secs(10);
/// The longest reply that is taken: an error's message at most.
const MAX_REPLY: u32 = 64 << 10;
/// The most replies to one option: all kinds of information, and some to come.
const MAX_REPLIES: usize = 32;
/// Bytes of an EXPORT information: kind, size, flags.
const EXPORT_INFO: usize = 12;

/// Connections to one export, ready for requests. Dropping them closes what the kernel did not
/// take.
#[derive(Debug)]
pub struct Links {
    pub(super) sockets: Vec<UnixStream>,
    pub(super) size: u64,
    pub(super) flags: u16,
}

impl Links {
    /// Connects `count` times to the NBD server at `server`, for `export`.
    pub fn dial(server: &Path, export: &str, count: usize) -> Result<Links> {
        if count == 0 || count > super::MAX_CONNECTIONS {
            let most = super::MAX_CONNECTIONS;
            let what = format!("{count} connections to {export}; 1 to {most} are allowed");
            return Err(Error::new(Kind::Invalid, what));
        }
        let mut links = Links { sockets: Vec::with_capacity(count), size: 0, flags: 0 };
        for number in 0..count {
            let until = Instant::now() + HANDSHAKE;
            let stream = open(server, until)?;
            let (size, flags) = shake_hands(&stream, export, until)
                .map_err(|error| error.within(format!("NBD export {export}")))?;
            if number > 0 && (size, flags) != (links.size, links.flags) {
                let what = format!("export {export} changed between two connections; try again");
                return Err(Error::new(Kind::Unavailable, what));
            }
            (links.size, links.flags) = (size, flags);
            links.sockets.push(stream);
        }
        Ok(links)
    }

    /// How many connections there are.
    pub fn count(&self) -> usize {
        self.sockets.len()
    }

    /// The export's size in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// The export can't be written.
    pub fn read_only(&self) -> bool {
        self.flags & flag::READ_ONLY != 0
    }
}

/// Connects in bounded time, which the standard library offers for no Unix socket.
fn open(server: &Path, until: Instant) -> Result<UnixStream> {
    let connecting = || format!("connecting to the NBD server at {}", server.display());
    let address = UnixAddr::new(server).context(connecting)?;
    let descriptor = socket(AddressFamily::Unix, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)
        .context(connecting)?;
    let left = time_val(left(until).map_err(|error| error.within(connecting()))?);
    setsockopt(&descriptor, sockopt::SendTimeout, &left).context(connecting)?;
    connect(descriptor.as_raw_fd(), &address).map_err(|errno| match errno {
        nix::errno::Errno::ECONNREFUSED | nix::errno::Errno::ENOENT => Error::caused(
            Kind::Unavailable,
            format!("{}; is the daemon running?", connecting()),
            errno,
        ),
        errno => Error::io(connecting(), errno.into()),
    })?;
    Ok(UnixStream::from(descriptor))
}

/// The handshake by option GO; returns size and transmission flags.
fn shake_hands(stream: &UnixStream, export: &str, until: Instant) -> Result<(u64, u16)> {
    if export.len() > MAX_STRING {
        let what = format!("a name of {} bytes; {MAX_STRING} are allowed", export.len());
        return Err(Error::new(Kind::Invalid, what));
    }
    let mut wire = Wire { stream, until };
    let greeting: [u8; 18] = wire.take()?;
    let server = u16::from_be_bytes([greeting[16], greeting[17]]);
    let known = be(&greeting[..8]) == GREETING && be(&greeting[8..16]) == OPTION_MAGIC;
    if !known || server & handshake_flag::FIXED_NEWSTYLE == 0 {
        return Err(Error::new(
            Kind::Corrupt,
            "the greeting is not that of an NBD server of today",
        ));
    }
    let client = server & (handshake_flag::FIXED_NEWSTYLE | handshake_flag::NO_ZEROES);
    wire.send(&hello(client, export))?;
    let mut told = None;
    for _ in 0..MAX_REPLIES {
        let header: [u8; 20] = wire.take()?;
        let (kind, len) = (be(&header[12..16]) as u32, be(&header[16..]) as u32);
        let ours = be(&header[..8]) == OPTION_REPLY_MAGIC
            && be(&header[8..12]) == u64::from(option::GO)
            && len <= MAX_REPLY;
        if !ours {
            return Err(Error::new(Kind::Corrupt, "the server's reply makes no sense"));
        }
        let mut data = vec![0; len as usize];
        wire.fill(&mut data)?;
        match kind {
            reply::ACK => {
                // The kernel waits as long as it likes.
                stream.set_read_timeout(None).context(|| "a connection's time limit")?;
                stream.set_write_timeout(None).context(|| "a connection's time limit")?;
                let silent = || Error::new(Kind::Corrupt, "the server did not tell the size");
                return told.ok_or_else(silent);
            }
            reply::INFO if data.starts_with(&info::EXPORT.to_be_bytes()) => {
                if data.len() != EXPORT_INFO {
                    return Err(Error::new(Kind::Corrupt, "the server's reply makes no sense"));
                }
                told = Some((be(&data[2..10]), be(&data[10..]) as u16));
            }
            reply::INFO => (),
            error => return Err(refused(error, &data)),
        }
    }
    Err(Error::new(Kind::Corrupt, "the server does not come to an end of its replies"))
}

/// Client flags and option GO, which asks for no information: the size comes unasked.
fn hello(flags: u16, export: &str) -> Vec<u8> {
    let len = export.len() as u32;
    let mut bytes = u32::from(flags).to_be_bytes().to_vec();
    bytes.extend(OPTION_MAGIC.to_be_bytes());
    bytes.extend(option::GO.to_be_bytes());
    bytes.extend((4 + len + 2).to_be_bytes());
    bytes.extend(len.to_be_bytes());
    bytes.extend(export.as_bytes());
    bytes.extend([0, 0]);
    bytes
}

fn refused(code: u32, message: &[u8]) -> Error {
    let kind = match code {
        reply::ERR_UNKNOWN => Kind::NotFound,
        reply::ERR_POLICY | reply::ERR_TLS_REQD => Kind::Permission,
        reply::ERR_UNSUP | reply::ERR_PLATFORM => Kind::Unsupported,
        reply::ERR_SHUTDOWN => Kind::Unavailable,
        _ => Kind::Invalid,
    };
    let message = String::from_utf8_lossy(message);
    match message.is_empty() {
        true => Error::new(kind, format!("the server refused it with code {code:#x}")),
        false => Error::new(kind, format!("the server refused it: {message}")),
    }
}

/// A connection in handshake: every wait ends in time.
struct Wire<'a> {
    stream: &'a UnixStream,
    until: Instant,
}

impl Wire<'_> {
    fn take<const N: usize>(&mut self) -> Result<[u8; N]> {
        let mut bytes = [0; N];
        self.fill(&mut bytes)?;
        Ok(bytes)
    }

    fn fill(&mut self, mut bytes: &mut [u8]) -> Result<()> {
        let reading = || "reading the server's handshake";
        while !bytes.is_empty() {
            self.stream.set_read_timeout(Some(left(self.until)?)).context(reading)?;
            match self.stream.read(bytes) {
                Ok(0) => {
                    let what = "the server closed the connection in the handshake";
                    return Err(Error::new(Kind::Unavailable, what));
                }
                Ok(read) => bytes = &mut bytes[read..],
                Err(error) if retried(&error) => (),
                Err(error) => return Err(broken(reading(), error)),
            }
        }
        Ok(())
    }

    fn send(&mut self, mut bytes: &[u8]) -> Result<()> {
        let writing = || "writing the client's handshake";
        while !bytes.is_empty() {
            self.stream.set_write_timeout(Some(left(self.until)?)).context(writing)?;
            match self.stream.write(bytes) {
                Ok(written) => bytes = &bytes[written..],
                Err(error) if retried(&error) => (),
                Err(error) => return Err(broken(writing(), error)),
            }
        }
        Ok(())
    }
}

/// Interrupted, or a time limit of which `left` knows better.
fn retried(error: &std::io::Error) -> bool {
    matches!(error.kind(), ErrorKind::Interrupted | ErrorKind::WouldBlock)
}

/// A daemon that stops resets the connections that it has not taken yet: the next one takes them.
fn broken(what: &str, error: std::io::Error) -> Error {
    match error.kind() {
        ErrorKind::ConnectionReset | ErrorKind::BrokenPipe => {
            Error::caused(Kind::Unavailable, what, error)
        }
        _ => Error::io(what, error),
    }
}

/// What is left of the time, never nothing.
fn left(until: Instant) -> Result<Duration> {
    let left = until.saturating_duration_since(Instant::now());
    match left.is_zero() {
        true => Err(Error::new(Kind::Unavailable, "the server took too long over the handshake")),
        false => Ok(left.max(Duration::from_millis(1))),
    }
}

fn time_val(duration: Duration) -> TimeVal {
    TimeVal::microseconds(i64::try_from(duration.as_micros()).unwrap_or(i64::MAX))
}

/// Up to eight bytes as one number.
fn be(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0, |number, byte| number << 8 | u64::from(*byte))
}

#[cfg(test)]
mod tests;
