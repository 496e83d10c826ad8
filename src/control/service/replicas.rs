//! What the API can ask of replicas.

use std::{collections::HashMap, sync::Arc, time::Instant};

use serde_json::json;

use super::{Service, blocking, locked, to_the_end};
use crate::{
    blockdev::AnyDevice,
    catalog::{self, Name, NewReplica, ReplicaStatus, Target},
    control::{
        api::*,
        events::Happened,
        export::{self, Export, ImportOverlay},
        exports::REPLICA,
        moves::RATE,
        work::{Rework, What},
    },
    cow::Overlay,
    error::{Error, Kind, Result},
    io::Ring,
};

impl Service {
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
}
