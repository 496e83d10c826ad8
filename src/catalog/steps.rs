//! The seam at which tests stop the catalogue: every change it makes to a file system passes here
//! first.
//!
//! Invariant: `dir.rs` makes no change that it didn't announce as a [`Step`]. In service the hook
//! is absent and a step costs one comparison. Tests hand in a hook that fails from the n-th step on
//! (a killed process: what follows, cleaning up included, doesn't happen either), or one that
//! records the steps to find out what a power cut may leave of them.

use std::{fmt, path::Path, sync::Arc};

use crate::error::Result;

/// One change to a file system, about to be made.
#[derive(Debug)]
#[expect(dead_code, reason = "only the hooks of tests look into a step, and not at all of it")]
pub(crate) enum Step<'a> {
    /// A directory appears.
    MakeDir(&'a Path),
    /// A file appears, or is emptied, and holds `bytes`.
    Write { path: &'a Path, bytes: &'a [u8] },
    /// A file takes a length.
    SetLen { path: &'a Path, len: u64 },
    /// A file's content becomes durable.
    SyncFile(&'a Path),
    /// A directory's entries become durable.
    SyncDir(&'a Path),
    /// An entry moves, within one directory.
    Rename { from: &'a Path, to: &'a Path },
    /// Two entries of one directory change places.
    Exchange { a: &'a Path, b: &'a Path },
    /// A file goes.
    Unlink(&'a Path),
    /// An empty directory goes.
    RemoveDir(&'a Path),
    /// A file's or directory's mode changes.
    SetMode { path: &'a Path, mode: u32 },
}

type Hook = dyn Fn(&Step) -> Result<()> + Send + Sync;

/// Whom to tell of each step; nobody, in service.
#[derive(Clone, Default)]
pub(crate) struct Steps(Option<Arc<Hook>>);

impl Steps {
    /// Steps that `hook` sees first; its error takes the place of the step.
    #[cfg(test)]
    pub(crate) fn hooked(hook: impl Fn(&Step) -> Result<()> + Send + Sync + 'static) -> Steps {
        Steps(Some(Arc::new(hook)))
    }

    /// Announces a step.
    pub(crate) fn take(&self, step: Step) -> Result<()> {
        match &self.0 {
            None => Ok(()),
            Some(hook) => hook(&step),
        }
    }
}

impl fmt::Debug for Steps {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.0.is_some() { "Steps(hooked)" } else { "Steps" })
    }
}
