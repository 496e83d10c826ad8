//! Finding what is inconsistent, and mending what can be mended without losing anything.
//!
//! Invariants:
//! - It works alone: whoever changes the catalogue waits, and imports under way are left alone.
//! - What belongs to a disk that isn't there is never touched: a reference to a replica on such a
//!   disk, or on one that the node doesn't know, holds.
//! - Nothing with content is removed but what an interrupted operation left under a staging or
//!   deleting name.
//! - `judge` is pure; `mend` does what it was told and nothing else.

use std::{collections::HashMap, ffi::OsStr, sync::Arc};

use uuid::Uuid;

use super::{
    claims::{Mode, Object},
    disk::Disk,
    moves::{Settlement, may_be_elsewhere, unsettled},
    name::{Digest, Name},
    node::Node,
    record::{self, RefRecord},
    replica::reference_to,
    report::base_missing,
    scan::{self, Contents, Finding, Mend, Spot},
    status::{FsckReport, Problem, UserState},
    view::{Replica, View},
};
use crate::error::{Error, Kind, Result};

/// Whether problems are only told.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Repair {
    /// Told only.
    Report,
    /// Mended, where that is possible.
    Mend,
}

impl Node {
    /// Looks at every disk that is there.
    pub fn fsck(&self, repair: Repair) -> Result<FsckReport> {
        let wants = vec![(Object::Catalogue, Mode::Alone), (Object::Disks, Mode::Alone)];
        let (_claimed, disks) = self.0.claim("the catalogue", |view| {
            let here = view
                .disks
                .iter()
                .filter_map(|slot| slot.here().map(|disk| (slot.known.name.clone(), disk.clone())));
            Ok((wants.clone(), here.collect::<Vec<_>>()))
        })?;
        let mut report = FsckReport { missing: self.0.view().missing(), ..FsckReport::default() };
        let live = |name: &OsStr| self.0.view().live.contains(name);
        let mut findings = Vec::new();
        let mut twice = Twice::default();
        for (name, disk) in &disks {
            match scan::disk(disk, &live) {
                Ok(mut contents) => {
                    findings.append(&mut contents.findings);
                    twice.note(name, &contents);
                    self.0.view().attach(disk.id, contents);
                    report.disks.push(name.clone());
                }
                Err(error) => findings.push(Finding {
                    object: format!("disk {name}"),
                    what: error.to_string(),
                    remedy: "check the disk and its file system".to_owned(),
                    mend: None,
                }),
            }
        }
        findings.extend(twice.findings(&self.0.view()));
        findings.extend(judge(&self.0.view()));
        let mut mended_any = false;
        for finding in findings {
            let mut problem = Problem {
                object: finding.object,
                what: finding.what,
                remedy: finding.remedy,
                mendable: finding.mend.is_some(),
                mended: false,
            };
            if let (Repair::Mend, Some(mend)) = (repair, &finding.mend) {
                match self.apply(&disks, mend) {
                    Ok(()) => problem.mended = true,
                    Err(error) => problem.remedy += &format!(" (tried, and failed: {error})"),
                }
                mended_any |= problem.mended;
            }
            report.problems.push(problem);
        }
        if mended_any {
            for (_, disk) in &disks {
                if let Ok(contents) = scan::disk(disk, &live) {
                    self.0.view().attach(disk.id, contents);
                }
            }
        }
        Ok(report)
    }

    fn apply(&self, disks: &[(Name, Arc<Disk>)], mend: &Mend) -> Result<()> {
        match mend {
            Mend::Settle(settlement) => self.settle(settlement),
            // Somebody has gone on with it meanwhile.
            Mend::Leftover(spot) if self.0.view().live.contains(&spot.name) => Ok(()),
            other => apply(disks, other),
        }
    }
}

/// Ids of replicas, to find those that two disks hold.
#[derive(Default)]
struct Twice(HashMap<Uuid, Vec<Name>>);

impl Twice {
    fn note(&mut self, disk: &Name, contents: &Contents) {
        for replica in &contents.replicas {
            self.0.entry(replica.record.id).or_default().push(disk.clone());
        }
    }

    /// But for those that a move has left: of them `judge_moves` tells.
    fn findings(self, view: &View) -> impl Iterator<Item = Finding> {
        let moving: Vec<Uuid> = unsettled(view).iter().map(Settlement::id).collect();
        let twice =
            self.0.into_iter().filter(move |(id, disks)| disks.len() > 1 && !moving.contains(id));
        twice.map(|(id, disks)| Finding {
            object: format!("replica {id}"),
            what: format!("it is on disks {} and {}", disks[0], disks[1]),
            remedy: "the one of the higher epoch counts; move the other directory away".to_owned(),
            mend: None,
        })
    }
}

/// What is wrong between objects, each of which is sound by itself.
fn judge(view: &View) -> Vec<Finding> {
    let mut findings = Vec::new();
    judge_references(view, &mut findings);
    judge_replicas(view, &mut findings);
    judge_moves(view, &mut findings);
    judge_image_names(view, &mut findings);
    findings
}

/// Moves that were interrupted.
fn judge_moves(view: &View, findings: &mut Vec<Finding>) {
    for settlement in unsettled(view) {
        let id = settlement.id();
        let name = view.replicas.get(&id).map(|found| found.record.name.to_string());
        let (what, remedy) = match settlement {
            Settlement::Finish { .. } => {
                ("it has moved, and its former directory is there", "remove it")
            }
            Settlement::Revert { .. } => {
                ("a move of it was interrupted before it had happened", "take the mark away")
            }
        };
        findings.push(Finding {
            object: format!("replica {}", name.unwrap_or_else(|| id.to_string())),
            what: what.to_owned(),
            remedy: remedy.to_owned(),
            mend: Some(Mend::Settle(settlement)),
        });
    }
    let open: Vec<Uuid> = unsettled(view).iter().map(Settlement::id).collect();
    for (id, found) in view.replicas.iter().filter(|(id, _)| !open.contains(id)) {
        if let Some(why) = may_be_elsewhere(view, found) {
            findings.push(Finding {
                object: format!("replica {} ({id})", found.record.name),
                what: why,
                remedy: "bring that disk back, or settle it".to_owned(),
                mend: None,
            });
        }
    }
}

/// References whose replica isn't there, or that can't be read.
fn judge_references(view: &View, findings: &mut Vec<Finding>) {
    for (digest, image) in &view.images {
        for copy in &image.copies {
            for (id, reference) in &copy.found.refs {
                let RefRecord { name, disk, disk_name, .. } = &reference.record;
                let object = format!("reference of replica {name} to image {digest}");
                let spot = Spot::reference(copy.disk, *digest, *id);
                match view.user_state(*id, reference) {
                    UserState::Leaked => findings.push(Finding {
                        object,
                        what: format!("disk {disk_name} is there, and has no such replica"),
                        remedy: "remove it".to_owned(),
                        mend: Some(Mend::DropReference(spot)),
                    }),
                    UserState::Present if is_flat(view, *id) => findings.push(Finding {
                        object,
                        what: "the replica stands on no image any more".to_owned(),
                        remedy: "remove it".to_owned(),
                        mend: Some(Mend::DropReference(spot)),
                    }),
                    UserState::Present if stands_elsewhere(view, *id, *digest) => {
                        findings.push(Finding {
                            object,
                            what: "the replica says that it stands on another image".to_owned(),
                            remedy: "bring the one record back that is wrong; both images are held"
                                .to_owned(),
                            mend: None,
                        });
                    }
                    UserState::Present if reference.damaged => {
                        let replica = view.replicas.get(id);
                        let record = replica.and_then(|replica| reference_to(view, replica));
                        findings.push(Finding {
                            object,
                            what: "it can't be read, and its replica is there".to_owned(),
                            remedy: "write it anew".to_owned(),
                            mend: record.map(|r| Mend::AddReference(spot, Box::new(r))),
                        });
                    }
                    UserState::Away if !reference.damaged && view.slot(*disk).is_none() => {
                        findings.push(Finding {
                            object,
                            what: format!("this node doesn't know disk {disk_name}, where it is"),
                            remedy: format!(
                                "add that disk, or give the replica up with `underlay replica rm \
                                 {id}`"
                            ),
                            mend: None,
                        });
                    }
                    UserState::Present | UserState::Away => {}
                }
            }
        }
    }
}

/// Replicas without a reference or a base, or hidden by another's name.
fn judge_replicas(view: &View, findings: &mut Vec<Finding>) {
    for (id, replica) in &view.replicas {
        let record = &replica.record;
        let object = format!("replica {}", record.name);
        let image = record.image.as_ref().map(|base| (base, view.images.get(&base.digest)));
        match image {
            None => {}
            Some((base, None)) => findings.push(Finding {
                object: object.clone(),
                what: base_missing(view, base),
                remedy: "nothing is lost: it is ready again once the image is there".to_owned(),
                mend: None,
            }),
            Some((base, Some(image))) if !image.refs().contains_key(id) => {
                let copy = image.ready().or(image.copies.first());
                let reference = reference_to(view, replica);
                let mend = copy.zip(reference).map(|(copy, reference)| {
                    let spot = Spot::reference(copy.disk, base.digest, *id);
                    Mend::AddReference(spot, Box::new(reference))
                });
                findings.push(Finding {
                    object: object.clone(),
                    what: format!("its image {} has no reference of it", base.name),
                    remedy: "write the reference".to_owned(),
                    mend,
                });
            }
            Some((_, Some(_))) => {}
        }
        if view.replica_named(&record.name) != Some(*id) {
            findings.push(Finding {
                object,
                what: "an older replica has the same name".to_owned(),
                remedy: format!("it is reached as {id}; remove one of the two"),
                mend: None,
            });
        }
    }
}

/// Names that several images claim.
fn judge_image_names(view: &View, findings: &mut Vec<Finding>) {
    for (digest, image) in &view.images {
        for name in image.names() {
            if let Some(holder) = view.image_named(&name)
                && holder != *digest
            {
                findings.push(Finding {
                    object: format!("image {digest}"),
                    what: format!("its name {name} is also that of image {holder}, which is older"),
                    remedy: format!("it is reached as {digest}; remove one of the two"),
                    mend: None,
                });
            }
        }
    }
}

fn stands_elsewhere(view: &View, id: Uuid, digest: Digest) -> bool {
    view.replicas.get(&id).is_some_and(|replica| replica.record.digest() != Some(digest))
}

/// Whether the replica surely needs no image: it may be elsewhere, and need one there.
fn is_flat(view: &View, id: Uuid) -> bool {
    let flat = |replica: &Replica| replica.record.image.is_none();
    let settled = |replica: &Replica| replica.record.moving_to.is_none();
    view.replicas.get(&id).is_some_and(|replica| flat(replica) && settled(replica))
}

fn apply(disks: &[(Name, Arc<Disk>)], mend: &Mend) -> Result<()> {
    let (Mend::Leftover(spot)
    | Mend::Mode(spot, _)
    | Mend::DropReference(spot)
    | Mend::AddReference(spot, _)) = mend
    else {
        return Err(Error::new(Kind::Invalid, "a move is not settled in one place"));
    };
    let disk = disks.iter().find(|(_, disk)| disk.id == spot.disk);
    let (_, disk) = disk.ok_or_else(|| Error::new(Kind::Unavailable, "its disk is gone"))?;
    let name = &spot.name;
    match mend {
        Mend::Leftover(_) => disk.walk(&spot.dir)?.remove_tree(name),
        Mend::Mode(_, mode) => disk.walk(&spot.dir)?.set_mode(name, *mode),
        Mend::DropReference(_) => {
            let refs = disk.walk(&spot.dir)?;
            refs.unlink_if_there(name)?;
            refs.sync()
        }
        Mend::AddReference(_, record) => {
            let (last, parents) = spot
                .dir
                .split_last()
                .ok_or_else(|| Error::new(Kind::Invalid, "a reference has a directory"))?;
            let refs = disk.walk(parents)?.ensure(last)?;
            let name = name.to_str().ok_or_else(|| Error::new(Kind::Invalid, "a name"))?;
            record::write(&refs, name, record.as_ref())
        }
        Mend::Settle(_) => Ok(()),
    }
}
