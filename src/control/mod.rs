//! The node's service: its configuration, its HTTP API, and the client of it.

pub mod config;
pub mod paths;
pub mod socket;
