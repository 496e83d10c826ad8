//! The simulated disk (in work).
