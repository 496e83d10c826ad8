//! Trouble, mixed: everything that changes a node at once under kill -9 (`churn`), and a day's worth of sick
//! disks, damage and deaths in minutes (`chaos`).
//!
//! `model.rs` says what a replica must hold, `guest.rs` writes and reads it; `world.rs` is what must be there,
//! `acts.rs` changes it, `check.rs` compares. `churn.rs` and `storm.rs` are the two rigs; `trouble.rs` is what
//! befalls disks.

mod acts;
mod call;
mod check;
mod churn;
mod guest;
pub mod model;
mod storm;
mod trouble;
mod world;

pub use churn::run as churn;
pub use storm::run as chaos;
