//! `underlay demo`: the main job in one command, in a directory of its own.
//!
//! Everything goes the way that it goes in earnest: the service runs with its sockets, the commands
//! go through its API, guests' reads and writes through NBD. Only the process is one.

mod disk_image;
mod nbd;
mod stage;

use std::{
    fs,
    path::{Path, PathBuf},
    time::Instant,
};

use clap::Args;
use disk_image::Content;
use serde::Serialize;
use stage::{Place, Stage};

use super::{
    Outcome, Setting,
    out::{self, Format, Meter, Side, Table},
    size,
};
use crate::{
    catalog::DiskStatus,
    control::{
        api::{
            AddDisk, CreateReplica, FileSource, ImageView, ImportImage, ImportSource, ReplicaView,
            Status, Verification,
        },
        socket,
    },
    error::{Context, Error, Kind, Result},
};

/// The disks, and the replica on each.
const DISKS: [(&str, &str); 3] = [("a", "vm1"), ("b", "vm2"), ("c", "vm3")];
/// Bytes that a replica is read back in at a time.
const STEP: usize = 4 << 20;
/// Where each replica is written, as parts of a thousand of its size, and how many bytes: whole
/// blocks, parts of blocks, and across the borders of chunks.
const WRITES: [(u64, usize); 6] =
    [(0, 512), (100, 4096), (250, 100_000), (333, 3), (500, 1 << 20), (875, 4095)];

/// See the main job at once: three disks, an image, a replica on each disk, written over NBD.
///
/// Works in a directory of its own below the one for temporary files (TMPDIR), needs no privilege,
/// and leaves nothing behind unless told to. Without IMAGE it makes a small one.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
    underlay demo\n  \
    underlay demo debian-12-genericcloud-amd64.qcow2 --keep")]
pub struct Demo {
    /// An image of yours: raw, qcow2 or vmdk, packed or not.
    image: Option<PathBuf>,
    /// Keep the directory, to go on with it.
    #[arg(long)]
    keep: bool,
}

/// What the demonstration showed.
#[derive(Debug, Serialize)]
struct Report {
    directory: PathBuf,
    kept: bool,
    image: ImageView,
    image_made_of: Option<&'static str>,
    import_ms: f64,
    replicas: Vec<Written>,
    /// Bytes that are stored, in all.
    stored_bytes: u64,
    /// Bytes of the image's one copy.
    image_bytes: u64,
    /// Bytes of a copy on each disk.
    per_disk_bytes: u64,
    saved_bytes: u64,
    /// Every replica read back what was written to it, and what the image holds elsewhere.
    isolated: bool,
    /// The image is bit for bit what was imported.
    image_unchanged: bool,
    commands: Vec<String>,
}

/// One replica, and what was done with it.
#[derive(Debug, Serialize)]
struct Written {
    name: String,
    disk: String,
    created_in_ms: f64,
    written_bytes: u64,
    stored_bytes: u64,
}

impl Demo {
    pub(super) async fn run(self, setting: &Setting) -> Result<Outcome> {
        let image = match &self.image {
            Some(path) => Some(
                fs::canonicalize(path)
                    .context(|| format!("opening {} (the demo takes a file)", path.display()))?,
            ),
            None => None,
        };
        socket::close_to_the_world();
        let place = Place::new(self.keep)?;
        let told = Told { format: setting.format };
        let stage = Stage::start(place).await?;
        // An interrupt ends the demonstration, not the cleaning up after it.
        let shown = tokio::select! {
            shown = show(&stage, image, &told) => shown,
            _ = tokio::signal::ctrl_c() => {
                Err(Error::new(Kind::Unavailable, "the demo was interrupted"))
            }
        };
        let stopped = stage.stop().await;
        let report = shown?;
        stopped?;
        setting.show(&report, text)?;
        let well = report.isolated && report.image_unchanged;
        Ok(if well { Outcome::Well } else { Outcome::Amiss })
    }
}

/// Says what is being done, to people.
struct Told {
    format: Format,
}

impl Told {
    fn step(&self, text: &str) -> Result<()> {
        match self.format {
            Format::Human => out::print(&format!("{}\n", out::plain(text))),
            Format::Json => Ok(()),
        }
    }
}

async fn show(stage: &Stage, image: Option<PathBuf>, told: &Told) -> Result<Report> {
    told.step(&format!("in {}", stage.place.path.display()))?;
    for (disk, _) in DISKS {
        let path = stage.place.join(&format!("disk-{disk}"));
        fs::create_dir(&path).context(|| format!("making {}", path.display()))?;
        let add = AddDisk {
            path,
            name: Some(disk.to_owned()),
            tier: None,
            pool: false,
            cache_bytes: None,
        };
        let _: DiskStatus = stage.client.post("/v1/disks", &add).await?;
    }
    told.step("disks a, b and c are added (directories here; mount points in earnest)")?;

    let (source, made_of) = match image {
        Some(path) => (path, None),
        None => {
            let path = stage.place.join("demo.raw");
            let (file, scratch) = (path.clone(), stage.place.path.clone());
            let making = move || disk_image::make(&file, &scratch);
            let content = crate::control::service::blocking(making).await?;
            let content = match content {
                Content::Ext4 => "GPT, ext4",
                Content::Pattern => "GPT, a pattern (mke2fs is not installed)",
            };
            let what = format!("image made: {}, {content}", size::format(disk_image::SIZE));
            told.step(&what)?;
            (path, Some(content))
        }
    };
    let started = Instant::now();
    let image = import(stage, &source).await?;
    let import_ms = milliseconds(started);
    told.step(&format!(
        "image base: {} imported to disk {} in {import_ms:.0} ms, {} stored",
        size::format(image.status.size),
        image.status.copies.first().map_or_else(String::new, |copy| copy.disk.to_string()),
        size::format(image.status.stored_bytes)
    ))?;

    let mut replicas = Vec::new();
    for (disk, name) in DISKS {
        let create = CreateReplica {
            name: name.to_owned(),
            image: "base".to_owned(),
            disk: disk.to_owned(),
            size: None,
        };
        let replica: ReplicaView = stage.client.post("/v1/replicas", &create).await?;
        let took = replica.created_in_ms.unwrap_or_default();
        told.step(&format!("replica {name} on disk {disk}: created in {took:.1} ms"))?;
        replicas.push(Written {
            name: name.to_owned(),
            disk: disk.to_owned(),
            created_in_ms: took,
            written_bytes: 0,
            stored_bytes: 0,
        });
    }
    for (number, replica) in replicas.iter_mut().enumerate() {
        replica.written_bytes = write(stage, &replica.name, number as u64).await?;
        let sum = size::format(replica.written_bytes);
        told.step(&format!("replica {}: {sum} written over NBD, flushed", replica.name))?;
    }
    let mut isolated = true;
    for (number, replica) in replicas.iter().enumerate() {
        let right = compare(stage, &replica.name, number as u64).await?;
        isolated &= right;
        let verdict =
            if right { "its own writes, the image elsewhere" } else { "NOT AS IT SHOULD BE" };
        told.step(&format!("replica {}: read back whole: {verdict}", replica.name))?;
    }
    let verified: Verification =
        stage.client.post_streamed("/v1/images/base/verify", &(), |_| {}).await?;
    let image_unchanged = verified.sound;
    let verdict = if image_unchanged { "unchanged, every checksum" } else { "CHANGED" };
    told.step(&format!("image base: {verdict}"))?;

    let status: Status = stage.client.get("/v1/status").await?;
    for replica in &mut replicas {
        let shown = status.replicas.iter().find(|it| it.status.name.as_str() == replica.name);
        replica.stored_bytes = shown.map_or(0, |it| it.status.stored_bytes);
    }
    Ok(Report {
        directory: stage.place.path.clone(),
        kept: stage.place.keep,
        image,
        image_made_of: made_of,
        import_ms,
        replicas,
        stored_bytes: status.node.stored_bytes,
        image_bytes: status.node.image_bytes,
        per_disk_bytes: status.node.per_disk_bytes,
        saved_bytes: status.node.saved_bytes,
        isolated,
        image_unchanged,
        commands: if stage.place.keep { commands(&stage.place.path) } else { Vec::new() },
    })
}

async fn import(stage: &Stage, path: &Path) -> Result<ImageView> {
    use std::os::unix::fs::MetadataExt;
    let metadata = fs::metadata(path).context(|| format!("examining {}", path.display()))?;
    let source =
        FileSource { path: path.to_owned(), device: metadata.dev(), inode: metadata.ino() };
    let request = ImportImage {
        name: "base".to_owned(),
        source: ImportSource::File(source),
        disk: None,
        format: None,
        sha256: None,
    };
    let mut meter = Meter::for_people();
    stage.client.post_streamed("/v1/images", &request, |progress| meter.show(progress)).await
}

/// What is written to a replica: offsets and bytes, different for each.
fn writes(number: u64, size: u64) -> Vec<(u64, Vec<u8>)> {
    let mut random = fastrand::Rng::with_seed(number + 1);
    let mut writes = Vec::new();
    for (thousandths, len) in WRITES {
        let offset = size / 1000 * thousandths;
        let len = len.min(usize::try_from(size - offset).unwrap_or(len));
        let mut bytes = vec![0; len];
        random.fill(&mut bytes);
        writes.push((offset, bytes));
    }
    writes
}

async fn write(stage: &Stage, replica: &str, number: u64) -> Result<u64> {
    let mut guest = stage.attach(&format!("replica/{replica}")).await?;
    let mut sum = 0;
    for (offset, bytes) in writes(number, guest.size()) {
        guest.write(offset, &bytes).await?;
        sum += bytes.len() as u64;
    }
    guest.flush().await?;
    guest.close().await?;
    Ok(sum)
}

/// Whether a replica holds what was written to it, and the image's content everywhere else.
async fn compare(stage: &Stage, replica: &str, number: u64) -> Result<bool> {
    let mut guest = stage.attach(&format!("replica/{replica}")).await?;
    let mut base = stage.attach("image/base").await?;
    let writes = writes(number, guest.size());
    let (mut found, mut wanted) = (vec![0; STEP], vec![0; STEP]);
    let mut offset = 0;
    let mut right = guest.size() == base.size();
    while right && offset < guest.size() {
        let len = STEP.min(usize::try_from(guest.size() - offset).unwrap_or(STEP));
        guest.read(offset, &mut found[..len]).await?;
        base.read(offset, &mut wanted[..len]).await?;
        let end = offset + len as u64;
        for (at, bytes) in &writes {
            let (from, to) = ((*at).max(offset), (at + bytes.len() as u64).min(end));
            if from < to {
                let ours = &bytes[(from - at) as usize..(to - at) as usize];
                wanted[(from - offset) as usize..(to - offset) as usize].copy_from_slice(ours);
            }
        }
        right = found[..len] == wanted[..len];
        offset = end;
    }
    guest.close().await?;
    base.close().await?;
    Ok(right)
}

/// How to go on with what was kept.
fn commands(place: &Path) -> Vec<String> {
    let program = std::env::args().next().unwrap_or_else(|| "underlay".to_owned());
    let place = place.display();
    let uri = format!("nbd+unix:///replica/vm1?socket={place}/nbd.sock");
    vec![
        format!(
            "{program} serve --state {place}/state --socket {place}/underlay.sock \
             --nbd-socket {place}/nbd.sock"
        ),
        format!("UNDERLAY_SOCKET={place}/underlay.sock {program} status"),
        format!("nbdinfo '{uri}'"),
        format!("qemu-system-x86_64 -m 1G -nographic -drive 'file={uri},format=raw,if=virtio'"),
        format!("rm -r {place}"),
    ]
}

fn text(report: &Report) -> String {
    let mut table = Table::new(&[
        ("REPLICA", Side::Left),
        ("DISK", Side::Left),
        ("CREATED IN", Side::Right),
        ("WRITTEN", Side::Right),
        ("STORED", Side::Right),
    ]);
    for replica in &report.replicas {
        table.row([
            replica.name.clone(),
            replica.disk.clone(),
            format!("{:.1} ms", replica.created_in_ms),
            size::format(replica.written_bytes),
            size::format(replica.stored_bytes),
        ]);
    }
    let mut text = format!("\n{}\n", table.text(""));
    let share = report.image_bytes as f64 * 100.0 / report.per_disk_bytes.max(1) as f64;
    text.push_str(&out::facts(&[
        ("a copy per disk would store", size::format(report.per_disk_bytes)),
        ("one shared copy stores", format!("{} ({share:.1} %)", size::format(report.image_bytes))),
        ("saved", size::format(report.saved_bytes)),
        ("image and replicas together", size::format(report.stored_bytes)),
    ]));
    match report.isolated && report.image_unchanged {
        true => text.push_str("\nreplicas are isolated, the image is unchanged\n"),
        false => text.push_str("\nTHE REPLICAS OR THE IMAGE ARE NOT AS THEY SHOULD BE\n"),
    }
    if report.kept {
        text.push_str("\nkept; to go on:\n");
        for command in &report.commands {
            text.push_str(&format!("  {command}\n"));
        }
    } else {
        text.push_str("cleaned up; with --keep it stays, to boot from\n");
    }
    text
}

fn milliseconds(since: Instant) -> f64 {
    since.elapsed().as_secs_f64() * 1000.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn writes_differ_and_fit_any_size() {
        for size in [512, 4096, 1 << 20, 10 << 30] {
            let (one, other) = (writes(0, size), writes(1, size));
            assert_ne!(one, other);
            assert!(one.iter().all(|(offset, bytes)| offset + bytes.len() as u64 <= size));
        }
    }
}
