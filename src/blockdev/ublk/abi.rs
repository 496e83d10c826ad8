//! What the ublk driver and its servers tell each other, byte for byte (linux/ublk_cmd.h).
//!
//! All numbers are in the machine's own order. Pure.

#![expect(clippy::host_endian_bytes, reason = "the kernel on this machine is the other side")]

use crate::{blockdev::Info, units::SECTOR};

/// `ioctl`-encoded numbers of commands.
const fn number(direction: u32, size: u32, command: u32) -> u32 {
    direction << 30 | size << 16 | (b'u' as u32) << 8 | command
}

const READ: u32 = 2;
const READ_WRITE: u32 = 3;
const CONTROL: u32 = 32;
const IO: u32 = 16;

/// Commands to `/dev/ublk-control`.
pub(super) mod control {
    use super::{CONTROL, READ, READ_WRITE, number};

    pub(crate) const GET_DEV_INFO: u32 = number(READ, CONTROL, 0x02);
    pub(crate) const GET_DEV_INFO2: u32 = number(READ, CONTROL, 0x12);
    pub(crate) const ADD_DEV: u32 = number(READ_WRITE, CONTROL, 0x04);
    pub(crate) const DEL_DEV: u32 = number(READ_WRITE, CONTROL, 0x05);
    pub(crate) const START_DEV: u32 = number(READ_WRITE, CONTROL, 0x06);
    pub(crate) const STOP_DEV: u32 = number(READ_WRITE, CONTROL, 0x07);
    pub(crate) const SET_PARAMS: u32 = number(READ_WRITE, CONTROL, 0x08);
    pub(crate) const START_USER_RECOVERY: u32 = number(READ_WRITE, CONTROL, 0x10);
    pub(crate) const END_USER_RECOVERY: u32 = number(READ_WRITE, CONTROL, 0x11);
    pub(crate) const GET_FEATURES: u32 = number(READ, CONTROL, 0x13);
    pub(crate) const UPDATE_SIZE: u32 = number(READ_WRITE, CONTROL, 0x15);
    pub(crate) const DEL_DEV_ASYNC: u32 = number(READ, CONTROL, 0x14);
    pub(crate) const QUIESCE_DEV: u32 = number(READ_WRITE, CONTROL, 0x16);
    pub(crate) const TRY_STOP_DEV: u32 = number(READ_WRITE, CONTROL, 0x17);
}

/// The first command of a tag: wait for a request.
pub(super) const FETCH: u32 = number(READ_WRITE, IO, 0x20);
/// Every later one: answer the request, and wait for the next.
pub(super) const COMMIT_AND_FETCH: u32 = number(READ_WRITE, IO, 0x21);

/// What a device, or the driver, can do.
pub(super) mod flag {
    pub(crate) const SUPPORT_ZERO_COPY: u64 = 1 << 0;
    pub(crate) const USER_RECOVERY: u64 = 1 << 3;
    pub(crate) const USER_RECOVERY_REISSUE: u64 = 1 << 4;
    pub(crate) const UNPRIVILEGED_DEV: u64 = 1 << 5;
    pub(crate) const CMD_IOCTL_ENCODE: u64 = 1 << 6;
    pub(crate) const USER_COPY: u64 = 1 << 7;
    pub(crate) const UPDATE_SIZE: u64 = 1 << 10;
    pub(crate) const AUTO_BUF_REG: u64 = 1 << 11;
    pub(crate) const QUIESCE: u64 = 1 << 12;
    pub(crate) const SAFE_STOP_DEV: u64 = 1 << 17;
    pub(crate) const NO_AUTO_PART_SCAN: u64 = 1 << 18;

    /// What zero copy needs: the request's pages as registered buffers, and a way to copy some of
    /// their bytes.
    pub(crate) const ZERO_COPY: u64 = SUPPORT_ZERO_COPY | AUTO_BUF_REG | USER_COPY;
}

/// States of a device.
pub(super) mod state {
    pub(crate) const DEAD: u16 = 0;
    pub(crate) const QUIESCED: u16 = 2;
    pub(crate) const FAIL_IO: u16 = 3;
}

/// Where `/dev/ublkcN` maps the data of requests.
const DATA: u64 = 0x8000_0000;
/// Tags that a queue has room for in the mapping of descriptors.
const MAX_DEPTH: u64 = 4096;
/// Words of a descriptor.
const DESCRIPTOR: usize = 3;

/// Where `/dev/ublkcN` maps the descriptors of a queue, and how many words they are.
pub(super) fn descriptors(queue: u16, depth: u16) -> (u64, usize) {
    let stride = (MAX_DEPTH * DESCRIPTOR as u64 * 8).next_multiple_of(4096);
    (u64::from(queue) * stride, usize::from(depth) * DESCRIPTOR)
}

/// Where `/dev/ublkcN` maps the data of a tag's request.
pub(super) const fn position(queue: u16, tag: u16) -> u64 {
    DATA + ((queue as u64) << 41 | (tag as u64) << 25)
}

/// A command to `/dev/ublk-control`, without the operand.
pub(super) fn control_command(id: u32, value: u64, path_len: u16) -> [u8; 80] {
    let mut bytes = [0; 80];
    bytes[..4].copy_from_slice(&id.to_ne_bytes());
    bytes[4..6].copy_from_slice(&u16::MAX.to_ne_bytes());
    bytes[16..24].copy_from_slice(&value.to_ne_bytes());
    bytes[24..26].copy_from_slice(&path_len.to_ne_bytes());
    bytes
}
/// Where in such a command the operand's length is told, and where its address.
pub(super) const OPERAND: (usize, usize) = (6, 8);

/// A command to `/dev/ublkcN`: the tag's last result, and the memory for its next request.
pub(super) fn io_command(queue: u16, tag: u16, result: i32, address: u64) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[..2].copy_from_slice(&queue.to_ne_bytes());
    bytes[2..4].copy_from_slice(&tag.to_ne_bytes());
    bytes[4..8].copy_from_slice(&result.to_ne_bytes());
    bytes[8..].copy_from_slice(&address.to_ne_bytes());
    bytes
}

/// A device as the driver knows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct DeviceInfo {
    pub(super) queues: u16,
    pub(super) depth: u16,
    pub(super) state: u16,
    /// Bytes of the largest request.
    pub(super) max_io: u32,
    /// Its number; `u32::MAX` asks for any.
    pub(super) id: u32,
    /// The process that serves it.
    pub(super) server: i32,
    pub(super) flags: u64,
    /// What its maker marked it with; the driver does not care.
    pub(super) mark: u64,
}

impl DeviceInfo {
    pub(super) const BYTES: usize = 64;

    pub(super) fn encode(&self) -> [u8; DeviceInfo::BYTES] {
        let mut bytes = [0; DeviceInfo::BYTES];
        bytes[..2].copy_from_slice(&self.queues.to_ne_bytes());
        bytes[2..4].copy_from_slice(&self.depth.to_ne_bytes());
        bytes[4..6].copy_from_slice(&self.state.to_ne_bytes());
        bytes[8..12].copy_from_slice(&self.max_io.to_ne_bytes());
        bytes[12..16].copy_from_slice(&self.id.to_ne_bytes());
        bytes[16..20].copy_from_slice(&self.server.to_ne_bytes());
        bytes[24..32].copy_from_slice(&self.flags.to_ne_bytes());
        bytes[32..40].copy_from_slice(&self.mark.to_ne_bytes());
        bytes
    }

    pub(super) fn decode(bytes: &[u8; DeviceInfo::BYTES]) -> DeviceInfo {
        let u16_at = |at| u16::from_ne_bytes(part(bytes, at));
        let u32_at = |at| u32::from_ne_bytes(part(bytes, at));
        let u64_at = |at| u64::from_ne_bytes(part(bytes, at));
        DeviceInfo {
            queues: u16_at(0),
            depth: u16_at(2),
            state: u16_at(4),
            max_io: u32_at(8),
            id: u32_at(12),
            server: i32::from_ne_bytes(part(bytes, 16)),
            flags: u64_at(24),
            mark: u64_at(32),
        }
    }
}

/// The `N` bytes at `at`.
fn part<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    let mut part = [0; N];
    part.copy_from_slice(&bytes[at..at + N]);
    part
}

/// A number that the driver wrote.
pub(super) fn number_of(bytes: [u8; 8]) -> u64 {
    u64::from_ne_bytes(bytes)
}

/// The parameters of a device like `info`, whose requests have `max_io` bytes at most.
pub(super) fn params(info: Info, max_io: u32) -> [u8; 120] {
    const BASIC: u32 = 1;
    const DISCARD: u32 = 2;
    const DMA_ALIGN: u32 = 16;
    const READ_ONLY: u32 = 1;
    const ROTATIONAL: u32 = 2;
    const VOLATILE_CACHE: u32 = 4;
    const FUA: u32 = 8;
    /// Shifts of the logical and physical block, of the optimal and least transfer.
    const SHIFTS: [u8; 4] = [9, 12, 12, 12];
    /// Sectors of one discard or zeroing: 1 GiB.
    const MAX_DISCARD: u32 = 1 << 21;
    let mut bytes = [0; 120];
    let mut put = |at: usize, value: u32| bytes[at..at + 4].copy_from_slice(&value.to_ne_bytes());
    let kinds = if info.read_only { BASIC } else { BASIC | DISCARD };
    put(0, 120);
    put(4, kinds | DMA_ALIGN);
    let mut attributes = if info.read_only { READ_ONLY } else { VOLATILE_CACHE | FUA };
    if info.rotational {
        attributes |= ROTATIONAL;
    }
    put(8, attributes);
    put(16, max_io / SECTOR as u32);
    if !info.read_only {
        // Alignment 0, granularity, sectors of a discard and of a zeroing, one range at a time.
        for (at, value) in [(44, 4096), (48, MAX_DISCARD), (52, MAX_DISCARD), (56, 1)] {
            put(at, value);
        }
    }
    // Clients whose memory is less aligned are turned away by the kernel, or copied.
    put(108, 511);
    bytes[12..16].copy_from_slice(&SHIFTS);
    bytes[24..32].copy_from_slice(&(info.size / SECTOR).to_ne_bytes());
    bytes
}

/// What a request asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Operation {
    Read,
    Write,
    Flush,
    Discard,
    WriteZeroes,
    /// One that this server does not know.
    Unknown(u8),
}

/// A request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Request {
    pub(super) operation: Operation,
    /// First byte; nothing for a flush.
    pub(super) offset: u64,
    /// Bytes; nothing for a flush.
    pub(super) len: u64,
    /// It is durable when answered.
    pub(super) fua: bool,
    /// Zeros keep their space.
    pub(super) keep: bool,
}

impl Request {
    /// The request of a tag, of which `word` reads a word of the queue's descriptors.
    pub(super) fn decode(tag: u16, word: impl Fn(usize) -> u64) -> Request {
        const FUA: u64 = 1 << 13;
        const NO_UNMAP: u64 = 1 << 15;
        let at = usize::from(tag) * DESCRIPTOR;
        // Two 32-bit fields share a word, in the machine's order.
        let bytes = word(at).to_ne_bytes();
        let flags = u64::from(u32::from_ne_bytes(part(&bytes, 0)));
        let sectors = u64::from(u32::from_ne_bytes(part(&bytes, 4)));
        let operation = match flags as u8 {
            0 => Operation::Read,
            1 => Operation::Write,
            2 => Operation::Flush,
            3 => Operation::Discard,
            5 => Operation::WriteZeroes,
            other => Operation::Unknown(other),
        };
        let (offset, len) = match operation {
            // Its first sector is u64::MAX: not a number to reckon with.
            Operation::Flush => (0, 0),
            _ => (word(at + 1).saturating_mul(SECTOR), sectors * SECTOR),
        };
        Request { operation, offset, len, fua: flags & FUA != 0, keep: flags & NO_UNMAP != 0 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_the_drivers() {
        // As the header's _IOWR and _IOR make them.
        assert_eq!(control::ADD_DEV, 0xc020_7504);
        assert_eq!(control::GET_FEATURES, 0x8020_7513);
        assert_eq!(FETCH, 0xc010_7520);
        assert_eq!(COMMIT_AND_FETCH, 0xc010_7521);
        assert_eq!(flag::ZERO_COPY | flag::CMD_IOCTL_ENCODE, 0x8c1);
        assert_eq!(position(1, 2), 0x8000_0000 + (1 << 41) + (2 << 25));
        assert_eq!(descriptors(2, 64), (2 * 24 * 4096, 192));
    }

    #[test]
    fn a_device_survives_its_encoding() {
        let info = DeviceInfo {
            queues: 2,
            depth: 64,
            state: 1,
            max_io: 1 << 20,
            id: 0x0102_0304,
            server: -5,
            flags: 0x0123_4567_89ab_cdef,
            mark: u64::MAX - 1,
        };
        assert_eq!(DeviceInfo::decode(&info.encode()), info);
    }

    #[test]
    fn parameters_say_what_the_device_is() {
        let word = |bytes: &[u8], at: usize| {
            u32::from_ne_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
        };
        let base = params(Info { size: 1 << 20, read_only: true, rotational: true }, 1 << 19);
        assert_eq!((word(&base, 0), word(&base, 4), word(&base, 8)), (120, 1 | 16, 1 | 2));
        assert_eq!((word(&base, 16), word(&base, 24), word(&base, 28)), (1024, 2048, 0));
        assert_eq!((word(&base, 48), word(&base, 108)), (0, 511));
        let replica = params(Info { size: 5 << 40, read_only: false, rotational: false }, 1 << 20);
        assert_eq!((word(&replica, 4), word(&replica, 8)), (1 | 2 | 16, 4 | 8));
        assert_eq!((word(&replica, 24), word(&replica, 28)), (0x8000_0000, 2));
        assert_eq!((word(&replica, 44), word(&replica, 56)), (4096, 1));
    }

    #[test]
    fn requests_are_read_from_descriptors() {
        let words = |flags: u32, sectors: u32, start: u64| {
            let first = [flags.to_ne_bytes(), sectors.to_ne_bytes()].concat();
            let first = u64::from_ne_bytes(first.try_into().unwrap());
            move |index: usize| [0, 0, 0, first, start, 0][index]
        };
        let request = Request::decode(1, words(1 | 1 << 13, 8, 16));
        let (operation, fua, keep) = (Operation::Write, true, false);
        assert_eq!(request, Request { operation, offset: 8192, len: 4096, fua, keep });
        let flush = Request::decode(1, words(2, 0, u64::MAX));
        assert_eq!((flush.operation, flush.offset, flush.len), (Operation::Flush, 0, 0));
        let zeroes = Request::decode(1, words(5 | 1 << 15, u32::MAX, 1));
        assert!(zeroes.keep && zeroes.len == u64::from(u32::MAX) * 512);
        let unknown = Request::decode(1, words(9, 1, u64::MAX));
        assert_eq!((unknown.operation, unknown.offset), (Operation::Unknown(9), u64::MAX));
    }
}
