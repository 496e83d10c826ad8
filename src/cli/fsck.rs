//! `underlay fsck`: what a crash, or a disk that was carried about, has left inconsistent.

use clap::Args;

use super::{Outcome, Setting, out};
use crate::{catalog::FsckReport, control::api::FsckRequest, error::Result};

/// Look for what is inconsistent on the disks, and mend it if asked to.
///
/// What belongs to a disk that is not there is never touched. Exit code 1 when something is left
/// to mend.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  underlay fsck\n  underlay fsck --repair --json")]
pub struct Fsck {
    /// Mend what can be mended.
    #[arg(long)]
    repair: bool,
}

impl Fsck {
    pub(super) async fn run(self, setting: &Setting) -> Result<Outcome> {
        let request = FsckRequest { repair: self.repair };
        let report: FsckReport = setting.client()?.post("/v1/fsck", &request).await?;
        setting.show(&report, text)?;
        let left = report.problems.iter().any(|problem| !problem.mended);
        Ok(if left { Outcome::Amiss } else { Outcome::Well })
    }
}

fn text(report: &FsckReport) -> String {
    let mut text = String::new();
    for problem in &report.problems {
        let mark = match (problem.mended, problem.mendable) {
            (true, _) => "mended",
            (false, true) => "to mend",
            (false, false) => "look at",
        };
        text.push_str(&out::plain(&format!(
            "{mark:<7}  {}: {}; {}",
            problem.object, problem.what, problem.remedy
        )));
        text.push('\n');
    }
    let mended = report.problems.iter().filter(|problem| problem.mended).count();
    text.push_str(&match (report.problems.len(), mended) {
        (0, _) => "all is well on ".to_owned(),
        (found, 0) => format!("{found} found on "),
        (found, mended) => format!("{found} found, {mended} mended on "),
    });
    text.push_str(&match report.disks.as_slice() {
        [] => "no disks".to_owned(),
        disks => format!("disks {}", super::join(disks)),
    });
    if !report.missing.is_empty() {
        text.push_str(&format!("; not looked at, not there: {}", super::join(&report.missing)));
    }
    if report.problems.iter().any(|problem| problem.mendable && !problem.mended) {
        text.push_str("; mend with: underlay fsck --repair");
    }
    text + "\n"
}
