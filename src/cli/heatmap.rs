//! `underlay heatmap`: which parts of an image are read from where, as a picture.

use std::{fmt::Write, path::PathBuf};

use clap::Args;

use super::{Outcome, Setting, out, size};
use crate::{
    catalog::Name,
    control::{
        api::{DiskHeat, Heat},
        client::escape,
    },
    error::{Context, Result},
};

/// Show which parts of an image are read from where: a row for each disk whose replicas read it.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
    underlay heatmap debian-12\n  \
    underlay heatmap debian-12 --svg heat.svg")]
pub struct Heatmap {
    /// The image.
    #[arg(value_parser = super::name)]
    image: Name,
    /// Write a picture to this file, instead of characters to the terminal.
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
}

impl Heatmap {
    pub(super) async fn run(self, setting: &Setting) -> Result<Outcome> {
        let path = format!("/v1/images/{}/heat", escape(self.image.as_str()));
        let heat: Heat = setting.client()?.get(&path).await?;
        match &self.svg {
            Some(file) => {
                std::fs::write(file, svg(&heat))
                    .context(|| format!("writing {}", file.display()))?;
                setting.show(&heat, |_| format!("{} is drawn\n", file.display()))?;
            }
            None => setting.show(&heat, text)?,
        }
        Ok(Outcome::Well)
    }
}

/// Characters of a row on a terminal.
const COLUMNS: usize = 64;
/// From nothing to much.
const SHADES: [char; 5] = [' ', '.', ':', 'o', '#'];

/// A picture in characters: two lines for each disk.
fn text(heat: &Heat) -> String {
    let most = heat.disks.iter().flat_map(|disk| disk.copy_reads.iter().chain(&disk.cache_reads));
    let most = most.copied().max().unwrap_or(0);
    let mut text = format!("image {}, {}\n", out::plain(&heat.image), size::format(heat.size));
    for disk in &heat.disks {
        let line = |reads: &[u64]| -> String {
            let per = reads.len().div_ceil(COLUMNS).max(1);
            let cells = reads.chunks(per).map(|cells| cells.iter().copied().max().unwrap_or(0));
            cells.map(|reads| SHADES[level(reads, most, SHADES.len() - 1)]).collect()
        };
        let (copy, cache) = (line(&disk.copy_reads), line(&disk.cache_reads));
        let _ = writeln!(text, "\nreplicas on disk {}", disk.disk);
        let _ = writeln!(text, "  {:<12} |{copy}|", format!("copy on {}", from(disk)));
        let _ = writeln!(text, "  {:<12} |{cache}|", "its cache");
    }
    if heat.disks.is_empty() {
        text.push_str("no replica has read it since the daemon's start\n");
    }
    text
}

fn from(disk: &DiskHeat) -> &str {
    disk.copy.as_deref().unwrap_or("-")
}

/// `reads` on a logarithmic scale of `steps` to `most`: 0 is none at all.
fn level(reads: u64, most: u64, steps: usize) -> usize {
    if reads == 0 || most == 0 {
        return 0;
    }
    let share = ((reads + 1) as f64).ln() / ((most + 1) as f64).ln();
    ((share * steps as f64).ceil() as usize).clamp(1, steps)
}

const WIDTH: f64 = 1024.0;
const LEFT: f64 = 90.0;
const ROW: f64 = 22.0;
const TOP: f64 = 56.0;
/// Shades of a row in a picture.
const DEPTHS: usize = 20;

/// A picture: for each disk a row of reads that the copy answered, one that the cache answered, and
/// beneath them what the cache holds.
pub fn svg(heat: &Heat) -> String {
    let most = heat.disks.iter().flat_map(|disk| disk.copy_reads.iter().chain(&disk.cache_reads));
    let most = most.copied().max().unwrap_or(0);
    let height = TOP + heat.disks.len() as f64 * (ROW * 2.0 + 26.0) + 40.0;
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {} {height}\" \
         font-family=\"sans-serif\" font-size=\"11\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"#fff\"/>\n\
         <text x=\"10\" y=\"20\" font-size=\"14\">Image {}: where its {} are read from</text>\n\
         <text x=\"10\" y=\"38\" fill=\"#555\">orange: the copy on another disk; blue: the reader's own \
         cache; darker is more, most {most} reads of {}</text>\n",
        WIDTH + LEFT + 10.0,
        escaped(&heat.image),
        size::format(heat.size),
        size::format(heat.cell_bytes),
    );
    for (number, disk) in heat.disks.iter().enumerate() {
        let top = TOP + number as f64 * (ROW * 2.0 + 26.0);
        let _ = writeln!(
            svg,
            "<text x=\"10\" y=\"{}\">disk {}</text><text x=\"10\" y=\"{}\" fill=\"#555\">copy on {}</text>",
            top + 15.0,
            escaped(disk.disk.as_str()),
            top + 15.0 + ROW,
            escaped(from(disk)),
        );
        row(&mut svg, top, &disk.copy_reads, most, "#d95f02");
        row(&mut svg, top + ROW, &disk.cache_reads, most, "#1f78b4");
        let cached: Vec<u64> =
            disk.cached_percent.iter().map(|percent| u64::from(*percent)).collect();
        row_of(&mut svg, top + ROW * 2.0 + 2.0, 4.0, &cached, 100, "#33a02c");
    }
    let bottom = height - 12.0;
    let _ = writeln!(
        svg,
        "<text x=\"{LEFT}\" y=\"{bottom}\" fill=\"#555\">0</text>\
         <text x=\"{}\" y=\"{bottom}\" fill=\"#555\" text-anchor=\"end\">{}</text>\
         <text x=\"{}\" y=\"{bottom}\" fill=\"#33a02c\" text-anchor=\"middle\">green: in the cache</text>",
        LEFT + WIDTH,
        size::format(heat.size),
        LEFT + WIDTH / 2.0,
    );
    svg.push_str("</svg>\n");
    svg
}

fn row(svg: &mut String, top: f64, cells: &[u64], most: u64, colour: &str) {
    row_of(svg, top, ROW - 2.0, cells, most, colour);
}

fn row_of(svg: &mut String, top: f64, height: f64, cells: &[u64], most: u64, colour: &str) {
    let width = WIDTH / cells.len().max(1) as f64;
    let _ = writeln!(
        svg,
        "<rect x=\"{LEFT}\" y=\"{top}\" width=\"{WIDTH}\" height=\"{height}\" fill=\"#f4f4f4\"/>"
    );
    let mut at = 0;
    while at < cells.len() {
        let depth = level(cells[at], most, DEPTHS);
        let alike = |cell: &&u64| level(**cell, most, DEPTHS) == depth;
        let count = cells[at..].iter().take_while(alike).count();
        if depth > 0 {
            let _ = writeln!(
                svg,
                "<rect x=\"{:.2}\" y=\"{top}\" width=\"{:.2}\" height=\"{height}\" fill=\"{colour}\" \
                 fill-opacity=\"{:.2}\"/>",
                LEFT + at as f64 * width,
                (count as f64 * width).max(0.5),
                0.15 + 0.85 * depth as f64 / DEPTHS as f64,
            );
        }
        at += count;
    }
}

/// Text as it may stand in a picture.
fn escaped(text: &str) -> String {
    out::plain(text).replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn heat() -> Heat {
        let disk = DiskHeat {
            disk: "b".parse().unwrap(),
            copy: Some("a".to_owned()),
            copy_reads: vec![0, 100, 100, 1],
            cache_reads: vec![0, 0, 5, 0],
            cached_percent: vec![0, 0, 100, 0],
        };
        let image = "x<&\u{1b}".to_owned();
        Heat { image, size: 1 << 30, cell_bytes: 256 << 20, disks: vec![disk] }
    }

    #[test]
    fn pictures_show_what_was_read_and_nothing_hostile() {
        let text = text(&heat());
        assert!(
            text.contains("copy on a    | ##.|") && text.contains("its cache    |  : |"),
            "{text}"
        );
        let svg = svg(&heat());
        assert!(svg.contains("x&lt;&amp;\\u{1b}") && !svg.contains('\u{1b}'), "{svg}");
        // Two cells of a kind are one rectangle: one of the copy's rows, one of the cache's.
        assert_eq!(svg.matches("#d95f02").count(), 2);
        assert_eq!(svg.matches("#1f78b4").count(), 1);
        assert_eq!(
            (level(0, 9, 4), level(9, 9, 4), level(1, 1000, 4), level(7, 0, 4)),
            (0, 4, 1, 0)
        );
    }
}
