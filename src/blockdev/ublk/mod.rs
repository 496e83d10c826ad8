//! ublk: block devices of the kernel, `/dev/ublkbN`, that this process serves.
//!
//! ```text
//! device.rs   a block device from its making to its end
//! control.rs  commands to the driver        queue.rs  requests from it
//! abi.rs      the bytes of both
//! ```

mod abi;
mod control;
pub mod device;
mod queue;

pub use control::Stop;
pub use device::{BlockDevice, Options};
pub use queue::Mode;
