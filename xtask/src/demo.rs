//! The commands that a newcomer meets first: `demo`, `doctor`, and what a missing daemon says.
//!
//! Invariants checked:
//! - `demo` does the main job by itself, with an image of its own and with one that is handed to it,
//!   and leaves nothing behind;
//! - `doctor` looks at the machine without a daemon, and its JSON is JSON;
//! - a command without a daemon fails with exit code 1 and says how to start one; a wrong one with 2.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Result, bail, ensure};

use crate::lab::Lab;
use crate::place::Profile;
use crate::report::Report;
use crate::subject::text;
use crate::tool::{Outcome, json, tool};
use crate::{image, setup};

/// How long a demo may take on a busy machine.
const DEMO: Duration = Duration::from_secs(180);

/// Runs the rig.
pub fn run(lab: &Lab, report: &mut Report) {
    let stage = match Stage::new(lab) {
        Ok(stage) => stage,
        Err(error) => return report.broken("demo", &error),
    };
    report.check("demo: by itself", || stage.demo(None));
    match setup::need(&["qemu-img"]).and_then(|()| image::debian()) {
        Err(error) => report.skip("demo: with a Debian image", &format!("{error:#}")),
        Ok(image) => {
            report.check("demo: with a Debian image", || stage.demo(Some(&image)));
        }
    }
    report.check("demo: doctor", || {
        let human = stage.ask(&["doctor"])?;
        ensure!(human.code <= 1 && human.stdout.contains("io_uring"), "doctor: {}", human.said());
        json(&stage.ask(&["doctor", "--json"])?.stdout)?;
        Ok(String::new())
    });
    report.check("demo: without a daemon, and without sense", || {
        let alone = stage.ask(&["status"])?;
        ensure!(alone.code == 1 && alone.stderr.starts_with("underlay: "), "{}", alone.said());
        ensure!(alone.stderr.contains("underlay serve"), "no word of serve: {}", alone.stderr);
        let refusal = json(&stage.ask(&["status", "--json"])?.stderr)?;
        ensure!(refusal["error"]["kind"] == "unavailable", "{refusal}");
        for wrong in [&["replica"][..], &["replica", "create"], &["disk", "add"], &["nonsense"]] {
            let outcome = stage.ask(wrong)?;
            ensure!(outcome.code == 2, "underlay {wrong:?}: code {}, not 2", outcome.code);
        }
        Ok(String::new())
    });
}

/// A directory for temporary files that must be empty again afterwards.
struct Stage {
    program: PathBuf,
    temporary: PathBuf,
    socket: PathBuf,
}

impl Stage {
    fn new(lab: &Lab) -> Result<Stage> {
        let program = Profile::Debug.underlay();
        if !program.exists() {
            bail!("{} is not built", program.display());
        }
        // Beside the sockets: the demo's own sockets lie in its temporary directory.
        let temporary = lab.socket("demo");
        fs::create_dir_all(&temporary)?;
        Ok(Stage { program, temporary, socket: lab.socket("nobody") })
    }

    fn ask(&self, args: &[&str]) -> Result<Outcome> {
        tool(&self.program, args)
            .env("TMPDIR", &self.temporary)
            .env("UNDERLAY_SOCKET", &self.socket)
            .limit(DEMO)
            .outcome()
    }

    fn demo(&self, image: Option<&Path>) -> Result<String> {
        let mut args = vec!["demo"];
        if let Some(image) = image {
            args.push(text(image)?);
        }
        let outcome = self.ask(&args)?;
        ensure!(outcome.code == 0, "exit code {}: {}", outcome.code, outcome.said());
        for word in ["replica vm3", "isolated", "unchanged", "stored"] {
            ensure!(
                outcome.stdout.contains(word),
                "it says nothing of {word:?}: {}",
                outcome.said()
            );
        }
        let left: Vec<_> = fs::read_dir(&self.temporary)?.flatten().collect();
        ensure!(left.is_empty(), "it left {left:?}");
        Ok(format!("{:.1} s", outcome.took.as_secs_f64()))
    }
}
