//! Replicas, their maps and journals.

use std::fmt;

use super::{
    page::{About, Of, Page},
    snapshot::{Replica, Snapshot},
};
use crate::cow::Stats;

const INFO: About =
    About("replica_info", Of::Things, "The disk and the image of the replica, always 1");
const UP: About = About("replica_up", Of::Things, "Whether the replica can be opened");
const SIZE: About = About("replica_size", Of::Bytes, "Size of the replica");
const STORED: About = About("replica_stored", Of::Bytes, "Space that its overlay takes");
const CLIENTS: About = About("replica_clients", Of::Things, "NBD clients attached to the replica");
const POISONED: About =
    About("replica_poisoned", Of::Things, "Whether a failed sync has stopped its writes");
const CREATION: About = About("replica_creation", Of::Seconds, "Time that creating a replica took");
const MAP: About = About("replica_map", Of::Bytes, "Memory that its block map takes");
const PENDING: About =
    About("replica_pending_runs", Of::Things, "Changes of state that await a flush");
const COMMITS: About = About("replica_commits", Of::Things, "Commits that wrote the map");
const CHECKPOINTS: About =
    About("replica_checkpoints", Of::Things, "Commits that were checkpoints");
const COPIED_UP: About =
    About("replica_copied_up_blocks", Of::Things, "Blocks made whole for a partial write");
const PUNCHED: About =
    About("replica_punched_blocks", Of::Things, "Blocks whose space was given back");

pub(super) fn tell(page: &mut Page<'_>, snapshot: &Snapshot) -> fmt::Result {
    let replicas = &snapshot.replicas;
    let info = replicas.iter().map(|replica| {
        let Replica { name, disk, image, .. } = replica;
        ([("replica", name.as_str()), ("disk", disk), ("image", image)], 1_u64)
    });
    page.gauge(INFO, info)?;
    let all = |value: fn(&Replica) -> u64| {
        replicas.iter().map(move |replica| (labels(replica), value(replica)))
    };
    page.gauge(UP, all(|replica| u64::from(replica.up)))?;
    page.gauge(SIZE, all(|replica| replica.size))?;
    let stored = replicas.iter().filter_map(|it| Some((labels(it), it.stored?)));
    page.gauge(STORED, stored)?;
    page.gauge(CLIENTS, all(|replica| replica.clients))?;
    page.gauge(POISONED, all(|replica| u64::from(replica.poisoned)))?;
    page.times(CREATION, &snapshot.replica_creation)?;
    let open = |value: fn(&Stats) -> u64| {
        let overlays = replicas.iter().filter_map(|it| Some((labels(it), it.overlay.as_ref()?)));
        overlays.map(move |(labels, stats)| (labels, value(stats)))
    };
    page.gauge(MAP, open(|stats| stats.map_bytes))?;
    page.gauge(PENDING, open(|stats| stats.pending))?;
    page.counter(COMMITS, open(|stats| stats.commits))?;
    page.counter(CHECKPOINTS, open(|stats| stats.checkpoints))?;
    page.counter(COPIED_UP, open(|stats| stats.copied_up))?;
    page.counter(PUNCHED, open(|stats| stats.punched))
}

fn labels(replica: &Replica) -> [(&'static str, &str); 1] {
    [("replica", &replica.name)]
}
