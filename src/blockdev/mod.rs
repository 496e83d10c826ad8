//! Block devices and the front ends that export them.

use std::sync::Arc;

pub mod base;
pub mod device;
pub mod figures;
pub mod nbd;
pub mod replica;
pub mod ublk;

pub use base::BaseImage;
pub use device::{Device, Extent, Grain, Holder, Info, Provision};
pub use figures::Figures;
pub use replica::{Below, Footing, Replica};

use crate::io::Ring;

/// Any device that a front end can export, on the rings of guests.
#[derive(Clone)]
pub enum AnyDevice {
    /// An image's copy.
    Base(Arc<BaseImage<Ring>>),
    /// A replica.
    Replica(Arc<Replica<Ring>>),
}

impl AnyDevice {
    /// Size and kind, as of now.
    pub fn info(&self) -> Info {
        match self {
            AnyDevice::Base(base) => base.info(),
            AnyDevice::Replica(replica) => replica.info(),
        }
    }
}

/// An open device under its name. Whoever serves it holds a clone until nothing is under way any
/// more: what is held is neither removed nor opened a second time.
pub struct Export {
    /// As clients call it: `image/NAME` or `replica/NAME`.
    pub name: String,
    /// For people.
    pub description: String,
    /// What reads and writes.
    pub device: AnyDevice,
    /// What is counted of its requests.
    pub figures: Arc<Figures>,
}
