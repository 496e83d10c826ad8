//! Profiles: which chunks of an image were read, and in which order, while somebody recorded it; and
//! pins, which keep such chunks in a disk's cache.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use uuid::Uuid;

use super::{
    name::Digest,
    node::Node,
    record::{self, FORMAT, RECORD_MAX, image_file},
};
use crate::error::{Error, Kind, Result};

const PROFILES: &str = "profiles";
const PINS_JSON: &str = "pins.json";
/// Profiles that a node keeps.
const PROFILES_MAX: usize = 65_536;
/// Runs of chunks in a profile: what fits a record.
pub const RUNS_MAX: usize = RECORD_MAX / 64;

/// An image's recorded accesses.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Profile {
    /// The record's format.
    pub format: u32,
    /// The image.
    #[schema(value_type = String)]
    pub digest: Digest,
    /// When it was recorded, in seconds since 1970.
    pub created: u64,
    /// The chunks of 256 KiB that were read, in the order of their first reads: first chunk and count.
    pub runs: Vec<(u64, u64)>,
}

/// What is kept in a disk's cache whatever is read.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Pin {
    /// The disk's identity.
    pub disk: Uuid,
    /// The image.
    pub digest: Digest,
    /// The whole image, rather than what its profile names.
    pub whole: bool,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct PinsRecord {
    format: u32,
    pins: Vec<Pin>,
}

impl Profile {
    /// A profile of chunks in the order of their first reads; those that don't fit a record are left out.
    pub fn of(digest: Digest, chunks: &[u64]) -> Profile {
        let mut runs: Vec<(u64, u64)> = Vec::new();
        for chunk in chunks {
            let full = runs.len() == RUNS_MAX;
            match runs.last_mut() {
                Some((first, count)) if *first + *count == *chunk => *count += 1,
                _ if full => break,
                _ => runs.push((*chunk, 1)),
            }
        }
        Profile { format: FORMAT, digest, created: record::now(), runs }
    }

    /// The chunks below `end`, in order.
    pub fn chunks(&self, end: u64) -> impl Iterator<Item = u64> {
        let bounded = move |(first, count): &(u64, u64)| {
            (*first).min(end)..first.saturating_add(*count).min(end)
        };
        self.runs.iter().flat_map(bounded)
    }
}

impl Node {
    /// An image's profile, if one was recorded.
    pub fn profile(&self, digest: Digest) -> Result<Option<Profile>> {
        let profiles = match self.0.state.open(PROFILES) {
            Err(error) if error.kind() == Kind::NotFound => return Ok(None),
            other => other?,
        };
        match record::read::<Profile>(&profiles, &image_file(digest)) {
            Ok(profile) if profile.digest == digest => Ok(Some(profile)),
            Ok(_) => Err(Error::new(Kind::Corrupt, "it is of another image")),
            Err(error) if error.kind() == Kind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
        .map_err(|error| error.within(format!("the profile of image {digest} (record it again)")))
    }

    /// The images that have a profile.
    pub fn profiles(&self) -> Result<Vec<Digest>> {
        let entries = match self.0.state.open(PROFILES) {
            Err(error) if error.kind() == Kind::NotFound => return Ok(Vec::new()),
            other => other?.entries(PROFILES_MAX)?,
        };
        let digests = entries
            .iter()
            .filter_map(|entry| entry.name.to_str()?.strip_suffix(".json")?.parse().ok());
        Ok(digests.collect())
    }

    /// Keeps a profile, in the place of an earlier one.
    pub fn record_profile(&self, profile: &Profile) -> Result<()> {
        record::write(&self.0.state.ensure(PROFILES)?, &image_file(profile.digest), profile)
    }

    /// Forgets an image's profile. Whether there was one.
    pub fn remove_profile(&self, digest: Digest) -> Result<bool> {
        let profiles = self.0.state.ensure(PROFILES)?;
        let there = profiles.stat(image_file(digest))?.is_some();
        profiles.unlink_if_there(image_file(digest))?;
        Ok(there)
    }

    /// What is pinned.
    pub fn pins(&self) -> Result<Vec<Pin>> {
        match record::read::<PinsRecord>(&self.0.state, PINS_JSON) {
            Ok(record) => Ok(record.pins),
            Err(error) if error.kind() == Kind::NotFound => Ok(Vec::new()),
            Err(error) => Err(error.within("the list of pins")),
        }
    }

    /// Records exactly these pins. One caller at a time.
    pub fn record_pins(&self, pins: Vec<Pin>) -> Result<()> {
        record::write(&self.0.state, PINS_JSON, &PinsRecord { format: FORMAT, pins })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn profiles_and_pins_are_found_again() {
        let directory = tempfile::tempdir().unwrap();
        let node = Node::open(directory.path()).unwrap();
        let digest = Digest([5; 32]);
        assert_eq!((node.profile(digest).unwrap(), node.profiles().unwrap()), (None, vec![]));
        let profile = Profile::of(digest, &[3, 4, 5, 1, 2, 9]);
        assert_eq!(profile.runs, [(3, 3), (1, 2), (9, 1)]);
        assert_eq!(profile.chunks(5).collect::<Vec<_>>(), [3, 4, 1, 2]);
        node.record_profile(&profile).unwrap();
        assert_eq!(node.profile(digest).unwrap(), Some(profile));
        assert_eq!(node.profiles().unwrap(), [digest]);
        let path = directory.path().join(format!("profiles/{digest}.json"));
        std::fs::write(&path, "{").unwrap();
        assert_eq!(node.profile(digest).unwrap_err().kind(), Kind::Corrupt);
        assert!(node.remove_profile(digest).unwrap() && !node.remove_profile(digest).unwrap());
        let scattered: Vec<u64> = (0..100_000).map(|chunk| 4_194_304 + chunk * 2).collect();
        let largest = Profile::of(digest, &scattered);
        node.record_profile(&largest).unwrap();
        assert_eq!(node.profile(digest).unwrap(), Some(largest));
        let hostile =
            Profile { runs: vec![(u64::MAX, u64::MAX), (1, u64::MAX)], ..Profile::of(digest, &[]) };
        assert_eq!(hostile.chunks(4).collect::<Vec<_>>(), [1, 2, 3]);
        let pin = Pin { disk: Uuid::new_v4(), digest, whole: true };
        node.record_pins(vec![pin.clone()]).unwrap();
        assert_eq!(node.pins().unwrap(), [pin]);
    }
}
