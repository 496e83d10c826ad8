//! The layouts that the eBPF programs and user space share, and the one function that both compute:
//! which bucket of a histogram a time falls into.
//!
//! Invariants:
//! - Everything here is `repr(C)`, of fixed size, without padding that is not named, and valid for
//!   every pattern of bits: user space reads it from maps as plain bytes.
//! - Times are nanoseconds of the kernel's monotonic clock, sizes are sectors of 512 bytes.
//! - Sectors are absolute on the whole disk, also for I/O that came in by a partition: the kernel has
//!   added the partition's start by the time the first tracepoint fires.
#![no_std]

/// Most disks that can be watched at once.
pub const SLOTS: u32 = 64;
/// Most copies of a slot's counters. More processors than this share them, and add atomically.
pub const SHARDS: u32 = 16;
/// Sets of watched device numbers: 64 disks with 64 numbers each fill half of them.
pub const WATCHED: u32 = 2 << 10;
/// Sets of processes whose I/O counts as our own.
pub const OWNERS: u32 = 64;
/// Places of a [`Set`]: that many entries whose keys fall together.
pub const WAYS: usize = 4;
/// Places of a set of [`Bios`] or [`Flights`]: their keys fill one line of the processor's cache.
pub const PLACES: usize = 8;
/// Sets of bios between their submission and the issue of their request: 16 Ki entries.
pub const PENDING: u32 = 2 << 10;
/// Sets of requests between issue and completion: 8 Ki entries.
pub const FLIGHTS: u32 = 1 << 10;
/// Size of the ring of completed reads, in bytes: 32 Ki records of 24 bytes and a header of 8.
pub const RING: u32 = 1 << 20;

/// The first octave of a histogram: times below 2^10 ns share the first bucket.
pub const FIRST_OCTAVE: u32 = 10;
/// The octave past the last: times of 2^36 ns (68.7 s) and more share the last bucket.
pub const LAST_OCTAVE: u32 = 36;
/// Linear steps within an octave, as a power of two: a bucket is at most 1/8 of its time wide.
pub const STEPS: u32 = 3;
/// Buckets of a histogram.
pub const BUCKETS: usize = (((LAST_OCTAVE - FIRST_OCTAVE) << STEPS) + 2) as usize;

/// The bucket of a time.
#[inline(always)]
pub const fn bucket(ns: u64) -> u32 {
    if ns < 1 << FIRST_OCTAVE {
        return 0;
    }
    if ns >= 1 << LAST_OCTAVE {
        return BUCKETS as u32 - 1;
    }
    // A search by halves: eBPF has no instruction that counts leading zeroes.
    let (mut octave, mut rest) = (0, ns);
    let mut half = 32;
    while half > 0 {
        if rest >> half != 0 {
            rest >>= half;
            octave += half;
        }
        half /= 2;
    }
    let step = (ns >> (octave - STEPS)) as u32 & ((1 << STEPS) - 1);
    1 + ((octave - FIRST_OCTAVE) << STEPS) + step
}

/// The shortest time that falls into `bucket`, in nanoseconds; past the last bucket, that one's.
pub const fn floor(bucket: usize) -> u64 {
    if bucket == 0 {
        return 0;
    }
    let at = if bucket < BUCKETS { bucket as u64 - 1 } else { BUCKETS as u64 - 2 };
    let (octave, step) = (FIRST_OCTAVE as u64 + (at >> STEPS), at & ((1 << STEPS) - 1));
    ((1 << STEPS) + step) << (octave - STEPS as u64)
}

/// A watched device: an entry of a table by device number. Number 0 is none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Watched {
    /// The number, as the kernel has it.
    pub dev: u32,
    /// The slot, below [`SLOTS`].
    pub slot: u16,
    /// [`REQUESTS`] or [`BIOS`].
    pub kind: u16,
}

/// A device with requests: what counts is their issue and completion.
pub const REQUESTS: u16 = 0;
/// A device without (device-mapper, md): what counts is the submission and the end of a bio.
pub const BIOS: u16 = 1;

/// Reads.
pub const READ: u32 = 0;
/// Writes.
pub const WRITE: u32 = 1;
/// Classes of I/O: reads and writes, each foreign and own.
pub const CLASSES: usize = 4;

/// The class of an I/O, an index into [`Counters::classes`].
#[inline(always)]
pub const fn class(direction: u32, own: u32) -> u32 {
    (direction & 1) << 1 | (own & 1)
}

/// The set of a key in a table of `sets`, a power of two: of a number, or the lower half of an address.
#[inline(always)]
pub const fn set_of(key: u32, sets: u32) -> u32 {
    // Neighbours are spread by the golden ratio; the product's upper bits are the mixed ones.
    key.wrapping_mul(0x9e37_79b1) >> (32 - sets.trailing_zeros())
}

/// Entries whose keys fall together. A table is an array of sets; an entry of key 0 is free.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Set<T> {
    /// The entries.
    pub ways: [T; WAYS],
}

/// A set of bios on their way to a request.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Bios {
    /// Their addresses; 0 is a free place.
    pub keys: [u64; PLACES],
    /// When each was submitted. The lowest bit is 1 if its submitter is one of ours.
    pub queued: [u64; PLACES],
}

/// A set of requests (or bios of devices without requests) that their devices work on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Flights {
    /// Their addresses; 0 is a free place.
    pub keys: [u64; PLACES],
    /// What is known of each.
    pub flights: [Flight; PLACES],
}

/// A request (or a bio of a device without requests) that the device works on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Flight {
    /// When it was issued.
    pub issued: u64,
    /// How long it waited for that since its first bio was submitted; [`UNKNOWN`] if nobody saw it.
    pub waited: u64,
    /// Its first sector.
    pub sector: u64,
    /// Its length.
    pub sectors: u32,
    /// The slot of its disk.
    pub slot: u16,
    /// Its [`class`].
    pub class: u8,
    /// 1: given back by the driver, to be issued again.
    pub requeued: u8,
}

/// A time that nobody saw.
pub const UNKNOWN: u64 = u64::MAX;
/// A completed read, in the ring.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Touch {
    /// Its first sector.
    pub sector: u64,
    /// Device time.
    pub ns: u64,
    /// Its length.
    pub sectors: u32,
    /// The slot.
    pub slot: u16,
    /// 1: our own.
    pub own: u8,
    /// 1: it failed.
    pub failed: u8,
}

/// Counters of one class of I/O on one disk. They only grow, and wrap.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Class {
    /// Completed requests.
    pub count: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Those among them that failed.
    pub errors: u64,
    /// Sum of device times.
    pub device_ns: u64,
    /// Sum of queue times.
    pub queue_ns: u64,
    /// Requests whose queue time is known.
    pub queued: u64,
    /// Histogram of device times.
    pub device: [u32; BUCKETS],
    /// Histogram of queue times.
    pub queue: [u32; BUCKETS],
}

impl Default for Class {
    fn default() -> Class {
        Class {
            count: 0,
            bytes: 0,
            errors: 0,
            device_ns: 0,
            queue_ns: 0,
            queued: 0,
            device: [0; BUCKETS],
            queue: [0; BUCKETS],
        }
    }
}

/// What is counted for one slot in one shard; entry `slot * shards + shard` of its map.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Counters {
    /// By [`class`].
    pub classes: [Class; CLASSES],
}

/// What was not counted; one entry for all slots. They only grow.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Losses {
    /// Requests not followed because the map of flights was full.
    pub full: u64,
    /// Completed reads that did not fit into the ring.
    pub ring: u64,
    /// Completions without an issue that was seen: begun before the watch, or lost.
    pub unmatched: u64,
    /// Issues without a submission that was seen: counted, but as foreign and without queue time.
    pub orphans: u64,
    /// Flights whose place the next request at the same address took: their end was not seen.
    pub replaced: u64,
}

/// Where the members that the programs read lie within the running kernel's structures, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Offsets {
    /// `bio.bi_next`, a pointer.
    pub bio_next: u64,
    /// `bio.bi_bdev`, a pointer.
    pub bio_bdev: u64,
    /// `bio.bi_opf`, 4 bytes.
    pub bio_opf: u64,
    /// `bio.bi_status`, 1 byte.
    pub bio_status: u64,
    /// `bio.bi_iter.bi_sector`, 8 bytes.
    pub bio_sector: u64,
    /// `bio.bi_iter.bi_size`, 4 bytes.
    pub bio_size: u64,
    /// `bio.bi_private`, a pointer.
    pub bio_private: u64,
    /// `block_device.bd_dev`, 4 bytes.
    pub bdev_dev: u64,
    /// `request.q`, a pointer.
    pub request_queue: u64,
    /// `request.cmd_flags`, 4 bytes.
    pub request_opf: u64,
    /// `request.__data_len`, 4 bytes.
    pub request_bytes: u64,
    /// `request.__sector`, 8 bytes.
    pub request_sector: u64,
    /// `request.bio`, a pointer.
    pub request_bio: u64,
    /// `request_queue.disk`, a pointer.
    pub queue_disk: u64,
    /// `gendisk.major`, 4 bytes.
    pub disk_major: u64,
    /// `gendisk.first_minor`, 4 bytes.
    pub disk_minor: u64,
}

const _: () = assert!(size_of::<Bios>() == 128 && size_of::<Flights>() == 320);
const _: () = assert!(size_of::<Touch>() == 24 && size_of::<Class>() == 48 + 8 * BUCKETS);
const _: () = assert!(size_of::<Set<Watched>>() == 32 && size_of::<Set<u32>>() == 16);
const _: () = assert!(size_of::<Counters>() == 6912 && SLOTS <= 256);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_and_floors_agree() {
        for at in 1..BUCKETS {
            let floor = floor(at);
            assert_eq!(bucket(floor), at as u32, "floor {floor}");
            assert_eq!(bucket(floor - 1), at as u32 - 1, "below {floor}");
        }
        assert_eq!((bucket(0), bucket(1023), bucket(1024)), (0, 0, 1));
        assert_eq!(bucket(u64::MAX), BUCKETS as u32 - 1);
        assert_eq!(floor(BUCKETS - 1), 1 << LAST_OCTAVE);
    }

    #[test]
    fn a_bucket_is_at_most_an_eighth_of_its_time_wide() {
        for at in 1..BUCKETS - 1 {
            assert!((floor(at + 1) - floor(at)) * 8 <= floor(at), "bucket {at}");
        }
    }

    #[test]
    fn neighbours_do_not_crowd_one_set() {
        // As far apart as requests and bios are: with what drivers keep behind them, in pages or not.
        for step in [128, 192, 248, 256, 320, 384, 448, 512, 640, 1024, 4096, 65_536] {
            let mut sets = [0u8; FLIGHTS as usize];
            let mut lost = 0;
            for at in 0..2048 {
                let set = &mut sets[set_of(0x8a3f_1000 + at * step, FLIGHTS) as usize];
                match *set < PLACES as u8 {
                    true => *set += 1,
                    false => lost += 1,
                }
            }
            assert!(lost <= 8, "{lost} of 2048 by steps of {step} found no place");
        }
    }
}
