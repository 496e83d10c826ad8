//! The header of a qcow2 image: what of it a reader needs, and everything that is refused.

use std::{fs::File, ops::Range};

use super::content::read_exact;
use crate::error::{Error, Kind, Result};

const MAGIC: u32 = 0x5146_49fb;
const V2_LENGTH: u64 = 72;
const V3_LENGTH: u64 = 104;
/// What is read of a header: up to and with the compression type.
const HEADER: usize = 112;

/// Incompatible features, by bit.
const DIRTY: u64 = 1 << 0;
const CORRUPT: u64 = 1 << 1;
const EXTERNAL_DATA: u64 = 1 << 2;
const COMPRESSION_TYPE: u64 = 1 << 3;
const EXTENDED_L2: u64 = 1 << 4;

/// How clusters are compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Compression {
    /// Deflate without a zlib header.
    Zlib,
    Zstd,
}

/// What a reader needs of a header, checked.
#[derive(Debug)]
pub(super) struct Header {
    pub version: u32,
    /// The size of the content in bytes.
    pub size: u64,
    pub l1_offset: u64,
    pub compression: Compression,
    /// Whether L2 entries tell of 32 subclusters each.
    pub subclusters: bool,
    cluster_bits: u32,
}

impl Header {
    /// The largest L1 table that QEMU accepts, in bytes.
    pub(super) const MAX_L1_BYTES: u64 = 32 << 20;

    /// Reads the header of `file`, of which `length` bytes are there (its first megabyte will do),
    /// and refuses what can't be served.
    pub(super) fn read(file: &File, length: u64, name: &str) -> Result<Header> {
        let refuse =
            |kind, why: String| Err(Error::new(kind, format!("the qcow2 image {name} {why}")));
        let corrupt = |why: &str| refuse(Kind::Corrupt, format!("is corrupt: {why}; get it again"));
        let mut bytes = [0; HEADER];
        let held = length.min(HEADER as u64) as usize;
        read_exact(file, &mut bytes[..held], 0, name)?;
        let be32 = |at: usize| {
            u32::from_be_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
        };
        let be64 = |at: usize| u64::from(be32(at)) << 32 | u64::from(be32(at + 4));

        if be32(0) != MAGIC {
            return refuse(Kind::Invalid, "is none: it lacks the magic; try --format auto".into());
        }
        let version = be32(4);
        if length < if version == 2 { V2_LENGTH } else { V3_LENGTH } {
            return refuse(Kind::Corrupt, format!("ends within its header, after {length} bytes"));
        }
        if version != 2 && version != 3 {
            return refuse(
                Kind::Unsupported,
                format!(
                    "has version {version}; versions 2 and 3 are read: convert it with \
                     `qemu-img convert -O qcow2`"
                ),
            );
        }
        let (features, header_length) =
            if version == 3 { (be64(72), u64::from(be32(100))) } else { (0, V2_LENGTH) };
        refuse_features(features, name)?;

        let backing_file = be64(8);
        if backing_file != 0 {
            let named = file_name(file, backing_file, be32(16), length);
            return refuse(
                Kind::Unsupported,
                format!(
                    "stands on the backing file {named:?}, which is not followed: \
                     merge them with `qemu-img convert -O qcow2` first"
                ),
            );
        }
        if be32(32) != 0 {
            return refuse(
                Kind::Unsupported,
                "is encrypted: convert it with `qemu-img convert` and its secret first".into(),
            );
        }
        let cluster_bits = be32(20);
        let subclusters = features & EXTENDED_L2 != 0;
        if !(if subclusters { 14 } else { 9 }..=21).contains(&cluster_bits) {
            return corrupt(&format!("clusters of 2^{cluster_bits} bytes"));
        }
        if version == 3 && (header_length < V3_LENGTH || header_length > 1 << cluster_bits) {
            return corrupt(&format!("a header of {header_length} bytes"));
        }
        let compression = match if header_length > V3_LENGTH { bytes[104] } else { 0 } {
            0 if features & COMPRESSION_TYPE == 0 => Compression::Zlib,
            1 if features & COMPRESSION_TYPE != 0 => Compression::Zstd,
            kind @ 0..=1 => {
                return corrupt(&format!("compression type {kind} contradicts its feature bit"));
            }
            kind => {
                return refuse(
                    Kind::Unsupported,
                    format!("uses the unknown compression type {kind}"),
                );
            }
        };
        let header = Header {
            version,
            size: be64(24),
            l1_offset: be64(40),
            compression,
            subclusters,
            cluster_bits,
        };
        if header.size > super::MAX_IMAGE {
            return refuse(
                Kind::Unsupported,
                format!("claims {} bytes of content; 64 TiB are the most", header.size),
            );
        }
        if header.size == 0 {
            return refuse(Kind::Invalid, "is empty: its content is 0 bytes".into());
        }
        let span = header.cluster_size() / header.entry_size() as u64 * header.cluster_size();
        if u64::from(be32(36)) < header.size.div_ceil(span) {
            return corrupt("its L1 table is too small for its size");
        }
        if !header.l1_offset.is_multiple_of(header.cluster_size()) {
            return corrupt("its L1 table is misaligned");
        }
        Ok(header)
    }

    pub(super) fn cluster_size(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// Bytes of an L2 entry.
    pub(super) fn entry_size(&self) -> usize {
        if self.subclusters { 16 } else { 8 }
    }

    /// Where the data of a compressed cluster is, by its L2 entry: an offset in bytes, and a count
    /// of the further sectors that it touches.
    pub(super) fn packed_range(&self, entry: u64) -> Range<u64> {
        let shift = 62 - (self.cluster_bits - 8);
        let start = entry & ((1 << shift) - 1);
        let sectors = (entry & ((1 << 62) - 1)) >> shift;
        start..(start & !511) + (sectors + 1) * 512
    }
}

fn refuse_features(features: u64, name: &str) -> Result<()> {
    let (kind, why) = if features & CORRUPT != 0 {
        (
            Kind::Corrupt,
            "is marked as corrupt: repair it with `qemu-img check -r all` first".to_owned(),
        )
    } else if features & EXTERNAL_DATA != 0 {
        (
            Kind::Unsupported,
            "keeps its data in another file, which is not followed: \
             convert it with `qemu-img convert -O qcow2` first"
                .to_owned(),
        )
    } else {
        // Of a dirty image only the reference counts are in doubt, and nothing here reads them.
        let known = DIRTY | COMPRESSION_TYPE | EXTENDED_L2;
        match features & !known {
            0 => return Ok(()),
            unknown => (
                Kind::Unsupported,
                format!(
                    "needs features that are not known here (bits {unknown:#x}): convert it with \
                     `qemu-img convert -O qcow2` first"
                ),
            ),
        }
    };
    Err(Error::new(kind, format!("the qcow2 image {name} {why}")))
}

/// A file name in the header, as it may be shown.
fn file_name(file: &File, at: u64, bytes: u32, length: u64) -> String {
    let mut name = vec![0; bytes.min(1023) as usize];
    match at.checked_add(name.len() as u64) {
        Some(end) if end <= length && read_exact(file, &mut name, at, "").is_ok() => {
            String::from_utf8_lossy(&name).into_owned()
        }
        _ => "?".into(),
    }
}
