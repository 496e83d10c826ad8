//! Figures for Prometheus, as OpenMetrics text.
//!
//! What can be asked for when it is wanted is asked then; only events that leave no trace elsewhere
//! are counted as they happen. Labels are names of disks, images and replicas, as many as there are.

use std::{collections::HashMap, sync::atomic::AtomicU64, time::Duration};

use prometheus_client::{
    encoding::{EncodeLabelSet, text::encode},
    metrics::{counter::Counter, family::Family, gauge::Gauge, histogram::Histogram},
    registry::{Registry, Unit},
};
use uuid::Uuid;

use crate::{
    catalog::DiskState,
    control::api::Status,
    cow::Stats,
    error::{Error, Kind, Result},
};

/// What a scraper is told of the text.
pub const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Upper bounds of the creation time of a replica, in seconds.
const CREATED_IN: [f64; 9] = [0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 1.0, 10.0];

/// What is counted as it happens.
pub struct Metrics {
    replica_created: Histogram,
}

impl Default for Metrics {
    fn default() -> Metrics {
        Metrics { replica_created: Histogram::new(CREATED_IN) }
    }
}

type Bytes = Family<Object, Gauge<u64, AtomicU64>>;
type Counts = Family<Object, Counter>;

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Object {
    name: String,
}

impl Metrics {
    /// Counts a replica and the time its creation took.
    pub fn replica_created(&self, took: Duration) {
        self.replica_created.observe(took.as_secs_f64());
    }

    /// Everything, as text.
    pub fn text(
        &self,
        status: &Status,
        overlays: &HashMap<Uuid, Stats>,
        connections: usize,
        served: u64,
    ) -> Result<String> {
        let mut registry = Registry::with_prefix("underlay");
        node(&mut registry, status);
        disks(&mut registry, status);
        images(&mut registry, status);
        replicas(&mut registry, status, overlays);
        gauge(&mut registry, "nbd_connections", "NBD clients in transmission", connections as u64);
        counter(&mut registry, "nbd_connections_served", "NBD clients since the start", served);
        registry.register_with_unit(
            "replica_creation",
            "Time that creating a replica took",
            Unit::Seconds,
            self.replica_created.clone(),
        );
        process(&mut registry);
        let mut text = String::new();
        encode(&mut text, &registry)
            .map_err(|error| Error::caused(Kind::Io, "telling the metrics", error))?;
        Ok(text)
    }
}

fn node(registry: &mut Registry, status: &Status) {
    let node = &status.node;
    bytes(registry, "stored", "Space that copies and replicas take", node.stored_bytes);
    bytes(registry, "image_stored", "Space that copies of images take", node.image_bytes);
    let all = "Space that images would take with a copy on each disk that uses them";
    bytes(registry, "copy_per_disk", all, node.per_disk_bytes);
    bytes(registry, "saved", "Space saved against a copy per disk", node.saved_bytes);
    gauge(registry, "uptime_seconds", "Age of the daemon", status.daemon.uptime_seconds);
}

fn disks(registry: &mut Registry, status: &Status) {
    let (up, total, free, stored) =
        (Bytes::default(), Bytes::default(), Bytes::default(), Bytes::default());
    for disk in &status.disks {
        let object = Object { name: disk.name.to_string() };
        up.get_or_create(&object).set(u64::from(disk.state == DiskState::Present));
        total.get_or_create(&object).set(disk.total_bytes);
        free.get_or_create(&object).set(disk.free_bytes);
        stored.get_or_create(&object).set(disk.stored_bytes);
    }
    registry.register("disk_up", "Whether the disk is there and can be written", up);
    for (name, help, family) in [
        ("disk_size", "Size of the disk's file system", total),
        ("disk_free", "Space left on the disk", free),
        ("disk_stored", "Space that underlay takes on the disk", stored),
    ] {
        registry.register_with_unit(name, help, Unit::Bytes, family);
    }
}

fn images(registry: &mut Registry, status: &Status) {
    let (size, stored, replicas, clients) =
        (Bytes::default(), Bytes::default(), Bytes::default(), Bytes::default());
    for image in &status.images {
        let Some(name) = image.status.names.first() else { continue };
        let object = Object { name: name.to_string() };
        size.get_or_create(&object).set(image.status.size);
        stored.get_or_create(&object).set(image.status.stored_bytes);
        replicas.get_or_create(&object).set(image.status.users.len() as u64);
        clients.get_or_create(&object).set(image.clients.len() as u64);
    }
    registry.register_with_unit("image_size", "Size of the image", Unit::Bytes, size);
    registry.register_with_unit("image_copies", "Space that its copies take", Unit::Bytes, stored);
    registry.register("image_replicas", "Replicas that stand on the image", replicas);
    registry.register("image_clients", "NBD clients that read the image", clients);
}

fn replicas(registry: &mut Registry, status: &Status, overlays: &HashMap<Uuid, Stats>) {
    let (size, stored, clients, poisoned) =
        (Bytes::default(), Bytes::default(), Bytes::default(), Bytes::default());
    let (map, pending) = (Bytes::default(), Bytes::default());
    let (commits, checkpoints, copied, punched) =
        (Counts::default(), Counts::default(), Counts::default(), Counts::default());
    for replica in &status.replicas {
        let object = Object { name: replica.status.name.to_string() };
        size.get_or_create(&object).set(replica.status.size);
        stored.get_or_create(&object).set(replica.status.stored_bytes);
        clients.get_or_create(&object).set(replica.clients.len() as u64);
        poisoned.get_or_create(&object).set(u64::from(replica.poisoned.is_some()));
        let Some(stats) = overlays.get(&replica.status.id) else { continue };
        map.get_or_create(&object).set(stats.map_bytes);
        pending.get_or_create(&object).set(stats.pending);
        commits.get_or_create(&object).inc_by(stats.commits);
        checkpoints.get_or_create(&object).inc_by(stats.checkpoints);
        copied.get_or_create(&object).inc_by(stats.copied_up);
        punched.get_or_create(&object).inc_by(stats.punched);
    }
    registry.register_with_unit("replica_size", "Size of the replica", Unit::Bytes, size);
    registry.register_with_unit("replica_stored", "Space its overlay takes", Unit::Bytes, stored);
    registry.register_with_unit("replica_map", "Memory its block map takes", Unit::Bytes, map);
    registry.register("replica_clients", "NBD clients attached to the replica", clients);
    registry.register("replica_poisoned", "Whether a failed sync has stopped its writes", poisoned);
    registry.register("replica_pending_runs", "Changes of state that await a flush", pending);
    registry.register("replica_commits", "Commits that wrote the map", commits);
    registry.register("replica_checkpoints", "Commits that were checkpoints", checkpoints);
    registry.register("replica_copied_up_blocks", "Blocks made whole for a partial write", copied);
    registry.register("replica_punched_blocks", "Blocks whose space was given back", punched);
}

/// What any Prometheus dashboard expects of a process; left out where /proc does not tell.
fn process(registry: &mut Registry) {
    let Ok(stat) = std::fs::read_to_string("/proc/self/stat") else { return };
    // The command, in parentheses, may hold spaces: fields are counted behind it.
    let fields: Vec<&str> = stat
        .rsplit_once(')')
        .map(|(_, rest)| rest.split_whitespace().collect())
        .unwrap_or_default();
    let field = |number: usize| fields.get(number).and_then(|text| text.parse::<u64>().ok());
    let (Some(user), Some(system), Some(pages)) = (field(11), field(12), field(21)) else { return };
    let tick = nix::unistd::sysconf(nix::unistd::SysconfVar::CLK_TCK).ok().flatten().unwrap_or(100);
    let page = nix::unistd::sysconf(nix::unistd::SysconfVar::PAGE_SIZE).ok().flatten();
    let cpu = Counter::<f64, AtomicU64>::default();
    cpu.inc_by((user + system) as f64 / tick as f64);
    registry.register_with_unit("process_cpu", "Processor time used", Unit::Seconds, cpu);
    let resident = pages * page.and_then(|page| u64::try_from(page).ok()).unwrap_or(4096);
    bytes(registry, "process_resident_memory", "Memory in use", resident);
    if let Ok(open) = std::fs::read_dir("/proc/self/fd") {
        gauge(registry, "process_open_fds", "Open file descriptors", open.count() as u64);
    }
}

fn gauge(registry: &mut Registry, name: &str, help: &str, value: u64) {
    let gauge = Gauge::<u64, AtomicU64>::default();
    gauge.set(value);
    registry.register(name, help, gauge);
}

fn bytes(registry: &mut Registry, name: &str, help: &str, value: u64) {
    let gauge = Gauge::<u64, AtomicU64>::default();
    gauge.set(value);
    registry.register_with_unit(name, help, Unit::Bytes, gauge);
}

fn counter(registry: &mut Registry, name: &str, help: &str, value: u64) {
    let counter: Counter = Counter::default();
    counter.inc_by(value);
    registry.register(name, help, counter);
}
