//! Where the demonstration plays: a directory of its own, and a service that runs in it.

use std::{fs, os::unix::fs::DirBuilderExt, path::PathBuf, sync::Arc, time::Duration};

use super::nbd::Connection;
use crate::{
    control::{
        client::Client, config::Config, paths::Paths, server::Server, service::Service,
        socket::Socket,
    },
    error::{Context, Result},
};

/// How long the service may take to stop.
const STOP: Duration = Duration::from_secs(20);

/// The demonstration's directory; it goes with this, unless it is to be kept.
pub struct Place {
    /// Its path.
    pub path: PathBuf,
    /// Whether it stays.
    pub keep: bool,
}

impl Place {
    /// A new directory, that nobody else can enter; `keep` says whether it stays.
    pub fn new(keep: bool) -> Result<Place> {
        let parent = std::env::temp_dir();
        let name = format!("underlay-demo-{}", uuid::Uuid::new_v4().simple());
        // Short: sockets live in it, whose paths are limited.
        let path = parent.join(&name[..22]);
        fs::DirBuilder::new()
            .mode(0o700)
            .create(&path)
            .context(|| format!("making {} (TMPDIR chooses another place)", path.display()))?;
        Ok(Place { path, keep })
    }

    /// Where `below` is in it.
    pub fn join(&self, below: &str) -> PathBuf {
        self.path.join(below)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if !self.keep
            && let Err(error) = fs::remove_dir_all(&self.path)
        {
            tracing::warn!(%error, path = %self.path.display(), "the demo's directory stays");
        }
    }
}

/// A service that runs in the demonstration's directory.
pub struct Stage {
    /// Where it runs.
    pub place: Place,
    /// Speaks to its API.
    pub client: Client,
    nbd_socket: PathBuf,
    service: Arc<Service>,
    server: Server,
    _sockets: (Socket, Socket),
}

impl Stage {
    /// Starts a service in `place`, with sockets and state there.
    pub async fn start(place: Place) -> Result<Stage> {
        let paths = Paths {
            state: place.join("state"),
            socket: place.join("underlay.sock"),
            nbd_socket: place.join("nbd.sock"),
            config: place.join("underlay.toml"),
        };
        let control = Socket::bind(&paths.socket, None)?;
        let nbd = Socket::bind(&paths.nbd_socket, None)?;
        let service = Service::start(&Config::at(&paths), &nbd).await?;
        let server = Server::start(control.listener()?, service.clone())?;
        Ok(Stage {
            place,
            client: Client::new(&paths.socket),
            nbd_socket: paths.nbd_socket,
            service,
            server,
            _sockets: (control, nbd),
        })
    }

    /// Stops the service; everything is flushed then.
    pub async fn stop(self) -> Result<()> {
        self.service.cancel_jobs();
        tokio::join!(self.server.stop(STOP), self.service.dismiss_clients(STOP));
        match self.service.close(STOP).await.into_iter().next() {
            Some(error) => Err(error),
            None => Ok(()),
        }
    }

    /// Attaches to an export, as a guest does.
    pub async fn attach(&self, export: &str) -> Result<Connection> {
        Connection::open(&self.nbd_socket, export).await
    }
}
