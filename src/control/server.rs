//! Serves the control API on its Unix socket, and the metrics on TCP where that is asked for.
//!
//! Invariants:
//! - Connections are bounded in number, and in how long they may take to say what they want.
//! - A server that is asked to stop lets requests under way finish, within a bound.

use std::{net::SocketAddr, os::unix::net::UnixListener, sync::Arc, time::Duration};

use axum::{Router, extract::Request, routing::get, serve::Listener};
use hyper::{
    body::Incoming,
    server::conn::http1,
    service::{Service as _, service_fn},
};
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    service::TowerToHyperService,
};
use nix::unistd::Uid;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, TcpStream, UnixStream},
    sync::{Semaphore, watch},
    task::JoinSet,
    time::timeout,
};

use crate::{
    control::{routes, service::Service},
    error::{Context, Result},
};

/// Connections at a time; more wait to be accepted.
const CONNECTIONS: usize = 128;
/// How long a client may take to send the head of a request.
const HEAD: Duration = Duration::from_secs(10);

/// Who is at the other end of a connection.
#[derive(Clone, Copy, Debug)]
pub struct Peer {
    uid: Option<u32>,
}

impl Peer {
    /// Whether the peer may do whatever the daemon may: it runs as the daemon's user or as root.
    pub fn is_trusted(&self) -> bool {
        self.uid.is_some_and(|uid| uid == 0 || uid == Uid::effective().as_raw())
    }
}

/// The running servers. Dropping it cuts every connection off.
pub struct Server {
    stop: watch::Sender<bool>,
    tasks: JoinSet<()>,
}

impl Server {
    /// Starts to answer for `service` on `listener`, which must not block.
    pub fn start(listener: UnixListener, service: Arc<Service>) -> Result<Server> {
        let listener = tokio::net::UnixListener::from_std(listener)
            .context(|| "listening on the control socket")?;
        let (stop, stopped) = watch::channel(false);
        let mut tasks = JoinSet::new();
        let peer = |stream: &UnixStream| Peer { uid: stream.peer_cred().ok().map(|it| it.uid()) };
        tasks.spawn(serve(listener, routes::router(service), peer, stopped));
        Ok(Server { stop, tasks })
    }

    /// Serves the metrics, and nothing else, on `address` too. Returns where they are.
    pub async fn add_metrics(
        &mut self,
        address: SocketAddr,
        service: Arc<Service>,
    ) -> Result<SocketAddr> {
        let listening = || format!("listening on {address} for metrics");
        let listener = TcpListener::bind(address).await.context(listening)?;
        let bound = listener.local_addr().context(listening)?;
        let router = Router::new().route("/metrics", get(routes::metrics)).with_state(service);
        let peer = |_: &TcpStream| Peer { uid: None };
        self.tasks.spawn(serve(listener, router, peer, self.stop.subscribe()));
        Ok(bound)
    }

    /// Takes no more requests and waits until those under way are answered, `limit` at most.
    pub async fn stop(mut self, limit: Duration) {
        self.stop.send_replace(true);
        let all = async { while self.tasks.join_next().await.is_some() {} };
        if timeout(limit, all).await.is_err() {
            tracing::warn!("requests were still under way; their clients are cut off");
        }
    }
}

/// Accepts connections until told to stop, then waits for those there are.
async fn serve<L: Listener>(
    mut listener: L,
    router: Router,
    peer: impl Fn(&L::Io) -> Peer,
    mut stopped: watch::Receiver<bool>,
) {
    let permits = Arc::new(Semaphore::new(CONNECTIONS));
    let mut connections = JoinSet::new();
    loop {
        let next = async {
            let permit = permits.clone().acquire_owned().await;
            (permit, listener.accept().await)
        };
        let (permit, (stream, _)) = tokio::select! {
            next = next => next,
            _ = stopped.wait_for(|stop| *stop) => break,
        };
        let peer = peer(&stream);
        let connection = connection(stream, peer, router.clone(), stopped.clone());
        connections.spawn(async move {
            let _permit = permit;
            connection.await;
        });
        while connections.try_join_next().is_some() {}
    }
    drop(listener);
    while connections.join_next().await.is_some() {}
}

/// Answers one connection's requests.
async fn connection<S>(stream: S, peer: Peer, router: Router, mut stopped: watch::Receiver<bool>)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let service = TowerToHyperService::new(router);
    let answer = service_fn(move |mut request: Request<Incoming>| {
        request.extensions_mut().insert(peer);
        service.call(request)
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD)
        .serve_connection(TokioIo::new(stream), answer);
    let mut connection = std::pin::pin!(connection);
    let ended = tokio::select! {
        result = connection.as_mut() => Some(result),
        _ = async { stopped.wait_for(|stop| *stop).await.is_ok() } => None,
    };
    let result = match ended {
        Some(result) => result,
        None => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = result {
        tracing::debug!(%error, "control connection");
    }
}
