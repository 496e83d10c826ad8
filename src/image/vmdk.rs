//! Reading VMDK images that are one file: monolithicSparse (as hypervisors keep them) and
//! streamOptimized (as OVAs carry them).
//!
//! Flat and split images are a descriptor that names other files. They are refused: an image that
//! comes from elsewhere must not make this host open files.
//!
//! Invariants: as for qcow2. No other file is opened; what lies past the end of the file is an
//! error, never zeros; memory is a grain directory of 32 MiB at most, and one table and one grain
//! of 2 MiB at most for each reader.

use std::{fs::File, ops::Range};

use super::{
    MAX_IMAGE,
    content::{Scratch, read_exact},
    qcow2::{Window, inflate},
};
use crate::{
    error::{Error, Kind, Result},
    units::SECTOR,
};

const HEADER: usize = 512;
/// The directory's place is told by a copy of the header at the end of the file.
const AT_END: u64 = u64::MAX;
/// The largest grain directory that is read, in entries.
const MAX_DIRECTORY: u64 = 8 << 20;
const MAX_GRAIN: u64 = 2 << 20;
const MAX_TABLE_ENTRIES: u32 = 512;
const MAX_DESCRIPTOR: u64 = 64 << 10;
/// What precedes a compressed grain: its sector on the disk (u64) and its bytes (u32).
const MARKER: usize = 12;

const FLAG_ZERO_GRAINS: u32 = 1 << 2;
const FLAG_COMPRESSED: u32 = 1 << 16;
const FLAG_MARKERS: u32 = 1 << 17;

/// An open sparse VMDK.
pub(super) struct Vmdk {
    file: File,
    name: String,
    length: u64,
    header: Header,
    /// Offsets of the grain tables in bytes; 0 where there is none.
    directory: Vec<u64>,
}

struct Header {
    flags: u32,
    /// Bytes of content.
    size: u64,
    /// Bytes of a grain.
    grain: u64,
    descriptor: Range<u64>,
    table_entries: u32,
    /// In bytes, or [`AT_END`].
    directory: u64,
}

impl Vmdk {
    /// Opens the image in `file`, which is `length` bytes long; `name` stands for it in errors.
    pub(super) fn open(file: File, length: u64, name: &str) -> Result<Vmdk> {
        let refuse = |kind, why: String| Error::new(kind, format!("the VMDK image {name} {why}"));
        let mut bytes = [0; HEADER];
        let held = length.min(HEADER as u64) as usize;
        read_exact(&file, &mut bytes[..held], 0, name)?;
        if bytes.starts_with(b"# Disk DescriptorFile") {
            return Err(refuse(
                Kind::Unsupported,
                "is a descriptor that names other files, which are not followed: import its \
                 …-flat.vmdk with --format raw, or convert it with `qemu-img convert -O qcow2`"
                    .into(),
            ));
        }
        let mut header = Header::decode(&bytes).map_err(|(kind, why)| refuse(kind, why))?;
        if header.directory == AT_END {
            // The footer: a marker, the header again with the directory's place, an end marker.
            let Some(at) = length.checked_sub(2 * SECTOR).filter(|at| *at >= HEADER as u64) else {
                return Err(refuse(Kind::Corrupt, "is truncated: it lacks its footer".into()));
            };
            read_exact(&file, &mut bytes, at, name)?;
            let footer = Header::decode(&bytes).map_err(|(_, why)| {
                refuse(Kind::Corrupt, format!("is truncated: where its footer belongs, it {why}"))
            })?;
            if (footer.size, footer.grain, footer.flags)
                != (header.size, header.grain, header.flags)
                || footer.directory == AT_END
            {
                return Err(refuse(Kind::Corrupt, "is corrupt: header and footer disagree".into()));
            }
            header.directory = footer.directory;
        }
        let mut image = Vmdk { file, name: name.to_owned(), length, header, directory: Vec::new() };
        image.check_descriptor()?;
        let entries = image.header.size.div_ceil(image.table_span());
        if entries > MAX_DIRECTORY {
            return Err(image.corrupt(format!("its grain directory has {entries} entries")));
        }
        let mut directory = vec![0; entries as usize * 4];
        image.read_at(&mut directory, image.header.directory, "its grain directory")?;
        image.directory =
            directory.chunks_exact(4).map(|entry| u64::from(le32(entry, 0)) * SECTOR).collect();
        Ok(image)
    }

    /// The size of the content in bytes.
    pub(super) fn size(&self) -> u64 {
        self.header.size
    }

    /// See [`Content::next_data`](super::content::Content::next_data).
    pub(super) fn next_data(
        &self,
        offset: u64,
        scratch: &mut Scratch,
    ) -> Result<Option<Range<u64>>> {
        let (grain, span, size) = (self.header.grain, self.table_span(), self.header.size);
        let Some(skipped) = self
            .directory
            .iter()
            .skip((offset / span) as usize)
            .position(|table| *table != 0)
            .filter(|_| offset < size)
        else {
            return Ok(None);
        };
        let mut start = offset.max((offset / span + skipped as u64) * span);
        let stop = ((start / span + 1) * span).min(size);
        while start < stop && self.grain_at(start, scratch)?.is_none() {
            start = (start / grain + 1) * grain;
        }
        let mut end = start;
        while end < stop && self.grain_at(end, scratch)?.is_some() {
            end = (end / grain + 1) * grain;
        }
        Ok(Some(start.min(stop)..end.min(stop)))
    }

    /// Fills `buf` with the content from `offset`, all of it within the image.
    pub(super) fn read(&self, offset: u64, buf: &mut [u8], scratch: &mut Scratch) -> Result<()> {
        let grain = self.header.grain;
        let mut done = 0;
        while done < buf.len() {
            let at = offset + done as u64;
            let within = (at % grain) as usize;
            let count = (grain as usize - within).min(buf.len() - done);
            let part = &mut buf[done..done + count];
            match self.grain_at(at, scratch)? {
                None => part.fill(0),
                Some(start) if self.header.flags & FLAG_COMPRESSED == 0 => {
                    self.read_at(part, start + within as u64, "a grain")?;
                }
                Some(start) => {
                    if scratch.key != Some(start) {
                        self.unpack(start, at - within as u64, scratch)?;
                    }
                    part.copy_from_slice(&scratch.plain[within..within + count]);
                }
            }
            done += count;
        }
        Ok(())
    }

    /// Decompresses the grain at `start` of the file, which holds the content from `content`, into
    /// `scratch.plain`.
    fn unpack(&self, start: u64, content: u64, scratch: &mut Scratch) -> Result<()> {
        scratch.key = None;
        let mut marker = [0; MARKER];
        self.read_at(&mut marker, start, "a grain")?;
        let sector = u64::from(le32(&marker, 0)) | u64::from(le32(&marker, 4)) << 32;
        let bytes = u64::from(le32(&marker, 8));
        if sector.checked_mul(SECTOR) != Some(content) || bytes > 2 * MAX_GRAIN {
            return Err(self.corrupt(format!("the grain at offset {start} belongs elsewhere")));
        }
        scratch.packed.resize(bytes as usize, 0);
        self.read_at(&mut scratch.packed, start + MARKER as u64, "a grain")?;
        scratch.plain.resize(self.header.grain as usize, 0);
        // The last grain may hold no more than the image has left.
        let needed = self.header.grain.min(self.header.size - content) as usize;
        inflate(&scratch.packed, &mut scratch.plain[..needed], Window::Zlib)
            .map_err(|why| self.corrupt(format!("the grain at offset {start} {why}")))?;
        scratch.key = Some(start);
        Ok(())
    }

    /// Where in the file the grain that holds the byte at `at` starts; `None` for zeros.
    fn grain_at(&self, at: u64, scratch: &mut Scratch) -> Result<Option<u64>> {
        let table = self.directory[(at / self.table_span()) as usize];
        if table == 0 {
            return Ok(None);
        }
        if scratch.table_key != Some(table) {
            scratch.table_key = None;
            scratch.table.resize(self.header.table_entries as usize * 4, 0);
            self.read_at(&mut scratch.table, table, "a grain table")?;
            scratch.table_key = Some(table);
        }
        let entry = (at % self.table_span() / self.header.grain) as usize * 4;
        match le32(&scratch.table, entry) {
            0 => Ok(None),
            1 if self.header.flags & FLAG_ZERO_GRAINS != 0 => Ok(None),
            sector => Ok(Some(u64::from(sector) * SECTOR)),
        }
    }

    /// Refuses an image that is not whole by itself.
    fn check_descriptor(&self) -> Result<()> {
        let range = self.header.descriptor.clone();
        if range.start == 0 || range.is_empty() || range.end - range.start > MAX_DESCRIPTOR {
            return Err(self.unsupported("has no descriptor: it is one extent of a split image"));
        }
        let mut text = vec![0; (range.end - range.start) as usize];
        self.read_at(&mut text, range.start, "its descriptor")?;
        let text = String::from_utf8_lossy(&text);
        let mut extents = 0;
        for line in text.trim_end_matches('\0').lines().map(str::trim) {
            let (key, value) = line.split_once('=').unwrap_or((line, ""));
            match (key.trim(), value.trim().trim_matches('"')) {
                ("parentCID", parent) if !parent.eq_ignore_ascii_case("ffffffff") => {
                    return Err(self.unsupported("stands on a parent image, which is not followed"));
                }
                ("createType", kind) if !matches!(kind, "monolithicSparse" | "streamOptimized") => {
                    let kind: String = kind.chars().take(40).collect();
                    return Err(self.unsupported(&format!("is of type {kind:?}")));
                }
                _ if ["RW ", "RDONLY ", "NOACCESS "]
                    .iter()
                    .any(|access| line.starts_with(access)) =>
                {
                    extents += 1;
                }
                _ => {}
            }
        }
        match extents {
            1 => Ok(()),
            _ => Err(self.unsupported(&format!("has {extents} extents instead of one"))),
        }
    }

    fn read_at(&self, buf: &mut [u8], at: u64, what: &str) -> Result<()> {
        match at.checked_add(buf.len() as u64) {
            Some(end) if end <= self.length => read_exact(&self.file, buf, at, &self.name),
            _ => Err(Error::new(
                Kind::Corrupt,
                format!(
                    "the VMDK image {} is truncated at {} bytes: {what} (offset {at}) is missing; \
                     get it again",
                    self.name, self.length
                ),
            )),
        }
    }

    /// Bytes of content that one grain table maps.
    fn table_span(&self) -> u64 {
        u64::from(self.header.table_entries) * self.header.grain
    }

    fn corrupt(&self, what: String) -> Error {
        Error::new(
            Kind::Corrupt,
            format!("the VMDK image {} is corrupt: {what}; get it again", self.name),
        )
    }

    fn unsupported(&self, what: &str) -> Error {
        Error::new(
            Kind::Unsupported,
            format!(
                "the VMDK image {} {what}: convert it with `qemu-img convert -O qcow2` first",
                self.name
            ),
        )
    }
}

impl Header {
    fn decode(bytes: &[u8; HEADER]) -> Result<Header, (Kind, String)> {
        let le64 = |at: usize| u64::from(le32(bytes, at)) | u64::from(le32(bytes, at + 4)) << 32;
        let sectors = |count: u64| count.checked_mul(SECTOR);
        let corrupt = |why: &str| Err((Kind::Corrupt, format!("is corrupt: {why}; get it again")));
        if !bytes.starts_with(b"KDMV") {
            return Err((Kind::Invalid, "is none: it lacks the magic; try --format auto".into()));
        }
        let version = le32(bytes, 4);
        if !(1..=3).contains(&version) {
            return Err((Kind::Unsupported, format!("has version {version}; 1 to 3 are read")));
        }
        if bytes[73..77] != *b"\n \r\n" {
            return corrupt("it was transferred as text");
        }
        let (Some(size), Some(grain)) = (sectors(le64(12)), sectors(le64(20))) else {
            return corrupt("its size is impossible");
        };
        if size == 0 {
            return Err((Kind::Unsupported, "has no content of its own".into()));
        }
        if size > MAX_IMAGE {
            return Err((Kind::Unsupported, format!("claims {size} bytes; 64 TiB are the most")));
        }
        let table_entries = le32(bytes, 44);
        if !grain.is_power_of_two() || !(4096..=MAX_GRAIN).contains(&grain) {
            return corrupt("its grain size is impossible");
        }
        if table_entries == 0 || table_entries > MAX_TABLE_ENTRIES {
            return corrupt("its grain tables have an impossible size");
        }
        let flags = le32(bytes, 8);
        let method = u16::from_le_bytes([bytes[77], bytes[78]]);
        let packed = flags & FLAG_COMPRESSED != 0;
        if packed && (method != 1 || flags & FLAG_MARKERS == 0) {
            return Err((
                Kind::Unsupported,
                format!("is compressed by the unknown method {method}"),
            ));
        }
        let descriptor = sectors(le64(28)).zip(sectors(le64(36)));
        let Some((start, end)) = descriptor.and_then(|(at, len)| Some((at, at.checked_add(len)?)))
        else {
            return corrupt("its descriptor is nowhere");
        };
        let directory = match le64(56) {
            AT_END => AT_END,
            sector => match sectors(sector) {
                Some(at) => at,
                None => return corrupt("its grain directory is nowhere"),
            },
        };
        Ok(Header { flags, size, grain, descriptor: start..end, table_entries, directory })
    }
}

fn le32(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}
