//! Promotion: chunks that are read from a slow disk are copied to the disk of those who read them.

pub mod cache;
mod pages;
