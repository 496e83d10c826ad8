//! Sizes as people write and read them: `10G`, `512M`, `1.5 GiB`. Units are binary.

use crate::error::{Error, Kind, Result};

const UNITS: [&str; 7] = ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];

/// Reads a size in bytes: digits, perhaps with a fraction, and one of K, M, G, T, P (also as
/// `KiB` and so on). All units are powers of 1024.
pub fn parse(text: &str) -> Result<u64> {
    let wrong = || {
        Error::new(
            Kind::Invalid,
            format!(
                "size {:?} is not understood: write bytes, or a number with K, M, G or T, as in 10G",
                shorten(text)
            ),
        )
    };
    let text = text.trim();
    let digits = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let unit = unit.trim().to_ascii_lowercase();
    let shift = match unit.as_str() {
        "" | "b" => 0,
        "k" | "kib" => 10,
        "m" | "mib" => 20,
        "g" | "gib" => 30,
        "t" | "tib" => 40,
        "p" | "pib" => 50,
        _ => return Err(wrong()),
    };
    let (whole, fraction) = match number.split_once('.') {
        // Half a byte is none.
        Some((_, fraction)) if fraction.is_empty() || fraction.contains('.') || shift == 0 => {
            return Err(wrong());
        }
        Some(parts) => parts,
        None => (number, ""),
    };
    // A fraction is taken to nine digits: enough to tell bytes apart in a GiB.
    let mut digits = fraction.bytes().map(|digit| u128::from(digit - b'0'));
    let billionths = (0..9).fold(0, |sum, _| sum * 10 + digits.next().unwrap_or(0));
    let part = (billionths << shift) / 1_000_000_000;
    let whole = whole.parse::<u64>().ok().and_then(|whole| whole.checked_mul(1 << shift));
    let part = u64::try_from(part).ok();
    whole.zip(part).and_then(|(whole, part)| whole.checked_add(part)).ok_or_else(wrong)
}

/// `bytes` in the largest binary unit that keeps at least one digit before the point.
pub fn format(bytes: u64) -> String {
    let unit = (bytes.max(1).ilog2() / 10) as usize;
    if unit == 0 {
        return format!("{bytes} B");
    }
    let tenths = (u128::from(bytes) * 10) >> (unit * 10);
    match tenths {
        1000.. => format!("{} {}", tenths / 10, UNITS[unit]),
        _ if tenths.is_multiple_of(10) => format!("{} {}", tenths / 10, UNITS[unit]),
        _ => format!("{}.{} {}", tenths / 10, tenths % 10, UNITS[unit]),
    }
}

/// At most a hundred characters of what a user gave, for messages.
pub fn shorten(text: &str) -> String {
    match text.char_indices().nth(100) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_as_people_write_them() {
        for (text, bytes) in [
            ("0", 0),
            ("4096", 4096),
            ("512M", 512 << 20),
            ("10G", 10 << 30),
            ("10 GiB", 10 << 30),
            ("1.5t", 3 << 39),
            ("0.5k", 512),
            ("7b", 7),
            ("16383.5P", u64::MAX - (1 << 49) + 1),
            ("18446744073709551615", u64::MAX),
        ] {
            assert_eq!(parse(text).unwrap(), bytes, "{text}");
        }
        for text in [
            "",
            "G",
            "-1",
            "1e9",
            "10GG",
            "1.",
            ".5G",
            "1.5",
            "1.2.3G",
            "16384P",
            "99999999P",
            "18446744073709551615P",
            "10 bananas",
        ] {
            assert_eq!(parse(text).unwrap_err().kind(), Kind::Invalid, "{text}");
        }
        let long = parse(&"9".repeat(4000)).unwrap_err().to_string();
        assert!(long.len() < 300, "{long}");
    }

    #[test]
    fn sizes_are_shown_in_binary_units() {
        for (bytes, text) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (1024, "1 KiB"),
            (1536, "1.5 KiB"),
            (200 << 20, "200 MiB"),
            ((1 << 30) - 1, "1023 MiB"),
            (u64::MAX, "15.9 EiB"),
        ] {
            assert_eq!(format(bytes), text);
        }
        for bytes in (0..64).map(|bit| 1u64 << bit) {
            assert!(parse(&format(bytes).replace("EiB", "P")).is_ok());
        }
    }
}
