//! `underlay image`: images, from wherever they come.
//!
//! A file is read by the daemon where the daemon may (it is ours, and it sees the same file), and
//! sent to it otherwise: nobody reads through the daemon what he could not read himself.

use std::{
    fs::File,
    io::Read,
    os::unix::fs::{FileTypeExt, MetadataExt},
    path::{Path, PathBuf},
};

use clap::{Args, Subcommand, ValueEnum};
use tokio::sync::mpsc;

use super::{
    Outcome, Setting,
    export::Target,
    out,
    out::{Meter, Side, Table, facts},
    size,
};
use crate::{
    catalog::{COPIES_MAX, CopyState, Name, UserState},
    control::{
        api::{
            FileSource, ImageView, ImportImage, ImportSource, MakeCopies, Removed, Verification,
        },
        client::{Client, Upload, escape},
    },
    error::{Context, Error, Kind, Result},
    image::Source,
};

/// Bytes that are sent at a time.
const PIECE: usize = 256 << 10;
/// Pieces that are read ahead.
const AHEAD: usize = 4;

/// Import, verify and remove images, and look at them.
#[derive(Debug, Subcommand)]
pub enum Image {
    Import(Import),
    List(List),
    Inspect(Inspect),
    Copies(Copies),
    Copy(CopyTo),
    Uncopy(Uncopy),
    Set(Set),
    Verify(Verify),
    Export(Export),
    Rm(Rm),
}

/// Import an image: a file, `-` for standard input, or an http(s) URL.
///
/// raw, qcow2 and vmdk, also packed by gzip, xz or zstd. The image becomes visible when it is whole
/// and verified; an import that is interrupted leaves nothing behind.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
    underlay image import debian-12.qcow2 --name debian-12\n  \
    underlay image import https://example.org/disk.raw.xz --name disk --sha256 HEX\n  \
    xz -dc disk.raw.xz | underlay image import - --name disk --format raw")]
pub struct Import {
    /// A path, `-`, or a URL.
    source: String,
    /// What to call the image; clients find it as image/NAME.
    #[arg(long, value_parser = super::name)]
    name: Name,
    /// The disk for the copy; otherwise a pool disk, or the one with the most room.
    #[arg(long, value_parser = super::name)]
    disk: Option<Name>,
    /// What the source is, if it should not be found out.
    #[arg(long)]
    format: Option<Format>,
    /// SHA-256 that the source must have, as it is given (packed, if it is).
    #[arg(long, value_name = "HEX", value_parser = sha256)]
    sha256: Option<String>,
    /// How many copies are wanted, each on a disk that doesn't fail together with another's.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=i64::from(COPIES_MAX)))]
    copies: Option<u32>,
}

/// A format, as it is written on the command line.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Format {
    Auto,
    Raw,
    Qcow2,
    Vmdk,
}

/// List the images.
#[derive(Debug, Args)]
#[command(visible_alias = "ls", after_help = "Example:\n  underlay image list --json")]
pub struct List {}

/// Show one image: where it is, what it stores, who stands on it.
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  underlay image inspect debian-12")]
pub struct Inspect {
    /// The image's name or digest.
    #[arg(value_parser = super::name)]
    name: Name,
}

/// Show the copies of an image: where they are, whether they serve, who stands on them.
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  underlay image copies debian-12")]
pub struct Copies {
    /// The image's name or digest.
    #[arg(value_parser = super::name)]
    name: Name,
}

/// Make one more copy of an image, while it is in use; from then on so many copies are kept. Interrupted, it
/// goes on the next time from where it was, for a day.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
    underlay image copy debian-12 --to nvme1\n  \
    underlay image copy debian-12 --to nvme1 --rate 50M")]
pub struct CopyTo {
    /// The image's name or digest.
    #[arg(value_parser = super::name)]
    name: Name,
    /// The disk for it.
    #[arg(long, value_parser = super::name)]
    to: Name,
    /// Also on a disk that fails together with one that has a copy.
    #[arg(long)]
    force: bool,
    /// Bytes a second that are copied, at most, as 50M; no bound otherwise.
    #[arg(long, value_name = "SIZE", value_parser = super::bytes)]
    rate: Option<u64>,
}

/// Give up the copy of an image on a disk, or what is there of one that was interrupted. The last one is refused.
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  underlay image uncopy debian-12 --from nvme1 --force")]
pub struct Uncopy {
    /// The image's name or digest.
    #[arg(value_parser = super::name)]
    name: Name,
    /// The disk.
    #[arg(long, value_parser = super::name)]
    from: Name,
    /// Also if fewer are left than are wanted: so many are wanted from then on.
    #[arg(long)]
    force: bool,
}

/// Set how many copies of an image are kept; those that are missing are made now.
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  underlay image set debian-12 --copies 2")]
pub struct Set {
    /// The image's name or digest.
    #[arg(value_parser = super::name)]
    name: Name,
    /// How many copies are wanted, each on a disk that doesn't fail together with another's.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=i64::from(COPIES_MAX)))]
    copies: u32,
}

/// Read every copy of an image whole, compare it with its checksums, and repair it from the others. Exit
/// code 1 if a copy is damaged for good.
#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  underlay image verify debian-12\n  underlay image verify --all --json"
)]
pub struct Verify {
    /// The image's name or digest.
    #[arg(value_parser = super::name, required_unless_present = "all")]
    name: Option<Name>,
    /// All images, one after the other.
    #[arg(long, conflicts_with = "name")]
    all: bool,
}

/// Write the content of an image to a file.
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  \
    underlay image export debian-12 debian-12.qcow2 --format qcow2")]
pub struct Export {
    /// The image's name or digest.
    #[arg(value_parser = super::name)]
    name: Name,
    #[command(flatten)]
    target: Target,
}

/// Remove an image's name; with its last name, the image. Refused while replicas stand on it.
#[derive(Debug, Args)]
#[command(visible_alias = "remove", after_help = "Example:\n  underlay image rm debian-12")]
pub struct Rm {
    /// The image's name or digest.
    #[arg(value_parser = super::name)]
    name: Name,
}

impl Image {
    pub(super) async fn run(self, setting: &Setting) -> Result<Outcome> {
        let client = setting.client()?;
        match self {
            Image::Import(import) => {
                let mut image = import.run(&client).await?;
                if let Some(count) = import.copies {
                    let wish = MakeCopies { copies: Some(count), ..MakeCopies::default() };
                    image = make_copies(&client, &import.name, &wish).await?;
                }
                setting.show(&image, |image| {
                    format!(
                        "image {} is ready: {}, {} stored, digest {}\n",
                        super::join(&image.status.names),
                        size::format(image.status.size),
                        size::format(image.status.stored_bytes),
                        image.status.digest
                    )
                })?;
            }
            Image::List(List {}) => {
                let images: Vec<ImageView> = client.get("/v1/images").await?;
                setting.show(&images, |images| table(images))?;
            }
            Image::Inspect(Inspect { name }) => {
                let image: ImageView = client.get(&path_of(&name)).await?;
                setting.show(&image, details)?;
            }
            Image::Copies(Copies { name }) => {
                let image: ImageView = client.get(&path_of(&name)).await?;
                setting.show(&image, copies)?;
            }
            Image::Copy(CopyTo { name, to, force, rate }) => {
                let to = Some(to.to_string());
                let wish = MakeCopies { copies: None, to, force, rate_bytes: rate };
                setting.show(&make_copies(&client, &name, &wish).await?, copies)?;
            }
            Image::Set(Set { name, copies: count }) => {
                let wish = MakeCopies { copies: Some(count), ..MakeCopies::default() };
                setting.show(&make_copies(&client, &name, &wish).await?, copies)?;
            }
            Image::Uncopy(Uncopy { name, from, force }) => {
                let path = format!("{}/copies/{from}?force={force}", path_of(&name));
                let image: ImageView = client.delete(&path).await?;
                setting.show(&image, copies)?;
            }
            Image::Verify(Verify { name, .. }) => {
                let names = match name {
                    Some(name) => vec![name],
                    None => {
                        let images: Vec<ImageView> = client.get("/v1/images").await?;
                        let named = images.iter().map(|image| match image.status.names.first() {
                            Some(name) => Ok(name.clone()),
                            None => image.status.digest.to_string().parse(),
                        });
                        named.collect::<Result<_>>()?
                    }
                };
                let mut sound = true;
                for name in names {
                    let path = format!("{}/verify", path_of(&name));
                    let mut meter = Meter::new();
                    let found: Verification =
                        client.post_streamed(&path, &(), |progress| meter.show(progress)).await?;
                    drop(meter);
                    setting.show(&found, verdict)?;
                    sound &= found.sound;
                }
                return Ok(if sound { Outcome::Well } else { Outcome::Amiss });
            }
            Image::Export(Export { name, target }) => {
                target.fetch(&client, &format!("{}/content", path_of(&name)), setting).await?;
            }
            Image::Rm(Rm { name }) => {
                let removed: Removed = client.delete(&path_of(&name)).await?;
                setting.show(&removed, |it| super::removed("image", it))?;
            }
        }
        Ok(Outcome::Well)
    }
}

async fn make_copies(client: &Client, name: &Name, wish: &MakeCopies) -> Result<ImageView> {
    let mut meter = Meter::new();
    let path = format!("{}/copies", path_of(name));
    client.post_streamed(&path, wish, |progress| meter.show(progress)).await
}

fn copies(image: &ImageView) -> String {
    let status = &image.status;
    let mut table = Table::new(&[
        ("DISK", Side::Left),
        ("STATE", Side::Left),
        ("STORED", Side::Right),
        ("PATH", Side::Left),
    ]);
    for copy in &status.copies {
        let state = match (copy.state, &copy.reason) {
            (CopyState::Ready, _) => "ready".to_owned(),
            (CopyState::Failed, Some(reason)) => format!("failed: {reason}"),
            (CopyState::Failed, None) => "failed".to_owned(),
        };
        table.row([
            copy.disk.to_string(),
            state,
            size::format(copy.stored_bytes),
            copy.path.display().to_string(),
        ]);
    }
    let unknown = || "-".to_owned();
    for making in &image.making {
        let (done, all) = (size::format(making.done_bytes), size::format(making.total_bytes));
        let state = format!("being made: {done} of {all} ({})", making.why);
        table.row([making.disk.to_string(), state, unknown(), unknown()]);
    }
    for unfinished in &status.unfinished {
        let done = size::format(unfinished.done_bytes);
        let state = format!("interrupted at {done}: `underlay image copy` goes on");
        let stored = size::format(unfinished.stored_bytes);
        table.row([unfinished.disk.to_string(), state, stored, unknown()]);
    }
    let wanted = match status.wanted_copies {
        Some(count) => format!("{count} wanted"),
        None => "as many wanted as the node's default says".to_owned(),
    };
    let users: Vec<_> =
        status.users.iter().map(|user| format!("{} on {}", user.name, user.disk)).collect();
    let stand = match users.as_slice() {
        [] => "no replica stands on it".to_owned(),
        users => format!("replicas: {}", users.join(", ")),
    };
    format!("{}{wanted}; {stand}\n", table.text("no copy is there"))
}

impl Import {
    async fn run(&self, client: &Client) -> Result<ImageView> {
        let path = match Source::parse(&self.source)? {
            Source::Url(url) => return self.ask(client, ImportSource::Url(url)).await,
            Source::Path(path) => path,
            _ => return self.send(client, std::io::stdin(), "standard input", None).await,
        };
        let shown = path.display().to_string();
        let file = File::open(&path).context(|| format!("opening {shown}"))?;
        let metadata = file.metadata().context(|| format!("examining {shown}"))?;
        if metadata.is_dir() {
            let what = format!("{shown} is a directory: give an image file, a device, a URL or -");
            return Err(Error::new(Kind::Invalid, what));
        }
        if metadata.is_file() || metadata.file_type().is_block_device() {
            let source = FileSource {
                path: absolute(&path)?,
                device: metadata.dev(),
                inode: metadata.ino(),
            };
            match self.ask(client, ImportSource::File(source)).await {
                // The daemon may not read it for us, or sees another file at that path.
                Err(error) if matches!(error.kind(), Kind::Permission | Kind::NotFound) => {}
                answer => return answer,
            }
        }
        let length = metadata.is_file().then_some(metadata.len());
        self.send(client, file, &shown, length).await
    }

    /// Has the daemon read the source.
    async fn ask(&self, client: &Client, source: ImportSource) -> Result<ImageView> {
        let request = ImportImage {
            name: self.name.to_string(),
            source,
            disk: self.disk.as_ref().map(Name::to_string),
            format: self.format(),
            sha256: self.sha256.clone(),
        };
        let mut meter = Meter::new();
        client.post_streamed("/v1/images", &request, |progress| meter.show(progress)).await
    }

    /// Sends the content to the daemon.
    async fn send(
        &self,
        client: &Client,
        content: impl Read + Send + 'static,
        called: &str,
        length: Option<u64>,
    ) -> Result<ImageView> {
        let mut path = format!("{}?source={}", path_of(&self.name), escape(called));
        let disk = self.disk.as_ref().map(Name::to_string);
        for (key, value) in
            [("disk", disk), ("format", self.format()), ("sha256", self.sha256.clone())]
        {
            if let Some(value) = value {
                path.push_str(&format!("&{key}={}", escape(&value)));
            }
        }
        let mut meter = Meter::new();
        let upload = Upload { content: read_ahead(content), length };
        client.upload(&path, upload, |progress| meter.show(progress)).await
    }

    fn format(&self) -> Option<String> {
        let format = self.format.filter(|format| *format != Format::Auto)?;
        Some(format.to_possible_value()?.get_name().to_owned())
    }
}

/// Reads on a thread of its own, a few pieces ahead, until the end or nobody wants any more.
pub(super) fn read_ahead(
    mut content: impl Read + Send + 'static,
) -> mpsc::Receiver<std::io::Result<Vec<u8>>> {
    let (sender, pieces) = mpsc::channel(AHEAD);
    std::thread::spawn(move || {
        loop {
            let mut piece = vec![0; PIECE];
            let piece = match content.read(&mut piece) {
                Ok(0) => return,
                Ok(count) => {
                    piece.truncate(count);
                    Ok(piece)
                }
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
                Err(error) => Err(error),
            };
            let failed = piece.is_err();
            if sender.blocking_send(piece).is_err() || failed {
                return;
            }
        }
    });
    pieces
}

fn absolute(path: &Path) -> Result<PathBuf> {
    std::path::absolute(path).context(|| format!("the path {}", path.display()))
}

/// A SHA-256 from the command line, for clap.
fn sha256(text: &str) -> Result<String> {
    if text.len() == 64 && text.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return Ok(text.to_ascii_lowercase());
    }
    Err(Error::new(Kind::Invalid, "a SHA-256 is written as 64 hexadecimal digits"))
}

fn path_of(name: &Name) -> String {
    format!("/v1/images/{}", escape(name.as_str()))
}

/// The images as a table.
pub fn table(images: &[ImageView]) -> String {
    let mut table = Table::new(&[
        ("IMAGE", Side::Left),
        ("DIGEST", Side::Left),
        ("SIZE", Side::Right),
        ("STORED", Side::Right),
        ("ON", Side::Left),
        ("REPLICAS", Side::Right),
        ("CREATED", Side::Left),
    ]);
    for ImageView { status, .. } in images {
        let disks: Vec<_> = status.copies.iter().map(|copy| &copy.disk).collect();
        table.row([
            super::join(&status.names),
            status.digest.to_string()[..12].to_owned(),
            size::format(status.size),
            size::format(status.stored_bytes),
            super::join(&disks),
            status.users.len().to_string(),
            out::date(status.created),
        ]);
    }
    table.text("no images yet; import one with: underlay image import SOURCE --name NAME")
}

fn details(image: &ImageView) -> String {
    let status = &image.status;
    let copy = |copy: &crate::catalog::CopyStatus| {
        let state = match copy.state {
            CopyState::Ready => String::new(),
            CopyState::Failed => {
                format!(" failed: {}", copy.reason.as_deref().unwrap_or("reason unknown"))
            }
        };
        format!(
            "disk {}: {}, {}{state}",
            copy.disk,
            copy.path.display(),
            size::format(copy.stored_bytes)
        )
    };
    let user = |user: &crate::catalog::ImageUser| {
        let state = match user.state {
            UserState::Present => "",
            UserState::Away => " (its disk is not there)",
            UserState::Leaked => " (not there any more; see underlay fsck)",
        };
        format!("{} on disk {}{state}", user.name, user.disk)
    };
    let mut pairs = vec![
        ("names", super::join(&status.names)),
        ("digest", status.digest.to_string()),
        ("size", format!("{} ({} bytes)", size::format(status.size), status.size)),
        ("stored", size::format(status.stored_bytes)),
        ("copies", status.copies.iter().map(copy).collect::<Vec<_>>().join("\n")),
        ("replicas", status.users.iter().map(user).collect::<Vec<_>>().join("\n")),
        ("created", out::date(status.created)),
        ("source", out::plain(&status.source)),
    ];
    if let Some(sha256) = &status.source_sha256 {
        pairs.push(("source SHA-256", sha256.to_string()));
    }
    if let Some(name) = status.names.first() {
        pairs.push(("export", format!("image/{name}")));
    }
    if !image.clients.is_empty() {
        pairs.push(("clients", image.clients.join("\n")));
    }
    facts(&pairs)
}

fn verdict(found: &Verification) -> String {
    let mut text = String::new();
    for copy in &found.copies {
        let what = format!("image {} on disk {}", found.image, copy.disk);
        let chunks: Vec<_> = copy.bad_chunks.iter().take(16).map(u64::to_string).collect();
        let more = if copy.bad > 16 { ", …" } else { "" };
        let which = format!("{} of {} chunks", copy.bad, found.chunks);
        let named = format!("chunk {}{more}", chunks.join(", "));
        text += &match (copy.sound, copy.bad, &copy.error) {
            (true, 0, _) => format!("{what} is what was imported: {} chunks\n", found.chunks),
            (true, ..) => format!("{what} was damaged and is repaired: {which} ({named})\n"),
            (false, 0, Some(error)) => format!("{what} could not be verified: {error}\n"),
            (false, ..) => format!(
                "{what} is damaged: {which} differ ({named}), {} were repaired: nothing else has the \
                 others; import it anew under another name, and move its replicas' data to replicas of \
                 that\n",
                copy.repaired
            ),
        };
    }
    text + &format!("{} read\n", size::format(found.bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn content_is_read_to_its_end() {
        let content: Vec<u8> = (0..PIECE * 9 + 5).map(|i| (i % 251) as u8).collect();
        let mut pieces = read_ahead(std::io::Cursor::new(content.clone()));
        let mut got = Vec::new();
        while let Some(piece) = pieces.recv().await {
            got.extend(piece.unwrap());
        }
        assert!(got == content);
    }

    #[test]
    fn digests_are_checked_before_anything_is_sent() {
        assert!(sha256(&"A".repeat(64)).is_ok_and(|hex| hex == "a".repeat(64)));
        assert!(sha256("00").is_err() && sha256(&"g".repeat(64)).is_err());
    }
}
