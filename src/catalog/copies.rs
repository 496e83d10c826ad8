//! Several copies of an image: making one more, giving one up, keeping their records alike.
//!
//! Invariants:
//! - Every reference is beside every copy that is there, as far as its disk can be written: losing a disk
//!   loses none. A copy appears with all of them, and none goes before the others have its.
//! - The last copy that serves is never given up here.

use std::sync::Arc;

use uuid::Uuid;

use super::{
    claims::{Mode, Object, Want},
    disk::{Disk, REFS},
    name::{Digest, Name},
    node::Node,
    record::{self, FORMAT, ImageRecord, RefRecord},
    replica::drop_reference,
    scan::{Reference, ref_file},
    stage::StagedCopy,
    status::{CopyState, ImageStatus, UserState},
    view::{Copy, View},
};
use crate::error::{Error, Kind, Result};

/// Copies of one image that may be asked for.
pub const COPIES_MAX: u32 = 16;

impl Node {
    /// Begins one more copy of an image, on `disk` or on the one that suits best. One that is there
    /// already, or fails together with one that is, is refused, the latter unless `anyhow`.
    pub fn stage_another(
        &self,
        digest: Digest,
        disk: Option<&Name>,
        anyhow: bool,
    ) -> Result<StagedCopy> {
        let (need, here, taken) = {
            let view = self.0.view();
            let image = view.images.get(&digest);
            let image = image.ok_or_else(|| Error::new(Kind::NotFound, "it is not there"))?;
            let stored = image.ready().map_or(0, |copy| copy.found.stored);
            let ready = image.copies.iter().filter(|copy| copy.state() == CopyState::Ready);
            let slots: Vec<_> = ready.filter_map(|copy| view.slot(copy.disk)).collect();
            // A copy that is about to leave its disk is no reason to stay away from what fails with it.
            let stay = slots.iter().filter(|slot| !slot.is_draining());
            let taken: Vec<Arc<Disk>> = stay.filter_map(|slot| slot.here().cloned()).collect();
            let here: Vec<Uuid> = slots.iter().map(|slot| slot.known.id).collect();
            (stored, here, taken)
        };
        if let Some(name) = disk {
            let home = self.0.view().disk(name)?.usable()?.clone();
            if here.contains(&home.id) {
                let what = format!("disk {name} has a copy of it already");
                return Err(Error::new(Kind::Exists, what));
            }
            let together = taken.iter().find(|other| other.media.fails_with(&home.media));
            if let (Some(other), false) = (together, anyhow) {
                let view = self.0.view();
                let other = view.disk_name(other.id).cloned().unwrap_or_else(Name::unknown);
                let what = format!(
                    "disk {name} fails together with disk {other}, which has a copy: choose another, or \
                     ask for it with --force"
                );
                return Err(Error::new(Kind::Invalid, what));
            }
        }
        let apart = |disk: &Disk| {
            !here.contains(&disk.id)
                && !taken.iter().any(|other| other.media.fails_with(&disk.media))
        };
        self.stage_where(disk, need, Some(digest), &|home| disk.is_some() || apart(home))
    }

    /// Publishes a staged copy of an image that is there.
    pub fn publish_another(&self, staged: StagedCopy, digest: Digest) -> Result<ImageStatus> {
        let target = staged.home().clone();
        let (claimed, record) = self.0.claim(format!("image {digest}"), |view| {
            let image = view.images.get(&digest);
            let gone = || Error::new(Kind::NotFound, "it was removed meanwhile");
            let image = image.ok_or_else(gone)?;
            let oldest = image.copies.iter().min_by_key(|copy| copy.found.record.created);
            let record = oldest.ok_or_else(gone)?.found.record.clone();
            let record = ImageRecord { format: FORMAT, names: image.names(), ..record };
            let mut wants: Vec<Want> = vec![
                (Object::Catalogue, Mode::Shared),
                (Object::Image(digest), Mode::Alone),
                (Object::Disk(target.id), Mode::Shared),
            ];
            wants.dedup();
            Ok((wants, record))
        })?;
        let refs = {
            let view = self.0.view();
            let refs = view.images.get(&digest).map(|image| image.refs()).unwrap_or_default();
            let sound = refs.into_values().filter(|reference| !reference.damaged);
            sound.map(|reference| reference.record.clone()).collect::<Vec<_>>()
        };
        staged.publish_beside(&record, &refs)?;
        drop(claimed);
        self.image_by_digest(digest)
    }

    /// Gives up the copy of an image on a disk, or what is there of one that was interrupted. Refused for the
    /// last one that serves; and, unless `anyhow`, if fewer would be left than are wanted.
    pub fn remove_copy_on(&self, image: &Name, disk: &Name, anyhow: bool) -> Result<()> {
        let within = |error: Error| error.within(format!("image {image}"));
        let unfinished = {
            let view = self.0.view();
            let (digest, found) = view.image(image)?;
            let home = view.disk(disk)?.usable()?.id;
            let has_one = found.copies.iter().any(|copy| copy.disk == home);
            (!has_one).then_some((home, digest))
        };
        if let Some((home, digest)) = unfinished
            && self.0.drop_unfinished(home, Some(digest)).map_err(within)?
        {
            return Ok(());
        }
        let (_claimed, (digest, home, others, refs, wanted)) =
            self.0.claim(format!("image {image}"), |view| {
                let (digest, found) = view.image(image)?;
                let home = view.disk(disk)?.usable()?.clone();
                let Some(copy) = found.copies.iter().find(|copy| copy.disk == home.id) else {
                    let what = format!("image {image}: disk {disk} has no copy of it");
                    return Err(Error::new(Kind::NotFound, what));
                };
                let ready = found.copies.iter().filter(|copy| copy.state() == CopyState::Ready);
                let others: Vec<Arc<Disk>> = ready
                    .filter(|other| other.disk != home.id)
                    .filter_map(|other| view.here(other.disk).cloned())
                    .collect();
                if others.is_empty() {
                    let what = format!(
                        "image {image}: the copy on disk {disk} is the last one: make another first \
                         (underlay image copy {image} --to DISK), or remove the image"
                    );
                    return Err(Error::new(Kind::InUse, what));
                }
                let wanted = found.wanted().unwrap_or(1);
                if (others.len() as u32) < wanted && !anyhow {
                    let what = format!(
                        "image {image}: {wanted} copies are wanted, {} would be left: make another \
                         first, or lower the number with --force",
                        others.len()
                    );
                    return Err(Error::new(Kind::InUse, what));
                }
                let refs: Vec<RefRecord> =
                    copy.found.refs.values().map(|reference| reference.record.clone()).collect();
                let mut wants: Vec<Want> = vec![
                    (Object::Catalogue, Mode::Shared),
                    (Object::Image(digest), Mode::Alone),
                    (Object::Disk(home.id), Mode::Shared),
                ];
                wants.extend(others.iter().map(|other| (Object::Disk(other.id), Mode::Shared)));
                Ok((wants, (digest, home, others, refs, wanted)))
            })?;
        home.check_writable().map_err(within)?;
        let left = others.len() as u32;
        for other in &others {
            self.add_references(other, digest, &refs).map_err(within)?;
            if left < wanted {
                self.change_record(other, digest, |record| record.copies = Some(left))
                    .map_err(within)?;
            }
        }
        self.remove_copy(&home, digest).map_err(within)
    }

    /// How many copies of an image are wanted from now on.
    pub fn want_copies(&self, image: &Name, count: u32) -> Result<ImageStatus> {
        if !(1..=COPIES_MAX).contains(&count) {
            let what = format!("image {image}: from 1 to {COPIES_MAX} copies");
            return Err(Error::new(Kind::Invalid, what));
        }
        let (claimed, (digest, disks)) = self.0.claim(format!("image {image}"), |view| {
            let (digest, found) = view.image(image)?;
            let disks: Vec<Arc<Disk>> =
                found.copies.iter().filter_map(|copy| view.here(copy.disk).cloned()).collect();
            let wants: Vec<Want> =
                vec![(Object::Catalogue, Mode::Shared), (Object::Image(digest), Mode::Alone)];
            Ok((wants, (digest, disks)))
        })?;
        for disk in disks {
            self.change_record(&disk, digest, |record| record.copies = Some(count))
                .map_err(|error| error.within(format!("image {image}")))?;
        }
        drop(claimed);
        self.image_by_digest(digest)
    }

    /// Brings the copies of an image in line: a copy whose disk was away missed what happened. Each gets the
    /// references that others have, loses those of replicas that were removed meanwhile, and all have the
    /// same names and the same wanted number. Whether anything had to be done.
    pub fn align_copies(&self, digest: Digest) -> Result<bool> {
        if !Alignment::of(&self.0.view(), digest).is_some_and(|it| it.is_needed) {
            return Ok(false);
        }
        let (_claimed, (disks, aligned)) = self.0.claim(format!("image {digest}"), |view| {
            let aligned = Alignment::of(view, digest);
            let aligned = aligned.ok_or_else(|| Error::new(Kind::NotFound, "it is gone"))?;
            let copies = view.images.get(&digest).map(|image| &image.copies[..]);
            let copies = copies.unwrap_or_default().iter();
            let disks: Vec<Arc<Disk>> =
                copies.filter_map(|copy| view.here(copy.disk).cloned()).collect();
            let mut wants: Vec<Want> =
                vec![(Object::Catalogue, Mode::Shared), (Object::Image(digest), Mode::Alone)];
            wants.extend(disks.iter().map(|disk| (Object::Disk(disk.id), Mode::Shared)));
            Ok((wants, (disks, aligned)))
        })?;
        for disk in disks {
            self.add_references(&disk, digest, &aligned.refs)?;
            for replica in &aligned.removed {
                drop_reference(&disk, digest, *replica)?;
                let mut view = self.0.view();
                if let Some(copy) = view.copies_mut(digest).find(|copy| copy.disk == disk.id) {
                    copy.found.refs.remove(replica);
                }
            }
            self.change_record(&disk, digest, |record| {
                record.names = aligned.names.clone();
                record.copies = aligned.wanted;
            })?;
        }
        Ok(true)
    }

    /// Writes those of `refs` that the copy lacks or has otherwise, durably.
    fn add_references(&self, disk: &Arc<Disk>, digest: Digest, refs: &[RefRecord]) -> Result<()> {
        let has = |reference: &RefRecord| {
            let mut view = self.0.view();
            let copy = view.copies_mut(digest).find(|copy| copy.disk == disk.id);
            copy.is_some_and(|copy| {
                let known = copy.found.refs.get(&reference.replica);
                known.is_some_and(|known| !known.damaged && known.record.disk == reference.disk)
            })
        };
        for reference in refs.iter().filter(|reference| !has(reference)) {
            let dir = disk.copy(digest)?.ensure(REFS)?;
            record::write(&dir, &ref_file(reference.replica), reference)?;
            let mut view = self.0.view();
            if let Some(copy) = view.copies_mut(digest).find(|copy| copy.disk == disk.id) {
                let known = Reference { record: reference.clone(), damaged: false };
                copy.found.refs.insert(reference.replica, known);
            }
        }
        Ok(())
    }
}

/// What all copies of an image should say.
struct Alignment {
    refs: Vec<RefRecord>,
    /// Replicas whose references are to go: they are not on their disk, which is there, and some copy
    /// knows nothing of them any more.
    removed: Vec<Uuid>,
    names: Vec<Name>,
    wanted: Option<u32>,
    /// Whether any copy says something else.
    is_needed: bool,
}

impl Alignment {
    fn of(view: &View, digest: Digest) -> Option<Alignment> {
        let image = view.images.get(&digest)?;
        let (names, wanted) = (image.names(), image.wanted());
        let (mut refs, mut removed) = (Vec::new(), Vec::new());
        for (id, reference) in image.refs() {
            let known = |copy: &Copy| copy.found.refs.contains_key(&id);
            if view.user_state(id, reference) == UserState::Leaked
                && !image.copies.iter().all(known)
            {
                removed.push(id);
            } else if !reference.damaged {
                let mut record = reference.record.clone();
                // A replica that moved is where it is found.
                if let Some(replica) = view.replicas.get(&id) {
                    record.disk = replica.disk;
                    record.disk_name = view.disk_name(replica.disk)?.clone();
                }
                refs.push(record);
            }
        }
        let is_needed = image.copies.iter().any(|copy| {
            let has = |reference: &RefRecord| {
                let known = copy.found.refs.get(&reference.replica);
                known.is_some_and(|known| !known.damaged && known.record.disk == reference.disk)
            };
            !refs.iter().all(has)
                || removed.iter().any(|id| copy.found.refs.contains_key(id))
                || copy.found.record.names.len() != names.len()
                || copy.found.record.copies != wanted
        });
        Some(Alignment { refs, removed, names, wanted, is_needed })
    }
}
