//! The JSON records by which every disk describes itself, and how they are read and written.
//!
//! Invariants:
//! - Every record opens with its format's version. Another version is refused by name, before
//!   anything else of it is looked at; a field that this version doesn't know is an error, so
//!   nothing is lost when a record is rewritten.
//! - A record is at most [`RECORD_MAX`] bytes; no more is read, whatever the file's size.
//! - A record is replaced as a whole and durably ([`Dir::replace`]).
//!
//! docs/catalogue.md lists the fields.

use std::{
    path::PathBuf,
    time::{SystemTime, UNIX_EPOCH},
};

use serde::{Deserialize, Serialize, de::DeserializeOwned};
use uuid::Uuid;

use super::{
    dir::Dir,
    media::Tier,
    name::{Digest, Name},
};
use crate::error::{Error, Kind, Result};

/// The version that this build reads and writes.
pub(crate) const FORMAT: u32 = 1;
/// The longest record, in bytes.
pub(crate) const RECORD_MAX: usize = 256 << 10;
/// The longest text that says where an image came from, in bytes.
pub(crate) const SOURCE_MAX: usize = 4096;
/// Names that one image may have.
pub(crate) const NAMES_MAX: usize = 1024;

/// `disk.json`: what a disk says of itself.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct DiskRecord {
    pub format: u32,
    pub id: Uuid,
    pub name: Name,
    /// Only if somebody set it; otherwise it is found out anew on each machine.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tier: Option<Tier>,
    pub pool: bool,
    /// What promoted chunks may take, in bytes; only if somebody set it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cache: Option<u64>,
    /// It takes nothing new: what is on it is to leave.
    #[serde(default, skip_serializing_if = "is_default")]
    pub draining: bool,
    pub created: u64,
}

/// `images/<digest>/image.json`: what a copy says of its image.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct ImageRecord {
    pub format: u32,
    pub names: Vec<Name>,
    pub digest: Digest,
    pub size: u64,
    pub source: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source_sha256: Option<Digest>,
    pub created: u64,
    /// How many copies are wanted, if somebody said.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub copies: Option<u32>,
}

/// `images/<digest>/refs/<replica-id>.json`: a replica stands on this copy.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct RefRecord {
    pub format: u32,
    pub replica: Uuid,
    pub name: Name,
    /// The replica's disk: while it is missing the reference holds.
    pub disk: Uuid,
    pub disk_name: Name,
    /// The replica's size when the reference was made.
    pub size: u64,
    pub created: u64,
}

/// `replicas/<id>/replica.json`: what a replica says of itself.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct ReplicaRecord {
    pub format: u32,
    pub id: Uuid,
    pub name: Name,
    pub size: u64,
    /// What it stands on; nothing, if it needs no image.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image: Option<Base>,
    /// Grows with each move: of two directories of one replica the higher counts.
    #[serde(default, skip_serializing_if = "is_default")]
    pub epoch: u64,
    /// A disk on which the replica may be, if it has moved.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub moving_to: Option<Uuid>,
    pub created: u64,
}

impl ReplicaRecord {
    /// The image that it stands on.
    pub(crate) fn digest(&self) -> Option<Digest> {
        self.image.as_ref().map(|image| image.digest)
    }
}

fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

/// What a replica remembers of its image, to say what it lacks when the image isn't there.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Base {
    pub digest: Digest,
    pub size: u64,
    pub name: Name,
    /// The disk of the copy beside which the reference was put, and its name at that time.
    pub disk: Uuid,
    pub disk_name: Name,
}

/// `<state>/disks.json`: the disks that this node knows.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct DisksRecord {
    pub format: u32,
    pub disks: Vec<KnownDisk>,
}

/// A disk that this node knows, there or not.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct KnownDisk {
    pub id: Uuid,
    pub name: Name,
    pub path: PathBuf,
}

#[derive(Deserialize)]
struct Head {
    format: Option<u32>,
}

/// What a record of an image is called.
pub(crate) fn image_file(digest: Digest) -> String {
    format!("{digest}.json")
}

/// Reads the record `name` in `dir`.
pub(crate) fn read<T: DeserializeOwned>(dir: &Dir, name: &str) -> Result<T> {
    parse(&dir.read(name, RECORD_MAX)?)
        .map_err(|error| error.within(dir.path().join(name).display()))
}

/// Writes the record `name` in `dir`, in the place of the one that may be there.
pub(crate) fn write<T: Serialize>(dir: &Dir, name: &str, record: &T) -> Result<()> {
    dir.replace(name, &bytes(record)?)
}

/// A record as its file holds it.
pub(crate) fn bytes<T: Serialize>(record: &T) -> Result<Vec<u8>> {
    let mut bytes = serde_json::to_vec_pretty(record)
        .map_err(|error| Error::caused(Kind::Invalid, "encoding a record", error))?;
    bytes.push(b'\n');
    if bytes.len() > RECORD_MAX {
        return Err(Error::new(Kind::Invalid, format!("a record exceeds {RECORD_MAX} bytes")));
    }
    Ok(bytes)
}

fn parse<T: DeserializeOwned>(bytes: &[u8]) -> Result<T> {
    let head: Head = serde_json::from_slice(bytes)
        .map_err(|error| Error::caused(Kind::Corrupt, "not a record of underlay's", error))?;
    match head.format {
        Some(FORMAT) => serde_json::from_slice(bytes)
            .map_err(|error| Error::caused(Kind::Corrupt, "a damaged record", error)),
        Some(other) => Err(Error::new(
            Kind::Unsupported,
            format!("format version {other}, and this build knows {FORMAT}: use a newer underlay"),
        )),
        None => Err(Error::new(Kind::Corrupt, "a record without a format version")),
    }
}

/// Now, in seconds since 1970.
pub(crate) fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

/// `source`, cut to what a record holds.
pub(crate) fn clip_source(source: &str) -> String {
    if source.len() <= SOURCE_MAX {
        return source.to_owned();
    }
    let mut end = SOURCE_MAX - '…'.len_utf8();
    while !source.is_char_boundary(end) {
        end -= 1;
    }
    format!("{}…", &source[..end])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::catalog::steps::Steps;

    fn record() -> ReplicaRecord {
        ReplicaRecord {
            format: FORMAT,
            id: Uuid::from_u128(7),
            name: "vm1".parse().unwrap(),
            size: 1 << 30,
            image: Some(Base {
                digest: Digest([3; 32]),
                size: 1 << 30,
                name: "debian".parse().unwrap(),
                disk: Uuid::from_u128(9),
                disk_name: "a".parse().unwrap(),
            }),
            epoch: 0,
            moving_to: None,
            created: 1_700_000_000,
        }
    }

    #[test]
    fn records_come_back_as_they_were() {
        let temp = tempfile::tempdir().unwrap();
        let dir = Dir::open_root(temp.path(), Steps::default()).unwrap();
        write(&dir, "replica.json", &record()).unwrap();
        assert_eq!(read::<ReplicaRecord>(&dir, "replica.json").unwrap(), record());
        assert!(dir.stat(".tmp-replica.json").unwrap().is_none());
    }

    /// The text of a record of format 1 is a promise: this test pins it.
    #[test]
    fn the_format_is_pinned() {
        let text = String::from_utf8(bytes(&record()).unwrap()).unwrap();
        let golden = include_str!("../../tests/fixtures/catalogue/replica.v1.json");
        assert_eq!(text, golden);
    }

    #[test]
    fn hostile_records_are_refused_by_what_is_wrong() {
        let good = String::from_utf8(bytes(&record()).unwrap()).unwrap();
        let kind = |text: &str| parse::<ReplicaRecord>(text.as_bytes()).map_err(|e| e.kind());
        assert!(kind(&good).is_ok());
        let later = good.replace("\"format\": 1", "\"format\": 2, \"novel\": []");
        assert_eq!(kind(&later), Err(Kind::Unsupported));
        for bad in [
            "".to_owned(),
            "{".to_owned(),
            "[]".to_owned(),
            "null".to_owned(),
            "{}".to_owned(),
            "[".repeat(100_000),
            "{\"format\":".repeat(10_000),
            good.replace("\"format\": 1", "\"format\": -1"),
            good.replace("\"format\": 1", "\"format\": 1, \"novel\": 1"),
            good.replace("\"vm1\"", "\"../vm1\""),
            good.replace("\"size\": 1073741824", "\"size\": 1e30"),
            good.replace("\"size\": 1073741824", "\"size\": -5"),
            good.replace("0303", "zz03"),
        ] {
            assert_eq!(kind(&bad), Err(Kind::Corrupt), "{}", &bad[..bad.len().min(60)]);
        }
        // Every byte of a record flipped in turn: an error or a record, and never a panic.
        for at in 0..good.len() {
            let mut bytes = good.clone().into_bytes();
            bytes[at] ^= 0x55;
            let _ = parse::<ReplicaRecord>(&bytes);
        }
    }

    #[test]
    fn sources_are_clipped_between_characters() {
        let clipped = clip_source(&"ä".repeat(SOURCE_MAX));
        assert!(clipped.len() <= SOURCE_MAX && clipped.ends_with('…'));
        assert_eq!(clip_source("short"), "short");
    }
}
