//! `cargo xtask`: everything of underlay's upkeep that cargo does not do by itself.
//!
//! The rigs test the program as users have it, with real disks, real clients and a real guest; they
//! install what they need, and tell loudly what they had to skip.

mod apt;
mod clients;
mod daemon;
mod guest;
mod image;
mod kill;
mod lab;
mod nbd;
mod pattern;
mod place;
mod report;
mod setup;
mod subject;
mod tool;

use std::process::ExitCode;

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
    /// Outside clients against a reference file: qemu's, libnbd's, fio, a kernel file system
    Clients {
        /// What to point the rig at; anything but underlay proves the rig itself
        #[arg(long, value_enum, default_value = "underlay")]
        against: Against,
        /// The seed of what is written
        #[arg(long, default_value_t = 1)]
        seed: u64,
    },
    /// kill -9 in the midst of writes, ten times in a row
    Kill {
        /// What to point the rig at; anything but underlay proves the rig itself
        #[arg(long, value_enum, default_value = "underlay")]
        against: Against,
        /// The seed of what is written and when it is killed
        #[arg(long, default_value_t = 1)]
        seed: u64,
    },
}

fn main() -> ExitCode {
    match run(Args::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("xtask: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: Args) -> Result<()> {
    lab::heed_signals()?;
    let lab = Lab::open()?;
    let mut report = Report::default();
    setup::run(&mut report);
    match args.chore {
        Chore::Setup => {}
        Chore::Guest { against } => guest::run(&lab, against, &mut report),
        Chore::Clients { against, seed } => clients::run(&lab, against, seed, &mut report),
        Chore::Kill { against, seed } => kill::run(&lab, against, seed, &mut report),
    }
    drop(lab);
    report.close()
}
