//! The node's service: what the API can ask of catalogue, images, overlays and front ends together.
//!
//! Invariants:
//! - Nothing here holds up a tokio thread: whatever touches a disk runs where blocking is allowed,
//!   or on a ring.
//! - What is attached is not removed, and the refusal names who holds it.

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
    blockdev::{AnyDevice, nbd, ublk::Stop},
    catalog::{
        self, DiskOptions, DiskStatus, FsckReport, ImageStatus, Name, NewReplica, Node, Placement,
        Repair, ReplicaStatus, Target,
    },
    control::{
        api::*,
        attachments::{Attachments, Links, Servers},
        bases::Bases,
        config::{Config, NbdTcp},
        copying::{Copying, Making},
        events::{Events, Happened},
        export::{self, Export, ImportOverlay},
        exports::{Exports, IMAGE, REPLICA},
        health::Health,
        job::Jobs,
        keeper::{Keeping, Wanted},
        metrics::{Metrics, PageFormat, Sources},
        moves::RATE,
        promotion::Promotion,
        scrub::Scrub,
        socket::Socket,
        tails::Tails,
        views::Views,
        work::{Copies, DrainDisk, Import, Recording, Rework, Verify, What},
    },
    cow::Overlay,
    error::{Context, Error, Kind, Result},
    image::{Format, parcel::Header},
    io::{Ring, Rings},
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

    /// Serves NBD over TCP too, and says where.
    pub async fn add_nbd(&self, tcp: &NbdTcp) -> Result<SocketAddr> {
        let files = tcp.tls.clone();
        let tls = blocking(move || files.map(nbd::Tls::load).transpose()).await?;
        let listening = || format!("serving NBD at {}", tcp.address);
        let listener = TcpListener::bind(tcp.address).await.context(listening)?;
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

    /// Every disk.
    pub async fn disks(&self) -> Result<Vec<DiskStatus>> {
        let node = self.node.clone();
        blocking(move || Ok(node.disks())).await
    }

    /// One disk.
    pub async fn disk(&self, name: Name) -> Result<DiskStatus> {
        let node = self.node.clone();
        blocking(move || node.disk(&name)).await
    }

    /// Gives a disk to the node.
    pub async fn add_disk(&self, disk: AddDisk) -> Result<DiskStatus> {
        if !disk.path.is_absolute() {
            let what =
                format!("disk {}: give its path from the root, as /mnt/a", disk.path.display());
            return Err(Error::new(Kind::Invalid, what));
        }
        let options = DiskOptions {
            name: parsed(disk.name)?,
            tier: disk.tier,
            placement: disk.pool.then_some(Placement::Pool),
            cache: disk.cache_bytes,
        };
        let node = self.node.clone();
        let added = blocking(move || node.add_disk(&disk.path, options)).await?;
        let message = format!("added at {}", added.path.display());
        let details = json!({ "disk": added.name, "id": added.id, "path": added.path });
        let object = format!("disk {}", added.name);
        self.events.tell(Happened::DiskAdded, object, message, details);
        Ok(added)
    }

    /// Forgets a disk.
    pub async fn remove_disk(&self, name: Name) -> Result<Removed> {
        let (node, by) = (self.node.clone(), name.clone());
        let forgotten = blocking(move || node.remove_disk(&by)).await?;
        // Whoever removed it unmounts it next, or gives its name to another.
        self.promotion.leave_disks().await;
        let erased = forgotten == catalog::Forgotten::Erased;
        let message = if erased { "removed: nothing was on it" } else { "removed; its files stay" };
        let details = json!({ "disk": name, "erased": erased });
        self.events.tell(Happened::DiskRemoved, format!("disk {name}"), message, details);
        let note = match forgotten {
            catalog::Forgotten::Erased => None,
            catalog::Forgotten::Kept => {
                Some("its files are where they were; `underlay disk add` brings them back".into())
            }
        };
        Ok(Removed { removed: name.into(), note })
    }

    /// Every image.
    pub async fn images(&self) -> Result<Vec<ImageView>> {
        let node = self.node.clone();
        let images = blocking(move || Ok(node.images())).await?;
        Ok(images.into_iter().map(|status| self.image_view(status)).collect())
    }

    /// One image.
    pub async fn image(&self, name: Name) -> Result<ImageView> {
        let node = self.node.clone();
        Ok(self.image_view(blocking(move || node.image(&name)).await?))
    }

    pub(super) fn image_view(&self, status: ImageStatus) -> ImageView {
        let clients = |name: &Name| self.server.clients(&format!("{IMAGE}{name}"));
        let mut clients: Vec<_> = status.names.iter().flat_map(clients).collect();
        clients.extend(self.attachments.devices(Target::Image(status.digest)));
        let making = self.keeping.copying().under_way().into_iter();
        let making = making.filter(|making| making.digest == status.digest);
        let making = making.map(|Making { disk, done: (done_bytes, total_bytes), why, .. }| {
            MakingView { disk, done_bytes, total_bytes, why }
        });
        ImageView { clients, making: making.collect(), status }
    }

    /// Prepares an import: what is wrong with the request itself is told before any content is read.
    pub async fn prepare_import(
        self: &Arc<Self>,
        name: Name,
        options: UploadOptions,
    ) -> Result<Import> {
        let format = match options.format.as_deref() {
            None | Some("auto") => Format::Auto,
            Some("raw") => Format::Raw,
            Some("qcow2") => Format::Qcow2,
            Some("vmdk") => Format::Vmdk,
            Some(other) => {
                let shown: String = other.chars().take(40).collect();
                let what = format!("format {shown:?} is not known: raw, qcow2, vmdk or auto");
                return Err(Error::new(Kind::Invalid, what));
            }
        };
        let sha256 = match options.sha256 {
            Some(text) => {
                Some(text.to_ascii_lowercase().parse::<catalog::Digest>().map_err(|_| {
                    Error::new(Kind::Invalid, "sha256 is not 64 hexadecimal digits")
                })?)
            }
            None => None,
        };
        let disk = parsed(options.disk)?;
        let node = self.node.clone();
        let staged = blocking(move || node.stage_copy(disk.as_ref(), 0)).await?;
        Ok(Import { service: self.clone(), name, format, sha256, staged, path: None })
    }

    /// Removes a name of an image, and with the last one the image.
    pub async fn remove_image(&self, name: Name) -> Result<Removed> {
        let image = self.image(name.clone()).await?;
        if image.status.names.len() < 2 && !image.clients.is_empty() {
            return Err(Error::new(
                Kind::InUse,
                format!(
                    "image {name}: a client reads it ({}); disconnect it first",
                    image.clients.join(", ")
                ),
            ));
        }
        let (node, by) = (self.node.clone(), name.clone());
        let unnamed = blocking(move || node.remove_image(&by)).await?;
        let removed = unnamed == catalog::Unnamed::Removed;
        let message = if removed { "removed" } else { "this name is removed; it has others" };
        let details = json!({ "name": name, "digest": image.status.digest, "removed": removed });
        self.events.tell(Happened::ImageRemoved, format!("image {name}"), message, details);
        if unnamed == catalog::Unnamed::Removed {
            self.promotion.forget(image.status.digest).await;
            let (node, digest) = (self.node.clone(), image.status.digest);
            if let Err(error) = blocking(move || node.remove_origin(digest)).await {
                tracing::warn!(image = %name, %error, "where it came from is not forgotten");
            }
        }
        let note = match unnamed {
            catalog::Unnamed::Removed => None,
            catalog::Unnamed::Kept => Some("the image has other names and is kept".to_owned()),
        };
        Ok(Removed { removed: name.into(), note })
    }

    /// Prepares copies of an image: one on a disk, or as many as are wanted from now on.
    pub async fn prepare_copies(self: &Arc<Self>, name: Name, wish: MakeCopies) -> Result<Copies> {
        let disk = parsed(wish.to)?;
        if disk.is_some() == wish.copies.is_some() {
            let what = "either a disk for one more copy, or how many copies are wanted";
            return Err(Error::new(Kind::Invalid, what));
        }
        let (node, by) = (self.node.clone(), name.clone());
        let digest = blocking(move || {
            let digest = node.image(&by)?.digest;
            if let Some(count) = wish.copies {
                node.want_copies(&by, count)?;
            }
            Ok(digest)
        })
        .await?;
        Ok(Copies {
            service: self.clone(),
            name,
            digest,
            disk,
            anyhow: wish.force,
            rate: wish.rate_bytes.filter(|rate| *rate > 0),
        })
    }

    /// Gives up the copy of an image on a disk.
    pub async fn remove_copy(&self, name: Name, disk: Name, anyhow: bool) -> Result<ImageView> {
        let (node, image, from) = (self.node.clone(), name.clone(), disk.clone());
        blocking(move || node.remove_copy_on(&image, &from, anyhow)).await?;
        let image = self.image(name).await?;
        let message = format!("its copy on disk {disk} was given up");
        let details = json!({ "digest": image.status.digest, "disk": disk, "why": "asked for" });
        let object = self.exports.bases().called(image.status.digest);
        self.events.tell(Happened::CopyRemoved, object, message, details);
        Ok(image)
    }

    /// Who makes copies.
    pub(super) fn keeping(&self) -> &Arc<Keeping> {
        &self.keeping
    }

    /// Prepares the verification of an image.
    pub async fn prepare_verify(self: &Arc<Self>, name: Name) -> Result<Verify> {
        let (node, by) = (self.node.clone(), name.clone());
        let (digest, disks) = blocking(move || {
            let digest = node.image(&by)?.digest;
            let copies = node.ready_copies(digest);
            let disks: Vec<Name> = copies.into_iter().map(|(disk, _)| disk).collect();
            if disks.is_empty() {
                // Says why there is none.
                node.open_copy(&by)?;
            }
            Ok((digest, disks))
        })
        .await?;
        Ok(Verify { service: self.clone(), name, digest, disks })
    }

    /// Every replica.
    pub async fn replicas(&self) -> Result<Vec<ReplicaView>> {
        let node = self.node.clone();
        let replicas = blocking(move || Ok(node.replicas())).await?;
        let mut poisoned = HashMap::new();
        self.exports.each_open(|id, replica| {
            if let Some(reason) = replica.overlay().poisoned() {
                poisoned.insert(id, reason.to_owned());
            }
        });
        let mut view = |status: ReplicaStatus| {
            let poisoned = poisoned.remove(&status.id);
            self.replica_view(status, poisoned)
        };
        Ok(replicas.into_iter().map(&mut view).collect())
    }

    /// One replica.
    pub async fn replica(&self, name: Name) -> Result<ReplicaView> {
        let node = self.node.clone();
        let status = blocking(move || node.replica(&name)).await?;
        let mut poisoned = None;
        self.exports.each_open(|id, replica| {
            if id == status.id {
                poisoned = replica.overlay().poisoned().map(str::to_owned);
            }
        });
        Ok(self.replica_view(status, poisoned))
    }

    fn replica_view(&self, status: ReplicaStatus, poisoned: Option<String>) -> ReplicaView {
        let export = format!("{REPLICA}{}", status.name);
        let mut clients = self.server.clients(&export);
        clients.extend(self.attachments.devices(Target::Replica(status.id)));
        let created_in = locked(&self.created_in).get(&status.id).copied();
        ReplicaView {
            clients,
            export,
            poisoned,
            created_in_ms: created_in.map(|took| took.as_secs_f64() * 1000.0),
            status,
        }
    }

    /// Creates a replica.
    pub async fn create_replica(&self, replica: CreateReplica) -> Result<ReplicaView> {
        let new = NewReplica {
            name: replica.name.parse()?,
            image: replica.image.parse()?,
            disk: replica.disk.parse()?,
            size: replica.size,
        };
        let node = self.node.clone();
        let (status, took) = blocking(move || {
            let started = Instant::now();
            let status = node.create_replica(new, Overlay::<Ring>::blank)?;
            Ok((status, started.elapsed()))
        })
        .await?;
        self.metrics.replica_created(took);
        locked(&self.created_in).insert(status.id, took);
        let details = json!({
            "id": status.id, "disk": status.disk, "digest": status.digest,
            "ms": took.as_millis() as u64,
        });
        let (object, message) =
            (format!("replica {}", status.name), format!("created on disk {}", status.disk));
        self.events.tell(Happened::ReplicaCreated, object, message, details);
        Ok(self.replica_view(status, None))
    }

    /// Removes a replica.
    pub async fn remove_replica(self: &Arc<Self>, name: Name) -> Result<Removed> {
        let (service, by) = (self.clone(), name.clone());
        let removal = async move {
            let status = service.replica(by).await?.status;
            let clients = |export: &str| {
                let mut clients = service.server.clients(export);
                clients.extend(service.attachments.devices(Target::Replica(status.id)));
                clients
            };
            let removed = service.exports.remove_replica(&status, clients).await?;
            locked(&service.created_in).remove(&status.id);
            Ok(removed)
        };
        let removed = to_the_end(removal).await?;
        let note = match removed {
            catalog::Removed::Whole => None,
            catalog::Removed::ReferenceLeft => Some(
                "its reference could not be removed and holds the image until `underlay fsck \
                 --repair` removes it"
                    .to_owned(),
            ),
            catalog::Removed::ReferenceOnly => Some(
                "its disk is none of this node's: it holds its image no longer, and its files are \
                 where they were"
                    .to_owned(),
            ),
            catalog::Removed::OnReturn => Some(
                "its disk is not there: its files go when the disk returns, unless that is \
                 forgotten first"
                    .to_owned(),
            ),
        };
        let message = match &note {
            Some(note) => format!("removed; {note}"),
            None => "removed".to_owned(),
        };
        let details = json!({ "name": name });
        self.events.tell(Happened::ReplicaRemoved, format!("replica {name}"), message, details);
        Ok(Removed { removed: name.into(), note })
    }

    /// Grows a replica.
    pub async fn resize_replica(&self, name: Name, size: u64) -> Result<ReplicaView> {
        let (exports, by) = (self.exports.clone(), name.clone());
        let attachments = self.attachments.clone();
        to_the_end(async move {
            let id = exports.resize_replica(by, size).await?;
            attachments.grown(id, size).await
        })
        .await?;
        let (message, details) = (format!("it has {size} bytes now"), json!({ "bytes": size }));
        self.events.tell(Happened::ReplicaResized, format!("replica {name}"), message, details);
        self.replica(name).await
    }

    /// Prepares a replica's move to another disk.
    pub async fn prepare_move(self: &Arc<Self>, name: Name, to: Migrate) -> Result<Rework> {
        let disk = self.disk(to.disk.parse()?).await?.name;
        self.rework(name, What::Move(disk), to.rate_bytes).await
    }

    /// Prepares to free a replica of its image.
    pub async fn prepare_flatten(self: &Arc<Self>, name: Name, how: Flatten) -> Result<Rework> {
        self.rework(name, What::Flatten, how.rate_bytes).await
    }

    async fn rework(self: &Arc<Self>, name: Name, what: What, rate: Option<u64>) -> Result<Rework> {
        let replica = self.replica(name).await?.status;
        Ok(Rework { service: self.clone(), replica, what, rate: rate.unwrap_or(RATE) })
    }

    /// Takes a replica up where it was before a move that was interrupted.
    pub async fn settle_replica(&self, name: Name) -> Result<ReplicaView> {
        let node = self.node.clone();
        let status = blocking(move || node.settle_replica(&name)).await?;
        tracing::info!(replica = %status.name, disk = %status.disk, "an interrupted move is given up");
        Ok(self.replica_view(status, None))
    }

    /// Prepares the export of a replica's content.
    pub async fn prepare_export(
        self: &Arc<Self>,
        name: Name,
        options: ExportOptions,
    ) -> Result<Export> {
        let ReplicaView { status, clients, .. } = self.replica(name).await?;
        let over = match (options.overlay, status.digest) {
            (false, _) => None,
            (true, Some(digest)) => {
                let image = self.image(digest.to_string().parse()?).await?.status;
                Some((image.size, image.source))
            }
            (true, None) => {
                let what = format!(
                    "replica {}: it stands on no image: export it whole, without --overlay",
                    status.name
                );
                return Err(Error::new(Kind::Invalid, what));
            }
        };
        let (replica, watch) = self.exports.watch(&status, &options, &clients).await?;
        Ok(Export {
            service: self.clone(),
            header: export::header(&status, over, replica.overlay().size()),
            device: AnyDevice::Replica(replica),
            watch,
            what: format!("replica {}", status.name),
            replica: (!options.live).then_some(status),
        })
    }

    /// Prepares the export of an image's content.
    pub async fn prepare_image_export(self: &Arc<Self>, name: Name) -> Result<Export> {
        let status = self.image(name.clone()).await?.status;
        let base = self.exports.base(status.digest).await?;
        Ok(Export {
            service: self.clone(),
            header: Header { size: status.size, over: None },
            device: AnyDevice::Base(base),
            watch: None,
            what: format!("image {name}"),
            replica: None,
        })
    }

    /// Prepares a replica whose overlay is sent along.
    pub async fn prepare_overlay(
        self: &Arc<Self>,
        name: Name,
        options: ImportOptions,
    ) -> Result<ImportOverlay> {
        name.for_new()?;
        let disk = self.disk(options.disk.parse()?).await?.name;
        Ok(ImportOverlay { service: self.clone(), name, disk })
    }

    /// Prepares the emptying of a disk.
    pub async fn prepare_drain(self: &Arc<Self>, name: Name, drain: Drain) -> Result<DrainDisk> {
        let disk = self.disk(name).await?.name;
        let mut to = Vec::new();
        for other in drain.to {
            to.push(self.disk(other.parse()?).await?.name);
        }
        let rate = drain.rate_bytes.unwrap_or(RATE);
        Ok(DrainDisk { service: self.clone(), disk, to, rate })
    }

    /// From now on a disk takes nothing new, or does again.
    pub async fn set_draining(&self, name: &Name, draining: bool) -> Result<DiskStatus> {
        let (node, by) = (self.node.clone(), name.clone());
        let disk = blocking(move || node.set_draining(&by, draining)).await?;
        let message = match draining {
            true => "it takes nothing new from now on",
            false => "it takes new things again",
        };
        let details = json!({ "disk": name, "draining": draining });
        self.events.tell(Happened::DiskChanged, format!("disk {name}"), message, details);
        Ok(disk)
    }

    pub(super) fn exports(&self) -> &Exports {
        &self.exports
    }

    /// Empties caches.
    pub async fn clear_caches(&self, clear: ClearCache) -> Result<Cleared> {
        let disk = parsed(clear.disk)?;
        if let Some(disk) = &disk {
            self.disk(disk.clone()).await?;
        }
        let digest = match parsed(clear.image)? {
            Some(image) => Some(self.image(image).await?.status.digest),
            None => None,
        };
        Ok(self.promotion.clear(disk.as_ref(), digest))
    }

    /// A disk and an image, by what a client calls them.
    pub async fn disk_and_image(&self, disk: &str, image: &str) -> Result<(Name, catalog::Digest)> {
        let disk = self.disk(disk.parse()?).await?.name;
        Ok((disk, self.image(image.parse()?).await?.status.digest))
    }

    /// Begins to record what is read of an image.
    pub async fn prepare_recording(&self, name: Name, length: Duration) -> Result<Recording> {
        let digest = self.image(name.clone()).await?.status.digest;
        if !self.promotion.begin_recording(digest) {
            let what = format!("image {name}: its profile is being recorded; wait for that to end");
            return Err(Error::new(Kind::InUse, what));
        }
        Ok(Recording { promotion: self.promotion.clone(), digest, length })
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
