//! When which copy was scrubbed last.

use serde::{Deserialize, Serialize};

use super::{
    name::{Digest, Name},
    node::Node,
    record::{self, FORMAT, RECORD_MAX},
};
use crate::error::{Kind, Result};

const SCRUBBED_JSON: &str = "scrubbed.json";
/// Copies that are remembered: what fits a record. The others count as never scrubbed.
const MOST: usize = RECORD_MAX / 320;

/// A copy that was read whole.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Scrubbed {
    /// The image.
    pub digest: Digest,
    /// The disk that the copy is on.
    pub disk: Name,
    /// When, in seconds since 1970.
    pub at: u64,
    /// How many chunks were not as they must be.
    pub bad: u64,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct ScrubbedRecord {
    format: u32,
    copies: Vec<Scrubbed>,
}

impl Node {
    /// The copies that were scrubbed, as far as is remembered, the oldest first.
    pub fn scrubbed(&self) -> Result<Vec<Scrubbed>> {
        match record::read::<ScrubbedRecord>(&self.0.state, SCRUBBED_JSON) {
            Ok(record) => Ok(record.copies),
            Err(error) if error.kind() == Kind::NotFound => Ok(Vec::new()),
            // What can't be read is made anew: nothing is lost but the knowledge of what was done.
            Err(error) if error.kind() == Kind::Corrupt => {
                tracing::warn!(%error, "the list of scrubbed copies");
                Ok(Vec::new())
            }
            Err(error) => Err(error),
        }
    }

    /// Remembers that a copy was scrubbed; those that are no more are forgotten. One caller at a time.
    pub fn record_scrubbed(&self, done: Scrubbed) -> Result<()> {
        let there = self.all_ready_copies();
        let mut copies = self.scrubbed()?;
        copies.retain(|it| {
            let same = it.digest == done.digest && it.disk == done.disk;
            !same && there.iter().any(|(digest, disk, _)| it.digest == *digest && it.disk == *disk)
        });
        copies.push(done);
        let surplus = copies.len().saturating_sub(MOST);
        copies.drain(..surplus);
        let record = ScrubbedRecord { format: FORMAT, copies };
        record::write(&self.0.state, SCRUBBED_JSON, &record)
    }
}
