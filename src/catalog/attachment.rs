//! Attachments: which exports are block devices of this node's kernel, so that the next daemon finds
//! them again.
//!
//! Invariant: an attachment is recorded before its device is made, and until it is gone.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use uuid::Uuid;

use super::{
    name::Digest,
    node::Node,
    record::{self, FORMAT},
};
use crate::error::{Kind, Result};

const ATTACHMENTS_JSON: &str = "attachments.json";

/// An export that is attached, and how.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Attachment {
    /// Its identity; its first half marks the device in the kernel.
    pub id: Uuid,
    /// As it was asked for: `image/NAME` or `replica/NAME`.
    pub export: String,
    /// What it is of.
    pub target: Target,
    /// What makes the block device.
    pub via: Via,
    /// The device's number.
    pub number: u32,
    /// Queues, or connections.
    pub queues: u16,
    /// Requests that each has under way.
    pub depth: u16,
    /// Never without copying.
    pub copy: bool,
    /// The kernel looks for partitions.
    pub scan: bool,
}

/// What an attachment is of: names may change hands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Target {
    /// An image.
    Image(Digest),
    /// A replica.
    Replica(Uuid),
}

/// What makes a block device of an export.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
pub enum Via {
    /// The ublk driver: /dev/ublkbN.
    Ublk,
    /// The kernel's NBD client: /dev/nbdN.
    Nbd,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct AttachmentsRecord {
    format: u32,
    attachments: Vec<Attachment>,
}

impl Node {
    /// Every attachment that is recorded.
    pub fn attachments(&self) -> Result<Vec<Attachment>> {
        match record::read::<AttachmentsRecord>(&self.0.state, ATTACHMENTS_JSON) {
            Ok(record) => Ok(record.attachments),
            Err(error) if error.kind() == Kind::NotFound => Ok(Vec::new()),
            Err(error) => Err(error.within("the list of attachments")),
        }
    }

    /// Records exactly these attachments. One caller at a time.
    pub fn record_attachments(&self, attachments: Vec<Attachment>) -> Result<()> {
        let record = AttachmentsRecord { format: FORMAT, attachments };
        record::write(&self.0.state, ATTACHMENTS_JSON, &record)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attachments_are_found_again() {
        let directory = tempfile::tempdir().unwrap();
        let attachment = Attachment {
            id: Uuid::new_v4(),
            export: "replica/vm1".to_owned(),
            target: Target::Replica(Uuid::new_v4()),
            via: Via::Ublk,
            number: 7,
            queues: 2,
            depth: 64,
            copy: false,
            scan: true,
        };
        let node = Node::open(directory.path()).unwrap();
        assert_eq!(node.attachments().unwrap(), []);
        node.record_attachments(vec![attachment.clone()]).unwrap();
        drop(node);
        let node = Node::open(directory.path()).unwrap();
        assert_eq!(node.attachments().unwrap(), [attachment]);
        node.record_attachments(Vec::new()).unwrap();
        assert_eq!(node.attachments().unwrap(), []);
        std::fs::write(directory.path().join(ATTACHMENTS_JSON), "{").unwrap();
        assert_eq!(node.attachments().unwrap_err().kind(), Kind::Corrupt);
    }
}
