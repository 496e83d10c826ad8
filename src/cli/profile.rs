//! `underlay profile`: what replicas read of an image, recorded, so that it can be brought to a disk
//! before it is read there.

use clap::{Args, Subcommand};

use super::{
    Outcome, Setting,
    out::{self, Meter, Side, Table, facts},
    size,
};
use crate::{
    catalog::{Name, Profile as Record},
    control::{
        api::{Extent, ProfileView, RecordProfile, Removed, Warm, Warming},
        client::escape,
    },
    error::Result,
    units::CHUNK,
};

/// Record what a boot reads of an image, and warm other disks with it.
#[derive(Debug, Subcommand)]
pub enum Profile {
    Record(RecordCommand),
    List(List),
    Inspect(Inspect),
    Apply(Apply),
    #[command(name = "remove", visible_alias = "rm")]
    Remove(Remove),
}

/// Record which chunks of an image its replicas read, for some time or until interrupted.
#[derive(Debug, Args)]
#[command(
    name = "record",
    after_help = "Example: record a boot\n  \
    underlay profile record debian-12 --seconds 60 &\n  \
    qemu-system-x86_64 … nbd+unix:///replica/vm1 …"
)]
pub struct RecordCommand {
    /// The image.
    #[arg(value_parser = super::name)]
    image: Name,
    /// How long.
    #[arg(long, default_value_t = 60)]
    seconds: u64,
}

/// List the recorded profiles.
#[derive(Debug, Args)]
#[command(visible_alias = "ls", after_help = "Example:\n  underlay profile list")]
pub struct List {}

/// Show an image's profile.
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  underlay profile inspect debian-12 --json")]
pub struct Inspect {
    /// The image.
    #[arg(value_parser = super::name)]
    image: Name,
}

/// Bring what a profile names to a disk's cache, in the order it was read: the same as `cache warm`.
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  underlay profile apply debian-12 --disk b --disk c")]
pub struct Apply {
    /// The image.
    #[arg(value_parser = super::name)]
    image: Name,
    /// The disks.
    #[arg(long, required = true, value_parser = super::name)]
    disk: Vec<Name>,
}

/// Forget an image's profile.
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  underlay profile remove debian-12")]
pub struct Remove {
    /// The image.
    #[arg(value_parser = super::name)]
    image: Name,
}

impl Profile {
    pub(super) async fn run(self, setting: &Setting) -> Result<Outcome> {
        let client = setting.client()?;
        match self {
            Profile::Record(RecordCommand { image, seconds }) => {
                let path = format!("{}/record", path_of(&image));
                let mut meter = Meter::for_people();
                let show = |progress| meter.show(progress);
                let profile: ProfileView =
                    client.post_streamed(&path, &RecordProfile { seconds }, show).await?;
                drop(meter);
                setting.show(&profile, |it| {
                    format!("image {}: {} chunks ({}) were read\n", it.image, it.chunks, bytes(it))
                })?;
            }
            Profile::List(List {}) => {
                let profiles: Vec<ProfileView> = client.get("/v1/profiles").await?;
                setting.show(&profiles, |profiles| table(profiles))?;
            }
            Profile::Inspect(Inspect { image }) => {
                let profile: Record = client.get(&path_of(&image)).await?;
                setting.show(&profile, details)?;
            }
            Profile::Apply(Apply { image, disk }) => {
                let mut all = Vec::new();
                for disk in disk {
                    let extent = Extent::Profile;
                    let warm = Warm { image: image.to_string(), disk: disk.to_string(), extent };
                    let warming: Warming = client.post("/v1/promotion/warm", &warm).await?;
                    all.push((disk, warming));
                }
                let warmings: Vec<&Warming> = all.iter().map(|(_, warming)| warming).collect();
                setting.show(&warmings, |_| {
                    let line = |(disk, it): &(Name, Warming)| {
                        format!("disk {disk}: {} chunks ({})\n", it.chunks, size::format(it.bytes))
                    };
                    all.iter().map(line).collect()
                })?;
            }
            Profile::Remove(Remove { image }) => {
                let removed: Removed = client.delete(&path_of(&image)).await?;
                setting.show(&removed, |it| super::removed("the profile of image", it))?;
            }
        }
        Ok(Outcome::Well)
    }
}

fn path_of(image: &Name) -> String {
    format!("/v1/profiles/{}", escape(image.as_str()))
}

fn bytes(profile: &ProfileView) -> String {
    size::format(profile.bytes)
}

fn table(profiles: &[ProfileView]) -> String {
    let mut table = Table::new(&[
        ("IMAGE", Side::Left),
        ("CHUNKS", Side::Right),
        ("SIZE", Side::Right),
        ("RECORDED", Side::Left),
    ]);
    for profile in profiles {
        table.row([
            profile.image.clone(),
            profile.chunks.to_string(),
            bytes(profile),
            out::date(profile.created),
        ]);
    }
    table.text("no profiles yet; record one with: underlay profile record IMAGE")
}

fn details(profile: &Record) -> String {
    let chunks: u64 = profile.runs.iter().map(|(_, count)| count).sum();
    let run = |(first, count): &(u64, u64)| match count {
        1 => first.to_string(),
        _ => format!("{first}-{}", first + count - 1),
    };
    let runs: Vec<String> = profile.runs.iter().map(run).collect();
    facts(&[
        ("image", profile.digest.to_string()),
        ("recorded", out::date(profile.created)),
        ("chunks", format!("{chunks} ({})", size::format(chunks * CHUNK))),
        ("in order", runs.join(" ")),
    ])
}
