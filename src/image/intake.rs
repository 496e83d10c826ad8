//! From a source to raw content: what compression is around it, what format it is in, and whether
//! it can be read at any offset or must be taken as it comes.
//!
//! A stream of raw content is imported as it comes. Any other format needs reading at any offset,
//! so a stream of it is first stored in an unlinked file in the directory of the import, where it
//! takes no more space than the disk has and is gone with the process.

use std::{
    fs::{File, OpenOptions},
    io::{self, Cursor, Read},
    os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt},
    path::Path,
    sync::{Arc, atomic::AtomicBool},
};

use nix::fcntl::OFlag;

use super::{
    checksum::is_zero,
    content::{Content, Format, read_exact},
    pipeline::tell_of_full_disk,
    qcow2_header,
    source::{Opened, Source},
    stream::{Compression, HEAD, Incoming, Outcome, Received, Stream, fill, take_head},
};
use crate::{
    catalog::Digest,
    error::{Context, Error, Kind, Result},
};

/// Bytes of a stream stored at a time.
const SPOOL: usize = 1 << 20;

/// A source whose compression and format are known.
pub(super) struct Intake<'a> {
    pub name: String,
    /// Never [`Format::Auto`].
    pub format: Format,
    pub body: Body<'a>,
    /// The source, where it is a file that is read in place.
    pub original: Option<Original>,
}

/// What an import reads.
pub(super) enum Body<'a> {
    /// Content at any offset.
    Content {
        content: Content,
        /// The SHA-256 of the source, where it came as a stream.
        source_sha256: Option<Digest>,
    },
    /// Content from front to back.
    Stream(Decoded<'a>),
}

/// A stream, decompressed.
pub(super) struct Decoded<'a> {
    name: String,
    reader: Box<dyn Read + Send + 'a>,
    compression: Compression,
    outcome: Outcome<'a>,
    /// Its length in bytes, where that is known and nothing is compressed.
    pub length: Option<u64>,
}

/// A file that is read in place, and what tells that it was changed meanwhile.
pub(super) struct Original {
    pub file: File,
    pub length: u64,
    stamp: (i64, i64, u64),
}

impl<'a> Intake<'a> {
    /// Opens `source` and looks at its first bytes.
    pub(super) fn open(
        source: Source,
        format: Format,
        received: Arc<Received>,
        cancel: &'a AtomicBool,
    ) -> Result<Intake<'a>> {
        let name = source.name();
        let stream = match source.open()? {
            Opened::File { file, size } => {
                let mut head = [0; HEAD];
                let held = size.min(HEAD as u64) as usize;
                read_exact(&file, &mut head[..held], 0, &name)?;
                if Compression::detect(&head[..held]) == Compression::None {
                    return Intake::of_file(file, size, format, &head[..held], name);
                }
                let reader = Box::new(FromStart { file, at: 0 });
                let incoming = Incoming { reader, length: Some(size) };
                Stream::start(|| Ok(incoming), &name, received.clone(), cancel)?
            }
            Opened::Stream(open) => Stream::start(open, &name, received.clone(), cancel)?,
        };
        Intake::of_stream(stream, format, &received, name)
    }

    fn of_file(
        file: File,
        length: u64,
        format: Format,
        head: &[u8],
        name: String,
    ) -> Result<Intake<'a>> {
        refuse_empty(head, &name)?;
        let format = if format == Format::Auto { Format::detect(head, &name)? } else { format };
        let kept = file.try_clone().context(|| format!("opening {name}"))?;
        let original = Some(Original::new(kept, length, &name)?);
        let content = Content::open(file, length, format, &name)?;
        Ok(Intake { name, format, body: Body::Content { content, source_sha256: None }, original })
    }

    fn of_stream(
        mut stream: Stream<'a>,
        format: Format,
        received: &Received,
        name: String,
    ) -> Result<Intake<'a>> {
        let outcome = stream.outcome();
        let explain = |compression| {
            let (outcome, name) = (outcome.clone(), name.clone());
            move |error: io::Error| outcome.explain(&name, compression, error)
        };
        let head = take_head(&mut stream).map_err(explain(Compression::None))?;
        refuse_empty(&head, &name)?;
        let compression = Compression::detect(&head);
        let mut decoder =
            compression.decoder(Cursor::new(head).chain(stream)).map_err(explain(compression))?;
        let head = take_head(&mut decoder).map_err(explain(compression))?;
        refuse_empty(&head, &name)?;
        let format = match format {
            Format::Auto if Compression::detect(&head) != Compression::None => {
                return Err(Error::new(
                    Kind::Unsupported,
                    format!(
                        "{name} is compressed twice: unpack it once, or take what is inside as it is \
                         with --format raw"
                    ),
                ));
            }
            Format::Auto => Format::detect(&head, &name)?,
            told => told,
        };
        let length = match (compression, received.total()) {
            (Compression::None, length) => length,
            _ => None,
        };
        let reader = Box::new(Cursor::new(head).chain(decoder));
        let body = Decoded { name: name.clone(), reader, compression, outcome, length };
        Ok(Intake { name, format, body: Body::Stream(body), original: None })
    }

    /// Stores a stream whose format needs it in a nameless file in `dir`. `report` is called now
    /// and then.
    pub(super) fn spool(self, dir: &Path, report: impl Fn()) -> Result<Intake<'a>> {
        let mut decoded = match self.body {
            Body::Stream(decoded) if self.format != Format::Raw => decoded,
            body => return Ok(Intake { body, ..self }),
        };
        let storing = |error| {
            let error = Error::io(format!("storing {} in {}", self.name, dir.display()), error);
            tell_of_full_disk(error, dir, "the whole source and then its content are to fit")
        };
        let file = nameless_file(dir).map_err(storing)?;
        let mut length = 0;
        let mut buf = vec![0; SPOOL];
        loop {
            report();
            let count = decoded.fill(&mut buf)?;
            if count == 0 {
                break;
            }
            if !is_zero(&buf[..count]) {
                file.write_all_at(&buf[..count], length).map_err(storing)?;
            }
            if length == 0 && self.format == Format::Qcow2 {
                // What is refused is refused before all of it was downloaded.
                qcow2_header::Header::read(&file, count as u64, &self.name)?;
            }
            length += count as u64;
        }
        file.set_len(length).map_err(storing)?;
        let source_sha256 = decoded.outcome.digest();
        let content = Content::open(file, length, self.format, &self.name)?;
        let body = Body::Content { content, source_sha256 };
        Ok(Intake { name: self.name, format: self.format, body, original: None })
    }
}

impl Decoded<'_> {
    /// Reads until `buf` is full or the content ends; returns how much there was.
    pub(super) fn fill(&mut self, buf: &mut [u8]) -> Result<usize> {
        fill(&mut self.reader, buf)
            .map_err(|error| self.outcome.explain(&self.name, self.compression, error))
    }

    /// The SHA-256 of the source's bytes, once all of them were read.
    pub(super) fn source_sha256(&self) -> Option<Digest> {
        self.outcome.digest()
    }
}

impl Original {
    fn new(file: File, length: u64, name: &str) -> Result<Original> {
        let stamp = stamp(&file, name)?;
        Ok(Original { file, length, stamp })
    }

    /// Fails if the file was changed since it was opened.
    pub(super) fn check_unchanged(&self, name: &str) -> Result<()> {
        if stamp(&self.file, name)? == self.stamp {
            return Ok(());
        }
        Err(Error::new(
            Kind::Corrupt,
            format!(
                "{name} was changed while it was imported: stop whatever writes to it, \
                 and import it again"
            ),
        ))
    }
}

/// Reads a file from its start, whatever position its descriptor shares with others.
struct FromStart {
    file: File,
    at: u64,
}

impl Read for FromStart {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let count = self.file.read_at(buf, self.at)?;
        self.at += count as u64;
        Ok(count)
    }
}

/// Time of the last change and size. (Block devices keep theirs while they are written to.)
fn stamp(file: &File, name: &str) -> Result<(i64, i64, u64)> {
    let metadata = file.metadata().context(|| format!("examining {name}"))?;
    Ok((metadata.mtime(), metadata.mtime_nsec(), metadata.size()))
}

fn refuse_empty(head: &[u8], name: &str) -> Result<()> {
    if head.is_empty() {
        return Err(Error::new(Kind::Invalid, format!("{name} is empty: it holds no image")));
    }
    Ok(())
}

/// A file in `dir` that has no name, or has lost it at once where the file system needs one.
fn nameless_file(dir: &Path) -> io::Result<File> {
    let mut options = OpenOptions::new();
    options.read(true).write(true).mode(0o600);
    match options.clone().custom_flags(OFlag::O_TMPFILE.bits()).open(dir) {
        Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => {
            let path = dir.join("spool");
            let file = options.create_new(true).open(&path)?;
            std::fs::remove_file(path)?;
            Ok(file)
        }
        opened => opened,
    }
}
