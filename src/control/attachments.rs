//! Exports as block devices of this node's kernel: made, found again after a restart, handed over,
//! removed.
//!
//! Invariants:
//! - An attachment is recorded before its device is made, and until the device is gone: whatever
//!   ends this process, the next one finds every device that it left.
//! - An attachment holds its export open: nobody can remove what the kernel may be writing to.
//! - A device whose export can't be opened waits, it does not fail: it is tried again every
//!   [`RETRY`], and its requests are served once the disk is back.
//! - Whoever only looks waits for nobody: a driver that hangs on one device holds up that device's
//!   attachment and no other.

mod device;
mod links;

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
    time::{Duration, Instant},
};

use futures_util::future::join_all;
use tokio::{
    sync::{Mutex as AsyncMutex, OwnedMutexGuard, watch},
    task::JoinHandle,
    time::timeout,
};
use uuid::Uuid;

use self::device::{Device, NBD_DEPTH, clear, find, free_number, path};
pub use self::{device::Servers, links::Links};
use crate::{
    blockdev::{
        Export,
        ublk::{Mode, Stop, device::Found},
    },
    catalog::{Attachment, Name, Node, Target, Via},
    control::{
        api::{Attach, AttachmentView},
        exports::{Exports, IMAGE, REPLICA},
        service::blocking,
    },
    error::{Error, Kind, Result},
};

/// How long a start waits for devices that are found again; the others come when they can.
const START: Duration = Duration::from_secs(20);
/// How long a command waits for another one about the same attachment.
const PATIENCE: Duration = Duration::from_secs(5);
/// How long somebody who only looks at a device has it open.
const GLANCE: Duration = Duration::from_secs(1);
/// How long an export may take to open before whoever else asks for the attachment has a turn.
const OPEN: Duration = Duration::from_secs(2);
/// How often an attachment that waits is tried again.
const RETRY: Duration = Duration::from_secs(10);
/// Requests that a queue may have under way, unless asked for otherwise.
const DEPTH: u16 = 64;

/// The table of attachments.
pub struct Attachments {
    node: Node,
    servers: Servers,
    exports: Arc<Exports>,
    links: Links,
    table: Mutex<BTreeMap<Uuid, Arc<Entry>>>,
    /// Held while the table's records are written.
    file: AsyncMutex<()>,
    /// True once devices are handed over: none is taken up any more.
    closing: watch::Sender<bool>,
}

/// One attachment. Its state is locked for as long as its device is made, changed or removed.
struct Entry {
    known: Mutex<Known>,
    state: Arc<AsyncMutex<State>>,
}

/// What is told of it without waiting.
struct Known {
    record: Attachment,
    is: Is,
}

enum Is {
    /// The device is served for as long as `life` is not closed.
    Served { mode: Mode, life: watch::Sender<()> },
    /// It isn't: why.
    Waiting(String),
}

enum State {
    Served(Device),
    /// The device, if there is one, waits to be found again; for its export, which a disk may hold
    /// up.
    Waiting(Option<JoinHandle<Result<Arc<Export>>>>),
    /// It is no longer in the table.
    Gone,
}

impl Attachments {
    /// The attachments of `node`. Those that are not found again within [`START`] go on waiting.
    pub async fn restore(
        node: Node,
        servers: Servers,
        exports: Arc<Exports>,
        links: Links,
    ) -> Result<Arc<Attachments>> {
        let known = node.clone();
        let records = blocking(move || known.attachments()).await?;
        let (file, closing) = (AsyncMutex::default(), watch::Sender::new(false));
        let waits = |record: Attachment| (record.id, Arc::new(Entry::waiting(record)));
        let table = Mutex::new(records.into_iter().map(waits).collect());
        let attachments =
            Arc::new(Attachments { node, servers, exports, links, table, file, closing });
        let revived = attachments.revive_all();
        if timeout(START, revived).await.is_err() {
            tracing::error!("some attachments are not found again yet; see `underlay status`");
        }
        tokio::spawn(Attachments::retry(Arc::downgrade(&attachments)));
        Ok(attachments)
    }

    /// Every attachment.
    pub fn list(&self) -> Vec<AttachmentView> {
        self.entries().iter().map(|entry| entry.view()).collect()
    }

    /// The block devices that are, or may become, what `target` is.
    pub fn devices(&self, target: Target) -> Vec<String> {
        let records = self.entries().into_iter().map(|entry| entry.record());
        records.filter(|record| record.target == target).map(|record| path(&record)).collect()
    }

    /// Makes a block device of an export. One that is attached already stays as it is.
    pub async fn attach(&self, attach: Attach) -> Result<AttachmentView> {
        let (target, export) = self.target(&attach.export).await?;
        let via = attach.via.unwrap_or(Via::Ublk);
        let record = Attachment {
            id: Uuid::new_v4(),
            export: export.name.clone(),
            target,
            via,
            number: 0,
            queues: attach.queues.unwrap_or_else(|| match via {
                Via::Ublk => self.servers.rings.count().min(2) as u16,
                Via::Nbd => 1,
            }),
            depth: attach.depth.unwrap_or(match via {
                Via::Ublk => DEPTH,
                Via::Nbd => NBD_DEPTH,
            }),
            copy: attach.copy,
            scan: attach.scan,
        };
        device::check(&record)?;
        let (entry, fresh) = self.entry_of(target, record)?;
        if let Some(mut state) = fresh {
            let made = self.make(&entry, &export).await;
            return self.made(&entry, &mut state, made).await;
        }
        let mut state = entry.lock().await?;
        match &*state {
            State::Gone => {
                let what = format!("{} was being detached; attach it again", attach.export);
                return Err(Error::new(Kind::Unavailable, what));
            }
            State::Served(_) if entry.is_served() => {}
            _ => self.revive(&entry, &mut state).await?,
        }
        Ok(entry.view())
    }

    /// The attachment of `target`; a new one, locked, if there is none.
    fn entry_of(
        &self,
        target: Target,
        record: Attachment,
    ) -> Result<(Arc<Entry>, Option<OwnedMutexGuard<State>>)> {
        let mut table = locked(&self.table);
        if *self.closing.borrow() {
            return Err(Error::new(Kind::Unavailable, "the daemon is stopping"));
        }
        if let Some(entry) = table.values().find(|entry| entry.record().target == target) {
            return Ok((entry.clone(), None));
        }
        let entry = Arc::new(Entry::waiting(record));
        let state = entry.state.clone().try_lock_owned().ok();
        table.insert(entry.record().id, entry.clone());
        Ok((entry, state))
    }

    /// What becomes of a new attachment.
    async fn made(
        &self,
        entry: &Arc<Entry>,
        state: &mut State,
        made: Result<Device>,
    ) -> Result<AttachmentView> {
        match made {
            Ok(device) => {
                self.served(entry, state, device);
                tracing::info!(export = %entry.record().export, device = path(&entry.record()),
                    "attached");
                Ok(entry.view())
            }
            Err(error) => {
                let record = entry.record();
                let error = error.within(format!("attaching {}", record.export));
                entry.wait(state, &error);
                // What may have left something behind, or be at it still, keeps its record.
                let nothing = match find(&record).await {
                    Ok(found) => matches!(found, Found::Nothing | Found::Foreign),
                    // Whoever has no driver, or may not speak to it, has no device.
                    Err(error) => matches!(error.kind(), Kind::Unsupported | Kind::Permission),
                };
                if nothing && error.kind() != Kind::Unavailable {
                    self.forget(entry, state).await?;
                }
                Err(error)
            }
        }
    }

    /// Makes the entry's device, with the next number that is free.
    async fn make(&self, entry: &Entry, export: &Arc<Export>) -> Result<Device> {
        let via = entry.record().via;
        let mut first = 0;
        loop {
            let number = free_number(via, first, self.numbers(via, entry)).await?;
            if !self.set_number(entry, number) {
                continue;
            }
            self.write().await?;
            let record = entry.record();
            self.links.announce(&record);
            if let Some(device) = self.servers.add(&record, export.clone()).await? {
                return Ok(device);
            }
            // Somebody else was quicker.
            self.links.unlink(&record);
            first = number + 1;
        }
    }

    /// Removes the block device of an export, told by its name or its path.
    pub async fn detach(&self, what: &str, stop: Stop) -> Result<AttachmentView> {
        let none =
            || Error::new(Kind::NotFound, format!("{what} is not attached; see `underlay status`"));
        let entries = self.entries();
        let entry =
            entries.iter().find(|entry| links::names(what, &entry.record())).ok_or_else(none)?;
        let mut state = entry.lock().await?;
        let record = entry.record();
        let seen = entry.view();
        match &mut *state {
            State::Gone => return Err(none()),
            State::Served(device) if entry.is_served() => stopped(device, stop).await?,
            State::Served(_) | State::Waiting(_) => match find(&record).await {
                Ok(Found::Nothing | Found::Foreign) => {}
                Ok(Found::Ours | Found::Remains) if stop == Stop::Unused => {
                    let reason = seen.waiting.unwrap_or_default();
                    let what = format!(
                        "{}: its requests wait ({reason}); detach with --force to fail them",
                        path(&record)
                    );
                    return Err(Error::new(Kind::InUse, what));
                }
                Ok(Found::Ours | Found::Remains) => clear(&record).await?,
                // Without its driver there is no device.
                Err(error) if error.kind() == Kind::Unsupported => {}
                Err(error) => return Err(error),
            },
        }
        self.forget(entry, &mut state).await?;
        tracing::info!(export = %record.export, device = path(&record), ?stop, "detached");
        Ok(seen)
    }

    /// Tells the kernel that a replica has grown.
    pub async fn grown(&self, replica: Uuid, size: u64) -> Result<()> {
        let target = Target::Replica(replica);
        let entries = self.entries();
        let Some(entry) = entries.iter().find(|entry| entry.record().target == target) else {
            return Ok(());
        };
        match &*entry.lock().await? {
            State::Served(device) if entry.is_served() => device.resize(size).await,
            // It gets its size when it is found again.
            _ => Ok(()),
        }
    }

    /// Lets go of every device, within `limit`, so that the next daemon takes it over: requests wait
    /// meanwhile. Those that failed, and why.
    pub async fn hand_over(&self, limit: Duration) -> Vec<Error> {
        self.closing.send_replace(true);
        let handed = self.entries().into_iter().map(|entry| async move {
            let hand_over = async {
                let mut state = entry.state.lock().await;
                match std::mem::replace(&mut *state, State::Gone) {
                    State::Served(device) => device.hand_over().await,
                    State::Waiting(_) | State::Gone => Ok(()),
                }
            };
            let late = |_| {
                let what = "it is not handed over in time, a disk hangs; the kernel takes it back \
                            when this process has ended";
                Err(Error::new(Kind::Unavailable, what))
            };
            let gone = timeout(limit, hand_over).await.unwrap_or_else(late);
            gone.err().map(|error| error.within(entry.record().export))
        });
        join_all(handed).await.into_iter().flatten().collect()
    }

    /// Tries attachments that wait again, for as long as there are any who could ask.
    async fn retry(attachments: Weak<Attachments>) {
        loop {
            tokio::time::sleep(RETRY).await;
            let Some(attachments) = attachments.upgrade() else { return };
            if *attachments.closing.borrow() {
                return;
            }
            // Those that take longer go on, and are passed over meanwhile.
            let _ = timeout(RETRY, attachments.revive_all()).await;
        }
    }

    /// Finds again what waits, all at once. What takes longer than this is waited for goes on.
    async fn revive_all(self: &Arc<Self>) {
        let revived = self.entries().into_iter().filter_map(|entry| {
            let mut state = entry.state.clone().try_lock_owned().ok()?;
            matches!(*state, State::Waiting(_)).then_some(())?;
            let attachments = self.clone();
            Some(tokio::spawn(async move {
                let known = entry.view().waiting;
                let error = loop {
                    let Err(error) = attachments.revive(&entry, &mut state).await else { return };
                    if !matches!(*state, State::Waiting(Some(_))) {
                        break error;
                    }
                    // Its disk is at it. Others may have it meanwhile, to give it up.
                    drop(state);
                    tokio::time::sleep(OPEN / 10).await;
                    state = entry.state.clone().lock_owned().await;
                    if !matches!(*state, State::Waiting(_)) {
                        return;
                    }
                };
                if known != Some(error.to_string()) {
                    let record = entry.record();
                    tracing::error!(export = %record.export, device = path(&record), %error,
                        "an attachment waits, and its requests with it");
                }
            }))
        });
        join_all(revived).await;
    }

    /// Finds the entry's device again, or makes it anew where the kernel does not know it.
    async fn revive(&self, entry: &Entry, state: &mut State) -> Result<()> {
        let record = entry.record();
        let revived = async {
            if *self.closing.borrow() {
                return Err(Error::new(Kind::Unavailable, "the daemon is stopping"));
            }
            let export = self.opened(record.target, state).await?;
            self.links.announce(&record);
            if let Some(device) = self.servers.revive(&record, export.clone()).await? {
                return Ok(device);
            }
            // Its number was given away, over a restart of the machine.
            self.links.unlink(&record);
            self.make(entry, &export).await
        };
        match revived.await {
            Ok(device) => {
                self.served(entry, state, device);
                tracing::info!(export = %record.export, device = path(&entry.record()),
                    "attached again");
                Ok(())
            }
            Err(error) => {
                entry.wait(state, &error);
                Err(error)
            }
        }
    }

    /// Opens an export within [`OPEN`]; if it takes longer, the next call goes on with it.
    async fn opened(&self, target: Target, state: &mut State) -> Result<Arc<Export>> {
        let mut opening = match std::mem::replace(state, State::Waiting(None)) {
            State::Waiting(Some(opening)) => opening,
            _ => {
                let exports = self.exports.clone();
                tokio::spawn(async move { open(&exports, target).await })
            }
        };
        if let Ok(opened) = timeout(OPEN, &mut opening).await {
            let died = |_| Error::new(Kind::Io, "internal error; see the daemon's log");
            return opened.map_err(died)?;
        }
        *state = State::Waiting(Some(opening));
        Err(Error::new(Kind::Unavailable, "it takes long to open it; does a disk hang?"))
    }

    fn served(&self, entry: &Entry, state: &mut State, device: Device) {
        let mut known = locked(&entry.known);
        known.is = Is::Served { mode: device.mode(), life: device.life() };
        *state = State::Served(device);
        self.links.link(&known.record);
    }

    /// Takes an attachment whose device is gone out of the table.
    async fn forget(&self, entry: &Entry, state: &mut State) -> Result<()> {
        let record = entry.record();
        self.links.unlink(&record);
        locked(&self.table).remove(&record.id);
        *state = State::Gone;
        self.write().await.map_err(|error| {
            let what = "the device is gone, but the next daemon will make it again";
            error.within(format!("{}: {what}", record.export))
        })
    }

    /// What an export's name stands for, opened.
    async fn target(&self, export: &str) -> Result<(Target, Arc<Export>)> {
        if let Some(name) = export.strip_prefix(IMAGE) {
            let (name, node): (Name, _) = (name.parse()?, self.node.clone());
            let status = blocking(move || node.image(&name)).await?;
            let target = Target::Image(status.digest);
            return Ok((target, open(&self.exports, target).await?));
        }
        if let Some(name) = export.strip_prefix(REPLICA) {
            let (name, node): (Name, _) = (name.parse()?, self.node.clone());
            let status = blocking(move || node.replica(&name)).await?;
            let target = Target::Replica(status.id);
            return Ok((target, open(&self.exports, target).await?));
        }
        let what = format!("{export:?}: an export is called image/NAME or replica/NAME");
        Err(Error::new(Kind::Invalid, what))
    }

    fn entries(&self) -> Vec<Arc<Entry>> {
        locked(&self.table).values().cloned().collect()
    }

    /// The numbers that other attachments of this kind have.
    fn numbers(&self, via: Via, but: &Entry) -> BTreeSet<u32> {
        let but = but.record().id;
        let others = self.entries().into_iter().map(|entry| entry.record());
        others
            .filter(|record| record.via == via && record.id != but)
            .map(|record| record.number)
            .collect()
    }

    /// Gives the entry a number; false if another one has taken it meanwhile.
    fn set_number(&self, entry: &Entry, number: u32) -> bool {
        let (via, id) = (entry.record().via, entry.record().id);
        let table = locked(&self.table);
        let mut others = table.values().map(|entry| entry.record()).filter(|it| it.id != id);
        let free = !others.any(|record| record.via == via && record.number == number);
        if free {
            locked(&entry.known).record.number = number;
        }
        free
    }

    /// Records the table as it is.
    async fn write(&self) -> Result<()> {
        let _one = self.file.lock().await;
        let records = self.entries().iter().map(|entry| entry.record()).collect();
        let node = self.node.clone();
        blocking(move || node.record_attachments(records)).await
    }
}

impl Entry {
    fn waiting(record: Attachment) -> Entry {
        let is = Is::Waiting("it is being attached".to_owned());
        let state = Arc::new(AsyncMutex::new(State::Waiting(None)));
        Entry { known: Mutex::new(Known { record, is }), state }
    }

    async fn lock(&self) -> Result<tokio::sync::MutexGuard<'_, State>> {
        timeout(PATIENCE, self.state.lock()).await.map_err(|_| {
            let what = format!("{}: another command about it is under way", self.record().export);
            Error::new(Kind::Unavailable, what)
        })
    }

    fn record(&self) -> Attachment {
        locked(&self.known).record.clone()
    }

    fn is_served(&self) -> bool {
        matches!(&locked(&self.known).is, Is::Served { life, .. } if !life.is_closed())
    }

    fn wait(&self, state: &mut State, reason: &Error) {
        locked(&self.known).is = Is::Waiting(reason.to_string());
        if !matches!(state, State::Waiting(_)) {
            *state = State::Waiting(None);
        }
    }

    fn view(&self) -> AttachmentView {
        let known = locked(&self.known);
        let (mode, waiting) = match &known.is {
            Is::Served { life, .. } if life.is_closed() => {
                let what = "its device was removed by somebody else: attach it again, or detach it";
                (None, Some(what.to_owned()))
            }
            Is::Served { mode, .. } => (Some(*mode), None),
            Is::Waiting(reason) => (None, Some(reason.clone())),
        };
        let record = &known.record;
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
}

async fn open(exports: &Exports, target: Target) -> Result<Arc<Export>> {
    match target {
        Target::Image(digest) => exports.open_image(digest.to_string().parse()?).await,
        Target::Replica(id) => exports.open_replica(id.to_string().parse()?).await,
    }
}

/// Removes a device. One that is open may be so for a moment only: udev looks at devices when they
/// appear, and when they are closed.
async fn stopped(device: &mut Device, stop: Stop) -> Result<()> {
    let deadline = Instant::now() + GLANCE;
    loop {
        match device.stop(stop).await {
            Err(error) if error.kind() == Kind::InUse && Instant::now() < deadline => {
                tokio::time::sleep(GLANCE / 20).await;
            }
            stopped => return stopped,
        }
    }
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
