//! Block devices: how they come, change hands, grow and go.
//!
//! ```text
//!   add ──> params ──> queues fetch ──> start ──> /dev/ublkbN ──> stop ──> queues end ──> delete
//!                                                   │    ^
//!                                   hand over, kill │    │ take over: queues fetch
//!                                                   v    │
//!                                              requests wait in the kernel
//! ```

use std::{
    fs::{File, OpenOptions},
    sync::Arc,
    time::{Duration, Instant},
};

use tokio::{
    sync::{oneshot, watch},
    task::{JoinHandle, spawn_blocking},
    time::timeout,
};

use super::{
    abi::{DeviceInfo, flag, state},
    control::{self, Control, Stop},
    queue::{self, Mode, Shape},
};
use crate::{
    blockdev::{AnyDevice, Export, figures::Front},
    error::{Context, Error, Kind, Result},
    io::{Ring, Rings},
};

/// Bytes of the largest request with zero copy.
const MAX_ZERO_COPY: u32 = 1 << 20;
/// Bytes of the largest request where it is copied: each tag has so much memory of its own.
const MAX_COPY: u32 = 128 << 10;
/// How long a command may take; the driver waits for requests under way, and those for disks.
const COMMAND: Duration = Duration::from_secs(20);
/// How long a device may take to notice that its former server is gone.
const ORPHAN: Duration = Duration::from_secs(10);
/// How long its queues may take to end once they are told.
const END: Duration = Duration::from_secs(5);
/// How long a device's node may take to appear.
const NODE: Duration = Duration::from_secs(5);
/// How long requests that are under way may take before a device is handed over.
const QUIESCE: Duration = Duration::from_secs(10);
/// How long queues may take to end before the driver is told again.
const AGAIN: Duration = Duration::from_millis(20);

/// How a block device is to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Options {
    /// Its number.
    pub id: u32,
    /// What its maker knows it by: only a device of this mark is taken over.
    pub mark: u64,
    /// Queues: each is served by one I/O thread.
    pub queues: u16,
    /// Requests that a queue may have under way.
    pub depth: u16,
    /// Never without copying, even where it could be.
    pub copy: bool,
    /// The kernel looks for partitions on it.
    pub scan: bool,
}

/// A block device that this process serves.
pub struct BlockDevice {
    id: u32,
    flags: u64,
    max_io: u32,
    export: Arc<Export>,
    /// Each queue holds a receiver until nothing of it is left.
    queues: watch::Sender<()>,
}

impl BlockDevice {
    /// Makes a block device of `export`. Without the privilege to make any, one that this user
    /// may make: it copies, and can't be taken over.
    pub async fn add(
        rings: &Arc<Rings>,
        export: Arc<Export>,
        options: Options,
    ) -> Result<BlockDevice> {
        let info = export.device.info();
        let made = command(move |control| {
            let features = control.features()?;
            let mut add = |unprivileged| {
                let flags = control::flags(features, !options.copy, unprivileged, options.scan)?;
                let zero_copy = flags & flag::ZERO_COPY == flag::ZERO_COPY;
                control.add(DeviceInfo {
                    queues: options.queues,
                    depth: options.depth,
                    state: 0,
                    max_io: if zero_copy { MAX_ZERO_COPY } else { MAX_COPY },
                    id: options.id,
                    server: std::process::id().cast_signed(),
                    flags,
                    mark: options.mark,
                })
            };
            let made = match add(false) {
                Err(error) if error.kind() == Kind::Permission => add(true)?,
                made => made?,
            };
            control.unprivileged = made.flags & flag::UNPRIVILEGED_DEV != 0;
            if control.unprivileged {
                // Its permissions count from here on: whoever sets them may be at it.
                node(made.id)?;
            }
            match control.set_params(made.id, info, made.max_io) {
                Ok(()) => Ok(made),
                Err(error) => {
                    let _ = control.delete(made.id, Stop::Unused);
                    Err(error)
                }
            }
        })
        .await?;
        let mut block = BlockDevice::of(made, export);
        let started = async {
            block.start_queues(rings, made).await?;
            block.control(|control, id| control.start(id)).await
        };
        match started.await {
            Ok(()) => Ok(block),
            Err(error) => {
                // It never was: nobody can have used it.
                let _ = block.remove(Stop::Unused).await;
                Err(error)
            }
        }
    }

    /// Takes over the device of this number, whose server has gone, or goes just now. Should that
    /// fail after its queues have begun, these hold the export until the device is removed.
    pub async fn take_over(
        rings: &Arc<Rings>,
        export: Arc<Export>,
        id: u32,
        mark: u64,
    ) -> Result<BlockDevice> {
        let info = command(move |control| {
            let deadline = Instant::now() + ORPHAN;
            loop {
                let info = control.info(id)?;
                if info.mark != mark {
                    return Err(busy(id, info.server));
                }
                let orphan = matches!(info.state, state::QUIESCED | state::FAIL_IO);
                // A live one's server may be about to be missed.
                match if orphan { control.start_recovery(id) } else { Err(busy(id, info.server)) } {
                    Ok(()) => return Ok(info),
                    Err(error) if error.kind() != Kind::InUse || Instant::now() > deadline => {
                        return Err(error);
                    }
                    Err(_) => std::thread::sleep(Duration::from_millis(20)),
                }
            }
        })
        .await?;
        let mut block = BlockDevice::of(info, export);
        block.start_queues(rings, info).await?;
        block.control(|control, id| control.end_recovery(id)).await?;
        // It may have grown just before the former server went.
        if let Err(error) = block.resize(block.export.device.info().size).await {
            tracing::warn!(device = %block.path(), %error, "it is served, at its old size; \
                `underlay replica resize` to its size of now tells the kernel again");
        }
        Ok(block)
    }

    fn of(info: DeviceInfo, export: Arc<Export>) -> BlockDevice {
        let DeviceInfo { id, flags, max_io, .. } = info;
        BlockDevice { id, flags, max_io, export, queues: watch::Sender::default() }
    }

    /// The path of its node.
    pub fn path(&self) -> String {
        path(self.id)
    }

    /// How its data moves.
    pub fn mode(&self) -> Mode {
        match self.flags & flag::ZERO_COPY == flag::ZERO_COPY {
            true => Mode::ZeroCopy,
            false => Mode::Copy,
        }
    }

    /// Goes with the device's queues: it is closed when these have ended.
    pub fn life(&self) -> watch::Sender<()> {
        self.queues.clone()
    }

    /// Tells the kernel its new size, in bytes, where the kernel can be told.
    pub async fn resize(&self, size: u64) -> Result<()> {
        if self.flags & flag::UPDATE_SIZE == 0 {
            let what = format!(
                "{}: this kernel can't grow a block device in use (Linux 6.16 can); detach it and \
                 attach it again",
                self.path()
            );
            return if self.kernel_size()? == size {
                Ok(())
            } else {
                Err(Error::new(Kind::Unsupported, what))
            };
        }
        self.control(move |control, id| control.resize(id, size)).await
    }

    fn kernel_size(&self) -> Result<u64> {
        let file = format!("/sys/block/ublkb{}/size", self.id);
        let text = std::fs::read_to_string(&file).context(|| format!("reading {file}"))?;
        Ok(text.trim().parse::<u64>().unwrap_or_default() * crate::units::SECTOR)
    }

    /// Lets go of it so that another server can take it over: its requests wait until then. A
    /// device that none can take over is removed: better an error now than one that hangs.
    pub async fn hand_over(mut self) -> Result<()> {
        if self.flags & flag::USER_RECOVERY == 0 {
            return self.remove(Stop::Forced).await;
        }
        if self.flags & flag::QUIESCE == 0 {
            // The driver takes it from this process when it ends.
            return Ok(());
        }
        let limit = QUIESCE.as_millis() as u64;
        let deadline = Instant::now() + QUIESCE;
        loop {
            self.control(move |control, id| control.quiesce(id, limit)).await?;
            // The driver (up to 7.3 at least) takes back the commands that wait, and forgets those
            // that answers to requests under way make wait thereafter: it is told again. While our
            // queues live, none of them is the next server's.
            if timeout(AGAIN, self.queues.closed()).await.is_ok() {
                return Ok(());
            }
            if Instant::now() > deadline {
                return self.ended().await;
            }
        }
    }

    /// Removes it.
    ///
    /// # Errors
    /// `InUse` while somebody has it open, unless forced; it goes on then.
    pub async fn stop(&mut self, stop: Stop) -> Result<()> {
        if stop == Stop::Unused {
            let careful = self.flags & flag::SAFE_STOP_DEV != 0;
            let path = self.path();
            let result = match careful {
                true => self.control(|control, id| control.stop(id, Stop::Unused)).await,
                // No mount, no volume manager: the best that older kernels tell.
                false => {
                    let path = path.clone();
                    in_time(spawn_blocking(move || exclusive(&path))).await
                }
            };
            result.map_err(|error| match error.kind() {
                Kind::InUse => Error::new(
                    Kind::InUse,
                    format!("{path} is open: unmount it, or detach with --force"),
                ),
                _ => error,
            })?;
        }
        self.remove(stop).await
    }

    async fn remove(&mut self, stop: Stop) -> Result<()> {
        match self.control(|control, id| control.stop(id, Stop::Forced)).await {
            Err(error) if error.kind() != Kind::NotFound => return Err(error),
            _ => {}
        }
        self.ended().await?;
        match self.control(move |control, id| control.delete(id, stop)).await {
            Err(error) if error.kind() != Kind::NotFound => Err(error),
            _ => Ok(()),
        }
    }

    /// Waits until nothing of the queues is left.
    async fn ended(&self) -> Result<()> {
        timeout(END, self.queues.closed()).await.map_err(|_| {
            let what = format!("{}: its queues don't end; a disk hangs", self.path());
            Error::new(Kind::Unavailable, what)
        })
    }

    /// Has every queue wait for requests, or none.
    async fn start_queues(&mut self, rings: &Arc<Rings>, info: DeviceInfo) -> Result<()> {
        let id = self.id;
        let file = spawn_blocking(move || node(id)).await.map_err(|_| stopped())??;
        let file = Arc::new(file);
        let mut begins = Vec::new();
        for queue in 0..info.queues {
            let shape = Shape {
                name: self.path(),
                file: file.clone(),
                queue,
                depth: info.depth,
                max_io: self.max_io,
                mode: self.mode(),
            };
            let (ready, is_ready) = oneshot::channel();
            let (begin, start) = oneshot::channel();
            let (export, end) = (self.export.clone(), self.queues.subscribe());
            rings.spawn(rings.pick(), move |ring: Ring| async move {
                let phases = queue::Phases { ready, start };
                let figures = export.figures.of(Front::Ublk);
                match &export.device {
                    AnyDevice::Base(base) => {
                        queue::serve(ring, shape, base.clone(), figures, phases).await;
                    }
                    AnyDevice::Replica(replica) => {
                        queue::serve(ring, shape, replica.clone(), figures, phases).await;
                    }
                }
                drop((export, end));
            });
            is_ready.await.map_err(|_| stopped())??;
            begins.push(begin);
        }
        for begin in begins {
            // A ring that fails takes the daemon with it.
            let _ = begin.send(());
        }
        Ok(())
    }

    async fn control<T: Send + 'static>(
        &self,
        give: impl FnOnce(&mut Control, u32) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let (id, unprivileged) = (self.id, self.flags & flag::UNPRIVILEGED_DEV != 0);
        command(move |control| {
            control.unprivileged = unprivileged;
            give(control, id)
        })
        .await
        .map_err(|error| match error.kind() {
            Kind::Unavailable => error.within(self.path()),
            _ => error,
        })
    }
}

/// The block device of this number.
pub fn path(id: u32) -> String {
    format!("/dev/ublkb{id}")
}

/// What the driver has under a number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Found {
    /// No device.
    Nothing,
    /// The device of this mark, which can be taken over.
    Ours,
    /// What is left of it: it never started, or can't be taken over.
    Remains,
    /// Somebody else's.
    Foreign,
}

/// Looks for the device of this number and mark.
pub async fn find(id: u32, mark: u64) -> Result<Found> {
    match command(move |control| control.info(id)).await {
        Ok(info) if info.mark != mark => Ok(Found::Foreign),
        Ok(info) if info.state != state::DEAD && info.flags & flag::USER_RECOVERY != 0 => {
            Ok(Found::Ours)
        }
        Ok(_) => Ok(Found::Remains),
        Err(error) if error.kind() == Kind::NotFound => Ok(Found::Nothing),
        Err(error) => Err(error),
    }
}

/// Removes a device that no server has.
pub async fn clear(id: u32) -> Result<()> {
    command(move |control| {
        control.info(id)?;
        let _ = control.stop(id, Stop::Forced);
        control.delete(id, Stop::Forced)
    })
    .await
}

/// What the driver can do, as flags; for `underlay doctor`.
///
/// # Errors
/// With the reason why there are no block devices to be had, and the remedy.
pub fn features() -> Result<u64> {
    Control::open()?.features()
}

/// Whether a driver of these features serves devices without copying.
pub fn can_zero_copy(features: u64) -> bool {
    features & flag::ZERO_COPY == flag::ZERO_COPY
}

/// Runs a command that waits in the kernel. One that takes too long goes on by itself.
async fn command<T: Send + 'static>(
    give: impl FnOnce(&mut Control) -> Result<T> + Send + 'static,
) -> Result<T> {
    in_time(spawn_blocking(move || give(&mut Control::open()?))).await
}

async fn in_time<T>(work: JoinHandle<Result<T>>) -> Result<T> {
    let late = || {
        let what = "the ublk driver does not come to an end; does a disk hang?";
        Error::new(Kind::Unavailable, what)
    };
    timeout(COMMAND, work).await.map_err(|_| late())?.map_err(|_| stopped())?
}

/// Opens the node by which requests come, which may be about to appear, or to be given to this user.
fn node(id: u32) -> Result<File> {
    let node = format!("/dev/ublkc{id}");
    let deadline = Instant::now() + NODE;
    loop {
        match OpenOptions::new().read(true).write(true).open(&node) {
            Ok(file) => return Ok(file),
            Err(_) if Instant::now() < deadline => std::thread::sleep(Duration::from_millis(5)),
            Err(error) => return Err(Error::io(format!("opening {node}"), error)),
        }
    }
}

fn exclusive(path: &str) -> Result<()> {
    use std::os::unix::fs::OpenOptionsExt;
    match OpenOptions::new().read(true).custom_flags(libc::O_EXCL).open(path) {
        Ok(_) => Ok(()),
        Err(error) if error.raw_os_error() == Some(libc::EBUSY) => {
            Err(Error::new(Kind::InUse, path))
        }
        Err(error) => Err(Error::io(format!("opening {path}"), error)),
    }
}

fn busy(id: u32, server: i32) -> Error {
    Error::new(Kind::InUse, format!("{} is served by process {server}", path(id)))
}

fn stopped() -> Error {
    Error::new(Kind::Unavailable, "the daemon is stopping")
}

impl Options {
    /// Checks what the user asked for.
    pub fn check(&self) -> Result<()> {
        if !(1..=64).contains(&self.queues) || !(1..=1024).contains(&self.depth) {
            let what = "a block device has 1 to 64 queues of 1 to 1024 requests";
            return Err(Error::new(Kind::Invalid, what));
        }
        Ok(())
    }
}
