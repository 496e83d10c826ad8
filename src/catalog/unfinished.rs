//! Copies whose making was interrupted, and that can be gone on with.
//!
//! ```text
//! images/.staging-<uuid>/ data           what was copied so far
//!                         resume.json    of which image, and how far: written once that is durable
//! ```
//!
//! Invariants:
//! - Nothing that is found is believed: who goes on compares each chunk with the image's sums.
//! - One works on it at a time: it is taken from the view in one step, and is live from then on.
//! - It holds space for a day at most, and goes before that with its image, once its disk has a copy or
//!   takes none any more, or by `image uncopy`.

use std::{
    collections::HashSet,
    ffi::{OsStr, OsString},
    sync::Arc,
    time::{Duration, SystemTime},
};

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::{
    dir::{Dir, Entry, EntryKind, FILE_MODE, allocated, kind_of},
    disk::{DATA, Disk},
    name::Digest,
    node::{Inner, Node},
    record::{self, FORMAT},
    scan::STAGING,
    status::CopyState,
    view::{Copy, View},
};
use crate::error::Result;

/// The file that says how far it is.
pub(crate) const RESUME_JSON: &str = "resume.json";
/// How long it is kept after the last progress.
const KEPT: Duration = Duration::from_secs(24 * 3600);
/// Files that a copy in the making can have, and far more.
const FILES_MAX: usize = 64;

/// `resume.json`.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct ResumeRecord {
    format: u32,
    digest: Digest,
    /// The image's bytes before this offset were copied.
    done: u64,
}

/// A copy whose making was interrupted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Unfinished {
    /// Its disk.
    pub disk: Uuid,
    /// Its directory.
    pub name: OsString,
    /// The image.
    pub digest: Digest,
    /// The image's bytes before this offset were copied.
    pub done: u64,
    /// Space that it takes, in bytes.
    pub stored: u64,
    /// When it was last gone on with.
    pub at: SystemTime,
}

impl Unfinished {
    /// What a directory of `parent` says; `None` if nothing can be made of it, or its time is over.
    pub(crate) fn read(disk: Uuid, parent: &Dir, entry: &Entry) -> Result<Option<Unfinished>> {
        if entry.kind != EntryKind::Dir || !entry.name.to_string_lossy().starts_with(STAGING) {
            return Ok(None);
        }
        let dir = parent.open(&entry.name)?;
        let (Some(noted), Some(data)) = (dir.stat(RESUME_JSON)?, dir.stat(DATA)?) else {
            return Ok(None);
        };
        // A second name of it would be that of a file which isn't ours to write.
        if kind_of(&data) != EntryKind::File || data.st_nlink != 1 {
            return Ok(None);
        }
        let Ok(record) = record::read::<ResumeRecord>(&dir, RESUME_JSON) else { return Ok(None) };
        let since = Duration::from_secs(u64::try_from(noted.st_mtime).unwrap_or(0));
        let Some(at) = SystemTime::UNIX_EPOCH.checked_add(since) else { return Ok(None) };
        let ResumeRecord { digest, done, .. } = record;
        let stored = allocated(&data);
        let found = Unfinished { disk, name: entry.name.clone(), digest, done, stored, at };
        Ok((!found.is_old()).then_some(found))
    }

    fn is_old(&self) -> bool {
        // One from the future is as good as one from long ago: its clock was another.
        SystemTime::now().duration_since(self.at).map_or(true, |age| age >= KEPT)
    }
}

/// Says, durably, that the image's bytes before `done` were copied into `dir`.
pub(crate) fn note(dir: &Dir, digest: Digest, done: u64) -> Result<()> {
    record::write(dir, RESUME_JSON, &ResumeRecord { format: FORMAT, digest, done })
}

/// Opens a directory to go on with it: nothing but content is left in it.
fn reopen(disk: &Disk, name: &OsStr) -> Result<Dir> {
    let dir = disk.images.open(name)?;
    for entry in dir.entries(FILES_MAX)? {
        if entry.name != DATA && entry.name != RESUME_JSON {
            dir.remove_tree(&entry.name)?;
        }
    }
    dir.set_mode(DATA, FILE_MODE)?;
    Ok(dir)
}

impl View {
    /// Takes those that suit: whoever has them is at work in them.
    fn take_unfinished_where(&mut self, suits: &dyn Fn(&Unfinished) -> bool) -> Vec<Unfinished> {
        let mut taken: Vec<Unfinished> = self.unfinished.extract_if(.., |it| suits(it)).collect();
        taken.retain(|it| self.live.insert(it.name.clone()));
        taken
    }
}

impl Node {
    /// Whether something is left of copies that nobody can or may go on with any more.
    pub fn has_ended_unfinished(&self) -> bool {
        let view = self.0.view();
        view.unfinished.iter().any(|it| is_ended(&view, it))
    }

    /// Removes it. Waits for disks that hang.
    pub fn sweep_unfinished(&self) {
        let ended = {
            let mut view = self.0.view();
            let ended: HashSet<OsString> = view
                .unfinished
                .iter()
                .filter(|it| is_ended(&view, it))
                .map(|it| it.name.clone())
                .collect();
            view.take_unfinished_where(&|it| ended.contains(&it.name))
        };
        if let Err(error) = self.0.remove_unfinished(ended) {
            tracing::warn!(%error, "an unfinished copy stays for now");
        }
    }
}

impl Inner {
    /// Takes what is there of a copy of an image on a disk: its directory, and how far it is.
    pub(crate) fn go_on(
        &self,
        disk: &Disk,
        digest: Digest,
    ) -> Option<(OsString, Dir, (Digest, u64))> {
        let here = |it: &Unfinished| it.disk == disk.id && it.digest == digest;
        let mut taken = self.view().take_unfinished_where(&here);
        // One of several is enough; that there are more is the work of another's hand.
        taken.sort_by_key(|it| it.done);
        let best = taken.pop()?;
        let dir = reopen(disk, &best.name);
        if dir.is_err() {
            taken.push(best.clone());
        }
        if let Err(error) = self.remove_unfinished(taken) {
            tracing::warn!(%error, "an unfinished copy stays until fsck");
        }
        Some((best.name, dir.ok()?, (digest, best.done)))
    }

    /// Ends the work on a copy that can be gone on with.
    pub(crate) fn leave(&self, disk: &Disk, name: &OsStr, digest: Digest, done: u64) {
        let entry = Entry { name: name.to_owned(), kind: EntryKind::Dir };
        let found = Unfinished::read(disk.id, &disk.images, &entry);
        let mut view = self.view();
        view.live.remove(name);
        match found {
            Ok(Some(found)) => view.unfinished.push(found),
            // It is old already, or can't be read: fsck tells.
            other => tracing::debug!(image = %digest, done, ?other, "an unfinished copy is left"),
        }
    }

    /// Removes what is left of copies on a disk, of one image or of all. Whether there were any.
    pub(crate) fn drop_unfinished(&self, disk: Uuid, of: Option<Digest>) -> Result<bool> {
        let suits =
            |it: &Unfinished| it.disk == disk && of.is_none_or(|digest| it.digest == digest);
        let taken = self.view().take_unfinished_where(&suits);
        self.remove_unfinished(taken)
    }

    fn remove_unfinished(&self, taken: Vec<Unfinished>) -> Result<bool> {
        let mut removed = Ok(!taken.is_empty());
        for it in taken {
            let home: Option<Arc<Disk>> = self.view().here(it.disk).cloned();
            let gone = home.map_or(Ok(()), |home| home.images.remove_tree(&it.name));
            let mut view = self.view();
            view.live.remove(&it.name);
            if let Err(error) = gone {
                removed = Err(error);
                view.unfinished.push(it);
            }
        }
        removed
    }
}

fn is_ended(view: &View, it: &Unfinished) -> bool {
    let takes_none = view.slot(it.disk).is_none_or(|slot| slot.takes_new().is_err());
    // Its image may be on a disk that is away.
    let gone = view.away_disks().is_empty();
    let image = view.images.get(&it.digest);
    let serves = |copy: &Copy| copy.disk == it.disk && copy.state() == CopyState::Ready;
    it.is_old() || takes_none || image.map_or(gone, |image| image.copies.iter().any(serves))
}
