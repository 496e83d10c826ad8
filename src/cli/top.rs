//! `underlay top`: what happens on the node right now.

use std::{
    io::{self, IsTerminal},
    time::Duration,
};

use clap::Args;
use ratatui::{
    DefaultTerminal, Frame,
    crossterm::event::{self, Event, KeyCode, KeyEventKind, KeyModifiers},
    layout::{Constraint, Layout},
    style::{Color, Style, Stylize},
    text::Line,
    widgets::{Block, Cell, Row, Table},
};

use super::{Outcome, Setting, out, size};
use crate::{
    control::{
        api::{Activity, CacheView, DiskActivity, HotChunk, Origin, SignalView},
        service::blocking,
    },
    error::{Context, Error, Kind, Result},
};

/// How often it is drawn anew.
const BEAT: Duration = Duration::from_secs(1);

/// Watch the disks, their latencies, what is read most, and what is promoted. `q` ends it.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  underlay top\n  underlay top --once\n  underlay top --json")]
pub struct Top {
    /// Print it once and end, also where there is no terminal.
    #[arg(long)]
    once: bool,
}

impl Top {
    pub(super) async fn run(self, setting: &Setting) -> Result<Outcome> {
        let client = setting.client()?;
        let mut activity: Activity = client.get("/v1/activity").await?;
        if self.once || setting.format == out::Format::Json {
            setting.show(&activity, text)?;
            return Ok(Outcome::Well);
        }
        if !io::stdout().is_terminal() {
            let what = "there is no terminal to draw on; use --once or --json";
            return Err(Error::new(Kind::Invalid, what));
        }
        let mut terminal = ratatui::try_init().context(|| "preparing the terminal")?;
        let ended = async {
            loop {
                draw(&mut terminal, &activity)?;
                if blocking(|| wait_for_quit(BEAT)).await? {
                    return Ok(());
                }
                activity = client.get("/v1/activity").await?;
            }
        }
        .await;
        ratatui::restore();
        ended.map(|()| Outcome::Well)
    }
}

/// Whether somebody asks to end within `limit`; a resized terminal ends the wait.
fn wait_for_quit(limit: Duration) -> Result<bool> {
    let reading = || "reading the terminal";
    if !event::poll(limit).context(reading)? {
        return Ok(false);
    }
    let Event::Key(key) = event::read().context(reading)? else { return Ok(false) };
    let interrupt = key.modifiers.contains(KeyModifiers::CONTROL) && key.code == KeyCode::Char('c');
    let quit = matches!(key.code, KeyCode::Char('q') | KeyCode::Esc) || interrupt;
    Ok(quit && key.kind == KeyEventKind::Press)
}

fn draw(terminal: &mut DefaultTerminal, activity: &Activity) -> Result<()> {
    terminal.draw(|frame| show(frame, activity)).context(|| "drawing")?;
    Ok(())
}

/// The figures in rows of cells, which both the terminal and `--once` show.
struct Part {
    title: &'static str,
    heading: Vec<&'static str>,
    rows: Vec<Vec<String>>,
}

fn parts(activity: &Activity) -> [Part; 3] {
    [
        Part {
            title: "disks",
            heading: vec![
                "DISK",
                "TIER",
                "READS/S",
                "MEAN",
                "P99",
                "X PEERS",
                "OWN/FOREIGN",
                "QUEUE",
                "OLDEST",
            ],
            rows: activity.disks.iter().map(disk).collect(),
        },
        Part {
            title: "promotion",
            heading: vec!["TO DISK", "HOLDS", "OF", "PROMOTED", "EVICTED", "SAVED", "STATE"],
            rows: activity.caches.iter().map(cache).collect(),
        },
        Part {
            title: "hottest chunks, since the start",
            heading: vec!["IMAGE", "CHUNK", "READ ON", "FROM COPY", "FROM CACHE", "CACHED"],
            rows: activity.hottest.iter().map(chunk).collect(),
        },
    ]
}

fn disk(disk: &DiskActivity) -> Vec<String> {
    let or_dash = |text: Option<String>| text.unwrap_or_else(|| "-".to_owned());
    vec![
        disk.disk.to_string(),
        or_dash(disk.tier.map(|tier| format!("{tier:?}").to_lowercase())),
        format!("{}", disk.reads / 10),
        match disk.origin {
            Origin::Tier => "-".to_owned(),
            _ => time(disk.mean_seconds),
        },
        match disk.origin {
            Origin::Tier => "-".to_owned(),
            _ => time(disk.p99_seconds),
        },
        or_dash(disk.against_peers.map(|times| format!("{times:.1}"))),
        or_dash(disk.own.zip(disk.foreign).map(|(own, foreign)| format!("{own}/{foreign}"))),
        or_dash(disk.queue_seconds.map(time)),
        or_dash(disk.oldest_seconds.map(time)),
    ]
}

fn cache(cache: &CacheView) -> Vec<String> {
    vec![
        cache.disk.to_string(),
        size::format(cache.stored_bytes),
        size::format(cache.limit_bytes),
        size::format(cache.figures.promoted_bytes),
        cache.figures.evicted.to_string(),
        format!("{:.1} s", cache.figures.saved_seconds),
        cache.off.clone().unwrap_or_else(|| "on".to_owned()),
    ]
}

fn chunk(chunk: &HotChunk) -> Vec<String> {
    vec![
        out::plain(&chunk.image),
        chunk.chunk.to_string(),
        chunk.disk.to_string(),
        chunk.copy_reads.to_string(),
        chunk.cache_reads.to_string(),
        if chunk.cached { "yes" } else { "no" }.to_owned(),
    ]
}

/// A duration in the unit that suits it.
fn time(seconds: f64) -> String {
    match seconds {
        s if s >= 1.0 => format!("{s:.1} s"),
        s if s >= 1e-3 => format!("{:.1} ms", s * 1e3),
        s => format!("{:.0} µs", s * 1e6),
    }
}

/// Where latencies are from.
pub(super) fn signal(signal: &SignalView) -> String {
    match signal.source {
        Origin::Probes => {
            let cost =
                signal.cost_nanos.map_or(String::new(), |nanos| format!(", {nanos} ns an event"));
            format!("by the probes{cost}")
        }
        _ => {
            let why = signal.reason.as_deref().unwrap_or("no probes");
            format!("by the service's own timing ({})", out::plain(why))
        }
    }
}

/// All of it as tables.
fn text(activity: &Activity) -> String {
    let mut text = format!("latencies: {}\n", signal(&activity.signal));
    for part in parts(activity) {
        let columns: Vec<_> = part
            .heading
            .iter()
            .enumerate()
            .map(|(at, title)| (*title, if at == 0 { out::Side::Left } else { out::Side::Right }))
            .collect();
        let mut table = out::Table::new(&columns);
        part.rows.into_iter().for_each(|row| table.row(row));
        text.push_str(&format!("\n{}\n{}", part.title, table.text("  nothing yet")));
    }
    text
}

/// Draws it; 80 columns and 24 lines are enough.
fn show(frame: &mut Frame, activity: &Activity) {
    let [head, disks, caches, hottest] = Layout::vertical([
        Constraint::Length(1),
        Constraint::Length(activity.disks.len().clamp(1, 8) as u16 + 3),
        Constraint::Length(activity.caches.len().clamp(1, 6) as u16 + 3),
        Constraint::Min(3),
    ])
    .areas(frame.area());
    let line = Line::from(format!("underlay top   {}   q quits", signal(&activity.signal)));
    frame.render_widget(line.bold(), head);
    for (part, area) in parts(activity).into_iter().zip([disks, caches, hottest]) {
        let widths = widths(&part);
        let rows = part.rows.into_iter().map(|row| {
            let slow =
                part.title == "disks" && row[5].parse::<f64>().is_ok_and(|times| times > 2.0);
            let style = if slow { Style::new().fg(Color::Red) } else { Style::new() };
            Row::new(row.into_iter().map(|cell| Cell::from(out::plain(&cell)))).style(style)
        });
        let table = Table::new(rows, widths)
            .header(Row::new(part.heading).dim())
            .column_spacing(2)
            .block(Block::bordered().title(part.title));
        frame.render_widget(table, area);
    }
}

fn widths(part: &Part) -> Vec<Constraint> {
    let width = |column: usize| {
        let cells = part.rows.iter().filter_map(|row| row.get(column));
        let longest = cells.map(|cell| cell.chars().count()).max().unwrap_or(0);
        longest.max(part.heading[column].len()).min(24) as u16
    };
    (0..part.heading.len()).map(|column| Constraint::Length(width(column))).collect()
}

#[cfg(test)]
mod tests {
    use ratatui::{Terminal, backend::TestBackend};

    use super::*;
    use crate::catalog::Tier;

    fn activity() -> Activity {
        let disk = |name: &str, mean| DiskActivity {
            disk: name.parse().unwrap(),
            tier: Some(Tier::Ssd),
            origin: Origin::Probes,
            reads: 1234,
            mean_seconds: mean,
            median_seconds: mean,
            p99_seconds: mean * 3.0,
            against_peers: Some(mean / 0.0002),
            own: Some(120),
            foreign: Some(3),
            in_flight: Some(2),
            oldest_seconds: Some(0.012),
            queue_seconds: Some(0.000_004),
        };
        let cache = |name: &str| CacheView {
            disk: name.parse().unwrap(),
            limit_bytes: 5 << 30,
            stored_bytes: 300 << 20,
            off: None,
            images: Vec::new(),
            figures: Default::default(),
        };
        let hottest = (0..20).map(|chunk| HotChunk {
            image: "debian\u{1b}[2J".to_owned(),
            disk: "b".parse().unwrap(),
            chunk,
            copy_reads: 10,
            cache_reads: 5000,
            cached: true,
        });
        Activity {
            signal: SignalView {
                source: Origin::Probes,
                reason: None,
                agent: Some(77),
                cost_nanos: Some(310),
            },
            disks: vec![disk("a", 0.0201), disk("b", 0.0002), disk("c", 0.0002)],
            caches: vec![cache("b"), cache("c")],
            hottest: hottest.collect(),
        }
    }

    #[test]
    fn it_fits_a_small_terminal() {
        let mut terminal = Terminal::new(TestBackend::new(80, 24)).unwrap();
        terminal.draw(|frame| show(frame, &activity())).unwrap();
        let shown = terminal.backend().to_string();
        for word in ["20.1 ms", "120/3", "12.0 ms", "4 µs", "300 MiB", "5000", "310 ns", "100.5"] {
            assert!(shown.contains(word), "{word} is not in\n{shown}");
        }
        assert!(!shown.contains('\u{1b}'));
        for size in [(1, 1), (20, 5), (300, 100)] {
            let mut terminal = Terminal::new(TestBackend::new(size.0, size.1)).unwrap();
            terminal.draw(|frame| show(frame, &activity())).unwrap();
        }
    }

    #[test]
    fn once_is_text() {
        let text = text(&activity());
        assert!(text.starts_with("latencies: by the probes, 310 ns an event\n"), "{text}");
        assert!(
            text.contains("20.1 ms") && text.contains("yes") && !text.contains('\u{1b}'),
            "{text}"
        );
    }
}
