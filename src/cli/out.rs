//! What commands print: tables for people, JSON for programs, progress while they wait.
//!
//! Results go to standard output, progress and errors to standard error. Nothing that came from
//! outside reaches a terminal unescaped.

use std::{
    io::{self, IsTerminal, Write},
    time::{Duration, Instant, UNIX_EPOCH},
};

use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;

use crate::{
    cli::size,
    control::{
        event::{Event, Progress},
        events::rfc3339,
    },
    error::{Context, Result},
};

/// How often progress is told to a program.
const TOLD_EVERY: Duration = Duration::from_secs(1);

/// For whom results are printed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// People: tables and sentences.
    Human,
    /// Programs: one JSON document.
    Json,
}

/// Prints `value`: as JSON, or by `human`.
pub fn show<T: Serialize>(
    format: Format,
    value: &T,
    human: impl FnOnce(&T) -> String,
) -> Result<()> {
    let text = match format {
        Format::Human => human(value),
        Format::Json => {
            let json = serde_json::to_string_pretty(value).map_err(io::Error::from);
            json.context(|| "telling the result")? + "\n"
        }
    };
    print(&text)
}

/// Prints `text`. That nobody reads it, as behind `| head`, is no failure.
pub fn print(text: &str) -> Result<()> {
    let mut out = io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        other => other.context(|| "writing to standard output"),
    }
}

/// Which side of its column a cell stands on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// Text.
    Left,
    /// Figures.
    Right,
}

/// Rows under a heading, in aligned columns.
pub struct Table {
    sides: Vec<Side>,
    rows: Vec<Vec<String>>,
}

impl Table {
    /// A table of these columns.
    pub fn new(columns: &[(&str, Side)]) -> Table {
        let heading = columns.iter().map(|(title, _)| title.to_string()).collect();
        Table { sides: columns.iter().map(|(_, side)| *side).collect(), rows: vec![heading] }
    }

    /// Adds a row; one cell a column.
    pub fn row(&mut self, cells: impl IntoIterator<Item = String>) {
        self.rows.push(cells.into_iter().map(|cell| plain(&cell)).collect());
    }

    /// The table as text; `nothing` when it has no rows.
    pub fn text(&self, nothing: &str) -> String {
        if self.rows.len() < 2 {
            return format!("{nothing}\n");
        }
        let width = |column: usize| {
            self.rows
                .iter()
                .filter_map(|row| row.get(column))
                .map(|cell| cell.chars().count())
                .max()
        };
        let widths: Vec<_> = (0..self.sides.len()).map(|it| width(it).unwrap_or(0)).collect();
        let mut text = String::new();
        for row in &self.rows {
            let mut line = String::new();
            for ((cell, side), width) in row.iter().zip(&self.sides).zip(&widths) {
                match side {
                    Side::Left => line.push_str(&format!("{cell:<width$}  ")),
                    Side::Right => line.push_str(&format!("{cell:>width$}  ")),
                }
            }
            text.push_str(line.trim_end());
            text.push('\n');
        }
        text
    }
}

/// Pairs of a title and a value, aligned; a value of several lines is indented.
pub fn facts(pairs: &[(&str, String)]) -> String {
    let width = pairs.iter().map(|(title, _)| title.chars().count()).max().unwrap_or(0);
    let mut text = String::new();
    for (title, value) in pairs {
        for (number, line) in value.lines().enumerate() {
            let title = if number == 0 { title } else { &"" };
            text.push_str(format!("{title:<width$}  {}", plain(line)).trim_end());
            text.push('\n');
        }
    }
    text
}

/// `text` without what could steer a terminal.
pub fn plain(text: &str) -> String {
    text.chars()
        .map(|c| if c.is_control() { c.escape_default().to_string() } else { c.into() })
        .collect()
}

/// Seconds since 1970 as a date and time in UTC.
pub fn date(seconds: u64) -> String {
    // A time that no clock tells is not worth a panic.
    let time = UNIX_EPOCH.checked_add(Duration::from_secs(seconds)).unwrap_or(UNIX_EPOCH);
    rfc3339(time).replace('T', " ").rsplitn(2, ':').last().unwrap_or_default().to_owned()
}

/// Shows how far work is: a bar on a terminal, JSON lines otherwise.
pub struct Meter {
    bar: Option<ProgressBar>,
    lines: Lines,
}

/// Progress in lines.
enum Lines {
    /// The last was written then.
    Written(Option<Instant>),
    /// None are wanted.
    Never,
}

impl Meter {
    /// A meter on standard error.
    pub fn new() -> Meter {
        let bar = io::stderr().is_terminal().then(ProgressBar::new_spinner);
        Meter { bar, lines: Lines::Written(None) }
    }

    /// A meter that draws on a terminal, and keeps quiet otherwise.
    pub fn for_people() -> Meter {
        let mut meter = Meter::new();
        meter.lines = Lines::Never;
        meter
    }

    /// Shows `progress`.
    pub fn show(&mut self, progress: Progress) {
        match (&self.bar, &mut self.lines) {
            (Some(bar), _) => draw(bar, &progress),
            (None, Lines::Written(at)) if at.is_none_or(|at| at.elapsed() >= TOLD_EVERY) => {
                *at = Some(Instant::now());
                if let Ok(line) = serde_json::to_string(&Event::<()>::Progress(progress)) {
                    // Progress that nobody reads is no failure.
                    let _ = writeln!(io::stderr(), "{line}");
                }
            }
            (None, _) => {}
        }
    }
}

impl Default for Meter {
    fn default() -> Meter {
        Meter::new()
    }
}

impl Drop for Meter {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

fn draw(bar: &ProgressBar, progress: &Progress) {
    let template = match progress.total_bytes {
        Some(total) => {
            bar.set_length(total);
            "{msg} {wide_bar} {binary_bytes}/{binary_total_bytes} {binary_bytes_per_sec} {eta}"
        }
        None => "{spinner} {msg} {binary_bytes} {binary_bytes_per_sec}",
    };
    if bar.position() == 0
        && let Ok(style) = ProgressStyle::with_template(template)
    {
        bar.set_style(style);
    }
    let source = match progress.source_bytes {
        0 => String::new(),
        bytes => format!(" ({} read)", size::format(bytes)),
    };
    bar.set_message(format!("{}{source}", plain(&progress.phase)));
    bar.set_position(progress.done_bytes);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_are_aligned_and_harmless() {
        let mut table = Table::new(&[("NAME", Side::Left), ("SIZE", Side::Right)]);
        assert_eq!(table.text("no disks"), "no disks\n");
        table.row(["a".to_owned(), "1 GiB".to_owned()]);
        table.row(["longer\u{1b}[31m\n".to_owned(), "12 B".to_owned()]);
        let text = table.text("no disks");
        assert_eq!(
            text,
            "NAME                 SIZE\n\
             a                   1 GiB\n\
             longer\\u{1b}[31m\\n   12 B\n"
        );
        assert_eq!(
            facts(&[("name", "a".into()), ("on", "x\ny".into())]),
            "name  a\non    x\n      y\n"
        );
    }

    #[test]
    fn dates_are_those_of_the_calendar() {
        for (seconds, text) in [
            (0, "1970-01-01 00:00"),
            (951_782_399, "2000-02-28 23:59"),
            (951_782_400, "2000-02-29 00:00"),
            (1_709_251_199, "2024-02-29 23:59"),
            (1_795_353_300, "2026-11-22 13:15"),
            (4_107_542_400, "2100-03-01 00:00"),
        ] {
            assert_eq!(date(seconds), text);
        }
    }
}
