//! Reading qcow2 images, versions 2 and 3: header, tables, plain, zero and compressed clusters
//! (zlib, zstd), subclusters. Internal snapshots are ignored: the active state is the image.
//!
//! Read here rather than by a library because of what must be refused: the one at hand reads what a
//! truncated file has lost as zeros, checks neither encryption nor the size of the tables that it
//! allocates, and knows neither zstd nor subclusters. It serves as a second opinion in the tests.
//!
//! Invariants:
//! - No other file is opened: backing files and external data files are refused at the header.
//! - Every offset is checked against the file's length before anything is read: what lies past the
//!   end is an error, never zeros.
//! - Memory is bounded by the format's own limits: an L1 table of 32 MiB, an L2 table and a cluster
//!   of 2 MiB, for each reader.

use std::{fs::File, ops::Range};

use super::{
    content::{Scratch, read_exact},
    qcow2_header::{Compression, Header},
};
use crate::{
    error::{Context, Error, Kind, Result},
    io::holes,
};

/// Bits 9 to 55 of an L1 or L2 entry: where the table or cluster starts.
const OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;
const COMPRESSED: u64 = 1 << 62;
/// In an L2 entry of version 3: the cluster reads as zeros.
const ZERO: u64 = 1;

/// An open qcow2 image.
pub(super) struct Qcow2 {
    file: File,
    name: String,
    length: u64,
    header: Header,
    /// Offsets of the L2 tables; 0 where there is none.
    l1: Vec<u64>,
}

/// Where a cluster's content is.
enum Cluster {
    /// It reads as zeros.
    Zeros,
    /// At this offset of the file.
    Plain(u64),
    /// In part at this offset of the file: bit `i` tells whether subcluster `i` is.
    Partial(u64, u32),
    /// Compressed, in this range of the file.
    Packed(Range<u64>),
}

impl Qcow2 {
    /// Opens the image in `file`, which is `length` bytes long; `name` stands for it in errors.
    pub(super) fn open(file: File, length: u64, name: &str) -> Result<Qcow2> {
        let header = Header::read(&file, length, name)?;
        let mut image = Qcow2 { file, name: name.to_owned(), length, header, l1: Vec::new() };
        let tables = image.header.size.div_ceil(image.table_span());
        let Some(bytes) = tables.checked_mul(8).filter(|bytes| *bytes <= Header::MAX_L1_BYTES)
        else {
            return Err(image.corrupt("its size needs an L1 table of more than 32 MiB".into()));
        };
        let mut table = vec![0; bytes as usize];
        image.read_table(&mut table, image.header.l1_offset, "its L1 table")?;
        image.l1 = table.chunks_exact(8).map(|entry| be64(entry) & OFFSET_MASK).collect();
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
        let mut at = offset;
        while at < self.header.size {
            let span = self.table_span();
            let table_start = at / span * span;
            if self.l1[(at / span) as usize] == 0 {
                at = table_start.saturating_add(span);
                continue;
            }
            self.load_table(table_start, scratch)?;
            let table_end = table_start.saturating_add(span).min(self.header.size);
            while at < table_end {
                let run = self.run_at(at, table_end, &scratch.table)?;
                if !run.data.is_empty() {
                    return Ok(Some(run.data));
                }
                at = run.end;
            }
            return Ok(Some(table_end..table_end));
        }
        Ok(None)
    }

    /// Fills `buf` with the content from `offset`, all of it within the image.
    pub(super) fn read(&self, offset: u64, buf: &mut [u8], scratch: &mut Scratch) -> Result<()> {
        let cluster_size = self.header.cluster_size();
        let end = offset + buf.len() as u64;
        let mut at = offset;
        // Plain clusters that follow each other in the file too are read at once.
        let mut pending: Option<(u64, Range<usize>)> = None;
        while at < end {
            let cluster = self.cluster(at, scratch)?;
            let stop = (at / cluster_size + 1).saturating_mul(cluster_size).min(end);
            let part = (at - offset) as usize..(stop - offset) as usize;
            let within = at % cluster_size;
            if let Cluster::Plain(start) = cluster {
                match &mut pending {
                    Some((from, run)) if *from + run.len() as u64 == start + within => {
                        run.end = part.end;
                    }
                    _ => {
                        self.read_pending(pending.take(), buf)?;
                        pending = Some((start + within, part));
                    }
                }
            } else {
                self.read_pending(pending.take(), buf)?;
                self.read_cluster(&cluster, at, &mut buf[part], scratch)?;
            }
            at = stop;
        }
        self.read_pending(pending, buf)
    }

    fn read_pending(&self, pending: Option<(u64, Range<usize>)>, buf: &mut [u8]) -> Result<()> {
        match pending {
            Some((from, run)) => read_exact(&self.file, &mut buf[run], from, &self.name),
            None => Ok(()),
        }
    }

    /// Fills `buf` with the content at `at`, all of it in `cluster`.
    fn read_cluster(
        &self,
        cluster: &Cluster,
        at: u64,
        buf: &mut [u8],
        scratch: &mut Scratch,
    ) -> Result<()> {
        let within = (at % self.header.cluster_size()) as usize;
        match cluster {
            Cluster::Zeros => buf.fill(0),
            Cluster::Plain(start) => {
                read_exact(&self.file, buf, start + within as u64, &self.name)?;
            }
            Cluster::Partial(start, held) => {
                let sub = self.header.cluster_size() as usize / 32;
                let mut done = 0;
                while done < buf.len() {
                    let position = within + done;
                    let stop = ((position / sub + 1) * sub - within).min(buf.len());
                    let part = &mut buf[done..stop];
                    if held >> (position / sub) & 1 == 1 {
                        read_exact(&self.file, part, start + position as u64, &self.name)?;
                    } else {
                        part.fill(0);
                    }
                    done = stop;
                }
            }
            Cluster::Packed(range) => {
                if scratch.key != Some(range.start) {
                    self.unpack(range.clone(), scratch)?;
                }
                buf.copy_from_slice(&scratch.plain[within..within + buf.len()]);
            }
        }
        Ok(())
    }

    /// Decompresses the cluster in `range` of the file into `scratch.plain`.
    fn unpack(&self, range: Range<u64>, scratch: &mut Scratch) -> Result<()> {
        scratch.key = None;
        // The length is kept in whole sectors, so that the last one may end past the file.
        let end = range.end.min(self.length);
        scratch.packed.resize((end - range.start) as usize, 0);
        read_exact(&self.file, &mut scratch.packed, range.start, &self.name)?;
        scratch.plain.resize(self.header.cluster_size() as usize, 0);
        let outcome = match self.header.compression {
            Compression::Zlib => inflate(&scratch.packed, &mut scratch.plain, Window::Raw),
            Compression::Zstd => decompress_zstd(&scratch.packed, &mut scratch.plain),
        };
        if let Err(why) = outcome {
            let what = format!("the compressed cluster at offset {} {why}", range.start);
            return Err(if range.end > self.length {
                self.truncated(what)
            } else {
                self.corrupt(what)
            });
        }
        scratch.key = Some(range.start);
        Ok(())
    }

    /// Where the cluster that holds the byte at `at` is.
    fn cluster(&self, at: u64, scratch: &mut Scratch) -> Result<Cluster> {
        let span = self.table_span();
        if self.l1[(at / span) as usize] == 0 {
            return Ok(Cluster::Zeros);
        }
        self.load_table(at / span * span, scratch)?;
        self.decode(at, &scratch.table)
    }

    /// What the L2 table `table` says of the cluster that holds the byte at `at`.
    fn decode(&self, at: u64, table: &[u8]) -> Result<Cluster> {
        let header = &self.header;
        let cluster_size = header.cluster_size();
        let start_of_cluster = at / cluster_size * cluster_size;
        let index = (start_of_cluster % self.table_span() / cluster_size) as usize;
        let entry = &table[index * header.entry_size()..][..header.entry_size()];
        let word = be64(entry);
        if word & COMPRESSED != 0 {
            let range = header.packed_range(word);
            return if range.start < self.length {
                Ok(Cluster::Packed(range))
            } else {
                Err(self.truncated(format!("its compressed cluster for byte {at} is missing")))
            };
        }
        let start = word & OFFSET_MASK;
        let cluster = if header.subclusters {
            let bits = be64(&entry[8..]);
            let (held, zeros) = (bits as u32, (bits >> 32) as u32);
            match (start, held) {
                _ if held & zeros != 0 => {
                    return Err(self.corrupt(format!("its subclusters for byte {at} contradict")));
                }
                (_, 0) => Cluster::Zeros,
                (0, _) => {
                    return Err(self.corrupt(format!("its subclusters for byte {at} are nowhere")));
                }
                (_, u32::MAX) => Cluster::Plain(start),
                _ => Cluster::Partial(start, held),
            }
        } else if word & ZERO != 0 {
            if header.version < 3 {
                return Err(self.corrupt(format!("it has a zero cluster (byte {at}) in version 2")));
            }
            Cluster::Zeros
        } else if start == 0 {
            Cluster::Zeros
        } else {
            Cluster::Plain(start)
        };
        if let Cluster::Plain(_) | Cluster::Partial(..) = cluster {
            if !start.is_multiple_of(cluster_size) {
                return Err(self.corrupt(format!("its cluster for byte {at} is misaligned")));
            }
            let needed = match cluster {
                Cluster::Partial(_, held) => {
                    (32 - u64::from(held.leading_zeros())) * (cluster_size / 32)
                }
                _ => cluster_size,
            };
            // The last cluster need not be whole where the image ends before it does.
            let needed = needed.min(header.size - start_of_cluster);
            if start + needed > self.length {
                return Err(self.truncated(format!("its cluster for byte {at} is missing")));
            }
        }
        Ok(cluster)
    }

    /// The clusters from `at` on, up to `end`, that are alike: data that lies in one piece in the
    /// file, or zeros. Of data, what the file system says is a hole doesn't count.
    fn run_at(&self, at: u64, end: u64, table: &[u8]) -> Result<Run> {
        let cluster_size = self.header.cluster_size();
        let first_cluster = at / cluster_size * cluster_size;
        let first = self.decode(at, table)?;
        let mut stop = first_cluster.saturating_add(cluster_size).min(end);
        while stop < end {
            let next = self.decode(stop, table)?;
            let alike = match (&first, &next) {
                (Cluster::Zeros, Cluster::Zeros) | (Cluster::Packed(_), Cluster::Packed(_)) => true,
                (Cluster::Plain(start), Cluster::Plain(next)) => {
                    *next == start + (stop - first_cluster)
                }
                _ => false,
            };
            if !alike {
                break;
            }
            stop = stop.saturating_add(cluster_size).min(end);
        }
        let data = match first {
            Cluster::Zeros => at..at,
            Cluster::Plain(start) => {
                let shift = start.wrapping_sub(first_cluster);
                let (from, to) = (at.wrapping_add(shift), stop.wrapping_add(shift));
                let held = holes::next_data(&self.file, from, to.min(self.length))
                    .context(|| format!("looking for data in {}", self.name))?;
                match held {
                    Some(held) => held.start.wrapping_sub(shift)..held.end.wrapping_sub(shift),
                    None => at..at,
                }
            }
            Cluster::Partial(..) | Cluster::Packed(_) => at..stop,
        };
        Ok(Run { data, end: stop })
    }

    /// Has the L2 table for the content from `table_start` in `scratch.table`.
    fn load_table(&self, table_start: u64, scratch: &mut Scratch) -> Result<()> {
        let at = self.l1[(table_start / self.table_span()) as usize];
        if scratch.table_key == Some(at) {
            return Ok(());
        }
        scratch.table_key = None;
        if !at.is_multiple_of(self.header.cluster_size()) {
            return Err(self.corrupt(format!("its L2 table for byte {table_start} is misaligned")));
        }
        scratch.table.resize(self.header.cluster_size() as usize, 0);
        self.read_table(&mut scratch.table, at, "an L2 table")?;
        scratch.table_key = Some(at);
        Ok(())
    }

    fn read_table(&self, table: &mut [u8], at: u64, what: &str) -> Result<()> {
        match at.checked_add(table.len() as u64) {
            Some(end) if end <= self.length => read_exact(&self.file, table, at, &self.name),
            _ => Err(self.truncated(format!("{what} (offset {at}) is missing"))),
        }
    }

    /// Bytes of content that one L2 table maps.
    fn table_span(&self) -> u64 {
        let cluster_size = self.header.cluster_size();
        cluster_size / self.header.entry_size() as u64 * cluster_size
    }

    fn corrupt(&self, what: String) -> Error {
        Error::new(
            Kind::Corrupt,
            format!(
                "the qcow2 image {} is corrupt: {what}; get it again, or see `qemu-img check`",
                self.name
            ),
        )
    }

    fn truncated(&self, what: String) -> Error {
        Error::new(
            Kind::Corrupt,
            format!(
                "the qcow2 image {} is truncated at {} bytes: {what}; get it again",
                self.name, self.length
            ),
        )
    }
}

/// Like clusters: what of them to read, empty for none, and where they end.
struct Run {
    data: Range<u64>,
    end: u64,
}

/// What surrounds deflated data.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Window {
    /// Nothing.
    Raw,
    /// A zlib header and checksum.
    Zlib,
}

/// Fills `plain` from deflated data, which may be followed by padding.
pub(super) fn inflate(packed: &[u8], plain: &mut [u8], window: Window) -> Result<(), String> {
    let mut decoder = flate2::Decompress::new(window == Window::Zlib);
    let status = decoder
        .decompress(packed, plain, flate2::FlushDecompress::Finish)
        .map_err(|error| format!("cannot be decompressed ({error})"))?;
    if decoder.total_out() != plain.len() as u64 {
        return Err(format!("is short of data ({status:?})"));
    }
    Ok(())
}

fn decompress_zstd(packed: &[u8], plain: &mut [u8]) -> Result<(), String> {
    use zstd::stream::raw::{Decoder, InBuffer, Operation, OutBuffer};
    let failed = |error: std::io::Error| format!("cannot be decompressed ({error})");
    let wanted = plain.len();
    let mut decoder = Decoder::new().map_err(failed)?;
    let mut input = InBuffer::around(packed);
    let mut output = OutBuffer::around(plain);
    while output.pos() < wanted {
        let before = (input.pos(), output.pos());
        decoder.run(&mut input, &mut output).map_err(failed)?;
        if (input.pos(), output.pos()) == before {
            return Err("is short of data".into());
        }
    }
    Ok(())
}

fn be64(bytes: &[u8]) -> u64 {
    bytes[..8].iter().fold(0, |value, byte| value << 8 | u64::from(*byte))
}
