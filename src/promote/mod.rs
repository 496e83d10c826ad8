//! Promotion: hot chunks of an image are copied from the disk that holds it to the disks of those who
//! read them.
//!
//! ```text
//! replicas of disk B ──► View ──► Cache (on B)               what is there
//!                         │  └──► copy (on A)                the rest
//!                         ▼
//!        touches, hits: Demand          latencies: Signals   limits
//!                         └──────────► Policy::tick ◄────────┘
//!                                        │       ▲
//!              Decisions { evict, promote }      └── promoted, failed, dropped, adopt
//!                                        ▼
//!                                 mover: fill, withdraw, sweep the cache
//! ```
//!
//! - [`view`], [`cache`], [`mover`] do I/O, through [`Io`](crate::io::Io) alone: the code that serves guests
//!   is the code that the simulator runs.
//! - [`demand`]: what is read, counted without a lock; [`signal`]: how fast disks are.
//! - [`heat`]: how often a chunk was touched of late, and the order of all that is known;
//!   [`runs`]: what a long sequential pass touches twice counts once; [`gain`]: what reading an image from
//!   the local disk would save, and whether it is worth a write; [`policy`]: the decisions, within
//!   capacity and budget; [`settings`]: what it can be told; [`tick`]: what it is told each time.
//!
//! Invariants:
//! - The policy and what it stands on are pure: no clock, no path, no ring, no randomness. The same
//!   calls in the same order give the same decisions.
//! - One [`Policy`] serves one reader disk, and knows images by handles that its caller gives out.
//! - A cache is disposable: whatever happens to it, reads are the image's content.

pub mod cache;
pub mod demand;
pub mod gain;
pub mod heat;
pub mod mover;

pub mod policy;
pub mod runs;
pub mod settings;
pub mod signal;
pub mod tick;
pub mod view;

#[cfg(test)]
mod properties;
#[cfg(test)]
mod scenarios;

pub use cache::Cache;
pub use demand::Demand;
pub use heat::{Key, State};
pub use policy::Policy;
pub use settings::Settings;
pub use tick::{Decisions, Tick, Touch};
pub use view::View;
