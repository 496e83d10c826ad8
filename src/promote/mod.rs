//! Promotion: chunks that are read from a slow disk are copied to the disk of those who read them.
//!
//! ```text
//! replicas of disk B ──► View ──► Cache (on B)          what is there
//!                         │  └──► copy (on A)           the rest
//!                         ▼
//!                       Demand ──► policy ──► fill, withdraw, sweep the cache
//! ```

pub mod cache;
pub mod demand;
mod pages;
pub mod signal;
pub mod view;

pub use cache::Cache;
pub use demand::Demand;
pub use view::View;
