//! `underlay replica export` and `underlay image export`: content into files.
//!
//! The daemon sends pieces of content; what becomes of them is decided here. A file appears under its
//! name when it is whole.

use std::{
    ffi::OsString,
    fs::{self, File},
    io::{self, BufWriter, IsTerminal, Read, Write},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

use clap::{Args, ValueEnum};
use serde::Serialize;

use super::{Setting, out::Meter, size};
use crate::{
    control::{client::Client, event::Progress},
    error::{Context, Error, Kind, Result},
    image::{
        parcel::{Header, Piece, Reader, Writer},
        qcow2_write,
    },
    units::{BLOCK, SECTOR},
};

/// Where an export goes.
#[derive(Debug, Args)]
pub struct Target {
    /// The file, which is replaced; - for standard output.
    #[arg(default_value = "-")]
    file: PathBuf,
    /// What the file is to be; qcow2 needs a file.
    #[arg(long, default_value = "raw")]
    format: ExportFormat,
}

/// What an export is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum ExportFormat {
    /// The content as it is, with holes where there are zeros.
    Raw,
    /// A qcow2 image, version 3, that stands alone.
    Qcow2,
    /// What the daemon sends: an overlay to be imported again.
    #[value(skip)]
    Overlay,
}

/// What was exported.
#[derive(Debug, Serialize)]
struct Exported {
    file: PathBuf,
    format: ExportFormat,
    size: u64,
    content_bytes: u64,
}

impl Target {
    /// An export of an overlay to `file`.
    pub fn overlay(file: PathBuf) -> Target {
        Target { file, format: ExportFormat::Overlay }
    }

    /// Fetches what is at `path` of the API, and shows what was written.
    pub async fn fetch(self, client: &Client, path: &str, setting: &Setting) -> Result<()> {
        self.check()?;
        let content = client.download(path).await?;
        let to_file = self.file != Path::new("-");
        let written = tokio::task::spawn_blocking(move || self.write(content)).await;
        let exported =
            written.map_err(|error| Error::new(Kind::Io, format!("an export died: {error}")))??;
        if to_file {
            setting.show(&exported, |it| {
                let (size, bytes) = (size::format(it.size), size::format(it.content_bytes));
                format!("{}: {bytes} of content, a device of {size}\n", it.file.display())
            })?;
        }
        Ok(())
    }

    /// Refuses what can't be, before anything is asked for.
    fn check(&self) -> Result<()> {
        if self.file != Path::new("-") {
            return Ok(());
        }
        if self.format == ExportFormat::Qcow2 {
            let what = "a qcow2 image is not written in order: name a file, not standard output";
            return Err(Error::new(Kind::Invalid, what));
        }
        if io::stdout().is_terminal() {
            let what = "the content would go to the terminal: name a file, or give - and a pipe";
            return Err(Error::new(Kind::Invalid, what));
        }
        Ok(())
    }

    fn write(self, content: impl Read) -> Result<Exported> {
        let reader = Reader::new(content)?;
        let size = reader.header().size;
        let what = || format!("writing {}", self.file.display());
        let in_place = fs::metadata(&self.file).is_ok_and(|there| !there.is_file());
        let content_bytes = if self.file == Path::new("-") {
            pour(reader, self.format, io::stdout().lock())?
        } else if in_place {
            // A device, or a pipe.
            let file = File::options().write(true).open(&self.file).context(what)?;
            pour(reader, self.format, file)?
        } else {
            let part = self.part();
            let written = File::create(&part).context(what).and_then(|file| {
                let bytes = match self.format {
                    ExportFormat::Raw => sparse(reader, &file)?,
                    ExportFormat::Qcow2 => qcow2(reader, &file)?,
                    ExportFormat::Overlay => pour(reader, self.format, &file)?,
                };
                file.sync_all().context(what)?;
                fs::rename(&part, &self.file).context(what)?;
                Ok(bytes)
            });
            written.inspect_err(|_| drop(fs::remove_file(&part)))?
        };
        Ok(Exported { file: self.file, format: self.format, size, content_bytes })
    }

    /// What the file is called until it is whole.
    fn part(&self) -> PathBuf {
        let mut name = self.file.file_name().map_or_else(OsString::new, OsString::from);
        name.push(".part");
        self.file.with_file_name(name)
    }
}

/// Takes pieces until the stream is whole, and tells how far it is; bytes of content.
fn each<R: Read>(mut reader: Reader<R>, mut take: impl FnMut(Piece) -> Result<()>) -> Result<u64> {
    let mut meter = Meter::for_people();
    let size = reader.header().size;
    while let Some(piece) = reader.piece()? {
        let (Piece::Data { offset, .. } | Piece::Zero { offset, .. }) = &piece;
        meter.show(Progress {
            phase: "exporting".to_owned(),
            done_bytes: *offset,
            total_bytes: Some(size),
            source_bytes: reader.bytes(),
        });
        take(piece)?;
    }
    Ok(reader.bytes())
}

/// Into a new file, with holes where there are zeros.
fn sparse(reader: Reader<impl Read>, file: &File) -> Result<u64> {
    file.set_len(reader.header().size).context(what)?;
    each(reader, |piece| {
        let Piece::Data { offset, bytes } = piece else { return Ok(()) };
        let (mut at, mut rest) = (offset, &bytes[..]);
        while !rest.is_empty() {
            let is_zero = |block: &[u8]| block.iter().all(|byte| *byte == 0);
            let mut blocks = rest.chunks(BLOCK as usize);
            let zeros: usize =
                blocks.by_ref().take_while(|block| is_zero(block)).map(<[u8]>::len).sum();
            let blocks = rest[zeros..].chunks(BLOCK as usize);
            let data: usize = blocks.take_while(|block| !is_zero(block)).map(<[u8]>::len).sum();
            file.write_all_at(&rest[zeros..zeros + data], at + zeros as u64).context(what)?;
            (at, rest) = (at + (zeros + data) as u64, &rest[zeros + data..]);
        }
        Ok(())
    })
}

fn qcow2(reader: Reader<impl Read>, file: &File) -> Result<u64> {
    let size = reader.header().size.next_multiple_of(SECTOR);
    let mut writer = qcow2_write::Writer::new(BufWriter::new(file), size);
    let bytes = each(reader, |piece| match piece {
        Piece::Data { offset, bytes } => writer.write(offset, &bytes),
        Piece::Zero { .. } => Ok(()),
    })?;
    writer.end()?;
    Ok(bytes)
}

/// In order, with zeros for zeros.
fn pour(reader: Reader<impl Read>, format: ExportFormat, out: impl Write) -> Result<u64> {
    let header: Header = reader.header().clone();
    let mut out = BufWriter::with_capacity(1 << 20, out);
    if format == ExportFormat::Overlay {
        let mut writer = Writer::new(out, &header)?;
        let bytes = each(reader, |piece| match piece {
            Piece::Data { offset, bytes } => writer.data(offset, &bytes),
            Piece::Zero { offset, len } => writer.zero(offset, len),
        })?;
        writer.end()?;
        return Ok(bytes);
    }
    let mut at = 0;
    let bytes = each(reader, |piece| {
        if let Piece::Data { offset, bytes } = piece {
            zeros(&mut out, offset - at)?;
            out.write_all(&bytes).context(what)?;
            at = offset + bytes.len() as u64;
        }
        Ok(())
    })?;
    zeros(&mut out, header.size - at)?;
    out.flush().context(what)?;
    Ok(bytes)
}

fn zeros(out: &mut impl Write, len: u64) -> Result<()> {
    io::copy(&mut io::repeat(0).take(len), out).map(drop).context(what)
}

fn what() -> &'static str {
    "writing the export"
}
