//! The bench's figures as a picture: a group of bars a load, as long as the rate is to the raw file's.

use std::fmt::Write;

use super::loads::{LOADS, Way, Who};
use super::table::{Row, label, ordered};

const LEFT: f64 = 260.0;
const WIDTH: f64 = 560.0;
const BAR: f64 = 13.0;

/// The picture.
pub fn svg(machine: &str, rows: &[Row]) -> String {
    let mut body = String::new();
    let mut top = 46.0;
    for (number, load) in LOADS.iter().enumerate() {
        for way in [Way::Direct, Way::Cached] {
            let of_way = || ordered(rows, number).filter(|row| row.lane.0 == way);
            let Some(most) = of_way().map(|row| row.spread().1).max_by(f64::total_cmp) else {
                continue;
            };
            let _ = writeln!(
                body,
                "<text x=\"8\" y=\"{}\" font-weight=\"bold\">{}</text>",
                top + 10.0,
                load.name
            );
            top += BAR + 4.0;
            for row in of_way() {
                top = bar(&mut body, row, most, top);
            }
            top += 10.0;
        }
    }
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {} {}\" font-family=\"sans-serif\" \
         font-size=\"11\">\n<rect width=\"100%\" height=\"100%\" fill=\"#fff\"/>\n\
         <text x=\"8\" y=\"20\" font-size=\"14\">Operations a second, median of the rounds; the line is from the \
         lowest to the highest</text>\n<text x=\"8\" y=\"36\" fill=\"#666\">{machine}</text>\n{body}</svg>\n",
        LEFT + WIDTH + 90.0,
        top + 10.0,
    )
}

/// Draws a bar at `top`; where the next begins.
fn bar(body: &mut String, row: &Row, most: f64, top: f64) -> f64 {
    let long = |rate: f64| rate / most * WIDTH;
    let (low, high) = row.spread();
    let colour = match row.lane.1 {
        Who::Raw => "#bbb",
        Who::Underlay => "#2a7",
        Who::QemuNbd => "#e90",
        Who::StorageDaemon => "#fb6",
        Who::Nbdkit => "#69c",
    };
    let (middle, rate) = (top + BAR / 2.0, row.per_second());
    let _ = writeln!(
        body,
        "<text x=\"{}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>\
         <rect x=\"{LEFT}\" y=\"{top:.1}\" width=\"{:.1}\" height=\"{}\" fill=\"{colour}\"/>\
         <line x1=\"{:.1}\" x2=\"{:.1}\" y1=\"{middle:.1}\" y2=\"{middle:.1}\" stroke=\"#000\"/>\
         <text x=\"{:.1}\" y=\"{:.1}\">{rate:.0}</text>",
        LEFT - 6.0,
        top + BAR - 3.0,
        label(row.lane),
        long(rate),
        BAR - 2.0,
        LEFT + long(low),
        LEFT + long(high),
        LEFT + long(high) + 6.0,
        top + BAR - 3.0,
    );
    top + BAR
}
