//! `underlay disk`: the disks that a node gives to underlay.

use std::path::PathBuf;

use clap::{Args, Subcommand, ValueEnum};

use super::{
    Outcome, Setting,
    out::{Meter, Side, Table, facts},
    size,
};
use crate::{
    catalog::{DiskState, DiskStatus, Name, Tier},
    control::{
        api::{AddDisk, Drain as DrainRequest, Drained, Removed},
        client::escape,
    },
    error::{Context, Result},
};

/// Give disks to underlay, and look at them.
#[derive(Debug, Subcommand)]
pub enum Disk {
    Add(Add),
    List(List),
    Inspect(Inspect),
    Drain(Drain),
    Undrain(Undrain),
    Remove(Remove),
}

/// Add a disk: a directory on a mounted file system. Adding it again changes nothing.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
    underlay disk add /mnt/nvme0 --name a\n  \
    underlay disk add /mnt/pool --pool --tier ssd")]
pub struct Add {
    /// An existing directory; everything goes into PATH/underlay.
    path: PathBuf,
    /// What to call the disk; the last part of its path otherwise.
    #[arg(long, value_parser = super::name)]
    name: Option<Name>,
    /// Set the disk aside for images: no replicas.
    #[arg(long)]
    pool: bool,
    /// How fast it is; found out otherwise.
    #[arg(long)]
    tier: Option<Speed>,
    /// What promoted chunks may take there, 0 for nothing; a share of the disk otherwise.
    #[arg(long, value_name = "SIZE", value_parser = super::bytes)]
    cache: Option<u64>,
}

/// A tier, as it is written on the command line.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum Speed {
    Nvme,
    Ssd,
    Hdd,
}

impl From<Speed> for Tier {
    fn from(speed: Speed) -> Tier {
        match speed {
            Speed::Nvme => Tier::Nvme,
            Speed::Ssd => Tier::Ssd,
            Speed::Hdd => Tier::Hdd,
        }
    }
}

/// Move every replica of a disk to other disks, while clients go on using them. From then on the disk
/// takes nothing new. Interrupted, it goes on the next time with what is still there.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
    underlay disk drain a\n  \
    underlay disk drain a --to b --to c --rate 50M")]
pub struct Drain {
    /// The disk's name.
    #[arg(value_parser = super::name)]
    name: Name,
    /// A disk that may take what is on it; any otherwise. May be given several times.
    #[arg(long, value_parser = super::name)]
    to: Vec<Name>,
    /// Bytes a second that are copied, at most, as 50M; 0 for no bound, 256M otherwise.
    #[arg(long, value_name = "SIZE", value_parser = super::bytes)]
    rate: Option<u64>,
}

/// Let a disk that was drained take new things again.
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  underlay disk undrain a")]
pub struct Undrain {
    /// The disk's name.
    #[arg(value_parser = super::name)]
    name: Name,
}

/// List the disks, there or not.
#[derive(Debug, Args)]
#[command(visible_alias = "ls", after_help = "Example:\n  underlay disk list --json")]
pub struct List {}

/// Show one disk.
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  underlay disk inspect a")]
pub struct Inspect {
    /// The disk's name.
    #[arg(value_parser = super::name)]
    name: Name,
}

/// Forget a disk that nothing uses any more.
#[derive(Debug, Args)]
#[command(
    visible_aliases = ["rm", "forget"],
    after_help = "Example:\n  underlay disk remove a"
)]
pub struct Remove {
    /// The disk's name.
    #[arg(value_parser = super::name)]
    name: Name,
}

impl Disk {
    pub(super) async fn run(self, setting: &Setting) -> Result<Outcome> {
        let client = setting.client()?;
        match self {
            Disk::Add(add) => {
                let path = std::path::absolute(&add.path)
                    .context(|| format!("the path {}", add.path.display()))?;
                let request = AddDisk {
                    path,
                    name: add.name.map(String::from),
                    tier: add.tier.map(Tier::from),
                    pool: add.pool,
                    cache_bytes: add.cache,
                };
                let disk: DiskStatus = client.post("/v1/disks", &request).await?;
                setting.show(&disk, |disk| {
                    format!("disk {} at {} is ready\n", disk.name, disk.path.display())
                })?;
            }
            Disk::List(List {}) => {
                let disks: Vec<DiskStatus> = client.get("/v1/disks").await?;
                setting.show(&disks, |disks| table(disks))?;
            }
            Disk::Inspect(Inspect { name }) => {
                let disk: DiskStatus = client.get(&path_of(&name)).await?;
                setting.show(&disk, details)?;
            }
            Disk::Drain(Drain { name, to, rate }) => {
                let to = to.into_iter().map(String::from).collect();
                let request = DrainRequest { to, rate_bytes: rate };
                let path = format!("{}/drain", path_of(&name));
                let mut meter = Meter::new();
                let drained: Drained =
                    client.post_streamed(&path, &request, |progress| meter.show(progress)).await?;
                drop(meter);
                setting.show(&drained, |it| {
                    let mut text = String::new();
                    for moved in &it.moved {
                        text += &format!("replica {} is on disk {} now\n", moved.name, moved.disk);
                    }
                    for image in &it.copies {
                        text += &format!("image {image} has its copies elsewhere now\n");
                    }
                    text + &format!("disk {} is drained and takes nothing new\n", it.disk.name)
                })?;
            }
            Disk::Undrain(Undrain { name }) => {
                let path = format!("{}/undrain", path_of(&name));
                let disk: DiskStatus = client.post(&path, &()).await?;
                setting.show(&disk, |it| format!("disk {} takes new things again\n", it.name))?;
            }
            Disk::Remove(Remove { name }) => {
                let removed: Removed = client.delete(&path_of(&name)).await?;
                setting.show(&removed, |it| super::removed("disk", it))?;
            }
        }
        Ok(Outcome::Well)
    }
}

fn path_of(name: &Name) -> String {
    format!("/v1/disks/{}", escape(name.as_str()))
}

/// The disks as a table.
pub fn table(disks: &[DiskStatus]) -> String {
    let mut table = Table::new(&[
        ("DISK", Side::Left),
        ("STATE", Side::Left),
        ("TIER", Side::Left),
        ("FREE", Side::Right),
        ("SIZE", Side::Right),
        ("STORED", Side::Right),
        ("IMAGES", Side::Right),
        ("REPLICAS", Side::Right),
        ("PATH", Side::Left),
    ]);
    for disk in disks {
        table.row([
            disk.name.to_string(),
            state(disk),
            tier(disk).to_owned(),
            size::format(disk.free_bytes),
            size::format(disk.total_bytes),
            size::format(disk.stored_bytes),
            disk.images.to_string(),
            disk.replicas.to_string(),
            disk.path.display().to_string(),
        ]);
    }
    table.text("no disks yet; give one with: underlay disk add PATH")
}

fn details(disk: &DiskStatus) -> String {
    let mut pairs = vec![
        ("name", disk.name.to_string()),
        ("id", disk.id.to_string()),
        ("path", disk.path.display().to_string()),
        ("state", state(disk)),
        ("tier", tier(disk).to_owned()),
        (
            "free",
            format!("{} of {}", size::format(disk.free_bytes), size::format(disk.total_bytes)),
        ),
        ("stored", size::format(disk.stored_bytes)),
        ("cache", disk.cache_bytes.map_or("a share".to_owned(), size::format)),
        ("images", disk.images.to_string()),
        ("replicas", disk.replicas.to_string()),
    ];
    if let Some(reason) = &disk.reason {
        pairs.push(("reason", reason.clone()));
    }
    if !disk.fails_with.is_empty() {
        pairs.push(("fails with", super::join(&disk.fails_with)));
    }
    facts(&pairs)
}

fn state(disk: &DiskStatus) -> String {
    let state = match disk.state {
        DiskState::Present => "present",
        DiskState::ReadOnly => "read-only",
        DiskState::Missing => "missing",
        DiskState::Locked => "locked",
        DiskState::Failed => "failed",
    };
    let marks = [(disk.pool, ", pool"), (disk.draining, ", draining")];
    let marks = marks.iter().filter(|(is, _)| *is).map(|(_, mark)| *mark);
    state.to_owned() + &marks.collect::<String>()
}

fn tier(disk: &DiskStatus) -> &'static str {
    match disk.tier {
        Some(Tier::Nvme) => "nvme",
        Some(Tier::Ssd) => "ssd",
        Some(Tier::Hdd) => "hdd",
        None => "-",
    }
}
