//! Where a file's content lies on its device, if the file system says so and means it.
//!
//! Invariants:
//! - What comes back is the truth until the file is written or moved; copies of images are not.
//! - Holes and unwritten extents have no entry: the file system answers them without a device read.
//! - The number of extents, and with it memory, is bounded by [`MOST`].

use std::fs::File;
use std::io;

use nix::sys::statfs::{EXT4_SUPER_MAGIC, FsType, XFS_SUPER_MAGIC, fstatfs};

use crate::report::Extent;
use crate::sys;

/// Most extents of one file: beyond, it counts as having none.
pub const MOST: usize = 1 << 20;

/// Write what is not on the disk yet before answering.
const SYNC: u32 = 0x1;

const LAST: u32 = 0x1;
const UNKNOWN: u32 = 0x2;
const DELALLOC: u32 = 0x4;
const ENCODED: u32 = 0x8;
const ENCRYPTED: u32 = 0x80;
const NOT_ALIGNED: u32 = 0x100;
const INLINE: u32 = 0x200;
const TAIL: u32 = 0x400;
const UNWRITTEN: u32 = 0x800;
/// Those whose place is not where a read goes, by what they are called.
const UNFIT: [(u32, &str); 7] = [
    (UNKNOWN, "of unknown place"),
    (DELALLOC, "not yet allocated"),
    (ENCODED, "compressed"),
    (ENCRYPTED, "encrypted"),
    (INLINE, "within metadata"),
    (TAIL, "packed with others"),
    (NOT_ALIGNED, "not aligned to blocks"),
];

/// Why a file's extents can't be had.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum WhyNot {
    /// The file system spreads files over devices or moves them: its answer is no device's offset.
    #[error(
        "its file system (type {magic:#x}) does not tell places on one device; ext4 and xfs do"
    )]
    FileSystem {
        /// Its magic number.
        magic: u64,
    },
    /// An extent whose content is elsewhere or in another form.
    #[error("its extent at byte {at} is {what}")]
    Unfit {
        /// Where in the file.
        at: u64,
        /// What it is.
        what: &'static str,
    },
    /// More than [`MOST`].
    #[error("it has more than {MOST} extents; copy it to defragment it")]
    TooMany,
    /// The kernel's answer makes no sense.
    #[error("its extent at byte {at} is not where an extent can be")]
    Absurd {
        /// Where in the file.
        at: u64,
    },
    /// The call failed.
    #[error("asking for its extents failed: {0}")]
    Io(#[from] io::Error),
}

/// The extents of an open file, ascending by file offset; neighbours that continue each other are one.
///
/// Extents shared with another file (reflinks) are returned like others: which of the files a read
/// was for is decided where several files meet, see [`crate::extents`].
pub fn extents_of(file: &File) -> Result<Vec<Extent>, WhyNot> {
    let kind: FsType = fstatfs(file).map_err(io::Error::from)?.filesystem_type();
    if kind != EXT4_SUPER_MAGIC && kind != XFS_SUPER_MAGIC {
        return Err(WhyNot::FileSystem { magic: kind.0 as u64 });
    }
    let mut extents: Vec<Extent> = Vec::new();
    let mut start = 0;
    loop {
        let map = sys::fiemap(file, start, SYNC)?;
        let mapped = &map.extents[..(map.mapped as usize).min(sys::EXTENTS)];
        for found in mapped {
            let at = found.logical;
            let end = at.checked_add(found.length).ok_or(WhyNot::Absurd { at })?;
            if found.length == 0 || end <= start {
                return Err(WhyNot::Absurd { at });
            }
            if let Some((_, what)) = UNFIT.iter().find(|(flag, _)| found.flags & flag != 0) {
                return Err(WhyNot::Unfit { at, what });
            }
            start = end;
            if found.flags & UNWRITTEN == 0 {
                append(
                    &mut extents,
                    Extent { device: found.physical, file: at, len: found.length },
                );
            }
            if extents.len() > MOST {
                return Err(WhyNot::TooMany);
            }
        }
        if mapped.last().is_none_or(|last| last.flags & LAST != 0) {
            return Ok(extents);
        }
    }
}

fn append(extents: &mut Vec<Extent>, next: Extent) {
    if let Some(last) = extents.last_mut()
        && last.file.checked_add(last.len) == Some(next.file)
        && last.device.checked_add(last.len) == Some(next.device)
    {
        last.len += next.len;
        return;
    }
    extents.push(next);
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Seek, SeekFrom, Write};

    #[test]
    fn neighbours_that_continue_each_other_are_one() {
        let mut extents = Vec::new();
        let of = |device, file, len| Extent { device, file, len };
        append(&mut extents, of(0, 0, 10));
        append(&mut extents, of(10, 10, 5));
        append(&mut extents, of(20, 15, 5));
        append(&mut extents, of(25, 30, 5));
        assert_eq!(extents, [of(0, 0, 15), of(20, 15, 5), of(25, 30, 5)]);
    }

    /// On whatever file system the tests run: either the extents cover the content, or the reason says
    /// why there are none.
    #[test]
    fn a_real_file_has_extents_or_a_reason() {
        let dir = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        let mut file = File::create_new(dir.path().join("f")).unwrap();
        file.write_all(&[7; 8192]).unwrap();
        file.seek(SeekFrom::Start(1 << 20)).unwrap();
        file.write_all(&[7; 4096]).unwrap();
        match extents_of(&file) {
            Ok(extents) => {
                let covered: u64 = extents.iter().map(|extent| extent.len).sum();
                assert!(covered >= 12_288, "{extents:?}");
                assert!(extents.windows(2).all(|two| two[0].file + two[0].len <= two[1].file));
            }
            Err(why) => assert!(matches!(why, WhyNot::FileSystem { .. }), "{why}"),
        }
        let elsewhere = File::open("/proc/self/status").unwrap();
        assert!(matches!(extents_of(&elsewhere), Err(WhyNot::FileSystem { .. })));
    }
}
