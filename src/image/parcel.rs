//! A device's content as a stream: all of it, or only what an overlay holds and what it stands on. It
//! is how exports leave the daemon, and what `replica export --overlay` writes (docs/FORMAT.md).
//!
//! Invariants:
//! - Pieces come in order and do not overlap; each has a checksum over header and content.
//! - A stream without its end is an error, never a short content.
//! - Whatever a stream claims, a piece takes [`PIECE_MAX`] bytes of memory at most.

use std::io::{Read, Write};

use crate::{
    error::{Context, Error, Kind, Result},
    units::SECTOR,
};

const MAGIC: &[u8; 8] = b"UNDRPARC";
const VERSION: u32 = 1;
const HEADER: usize = 512;
const PIECE: usize = 32;
const NAME_MAX: usize = 128;
const SOURCE_MAX: usize = 300;

const AT_VERSION: usize = 8;
const AT_CRC: usize = 12;
const AT_KIND: usize = 16;
const AT_SIZE: usize = 24;
const AT_IMAGE_SIZE: usize = 32;
const AT_DIGEST: usize = 40;
const AT_NAME: usize = 72;
const AT_SOURCE: usize = AT_NAME + 1 + NAME_MAX;
const _: () = assert!(AT_SOURCE + 2 + SOURCE_MAX <= HEADER);

/// "UPCE", at the head of each piece.
const PIECE_MAGIC: &[u8; 4] = b"UPCE";
const DATA: u32 = 1;
const ZERO: u32 = 2;
const END: u32 = 3;
const FAILED: u32 = 4;

/// Bytes of content that one piece holds at most.
pub const PIECE_MAX: usize = 1 << 20;
/// The largest device, in bytes.
const SIZE_MAX: u64 = 64 << 40;
/// Bytes of the words with which a stream that fails ends.
const WORDS_MAX: usize = 4096;

/// What the pieces are of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// Bytes of the device; with an image below, a multiple of 512.
    pub size: u64,
    /// What the pieces lie over; all else is zeros if there is nothing.
    pub over: Option<Over>,
}

/// The image that an overlay stands on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Over {
    /// Its digest.
    pub digest: [u8; 32],
    /// Its size in bytes.
    pub size: u64,
    /// What it was called.
    pub name: String,
    /// Where it came from.
    pub source: String,
}

/// A piece of content.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Piece {
    /// These bytes, from `offset` on.
    Data {
        /// Where they begin.
        offset: u64,
        /// The bytes.
        bytes: Vec<u8>,
    },
    /// Zeros.
    Zero {
        /// Where they begin.
        offset: u64,
        /// How many.
        len: u64,
    },
}

/// Writes a stream.
pub struct Writer<W> {
    out: W,
    pieces: u64,
    bytes: u64,
}

impl<W: Write> Writer<W> {
    /// Begins a stream.
    pub fn new(mut out: W, header: &Header) -> Result<Writer<W>> {
        out.write_all(&header.encode()).context(|| "writing the export")?;
        Ok(Writer { out, pieces: 0, bytes: 0 })
    }

    /// Adds content: in order, [`PIECE_MAX`] bytes at most.
    pub fn data(&mut self, offset: u64, bytes: &[u8]) -> Result<()> {
        self.bytes += bytes.len() as u64;
        self.piece(DATA, offset, bytes.len() as u64, bytes)
    }

    /// Adds zeros, in order.
    pub fn zero(&mut self, offset: u64, len: u64) -> Result<()> {
        self.piece(ZERO, offset, len, &[])
    }

    /// Ends the stream: it is whole.
    pub fn end(mut self) -> Result<W> {
        let (pieces, bytes) = (self.pieces, self.bytes);
        self.piece(END, pieces, bytes, &[])?;
        self.out.flush().context(|| "writing the export")?;
        Ok(self.out)
    }

    /// Ends the stream, and says why it is not whole.
    pub fn fail(mut self, why: &str) -> Result<()> {
        let words = &why.as_bytes()[..why.floor_char_boundary(WORDS_MAX)];
        self.piece(FAILED, 0, words.len() as u64, words)?;
        self.out.flush().context(|| "writing the export")
    }

    fn piece(&mut self, kind: u32, offset: u64, len: u64, bytes: &[u8]) -> Result<()> {
        let mut head = [0; PIECE];
        head[..4].copy_from_slice(PIECE_MAGIC);
        head[8..12].copy_from_slice(&kind.to_le_bytes());
        head[16..24].copy_from_slice(&offset.to_le_bytes());
        head[24..32].copy_from_slice(&len.to_le_bytes());
        let crc = crc(&head, bytes);
        head[4..8].copy_from_slice(&crc.to_le_bytes());
        self.pieces += 1;
        let written = self.out.write_all(&head).and_then(|()| self.out.write_all(bytes));
        written.context(|| "writing the export")
    }
}

/// Reads a stream that anybody may have written.
pub struct Reader<R> {
    input: R,
    header: Header,
    /// Where the last piece ended.
    at: u64,
    pieces: u64,
    bytes: u64,
}

impl<R: Read> Reader<R> {
    /// Reads a stream's header.
    pub fn new(mut input: R) -> Result<Reader<R>> {
        let mut bytes = [0; HEADER];
        fill(&mut input, &mut bytes)?;
        Ok(Reader { input, header: Header::decode(&bytes)?, at: 0, pieces: 0, bytes: 0 })
    }

    /// What the pieces are of.
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// Bytes of content so far.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// The next piece; `None` when the stream is whole.
    pub fn piece(&mut self) -> Result<Option<Piece>> {
        let mut head = [0; PIECE];
        fill(&mut self.input, &mut head)?;
        if head[..4] != *PIECE_MAGIC || head[12..16] != [0; 4] {
            return Err(damaged("something that is no piece"));
        }
        let (kind, offset, len) = (u32_at(&head, 8), u64_at(&head, 16), u64_at(&head, 24));
        let held = match kind {
            DATA if (1..=PIECE_MAX as u64).contains(&len) => len as usize,
            FAILED if len <= WORDS_MAX as u64 => len as usize,
            ZERO if len > 0 => 0,
            END => 0,
            _ => return Err(damaged("a piece of unknown kind, or too large")),
        };
        let mut bytes = vec![0; held];
        fill(&mut self.input, &mut bytes)?;
        let told = u32_at(&head, 4);
        head[4..8].fill(0);
        if crc(&head, &bytes) != told {
            return Err(damaged("a piece whose checksum is wrong"));
        }
        if kind == FAILED {
            let words: String =
                String::from_utf8_lossy(&bytes).chars().filter(|c| !c.is_control()).collect();
            return Err(Error::new(Kind::Io, words));
        }
        if kind == END {
            return match (offset, len) == (self.pieces, self.bytes) {
                true => Ok(None),
                false => Err(damaged("an end that misses pieces")),
            };
        }
        let end = offset.checked_add(len).filter(|end| *end <= self.header.size);
        let unit = self.header.unit();
        let sectors = offset.is_multiple_of(unit) && len.is_multiple_of(unit);
        let Some(end) = end.filter(|_| offset >= self.at && sectors) else {
            return Err(damaged("a piece out of place"));
        };
        (self.at, self.pieces) = (end, self.pieces + 1);
        Ok(Some(match kind {
            DATA => {
                self.bytes += len;
                Piece::Data { offset, bytes }
            }
            _ => Piece::Zero { offset, len },
        }))
    }
}

impl Header {
    /// What pieces are multiples of, in bytes: an image may have any size.
    fn unit(&self) -> u64 {
        if self.over.is_some() { SECTOR } else { 1 }
    }

    fn encode(&self) -> [u8; HEADER] {
        let mut bytes = [0; HEADER];
        bytes[..8].copy_from_slice(MAGIC);
        bytes[AT_VERSION..][..4].copy_from_slice(&VERSION.to_le_bytes());
        bytes[AT_KIND..][..4].copy_from_slice(&u32::from(self.over.is_some()).to_le_bytes());
        bytes[AT_SIZE..][..8].copy_from_slice(&self.size.to_le_bytes());
        if let Some(over) = &self.over {
            bytes[AT_IMAGE_SIZE..][..8].copy_from_slice(&over.size.to_le_bytes());
            bytes[AT_DIGEST..][..32].copy_from_slice(&over.digest);
            let name = &over.name.as_bytes()[..over.name.floor_char_boundary(NAME_MAX)];
            bytes[AT_NAME] = name.len() as u8;
            bytes[AT_NAME + 1..][..name.len()].copy_from_slice(name);
            let source = &over.source.as_bytes()[..over.source.floor_char_boundary(SOURCE_MAX)];
            bytes[AT_SOURCE..][..2].copy_from_slice(&(source.len() as u16).to_le_bytes());
            bytes[AT_SOURCE + 2..][..source.len()].copy_from_slice(source);
        }
        let crc = crc(&bytes, &[]);
        bytes[AT_CRC..][..4].copy_from_slice(&crc.to_le_bytes());
        bytes
    }

    fn decode(bytes: &[u8; HEADER]) -> Result<Header> {
        if bytes[..8] != *MAGIC {
            return Err(Error::new(Kind::Invalid, "not an export of underlay's: no such magic"));
        }
        let version = u32_at(bytes, AT_VERSION);
        if version != VERSION {
            let what = format!("an export of version {version}, and this build knows {VERSION}");
            return Err(Error::new(Kind::Unsupported, what));
        }
        let mut clean = *bytes;
        clean[AT_CRC..][..4].fill(0);
        if crc(&clean, &[]) != u32_at(bytes, AT_CRC) {
            return Err(damaged("a header whose checksum is wrong"));
        }
        let size = u64_at(bytes, AT_SIZE);
        let text = |at: usize, len: usize, most: usize| {
            let text = (len <= most).then(|| String::from_utf8_lossy(&bytes[at..at + len]));
            // It ends up in messages.
            let plain =
                |text: std::borrow::Cow<str>| text.chars().filter(|c| !c.is_control()).collect();
            text.map(plain).ok_or_else(|| damaged("a text that is too long"))
        };
        let over = match u32_at(bytes, AT_KIND) {
            0 => None,
            1 => {
                let mut digest = [0; 32];
                digest.copy_from_slice(&bytes[AT_DIGEST..][..32]);
                let source =
                    usize::from(u16::from_le_bytes([bytes[AT_SOURCE], bytes[AT_SOURCE + 1]]));
                Some(Over {
                    digest,
                    size: u64_at(bytes, AT_IMAGE_SIZE),
                    name: text(AT_NAME + 1, usize::from(bytes[AT_NAME]), NAME_MAX)?,
                    source: text(AT_SOURCE + 2, source, SOURCE_MAX)?,
                })
            }
            kind => return Err(damaged(&format!("content of unknown kind {kind}"))),
        };
        let header = Header { size, over };
        if size == 0 || size > SIZE_MAX || !size.is_multiple_of(header.unit()) {
            return Err(damaged(&format!("a device of {size} bytes")));
        }
        Ok(header)
    }
}

fn crc(head: &[u8], bytes: &[u8]) -> u32 {
    let mut crc = crc32fast::Hasher::new();
    crc.update(head);
    crc.update(bytes);
    crc.finalize()
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    bytes[at..at + 4].iter().rev().fold(0, |number, byte| number << 8 | u32::from(*byte))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    bytes[at..at + 8].iter().rev().fold(0, |number, byte| number << 8 | u64::from(*byte))
}

fn fill(input: &mut impl Read, bytes: &mut [u8]) -> Result<()> {
    input.read_exact(bytes).map_err(|error| match error.kind() {
        std::io::ErrorKind::UnexpectedEof => damaged("less than all of it: it ends early"),
        _ => Error::io("reading the export", error),
    })
}

fn damaged(what: &str) -> Error {
    Error::new(Kind::Corrupt, format!("the export holds {what}: make it again"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Vec<u8> {
        let over = Over {
            digest: [7; 32],
            size: 8192,
            name: "debian".into(),
            source: "https://example.org/ä".repeat(30),
        };
        let header = Header { size: 1 << 20, over: Some(over) };
        let mut writer = Writer::new(Vec::new(), &header).unwrap();
        writer.data(512, &[1; 1024]).unwrap();
        writer.zero(4096, 8192).unwrap();
        writer.data((1 << 20) - 512, &[2; 512]).unwrap();
        writer.end().unwrap()
    }

    fn read(bytes: &[u8]) -> Result<(Header, Vec<Piece>)> {
        let mut reader = Reader::new(bytes)?;
        let mut pieces = Vec::new();
        while let Some(piece) = reader.piece()? {
            pieces.push(piece);
        }
        Ok((reader.header().clone(), pieces))
    }

    /// The bytes of version 1 are a promise: this test pins them.
    #[test]
    fn the_format_is_pinned() {
        assert!(sample() == include_bytes!("../../tests/fixtures/parcel-v1.bin"));
    }

    #[test]
    fn what_was_written_is_read() {
        let (header, pieces) = read(&sample()).unwrap();
        let over = header.over.unwrap();
        assert_eq!(
            (header.size, over.size, over.digest, &*over.name),
            (1 << 20, 8192, [7; 32], "debian")
        );
        assert!(over.source.starts_with("https://example.org/ä") && over.source.len() <= 300);
        assert_eq!(pieces[0], Piece::Data { offset: 512, bytes: vec![1; 1024] });
        assert_eq!(pieces[1], Piece::Zero { offset: 4096, len: 8192 });
        assert_eq!(pieces.len(), 3);
    }

    #[test]
    fn whatever_a_stream_holds_it_is_read_whole_or_refused() {
        let good = sample();
        for len in 0..good.len() {
            assert!(read(&good[..len]).is_err(), "cut at {len}");
        }
        for at in 0..good.len() {
            let mut bytes = good.clone();
            bytes[at] ^= 0x10;
            assert!(read(&bytes).is_err(), "byte {at}");
        }
        let over = Over { digest: [0; 32], size: 0, name: String::new(), source: String::new() };
        let header = Header { size: 4096, over: Some(over) };
        for (offset, len) in [(0, 512), (3584, 1024), (512, 511), (513, 512), (u64::MAX - 511, 512)]
        {
            let mut bytes = Vec::new();
            let mut writer = Writer::new(&mut bytes, &header).unwrap();
            writer.data(0, &[1; 512]).unwrap();
            writer.zero(offset, len).unwrap();
            writer.end().unwrap();
            assert_eq!(read(&bytes).unwrap_err().kind(), Kind::Corrupt, "{offset}, {len}");
        }
    }

    #[test]
    fn a_failure_is_told() {
        let mut bytes = Vec::new();
        let writer = Writer::new(&mut bytes, &Header { size: 4096, over: None }).unwrap();
        writer.fail("the disk has gone").unwrap();
        assert!(read(&bytes).unwrap_err().to_string().contains("the disk has gone"));
    }
}
