//! `underlay-agent`: the probes' user space as a program. `underlay serve` starts it; by hand it
//! watches disks and tells whether probes can run here.

mod watch;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};
use underlay_agent::follow::Follower;
use underlay_agent::probes::Probes;
use underlay_agent::serve::{Signals, Until};
use underlay_agent::{capabilities, check, serve};

/// Follows each disk read from submission to completion, in the kernel.
///
/// Needs CAP_BPF and CAP_PERFMON, and a kernel that describes its types (BTF). Every other privilege is
/// given up before the first report.
#[derive(Parser)]
#[command(name = "underlay-agent", version, args_conflicts_with_subcommands = true)]
struct Args {
    /// The daemon's control socket: watch what it says, report to it, once a second
    #[arg(long, env = "UNDERLAY_SOCKET", value_name = "PATH")]
    socket: Option<PathBuf>,
    /// How many disks can be watched
    #[arg(long, default_value_t = 16, value_parser = clap::value_parser!(u32).range(1..=64))]
    slots: u32,
    /// Keep account of what the programs cost (needs CAP_SYS_ADMIN at the start)
    #[arg(long)]
    account: bool,
    /// End when standard input does
    #[arg(long)]
    until_end_of_input: bool,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Subcommand)]
enum Command {
    /// Watch disks without a daemon: the latency of reads and writes, each second
    Watch(watch::Options),
    /// Tell whether probes can run here, and if not, why; exit code 1 if not
    Check {
        /// One JSON document
        #[arg(long)]
        json: bool,
    },
}

fn main() -> ExitCode {
    let args = Args::parse();
    match run(&args) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("underlay-agent: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: &Args) -> Result<ExitCode> {
    match (&args.command, &args.socket) {
        (Some(Command::Check { json }), _) => return found(*json, args.slots),
        (Some(Command::Watch(options)), _) => watch::run(options)?,
        (None, Some(socket)) => {
            let until = if args.until_end_of_input { Until::EndOfInput } else { Until::Signal };
            let signals = Signals::take(until)?;
            let mut probes = Probes::load(args.slots)?;
            if args.account {
                probes.account()?;
            }
            let follower = Follower::new(probes)?;
            capabilities::give_up()?;
            serve::run(follower, socket, &signals)?;
        }
        (None, None) => anyhow::bail!("say --socket PATH, or watch, or check; --help tells more"),
    }
    Ok(ExitCode::SUCCESS)
}

fn found(json: bool, slots: u32) -> Result<ExitCode> {
    let findings = check::check(slots)?;
    if json {
        println!("{}", serde_json::to_string(&findings)?);
    } else if findings.works {
        println!("probes work here; they take {} KiB of kernel memory", findings.memory >> 10);
    } else {
        println!("{}", findings.problem.as_deref().unwrap_or("probes do not work here"));
    }
    Ok(if findings.works { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
