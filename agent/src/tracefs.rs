//! tracefs: where it is, and what it says of a tracepoint's layout.
//!
//! Layouts differ from kernel to kernel, so every offset that the programs use comes from here.
//!
//! Invariant: a [`Fields`] that is handed out has every field that was asked for, of the expected
//! size, within the part of the record that the programs read.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use nix::mount::{MsFlags, mount};
use underlay_agent_ebpf::{Fields, RECORD};

use crate::error::{Error, Result};

/// Where tracefs is, in the order of preference: the loader of the programs looks there as well.
const PLACES: [&str; 2] = ["/sys/kernel/tracing", "/sys/kernel/debug/tracing"];
/// Longest description that is read, in bytes; real ones have about 2000.
const LONGEST: u64 = 64 << 10;

/// A tracepoint of the block layer and the fields that its program reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tracepoint {
    /// Its name in tracefs.
    pub name: &'static str,
    /// Fields with the size that they must have; of two of one meaning the later wins.
    wanted: &'static [(&'static str, Slot, u64)],
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Slot {
    Dev,
    Sector,
    Sectors,
    Rwbs,
    Error,
}

/// What most of them have. Of `rwbs` only the first two characters are read.
const PLAIN: &[(&str, Slot, u64)] = &[
    ("dev", Slot::Dev, 4),
    ("sector", Slot::Sector, 8),
    ("nr_sector", Slot::Sectors, 4),
    ("rwbs", Slot::Rwbs, 2),
];
const COMPLETE: &[(&str, Slot, u64)] = &[
    ("dev", Slot::Dev, 4),
    ("sector", Slot::Sector, 8),
    ("nr_sector", Slot::Sectors, 4),
    ("rwbs", Slot::Rwbs, 2),
    ("error", Slot::Error, 4),
];
const SPLIT: &[(&str, Slot, u64)] = &[
    ("dev", Slot::Dev, 4),
    ("sector", Slot::Sector, 8),
    ("new_sector", Slot::Sectors, 8),
    ("rwbs", Slot::Rwbs, 2),
];

/// A bio is submitted.
pub const BIO_QUEUE: Tracepoint = Tracepoint { name: "block_bio_queue", wanted: PLAIN };
/// A bio is split in two.
pub const BIO_SPLIT: Tracepoint = Tracepoint { name: "block_split", wanted: SPLIT };
/// A bio has ended.
pub const BIO_COMPLETE: Tracepoint = Tracepoint { name: "block_bio_complete", wanted: COMPLETE };
/// A request goes to the device.
pub const RQ_ISSUE: Tracepoint = Tracepoint { name: "block_rq_issue", wanted: PLAIN };
/// A request comes back, to be issued again.
pub const RQ_REQUEUE: Tracepoint = Tracepoint { name: "block_rq_requeue", wanted: PLAIN };
/// A request is done.
pub const RQ_COMPLETE: Tracepoint = Tracepoint { name: "block_rq_complete", wanted: COMPLETE };

/// Where tracefs is mounted; mounts it at its own place if it is not and the caller may.
pub fn find() -> Result<PathBuf> {
    let here = |place: &&str| Path::new(place).join("events/block").is_dir();
    if let Some(place) = PLACES.iter().find(|place| here(place)) {
        return Ok(PathBuf::from(place));
    }
    let path = PathBuf::from(PLACES[0]);
    // Without privileges its directory can be looked at, but not into.
    if let Err(source) = fs::read_dir(&path)
        && source.kind() == io::ErrorKind::PermissionDenied
    {
        return Err(Error::Unreadable { path, source });
    }
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    if let Err(error) = mount(Some("tracefs"), &path, Some("tracefs"), flags, None::<&str>) {
        return Err(Error::NoTracefs { path, source: error.into() });
    }
    if here(&PLACES[0]) {
        return Ok(path);
    }
    Err(Error::NoTracepoint { name: "block", path: path.join("events/block") })
}

/// Reads the layout of one tracepoint.
pub fn fields(tracefs: &Path, tracepoint: &Tracepoint) -> Result<Fields> {
    let name = tracepoint.name;
    let path = tracefs.join("events/block").join(name).join("format");
    match read(&path) {
        Ok(text) => parse(tracepoint, &text),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            Err(Error::NoTracepoint { name, path })
        }
        Err(source) => Err(Error::Unreadable { path, source }),
    }
}

fn read(path: &Path) -> io::Result<String> {
    let mut text = String::new();
    io::Read::read_to_string(&mut io::Read::take(fs::File::open(path)?, LONGEST), &mut text)?;
    Ok(text)
}

/// Finds the fields of `tracepoint` in the text of its `format` file.
pub fn parse(tracepoint: &Tracepoint, text: &str) -> Result<Fields> {
    let wrong = |problem| Error::Layout { name: tracepoint.name, problem };
    let mut fields = Fields::default();
    for (name, slot, size) in tracepoint.wanted {
        let found = text.lines().filter_map(field).find(|field| field.name == *name);
        let Some(found) = found else {
            return Err(wrong(format!("it has no field {name}")));
        };
        // Text may be longer than what is read of it.
        if found.size < *size || (*slot != Slot::Rwbs && found.size != *size) {
            return Err(wrong(format!("its field {name} has {} bytes, not {size}", found.size)));
        }
        // The widest load anywhere is 8 bytes.
        if found.offset < 8 || found.offset > RECORD as u64 - 8 {
            return Err(wrong(format!("its field {name} lies at byte {}", found.offset)));
        }
        let place = match slot {
            Slot::Dev => &mut fields.dev,
            Slot::Sector => &mut fields.sector,
            Slot::Sectors => &mut fields.sectors,
            Slot::Rwbs => &mut fields.rwbs,
            Slot::Error => &mut fields.error,
        };
        *place = found.offset as u32;
    }
    Ok(fields)
}

struct Field<'a> {
    name: &'a str,
    offset: u64,
    size: u64,
}

/// One line: `field:char rwbs[10]; offset:34; size:10; signed:0;`, with tabs between.
fn field(line: &str) -> Option<Field<'_>> {
    let mut parts = line.trim().strip_prefix("field:")?.split(';').map(str::trim);
    let declared = parts.next()?.split_whitespace().next_back()?;
    let name = declared.split('[').next()?;
    let (mut offset, mut size) = (None, None);
    for part in parts {
        match part.split_once(':') {
            Some(("offset", value)) => offset = value.parse().ok(),
            Some(("size", value)) => size = value.parse().ok(),
            _ => {}
        }
    }
    Some(Field { name, offset: offset?, size: size? })
}

#[cfg(test)]
mod tests {
    use super::*;

    const ISSUE_6_18: &str = "name: block_rq_issue
ID: 1182
format:
\tfield:unsigned short common_type;\toffset:0;\tsize:2;\tsigned:0;
\tfield:unsigned char common_flags;\toffset:2;\tsize:1;\tsigned:0;
\tfield:unsigned char common_preempt_count;\toffset:3;\tsize:1;\tsigned:0;
\tfield:int common_pid;\toffset:4;\tsize:4;\tsigned:1;

\tfield:dev_t dev;\toffset:8;\tsize:4;\tsigned:0;
\tfield:sector_t sector;\toffset:16;\tsize:8;\tsigned:0;
\tfield:unsigned int nr_sector;\toffset:24;\tsize:4;\tsigned:0;
\tfield:unsigned int bytes;\toffset:28;\tsize:4;\tsigned:0;
\tfield:unsigned short ioprio;\toffset:32;\tsize:2;\tsigned:0;
\tfield:char rwbs[10];\toffset:34;\tsize:10;\tsigned:0;
\tfield:char comm[16];\toffset:44;\tsize:16;\tsigned:0;
\tfield:__data_loc char[] cmd;\toffset:60;\tsize:4;\tsigned:0;
";

    #[test]
    fn the_layouts_of_two_kernels_are_read() {
        let fields = parse(&RQ_ISSUE, ISSUE_6_18).unwrap();
        assert_eq!(fields, Fields { dev: 8, sector: 16, sectors: 24, rwbs: 34, error: 0 });
        let older =
            ISSUE_6_18.replace("rwbs[10];\toffset:34;\tsize:10", "rwbs[8];\toffset:32;\tsize:8");
        assert_eq!(parse(&RQ_ISSUE, &older).unwrap().rwbs, 32);
    }

    #[test]
    fn a_layout_that_the_programs_cannot_use_is_refused_with_the_field() {
        for (from, to, says) in [
            ("nr_sector", "sector_count", "no field nr_sector"),
            ("dev;\toffset:8;\tsize:4", "dev;\toffset:8;\tsize:8", "dev has 8 bytes"),
            ("rwbs[10];\toffset:34", "rwbs[10];\toffset:62", "rwbs lies at byte 62"),
            ("sector;\toffset:16", "sector;\toffset:4294967312", "sector lies at byte"),
            ("sector;\toffset:16", "sector;\toffset:", "no field sector"),
        ] {
            let error = parse(&RQ_ISSUE, &ISSUE_6_18.replace(from, to)).unwrap_err().to_string();
            assert!(error.contains(says) && error.contains("block_rq_issue"), "{error}");
        }
        assert!(parse(&RQ_COMPLETE, "").is_err());
    }

    #[test]
    fn any_line_is_parsed_or_passed_over() {
        for line in
            ["", "field:", "field:;", "field:x", "field:a b;offset:-1;size:2", "field:a;;;:"]
        {
            let _ = field(line);
        }
    }
}
