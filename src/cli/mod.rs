//! x
pub mod size;
