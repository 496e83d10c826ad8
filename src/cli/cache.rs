//! `underlay cache`: chunks of images that were promoted to the disks of those who read them.

use clap::{Args, Subcommand};

use super::{
    Outcome, Setting,
    out::{Side, Table, facts},
    size,
};
use crate::{
    catalog::Name,
    control::{
        api::{CacheView, ClearCache, Cleared, Extent, Unpin as UnpinRequest, Warm, Warming},
        client::escape,
    },
    error::Result,
};

/// See and steer what is promoted: hot chunks of an image, copied to the disks whose replicas read them.
#[derive(Debug, Subcommand)]
pub enum Cache {
    List(List),
    Inspect(Inspect),
    Clear(Clear),
    Pin(Bring),
    Unpin(Unpin),
    Warm(Bring),
}

/// List the cache of every disk.
#[derive(Debug, Args)]
#[command(visible_alias = "ls", after_help = "Example:\n  underlay cache list --json")]
pub struct List {}

/// Show one disk's cache: what it holds of which image, and what it was good for.
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  underlay cache inspect b")]
pub struct Inspect {
    /// The disk.
    #[arg(value_parser = super::name)]
    disk: Name,
}

/// Empty caches: reads go to the copies again. What is pinned is promoted anew.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
    underlay cache clear\n  \
    underlay cache clear --disk b --image debian-12")]
pub struct Clear {
    /// Of this disk only.
    #[arg(long, value_parser = super::name)]
    disk: Option<Name>,
    /// Of this image only.
    #[arg(long, value_parser = super::name)]
    image: Option<Name>,
}

/// Bring an image's profile, or all of it, to the cache of a disk. `pin` also keeps it there.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
    underlay cache warm debian-12 --disk b\n  \
    underlay cache pin debian-12 --disk b --all")]
pub struct Bring {
    /// The image.
    #[arg(value_parser = super::name)]
    image: Name,
    /// The disk.
    #[arg(long, value_parser = super::name)]
    disk: Name,
    /// All of the image; otherwise what its recorded profile names.
    #[arg(long)]
    all: bool,
}

/// Keep an image in the cache of a disk no longer than its reads deserve.
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  underlay cache unpin debian-12 --disk b")]
pub struct Unpin {
    /// The image.
    #[arg(value_parser = super::name)]
    image: Name,
    /// The disk.
    #[arg(long, value_parser = super::name)]
    disk: Name,
}

impl Cache {
    pub(super) async fn run(self, setting: &Setting) -> Result<Outcome> {
        let client = setting.client()?;
        match self {
            Cache::List(List {}) => {
                let caches: Vec<CacheView> = client.get("/v1/caches").await?;
                setting.show(&caches, |caches| table(caches))?;
            }
            Cache::Inspect(Inspect { disk }) => {
                let path = format!("/v1/caches/{}", escape(disk.as_str()));
                let cache: CacheView = client.get(&path).await?;
                setting.show(&cache, details)?;
            }
            Cache::Clear(Clear { disk, image }) => {
                let request =
                    ClearCache { disk: disk.map(String::from), image: image.map(String::from) };
                let cleared: Cleared = client.post("/v1/promotion/clear", &request).await?;
                setting.show(&cleared, |it| format!("{} chunks are given up\n", it.chunks))?;
            }
            Cache::Pin(bring) => {
                let warming: Warming = client.post("/v1/promotion/pin", &request(&bring)).await?;
                setting.show(&warming, |it| begun(it, "pinned"))?;
            }
            Cache::Warm(bring) => {
                let warming: Warming = client.post("/v1/promotion/warm", &request(&bring)).await?;
                setting.show(&warming, |it| begun(it, "to be promoted"))?;
            }
            Cache::Unpin(Unpin { image, disk }) => {
                let request = UnpinRequest { image: image.into(), disk: disk.into() };
                let cache: CacheView = client.post("/v1/promotion/unpin", &request).await?;
                setting.show(&cache, details)?;
            }
        }
        Ok(Outcome::Well)
    }
}

fn request(bring: &Bring) -> Warm {
    let extent = if bring.all { Extent::Whole } else { Extent::Profile };
    Warm { image: bring.image.to_string(), disk: bring.disk.to_string(), extent }
}

fn begun(warming: &Warming, what: &str) -> String {
    let rate = size::format(warming.rate);
    let bytes = size::format(warming.bytes);
    format!("{} chunks ({bytes}) are {what}; at {rate} a second at most\n", warming.chunks)
}

/// The caches as a table.
pub fn table(caches: &[CacheView]) -> String {
    let mut table = Table::new(&[
        ("DISK", Side::Left),
        ("HOLDS", Side::Right),
        ("OF", Side::Right),
        ("IMAGES", Side::Right),
        ("PROMOTED", Side::Right),
        ("EVICTED", Side::Right),
        ("SAVED", Side::Right),
        ("STATE", Side::Left),
    ]);
    for cache in caches {
        table.row([
            cache.disk.to_string(),
            size::format(cache.stored_bytes),
            size::format(cache.limit_bytes),
            cache.images.iter().filter(|image| image.chunks > 0).count().to_string(),
            size::format(cache.figures.promoted_bytes),
            cache.figures.evicted.to_string(),
            format!("{:.1} s", cache.figures.saved_seconds),
            cache.off.clone().unwrap_or_else(|| "on".to_owned()),
        ]);
    }
    table.text("no disk that chunks could be promoted to")
}

fn details(cache: &CacheView) -> String {
    let figures = &cache.figures;
    let mut text = facts(&[
        ("disk", cache.disk.to_string()),
        ("state", cache.off.clone().unwrap_or_else(|| "on".to_owned())),
        (
            "holds",
            format!("{} of {}", size::format(cache.stored_bytes), size::format(cache.limit_bytes)),
        ),
        (
            "promoted",
            format!("{} chunks, {}", figures.promoted, size::format(figures.promoted_bytes)),
        ),
        ("evicted", format!("{} chunks", figures.evicted)),
        ("dropped", format!("{} doubts, {} failed", figures.dropped, figures.failed)),
        (
            "saved",
            format!(
                "{:.1} s of waiting, {:.1} ms a MiB written",
                figures.saved_seconds, figures.saved_ms_per_mib
            ),
        ),
    ]);
    let mut table = Table::new(&[
        ("IMAGE", Side::Left),
        ("COPY ON", Side::Left),
        ("CHUNKS", Side::Right),
        ("SIZE", Side::Right),
        ("PINNED", Side::Left),
        ("READS OF COPY", Side::Right),
        ("OF CACHE", Side::Right),
    ]);
    for image in &cache.images {
        table.row([
            image.image.clone(),
            image.copy.clone().unwrap_or_else(|| "-".to_owned()),
            image.chunks.to_string(),
            size::format(image.bytes),
            match image.pinned {
                Some(Extent::Whole) => "all".to_owned(),
                Some(Extent::Profile) => "profile".to_owned(),
                None => "-".to_owned(),
            },
            image.copy_reads.to_string(),
            image.cache_reads.to_string(),
        ]);
    }
    text.push('\n');
    text + &table.text("nothing is read from here")
}
