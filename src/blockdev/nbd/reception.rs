//! From a listening socket to an export that a client has chosen: over a Unix socket, TCP, or TLS over TCP.
//!
//! Invariant: nothing that was sent in the clear counts for anything behind TLS.

use std::{os::fd::OwnedFd, sync::Arc};

use nix::{
    fcntl::{FcntlArg, OFlag, fcntl},
    sys::socket::{getsockopt, setsockopt, sockopt},
};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    net::{TcpListener, TcpStream, UnixListener, UnixStream},
};
use tokio_rustls::server::TlsStream;

use super::{Ending, Exports, Handshake, Negotiated, Offer, Secrecy, Step, Tls};
use crate::{
    blockdev::Export,
    error::{Context, Error, Kind, Result},
};

/// After so many seconds without a word a client over TCP is asked whether it is there, so often, and so many
/// times.
const KEEPALIVE: (u32, u32, u32) = (60, 10, 6);

pub(super) const CLIENT_SOCKET: &str = "NBD client's socket";

/// Where clients come from.
pub(super) enum Listener {
    Unix(UnixListener),
    Tcp(TcpListener, Option<Arc<Tls>>),
}

/// One that has come.
pub(super) enum Caller {
    Unix(UnixStream),
    Tcp(TcpStream, Option<Arc<Tls>>),
}

/// A connection that is ready for transmission.
pub(super) enum Settled {
    /// The session's to read and write.
    Plain(OwnedFd),
    /// Carried to the session.
    Tls(Box<TlsStream<TcpStream>>),
}

/// What a client's words came to, as far as they went.
enum Heard {
    /// It left.
    Nothing,
    /// TLS is next.
    StartTls,
    /// What was agreed on, about which export, and what was sent behind it.
    Choice(Choice),
}

/// What was agreed, about which export, and what the client sent behind its handshake.
pub(super) type Choice = (Negotiated, Arc<Export>, Vec<u8>);

impl Listener {
    /// Waits for the next.
    pub async fn accept(&self) -> std::io::Result<Caller> {
        match self {
            Listener::Unix(listener) => Ok(Caller::Unix(listener.accept().await?.0)),
            Listener::Tcp(listener, tls) => {
                let (stream, _) = listener.accept().await?;
                // Requests are answered as they come, and a host that is gone is noticed.
                stream.set_nodelay(true)?;
                let (idle, interval, count) = KEEPALIVE;
                setsockopt(&stream, sockopt::KeepAlive, &true)?;
                setsockopt(&stream, sockopt::TcpKeepIdle, &idle)?;
                setsockopt(&stream, sockopt::TcpKeepInterval, &interval)?;
                setsockopt(&stream, sockopt::TcpKeepCount, &count)?;
                setsockopt(&stream, sockopt::TcpUserTimeout, &((idle + interval * count) * 1000))?;
                Ok(Caller::Tcp(stream, tls.clone()))
            }
        }
    }
}

impl Caller {
    /// Who is at the other end.
    pub fn who(&self) -> String {
        let known = match self {
            Caller::Unix(stream) => getsockopt(stream, sockopt::PeerCredentials)
                .map(|peer| format!("pid {} (uid {})", peer.pid(), peer.uid()))
                .ok(),
            Caller::Tcp(stream, None) => stream.peer_addr().map(|peer| peer.to_string()).ok(),
            Caller::Tcp(stream, Some(_)) => {
                stream.peer_addr().map(|peer| format!("{peer} (TLS)")).ok()
            }
        };
        known.unwrap_or_else(|| "a client".to_owned())
    }

    /// Shakes hands: what is to be served by which connection; `None` if the client left.
    pub async fn settle(self, exports: &dyn Exports) -> Result<Option<(Settled, Choice)>> {
        let (socket, heard): (OwnedFd, Heard) = match self {
            Caller::Unix(mut stream) => {
                let heard = hear_plain(exports, &mut stream).await?;
                (stream.into_std().context(|| CLIENT_SOCKET)?.into(), heard)
            }
            Caller::Tcp(mut stream, None) => {
                let heard = hear_plain(exports, &mut stream).await?;
                (stream.into_std().context(|| CLIENT_SOCKET)?.into(), heard)
            }
            Caller::Tcp(stream, Some(tls)) => return settle_tls(exports, stream, tls).await,
        };
        let Heard::Choice(choice) = heard else { return Ok(None) };
        // The ring waits by itself; a socket that doesn't block would answer EAGAIN at once.
        let blocking = FcntlArg::F_SETFL(OFlag::empty());
        fcntl(&socket, blocking).context(|| CLIENT_SOCKET)?;
        Ok(Some((Settled::Plain(socket), choice)))
    }
}

/// Shakes hands by TLS.
async fn settle_tls(
    exports: &dyn Exports,
    mut stream: TcpStream,
    tls: Arc<Tls>,
) -> Result<Option<(Settled, Choice)>> {
    let mut output = Vec::new();
    let mut handshake = Handshake::new(Secrecy::Due, &mut output);
    let heard = hear(exports, &mut stream, &mut handshake, &mut output).await?;
    let Heard::StartTls = heard else { return Ok(None) };
    let acceptor = tokio::task::spawn_blocking(move || tls.acceptor()).await;
    let acceptor = acceptor.map_err(|_| Error::new(Kind::Io, "TLS can't be prepared"))?;
    let mut stream = acceptor.accept(stream).await.context(|| "NBD client's TLS")?;
    let heard = hear(exports, &mut stream, &mut handshake, &mut output).await?;
    let Heard::Choice(choice) = heard else { return Ok(None) };
    Ok(Some((Settled::Tls(Box::new(stream)), choice)))
}

async fn hear_plain(
    exports: &dyn Exports,
    stream: &mut (impl AsyncRead + AsyncWrite + Unpin),
) -> Result<Heard> {
    let mut output = Vec::new();
    let mut handshake = Handshake::new(Secrecy::Plain, &mut output);
    hear(exports, stream, &mut handshake, &mut output).await
}

/// Takes part in a handshake until the client has chosen an export, wants TLS, or leaves.
async fn hear(
    exports: &dyn Exports,
    stream: &mut (impl AsyncRead + AsyncWrite + Unpin),
    handshake: &mut Handshake,
    output: &mut Vec<u8>,
) -> Result<Heard> {
    let mut input = vec![0; 4096];
    let mut filled = 0;
    let mut opened: Option<Arc<Export>> = None;
    let broken = || "NBD client in handshake";
    loop {
        stream.write_all(output).await.context(broken)?;
        stream.flush().await.context(broken)?;
        output.clear();
        let (used, mut step) = handshake.feed(&input[..filled], output);
        input.copy_within(used..filled, 0);
        filled -= used;
        if let Step::List = step {
            let listed = exports.list();
            let listed = listed.iter().map(|(name, about)| (name.as_str(), about.as_str()));
            handshake.listed(listed, output);
            continue;
        }
        if let Step::Open { name } = step {
            let offer = exports.open(&name).await.map(|export| opened.insert(export));
            let offer = offer.as_ref().map(|export| Offer {
                info: export.device.info(),
                description: &export.description,
            });
            let offer = match offer {
                Ok(offer) => Ok(offer),
                Err(error) => Err(Error::new(error.kind(), error.to_string())),
            };
            step = handshake.opened(offer, output);
        }
        match step {
            Step::Read if output.is_empty() => {
                if filled == input.len() {
                    input.resize(filled * 2, 0);
                }
                match stream.read(&mut input[filled..]).await.context(broken)? {
                    0 => return Ok(Heard::Nothing),
                    read => filled += read,
                }
            }
            Step::StartTls => {
                if filled > 0 {
                    // Taken for words of the encrypted connection it would be anybody's.
                    let what = "NBD client sent something in the clear behind STARTTLS";
                    return Err(Error::new(Kind::Invalid, what));
                }
                stream.write_all(output).await.context(broken)?;
                output.clear();
                return Ok(Heard::StartTls);
            }
            Step::Transmit(negotiated) => {
                stream.write_all(output).await.context(broken)?;
                stream.flush().await.context(broken)?;
                let Some(export) = opened else {
                    unreachable!("transmission follows an export that was opened")
                };
                input.truncate(filled);
                return Ok(Heard::Choice((negotiated, export, input)));
            }
            Step::Close(ending) => {
                // The last words of a connection that ends anyway.
                let _ = stream.write_all(output).await;
                let _ = stream.shutdown().await;
                return match ending {
                    Ending::Aborted => Ok(Heard::Nothing),
                    Ending::Failed(error) => Err(error),
                };
            }
            Step::Read | Step::List | Step::Open { .. } => {}
        }
    }
}
