//! What the agent is to watch: the disks, and where the copies on them lie.

use std::{
    collections::{BTreeSet, HashMap, HashSet},
    fs,
    os::unix::fs::MetadataExt,
};

use underlay_agent::{
    device::Dev,
    fiemap::extents_of,
    report::{Disk, File, Watch},
};

use crate::{
    catalog::{Digest, DiskState, Name, Node},
    error::{Context, Result},
    units,
};

/// The disks that are there, and the copies on them: what a watch is made for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Scene {
    disks: BTreeSet<Name>,
    /// With the images' sizes.
    copies: BTreeSet<(Name, Digest, u64)>,
}

/// A copy whose extents the agent knows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Followed {
    /// The image.
    pub digest: Digest,
    /// The disk.
    pub disk: Name,
    /// Chunks of the image.
    pub chunks: u64,
}

/// A watch, and what its files' numbers mean.
#[derive(Debug, Default)]
pub struct Watched {
    scene: Scene,
    /// As it is told.
    pub watch: Watch,
    files: HashMap<u64, Followed>,
}

impl Scene {
    /// What is there, as far as is known without asking a disk.
    pub fn of(node: &Node) -> Scene {
        let there = |state| matches!(state, DiskState::Present | DiskState::ReadOnly);
        let disks = node.known_disks().into_iter().filter(|disk| there(disk.state));
        Scene {
            disks: disks.map(|disk| disk.name).collect(),
            copies: node.known_copies().into_iter().collect(),
        }
    }
}

impl Watched {
    /// Whether it is of this scene.
    pub fn is_of(&self, scene: &Scene) -> bool {
        self.watch.generation > 0 && self.scene == *scene
    }

    /// The watch for a scene, of this generation. Blocks.
    pub fn of(node: &Node, scene: Scene, generation: u64) -> Watched {
        let mut files = HashMap::new();
        let mut disks = Vec::new();
        for name in &scene.disks {
            match disk(node, name, &scene, &mut files) {
                Ok(disk) => disks.push(disk),
                Err(error) => tracing::warn!(disk = %name, %error, "the probes can't watch it"),
            }
        }
        let watch = Watch { generation, tgids: vec![std::process::id()], disks };
        Watched { scene, watch, files }
    }

    /// The copy that the agent knows by this number.
    pub fn file(&self, id: u64) -> Option<&Followed> {
        self.files.get(&id)
    }

    /// Whether the agent is to watch a disk of this name.
    pub fn has_disk(&self, name: &Name) -> bool {
        self.scene.disks.contains(name)
    }

    /// Every copy whose extents are known.
    pub fn followed(&self) -> HashSet<(Digest, Name)> {
        self.files.values().map(|file| (file.digest, file.disk.clone())).collect()
    }
}

#[cfg(test)]
impl Watched {
    /// Of these disks, and of these files: number, image, disk and chunks.
    pub fn for_test(disks: &[Name], files: &[(u64, Digest, Name, u64)]) -> Watched {
        let scene = Scene { disks: disks.iter().cloned().collect(), ..Scene::default() };
        let files = files.iter().map(|(id, digest, disk, chunks)| {
            (*id, Followed { digest: *digest, disk: disk.clone(), chunks: *chunks })
        });
        Watched { scene, files: files.collect(), ..Watched::default() }
    }
}

fn disk(
    node: &Node,
    name: &Name,
    scene: &Scene,
    files: &mut HashMap<u64, Followed>,
) -> Result<Disk> {
    let path = node.disk(name)?.path;
    let at = fs::metadata(&path).context(|| format!("looking at {}", path.display()))?;
    let mut disk =
        Disk { name: name.to_string(), dev: Dev::from_stat(at.dev()).to_string(), files: vec![] };
    for (_, digest, size) in scene.copies.iter().filter(|(on, ..)| on == name) {
        let copy = match node.open_copy_on(*digest, name) {
            Ok(copy) => copy,
            Err(error) => {
                tracing::warn!(disk = %name, image = %digest, %error, "the probes can't follow it");
                continue;
            }
        };
        match extents_of(&copy.data) {
            Ok(extents) => {
                let id = files.len() as u64;
                let chunks = units::chunks(*size);
                files.insert(id, Followed { digest: *digest, disk: name.clone(), chunks });
                disk.files.push(File { id, extents });
            }
            Err(why) => {
                tracing::info!(disk = %name, image = %digest, %why, "the service's own timing \
                    tells which chunks are read from the device");
            }
        }
    }
    Ok(disk)
}
