//! Exports as block devices of this node's kernel: made, found again after a restart, handed over,
//! removed.
//!
//! Invariants:
//! - An attachment is recorded before its device is made, and until the device is gone: whatever
//!   ends this process, the next one finds every device that it left.
//! - An attachment holds its export open: nobody can remove what the kernel may be writing to.
//! - A device whose export can't be opened waits, it does not fail: its requests are served when the
//!   disk is back and the daemon has restarted, or the attachment is asked for again.

use std::{
    collections::BTreeMap,
    fs, io,
    path::{Path, PathBuf},
    sync::{Arc, PoisonError},
};

use tokio::sync::Mutex;
use uuid::Uuid;

use crate::{
    blockdev::{
        nbd::Export,
        ublk::{self, BlockDevice, Mode, Options, Stop, device::Found},
    },
    catalog::{Attachment, Name, Node, Target, Via},
    control::{
        api::{Attach, AttachmentView},
        exports::{Exports, IMAGE, REPLICA},
        service::blocking,
    },
    error::{Context, Error, Kind, Result},
    io::Rings,
};

/// Where links to the devices are made.
const LINKS: &str = "/dev/underlay";
/// Numbers that are tried for a new device.
const NUMBERS: u32 = 4096;

/// The table of attachments.
pub struct Attachments {
    node: Node,
    rings: Arc<Rings>,
    exports: Arc<Exports>,
    table: Mutex<BTreeMap<Uuid, Entry>>,
    /// What is in the table, for those who can't wait for it.
    devices: std::sync::Mutex<Vec<(Target, String)>>,
}

struct Entry {
    record: Attachment,
    state: State,
}

enum State {
    /// It is served. The export stays open for as long.
    Live { device: BlockDevice, _export: Arc<Export> },
    /// It could not be found again; its device waits, if it is there.
    Waiting(String),
}

impl Attachments {
    /// The attachments of `node`, found again.
    pub async fn restore(
        node: Node,
        rings: Arc<Rings>,
        exports: Arc<Exports>,
    ) -> Result<Attachments> {
        let known = node.clone();
        let records = blocking(move || known.attachments()).await?;
        let devices = records.iter().map(|record| (record.target, path(record))).collect();
        let (table, devices) = (Mutex::default(), std::sync::Mutex::new(devices));
        let attachments = Attachments { node, rings, exports, table, devices };
        let mut table = attachments.table.lock().await;
        for record in records {
            let state = match attachments.revive(&record).await {
                Ok(state) => {
                    tracing::info!(export = %record.export, device = %path(&record), "attached again");
                    state
                }
                Err(error) => {
                    tracing::error!(export = %record.export, device = %path(&record), %error,
                        "an attachment waits: its requests hang until it is attached again");
                    State::Waiting(error.to_string())
                }
            };
            table.insert(record.id, Entry { record, state });
        }
        drop(table);
        Ok(attachments)
    }

    /// Every attachment.
    pub async fn list(&self) -> Vec<AttachmentView> {
        self.table.lock().await.values().map(view).collect()
    }

    /// Makes a block device of an export. One that is attached already stays as it is.
    pub async fn attach(&self, attach: Attach) -> Result<AttachmentView> {
        let (target, export) = self.target(&attach.export).await?;
        let mut table = self.table.lock().await;
        if let Some(entry) = table.values_mut().find(|entry| entry.record.target == target) {
            if matches!(entry.state, State::Waiting(_)) {
                entry.state = self.revive(&entry.record).await?;
            }
            return Ok(view(entry));
        }
        let via = attach.via.unwrap_or(Via::Ublk);
        if via != Via::Ublk {
            let what = "this daemon attaches through ublk only";
            return Err(Error::new(Kind::Unsupported, what));
        }
        let mut record = Attachment {
            id: Uuid::new_v4(),
            export: export.name.clone(),
            target,
            via,
            number: 0,
            queues: attach.queues.unwrap_or_else(|| self.rings.count().min(2) as u16),
            depth: attach.depth.unwrap_or(64),
            copy: attach.copy,
            unprivileged: attach.unprivileged,
            scan: attach.scan,
        };
        options(&record).check()?;
        // The driver says whether it is there at all before anything is written down.
        blocking(|| ublk::device::features().map(|_| ())).await?;
        let taken = |number: u32, table: &BTreeMap<Uuid, Entry>| {
            Path::new(&format!("/sys/class/ublk-char/ublkc{number}")).exists()
                || table.values().any(|entry| entry.record.number == number)
        };
        let mut first = 0;
        let device = loop {
            record.number = (first..NUMBERS)
                .find(|number| !taken(*number, &table))
                .ok_or_else(|| Error::new(Kind::Unavailable, "there are too many ublk devices"))?;
            self.write(&table, Some(&record)).await?;
            let made = BlockDevice::add(&self.rings, export.device.clone(), options(&record)).await;
            match made {
                Ok(device) => break device,
                // Somebody else was quicker.
                Err(error) if error.kind() == Kind::Exists => first = record.number + 1,
                Err(error) => {
                    self.write(&table, None).await?;
                    return Err(error.within(format!("attaching {}", record.export)));
                }
            }
        };
        link(&record);
        tracing::info!(export = %record.export, device = %device.path(), mode = ?device.mode(),
            "attached");
        let entry = Entry { record, state: State::Live { device, _export: export } };
        let view = view(&entry);
        table.insert(entry.record.id, entry);
        Ok(view)
    }

    /// Removes the block device of an export, told by its name or its path.
    pub async fn detach(&self, what: &str, stop: Stop) -> Result<AttachmentView> {
        let mut table = self.table.lock().await;
        let fits = |record: &Attachment| record.export == what || path(record) == what;
        let found = table.values().find(|entry| fits(&entry.record)).map(|entry| entry.record.id);
        let entry = found.and_then(|id| table.get_mut(&id)).ok_or_else(|| {
            Error::new(Kind::NotFound, format!("{what} is not attached; see `underlay status`"))
        })?;
        let seen = view(entry);
        match &mut entry.state {
            State::Live { device, .. } => device.stop(stop).await?,
            State::Waiting(reason) if stop == Stop::Unused => {
                let what = format!(
                    "{}: its requests wait ({reason}); detach with --force to fail them",
                    path(&entry.record)
                );
                return Err(Error::new(Kind::InUse, what));
            }
            State::Waiting(_) => {
                let mark = mark(&entry.record);
                match ublk::device::find(entry.record.number, mark).await? {
                    Found::Ours | Found::Remains => {
                        ublk::device::clear(entry.record.number).await?;
                    }
                    Found::Nothing | Found::Foreign => {}
                }
            }
        }
        let record = entry.record.clone();
        unlink(&record);
        table.remove(&record.id);
        self.write(&table, None).await?;
        tracing::info!(export = %record.export, device = %path(&record), ?stop, "detached");
        Ok(seen)
    }

    /// Tells the kernel that a replica has grown.
    pub async fn grown(&self, replica: Uuid, size: u64) -> Result<()> {
        let table = self.table.lock().await;
        let mut theirs =
            table.values().filter(|entry| entry.record.target == Target::Replica(replica));
        match theirs.next().map(|entry| &entry.state) {
            Some(State::Live { device, .. }) => device.resize(size).await,
            _ => Ok(()),
        }
    }

    /// The block devices that are, or may become, what `target` is.
    pub fn devices(&self, target: Target) -> Vec<String> {
        let devices = self.devices.lock().unwrap_or_else(PoisonError::into_inner);
        devices.iter().filter(|(of, _)| *of == target).map(|(_, path)| path.clone()).collect()
    }

    /// Lets go of every device so that the next daemon takes it over: requests wait meanwhile.
    pub async fn hand_over(&self) -> Vec<Error> {
        let mut failures = Vec::new();
        for (_, entry) in std::mem::take(&mut *self.table.lock().await) {
            let State::Live { mut device, .. } = entry.state else { continue };
            let gone = if device.survives() {
                device.hand_over().await
            } else {
                // Nobody can take it over: better an error now than a device without a server.
                unlink(&entry.record);
                device.stop(Stop::Forced).await
            };
            failures.extend(gone.err().map(|error| error.within(entry.record.export)));
        }
        failures
    }

    /// Finds the device of a record again, or makes it anew where the kernel does not know it.
    async fn revive(&self, record: &Attachment) -> Result<State> {
        let export = self.open(record.target).await?;
        let options = options(record);
        let device = export.device.clone();
        let device = match ublk::device::find(record.number, options.mark).await? {
            Found::Ours => {
                BlockDevice::take_over(&self.rings, device, record.number, options.mark).await?
            }
            Found::Remains => {
                ublk::device::clear(record.number).await?;
                BlockDevice::add(&self.rings, device, options).await?
            }
            Found::Nothing => BlockDevice::add(&self.rings, device, options).await?,
            Found::Foreign => {
                let what =
                    format!("{} is another server's: detach this and attach anew", path(record));
                return Err(Error::new(Kind::Exists, what));
            }
        };
        link(record);
        Ok(State::Live { device, _export: export })
    }

    /// What an export's name stands for, opened.
    async fn target(&self, export: &str) -> Result<(Target, Arc<Export>)> {
        if let Some(name) = export.strip_prefix(IMAGE) {
            let (name, node): (Name, _) = (name.parse()?, self.node.clone());
            let status = blocking(move || node.image(&name)).await?;
            let target = Target::Image(status.digest);
            return Ok((target, self.open(target).await?));
        }
        if let Some(name) = export.strip_prefix(REPLICA) {
            let (name, node): (Name, _) = (name.parse()?, self.node.clone());
            let status = blocking(move || node.replica(&name)).await?;
            let target = Target::Replica(status.id);
            return Ok((target, self.open(target).await?));
        }
        let what = format!("{export:?}: an export is called image/NAME or replica/NAME");
        Err(Error::new(Kind::Invalid, what))
    }

    async fn open(&self, target: Target) -> Result<Arc<Export>> {
        match target {
            Target::Image(digest) => self.exports.open_image(digest.to_string().parse()?).await,
            Target::Replica(id) => self.exports.open_replica(id.to_string().parse()?).await,
        }
    }

    /// Records the table, and one more.
    async fn write(&self, table: &BTreeMap<Uuid, Entry>, more: Option<&Attachment>) -> Result<()> {
        let records: Vec<_> =
            table.values().map(|entry| &entry.record).chain(more).cloned().collect();
        let devices = records.iter().map(|record| (record.target, path(record))).collect();
        *self.devices.lock().unwrap_or_else(PoisonError::into_inner) = devices;
        let node = self.node.clone();
        blocking(move || node.record_attachments(records)).await
    }
}

fn options(record: &Attachment) -> Options {
    Options {
        id: record.number,
        mark: mark(record),
        queues: record.queues,
        depth: record.depth,
        copy: record.copy,
        unprivileged: record.unprivileged,
        scan: record.scan,
    }
}

/// What the device is known by in the kernel.
fn mark(record: &Attachment) -> u64 {
    record.id.as_u64_pair().0
}

fn path(record: &Attachment) -> String {
    ublk::device::path(record.number)
}

fn view(entry: &Entry) -> AttachmentView {
    let record = &entry.record;
    let (mode, waiting) = match &entry.state {
        State::Live { device, .. } => (Some(device.mode()), None),
        State::Waiting(reason) => (None, Some(reason.clone())),
    };
    AttachmentView {
        export: record.export.clone(),
        device: path(record).into(),
        via: record.via,
        queues: record.queues,
        depth: record.depth,
        zero_copy: mode.map(|mode| mode == Mode::ZeroCopy),
        waiting,
    }
}

/// Makes the device's link. Without it nothing is lost but a convenience.
fn link(record: &Attachment) {
    let made = || -> io::Result<()> {
        let link = link_path(record);
        if let Some(parent) = link.parent() {
            fs::create_dir_all(parent)?;
        }
        match fs::remove_file(&link) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        std::os::unix::fs::symlink(path(record), link)
    };
    if let Err(error) = made().context(|| format!("linking {}", link_path(record).display())) {
        tracing::warn!(%error, "no link to a device");
    }
}

fn unlink(record: &Attachment) {
    // One that is not there is as good as removed; one that points elsewhere is somebody else's.
    let link = link_path(record);
    if fs::read_link(&link).is_ok_and(|to| to == Path::new(&path(record))) {
        let _ = fs::remove_file(link);
    }
}

/// `/dev/underlay/replica/NAME`: names have no slashes.
fn link_path(record: &Attachment) -> PathBuf {
    Path::new(LINKS).join(&record.export)
}
