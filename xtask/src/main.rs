//! `cargo xtask`: everything of underlay's upkeep that cargo does not do by itself.
//!
//! The rigs test the program as users have it, with real disks, real clients and a real guest; they
//! install what they need, and tell loudly what they had to skip.

mod apt;
mod daemon;
mod guest;
mod image;
mod lab;
mod place;
mod report;
mod setup;
mod subject;
mod tool;

use anyhow::Result;
use clap::{Parser, Subcommand};

use crate::lab::Lab;
use crate::report::Report;
use crate::subject::Against;

/// The chores of the repository.
#[derive(Parser)]
#[command(name = "cargo xtask")]
struct Args {
    #[command(subcommand)]
    chore: Chore,
}

#[derive(Subcommand)]
enum Chore {
    /// Installs what the rigs need (apt-get, where this is Debian and root or sudo -n)
    Setup,
    /// The main job with a real guest: three disks, three replicas, a boot over NBD
    Guest {
        /// What to point the rig at; anything but underlay proves the rig itself
        #[arg(long, value_enum, default_value = "underlay")]
        against: Against,
    },
}

fn main() -> Result<()> {
    let args = Args::parse();
    lab::heed_signals()?;
    let lab = Lab::open()?;
    let mut report = Report::default();
    setup::run(&mut report);
    match args.chore {
        Chore::Setup => {}
        Chore::Guest { against } => guest::run(&lab, against, &mut report),
    }
    drop(lab);
    report.close()
}
