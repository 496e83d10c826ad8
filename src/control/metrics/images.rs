//! Images.

use std::fmt;

use super::{
    page::{About, Of, Page},
    snapshot::Image,
};

const SIZE: About = About("image_size", Of::Bytes, "Size of the image");
const COPIES: About = About("image_copies", Of::Things, "Copies of the image that serve");
const SPACE: About = About("image_copies", Of::Bytes, "Space that its copies take");
const REPLICAS: About = About("image_replicas", Of::Things, "Replicas that stand on the image");
const CLIENTS: About = About("image_clients", Of::Things, "NBD clients that read the image itself");

pub(super) fn tell(page: &mut Page<'_>, images: &[Image]) -> fmt::Result {
    let all = |value: fn(&Image) -> u64| {
        images.iter().map(move |image| ([("image", image.name.as_str())], value(image)))
    };
    page.gauge(SIZE, all(|image| image.size))?;
    page.gauge(COPIES, all(|image| image.copies))?;
    page.gauge(SPACE, all(|image| image.stored))?;
    page.gauge(REPLICAS, all(|image| image.replicas))?;
    page.gauge(CLIENTS, all(|image| image.clients))
}
