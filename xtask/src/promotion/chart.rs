//! Latency over time as a picture, for docs/.

use std::fmt::Write;

use crate::load::{Kind, Sample, quantile};

const WIDTH: f64 = 860.0;
const HEIGHT: f64 = 300.0;
const LEFT: f64 = 60.0;
const TOP: f64 = 50.0;
/// What the axis of latencies spans, in seconds: four decades and a half.
const LEAST: f64 = 30e-6;
const MOST: f64 = 100e-3;

/// What happened at which moment.
pub struct Mark {
    /// Seconds since the start.
    pub at: f64,
    /// In a word.
    pub what: &'static str,
}

/// Bytes promoted until a moment, by all disks.
pub type Promoted = (f64, u64);

/// The picture.
pub fn svg(title: &str, samples: &[Sample], marks: &[Mark], promoted: &[Promoted]) -> String {
    let end = samples.iter().map(|sample| sample.at).fold(1.0, f64::max);
    let x = |at: f64| LEFT + at / end * WIDTH;
    let span = (MOST / LEAST).ln();
    let y = |took: f64| TOP + HEIGHT - (took.clamp(LEAST, MOST) / LEAST).ln() / span * HEIGHT;
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {} {}\" font-family=\"sans-serif\" \
         font-size=\"11\">\n<rect width=\"100%\" height=\"100%\" fill=\"#fff\"/>\n\
         <text x=\"{LEFT}\" y=\"20\" font-size=\"14\">{title}</text>\n",
        LEFT + WIDTH + 70.0,
        TOP + HEIGHT + 40.0,
    );
    for (took, label) in [(100e-6, "100 µs"), (1e-3, "1 ms"), (10e-3, "10 ms"), (100e-3, "100 ms")]
    {
        let at = y(took);
        let _ = writeln!(
            svg,
            "<line x1=\"{LEFT}\" x2=\"{}\" y1=\"{at:.1}\" y2=\"{at:.1}\" stroke=\"#ddd\"/>\
             <text x=\"{}\" y=\"{:.1}\" text-anchor=\"end\">{label}</text>",
            LEFT + WIDTH,
            LEFT - 6.0,
            at + 4.0,
        );
    }
    for second in (0..=end as u64).step_by(5) {
        let _ = writeln!(
            svg,
            "<text x=\"{:.1}\" y=\"{}\" text-anchor=\"middle\">{second} s</text>",
            x(second as f64),
            TOP + HEIGHT + 16.0,
        );
    }
    for mark in marks {
        let at = x(mark.at);
        let _ = writeln!(
            svg,
            "<line x1=\"{at:.1}\" x2=\"{at:.1}\" y1=\"{TOP}\" y2=\"{}\" stroke=\"#999\" \
             stroke-dasharray=\"4 3\"/><text x=\"{:.1}\" y=\"{}\" fill=\"#555\">{}</text>",
            TOP + HEIGHT,
            at + 4.0,
            TOP - 6.0,
            mark.what,
        );
    }
    let most = promoted.iter().map(|(_, bytes)| *bytes).max().unwrap_or(0).max(1) as f64;
    let area = promoted.iter().map(|(at, bytes)| {
        format!("{:.1},{:.1}", x(*at), TOP + HEIGHT - *bytes as f64 / most * HEIGHT / 3.0)
    });
    let area: Vec<String> = area.collect();
    line(&mut svg, &area.join(" "), "#33a02c", "promoted");
    let _ = writeln!(
        svg,
        "<text x=\"{}\" y=\"{}\" fill=\"#33a02c\">promoted,</text>\
         <text x=\"{}\" y=\"{}\" fill=\"#33a02c\">{} MiB</text>",
        LEFT + WIDTH + 6.0,
        TOP + HEIGHT - HEIGHT / 3.0,
        LEFT + WIDTH + 6.0,
        TOP + HEIGHT - HEIGHT / 3.0 + 13.0,
        most as u64 >> 20,
    );
    for (kind, share, colour, label) in [
        (Kind::Hot, 0.5, "#fdae61", "hot, median"),
        (Kind::Hot, 0.99, "#d95f02", "hot, p99"),
        (Kind::Local, 0.99, "#1f78b4", "own disk, p99"),
    ] {
        let points = (0..end as u64).filter_map(|second| {
            let at = second as f64;
            let took = quantile(samples, kind, at, at + 1.0, share)?;
            Some(format!("{:.1},{:.1}", x(at + 0.5), y(took)))
        });
        let points: Vec<String> = points.collect();
        line(&mut svg, &points.join(" "), colour, label);
    }
    for (row, (colour, label)) in
        [("#d95f02", "hot chunks, p99"), ("#fdae61", "median"), ("#1f78b4", "own disk, p99")]
            .into_iter()
            .enumerate()
    {
        let _ = writeln!(
            svg,
            "<text x=\"{}\" y=\"{}\" fill=\"{colour}\">{label}</text>",
            LEFT + WIDTH - 110.0,
            TOP + 14.0 + row as f64 * 14.0,
        );
    }
    svg.push_str("</svg>\n");
    svg
}

fn line(svg: &mut String, points: &str, colour: &str, label: &str) {
    let _ = writeln!(
        svg,
        "<polyline points=\"{points}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"1.6\">\
         <title>{label}</title></polyline>"
    );
}
