//! The NBD server: accepts connections, lets them shake hands, and hands them to the ring threads.
//!
//! Handshakes are few and slow: they run on tokio, each within [`HANDSHAKE`]. Transmission runs on
//! the rings. The number of connections by each way is bounded; whoever comes past that waits in the
//! kernel's queue.

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

use nix::sys::socket::{Shutdown, shutdown};
use tokio::{
    net::{TcpListener, UnixListener, UnixStream},
    sync::{Semaphore, watch},
    task::JoinHandle,
    time::timeout,
};

use super::{
    Contexts, Headers, Terms, Tls,
    reception::{CLIENT_SOCKET, Caller, Listener, Settled},
    reserve::{Reserve, Share},
    session, tls,
};
use crate::{
    blockdev::{AnyDevice, Export, figures::Front},
    error::{Context, Error, Kind, Result},
    io::{Ring, Rings},
};

/// What a client may take for its whole handshake.
pub const HANDSHAKE: Duration = Duration::from_secs(10);

/// Connections at once, on Unix sockets and over TCP each.
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
    reserve: Arc<Reserve>,
}

/// A connection in transmission.
struct Session {
    socket: Arc<OwnedFd>,
    export: Arc<Export>,
    client: Client,
}

/// Whom a session serves.
#[derive(Clone, PartialEq, Eq)]
enum Client {
    /// Whoever connected: who that is, for people.
    Other(String),
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
        let shared = Arc::new(Shared {
            rings,
            exports,
            slots: slots.clone(),
            sessions: Mutex::default(),
            served: AtomicU64::new(0),
            reserve: Arc::default(),
        });
        let (stop, stopped) = watch::channel(false);
        tokio::spawn(shared.clone().accept(Listener::Unix(listener), slots, stopped));
        Server { shared, stop }
    }

    /// Serves those too who connect to `listener` over TCP: by TLS, or whoever comes if there is none.
    pub fn add_tcp(&self, listener: TcpListener, tls: Option<Tls>) {
        // Strangers over TCP must not take the places of this node's own clients.
        let slots = Arc::new(Semaphore::new(MAX_CONNECTIONS));
        let listener = Listener::Tcp(listener, tls.map(Arc::new));
        tokio::spawn(self.shared.clone().accept(listener, slots, self.stop.subscribe()));
    }

    /// Connections in transmission.
    pub fn connections(&self) -> usize {
        self.shared.live().len()
    }

    /// Connections served since the start.
    pub fn served(&self) -> u64 {
        self.shared.served.load(Ordering::Relaxed)
    }

    /// Who has this export open: one entry a connection, as `pid 4711 (uid 0)` or `10.0.0.7:41234 (TLS)`.
    pub fn clients(&self, name: &str) -> Vec<String> {
        let theirs = self.shared.live().into_iter().filter(|session| session.export.name == name);
        let who = theirs.filter_map(|session| match &session.client {
            Client::Other(who) => Some(who.clone()),
            Client::Kernel => None,
        });
        who.collect()
    }

    /// How many clients each export has that has any, the kernel's apart.
    pub fn clients_of_each(&self) -> HashMap<String, u64> {
        let mut counts = HashMap::new();
        for session in self.shared.live() {
            if session.client != Client::Kernel {
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
        let terms = Terms::new(export.device.info(), Headers::Simple, Contexts::default());
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

impl Shared {
    async fn accept(
        self: Arc<Self>,
        listener: Listener,
        slots: Arc<Semaphore>,
        mut stopped: watch::Receiver<bool>,
    ) {
        loop {
            let slot = tokio::select! {
                _ = stopped.changed() => return,
                slot = slots.clone().acquire_owned() => slot,
            };
            let Ok(slot) = slot else { return };
            let accepted = tokio::select! {
                _ = stopped.changed() => return,
                accepted = listener.accept() => accepted,
            };
            match accepted {
                Ok(caller) => {
                    let (shared, mut stopped) = (self.clone(), stopped.clone());
                    tokio::spawn(async move {
                        let who = caller.who();
                        if let Err(error) = shared.serve(caller, who.clone(), &mut stopped).await {
                            tracing::info!(client = who, %error, "NBD client turned away");
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
        caller: Caller,
        who: String,
        stopped: &mut watch::Receiver<bool>,
    ) -> Result<()> {
        let shaking = tokio::select! {
            _ = stopped.changed() => return Ok(()),
            shaking = timeout(HANDSHAKE, caller.settle(&*self.exports)) => shaking,
        };
        let late = |_| Error::new(Kind::Invalid, format!("no handshake within {HANDSHAKE:?}"));
        let Some((settled, (negotiated, export, early))) = shaking.map_err(late)?? else {
            return Ok(());
        };
        let client = Client::Other(who);
        match settled {
            Settled::Plain(socket) => {
                let session = self.remember(socket, export, client);
                self.transmit(session, negotiated.terms, early).await;
            }
            Settled::Tls(stream) => {
                let (own, carried) =
                    std::os::unix::net::UnixStream::pair().context(|| CLIENT_SOCKET)?;
                carried.set_nonblocking(true).context(|| CLIENT_SOCKET)?;
                let carried = UnixStream::from_std(carried).context(|| CLIENT_SOCKET)?;
                let mut carrying = tokio::spawn(tls::carry(stream, carried));
                let session = self.remember(OwnedFd::from(own), export, client);
                self.transmit(session.clone(), negotiated.terms, early).await;
                // What it said last is on its way: only then it has ended, for those too who wait for that.
                let _: nix::Result<()> = shutdown(session.socket.as_raw_fd(), Shutdown::Both);
                if timeout(DRAIN, &mut carrying).await.is_err() {
                    carrying.abort();
                }
            }
        }
        Ok(())
    }

    /// Serves a connection's requests until it ends.
    async fn transmit(&self, session: Arc<Session>, terms: Terms, early: Vec<u8>) {
        let (socket, export) = (session.socket.clone(), session.export.clone());
        let share = Share::of(&self.reserve);
        tracing::debug!(export = export.name, "NBD client connected");
        let end = self
            .rings
            .run(self.rings.pick(), move |ring: Ring| async move {
                let figures = export.figures.of(Front::Nbd);
                match &export.device {
                    AnyDevice::Base(base) => {
                        session::serve(ring, socket, base.clone(), terms, early, figures, share)
                            .await
                    }
                    AnyDevice::Replica(replica) => {
                        session::serve(ring, socket, replica.clone(), terms, early, figures, share)
                            .await
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
