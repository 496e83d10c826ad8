//! Listening sockets that a service manager hands to the process (systemd's socket activation).
//!
//! The descriptors are known by number only; taking one for one's own cannot be checked by the
//! compiler, so it happens here, once in a process.

use std::{
    io::{Error, ErrorKind, Result},
    os::{
        fd::{FromRawFd, OwnedFd},
        unix::net::UnixListener,
    },
    sync::atomic::{AtomicBool, Ordering},
};

use nix::sys::socket::{AddressFamily, SockaddrLike, SockaddrStorage, getsockname, getsockopt};
use nix::sys::socket::{SockType, sockopt};

/// The sockets handed over and their names (`LISTEN_FDNAMES`); none when there was no activation,
/// and none at a second call. What is no listening Unix stream socket is an error that names it.
pub fn listeners() -> Result<Vec<(String, UnixListener)>> {
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

fn as_listener(descriptor: OwnedFd) -> Result<UnixListener> {
    let wrong = || Error::new(ErrorKind::InvalidInput, "not a listening Unix stream socket");
    let address: SockaddrStorage =
        getsockname(std::os::fd::AsRawFd::as_raw_fd(&descriptor)).map_err(|_| wrong())?;
    let unix = address.family() == Some(AddressFamily::Unix);
    let stream = getsockopt(&descriptor, sockopt::SockType).ok() == Some(SockType::Stream);
    let listens = getsockopt(&descriptor, sockopt::AcceptConn).ok() == Some(true);
    if unix && stream && listens { Ok(UnixListener::from(descriptor)) } else { Err(wrong()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_listening_unix_sockets_are_taken() {
        let directory = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(directory.path().join("s")).unwrap();
        assert!(as_listener(listener.into()).is_ok());
        let (a, _b) = std::os::unix::net::UnixStream::pair().unwrap();
        assert!(as_listener(a.into()).is_err(), "connected, not listening");
        let tcp = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        assert!(as_listener(tcp.into()).is_err(), "not a Unix socket");
        let file = std::fs::File::open("/dev/null").unwrap();
        assert!(as_listener(file.into()).is_err());
    }
}
