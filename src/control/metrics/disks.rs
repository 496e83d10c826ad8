//! Disks.

use std::fmt;

use super::{
    page::{About, Of, Page},
    snapshot::{Disk, Said},
};

const INFO: About = About("disk_info", Of::Things, "How fast the disk is taken to be, always 1");
const UP: About =
    About("disk_up", Of::Things, "Whether the disk is there, answers and can be written");
const STORED: About = About("disk_stored", Of::Bytes, "Space that underlay takes on the disk");
const IMAGES: About = About("disk_images", Of::Things, "Copies of images on the disk");
const REPLICAS: About = About("disk_replicas", Of::Things, "Replicas on the disk");
const SIZE: About = About("disk_size", Of::Bytes, "Size of the disk's file system");
const FREE: About = About("disk_free", Of::Bytes, "Space left on the disk");
const AGE: About = About(
    "disk_answer_age",
    Of::Seconds,
    "Age of what the disk said last: it grows while it hangs",
);

pub(super) fn tell(page: &mut Page<'_>, disks: &[Disk]) -> fmt::Result {
    let all = |value: fn(&Disk) -> u64| {
        disks.iter().map(move |disk| ([("disk", disk.name.as_str())], value(disk)))
    };
    let info =
        disks.iter().map(|disk| ([("disk", disk.name.as_str()), ("tier", disk.tier)], 1_u64));
    page.gauge(INFO, info)?;
    page.gauge(UP, all(|disk| u64::from(disk.up)))?;
    page.gauge(STORED, all(|disk| disk.stored))?;
    page.gauge(IMAGES, all(|disk| disk.images))?;
    page.gauge(REPLICAS, all(|disk| disk.replicas))?;
    let said = || {
        let said = disks.iter().filter_map(|disk| Some((disk, disk.said.as_ref()?)));
        said.map(|(disk, said)| ([("disk", disk.name.as_str())], said))
    };
    let bytes = |value: fn(&Said) -> u64| said().map(move |(labels, said)| (labels, value(said)));
    page.gauge(SIZE, bytes(|said| said.total))?;
    page.gauge(FREE, bytes(|said| said.free))?;
    page.gauge(AGE, said().map(|(labels, said)| (labels, said.age.as_secs_f64())))
}
