//! What the API can ask of images and their copies.

use std::{sync::Arc, time::Duration};

use serde_json::json;

use super::{Service, blocking, parsed};
use crate::{
    blockdev::AnyDevice,
    catalog::{self, ImageStatus, Name, Target},
    control::{
        api::*,
        copying::Making,
        events::Happened,
        export::Export,
        exports::IMAGE,
        work::{Copies, Import, Recording, Verify},
    },
    error::{Error, Kind, Result},
    image::{Format, parcel::Header},
};

impl Service {
    /// Every image.
    pub async fn images(&self) -> Result<Vec<ImageView>> {
        let node = self.node.clone();
        let images = blocking(move || Ok(node.images())).await?;
        Ok(images.into_iter().map(|status| self.image_view(status)).collect())
    }

    /// One image.
    pub async fn image(&self, name: Name) -> Result<ImageView> {
        let node = self.node.clone();
        Ok(self.image_view(blocking(move || node.image(&name)).await?))
    }

    pub(in crate::control) fn image_view(&self, status: ImageStatus) -> ImageView {
        let clients = |name: &Name| self.server.clients(&format!("{IMAGE}{name}"));
        let mut clients: Vec<_> = status.names.iter().flat_map(clients).collect();
        clients.extend(self.attachments.devices(Target::Image(status.digest)));
        let making = self.keeping.copying().under_way().into_iter();
        let making = making.filter(|making| making.digest == status.digest);
        let making = making.map(|Making { disk, done: (done_bytes, total_bytes), why, .. }| {
            MakingView { disk, done_bytes, total_bytes, why }
        });
        ImageView { clients, making: making.collect(), status }
    }

    /// Prepares an import: what is wrong with the request itself is told before any content is read.
    pub async fn prepare_import(
        self: &Arc<Self>,
        name: Name,
        options: UploadOptions,
    ) -> Result<Import> {
        let format = match options.format.as_deref() {
            None | Some("auto") => Format::Auto,
            Some("raw") => Format::Raw,
            Some("qcow2") => Format::Qcow2,
            Some("vmdk") => Format::Vmdk,
            Some(other) => {
                let shown: String = other.chars().take(40).collect();
                let what = format!("format {shown:?} is not known: raw, qcow2, vmdk or auto");
                return Err(Error::new(Kind::Invalid, what));
            }
        };
        let sha256 = match options.sha256 {
            Some(text) => {
                Some(text.to_ascii_lowercase().parse::<catalog::Digest>().map_err(|_| {
                    Error::new(Kind::Invalid, "sha256 is not 64 hexadecimal digits")
                })?)
            }
            None => None,
        };
        let disk = parsed(options.disk)?;
        let node = self.node.clone();
        let staged = blocking(move || node.stage_copy(disk.as_ref(), 0)).await?;
        Ok(Import { service: self.clone(), name, format, sha256, staged, path: None })
    }

    /// Removes a name of an image, and with the last one the image.
    pub async fn remove_image(&self, name: Name) -> Result<Removed> {
        let image = self.image(name.clone()).await?;
        if image.status.names.len() < 2 && !image.clients.is_empty() {
            return Err(Error::new(
                Kind::InUse,
                format!(
                    "image {name}: a client reads it ({}); disconnect it first",
                    image.clients.join(", ")
                ),
            ));
        }
        let (node, by) = (self.node.clone(), name.clone());
        let unnamed = blocking(move || node.remove_image(&by)).await?;
        let removed = unnamed == catalog::Unnamed::Removed;
        let message = if removed { "removed" } else { "this name is removed; it has others" };
        let details = json!({ "name": name, "digest": image.status.digest, "removed": removed });
        self.events.tell(Happened::ImageRemoved, format!("image {name}"), message, details);
        if unnamed == catalog::Unnamed::Removed {
            self.promotion.forget(image.status.digest).await;
            let (node, digest) = (self.node.clone(), image.status.digest);
            if let Err(error) = blocking(move || node.remove_origin(digest)).await {
                tracing::warn!(image = %name, %error, "where it came from is not forgotten");
            }
        }
        let note = match unnamed {
            catalog::Unnamed::Removed => None,
            catalog::Unnamed::Kept => Some("the image has other names and is kept".to_owned()),
        };
        Ok(Removed { removed: name.into(), note })
    }

    /// Prepares copies of an image: one on a disk, or as many as are wanted from now on.
    pub async fn prepare_copies(self: &Arc<Self>, name: Name, wish: MakeCopies) -> Result<Copies> {
        let disk = parsed(wish.to)?;
        if disk.is_some() == wish.copies.is_some() {
            let what = "either a disk for one more copy, or how many copies are wanted";
            return Err(Error::new(Kind::Invalid, what));
        }
        let (node, by) = (self.node.clone(), name.clone());
        let digest = blocking(move || {
            let digest = node.image(&by)?.digest;
            if let Some(count) = wish.copies {
                node.want_copies(&by, count)?;
            }
            Ok(digest)
        })
        .await?;
        Ok(Copies {
            service: self.clone(),
            name,
            digest,
            disk,
            anyhow: wish.force,
            rate: wish.rate_bytes.filter(|rate| *rate > 0),
        })
    }

    /// Gives up the copy of an image on a disk.
    pub async fn remove_copy(&self, name: Name, disk: Name, anyhow: bool) -> Result<ImageView> {
        let (node, image, from) = (self.node.clone(), name.clone(), disk.clone());
        blocking(move || node.remove_copy_on(&image, &from, anyhow)).await?;
        let image = self.image(name).await?;
        let message = format!("its copy on disk {disk} was given up");
        let details = json!({ "digest": image.status.digest, "disk": disk, "why": "asked for" });
        let object = self.exports.bases().called(image.status.digest);
        self.events.tell(Happened::CopyRemoved, object, message, details);
        Ok(image)
    }

    /// Prepares the verification of an image.
    pub async fn prepare_verify(self: &Arc<Self>, name: Name) -> Result<Verify> {
        let (node, by) = (self.node.clone(), name.clone());
        let (digest, disks) = blocking(move || {
            let digest = node.image(&by)?.digest;
            let copies = node.ready_copies(digest);
            let disks: Vec<Name> = copies.into_iter().map(|(disk, _)| disk).collect();
            if disks.is_empty() {
                // Says why there is none.
                node.open_copy(&by)?;
            }
            Ok((digest, disks))
        })
        .await?;
        Ok(Verify { service: self.clone(), name, digest, disks })
    }

    /// Prepares the export of an image's content.
    pub async fn prepare_image_export(self: &Arc<Self>, name: Name) -> Result<Export> {
        let status = self.image(name.clone()).await?.status;
        let base = self.exports.base(status.digest).await?;
        Ok(Export {
            service: self.clone(),
            header: Header { size: status.size, over: None },
            device: AnyDevice::Base(base),
            watch: None,
            what: format!("image {name}"),
            replica: None,
        })
    }

    /// Begins to record what is read of an image.
    pub async fn prepare_recording(&self, name: Name, length: Duration) -> Result<Recording> {
        let digest = self.image(name.clone()).await?.status.digest;
        if !self.promotion.begin_recording(digest) {
            let what = format!("image {name}: its profile is being recorded; wait for that to end");
            return Err(Error::new(Kind::InUse, what));
        }
        Ok(Recording { promotion: self.promotion.clone(), digest, length })
    }
}
