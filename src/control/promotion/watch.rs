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
    catalog::{CopyState, Digest, DiskState, Name, Node},
    error::{Context, Result},
};

/// The disks that are there, and the copies on them: what a watch is made for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Scene {
    disks: BTreeSet<Name>,
    copies: BTreeSet<(Name, Digest)>,
}

/// A watch, and what its files' numbers mean.
#[derive(Debug, Default)]
pub struct Watched {
    scene: Scene,
    /// As it is told.
    pub watch: Watch,
    files: HashMap<u64, (Digest, Name)>,
}

impl Scene {
    /// What is there now. Blocks.
    pub fn of(node: &Node) -> Scene {
        let there = |state| matches!(state, DiskState::Present | DiskState::ReadOnly);
        let disks = node.disks().into_iter().filter(|disk| there(disk.state)).map(|disk| disk.name);
        let copies = node.images().into_iter().flat_map(|image| {
            let ready = image.copies.into_iter().filter(|copy| copy.state == CopyState::Ready);
            ready.map(move |copy| (copy.disk, image.digest))
        });
        Scene { disks: disks.collect(), copies: copies.collect() }
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
    pub fn file(&self, id: u64) -> Option<(Digest, Name)> {
        self.files.get(&id).cloned()
    }

    /// Every copy whose extents are known.
    pub fn followed(&self) -> HashSet<(Digest, Name)> {
        self.files.values().cloned().collect()
    }
}

fn disk(
    node: &Node,
    name: &Name,
    scene: &Scene,
    files: &mut HashMap<u64, (Digest, Name)>,
) -> Result<Disk> {
    let path = node.disk(name)?.path;
    let at = fs::metadata(&path).context(|| format!("looking at {}", path.display()))?;
    let mut disk =
        Disk { name: name.to_string(), dev: Dev::from_stat(at.dev()).to_string(), files: vec![] };
    for (_, digest) in scene.copies.iter().filter(|(on, _)| on == name) {
        let copy = match node.open_copy(&digest.to_string().parse()?) {
            Ok(copy) if copy.disk == *name => copy,
            Ok(_) => continue,
            Err(error) => {
                tracing::warn!(disk = %name, image = %digest, %error, "the probes can't follow it");
                continue;
            }
        };
        match extents_of(&copy.data) {
            Ok(extents) => {
                let id = files.len() as u64;
                files.insert(id, (*digest, name.clone()));
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
