//! The `underlay` program.
fn main() {}
