//! What is done to a replica while guests use it: it moves to other files, or copies up its image.
//!
//! The catalogue is one sector of a file: whichever number it holds after a crash says where the
//! replica is. Writing and syncing it stands for the rename that is a move's commit point.

use std::sync::Arc;

use super::{
    Mutant,
    guest::Footing,
    node::{Catalogue, ID},
};
use crate::{
    cow::{Gate, Overlay, Relocation, tail::Place},
    error::Result,
    io::{
        Buf, Io,
        sim::{Sim, SimFile},
    },
    units::SECTOR,
};

/// Something to be done, once, between two crashes.
#[derive(Clone, Copy, Debug)]
pub(super) enum Errand {
    /// Move to these files.
    Move { data: SimFile, map: SimFile, then: Catalogue },
    /// Copy up the image.
    Flatten { then: Catalogue },
}

/// Whoever runs an errand.
pub(super) struct Runner<'a> {
    pub(super) sim: &'a Sim,
    pub(super) gate: &'a Gate<Footing>,
    pub(super) tail: Option<Place>,
    pub(super) catalogue: SimFile,
    pub(super) mutant: Option<Mutant>,
    /// How many steps the copier lets pass before it thinks that little is left.
    pub(super) patience: usize,
}

impl Runner<'_> {
    /// Does the errand. An error leaves the replica where it was, unless it is poisoned.
    pub(super) async fn run(&self, errand: Errand) -> Result<()> {
        match errand {
            Errand::Move { data, map, then } => self.relocate(data, map, then).await,
            Errand::Flatten { then } => self.flatten(then).await,
        }
    }

    async fn relocate(&self, data: SimFile, map: SimFile, then: Catalogue) -> Result<()> {
        let from = self.gate.get();
        let to = Arc::new(Overlay::open(self.sim, data, map, ID, None).await?);
        let moving = Relocation::begin(from.overlay.clone(), to.clone())?;
        for step in 0..self.patience {
            if moving.left() == 0 {
                break;
            }
            moving.step(self.sim).await?;
            if step % 3 == 2 {
                moving.settle(self.sim).await?;
            }
        }
        let footing = Footing { overlay: to.clone(), image: from.image.clone() };
        if self.mutant == Some(Mutant::OpenGate) {
            moving.finish(self.sim).await?;
            self.write(then, &from).await?;
            to.keep_tail(self.tail.clone()).await;
            self.gate.close().await.replace(footing);
            return Ok(());
        }
        let closed = self.gate.close().await;
        if self.mutant == Some(Mutant::EarlySwitch) {
            self.write(then, &from).await?;
            moving.finish(self.sim).await?;
        } else {
            moving.finish(self.sim).await?;
            self.write(then, &from).await?;
        }
        to.keep_tail(self.tail.clone()).await;
        closed.replace(footing);
        Ok(())
    }

    async fn flatten(&self, then: Catalogue) -> Result<()> {
        let mut next = 0;
        loop {
            let inside = self.gate.enter().await;
            let step = inside.overlay.flatten_step(self.sim, &inside.image, next).await?;
            drop(inside);
            if step.next == next {
                break;
            }
            next = step.next;
        }
        let footing = self.gate.get();
        footing.overlay.flush(self.sim).await?;
        self.write(then, &footing).await?;
        let image = footing.image.gone();
        self.gate.close().await.replace(Footing { image, ..footing });
        Ok(())
    }

    /// The commit point. Should it fail, nobody knows on which side of it the disk is.
    async fn write(&self, then: Catalogue, footing: &Footing) -> Result<()> {
        let mut sector = [0; SECTOR as usize];
        sector[..2].copy_from_slice(&[then.place, then.flat]);
        let written = async {
            self.sim.write(&self.catalogue, Buf::from_bytes(&sector), 0).await?;
            self.sim.sync(&self.catalogue).await
        };
        written.await.map_err(|error| {
            footing.overlay.poison("nobody knows where the replica is");
            footing.overlay.failed("writing the catalogue", error)
        })
    }
}
