//! The NBD server: accepts connections, lets them shake hands, and hands them to the ring threads.
//!
//! Handshakes are few and slow: they run on tokio, each within [`HANDSHAKE`]. Transmission runs on
//! the rings. The number of connections is bounded; whoever comes past that waits in the kernel's
//! queue.

use std::{
    collections::HashMap,
    future::Future,
    os::fd::{AsRawFd, OwnedFd},
    pin::Pin,
    sync::{
        Arc, Mutex, PoisonError, Weak,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use nix::sys::socket::{Shutdown, getsockopt, shutdown, sockopt};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{UnixListener, UnixStream},
    sync::{Semaphore, watch},
    task::JoinHandle,
    time::timeout,
};

use super::{Ending, Handshake, Negotiated, Offer, Step, Terms, session};
use crate::{
    blockdev::{AnyDevice, Export, figures::Front},
    error::{Context, Error, Kind, Result},
    io::{Ring, Rings},
};

/// What a client may take for its whole handshake.
pub const HANDSHAKE: Duration = Duration::from_secs(10);

/// Connections at once.
pub const MAX_CONNECTIONS: usize = 1024;

/// How long a client that was told to go may take to read its last replies.
pub const DRAIN: Duration = Duration::from_secs(10);

/// The names that clients can open, and the devices behind them.
pub trait Exports: Send + Sync + 'static {
    /// Every name, with a description for people.
    fn list(&self) -> Vec<(String, String)>;

    /// Opens the export of that name, or shares it if it is open already.
    fn open<'a>(
        &'a self,
        name: &'a str,
    ) -> Pin<Box<dyn Future<Output = Result<Arc<Export>>> + Send + 'a>>;
}

/// One daemon's NBD service on one listening socket.
pub struct Server {
    shared: Arc<Shared>,
    stop: watch::Sender<bool>,
}

struct Shared {
    rings: Arc<Rings>,
    exports: Arc<dyn Exports>,
    slots: Arc<Semaphore>,
    sessions: Mutex<Vec<Weak<Session>>>,
    served: AtomicU64,
}

/// A connection in transmission.
struct Session {
    socket: Arc<OwnedFd>,
    export: Arc<Export>,
    client: Client,
}

/// Whom a session serves.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Client {
    /// Whoever connected.
    Process,
    /// The kernel, by a connection that [`Server::pair`] made.
    Kernel,
}

/// A connection that is served, without a client yet.
pub struct Pair {
    /// The client's end.
    pub socket: std::os::unix::net::UnixStream,
    /// What a client would have been told in the handshake.
    pub terms: Terms,
    /// Ends after the session's last request has.
    pub session: JoinHandle<()>,
    /// Ends the connection from this side.
    pub line: Line,
}

/// A handle on a connection that does not keep it.
pub struct Line(Weak<Session>);

impl Line {
    /// Whether the connection has not ended.
    pub fn is_open(&self) -> bool {
        self.0.strong_count() > 0
    }

    /// Ends the connection at once: whoever waits to send or to receive by it waits no more.
    pub fn cut(&self) {
        if let Some(session) = self.0.upgrade() {
            // One that has ended by itself is what is wanted.
            let _: nix::Result<()> = shutdown(session.socket.as_raw_fd(), Shutdown::Both);
        }
    }
}

impl Server {
    /// Serves `exports` to whoever connects to `listener`, from within a tokio runtime.
    pub fn start(listener: UnixListener, rings: Arc<Rings>, exports: Arc<dyn Exports>) -> Server {
        let slots = Arc::new(Semaphore::new(MAX_CONNECTIONS));
        let (sessions, served) = (Mutex::default(), AtomicU64::new(0));
        let shared = Arc::new(Shared { rings, exports, slots, sessions, served });
        let (stop, stopped) = watch::channel(false);
        tokio::spawn(shared.clone().accept(listener, stopped));
        Server { shared, stop }
    }

    /// Connections in transmission.
    pub fn connections(&self) -> usize {
        self.shared.live().len()
    }

    /// Connections served since the start.
    pub fn served(&self) -> u64 {
        self.shared.served.load(Ordering::Relaxed)
    }

    /// Which processes have this export open: one entry a connection, as `pid 4711 (uid 0)`.
    pub fn clients(&self, name: &str) -> Vec<String> {
        let sessions = self.shared.live();
        let theirs = sessions
            .iter()
            .filter(|session| session.client == Client::Process && session.export.name == name);
        theirs.map(|session| who(&session.socket)).collect()
    }

    /// How many clients each export has that has any, the kernel's apart.
    pub fn clients_of_each(&self) -> HashMap<String, u64> {
        let mut counts = HashMap::new();
        for session in self.shared.live() {
            if session.client == Client::Process {
                *counts.entry(session.export.name.clone()).or_insert(0) += 1;
            }
        }
        counts
    }

    /// A connection to `export` that needs no handshake, for the kernel's NBD client.
    ///
    /// # Errors
    /// `NoSpace` if there are [`MAX_CONNECTIONS`] already, `Unavailable` if the server stops.
    pub fn pair(&self, export: Arc<Export>) -> Result<Pair> {
        let slot = self.shared.slots.clone().try_acquire_owned().map_err(|_| {
            let what = format!("there are {MAX_CONNECTIONS} NBD connections; end some");
            Error::new(Kind::NoSpace, what)
        })?;
        let (socket, own) = std::os::unix::net::UnixStream::pair()
            .context(|| format!("{}: making a connection", export.name))?;
        let terms = Terms::new(export.device.info(), false, None);
        let (shared, socket_of) = (self.shared.clone(), OwnedFd::from(own));
        let session = shared.remember(socket_of, export, Client::Kernel);
        // After it can be seen: `stop` either sees the session or is seen here.
        if *self.stop.borrow() {
            return Err(Error::new(Kind::Unavailable, "the daemon is stopping"));
        }
        let line = Line(Arc::downgrade(&session));
        let session = tokio::spawn(async move {
            shared.transmit(session, terms, Vec::new()).await;
            drop(slot);
        });
        Ok(Pair { socket, terms, session, line })
    }

    /// Takes no more connections and no more requests, waits until what is under way is answered,
    /// and cuts off whoever has not read its replies within [`DRAIN`].
    pub async fn stop(&self) {
        self.stop.send_replace(true);
        let deadline = Instant::now() + DRAIN;
        // A client can get through its handshake meanwhile: sessions are told again and again.
        while self.busy() && Instant::now() < deadline {
            self.shared.shut(Shutdown::Read);
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        self.shared.shut(Shutdown::Both);
        let deadline = Instant::now() + DRAIN;
        while self.busy() && Instant::now() < deadline {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    fn busy(&self) -> bool {
        !self.shared.live().is_empty()
    }
}

/// Who is at the other end of a Unix socket.
fn who(socket: &OwnedFd) -> String {
    match getsockopt(socket, sockopt::PeerCredentials) {
        Ok(peer) => format!("pid {} (uid {})", peer.pid(), peer.uid()),
        Err(_) => "a client".to_owned(),
    }
}

impl Shared {
    async fn accept(self: Arc<Self>, listener: UnixListener, mut stopped: watch::Receiver<bool>) {
        loop {
            let slot = tokio::select! {
                _ = stopped.changed() => return,
                slot = self.slots.clone().acquire_owned() => slot,
            };
            let Ok(slot) = slot else { return };
            let accepted = tokio::select! {
                _ = stopped.changed() => return,
                accepted = listener.accept() => accepted,
            };
            match accepted {
                Ok((stream, _)) => {
                    let (shared, mut stopped) = (self.clone(), stopped.clone());
                    tokio::spawn(async move {
                        let serving = shared.serve(stream, &mut stopped);
                        if let Err(error) = serving.await {
                            tracing::info!(%error, "NBD client turned away");
                        }
                        drop(slot);
                    });
                }
                Err(error) => {
                    // Out of descriptors, most likely: others must close first.
                    tracing::warn!(%error, "accepting an NBD client");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            }
        }
    }

    async fn serve(
        self: Arc<Self>,
        mut stream: UnixStream,
        stopped: &mut watch::Receiver<bool>,
    ) -> Result<()> {
        let shaking = tokio::select! {
            _ = stopped.changed() => return Ok(()),
            shaking = timeout(HANDSHAKE, self.shake_hands(&mut stream)) => shaking,
        };
        let late = |_| Error::new(Kind::Invalid, format!("no handshake within {HANDSHAKE:?}"));
        let Some((negotiated, export, early)) = shaking.map_err(late)?? else { return Ok(()) };
        let stream = stream.into_std().context(|| "NBD client's socket")?;
        // The ring waits by itself; a socket that doesn't block would answer EAGAIN at once.
        stream.set_nonblocking(false).context(|| "NBD client's socket")?;
        let session = self.remember(OwnedFd::from(stream), export, Client::Process);
        self.transmit(session, negotiated.terms, early).await;
        Ok(())
    }

    /// Serves a connection's requests until it ends.
    async fn transmit(&self, session: Arc<Session>, terms: Terms, early: Vec<u8>) {
        let (socket, export) = (session.socket.clone(), session.export.clone());
        tracing::debug!(export = export.name, "NBD client connected");
        let end = self
            .rings
            .run(self.rings.pick(), move |ring: Ring| async move {
                let figures = export.figures.of(Front::Nbd);
                match &export.device {
                    AnyDevice::Base(base) => {
                        session::serve(ring, socket, base.clone(), terms, early, figures).await
                    }
                    AnyDevice::Replica(replica) => {
                        session::serve(ring, socket, replica.clone(), terms, early, figures).await
                    }
                }
            })
            .await;
        match end {
            Some(session::End::Clean) => {
                tracing::debug!(export = session.export.name, "NBD client left");
            }
            Some(session::End::Broken(error)) => {
                tracing::info!(export = session.export.name, %error, "NBD client cut off");
            }
            None => tracing::error!(export = session.export.name, "the client's ring is gone"),
        }
    }

    /// The export that the client chose, what was agreed, and what it sent behind its handshake;
    /// `None` if it left.
    async fn shake_hands(
        &self,
        stream: &mut UnixStream,
    ) -> Result<Option<(Negotiated, Arc<Export>, Vec<u8>)>> {
        let mut output = Vec::new();
        let mut handshake = Handshake::new(&mut output);
        let mut input = vec![0; 4096];
        let mut filled = 0;
        let mut opened: Option<Arc<Export>> = None;
        let broken = || "NBD client in handshake";
        loop {
            stream.write_all(&output).await.context(broken)?;
            output.clear();
            let (used, mut step) = handshake.feed(&input[..filled], &mut output);
            input.copy_within(used..filled, 0);
            filled -= used;
            if let Step::List = step {
                let exports = self.exports.list();
                let exports = exports.iter().map(|(name, about)| (name.as_str(), about.as_str()));
                handshake.listed(exports, &mut output);
                continue;
            }
            if let Step::Open { name } = step {
                let offer = self.exports.open(&name).await.map(|export| opened.insert(export));
                let offer = offer.as_ref().map(|export| Offer {
                    info: export.device.info(),
                    description: &export.description,
                });
                let offer = match offer {
                    Ok(offer) => Ok(offer),
                    Err(error) => Err(Error::new(error.kind(), error.to_string())),
                };
                step = handshake.opened(offer, &mut output);
            }
            match step {
                Step::Read if output.is_empty() => {
                    if filled == input.len() {
                        input.resize(filled * 2, 0);
                    }
                    match stream.read(&mut input[filled..]).await.context(broken)? {
                        0 => return Ok(None),
                        read => filled += read,
                    }
                }
                Step::Transmit(negotiated) => {
                    stream.write_all(&output).await.context(broken)?;
                    let Some(export) = opened else {
                        unreachable!("transmission follows an export that was opened")
                    };
                    input.truncate(filled);
                    return Ok(Some((negotiated, export, input)));
                }
                Step::Close(ending) => {
                    // The last words of a connection that ends anyway.
                    let _ = stream.write_all(&output).await;
                    return match ending {
                        Ending::Aborted => Ok(None),
                        Ending::Failed(error) => Err(error),
                    };
                }
                Step::Read | Step::List | Step::Open { .. } => {}
            }
        }
    }

    fn remember(&self, socket: OwnedFd, export: Arc<Export>, client: Client) -> Arc<Session> {
        let session = Arc::new(Session { socket: Arc::new(socket), export, client });
        self.served.fetch_add(1, Ordering::Relaxed);
        let mut sessions = self.sessions.lock().unwrap_or_else(PoisonError::into_inner);
        sessions.retain(|session| session.strong_count() > 0);
        sessions.push(Arc::downgrade(&session));
        session
    }

    fn live(&self) -> Vec<Arc<Session>> {
        let sessions = self.sessions.lock().unwrap_or_else(PoisonError::into_inner);
        sessions.iter().filter_map(Weak::upgrade).collect()
    }

    fn shut(&self, how: Shutdown) {
        for session in self.live() {
            // A client that has gone by itself is what is wanted.
            let _: nix::Result<()> = shutdown(session.socket.as_raw_fd(), how);
        }
    }
}
