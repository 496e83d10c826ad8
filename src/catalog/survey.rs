//! The node at a glance, for those who may not wait: what is known of it without asking a disk, and
//! what one disk says when it is asked.

use std::collections::HashMap;

use uuid::Uuid;

use super::{
    name::{Digest, Name},
    node::Node,
    report::{away_status, disk_status, image_status, node_status, replica_status, taken, told},
    status::{CopyState, DiskState, DiskStatus, ImageStatus, NodeStatus, ReplicaStatus},
};

/// What is known without asking a disk, all of one moment. Sizes of disks and of replicas' files are
/// 0 in it.
#[derive(Clone, Debug)]
pub struct Outline {
    /// The node in figures.
    pub node: NodeStatus,
    /// Every disk, in the order in which they were added.
    pub disks: Vec<DiskStatus>,
    /// Every image of which a copy is there.
    pub images: Vec<ImageStatus>,
    /// Every replica, those of missing disks too.
    pub replicas: Vec<ReplicaStatus>,
}

/// What a disk says of itself.
#[derive(Clone, Debug, Default)]
pub struct Survey {
    /// Size of its file system.
    pub total_bytes: u64,
    /// What can still be written to its file system.
    pub free_bytes: u64,
    /// What has become of it since it was attached, if it can't be used as it was.
    pub changed: Option<DiskState>,
    /// Space that the files of each replica on it take.
    pub replicas: HashMap<Uuid, u64>,
}

impl Node {
    /// What is known without asking a disk.
    pub fn outline(&self) -> Outline {
        let view = self.0.view();
        let here = view.replicas.values().map(|replica| replica_status(&view, replica));
        let away = view.away();
        let away = away.iter().map(|(digest, reference)| away_status(&view, *digest, reference));
        Outline {
            node: node_status(&view),
            disks: view.disks.iter().map(|slot| disk_status(&view, slot)).collect(),
            images: view.images.iter().map(|(id, image)| image_status(&view, *id, image)).collect(),
            replicas: here.chain(away).collect(),
        }
    }

    /// Every disk, in the order in which they were added, without asking any: sizes are 0.
    pub fn known_disks(&self) -> Vec<DiskStatus> {
        let view = self.0.view();
        view.disks.iter().map(|slot| disk_status(&view, slot)).collect()
    }

    /// Every copy that serves, with its disk and its image's size, without asking any disk.
    pub fn known_copies(&self) -> Vec<(Name, Digest, u64)> {
        let view = self.0.view();
        let copies = view.images.values().flat_map(|image| &image.copies);
        let ready = copies.filter(|copy| copy.state() == CopyState::Ready);
        let told = ready.filter_map(|copy| {
            let record = &copy.found.record;
            Some((view.disk_name(copy.disk)?.clone(), record.digest, record.size))
        });
        told.collect()
    }

    /// Asks the disk of this id; `None` if it isn't there. Waits for as long as the disk does.
    pub fn survey(&self, disk: Uuid) -> Option<Survey> {
        let (disk, replicas): (_, Vec<Uuid>) = {
            let view = self.0.view();
            let on_it = view.replicas.iter().filter(|(_, replica)| replica.disk == disk);
            (view.here(disk)?.clone(), on_it.map(|(id, _)| *id).collect())
        };
        let mut survey = Survey::default();
        match disk.home.space() {
            Ok(space) => {
                (survey.total_bytes, survey.free_bytes) = (space.total, space.free);
                survey.changed = told(&space).map(|(state, _)| state);
            }
            Err(_) => survey.changed = Some(DiskState::Failed),
        }
        survey.replicas = replicas.into_iter().map(|id| (id, taken(&disk, id))).collect();
        Some(survey)
    }
}
