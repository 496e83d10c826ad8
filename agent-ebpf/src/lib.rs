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

/// Most disks that can be watched at once. A slot fits into one byte of a [`key`].
pub const SLOTS: u32 = 64;
/// Most copies of a slot's counters. More processors than this share them: additions are atomic.
pub const SHARDS: u32 = 16;
/// Sets of watched device numbers: 64 disks with 64 numbers each fill half of them.
pub const WATCHED: u32 = 2 << 10;
/// Sets of processes whose I/O counts as our own.
pub const OWNERS: u32 = 64;
/// Places of a [`Set`]: that many entries whose keys fall together.
pub const WAYS: usize = 4;
/// Sets of bios between their submission and the issue of their request: 16 Ki entries, beside the
/// [`NEAR`] ones.
pub const PENDING: u32 = 4 << 10;
/// Sets of requests between issue and completion: 8 Ki entries, beside the [`NEAR`] ones.
pub const FLIGHTS: u32 = 2 << 10;
/// Sets at the beginning of either table that are filled first: 256 entries, as many as are under way
/// on most machines, in so little memory that it stays in the processor's nearest caches.
pub const NEAR: u32 = 64;
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
    /// The number, as tracepoints have it.
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

/// The key of a bio or request: slot, direction, and one sector that tells it from others.
///
/// For a [`Pending`] bio that is its first sector, where the request that takes it will begin or
/// continue. For a [`Flight`] it is the sector past its end, which is the same however much of it
/// was done by the time a tracepoint fires: the kernel advances the start.
#[inline(always)]
pub const fn key(slot: u32, direction: u32, sector: u64) -> u64 {
    ((slot & 0xff) as u64) << 56 | ((direction & 1) as u64) << 55 | TAKEN | (sector & (TAKEN - 1))
}

/// The slot in a [`key`].
pub const fn slot_of(key: u64) -> u32 {
    (key >> 56) as u32
}

/// The direction in a [`key`].
pub const fn direction_of(key: u64) -> u32 {
    (key >> 55) as u32 & 1
}

/// The set of a key in a table of `sets`, a power of two.
#[inline(always)]
pub const fn set_of(key: u64, sets: u32) -> u32 {
    // Neighbours are spread by the golden ratio; the upper bits of the product are the mixed ones.
    (key.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 40) as u32 & (sets - 1)
}

/// The two sets in which an entry of this [`key`] may be, in a table of `sets` beside the near ones.
#[inline(always)]
pub const fn sets_of(key: u64, sets: u32) -> [u32; 2] {
    [set_of(key, NEAR), NEAR + set_of(key.rotate_left(17), sets)]
}

/// Entries whose keys fall together. A table is an array of sets; an entry of key 0 is free.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Set<T> {
    /// The entries. Two with one key are two I/Os of one place at one time.
    pub ways: [T; WAYS],
}

/// Set in every key of a table, so that none is 0.
pub const TAKEN: u64 = 1 << 54;

/// A bio on its way to a request.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Pending {
    /// Its [`key`].
    pub key: u64,
    /// When it was submitted.
    pub queued: u64,
    /// Its length.
    pub sectors: u32,
    /// 1: its submitter is one of ours.
    pub own: u32,
}

/// A request (or a bio of a device without requests) that the device works on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Flight {
    /// Its [`key`].
    pub key: u64,
    /// When it was issued; 0 while the entry is being written.
    pub issued: u64,
    /// How long it waited for that since its first bio was submitted; [`UNKNOWN`] if nobody saw it.
    pub waited: u64,
    /// Its first sector.
    pub sector: u64,
    /// Its length.
    pub sectors: u32,
    /// [`OWN`], [`REQUEUED`].
    pub flags: u32,
}

/// A time that nobody saw.
pub const UNKNOWN: u64 = u64::MAX;
/// Of [`Flight::flags`]: our own.
pub const OWN: u32 = 1;
/// Of [`Flight::flags`]: given back by the driver.
pub const REQUEUED: u32 = 2;

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
    /// No loss: how many requests are marked [`REQUEUED`] now, or were when they were swept.
    pub requeued: u64,
}

/// Where the fields of one tracepoint lie in its record, from tracefs. A field that the tracepoint
/// doesn't have is at 0.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Fields {
    /// `dev`, 4 bytes.
    pub dev: u32,
    /// `sector`, 8 bytes.
    pub sector: u32,
    /// `nr_sector`, 4 bytes; of block_split `new_sector`, 8 bytes.
    pub sectors: u32,
    /// `rwbs`, text.
    pub rwbs: u32,
    /// `error`, 4 bytes.
    pub error: u32,
}

/// How much of a record the programs read, in bytes: every field must lie within.
pub const RECORD: usize = 64;

const _: () = assert!(size_of::<Set<Pending>>() == 96 && size_of::<Set<Flight>>() == 160);
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
        for step in [1, 8, 64, 512, 2048, 1 << 20] {
            let mut sets = [0u8; (NEAR + FLIGHTS) as usize];
            let mut lost = 0;
            for at in 0..2048 {
                let sets_of = sets_of(key(3, READ, 4096 + at * step), FLIGHTS);
                match sets_of.into_iter().find(|set| sets[*set as usize] < WAYS as u8) {
                    Some(set) => sets[set as usize] += 1,
                    None => lost += 1,
                }
            }
            assert!(lost <= 8, "{lost} of 2048 by steps of {step} found no place");
        }
    }

    #[test]
    fn keys_keep_slot_direction_and_sector_apart() {
        let key = key(63, WRITE, TAKEN - 1);
        assert_eq!((slot_of(key), direction_of(key)), (63, WRITE));
        assert_ne!(super::key(1, READ, 5), super::key(1, WRITE, 5));
        assert_eq!(super::key(0, READ, 0), TAKEN);
    }
}
