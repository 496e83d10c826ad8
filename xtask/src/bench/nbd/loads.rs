//! What is measured: contestants, loads, and what is asked of their ratios.

/// How bytes get to the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// Past the page cache.
    Direct,
    /// Through the page cache.
    Cached,
}

/// Who is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Who {
    /// fio on the file itself, with io_uring: what the machine can do.
    Raw,
    Underlay,
    /// Raw base, qcow2 overlays.
    QemuNbd,
    /// The same files, by the daemon that has no command line of a client's.
    StorageDaemon,
    /// Raw files; overlays by its filter `cow`, which keeps them in memory and a temporary file.
    Nbdkit,
}

impl Who {
    pub fn label(self) -> &'static str {
        match self {
            Who::Raw => "raw file, io_uring",
            Who::Underlay => "underlay",
            Who::QemuNbd => "qemu-nbd",
            Who::StorageDaemon => "qemu-storage-daemon",
            Who::Nbdkit => "nbdkit",
        }
    }

    /// Whether it does what underlay does, for others.
    pub fn is_peer(self) -> bool {
        !matches!(self, Who::Raw | Who::Underlay)
    }
}

impl Load {
    /// Whether a contestant does all that the load asks for: nbdkit's filter `cow` answers a flush and syncs
    /// nothing, since its overlay goes with the server anyway.
    pub fn is_served_by(&self, who: Who) -> bool {
        who != Who::Nbdkit || !self.args.contains(&"--fsync=1")
    }
}

/// One row of every table.
pub type Lane = (Way, Who);

/// Every lane. nbdkit's file plugin knows no direct I/O.
pub const LANES: [Lane; 9] = [
    (Way::Direct, Who::Raw),
    (Way::Direct, Who::Underlay),
    (Way::Direct, Who::QemuNbd),
    (Way::Direct, Who::StorageDaemon),
    (Way::Cached, Who::Raw),
    (Way::Cached, Who::Underlay),
    (Way::Cached, Who::QemuNbd),
    (Way::Cached, Who::StorageDaemon),
    (Way::Cached, Who::Nbdkit),
];

/// What fio does to a lane.
pub struct Load {
    pub name: &'static str,
    pub args: &'static [&'static str],
    pub kind: Kind,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Reads the base.
    Read,
    /// Writes blocks of a fresh overlay, each once.
    Touch,
    /// Writes where the overlay has data already.
    Over,
    /// Reads an overlay every other block of which is its own.
    Half,
    /// Reads the base once more, right after `Half`: what it is compared with.
    Again,
    /// Reads and writes an overlay.
    Mixed,
}

impl Kind {
    /// Which lanes it is run on: one that the file system alone answers says nothing of overlays.
    pub fn suits(self, (way, _): Lane) -> bool {
        match self {
            Kind::Half | Kind::Again | Kind::Mixed => way == Way::Direct,
            Kind::Read | Kind::Touch | Kind::Over => true,
        }
    }
}

/// Every load: the reads of the base first, then what an overlay lives through.
pub const LOADS: [Load; 11] = [
    Load {
        name: "4 KiB random read, QD1",
        args: &["--rw=randread", "--bs=4k", "--iodepth=1", "--norandommap"],
        kind: Kind::Read,
    },
    Load {
        name: "4 KiB random read, QD32",
        args: &["--rw=randread", "--bs=4k", "--iodepth=32", "--norandommap"],
        kind: Kind::Read,
    },
    Load {
        name: "256 KiB sequential read, QD16",
        args: &["--rw=read", "--bs=256k", "--iodepth=16"],
        kind: Kind::Read,
    },
    Load {
        name: "4 KiB random write, QD32, first touch",
        args: &["--rw=randwrite", "--bs=4k", "--iodepth=32", "--random_generator=lfsr"],
        kind: Kind::Touch,
    },
    Load {
        name: "4 KiB random write, QD1, fsync each, first touch",
        args: &["--rw=randwrite", "--bs=4k", "--iodepth=1", "--fsync=1", "--random_generator=lfsr"],
        kind: Kind::Touch,
    },
    Load {
        name: "4 KiB random write, QD32, overwrite",
        args: &["--rw=randwrite", "--bs=4k", "--iodepth=32", "--norandommap"],
        kind: Kind::Over,
    },
    Load {
        name: "4 KiB random write, QD1, fsync each, overwrite",
        args: &["--rw=randwrite", "--bs=4k", "--iodepth=1", "--fsync=1", "--norandommap"],
        kind: Kind::Over,
    },
    Load {
        name: "4 KiB random read, QD32, half written",
        args: &["--rw=randread", "--bs=4k", "--iodepth=32", "--norandommap"],
        kind: Kind::Half,
    },
    Load {
        name: "4 KiB random read, QD32, the base after that",
        args: &["--rw=randread", "--bs=4k", "--iodepth=32", "--norandommap"],
        kind: Kind::Again,
    },
    Load {
        name: "4 KiB random read and write, 64 connections",
        args: &[
            "--rw=randrw",
            "--rwmixread=70",
            "--bs=4k",
            "--iodepth=1",
            "--norandommap",
            "--numjobs=64",
            "--group_reporting",
        ],
        kind: Kind::Mixed,
    },
    Load {
        name: "4 KiB random read, 64 connections",
        args: &[
            "--rw=randread",
            "--bs=4k",
            "--iodepth=1",
            "--norandommap",
            "--numjobs=64",
            "--group_reporting",
        ],
        kind: Kind::Read,
    },
];

/// What underlay is compared with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rival {
    /// One contestant.
    One(Who),
    /// In each round the better of qemu's two servers.
    Qemu,
    /// In each round the best of all peers.
    Best,
    /// Its own base, under the load of this name.
    Base(&'static str),
}

impl Rival {
    pub fn label(self) -> &'static str {
        match self {
            Rival::One(who) => who.label(),
            Rival::Qemu => "the better of qemu's two",
            Rival::Best => "the best peer",
            Rival::Base(_) => "underlay's base",
        }
    }
}

/// A ratio that is asked for.
pub struct Mark {
    pub load: &'static str,
    pub way: Way,
    pub rival: Rival,
    pub least: f64,
}

const fn mark(load: &'static str, way: Way, rival: Rival, least: f64) -> Mark {
    Mark { load, way, rival, least }
}

/// Every ratio that is asked for.
pub const MARKS: [Mark; 15] = [
    mark(LOADS[1].name, Way::Direct, Rival::Qemu, 2.2),
    mark(LOADS[1].name, Way::Direct, Rival::One(Who::Raw), 0.70),
    mark(LOADS[0].name, Way::Direct, Rival::One(Who::QemuNbd), 1.2),
    mark(LOADS[0].name, Way::Cached, Rival::One(Who::Nbdkit), 1.2),
    mark(LOADS[1].name, Way::Cached, Rival::One(Who::Nbdkit), 1.2),
    mark(LOADS[2].name, Way::Direct, Rival::One(Who::Raw), 0.95),
    mark(LOADS[3].name, Way::Direct, Rival::One(Who::QemuNbd), 2.0),
    mark(LOADS[5].name, Way::Direct, Rival::One(Who::QemuNbd), 1.5),
    mark(LOADS[4].name, Way::Direct, Rival::One(Who::QemuNbd), 1.0),
    mark(LOADS[6].name, Way::Direct, Rival::One(Who::QemuNbd), 1.2),
    mark(LOADS[7].name, Way::Direct, Rival::Base(LOADS[8].name), 0.95),
    mark(LOADS[9].name, Way::Direct, Rival::Best, 1.0),
    mark(LOADS[10].name, Way::Direct, Rival::Best, 1.0),
    mark(LOADS[10].name, Way::Cached, Rival::Best, 1.0),
    mark(LOADS[3].name, Way::Cached, Rival::Best, 1.0),
];
