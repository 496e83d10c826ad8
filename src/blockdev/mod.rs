//! Block devices and the front ends that export them.

pub mod device;
pub mod nbd;

pub use device::{Device, Extent, Info, Provision};
