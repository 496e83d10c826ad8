//! What is pinned: read once, and changed only together with its record.

use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::{
    catalog::{Node, Pin},
    error::Result,
};

/// The pins of a node.
pub struct Pins(Mutex<Vec<Pin>>);

impl Pins {
    /// Those that are recorded. Blocks.
    pub fn read(node: &Node) -> Result<Pins> {
        Ok(Pins(Mutex::new(node.pins()?)))
    }

    /// All of them.
    pub fn all(&self) -> Vec<Pin> {
        self.pins().clone()
    }

    /// Changes them, durably. Blocks.
    pub fn change(&self, node: &Node, change: impl FnOnce(&mut Vec<Pin>)) -> Result<()> {
        let mut pins = self.pins();
        let mut changed = pins.clone();
        change(&mut changed);
        if changed != *pins {
            node.record_pins(changed.clone())?;
            *pins = changed;
        }
        Ok(())
    }

    fn pins(&self) -> MutexGuard<'_, Vec<Pin>> {
        // It is replaced as a whole.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
