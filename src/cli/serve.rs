//! `underlay serve`: the daemon.

use std::{
    io::IsTerminal,
    net::{SocketAddr, TcpListener},
    os::unix::net::UnixListener,
    path::PathBuf,
    sync::Arc,
    time::Duration,
};

use clap::Args;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use sd_notify::NotifyState;
use tokio::signal::unix::{SignalKind, signal};
use tracing_subscriber::EnvFilter;

use super::{Outcome, Setting, out::Format};
use crate::{
    control::{
        config::{self, Config},
        paths::Paths,
        server::Server,
        service::Service,
        socket::{self, Socket},
    },
    error::{Context, Error, Kind, Result},
    io::inherit::{self, Listener},
};

/// Run the daemon: it keeps the disks, serves the NBD socket and answers the other commands.
///
/// It starts with no configuration. SIGTERM and SIGINT end it: no more clients are taken, requests
/// under way are answered, everything is flushed; a second one ends it at once. After SIGKILL or a
/// crash it recovers at the next start. Speaks systemd's readiness and socket activation (sockets
/// named `control`, `nbd` and `nbd-tcp`).
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
    underlay serve\n  \
    underlay serve --state /srv/underlay --metrics 127.0.0.1:9500\n  \
    underlay --socket /tmp/u.sock serve --nbd-socket /tmp/n.sock --state /tmp/state")]
pub struct Serve {
    /// The configuration file; otherwise the one at the usual place, if it is there.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// The state directory.
    #[arg(long, value_name = "DIR")]
    state: Option<PathBuf>,
    /// The NBD socket.
    #[arg(long, value_name = "PATH")]
    nbd_socket: Option<PathBuf>,
    /// Serve metrics over HTTP at this address, or at this port of the loopback.
    #[arg(long, value_name = "ADDR", value_parser = config::address)]
    metrics: Option<SocketAddr>,
    /// What to log, as RUST_LOG has it, which wins.
    #[arg(long, value_name = "FILTER")]
    log: Option<String>,
}

/// What `serve --json` prints once it is ready.
#[derive(serde::Serialize)]
struct Ready {
    pid: u32,
    socket: Option<PathBuf>,
    nbd_socket: Option<PathBuf>,
    nbd_address: Option<String>,
    metrics: Option<String>,
}

impl Serve {
    pub(super) async fn run(self, setting: &Setting) -> Result<Outcome> {
        let config = self.config(setting)?;
        start_log(&config.log)?;
        socket::close_to_the_world();
        raise_file_limit();
        // Before anything is opened, so that a signal during a long start is heard.
        let mut terminate = signal(SignalKind::terminate()).context(|| "awaiting SIGTERM")?;
        let mut interrupt = signal(SignalKind::interrupt()).context(|| "awaiting SIGINT")?;

        let Sockets { control, nbd, tcp: given } = sockets(&config)?;
        let service = Service::start(&config, &nbd).await?;
        let mut server = Server::start(control.listener()?, service.clone())?;
        let nbd_address = match &config.nbd_tcp {
            Some(tcp) => Some(service.add_nbd(tcp, given).await?.to_string()),
            None => None,
        };
        if let Some(address) = config.metrics {
            let bound = server.add_metrics(address, service.clone()).await?;
            service.metrics_are_at(format!("http://{bound}/metrics"));
        }
        let ready = Ready {
            pid: std::process::id(),
            socket: control.path(),
            nbd_socket: nbd.path(),
            nbd_address,
            metrics: service.metrics_address(),
        };
        tracing::info!(
            version = env!("CARGO_PKG_VERSION"),
            state = %config.state.display(),
            socket = %shown(&ready.socket),
            nbd_socket = %shown(&ready.nbd_socket),
            nbd_address = ready.nbd_address,
            metrics = ready.metrics,
            "ready"
        );
        if setting.format == Format::Json {
            setting.show(&ready, |_| String::new())?;
        }
        tell_manager(&[NotifyState::Ready]);

        let heard = tokio::select! {
            _ = terminate.recv() => "SIGTERM",
            _ = interrupt.recv() => "SIGINT",
        };
        tracing::info!(signal = heard, "stopping: flushing and closing what is open");
        tell_manager(&[NotifyState::Stopping]);
        let limit = Duration::from_secs(config.stop_seconds);
        tokio::select! {
            outcome = stop(server, service, limit) => Ok(outcome),
            _ = terminate.recv() => Err(hurried()),
            _ = interrupt.recv() => Err(hurried()),
        }
    }

    fn config(&self, setting: &Setting) -> Result<Config> {
        let paths = match Paths::of_this_user() {
            Ok(paths) => paths,
            // Nothing of the user's own is needed when every path is named.
            Err(error) => match (&self.state, &setting.socket, &self.nbd_socket) {
                (Some(_), Some(_), Some(_)) => Paths::system(),
                _ => return Err(error),
            },
        };
        let mut config = match &self.config {
            Some(file) => Config::read(file, &paths)?,
            None if paths.config.exists() => Config::read(&paths.config, &paths)?,
            None => Config::at(&paths),
        };
        let own = |path: &PathBuf| {
            std::path::absolute(path).context(|| format!("the path {}", path.display()))
        };
        if let Some(state) = &self.state {
            config.state = own(state)?;
        }
        if let Some(socket) = &setting.socket {
            config.socket = own(socket)?;
        }
        if let Some(socket) = &self.nbd_socket {
            config.nbd_socket = own(socket)?;
        }
        if let Some(filter) = &self.log {
            config.log.clone_from(filter);
        }
        config.metrics = self.metrics.or(config.metrics);
        Ok(config)
    }
}

/// What the daemon listens on.
struct Sockets {
    control: Socket,
    nbd: Socket,
    /// For NBD over TCP, if the service manager made one.
    tcp: Option<TcpListener>,
}

/// The sockets that the service manager made, and our own in the place of those that it did not.
fn sockets(config: &Config) -> Result<Sockets> {
    let inherited = inherit::listeners().context(|| "taking over activated sockets")?;
    let group = socket::group(&config.socket_group)?;
    let (mut control, mut nbd, mut tcp) = (None, None, None);
    for (name, listener) in inherited {
        match (&name[..], listener) {
            ("control", Listener::Unix(listener)) => control = Some(listener),
            ("nbd", Listener::Unix(listener)) => nbd = Some(listener),
            ("nbd-tcp", Listener::Tcp(listener)) if config.nbd_tcp.is_some() => {
                tcp = Some(listener)
            }
            ("nbd-tcp", Listener::Tcp(_)) => {
                let what = "activated socket \"nbd-tcp\": set nbd_listen and the certificates too";
                return Err(Error::new(Kind::Invalid, what));
            }
            _ => {
                let what = format!(
                    "activated socket {name:?} is not known: set FileDescriptorName= to control or \
                     nbd (of Unix), or nbd-tcp"
                );
                return Err(Error::new(Kind::Invalid, what));
            }
        }
    }
    let or_own = |given: Option<UnixListener>, path| match given {
        Some(listener) => Ok(Socket::inherited(listener)),
        None => Socket::bind(path, group),
    };
    let control = or_own(control, &config.socket)?;
    Ok(Sockets { control, nbd: or_own(nbd, &config.nbd_socket)?, tcp })
}

fn shown(socket: &Option<PathBuf>) -> std::path::Display<'_> {
    socket.as_deref().unwrap_or(std::path::Path::new("(handed over)")).display()
}

async fn stop(server: Server, service: Arc<Service>, limit: Duration) -> Outcome {
    service.cancel_jobs();
    tokio::join!(server.stop(limit), service.dismiss_clients(limit));
    let mut failures = service.hand_over(limit).await;
    failures.extend(service.close(limit).await);
    for error in &failures {
        tracing::error!(%error, "closing");
    }
    if failures.is_empty() {
        tracing::info!("stopped");
        Outcome::Well
    } else {
        Outcome::Amiss
    }
}

fn hurried() -> Error {
    Error::new(
        Kind::Unavailable,
        "stopped at once by a second signal; what was flushed is safe, the rest recovers at the \
         next start",
    )
}

fn start_log(filter: &str) -> Result<()> {
    let chosen = std::env::var("RUST_LOG").unwrap_or_else(|_| filter.to_owned());
    let filter = EnvFilter::try_new(&chosen).map_err(|error| {
        Error::caused(Kind::Invalid, format!("the log filter {chosen:?}"), error)
    })?;
    let log = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal());
    log.try_init().map_err(|error| Error::caused(Kind::Invalid, "starting the log", error))
}

/// As many descriptors as the administrator allows: each open replica takes two.
fn raise_file_limit() {
    if let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE)
        && soft < hard
        && let Err(error) = setrlimit(Resource::RLIMIT_NOFILE, hard, hard)
    {
        tracing::warn!(%error, soft, hard, "the limit on open files stays low");
    }
}

/// Tells systemd, where it listens.
fn tell_manager(state: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(state) {
        tracing::warn!(%error, "the service manager could not be told");
    }
}
