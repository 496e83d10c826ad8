//! The node and the daemon.

use std::fmt;

use super::{
    page::{About, Of, Page},
    snapshot::Snapshot,
};

const BUILD: About = About("build_info", Of::Things, "The version that runs, always 1");
const UPTIME: About = About("uptime", Of::Seconds, "Age of the daemon");
const STORED: About = About("stored", Of::Bytes, "Space that copies and replicas take");
const IMAGES: About = About("image_stored", Of::Bytes, "Space that copies of images take");
const PER_DISK: About = About(
    "copy_per_disk",
    Of::Bytes,
    "Space that images would take with a copy on each disk that uses them",
);
const SAVED: About = About("saved", Of::Bytes, "Space saved against a copy per disk");
const CONNECTIONS: About = About("nbd_connections", Of::Things, "NBD clients in transmission");
const SERVED: About =
    About("nbd_connections_served", Of::Things, "NBD clients since the daemon's start");

pub(super) fn tell(page: &mut Page<'_>, snapshot: &Snapshot) -> fmt::Result {
    let node = &snapshot.node;
    page.gauge(BUILD, [([("version", env!("CARGO_PKG_VERSION"))], 1_u64)])?;
    page.one(UPTIME, snapshot.uptime.as_secs_f64())?;
    page.one(STORED, node.stored_bytes)?;
    page.one(IMAGES, node.image_bytes)?;
    page.one(PER_DISK, node.per_disk_bytes)?;
    page.one(SAVED, node.saved_bytes)?;
    page.one(CONNECTIONS, snapshot.connections)?;
    page.count(SERVED, snapshot.connections_served)
}
