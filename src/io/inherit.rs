//! Listening sockets that a service manager hands to the process (systemd's socket activation).
//!
//! The descriptors are known by number only; taking one for one's own cannot be checked by the
//! compiler, so it happens here, once in a process.

use std::{
    io::{Error, ErrorKind, Result},
    net::TcpListener,
    os::{
        fd::{AsRawFd, FromRawFd, OwnedFd},
        unix::net::UnixListener,
    },
    sync::atomic::{AtomicBool, Ordering},
};

use nix::sys::socket::{AddressFamily, SockaddrLike, SockaddrStorage, getsockname, getsockopt};
use nix::sys::socket::{SockType, sockopt};

/// A socket that was handed over.
#[derive(Debug)]
pub enum Listener {
    /// Of a Unix socket.
    Unix(UnixListener),
    /// Of TCP.
    Tcp(TcpListener),
}

/// The sockets handed over and their names (`LISTEN_FDNAMES`); none when there was no activation,
/// and none at a second call. What is no listening stream socket is an error that names it.
pub fn listeners() -> Result<Vec<(String, Listener)>> {
    static TAKEN: AtomicBool = AtomicBool::new(false);
    let descriptors: Vec<_> = sd_notify::listen_fds_with_names()?.collect();
    if TAKEN.swap(true, Ordering::SeqCst) {
        return Ok(Vec::new());
    }
    descriptors
        .into_iter()
        .map(|(number, name)| {
            // SAFETY: the service manager opened this descriptor for this process (LISTEN_PID is
            // ours), nothing else in the process knows it, and `TAKEN` lets nobody get here twice.
            let descriptor = unsafe { OwnedFd::from_raw_fd(number) };
            let listener = as_listener(descriptor).map_err(|source| {
                Error::new(source.kind(), format!("activated socket {name:?}: {source}"))
            })?;
            Ok((name, listener))
        })
        .collect()
}

fn as_listener(descriptor: OwnedFd) -> Result<Listener> {
    let wrong = || Error::new(ErrorKind::InvalidInput, "not a listening Unix or TCP socket");
    let stream = getsockopt(&descriptor, sockopt::SockType).ok() == Some(SockType::Stream);
    let listens = getsockopt(&descriptor, sockopt::AcceptConn).ok() == Some(true);
    let address: SockaddrStorage = getsockname(descriptor.as_raw_fd()).map_err(|_| wrong())?;
    match address.family() {
        Some(AddressFamily::Unix) if stream && listens => Ok(Listener::Unix(descriptor.into())),
        Some(AddressFamily::Inet | AddressFamily::Inet6) if stream && listens => {
            Ok(Listener::Tcp(descriptor.into()))
        }
        _ => Err(wrong()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_listening_sockets_are_taken() {
        let directory = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(directory.path().join("s")).unwrap();
        assert!(matches!(as_listener(listener.into()), Ok(Listener::Unix(_))));
        let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
        let client = std::net::TcpStream::connect(tcp.local_addr().unwrap()).unwrap();
        assert!(matches!(as_listener(tcp.into()), Ok(Listener::Tcp(_))));
        assert!(as_listener(client.into()).is_err(), "connected, not listening");
        let packets = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        assert!(as_listener(packets.into()).is_err(), "no stream");
        let (a, _b) = std::os::unix::net::UnixStream::pair().unwrap();
        assert!(as_listener(a.into()).is_err(), "connected, not listening");
        let file = std::fs::File::open("/dev/null").unwrap();
        assert!(as_listener(file.into()).is_err());
    }
}
