//! The ring (in work).
