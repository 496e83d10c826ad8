//! All that a page of metrics says, as plain numbers of one moment.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    sync::atomic::Ordering,
    time::Duration,
};

use uuid::Uuid;

use super::{page::Latency, probes::Probes, promotion::Promotion, sources::Reading};
use crate::{
    blockdev::{
        figures::{Front, Operation},
        nbd,
    },
    catalog::{
        CopyState, Digest, DiskState, Node, NodeStatus, Outline, ReplicaState, ReplicaStatus, Tier,
    },
    control::{
        events::Happened,
        exports::{Exports, IMAGE, REPLICA},
        health::Health,
        surveys::Told,
        views::Seat,
    },
    cow::Stats,
    units::CHUNK,
};

/// Where the figures are.
pub struct Sources<'a> {
    /// The catalogue.
    pub node: &'a Node,
    /// What is open.
    pub exports: &'a Exports,
    /// NBD clients.
    pub server: &'a nbd::Server,
    /// How long the daemon has been up.
    pub uptime: Duration,
    /// What becomes of damaged chunks; `None` where nobody looks after them.
    pub health: Option<&'a Health>,
    /// Bytes that the scrub read, and chunks that it found unsound.
    pub scrubbed: (u64, u64),
    /// Copies that were made because they were missing, removed as surplus, and could not be made.
    pub kept: [u64; 3],
    /// How many events of each kind there were.
    pub events: Vec<(Happened, u64)>,
    /// Promotion; `None` where there is none.
    pub promotion: Option<Promotion>,
    /// What the probes saw; `None` where there are none, not even unwilling ones.
    pub probes: Option<Probes>,
}

/// Figures of one moment.
#[derive(Debug)]
pub(super) struct Snapshot {
    pub uptime: Duration,
    pub node: NodeStatus,
    pub connections: u64,
    pub connections_served: u64,
    pub replica_creation: Latency,
    pub disks: Vec<Disk>,
    pub images: Vec<Image>,
    pub replicas: Vec<Replica>,
    pub exports: Vec<Export>,
    pub reads: Vec<Reads>,
    pub reading: Reading,
    pub promotion: Option<Promotion>,
    pub probes: Option<Probes>,
}

/// A disk.
#[derive(Debug)]
pub(super) struct Disk {
    pub name: String,
    /// How fast it is taken to be, in a word.
    pub tier: &'static str,
    /// Whether it is there, answers and can be written.
    pub up: bool,
    /// Space that underlay takes on it.
    pub stored: u64,
    /// Copies of images.
    pub images: u64,
    pub replicas: u64,
    /// What it said of itself, if it ever did.
    pub said: Option<Said>,
}

/// What a disk said of itself.
#[derive(Debug)]
pub(super) struct Said {
    pub total: u64,
    pub free: u64,
    pub age: Duration,
}

/// An image.
#[derive(Debug)]
pub(super) struct Image {
    pub name: String,
    pub size: u64,
    pub stored: u64,
    /// Copies that serve.
    pub copies: u64,
    pub replicas: u64,
    pub clients: u64,
}

/// A replica.
#[derive(Debug)]
pub(super) struct Replica {
    pub name: String,
    pub disk: String,
    pub image: String,
    pub up: bool,
    pub size: u64,
    /// Space that its overlay takes, if its disk ever said.
    pub stored: Option<u64>,
    pub clients: u64,
    pub poisoned: bool,
    /// Figures of its overlay, while it is open.
    pub overlay: Option<Stats>,
}

/// What came by one front end to one export.
#[derive(Debug)]
pub(super) struct Export {
    pub name: String,
    pub front: Front,
    pub operations: Vec<(Operation, Requests)>,
}

/// One operation's requests.
#[derive(Debug)]
pub(super) struct Requests {
    pub bytes: u64,
    pub errors: u64,
    pub latency: Latency,
}

/// How the replicas of one disk read one image.
#[derive(Debug)]
pub(super) struct Reads {
    pub image: String,
    /// The disk of the copy.
    pub from: String,
    /// The disk of the replicas.
    pub to: String,
    pub copy: Latency,
    pub copy_bytes: u64,
    pub cache: Option<Cached>,
}

/// What was promoted of an image to a disk.
#[derive(Debug)]
pub(super) struct Cached {
    pub reads: Latency,
    pub read_bytes: u64,
    pub stored: u64,
    pub dropped: u64,
}

impl Snapshot {
    /// Takes the figures. Waits for nothing.
    pub fn take(
        sources: &Sources<'_>,
        outline: Outline,
        surveys: HashMap<Uuid, Told>,
        replica_creation: Latency,
    ) -> Snapshot {
        let clients = sources.server.clients_of_each();
        let mut overlays = HashMap::new();
        sources.exports.each_open(|id, replica| {
            let overlay = replica.overlay();
            overlays.insert(id, (overlay.stats(), overlay.poisoned().is_some()));
        });
        let taken: HashMap<Uuid, u64> =
            surveys.values().flat_map(|told| told.survey.replicas.clone()).collect();
        let mut node = outline.node;
        node.stored_bytes += taken.values().sum::<u64>();
        let disks = disks(&outline, &surveys);
        let up: HashMap<&str, bool> =
            disks.iter().map(|disk| (disk.name.as_str(), disk.up)).collect();
        let mut names = HashSet::new();
        let replicas = outline.replicas.iter().map(|status| {
            // Of two that bear one name, the second is known by its id.
            let name = match names.insert(&status.name) {
                true => status.name.to_string(),
                false => status.id.to_string(),
            };
            let (overlay, poisoned) = overlays.remove(&status.id).unzip();
            Replica {
                clients: count(&clients, REPLICA, &status.name.to_string()),
                up: status.state == ReplicaState::Ready
                    && up.get(status.disk.as_str()).copied().unwrap_or(false),
                stored: taken.get(&status.id).copied(),
                poisoned: poisoned.unwrap_or(false),
                ..Replica::known(name, status, overlay)
            }
        });
        let mut replicas: Vec<Replica> = replicas.collect();
        replicas.sort_by(|a, b| a.name.cmp(&b.name));
        let images = images(&outline, &clients);
        Snapshot {
            uptime: sources.uptime,
            node,
            connections: sources.server.connections() as u64,
            connections_served: sources.server.served(),
            replica_creation,
            exports: exports(sources.exports, &images, &outline.replicas),
            reads: reads(sources.exports, &outline),
            reading: reading(sources, &outline),
            disks,
            images,
            replicas,
            promotion: sources.promotion.clone(),
            probes: sources.probes.clone(),
        }
    }
}

impl Replica {
    fn known(name: String, status: &ReplicaStatus, overlay: Option<Stats>) -> Replica {
        let image = status.image.first();
        Replica {
            name,
            disk: status.disk.to_string(),
            image: image.map_or_else(
                || status.digest.map_or_else(String::new, |digest| digest.to_string()),
                ToString::to_string,
            ),
            size: status.size,
            overlay,
            up: false,
            stored: None,
            clients: 0,
            poisoned: false,
        }
    }
}

fn count(clients: &HashMap<String, u64>, prefix: &str, name: &str) -> u64 {
    clients.get(&format!("{prefix}{name}")).copied().unwrap_or(0)
}

fn disks(outline: &Outline, surveys: &HashMap<Uuid, Told>) -> Vec<Disk> {
    let disk = |status: &crate::catalog::DiskStatus| {
        let told = surveys.get(&status.id);
        let overlays: u64 = told.map_or(0, |told| told.survey.replicas.values().sum());
        let sound = |told: &Told| !told.silent && told.survey.changed.is_none();
        Disk {
            name: status.name.to_string(),
            tier: match status.tier {
                Some(Tier::Nvme) => "nvme",
                Some(Tier::Ssd) => "ssd",
                Some(Tier::Hdd) => "hdd",
                None => "unknown",
            },
            up: status.state == DiskState::Present && told.is_some_and(sound),
            stored: status.stored_bytes + overlays,
            images: status.images as u64,
            replicas: status.replicas as u64,
            said: told.map(|told| Said {
                total: told.survey.total_bytes,
                free: told.survey.free_bytes,
                age: told.age(),
            }),
        }
    };
    outline.disks.iter().map(disk).collect()
}

fn images(outline: &Outline, clients: &HashMap<String, u64>) -> Vec<Image> {
    let images = outline.images.iter().filter_map(|image| {
        // One without a name can't be opened anew: it goes with its last replica.
        let name = image.names.first()?.to_string();
        let serves = |copy: &&crate::catalog::CopyStatus| copy.state == CopyState::Ready;
        Some(Image {
            clients: count(clients, IMAGE, &name),
            name,
            size: image.size,
            stored: image.stored_bytes,
            copies: image.copies.iter().filter(serves).count() as u64,
            replicas: image.users.len() as u64,
        })
    });
    let mut images: Vec<Image> = images.collect();
    images.sort_by(|a, b| a.name.cmp(&b.name));
    images
}

fn exports(exports: &Exports, images: &[Image], replicas: &[ReplicaStatus]) -> Vec<Export> {
    let images: HashSet<&str> = images.iter().map(|image| image.name.as_str()).collect();
    let replicas: HashSet<&str> = replicas.iter().map(|replica| replica.name.as_str()).collect();
    let stays = |name: &str| match (name.strip_prefix(IMAGE), name.strip_prefix(REPLICA)) {
        (Some(image), _) => images.contains(image),
        (_, Some(replica)) => replicas.contains(replica),
        _ => false,
    };
    let mut all = Vec::new();
    for (name, figures) in exports.all_figures(stays) {
        for front in Front::ALL {
            let Some(operations) = figures.at(front) else { continue };
            let requests = |operation| {
                let recorded = operations.recorded(operation);
                let latency = Latency::of(&recorded.latency);
                let (bytes, errors) = (recorded.bytes, recorded.errors);
                (operation, Requests { bytes, errors, latency })
            };
            let operations = Operation::ALL.map(requests).into();
            all.push(Export { name: name.clone(), front, operations });
        }
    }
    all
}

fn reading(sources: &Sources<'_>, outline: &Outline) -> Reading {
    let bases = sources.exports.bases();
    let figures: HashMap<Digest, _> =
        bases.all().into_iter().map(|(digest, base)| (digest, base.sources().figures())).collect();
    let named = outline
        .images
        .iter()
        .filter_map(|image| Some((image.names.first()?.to_string(), *figures.get(&image.digest)?)));
    let mut images: Vec<_> = named.collect();
    images.sort_by(|a, b| a.0.cmp(&b.0));
    let mut disks = bases.disks();
    disks.sort_by(|a, b| a.name().cmp(b.name()));
    let repaired = sources.health.map(Health::repaired).unwrap_or_default();
    Reading {
        images,
        disks,
        repaired,
        scrubbed: sources.scrubbed,
        kept: sources.kept,
        events: sources.events.clone(),
    }
}

/// What replicas read, summed where several images have one name in common with none other.
fn reads(exports: &Exports, outline: &Outline) -> Vec<Reads> {
    let names: HashMap<Digest, String> = outline
        .images
        .iter()
        .filter_map(|image| Some((image.digest, image.names.first()?.to_string())))
        .collect();
    // While no replica is open, the copy that would be read.
    let home: HashMap<Digest, String> = outline
        .images
        .iter()
        .filter_map(|image| {
            let ready = image.copies.iter().find(|copy| copy.state == CopyState::Ready)?;
            Some((image.digest, ready.disk.to_string()))
        })
        .collect();
    let seats = exports.views().all();
    let told = seats.iter().filter_map(|seat| {
        let image = names.get(&seat.digest).cloned().unwrap_or_else(|| seat.digest.to_string());
        let open = seat.copy().and_then(|copy| copy.disk());
        let from = open.or_else(|| home.get(&seat.digest).cloned())?;
        Some(((image.clone(), seat.disk.to_string()), reads_of(seat, image, from)))
    });
    told.collect::<BTreeMap<_, _>>().into_values().collect()
}

fn reads_of(seat: &Seat, image: String, from: String) -> Reads {
    let demand = &seat.view.demand;
    Reads {
        image,
        from,
        to: seat.disk.to_string(),
        copy: Latency::of(&demand.copy.counts()),
        copy_bytes: demand.copy_bytes.load(Ordering::Relaxed),
        cache: seat.view.cache().map(|cache| Cached {
            reads: Latency::of(&demand.cache.counts()),
            read_bytes: demand.cache_bytes.load(Ordering::Relaxed),
            stored: cache.stored() * CHUNK,
            dropped: cache.doubts(),
        }),
    }
}
