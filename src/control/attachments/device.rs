//! The block device of an attachment, whatever makes it.

use std::{collections::BTreeSet, path::Path, sync::Arc};

use tokio::sync::watch;

use crate::{
    attach::nbd::{
        self, Client, Setup,
        device::{self, SYSFS},
        served::{NbdDevice, Service},
    },
    blockdev::{
        Export,
        nbd::Server,
        ublk::{self, BlockDevice, Mode, Options, Stop, device::Found},
    },
    catalog::{Attachment, Target, Via},
    control::service::blocking,
    error::{Error, Kind, Result},
    io::Rings,
};

/// Numbers that are tried for a new device.
const NUMBERS: u32 = 4096;
/// Requests that a connection of the kernel's NBD client may have under way.
pub const NBD_DEPTH: u16 = 128;

/// A block device that this process serves.
pub enum Device {
    /// Of the ublk driver.
    Ublk(BlockDevice),
    /// Of the kernel's NBD client.
    Nbd(NbdDevice),
}

/// What serves block devices.
#[derive(Clone)]
pub struct Servers {
    /// The I/O threads: queues of ublk devices run on them.
    pub rings: Arc<Rings>,
    /// The kernel's NBD client is a client of it.
    pub nbd: Arc<Server>,
}

impl Servers {
    /// Makes the device of a record; `None` if its number is somebody else's.
    pub async fn add(&self, record: &Attachment, export: Arc<Export>) -> Result<Option<Device>> {
        let made = match record.via {
            Via::Ublk => {
                let made = BlockDevice::add(&self.rings, export, options(record)).await;
                made.map(Device::Ublk)
            }
            Via::Nbd => {
                let connections = record.queues.into();
                let service = self.service(export);
                let made = NbdDevice::add(service, record.number, setup(record), connections).await;
                made.map(Device::Nbd)
            }
        };
        match made {
            Err(error) if matches!(error.kind(), Kind::Exists | Kind::InUse) => Ok(None),
            made => made.map(Some),
        }
    }

    /// Finds the device of a record again, or makes it anew where the kernel does not know it;
    /// `None` if its number is somebody else's by now.
    pub async fn revive(&self, record: &Attachment, export: Arc<Export>) -> Result<Option<Device>> {
        match find(record).await? {
            Found::Ours => match record.via {
                Via::Ublk => {
                    let (number, mark) = (record.number, mark(record));
                    let taken = BlockDevice::take_over(&self.rings, export, number, mark).await;
                    taken.map(|device| Some(Device::Ublk(device)))
                }
                Via::Nbd => {
                    let connections = record.queues.into();
                    let (service, setup) = (self.service(export), setup(record));
                    let taken =
                        NbdDevice::take_over(service, record.number, setup, connections).await;
                    taken.map(|device| Some(Device::Nbd(device)))
                }
            },
            Found::Remains => {
                clear(record).await?;
                self.add(record, export).await
            }
            Found::Nothing => self.add(record, export).await,
            Found::Foreign => Ok(None),
        }
    }

    fn service(&self, export: Arc<Export>) -> Service {
        Service { server: self.nbd.clone(), export }
    }
}

impl Device {
    /// How its data moves.
    pub fn mode(&self) -> Mode {
        match self {
            Device::Ublk(device) => device.mode(),
            Device::Nbd(_) => Mode::Copy,
        }
    }

    /// It is closed when nothing of the device is served any more.
    pub fn life(&self) -> watch::Sender<()> {
        match self {
            Device::Ublk(device) => device.life(),
            Device::Nbd(device) => device.life(),
        }
    }

    /// Tells the kernel its new size, in bytes.
    pub async fn resize(&self, size: u64) -> Result<()> {
        match self {
            Device::Ublk(device) => device.resize(size).await,
            Device::Nbd(device) => device.resize(size).await,
        }
    }

    /// Removes it.
    ///
    /// # Errors
    /// `InUse` while somebody has it open, unless forced; it goes on then.
    pub async fn stop(&mut self, stop: Stop) -> Result<()> {
        match self {
            Device::Ublk(device) => device.stop(stop).await,
            Device::Nbd(device) => device.stop(stop == Stop::Forced).await,
        }
    }

    /// Lets go of it so that the next daemon takes it over: its requests wait until then.
    pub async fn hand_over(self) -> Result<()> {
        match self {
            Device::Ublk(device) => device.hand_over().await,
            // The kernel waits for new connections once the server has ended its sessions.
            Device::Nbd(_) => Ok(()),
        }
    }
}

/// The device's node.
pub fn path(record: &Attachment) -> String {
    match record.via {
        Via::Ublk => ublk::device::path(record.number),
        Via::Nbd => nbd::node(record.number).display().to_string(),
    }
}

/// A number for a device of this kind, from `first` on, that is neither `taken` nor in use.
///
/// # Errors
/// Whatever stands against making such a device at all.
pub async fn free_number(via: Via, first: u32, taken: BTreeSet<u32>) -> Result<u32> {
    let free = move || match via {
        Via::Ublk => {
            ublk::device::features()?;
            let there =
                |number: &u32| Path::new(&format!("/sys/class/ublk-char/ublkc{number}")).exists();
            Ok((first..NUMBERS).find(|number| !taken.contains(number) && !there(number)))
        }
        Via::Nbd => {
            let mut client = Client::open()?;
            let mut number = client.free(first)?;
            while taken.contains(&number) {
                number = client.free(number + 1)?;
            }
            Ok(Some(number).filter(|number| *number < NUMBERS))
        }
    };
    let full = || Error::new(Kind::NoSpace, "there are too many block devices; detach some");
    blocking(free).await?.ok_or_else(full)
}

/// Checks what the user asked for.
pub fn check(record: &Attachment) -> Result<()> {
    match record.via {
        Via::Ublk => options(record).check(),
        Via::Nbd if record.copy || record.scan || record.depth != NBD_DEPTH => {
            let what = "--via nbd has no --copy, --scan or --depth: it always copies, the module \
                        nbd says whether partitions are looked for, and each connection has 128 \
                        requests";
            Err(Error::new(Kind::Invalid, what))
        }
        Via::Nbd if record.queues > 1 && matches!(record.target, Target::Replica(_)) => {
            let what = "--via nbd: a replica has one connection (--queues 1): with more, the kernel \
                        may send a slow write twice, and undo a newer one";
            Err(Error::new(Kind::Invalid, what))
        }
        Via::Nbd if !(1..=nbd::MAX_CONNECTIONS).contains(&record.queues.into()) => {
            let what = format!("--via nbd: --queues is 1 to {}", nbd::MAX_CONNECTIONS);
            Err(Error::new(Kind::Invalid, what))
        }
        Via::Nbd => Ok(()),
    }
}

/// What the kernel has under the record's number.
pub async fn find(record: &Attachment) -> Result<Found> {
    match record.via {
        Via::Ublk => ublk::device::find(record.number, mark(record)).await,
        Via::Nbd => {
            let (number, setup) = (record.number, setup(record));
            let found = blocking(move || device::find(Path::new(SYSFS), number)).await?;
            Ok(match found {
                None => Found::Nothing,
                Some(device) if device.backend == setup.backend => Found::Ours,
                Some(_) => Found::Foreign,
            })
        }
    }
}

/// Removes a device that is nobody's but the record's, and that no server has.
pub async fn clear(record: &Attachment) -> Result<()> {
    let number = record.number;
    match record.via {
        Via::Ublk => ublk::device::clear(number).await,
        Via::Nbd => blocking(move || Client::open()?.disconnect(number)).await,
    }
}

fn options(record: &Attachment) -> Options {
    Options {
        id: record.number,
        mark: mark(record),
        queues: record.queues,
        depth: record.depth,
        copy: record.copy,
        scan: record.scan,
    }
}

/// What the ublk driver knows the device by.
fn mark(record: &Attachment) -> u64 {
    record.id.as_u64_pair().0
}

/// What the kernel's NBD client knows the device by.
fn setup(record: &Attachment) -> Setup {
    Setup::new(format!("underlay/{}/{}", record.export, record.id))
}
