//! `underlay status`: the node at a glance.

use clap::Args;

use super::{Outcome, Setting, attach, disk, image, out::facts, replica, size};
use crate::{control::api, error::Result};

/// Show disks, images, replicas, what is stored, and what is saved against a copy per disk.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  underlay status\n  underlay status --json")]
pub struct Status {}

impl Status {
    pub(super) async fn run(self, setting: &Setting) -> Result<Outcome> {
        let status: api::Status = setting.client()?.get("/v1/status").await?;
        setting.show(&status, text)?;
        Ok(Outcome::Well)
    }
}

fn text(status: &api::Status) -> String {
    [
        disk::table(&status.disks),
        image::table(&status.images),
        replica::table(&status.replicas),
        attach::table(&status.attachments),
        totals(status),
    ]
    .into_iter()
    .filter(|part| !part.is_empty())
    .collect::<Vec<_>>()
    .join("\n")
}

fn totals(status: &api::Status) -> String {
    let node = &status.node;
    let mut pairs = vec![
        ("stored", size::format(node.stored_bytes)),
        ("  images", size::format(node.image_bytes)),
        ("  a copy per disk", size::format(node.per_disk_bytes)),
        (
            "saved",
            match node.per_disk_bytes {
                0 => size::format(node.saved_bytes),
                all => format!(
                    "{} ({:.1} % of a copy per disk)",
                    size::format(node.saved_bytes),
                    node.saved_bytes as f64 * 100.0 / all as f64
                ),
            },
        ),
    ];
    if let Some(socket) = &status.daemon.nbd_socket {
        pairs.push(("NBD", socket.display().to_string()));
    }
    if let Some(address) = &status.daemon.nbd_address {
        pairs.push(("NBD", address.clone()));
    }
    if let Some(metrics) = &status.daemon.metrics {
        pairs.push(("metrics", metrics.clone()));
    }
    pairs.push(("latencies", super::top::signal(&status.signal)));
    for api::DiskTrouble { disk, trouble } in &status.troubles {
        pairs.push(("in trouble", format!("disk {disk} is {}", trouble.name())));
    }
    for image in &status.images {
        let called = image.status.names.first().map_or("?", |name| name.as_str());
        for making in &image.making {
            let (done, all) = (size::format(making.done_bytes), size::format(making.total_bytes));
            let made = format!("image {called} on disk {}: {done} of {all}", making.disk);
            pairs.push(("copying", made));
        }
    }
    if let Some(scrub) = &status.scrub {
        let (done, all) = (size::format(scrub.done_bytes), size::format(scrub.total_bytes));
        let image: String = scrub.image.chars().take(12).collect();
        pairs.push(("scrub", format!("image {image} on disk {}: {done} of {all}", scrub.disk)));
    }
    let up = status.daemon.uptime_seconds;
    pairs.push((
        "daemon",
        format!(
            "version {}, pid {}, up {} h {} min",
            status.daemon.version,
            status.daemon.pid,
            up / 3600,
            up / 60 % 60
        ),
    ));
    facts(&pairs)
}
