//! The node's service: what the API can ask of catalogue, images, overlays and front ends together.
//!
//! Invariants:
//! - Nothing here holds up a tokio thread: whatever touches a disk runs where blocking is allowed,
//!   or on a ring.
//! - What is attached is not removed, and the refusal names who holds it.

mod disks;
mod images;
mod replicas;

use std::{
    collections::HashMap,
    net::SocketAddr,
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError},
    time::{Duration, Instant},
};

use serde_json::json;
use tokio::net::TcpListener;
use uuid::Uuid;

use crate::{
    blockdev::{nbd, ublk::Stop},
    catalog::{FsckReport, Name, Node, Repair},
    control::{
        api::*,
        attachments::{Attachments, Links, Servers},
        bases::Bases,
        config::{Config, NbdTcp},
        copying::Copying,
        events::{Events, Happened},
        exports::Exports,
        health::Health,
        job::Jobs,
        keeper::{Keeping, Wanted},
        metrics::{Metrics, PageFormat, Sources},
        promotion::Promotion,
        scrub::Scrub,
        socket::Socket,
        tails::Tails,
        views::Views,
    },
    error::{Context, Error, Kind, Result},
    io::Rings,
};

/// I/O threads when the configuration leaves it open, at most.
const THREADS: usize = 8;

/// A node's service.
pub struct Service {
    node: Node,
    events: Arc<Events>,
    exports: Arc<Exports>,
    attachments: Arc<Attachments>,
    promotion: Arc<Promotion>,
    health: Arc<Health>,
    scrub: Arc<Scrub>,
    keeping: Arc<Keeping>,
    server: Arc<nbd::Server>,
    metrics: Metrics,
    jobs: Jobs,
    nbd_socket: Option<PathBuf>,
    nbd_at: OnceLock<SocketAddr>,
    metrics_at: OnceLock<String>,
    started: Instant,
    /// How long the replicas took that this process created.
    created_in: Mutex<HashMap<Uuid, Duration>>,
}

impl Service {
    /// Opens the node, and serves its devices on `socket`.
    pub async fn start(config: &Config, socket: &Socket) -> Result<Arc<Service>> {
        let state = config.state.clone();
        let node = blocking(move || Node::open(&state)).await?;
        let events = Arc::new(Events::default());
        let version = env!("CARGO_PKG_VERSION");
        let details = json!({ "version": version, "pid": std::process::id() });
        events.tell(Happened::Started, "node", format!("version {version}"), details);
        let threads = match config.threads {
            0 => std::thread::available_parallelism().map_or(1, |n| n.get()).min(THREADS),
            threads => threads,
        };
        let poll = Duration::from_micros(config.poll_us);
        let rings = Arc::new(Rings::start(threads, poll).context(|| {
            "starting io_uring (Linux 6.1 or later, and not forbidden to this process: see \
             `underlay doctor`)"
        })?);
        let overlays = config.overlay_io;
        let tails = Tails::beside(&config.socket);
        let views: Arc<Views> = Arc::default();
        let bases = Bases::new(config, node.clone(), rings.clone(), views.clone(), events.clone());
        let bases = Arc::new(bases);
        let exports = Exports::new(
            node.clone(),
            rings.clone(),
            bases.clone(),
            overlays,
            tails,
            views.clone(),
        );
        let exports = Arc::new(exports);
        let clean = Duration::from_secs(config.clean_seconds);
        let health = Health::start(node.clone(), bases.clone(), rings.clone(), clean);
        let period = Duration::from_secs(config.scrub_days * 24 * 3600);
        let rate = config.scrub_mib << 20;
        let scrub = Scrub::start(node.clone(), bases.clone(), rings.clone(), period, rate);
        let copying = Copying::new(node.clone(), bases, rings.clone());
        let patience = Duration::from_secs(config.rebuild_after_seconds);
        let wanted = Wanted {
            copies: u32::try_from(config.copies).unwrap_or(1),
            placement: config.placement,
        };
        node.set_placement(config.placement);
        let keeping = Keeping::start(copying, wanted, patience, config.rebuild_mib << 20);
        let promotion = Promotion::start(config, node.clone(), exports.clone(), views)?;
        let listener = tokio::net::UnixListener::from_std(socket.listener()?)
            .context(|| "listening on the NBD socket")?;
        let server = Arc::new(nbd::Server::start(listener, rings.clone(), exports.clone()));
        let servers = Servers { rings, nbd: server.clone() };
        let links = Links::beside(&config.socket);
        let attachments =
            Attachments::restore(node.clone(), servers, exports.clone(), links).await?;
        Ok(Arc::new(Service {
            node,
            events,
            exports,
            attachments,
            promotion,
            health,
            scrub,
            keeping,
            server,
            metrics: Metrics::default(),
            jobs: Jobs::default(),
            nbd_socket: socket.path(),
            nbd_at: OnceLock::new(),
            metrics_at: OnceLock::new(),
            started: Instant::now(),
            created_in: Mutex::default(),
        }))
    }

    /// Serves NBD over TCP too, on the socket that was `given` or on one of its own, and says where.
    pub async fn add_nbd(
        &self,
        tcp: &NbdTcp,
        given: Option<std::net::TcpListener>,
    ) -> Result<SocketAddr> {
        let files = tcp.tls.clone();
        let tls = blocking(move || files.map(nbd::Tls::load).transpose()).await?;
        let listening = || format!("serving NBD at {}", tcp.address);
        let listener = match given {
            Some(given) => {
                given.set_nonblocking(true).context(listening)?;
                TcpListener::from_std(given).context(listening)?
            }
            None => TcpListener::bind(tcp.address).await.context(listening)?,
        };
        let bound = listener.local_addr().context(listening)?;
        self.server.add_tcp(listener, tls);
        self.nbd_at.get_or_init(|| bound);
        Ok(bound)
    }

    /// Caches and what is promoted to them.
    pub(super) fn promotion(&self) -> &Arc<Promotion> {
        &self.promotion
    }

    /// The catalogue.
    pub(super) fn node(&self) -> &Node {
        &self.node
    }

    /// What has happened.
    pub fn events(&self) -> &Arc<Events> {
        &self.events
    }

    /// The disks' health.
    pub(super) fn health(&self) -> &Arc<Health> {
        &self.health
    }

    /// The long work under way.
    pub(super) fn jobs(&self) -> &Jobs {
        &self.jobs
    }

    /// Gives up imports and verifications that are under way, and lets those go who follow events.
    pub fn cancel_jobs(&self) {
        self.events.close();
        self.jobs.cancel();
        self.keeping.stop();
    }

    /// Says where else the metrics are.
    pub fn metrics_are_at(&self, address: String) {
        // Set once, at the start.
        let _ = self.metrics_at.set(address);
    }

    /// Where the metrics are besides the control socket.
    pub fn metrics_address(&self) -> Option<String> {
        self.metrics_at.get().cloned()
    }

    /// Takes no more NBD clients, and lets requests under way end.
    pub async fn dismiss_clients(&self, limit: Duration) {
        if tokio::time::timeout(limit, self.server.stop()).await.is_err() {
            tracing::warn!("NBD requests were still under way; their clients are cut off");
        }
    }

    /// Lets go of the block devices: their requests wait for the next daemon.
    pub async fn hand_over(&self, limit: Duration) -> Vec<Error> {
        self.attachments.hand_over(limit).await
    }

    /// Flushes and closes what is open. What could not be closed, and why.
    pub async fn close(&self, limit: Duration) -> Vec<Error> {
        self.exports.close(limit).await
    }

    /// The node at a glance.
    pub async fn status(&self) -> Result<Status> {
        let node = self.node.clone();
        let (figures, disks) = blocking(move || Ok((node.status(), node.disks()))).await?;
        Ok(Status {
            daemon: Daemon {
                version: env!("CARGO_PKG_VERSION").to_owned(),
                pid: std::process::id(),
                uptime_seconds: self.started.elapsed().as_secs(),
                nbd_socket: self.nbd_socket.clone(),
                nbd_address: self.nbd_at.get().map(SocketAddr::to_string),
                metrics: self.metrics_address(),
            },
            node: figures,
            disks,
            images: self.images().await?,
            replicas: self.replicas().await?,
            attachments: self.attachments.list(),
            signal: self.promotion.signal(),
            troubles: self.troubles(),
            scrub: self.scrub.now().map(|now| ScrubView {
                image: now.digest.to_string(),
                disk: now.disk,
                done_bytes: now.done.0,
                total_bytes: now.done.1,
            }),
        })
    }

    /// The disks whose copies are asked last, and why.
    fn troubles(&self) -> Vec<DiskTrouble> {
        let disks = self.exports.bases().disks();
        let mut troubles: Vec<DiskTrouble> = disks
            .iter()
            .filter_map(|disk| {
                Some(DiskTrouble { disk: disk.name().parse().ok()?, trouble: disk.trouble()? })
            })
            .collect();
        troubles.sort_by(|a, b| a.disk.cmp(&b.disk));
        troubles
    }

    /// Who makes copies.
    pub(super) fn keeping(&self) -> &Arc<Keeping> {
        &self.keeping
    }

    pub(super) fn exports(&self) -> &Exports {
        &self.exports
    }

    /// Every export that is a block device.
    pub fn attachments(&self) -> Vec<AttachmentView> {
        self.attachments.list()
    }

    /// Makes a block device of an export.
    pub async fn attach(&self, attach: Attach) -> Result<AttachmentView> {
        let attachments = self.attachments.clone();
        to_the_end(async move { attachments.attach(attach).await }).await
    }

    /// Removes a block device.
    pub async fn detach(&self, detach: Detach) -> Result<AttachmentView> {
        let attachments = self.attachments.clone();
        let stop = if detach.force { Stop::Forced } else { Stop::Unused };
        to_the_end(async move { attachments.detach(&detach.what, stop).await }).await
    }

    /// Looks for what is inconsistent, and mends it if asked to.
    pub async fn fsck(&self, request: FsckRequest) -> Result<FsckReport> {
        let repair = if request.repair { Repair::Mend } else { Repair::Report };
        let node = self.node.clone();
        let report = blocking(move || node.fsck(repair)).await?;
        let problems = report.problems.len();
        let details = json!({ "problems": problems, "repair": request.repair });
        self.events.tell(Happened::Fsck, "node", format!("{problems} problems"), details);
        Ok(report)
    }

    /// The figures, for Prometheus.
    pub async fn metrics(&self, format: PageFormat) -> Result<String> {
        let sources = Sources {
            node: &self.node,
            exports: &self.exports,
            server: &self.server,
            uptime: self.started.elapsed(),
            health: Some(&self.health),
            scrubbed: self.scrub.figures(),
            kept: self.keeping.figures(),
            events: self.events.counts(),
            promotion: Some(self.promotion.metrics()),
            probes: Some(self.promotion.probe_metrics()),
        };
        self.metrics.text(sources, format).await
    }
}

/// Runs `work` to its end, whether or not the client that asked for it stays to hear of it.
async fn to_the_end<T: Send + 'static>(
    work: impl Future<Output = Result<T>> + Send + 'static,
) -> Result<T> {
    tokio::spawn(work).await.unwrap_or_else(|error| Err(died(&error)))
}

/// Runs `work` where it may block.
pub async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    tokio::task::spawn_blocking(work).await.unwrap_or_else(|error| Err(died(&error)))
}

fn died(error: &tokio::task::JoinError) -> Error {
    tracing::error!(%error, "a task died");
    Error::new(Kind::Io, "internal error; see the daemon's log")
}

fn parsed(name: Option<String>) -> Result<Option<Name>> {
    name.map(|name| name.parse()).transpose()
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // What is guarded is a table of figures: whole after any panic.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
