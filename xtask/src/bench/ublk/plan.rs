//! What is measured and what it is compared with: the guest goes through it, the host judges by it.

/// A block device under test.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lane {
    /// The kernel's loop device on the image's file, through the page cache.
    LoopCached,
    /// A ublk base device of a daemon whose images are cached.
    BaseCached,
    /// A ublk replica that lasts a round: nothing written at its start, its image cached.
    Replica,
    /// dm-snapshot that lasts a round, on a device like `LoopCached`; its exceptions are in memory only.
    SnapshotN,
    /// The same with its exceptions on disk, as an overlay's map is.
    SnapshotP,
    /// The kernel's NBD client to our own server: the base, cached.
    NbdBase,
    /// The same to a replica that lasts a round.
    NbdReplica,
    /// The kernel's NBD client to qemu-nbd: the image's file, cached.
    QemuCached,
    /// The same to a qcow2 overlay on that file which lasts a round; overlay direct, as ours.
    QemuOverlay,
    /// The kernel's loop device on the image's file, past the page cache.
    LoopDirect,
    /// A ublk base device of a daemon whose images are direct.
    BaseDirect,
    /// A ublk replica of which every block is written: direct reads of its overlay.
    ReplicaWritten,
    /// qemu-nbd, direct.
    QemuDirect,
    /// qemu-nbd on a qcow2 overlay of which every block is written: direct.
    QemuWritten,
    /// The kernel's loop device on a sparse file, direct: what writes cost without copy-on-write.
    LoopSparse,
}

impl Lane {
    /// Every one, in the order of the tables.
    pub const ALL: [Lane; 15] = [
        Lane::LoopCached,
        Lane::BaseCached,
        Lane::Replica,
        Lane::SnapshotN,
        Lane::SnapshotP,
        Lane::NbdBase,
        Lane::NbdReplica,
        Lane::QemuCached,
        Lane::QemuOverlay,
        Lane::LoopDirect,
        Lane::BaseDirect,
        Lane::ReplicaWritten,
        Lane::QemuDirect,
        Lane::QemuWritten,
        Lane::LoopSparse,
    ];

    /// What the tables call it when it is read, or written.
    pub fn label(self, kind: Kind) -> &'static str {
        match (self, kind) {
            (Lane::LoopCached, _) => "loop, cached",
            (Lane::BaseCached, _) => "ublk base, cached",
            (Lane::Replica, Kind::Read) => "ublk replica, unwritten, base cached",
            (Lane::Replica, _) => "ublk replica",
            (Lane::SnapshotN, Kind::Read) => "dm-snapshot N, unwritten, origin cached",
            (Lane::SnapshotN, _) => "dm-snapshot N (exceptions in memory)",
            (Lane::SnapshotP, _) => "dm-snapshot P (exceptions on disk)",
            (Lane::NbdBase, _) => "kernel NBD to underlay, base cached",
            (Lane::NbdReplica, _) => "kernel NBD to underlay, replica",
            (Lane::QemuCached, _) => "kernel NBD to qemu-nbd, raw, cached",
            (Lane::QemuOverlay, Kind::Read) => {
                "kernel NBD to qemu-nbd, qcow2, unwritten, base cached"
            }
            (Lane::QemuOverlay, _) => "kernel NBD to qemu-nbd, qcow2",
            (Lane::LoopDirect, _) => "loop, direct",
            (Lane::BaseDirect, _) => "ublk base, direct",
            (Lane::ReplicaWritten, _) => "ublk replica, written, direct",
            (Lane::QemuDirect, _) => "kernel NBD to qemu-nbd, raw, direct",
            (Lane::QemuWritten, _) => "kernel NBD to qemu-nbd, qcow2, written, direct",
            (Lane::LoopSparse, _) => "loop, direct, sparse file (no copy-on-write)",
        }
    }

    /// Its name between guest and host.
    pub fn key(self) -> String {
        format!("{self:?}")
    }

    /// Whether a load of this kind runs on it.
    pub fn serves(self, kind: Kind) -> bool {
        let fresh = matches!(
            self,
            Lane::Replica
                | Lane::SnapshotN
                | Lane::SnapshotP
                | Lane::NbdReplica
                | Lane::QemuOverlay
        );
        match kind {
            Kind::Read => !matches!(self, Lane::SnapshotP | Lane::NbdReplica | Lane::LoopSparse),
            Kind::Touch | Kind::Over => fresh || self == Lane::LoopSparse,
        }
    }

    /// What it is measured against, as closely as there is something like it.
    pub fn reference(self, kind: Kind) -> Option<Lane> {
        match (self, kind) {
            (Lane::BaseCached | Lane::NbdBase | Lane::QemuCached, _) => Some(Lane::LoopCached),
            (Lane::BaseDirect | Lane::QemuDirect, _) => Some(Lane::LoopDirect),
            (Lane::Replica, Kind::Read) => Some(Lane::BaseCached),
            (Lane::ReplicaWritten, _) => Some(Lane::BaseDirect),
            (Lane::SnapshotN | Lane::QemuOverlay, Kind::Read) => Some(Lane::LoopCached),
            (Lane::QemuWritten, _) => Some(Lane::LoopDirect),
            (Lane::Replica | Lane::SnapshotN | Lane::NbdReplica | Lane::QemuOverlay, _) => {
                Some(Lane::SnapshotP)
            }
            _ => None,
        }
    }

    /// The kernel's NBD client on qemu-nbd that does the same.
    pub fn qemu(self) -> Option<Lane> {
        match self {
            Lane::BaseCached | Lane::LoopCached | Lane::NbdBase => Some(Lane::QemuCached),
            Lane::Replica | Lane::SnapshotN | Lane::SnapshotP | Lane::NbdReplica => {
                Some(Lane::QemuOverlay)
            }
            Lane::BaseDirect | Lane::LoopDirect => Some(Lane::QemuDirect),
            Lane::ReplicaWritten => Some(Lane::QemuWritten),
            _ => None,
        }
    }
}

/// What a load does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Reads.
    Read,
    /// Writes whole blocks that were never written before, each once.
    Touch,
    /// Writes where every block was written before.
    Over,
}

/// What fio does to a device.
#[derive(Debug, PartialEq, Eq)]
pub struct Load {
    /// What it is called.
    pub name: &'static str,
    /// What it does.
    pub kind: Kind,
    /// fio's word for it.
    pub rw: &'static str,
    /// Bytes of each request.
    pub block: u64,
    /// Requests under way.
    pub depth: u32,
}

const fn load(name: &'static str, kind: Kind, rw: &'static str, block: u64, depth: u32) -> Load {
    Load { name, kind, rw, block, depth }
}

const SMALL: u64 = 4 << 10;
const LARGE: u64 = 128 << 10;

/// Every load, in the order in which a round goes through them: what lasts a round is unwritten while
/// it is read.
pub const LOADS: [Load; 14] = [
    load("4 KiB random read, QD1", Kind::Read, "randread", SMALL, 1),
    load("4 KiB random read, QD16", Kind::Read, "randread", SMALL, 16),
    load("128 KiB random read, QD1", Kind::Read, "randread", LARGE, 1),
    load("128 KiB random read, QD16", Kind::Read, "randread", LARGE, 16),
    load("128 KiB sequential read, QD1", Kind::Read, "read", LARGE, 1),
    load("128 KiB sequential read, QD16", Kind::Read, "read", LARGE, 16),
    load("4 KiB random write, QD1, first touch", Kind::Touch, "randwrite", SMALL, 1),
    load("4 KiB random write, QD16, first touch", Kind::Touch, "randwrite", SMALL, 16),
    load("128 KiB random write, QD1, first touch", Kind::Touch, "randwrite", LARGE, 1),
    load("128 KiB random write, QD16, first touch", Kind::Touch, "randwrite", LARGE, 16),
    load("4 KiB random write, QD1, overwrite", Kind::Over, "randwrite", SMALL, 1),
    load("4 KiB random write, QD16, overwrite", Kind::Over, "randwrite", SMALL, 16),
    load("128 KiB random write, QD1, overwrite", Kind::Over, "randwrite", LARGE, 1),
    load("128 KiB random write, QD16, overwrite", Kind::Over, "randwrite", LARGE, 16),
];

/// What a request costs is counted if this is wanted.
pub const COUNTS: &str = "counts";

/// A target: a lane's rate over another's in loads of a kind.
#[derive(Debug)]
pub struct Mark {
    /// Whose rate.
    pub lane: Lane,
    /// Over whose.
    pub over: Lane,
    /// In which loads.
    pub kind: Kind,
    /// Of which sizes of a request, in bytes.
    pub blocks: &'static [u64],
    /// At least so much.
    pub least: f64,
}

/// Every target.
pub fn marks() -> Vec<Mark> {
    const ALL: &[u64] = &[SMALL, LARGE];
    let mark = |lane, over, kind, blocks, least| Mark { lane, over, kind, blocks, least };
    let mut marks = vec![
        mark(Lane::BaseCached, Lane::LoopCached, Kind::Read, &[LARGE], 1.0),
        mark(Lane::BaseDirect, Lane::LoopDirect, Kind::Read, &[LARGE], 1.0),
        mark(Lane::Replica, Lane::BaseCached, Kind::Read, ALL, 0.95),
        mark(Lane::ReplicaWritten, Lane::BaseDirect, Kind::Read, ALL, 0.95),
        mark(Lane::Replica, Lane::SnapshotN, Kind::Touch, ALL, 1.0),
        mark(Lane::Replica, Lane::SnapshotP, Kind::Touch, ALL, 1.0),
    ];
    let ours = [Lane::BaseCached, Lane::BaseDirect, Lane::Replica, Lane::ReplicaWritten];
    for lane in ours {
        for kind in [Kind::Read, Kind::Touch, Kind::Over] {
            if let (true, Some(over)) = (lane.serves(kind), lane.qemu()) {
                marks.push(mark(lane, over, kind, ALL, 1.5));
            }
        }
    }
    marks
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whatever_is_compared_is_measured_under_the_same_loads() {
        for lane in Lane::ALL {
            for kind in [Kind::Read, Kind::Touch, Kind::Over] {
                let others = [lane.reference(kind), lane.qemu()];
                for other in others.into_iter().flatten().filter(|_| lane.serves(kind)) {
                    assert!(other.serves(kind), "{lane:?} against {other:?}: {kind:?}");
                }
            }
        }
        for mark in marks() {
            assert!(mark.lane.serves(mark.kind) && mark.over.serves(mark.kind), "{mark:?}");
        }
    }
}
