//! Metadata contexts: what a client can ask of a range besides its content.
//!
//! `x-underlay:source` is our own: who would answer a read of the range at this moment. docs/nbd.md tells the
//! numbers.

use crate::blockdev::{Extent, Grain, Holder};

/// A metadata context.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Context {
    /// `base:allocation`: what is allocated, and what reads as zeros.
    Allocation,
    /// `x-underlay:source`: who holds the content.
    Source,
}

impl Context {
    /// Every context, in the order of their ids.
    pub const ALL: [Context; 2] = [Context::Allocation, Context::Source];

    /// Its name.
    pub const fn name(self) -> &'static str {
        match self {
            Context::Allocation => "base:allocation",
            Context::Source => "x-underlay:source",
        }
    }

    /// What a query asks for that lists all of its namespace.
    pub const fn namespace(self) -> &'static str {
        match self {
            Context::Allocation => "base:",
            Context::Source => "x-underlay:",
        }
    }

    /// Its id: the same on every connection.
    pub const fn id(self) -> u32 {
        match self {
            Context::Allocation => 1,
            Context::Source => 2,
        }
    }

    /// What is said of an extent.
    pub const fn state(self, extent: &Extent) -> u32 {
        match (self, extent.holder) {
            (Context::Allocation, Holder::Nobody) => state::HOLE | state::ZERO,
            (Context::Allocation, _) => 0,
            (Context::Source, Holder::Nobody) => source::NOBODY,
            (Context::Source, Holder::Overlay) => source::OVERLAY,
            (Context::Source, Holder::Base) => source::BASE,
            (Context::Source, Holder::Cache) => source::CACHE,
        }
    }
}

/// States of an extent in `base:allocation`.
#[allow(missing_docs, reason = "the protocol's own names")]
pub mod state {
    pub const HOLE: u32 = 1 << 0;
    pub const ZERO: u32 = 1 << 1;
}

/// States of an extent in `x-underlay:source`.
pub mod source {
    /// Nobody: it reads as zeros.
    pub const NOBODY: u32 = 0;
    /// The replica's own overlay.
    pub const OVERLAY: u32 = 1;
    /// A copy of the image.
    pub const BASE: u32 = 2;
    /// The cache of promoted chunks on the replica's disk.
    pub const CACHE: u32 = 3;
}

/// A set of contexts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Contexts(u8);

impl Contexts {
    /// Every one.
    pub fn all() -> Contexts {
        Context::ALL.into_iter().collect()
    }

    /// Whether it is among them.
    pub const fn has(self, context: Context) -> bool {
        self.0 & 1 << context.id() != 0
    }

    /// Whether there is none.
    pub const fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// How many there are.
    pub const fn len(self) -> usize {
        self.0.count_ones() as usize
    }

    /// Those that are in either.
    pub const fn and(self, others: Contexts) -> Contexts {
        Contexts(self.0 | others.0)
    }

    /// In the order of their ids.
    pub fn iter(self) -> impl Iterator<Item = Context> {
        Context::ALL.into_iter().filter(move |context| self.has(*context))
    }

    /// How finely extents have to be told apart for them.
    pub const fn grain(self) -> Grain {
        if self.has(Context::Source) { Grain::Holders } else { Grain::Zeros }
    }
}

impl FromIterator<Context> for Contexts {
    fn from_iter<T: IntoIterator<Item = Context>>(contexts: T) -> Contexts {
        contexts.into_iter().fold(Contexts(0), |all, it| Contexts(all.0 | 1 << it.id()))
    }
}
