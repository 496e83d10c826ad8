//! The command line: a client of the control API, and the service itself.
//!
//! Exit codes: 0 done, 1 failed, 2 bad usage. An error is one line on standard error that begins
//! with `underlay:`, or with `--json` an object `{"error":{"kind":…,"message":…}}` there.

pub mod out;
pub mod size;

mod attach;
mod cache;
mod demo;
mod disk;
mod doctor;
mod events;
mod export;
mod fsck;
mod heatmap;
mod image;
mod profile;
mod replica;
mod serve;
mod status;
mod top;

use std::{ffi::OsString, io::Write, path::PathBuf, process::ExitCode};

use clap::{Parser, Subcommand, error::ErrorKind};
use out::Format;

use crate::{
    catalog::Name,
    control::{api::Removed, client::Client, event::Refusal, paths::Paths},
    error::{Context, Error, Kind, Result},
    io::flusher,
};

/// Underlay: one on-disk copy of each backing image, beneath every replica of a node.
#[derive(Debug, Parser)]
#[command(
    name = "underlay",
    version,
    disable_help_subcommand = true,
    after_help = "Example, from nothing to a VM that boots:\n  \
        underlay serve &\n  \
        underlay disk add /mnt/nvme0 --name a\n  \
        underlay image import debian-12.qcow2 --name debian-12\n  \
        underlay replica create vm1 --image debian-12 --disk a --size 20G\n  \
        qemu-system-x86_64 -m 1G -drive \
        'file=nbd+unix:///replica/vm1?socket=/run/underlay/nbd.sock,format=raw,if=virtio'\n\n\
        Try `underlay demo` to see all of it at once."
)]
struct Cli {
    /// The daemon's control socket.
    #[arg(long, global = true, env = "UNDERLAY_SOCKET", value_name = "PATH")]
    socket: Option<PathBuf>,

    /// Print JSON, for programs.
    #[arg(long, global = true)]
    json: bool,

    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Serve(serve::Serve),
    #[command(subcommand)]
    Disk(disk::Disk),
    #[command(subcommand)]
    Image(image::Image),
    #[command(subcommand)]
    Replica(replica::Replica),
    Attach(attach::Attach),
    Detach(attach::Detach),
    Status(status::Status),
    Top(top::Top),
    #[command(subcommand)]
    Cache(cache::Cache),
    #[command(subcommand)]
    Profile(profile::Profile),
    Heatmap(heatmap::Heatmap),
    Events(events::Events),
    Fsck(fsck::Fsck),
    Doctor(doctor::Doctor),
    Demo(demo::Demo),
}

/// How a command that could do its work ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Outcome {
    /// All is well.
    Well,
    /// It found what it looks for, and that is bad: exit code 1, and no error besides the report.
    Amiss,
}

/// What every command is given.
struct Setting {
    format: Format,
    socket: Option<PathBuf>,
}

impl Setting {
    fn client(&self) -> Result<Client> {
        match &self.socket {
            Some(socket) => Ok(Client::new(socket)),
            None => Ok(Client::new(Paths::of_this_user()?.socket)),
        }
    }

    fn show<T: serde::Serialize>(&self, value: &T, human: impl FnOnce(&T) -> String) -> Result<()> {
        out::show(self.format, value, human)
    }
}

/// Runs the program with these arguments, the first of which is its name.
pub fn run(arguments: impl IntoIterator<Item = OsString>) -> ExitCode {
    let arguments: Vec<OsString> = arguments.into_iter().collect();
    let cli = match Cli::try_parse_from(&arguments) {
        Ok(cli) => cli,
        Err(error) => return usage(&error, &arguments),
    };
    let format = if cli.json { Format::Json } else { Format::Human };
    match dispatch(cli.command, Setting { format, socket: cli.socket }) {
        Ok(Outcome::Well) => ExitCode::SUCCESS,
        Ok(Outcome::Amiss) => ExitCode::from(1),
        Err(error) => {
            complain(format, &error);
            ExitCode::from(1)
        }
    }
}

fn dispatch(command: Command, setting: Setting) -> Result<Outcome> {
    if let Command::Serve(_) = &command {
        // Before there are threads. Without the privilege the kernel does not allow it, nor does it
        // attach devices of its own to such a daemon.
        let _: std::io::Result<()> = flusher::protect();
    }
    let runtime = match &command {
        Command::Serve(_) | Command::Demo(_) => tokio::runtime::Builder::new_multi_thread(),
        _ => tokio::runtime::Builder::new_current_thread(),
    }
    .enable_all()
    .build()
    .context(|| "starting")?;
    let outcome = runtime.block_on(async {
        match command {
            Command::Serve(command) => command.run(&setting).await,
            Command::Disk(command) => command.run(&setting).await,
            Command::Image(command) => command.run(&setting).await,
            Command::Replica(command) => command.run(&setting).await,
            Command::Attach(command) => command.run(&setting).await,
            Command::Detach(command) => command.run(&setting).await,
            Command::Status(command) => command.run(&setting).await,
            Command::Top(command) => command.run(&setting).await,
            Command::Cache(command) => command.run(&setting).await,
            Command::Profile(command) => command.run(&setting).await,
            Command::Heatmap(command) => command.run(&setting).await,
            Command::Events(command) => command.run(&setting).await,
            Command::Fsck(command) => command.run(&setting).await,
            Command::Doctor(command) => command.run(&setting).await,
            Command::Demo(command) => command.run(&setting).await,
        }
    });
    // A thread that still waits for standard input must not hold the program up.
    runtime.shutdown_background();
    outcome
}

/// Says what is wrong with the arguments; or prints the help that was asked for.
fn usage(error: &clap::Error, arguments: &[OsString]) -> ExitCode {
    match error.kind() {
        ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => {
            // As with any output: nobody has to read it.
            let _ = out::print(&error.render().to_string());
            return ExitCode::SUCCESS;
        }
        ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand => {
            let _ = write!(std::io::stderr(), "{}", error.render());
            return ExitCode::from(2);
        }
        _ => {}
    }
    // clap tells in paragraphs: the first is the complaint, the usage and a hint at --help follow.
    let told = error.render().to_string();
    let told = told.strip_prefix("error: ").unwrap_or(&told);
    let complaint = told.split("\n\nUsage:").next().unwrap_or(told);
    let complaint = complaint.split("\n\nFor more information").next().unwrap_or(complaint);
    let words = complaint.split_whitespace().filter(|word| *word != "tip:");
    let words: Vec<String> = words.map(size::shorten).collect();
    let message = format!("{}; see --help", words.join(" "));
    let json = arguments.iter().any(|argument| argument == "--json");
    let format = if json { Format::Json } else { Format::Human };
    complain(format, &Error::new(Kind::Invalid, message));
    ExitCode::from(2)
}

fn complain(format: Format, error: &Error) {
    let line = match format {
        Format::Human => format!("underlay: {}", out::plain(&error.to_string())),
        Format::Json => serde_json::to_string(&Refusal { error: error.into() }).unwrap_or_default(),
    };
    // There is nowhere left to complain about a standard error that is closed.
    let _ = writeln!(std::io::stderr(), "{line}");
}

/// A name from the command line, for clap.
fn name(text: &str) -> Result<Name> {
    text.parse()
}

/// What remains to be said of something that was removed.
fn removed(what: &str, removed: &Removed) -> String {
    match &removed.note {
        Some(note) => format!("{what} {} is removed; {}\n", removed.removed, out::plain(note)),
        None => format!("{what} {} is removed\n", removed.removed),
    }
}

/// Names in a row.
fn join(names: &[impl ToString]) -> String {
    names.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}

/// A size from the command line, for clap.
fn bytes(text: &str) -> Result<u64> {
    size::parse(text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn every_command_shows_an_example() {
        fn check(command: &clap::Command, path: &str) {
            let path = format!("{path} {}", command.get_name());
            assert!(command.get_about().is_some(), "{path} says what it does");
            let after = command.get_after_help().map(ToString::to_string).unwrap_or_default();
            if command.get_subcommands().next().is_none() {
                assert!(
                    after.contains("Example") && after.contains(path.trim()),
                    "{path}: {after}"
                );
            }
            command.get_subcommands().for_each(|it| check(it, path.trim()));
        }
        let command = Cli::command();
        command.clone().debug_assert();
        check(&command, "");
    }

    #[test]
    fn the_commands_are_those_that_were_promised() {
        for line in [
            "serve",
            "serve --config /c --state /s --socket /a --nbd-socket /b --metrics 127.0.0.1:1",
            "disk add /mnt/a",
            "disk add /mnt/a --name a --pool --tier nvme",
            "disk list",
            "disk inspect a --json",
            "disk remove a",
            "image import x.qcow2 --name i --disk a --format qcow2 --sha256 \
             e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
            "image import - --name i",
            "image list",
            "image inspect i",
            "image verify i",
            "image rm i",
            "replica create r --image i --disk a --size 10G",
            "--json replica list",
            "replica inspect r",
            "replica resize r 20G",
            "replica rm r",
            "status",
            "fsck --repair",
            "doctor",
            "demo",
            "demo image.qcow2 --keep",
        ] {
            let parsed = Cli::try_parse_from(format!("underlay {line}").split_whitespace());
            assert!(parsed.is_ok(), "{line}: {parsed:?}");
        }
        for line in [
            "disk add /mnt/a --name a/b",
            "disk add /mnt/a --tier tape",
            "replica create r --image i --disk a --size 10bananas",
            "replica create r --image i",
            "image import x",
            "status --unknown",
            "nonsense",
        ] {
            assert!(Cli::try_parse_from(format!("underlay {line}").split(' ')).is_err(), "{line}");
        }
    }
}
