//! The NBD family's commands and answers as attributes. Pure.
//!
//! Every message that names a device also repeats its backend: the kernel refuses to change a
//! device of another one, and so guards against a number that was given away meanwhile.

use std::{collections::BTreeSet, os::fd::AsRawFd, time::Duration};

use super::{Choice, Links, MAX_CONNECTIONS, Setup};
use crate::{
    attach::netlink::{Attributes, Malformed, Message},
    blockdev::nbd::wire::flag,
    error::{Error, Kind, Result},
    units::{BLOCK, SECTOR},
};

/// The family's name.
pub const FAMILY: &str = "nbd";
const VERSION: u8 = 1;

const CONNECT: u8 = 1;
const DISCONNECT: u8 = 2;
const RECONFIGURE: u8 = 3;
const STATUS: u8 = 5;

/// Attributes of a device.
mod attribute {
    pub const INDEX: u16 = 1;
    pub const SIZE: u16 = 2;
    pub const BLOCK_SIZE: u16 = 3;
    pub const TIMEOUT: u16 = 4;
    pub const SERVER_FLAGS: u16 = 5;
    pub const CLIENT_FLAGS: u16 = 6;
    pub const SOCKETS: u16 = 7;
    pub const DEAD_CONN_TIMEOUT: u16 = 8;
    pub const DEVICE_LIST: u16 = 9;
    pub const BACKEND: u16 = 10;
}
const SOCKET_ITEM: u16 = 1;
const SOCKET_DESCRIPTOR: u16 = 1;
const DEVICE_ITEM: u16 = 1;
const DEVICE_INDEX: u16 = 1;
const DEVICE_CONNECTED: u16 = 2;

/// The kernel's devices neither go when they are detached nor are detached when they are closed.
const KEEP: u64 = 0;

/// The smallest request that a device takes, and what it says its sectors are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BlockSize {
    /// 512 bytes: what partition tables of most images count in.
    Sector,
    /// 4096 bytes.
    Block,
}

impl BlockSize {
    /// In bytes.
    pub const fn bytes(self) -> u64 {
        match self {
            BlockSize::Sector => SECTOR,
            BlockSize::Block => BLOCK,
        }
    }
}

/// A device as the kernel tells it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Status {
    /// Its number.
    pub index: u32,
    /// It is attached, or was and is still open.
    pub used: bool,
}

/// Asks for a device of `links`.
pub fn connect(family: u16, choice: Choice, what: &Setup, links: &Links) -> Result<Message> {
    check_size(links.size, what.block_size)?;
    let count = links.sockets.len();
    if count == 0 || count > MAX_CONNECTIONS {
        let what = format!("{count} connections; 1 to {MAX_CONNECTIONS} are allowed");
        return Err(Error::new(Kind::Invalid, what));
    }
    if count > 1 && links.flags & flag::CAN_MULTI_CONN == 0 {
        let what = format!("{count} connections to a server that allows one; ask for one");
        return Err(Error::new(Kind::Unsupported, what));
    }
    let mut message = Message::new(family, CONNECT, VERSION);
    if let Choice::Number(index) = choice {
        message = message.u32(attribute::INDEX, index);
    }
    message = message
        .u64(attribute::SIZE, links.size)
        .u64(attribute::BLOCK_SIZE, what.block_size.bytes())
        .u64(attribute::SERVER_FLAGS, u64::from(links.flags))
        .u64(attribute::CLIENT_FLAGS, KEEP)
        .u64(attribute::TIMEOUT, 0)
        .u64(attribute::DEAD_CONN_TIMEOUT, what.dead_after.as_secs())
        .string(attribute::BACKEND, &what.backend);
    Ok(sockets(message, links))
}

/// Gives a device new connections.
pub fn reconnect(family: u16, index: u32, what: &Setup, links: &Links) -> Message {
    let message = reconfigure(family, index, what)
        .u64(attribute::DEAD_CONN_TIMEOUT, what.dead_after.as_secs());
    sockets(message, links)
}

/// Changes how long requests may take, and may wait for a connection.
pub fn limits(
    family: u16,
    index: u32,
    what: &Setup,
    timeout: Duration,
    dead_after: Duration,
) -> Message {
    reconfigure(family, index, what)
        .u64(attribute::TIMEOUT, timeout.as_secs())
        .u64(attribute::DEAD_CONN_TIMEOUT, dead_after.as_secs())
}

/// Changes a device's size.
pub fn resize(family: u16, index: u32, what: &Setup, size: u64) -> Message {
    reconfigure(family, index, what).u64(attribute::SIZE, size)
}

/// Ends a device.
pub fn disconnect(family: u16, index: u32) -> Message {
    Message::new(family, DISCONNECT, VERSION).u32(attribute::INDEX, index)
}

/// Asks for all devices.
pub fn status(family: u16) -> Message {
    Message::new(family, STATUS, VERSION)
}

/// The number in an answer to `connect`; `None` if it is an answer to something else.
pub fn connected(command: u8, attributes: Attributes<'_>) -> Result<Option<u32>, Malformed> {
    match command {
        CONNECT => attributes.u32(attribute::INDEX),
        _ => Ok(None),
    }
}

/// Adds the devices in an answer to `status`.
pub fn statuses(
    command: u8,
    attributes: Attributes<'_>,
    devices: &mut Vec<Status>,
) -> Result<(), Malformed> {
    if command != STATUS {
        return Ok(());
    }
    let list = attributes.find(attribute::DEVICE_LIST)?.unwrap_or_default();
    for item in Attributes::new(list) {
        let (DEVICE_ITEM, item) = item? else { continue };
        let item = Attributes::new(item);
        let used = item.find(DEVICE_CONNECTED)?.and_then(|data| data.first());
        if let (Some(index), Some(used)) = (item.u32(DEVICE_INDEX)?, used) {
            devices.push(Status { index, used: *used != 0 });
        }
    }
    Ok(())
}

/// The lowest number from `from` on that no device in use has.
pub fn free(devices: &[Status], from: u32) -> u32 {
    let used: BTreeSet<u32> =
        devices.iter().filter(|status| status.used).map(|status| status.index).collect();
    used.range(from..)
        .fold(from, |free, index| if *index == free { free.saturating_add(1) } else { free })
}

/// Whether a device can have this size.
pub fn check_size(size: u64, block_size: BlockSize) -> Result<()> {
    let block = block_size.bytes();
    let fits = size != 0 && size.is_multiple_of(block) && i64::try_from(size).is_ok();
    match fits {
        true => Ok(()),
        false => {
            let what = format!("{size} bytes are no size for a device with sectors of {block}");
            Err(Error::new(Kind::Invalid, what))
        }
    }
}

fn reconfigure(family: u16, index: u32, what: &Setup) -> Message {
    Message::new(family, RECONFIGURE, VERSION)
        .u32(attribute::INDEX, index)
        .string(attribute::BACKEND, &what.backend)
}

fn sockets(message: Message, links: &Links) -> Message {
    message.nested(attribute::SOCKETS, |mut list| {
        for socket in &links.sockets {
            // Descriptors are not negative.
            let descriptor = socket.as_raw_fd().unsigned_abs();
            list = list.nested(SOCKET_ITEM, |item| item.u32(SOCKET_DESCRIPTOR, descriptor));
        }
        list
    })
}
