//! Who is at work on what, so that operations on different objects go on at the same time.
//!
//! Invariants:
//! - An operation takes all its claims at once or none, so no two wait for each other.
//! - No lock is held while an operation writes to a disk: a claim is data, not a guard. A disk that
//!   hangs stops those who want the same object, for [`PATIENCE`], and nobody else.
//! - `fsck` claims the catalogue alone; whoever changes it shares it.

use std::{collections::HashMap, time::Duration};

use uuid::Uuid;

use super::name::{Digest, Name};

/// How long an operation waits for another on the same object.
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);

/// What is claimed.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Object {
    /// Everything: shared by all that change anything.
    Catalogue,
    /// The list of disks.
    Disks,
    Disk(Uuid),
    Image(Digest),
    ImageName(Name),
    Replica(Uuid),
    ReplicaName(Name),
}

/// How it is claimed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mode {
    Shared,
    Alone,
}

/// A claim that an operation wants.
pub(crate) type Want = (Object, Mode);

/// The claims held now.
#[derive(Debug, Default)]
pub(crate) struct Claims(HashMap<Object, Held>);

#[derive(Debug)]
enum Held {
    Shared(usize),
    Alone,
}

impl Claims {
    /// Takes all of `wants`, if all are free.
    pub(crate) fn take(&mut self, wants: &[Want]) -> bool {
        let free = wants.iter().all(|(object, mode)| match self.0.get(object) {
            None => true,
            Some(Held::Shared(_)) => *mode == Mode::Shared,
            Some(Held::Alone) => false,
        });
        if free {
            for (object, mode) in wants {
                match (self.0.get_mut(object), mode) {
                    (Some(Held::Shared(count)), Mode::Shared) => *count += 1,
                    (_, Mode::Shared) => drop(self.0.insert(object.clone(), Held::Shared(1))),
                    (_, Mode::Alone) => drop(self.0.insert(object.clone(), Held::Alone)),
                }
            }
        }
        free
    }

    /// Gives back what `take` took.
    pub(crate) fn release(&mut self, wants: &[Want]) {
        for (object, _) in wants {
            match self.0.get_mut(object) {
                Some(Held::Shared(count)) if *count > 1 => *count -= 1,
                _ => drop(self.0.remove(object)),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn claims_are_taken_together_or_not_at_all() {
        let mut claims = Claims::default();
        let a = Object::Disk(Uuid::from_u128(1));
        let b = Object::Disk(Uuid::from_u128(2));
        let shared = [(a.clone(), Mode::Shared), (b.clone(), Mode::Shared)];
        assert!(claims.take(&shared) && claims.take(&shared));
        assert!(!claims.take(&[(Object::Disks, Mode::Alone), (a.clone(), Mode::Alone)]));
        assert!(claims.take(&[(Object::Disks, Mode::Alone)]), "nothing stayed of the refused one");
        assert!(!claims.take(&[(Object::Disks, Mode::Shared)]));
        claims.release(&shared);
        assert!(!claims.take(&[(b.clone(), Mode::Alone)]));
        claims.release(&shared);
        assert!(claims.take(&[(a, Mode::Alone), (b, Mode::Alone)]));
    }
}
