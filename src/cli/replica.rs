//! `underlay replica`: writable devices that stand on an image.

use std::{
    fs::File,
    path::{Path, PathBuf},
};

use clap::{Args, Subcommand};

use super::{
    Outcome, Setting,
    export::Target,
    image::read_ahead,
    out,
    out::{Meter, Side, Table, facts},
    size,
};
use crate::{
    catalog::{Name, ReplicaState},
    control::{
        api::{
            CreateReplica, Flatten as FlattenRequest, Migrate as MigrateRequest, Removed,
            ReplicaView, Resize as ResizeRequest, Reworked,
        },
        client::{Upload, escape},
    },
    error::{Context, Result},
};

/// Create, grow, move and remove replicas, and look at them.
#[derive(Debug, Subcommand)]
pub enum Replica {
    Create(Create),
    List(List),
    Inspect(Inspect),
    Resize(Resize),
    Migrate(Migrate),
    Flatten(Flatten),
    Settle(Settle),
    Export(Export),
    Import(Import),
    Rm(Rm),
}

/// Create a replica: a writable device that begins as the image and keeps its own writes.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
    underlay replica create vm1 --image debian-12 --disk a\n  \
    underlay replica create vm2 --image debian-12 --disk b --size 20G")]
pub struct Create {
    /// What to call the replica; clients find it as replica/NAME.
    #[arg(value_parser = super::name)]
    name: Name,
    /// The image to stand on: a name or a digest.
    #[arg(long, value_parser = super::name)]
    image: Name,
    /// The disk for the replica's own writes; any but a pool disk.
    #[arg(long, value_parser = super::name)]
    disk: Name,
    /// How large it is, as 20G; the image's size otherwise.
    #[arg(long, value_parser = super::bytes)]
    size: Option<u64>,
}

/// List the replicas.
#[derive(Debug, Args)]
#[command(visible_alias = "ls", after_help = "Example:\n  underlay replica list --json")]
pub struct List {}

/// Show one replica: where it is, what it stores, who is attached.
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  underlay replica inspect vm1")]
pub struct Inspect {
    /// The replica's name or id.
    #[arg(value_parser = super::name)]
    name: Name,
}

/// Grow a replica, attached or not. Clients see the new size when they connect anew.
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  underlay replica resize vm1 40G")]
pub struct Resize {
    /// The replica's name or id.
    #[arg(value_parser = super::name)]
    name: Name,
    /// How large it is to be: no less than it is.
    #[arg(value_parser = super::bytes)]
    size: u64,
}

/// Move a replica to another disk, while clients go on using it. Interrupted, it stays where it is.
#[derive(Debug, Args)]
#[command(
    visible_alias = "mv",
    after_help = "Examples:\n  \
    underlay replica migrate vm1 --to b\n  \
    underlay replica migrate vm1 --to b --rate 50M"
)]
pub struct Migrate {
    /// The replica's name or id.
    #[arg(value_parser = super::name)]
    name: Name,
    /// The disk to move to; any but a pool disk.
    #[arg(long, value_parser = super::name)]
    to: Name,
    /// Bytes a second that are copied, at most, as 50M; 0 for no bound, 256M otherwise.
    #[arg(long, value_name = "SIZE", value_parser = super::bytes)]
    rate: Option<u64>,
}

/// Copy what a replica still reads from its image, while clients go on using it, until it needs no
/// image. Interrupted, it goes on the next time where it stopped.
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  underlay replica flatten vm1")]
pub struct Flatten {
    /// The replica's name or id.
    #[arg(value_parser = super::name)]
    name: Name,
    /// Bytes a second that are copied, at most, as 50M; 0 for no bound, 256M otherwise.
    #[arg(long, value_name = "SIZE", value_parser = super::bytes)]
    rate: Option<u64>,
}

/// Take a replica up where it was before a move that was interrupted, because the disk that it was to
/// move to is lost. What was written to it there, if it had moved, is given up.
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  underlay replica settle vm1")]
pub struct Settle {
    /// The replica's name or id.
    #[arg(value_parser = super::name)]
    name: Name,
}

/// Write the content of a replica to a file. One that clients have open is refused, unless --live: then
/// each block is as it is when it is read.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
    underlay replica export vm1 vm1.qcow2 --format qcow2\n  \
    underlay replica export vm1 - | zstd > vm1.raw.zst\n  \
    underlay replica export vm1 --overlay vm1.overlay")]
pub struct Export {
    /// The replica's name or id.
    #[arg(value_parser = super::name)]
    name: Name,
    #[command(flatten)]
    target: Target,
    /// Only what was written to the replica, into this file (- for standard output): with the digest of
    /// its image, for `replica import` on a node that has that image.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["file", "format"])]
    overlay: Option<PathBuf>,
    /// Also while clients have it open.
    #[arg(long)]
    live: bool,
}

/// Make a replica of an overlay that was exported. The image that it stands on must be on this node.
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  underlay replica import vm1.overlay vm1 --disk a")]
pub struct Import {
    /// The file; - for standard input.
    file: PathBuf,
    /// What to call the replica.
    #[arg(value_parser = super::name)]
    name: Name,
    /// The disk for the replica's own writes; any but a pool disk.
    #[arg(long, value_parser = super::name)]
    disk: Name,
}

/// Remove a replica and everything that was written to it. Refused while a client is attached.
#[derive(Debug, Args)]
#[command(visible_alias = "remove", after_help = "Example:\n  underlay replica rm vm1")]
pub struct Rm {
    /// The replica's name or id.
    #[arg(value_parser = super::name)]
    name: Name,
}

impl Replica {
    pub(super) async fn run(self, setting: &Setting) -> Result<Outcome> {
        let client = setting.client()?;
        match self {
            Replica::Create(create) => {
                let request = CreateReplica {
                    name: create.name.into(),
                    image: create.image.into(),
                    disk: create.disk.into(),
                    size: create.size,
                };
                let replica: ReplicaView = client.post("/v1/replicas", &request).await?;
                setting.show(&replica, |replica| {
                    format!(
                        "replica {} of {} is ready{}: export {}\n",
                        replica.status.name,
                        size::format(replica.status.size),
                        match replica.created_in_ms {
                            Some(ms) => format!(" after {ms:.1} ms"),
                            None => String::new(),
                        },
                        replica.export,
                    )
                })?;
            }
            Replica::List(List {}) => {
                let replicas: Vec<ReplicaView> = client.get("/v1/replicas").await?;
                setting.show(&replicas, |replicas| table(replicas))?;
            }
            Replica::Inspect(Inspect { name }) => {
                let replica: ReplicaView = client.get(&path_of(&name)).await?;
                setting.show(&replica, details)?;
            }
            Replica::Resize(Resize { name, size }) => {
                let path = format!("{}/resize", path_of(&name));
                let replica: ReplicaView = client.post(&path, &ResizeRequest { size }).await?;
                setting.show(&replica, |it| {
                    format!("replica {} has {} now\n", it.status.name, size::format(it.status.size))
                })?;
            }
            Replica::Migrate(Migrate { name, to, rate }) => {
                let path = format!("{}/migrate", path_of(&name));
                let request = MigrateRequest { disk: to.into(), rate_bytes: rate };
                let mut meter = Meter::new();
                let moved: Reworked =
                    client.post_streamed(&path, &request, |progress| meter.show(progress)).await?;
                drop(meter);
                setting.show(&moved, |it| {
                    format!(
                        "replica {} is on disk {} now: {} copied, requests waited {:.0} ms\n",
                        it.replica.status.name,
                        it.replica.status.disk,
                        size::format(it.copied_bytes),
                        it.paused_ms
                    )
                })?;
            }
            Replica::Flatten(Flatten { name, rate }) => {
                let path = format!("{}/flatten", path_of(&name));
                let request = FlattenRequest { rate_bytes: rate };
                let mut meter = Meter::new();
                let flat: Reworked =
                    client.post_streamed(&path, &request, |progress| meter.show(progress)).await?;
                drop(meter);
                setting.show(&flat, |it| {
                    format!(
                        "replica {} needs no image now: {} copied\n",
                        it.replica.status.name,
                        size::format(it.copied_bytes)
                    )
                })?;
            }
            Replica::Settle(Settle { name }) => {
                let path = format!("{}/settle", path_of(&name));
                let replica: ReplicaView = client.post(&path, &()).await?;
                setting.show(&replica, |it| {
                    format!("replica {} is on disk {}\n", it.status.name, it.status.disk)
                })?;
            }
            Replica::Export(Export { name, target, overlay, live }) => {
                let only = overlay.is_some();
                let path = format!("{}/content?overlay={only}&live={live}", path_of(&name));
                let target = overlay.map_or(target, Target::overlay);
                target.fetch(&client, &path, setting).await?;
            }
            Replica::Import(Import { file, name, disk }) => {
                let path = format!("{}/content?disk={}", path_of(&name), escape(disk.as_str()));
                let upload = if file == Path::new("-") {
                    Upload { content: read_ahead(std::io::stdin()), length: None }
                } else {
                    let opened = File::open(&file);
                    let opened = opened.context(|| format!("opening {}", file.display()))?;
                    let length =
                        opened.metadata().ok().filter(|it| it.is_file()).map(|it| it.len());
                    Upload { content: read_ahead(opened), length }
                };
                let mut meter = Meter::new();
                let replica: ReplicaView =
                    client.upload(&path, upload, |progress| meter.show(progress)).await?;
                drop(meter);
                setting.show(&replica, |it| {
                    format!(
                        "replica {} of {} is ready: export {}\n",
                        it.status.name,
                        size::format(it.status.size),
                        it.export
                    )
                })?;
            }
            Replica::Rm(Rm { name }) => {
                let removed: Removed = client.delete(&path_of(&name)).await?;
                setting.show(&removed, |it| super::removed("replica", it))?;
            }
        }
        Ok(Outcome::Well)
    }
}

fn path_of(name: &Name) -> String {
    format!("/v1/replicas/{}", escape(name.as_str()))
}

/// The replicas as a table.
pub fn table(replicas: &[ReplicaView]) -> String {
    let mut table = Table::new(&[
        ("REPLICA", Side::Left),
        ("STATE", Side::Left),
        ("IMAGE", Side::Left),
        ("DISK", Side::Left),
        ("SIZE", Side::Right),
        ("STORED", Side::Right),
        ("CLIENTS", Side::Right),
        ("MADE IN", Side::Right),
    ]);
    for replica in replicas {
        table.row([
            replica.status.name.to_string(),
            state(replica).to_owned(),
            super::join(&replica.status.image),
            replica.status.disk.to_string(),
            size::format(replica.status.size),
            size::format(replica.status.stored_bytes),
            replica.clients.len().to_string(),
            replica.created_in_ms.map_or("-".to_owned(), |ms| format!("{ms:.1} ms")),
        ]);
    }
    table.text("no replicas yet; make one with: underlay replica create NAME --image I --disk D")
}

fn details(replica: &ReplicaView) -> String {
    let status = &replica.status;
    let mut pairs = vec![
        ("name", status.name.to_string()),
        ("id", status.id.to_string()),
        ("state", state(replica).to_owned()),
        (
            "image",
            match status.digest {
                Some(digest) => format!("{} ({digest})", super::join(&status.image)),
                None => "none: it stands alone".to_owned(),
            },
        ),
        ("disk", status.disk.to_string()),
        ("size", format!("{} ({} bytes)", size::format(status.size), status.size)),
        ("stored", size::format(status.stored_bytes)),
        ("created", out::date(status.created)),
        ("export", replica.export.clone()),
    ];
    if let Some(ms) = replica.created_in_ms {
        pairs.push(("made in", format!("{ms:.1} ms")));
    }
    if !replica.clients.is_empty() {
        pairs.push(("clients", replica.clients.join("\n")));
    }
    for reason in [&status.reason, &replica.poisoned].into_iter().flatten() {
        pairs.push(("reason", reason.clone()));
    }
    facts(&pairs)
}

fn state(replica: &ReplicaView) -> &'static str {
    match replica.status.state {
        _ if replica.poisoned.is_some() => "poisoned",
        ReplicaState::Ready => "ready",
        ReplicaState::BaseMissing => "image missing",
        ReplicaState::DiskMissing => "disk missing",
        ReplicaState::ReadOnly => "read-only",
        ReplicaState::Unsettled => "unsettled",
        ReplicaState::Failed => "failed",
    }
}
