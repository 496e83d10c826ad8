//! Promotion: chunks that are read from a slow disk are copied to the disk of those who read them.
//!
//! ```text
//! replicas of disk B ──► View ──► Cache (on B)          what is there
//!                         │  └──► copy (on A)           the rest
//!                         ▼
//!                       Demand ──► policy ──► fill, withdraw, sweep the cache
//!                                    ▲                     │
//!                                    └── promoted, failed, dropped
//! ```
//!
//! What decides is [`policy`], of which there is one for each reader disk: [`heat`] is how often a chunk was
//! touched of late, [`runs`] makes a long pass count once, [`gain`] is what a local read would save,
//! [`settings`] what a policy is told once.
//!
//! Invariant: these five are pure. They name no clock, no path, no ring and nothing random; the same calls
//! in the same order give the same decisions.

pub mod cache;
pub mod demand;
pub mod gain;
pub mod heat;
mod pages;
pub mod policy;
pub mod runs;
pub mod settings;
pub mod signal;
pub mod view;

#[cfg(test)]
mod properties;
#[cfg(test)]
mod scenarios;

pub use cache::Cache;
pub use demand::Demand;
pub use heat::Key;
pub use policy::Policy;
pub use settings::Settings;
pub use view::View;
