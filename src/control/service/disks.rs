//! What the API can ask of disks, and of the caches on them.

use std::sync::Arc;

use serde_json::json;

use super::{Service, blocking, parsed};
use crate::{
    catalog::{self, DiskOptions, DiskStatus, Name, Placement},
    control::{api::*, events::Happened, moves::RATE, work::DrainDisk},
    error::{Error, Kind, Result},
};

impl Service {
    /// Every disk.
    pub async fn disks(&self) -> Result<Vec<DiskStatus>> {
        let node = self.node.clone();
        blocking(move || Ok(node.disks())).await
    }

    /// One disk.
    pub async fn disk(&self, name: Name) -> Result<DiskStatus> {
        let node = self.node.clone();
        blocking(move || node.disk(&name)).await
    }

    /// Gives a disk to the node.
    pub async fn add_disk(&self, disk: AddDisk) -> Result<DiskStatus> {
        if !disk.path.is_absolute() {
            let what =
                format!("disk {}: give its path from the root, as /mnt/a", disk.path.display());
            return Err(Error::new(Kind::Invalid, what));
        }
        let options = DiskOptions {
            name: parsed(disk.name)?,
            tier: disk.tier,
            placement: disk.pool.then_some(Placement::Pool),
            cache: disk.cache_bytes,
        };
        let node = self.node.clone();
        let added = blocking(move || node.add_disk(&disk.path, options)).await?;
        let message = format!("added at {}", added.path.display());
        let details = json!({ "disk": added.name, "id": added.id, "path": added.path });
        let object = format!("disk {}", added.name);
        self.events.tell(Happened::DiskAdded, object, message, details);
        Ok(added)
    }

    /// Forgets a disk.
    pub async fn remove_disk(&self, name: Name) -> Result<Removed> {
        let (node, by) = (self.node.clone(), name.clone());
        let forgotten = blocking(move || node.remove_disk(&by)).await?;
        // Whoever removed it unmounts it next, or gives its name to another.
        self.promotion.leave_disks().await;
        let erased = forgotten == catalog::Forgotten::Erased;
        let message = if erased { "removed: nothing was on it" } else { "removed; its files stay" };
        let details = json!({ "disk": name, "erased": erased });
        self.events.tell(Happened::DiskRemoved, format!("disk {name}"), message, details);
        let note = match forgotten {
            catalog::Forgotten::Erased => None,
            catalog::Forgotten::Kept => {
                Some("its files are where they were; `underlay disk add` brings them back".into())
            }
        };
        Ok(Removed { removed: name.into(), note })
    }

    /// Prepares the emptying of a disk.
    pub async fn prepare_drain(self: &Arc<Self>, name: Name, drain: Drain) -> Result<DrainDisk> {
        let disk = self.disk(name).await?.name;
        let mut to = Vec::new();
        for other in drain.to {
            to.push(self.disk(other.parse()?).await?.name);
        }
        let rate = drain.rate_bytes.unwrap_or(RATE);
        Ok(DrainDisk { service: self.clone(), disk, to, rate })
    }

    /// From now on a disk takes nothing new, or does again.
    pub async fn set_draining(&self, name: &Name, draining: bool) -> Result<DiskStatus> {
        let (node, by) = (self.node.clone(), name.clone());
        let disk = blocking(move || node.set_draining(&by, draining)).await?;
        let message = match draining {
            true => "it takes nothing new from now on",
            false => "it takes new things again",
        };
        let details = json!({ "disk": name, "draining": draining });
        self.events.tell(Happened::DiskChanged, format!("disk {name}"), message, details);
        Ok(disk)
    }

    /// Empties caches.
    pub async fn clear_caches(&self, clear: ClearCache) -> Result<Cleared> {
        let disk = parsed(clear.disk)?;
        if let Some(disk) = &disk {
            self.disk(disk.clone()).await?;
        }
        let digest = match parsed(clear.image)? {
            Some(image) => Some(self.image(image).await?.status.digest),
            None => None,
        };
        Ok(self.promotion.clear(disk.as_ref(), digest))
    }

    /// A disk and an image, by what a client calls them.
    pub async fn disk_and_image(&self, disk: &str, image: &str) -> Result<(Name, catalog::Digest)> {
        let disk = self.disk(disk.parse()?).await?.name;
        Ok((disk, self.image(image.parse()?).await?.status.digest))
    }
}
