//! `underlay events`: what has happened to disks, images and replicas.

use std::{io::Write, time::Duration};

use clap::Args;

use super::{
    Outcome, Setting, out,
    out::{Format, Side, Table},
};
use crate::{
    control::{
        client::escape,
        events::{Entry, Gap, Heard, Mark, Missed, Page},
    },
    error::{Context, Error, Kind, Result},
};

/// How often a daemon that has gone is looked for.
const AGAIN: Duration = Duration::from_secs(1);

/// Show what has happened to disks, images and replicas since the daemon's start.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
    underlay events\n  \
    underlay events --follow\n  \
    underlay events --since 120 --json")]
pub struct Events {
    /// Go on with what happens from now on, over restarts of the daemon too; a line each.
    #[arg(long, short)]
    follow: bool,
    /// Only what happened after the event of this number.
    #[arg(long, value_name = "NUMBER")]
    since: Option<u64>,
}

impl Events {
    pub(super) async fn run(self, setting: &Setting) -> Result<Outcome> {
        let mark = Mark { seq: self.since, boot: None };
        if self.follow {
            return follow(mark, setting).await;
        }
        let page: Page = setting.client()?.get(&path(mark, "")).await?;
        setting.show(&page, table)?;
        Ok(Outcome::Well)
    }
}

/// Prints what happens, until nobody reads it.
async fn follow(mut mark: Mark, setting: &Setting) -> Result<Outcome> {
    let client = setting.client()?;
    let (mut reached, mut read) = (false, true);
    loop {
        let asked = path(mark, "follow=true");
        let hear = |heard: Heard| {
            reached = true;
            if let Heard::Event(entry) = &heard {
                mark = Mark { seq: Some(entry.seq), boot: Some(entry.boot) };
            }
            read = say(&heard, setting.format)?;
            Ok(read)
        };
        match client.follow(&asked, hear).await {
            Ok(()) if !read => return Ok(Outcome::Well),
            // It was stopped.
            Ok(()) => reached = true,
            Err(error) if error.kind() == Kind::Unavailable && reached => {}
            Err(error) => return Err(error),
        }
        tokio::time::sleep(AGAIN).await;
    }
}

fn path(mark: Mark, more: &str) -> String {
    let seq = mark.seq.map(|seq| format!("since={seq}"));
    let boot = mark.boot.map(|boot| format!("boot={}", escape(&boot.to_string())));
    let more = (!more.is_empty()).then(|| more.to_owned());
    let query: Vec<String> = seq.into_iter().chain(boot).chain(more).collect();
    format!("/v1/events?{}", query.join("&"))
}

/// Prints a line; whether somebody reads it.
fn say(heard: &Heard, format: Format) -> Result<bool> {
    let line = match (format, heard) {
        (Format::Human, Heard::Event(entry)) => line(entry),
        (Format::Human, Heard::Gap(gap)) => format!("--- {}\n", missed(gap)),
        (Format::Json, heard) => {
            let json = serde_json::to_string(heard).map_err(std::io::Error::from);
            json.map_err(|error| Error::io("an event", error))? + "\n"
        }
    };
    let mut out = std::io::stdout().lock();
    match out.write_all(line.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Ok(false),
        other => other.context(|| "writing to standard output").map(|()| true),
    }
}

fn missed(gap: &Gap) -> String {
    match (gap.reason, gap.lost) {
        (Missed::Overrun, Some(lost)) => format!("{lost} events are not known any more"),
        (Missed::Overrun, None) => "some events are not known any more".to_owned(),
        (Missed::Restarted, _) => "the daemon was started again: numbers begin anew".to_owned(),
    }
}

fn line(entry: &Entry) -> String {
    format!(
        "{} {} {:7} {}  {}: {}\n",
        entry.seq,
        out::plain(&entry.time),
        entry.severity.name(),
        entry.kind.word(),
        out::plain(&entry.object),
        out::plain(&entry.message)
    )
}

fn table(page: &Page) -> String {
    let mut table = Table::new(&[
        ("NUMBER", Side::Right),
        ("TIME", Side::Left),
        ("SEVERITY", Side::Left),
        ("KIND", Side::Left),
        ("OBJECT", Side::Left),
        ("MESSAGE", Side::Left),
    ]);
    for entry in &page.events {
        table.row([
            entry.seq.to_string(),
            entry.time.clone(),
            entry.severity.name().to_owned(),
            entry.kind.word().to_owned(),
            entry.object.clone(),
            entry.message.clone(),
        ]);
    }
    let gap = page.gap.as_ref().map(|gap| format!("--- {}\n", missed(gap)));
    gap.unwrap_or_default() + &table.text("nothing has happened")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_heard_is_asked_for_no_more() {
        assert_eq!(path(Mark::default(), ""), "/v1/events?");
        let boot = uuid::Uuid::nil();
        let mark = Mark { seq: Some(7), boot: Some(boot) };
        assert_eq!(
            path(mark, "follow=true"),
            format!("/v1/events?since=7&boot={boot}&follow=true")
        );
    }
}
