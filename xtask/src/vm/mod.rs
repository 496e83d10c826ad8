//! `cargo xtask vm`: tests that need a kernel with ublk, NBD and device-mapper, run within a guest
//! that has one, against the programs as they were built.
//!
//! The guest is Debian's newest cloud kernel under qemu's own emulator (no KVM needed), with an
//! initramfs that holds `underlay`, this program, and what the tests call. This program is the
//! driver in there too (`xtask inside`): a test is a Rust function that runs in the guest and uses
//! the same modules as every other rig (`tool`, `daemon`, `nbd`, `pattern`, ...).
//!
//! # Adding a test
//!
//! Write `vm/NAME.rs` with `pub fn run(guest: &mut Guest) -> Result<()>`, and enter it in [`TESTS`]
//! with its disks and its limit. In it:
//! - `guest.check("what must hold", |guest| ... Ok(figures))?` for each thing that is checked. An
//!   error fails the check and the test goes on; `?` outside of a check ends the test as failed.
//! - `guest.format("a")?` gives disk a with its file system, mounted; `guest.device("a")?` the bare
//!   device; `guest.mapped` a device-mapper device on it, `guest.mount_device` mounts any of them.
//! - `guest.daemon("")?` a daemon of its own, `guest.dir()` a directory in memory.
//! - `guest.need(&["fio"])?` skips the check, loudly, where the host lacks a program; a new program
//!   goes into the list in `initramfs.rs`, a new kernel module as well.
//!
//! Tests that share a boot run one after the other on the same drives, which each formats for
//! itself. A test whose `boots` is [`Boots::Cut`] has boots of its own: the power is cut some time
//! after it said `guest.ready()?`, and it is called again with `guest.phase` one higher, on the same
//! disks, until `guest.last`. What it must remember it tells the host (`guest.tell`), and is told
//! again (`guest.told`).

mod bench;
mod copies;
mod guest;
mod initramfs;
mod inside;
mod limited;
mod log;
mod machine;
mod mapped;
mod marks;
mod nbd;
mod power;
mod probes;
mod run;
mod sick;
mod smoke;
mod stress;
mod together;
mod ublk;
mod udev;
mod wire;

use std::time::Duration;

use anyhow::Result;

pub use inside::run as inside;
pub use run::{Options, figures, run};

use self::guest::Guest;
use self::machine::Cache;
use crate::lab::Fs;

/// A test that runs in the guest.
pub struct Test {
    /// What it is called.
    pub name: &'static str,
    /// What it shows, in one line.
    pub about: &'static str,
    /// The disks that it has.
    pub disks: &'static [Disk],
    /// How long it may take, on two slow processors that others use too.
    pub limit: Duration,
    /// Whose boot it runs in.
    pub boots: Boots,
    /// The test.
    pub run: fn(&mut Guest) -> Result<()>,
}

/// A disk of a test.
pub struct Disk {
    /// How the test calls it.
    pub name: &'static str,
    /// In bytes; the file behind it is sparse.
    pub size: u64,
    /// What [`Guest::format`] makes on it.
    pub fs: Fs,
}

/// Whose boot a test runs in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Boots {
    /// One that it shares with others.
    Shared,
    /// Its own, ended by power cuts, on drives of this kind.
    Cut(Cache),
}

/// A gibibyte.
const GIB: u64 = 1 << 30;

/// No test but the guest's side of `cargo xtask bench ublk`, which measures.
pub const BENCH: Test = Test {
    name: "bench",
    about: "kernel block devices side by side",
    disks: &[
        Disk { name: "a", size: 2 * GIB, fs: Fs::Ext4 },
        Disk { name: "b", size: 3 * GIB, fs: Fs::Ext4 },
        Disk { name: "c", size: GIB / 2, fs: Fs::Ext4 },
        Disk { name: "d", size: GIB / 2, fs: Fs::Ext4 },
    ],
    // As many rounds as one may ask for; what hangs has a limit of its own.
    limit: Duration::from_secs(6 * 3600),
    boots: Boots::Shared,
    run: bench::run,
};

/// Every test there is, in the order in which they run.
pub const TESTS: &[Test] = &[
    Test {
        name: "smoke",
        about: "the guest has what tests need; the daemon serves in it",
        disks: &[
            Disk { name: "a", size: 2 * GIB, fs: Fs::Ext4 },
            Disk { name: "b", size: 2 * GIB, fs: Fs::Xfs },
        ],
        limit: Duration::from_secs(180),
        boots: Boots::Shared,
        run: smoke::run,
    },
    Test {
        name: "ublk",
        about: "images and replicas as block devices: contents, load, restarts, growing",
        disks: &[
            Disk { name: "a", size: 2 * GIB, fs: Fs::Ext4 },
            Disk { name: "b", size: 2 * GIB, fs: Fs::Xfs },
        ],
        limit: Duration::from_secs(400),
        boots: Boots::Shared,
        run: ublk::run,
    },
    Test {
        name: "nbd",
        about: "the kernel's NBD client: devices that outlive the daemon",
        disks: &[Disk { name: "a", size: 2 * GIB, fs: Fs::Ext4 }],
        limit: Duration::from_secs(240),
        boots: Boots::Shared,
        run: nbd::run,
    },
    Test {
        name: "together",
        about: "three file systems, ublk and NBD devices, one image, all at once",
        disks: &[
            Disk { name: "a", size: 2 * GIB, fs: Fs::Ext4 },
            Disk { name: "b", size: 2 * GIB, fs: Fs::Xfs },
            Disk { name: "c", size: 2 * GIB, fs: Fs::Btrfs },
        ],
        limit: Duration::from_secs(240),
        boots: Boots::Shared,
        run: together::run,
    },
    Test {
        name: "udev",
        about: "links by udev's rules; devices of a daemon that isn't root",
        disks: &[Disk { name: "a", size: 2 * GIB, fs: Fs::Ext4 }],
        limit: Duration::from_secs(180),
        boots: Boots::Shared,
        run: udev::run,
    },
    Test {
        name: "sick",
        about: "disks that fail, hang and are full, beneath what is attached",
        disks: &[
            Disk { name: "a", size: 2 * GIB, fs: Fs::Ext4 },
            Disk { name: "b", size: 2 * GIB, fs: Fs::Ext4 },
            Disk { name: "c", size: 2 * GIB, fs: Fs::Xfs },
        ],
        limit: Duration::from_secs(240),
        boots: Boots::Shared,
        run: sick::run,
    },
    Test {
        name: "copies",
        about: "an image with two copies, one of whose disks fails or hangs; replicas that move",
        disks: &[
            Disk { name: "a", size: 2 * GIB, fs: Fs::Ext4 },
            Disk { name: "b", size: 2 * GIB, fs: Fs::Ext4 },
            Disk { name: "c", size: 2 * GIB, fs: Fs::Xfs },
        ],
        limit: Duration::from_secs(240),
        boots: Boots::Shared,
        run: copies::run,
    },
    Test {
        name: "marks",
        about: "the replica's disk at every flush of its log, and torn in between: it recovers",
        disks: &[
            Disk { name: "a", size: 2 * GIB, fs: Fs::Ext4 },
            Disk { name: "b", size: 2 * GIB, fs: Fs::Ext4 },
            Disk { name: "c", size: 2 * GIB, fs: Fs::Xfs },
        ],
        limit: Duration::from_secs(300),
        boots: Boots::Shared,
        run: marks::run,
    },
    Test {
        name: "probes",
        about: "the probes on device-mapper's devices",
        disks: &[Disk { name: "a", size: 2 * GIB, fs: Fs::Ext4 }],
        limit: Duration::from_secs(180),
        boots: Boots::Shared,
        run: probes::run,
    },
    Test {
        name: "power",
        about: "power cuts under flushed writes: what was flushed is there in the next boot",
        disks: &[
            Disk { name: "a", size: 2 * GIB, fs: Fs::Ext4 },
            Disk { name: "b", size: 2 * GIB, fs: Fs::Xfs },
        ],
        limit: Duration::from_secs(120),
        boots: Boots::Cut(Cache::Volatile),
        run: power::run,
    },
    Test {
        name: "moves",
        about: "power cuts while a replica moves from disk to disk under flushed writes",
        disks: &[
            Disk { name: "a", size: 2 * GIB, fs: Fs::Ext4 },
            Disk { name: "b", size: 2 * GIB, fs: Fs::Xfs },
        ],
        limit: Duration::from_secs(120),
        boots: Boots::Cut(Cache::Volatile),
        run: power::moving,
    },
];
