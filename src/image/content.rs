//! The raw content of an image file that can be read at any offset, whatever its format.

use std::{fs::File, ops::Range, os::unix::fs::FileExt, str::FromStr};

use super::{MAX_IMAGE, qcow2::Qcow2, vmdk::Vmdk};
use crate::{
    error::{Context, Error, Kind, Result},
    io::holes,
    units::{SECTOR, round_up},
};

/// What a source's bytes are, once any compression around them is taken off.
#[derive(
    Clone,
    Copy,
    Debug,
    Default,
    PartialEq,
    Eq,
    serde::Serialize,
    serde::Deserialize,
    utoipa::ToSchema,
)]
#[serde(rename_all = "lowercase")]
pub enum Format {
    /// Told by the first bytes; what no format is known by is raw.
    #[default]
    Auto,
    /// The bytes are the content.
    Raw,
    /// QEMU's copy-on-write format, version 2 or 3.
    Qcow2,
    /// VMware's, in one file: monolithicSparse or streamOptimized.
    Vmdk,
}

/// An image file opened for reading at any offset.
pub(super) enum Content {
    Raw(RawFile),
    Qcow2(Qcow2),
    Vmdk(Vmdk),
}

/// A raw image file.
pub(super) struct RawFile {
    file: File,
    name: String,
    size: u64,
}

/// What a reader of a [`Content`] keeps between reads; each thread has its own.
#[derive(Default)]
pub(super) struct Scratch {
    /// The cluster or grain in `plain`, by where its compressed data starts.
    pub key: Option<u64>,
    pub packed: Vec<u8>,
    pub plain: Vec<u8>,
    /// A table of the image's, as read, and where it starts.
    pub table: Vec<u8>,
    pub table_key: Option<u64>,
}

impl Content {
    /// Opens `file`, `length` bytes long; `format` is not [`Format::Auto`].
    pub(super) fn open(file: File, length: u64, format: Format, name: &str) -> Result<Content> {
        let content = match format {
            Format::Auto | Format::Raw => {
                Content::Raw(RawFile { file, name: name.to_owned(), size: length })
            }
            Format::Qcow2 => Content::Qcow2(Qcow2::open(file, length, name)?),
            Format::Vmdk => Content::Vmdk(Vmdk::open(file, length, name)?),
        };
        padded_size(content.size(), name)?;
        Ok(content)
    }

    /// The size of the content in bytes, before it is padded to whole sectors.
    pub(super) fn size(&self) -> u64 {
        match self {
            Content::Raw(raw) => raw.size,
            Content::Qcow2(qcow2) => qcow2.size(),
            Content::Vmdk(vmdk) => vmdk.size(),
        }
    }

    /// The next range at or after `offset` that may hold anything but zeros; `None` when there is
    /// none. An empty range past `offset` says that there is nothing before it: looking through
    /// one table at a time, a caller can give up in between.
    pub(super) fn next_data(
        &self,
        offset: u64,
        scratch: &mut Scratch,
    ) -> Result<Option<Range<u64>>> {
        match self {
            Content::Raw(raw) => holes::next_data(&raw.file, offset, raw.size)
                .context(|| format!("looking for data in {}", raw.name)),
            Content::Qcow2(qcow2) => qcow2.next_data(offset, scratch),
            Content::Vmdk(vmdk) => vmdk.next_data(offset, scratch),
        }
    }

    /// Fills `buf` with the content from `offset`; past its end come zeros.
    pub(super) fn read(&self, offset: u64, buf: &mut [u8], scratch: &mut Scratch) -> Result<()> {
        let held = self.size().saturating_sub(offset).min(buf.len() as u64) as usize;
        let (content, rest) = buf.split_at_mut(held);
        rest.fill(0);
        match self {
            Content::Raw(raw) => read_exact(&raw.file, content, offset, &raw.name),
            Content::Qcow2(qcow2) => qcow2.read(offset, content, scratch),
            Content::Vmdk(vmdk) => vmdk.read(offset, content, scratch),
        }
    }
}

impl Format {
    /// What the first bytes of a file say that it is. Formats that are not read here are errors, so
    /// that nobody boots from the container of an image; `--format raw` takes them as they are.
    pub(super) fn detect(head: &[u8], name: &str) -> Result<Format> {
        /// (offset, magic, what it is, how to get at the image inside)
        const FOREIGN: [(usize, &[u8], &str, &str); 12] = [
            (0, b"vhdxfile", "a VHDX image", CONVERT),
            (0, b"conectix", "a VHD image", CONVERT),
            (0x40, &[0x7f, 0x10, 0xda, 0xbe], "a VDI image", CONVERT),
            (0, b"QED\0", "a QED image", CONVERT),
            (0, b"COWD", "an ESX sparse VMDK", CONVERT),
            (0, b"WithoutFreeSpace", "a Parallels image", CONVERT),
            (0, b"BZh", "bzip2 data", UNPACK),
            (0, b"PK\x03\x04", "a zip archive", UNPACK),
            (0, b"7z\xbc\xaf\x27\x1c", "a 7z archive", UNPACK),
            (0, &[0x04, 0x22, 0x4d, 0x18], "lz4 data", UNPACK),
            (257, b"ustar", "a tar archive (an OVA is one)", UNPACK),
            (0, b"<!DOCTYPE", "an HTML page", "check the URL"),
        ];
        const CONVERT: &str = "convert it with `qemu-img convert -O qcow2` first";
        const UNPACK: &str = "unpack it first";

        match head {
            [b'Q', b'F', b'I', 0xfb, ..] => return Ok(Format::Qcow2),
            [b'K', b'D', b'M', b'V', ..] => return Ok(Format::Vmdk),
            _ if head.starts_with(b"# Disk DescriptorFile") => return Ok(Format::Vmdk),
            _ => {}
        }
        for (at, magic, what, remedy) in FOREIGN {
            if head.get(at..).is_some_and(|rest| rest.starts_with(magic)) {
                return Err(Error::new(
                    Kind::Unsupported,
                    format!("{name} is {what}: {remedy}, or take it as it is with --format raw"),
                ));
            }
        }
        Ok(Format::Raw)
    }
}

impl FromStr for Format {
    type Err = Error;

    fn from_str(text: &str) -> Result<Format> {
        match text {
            "auto" => Ok(Format::Auto),
            "raw" => Ok(Format::Raw),
            "qcow2" => Ok(Format::Qcow2),
            "vmdk" => Ok(Format::Vmdk),
            _ => Err(Error::new(
                Kind::Invalid,
                format!("format {text:?} is not known: it is auto, raw, qcow2 or vmdk"),
            )),
        }
    }
}

/// `size` padded to whole sectors, if an image may have it.
pub(super) fn padded_size(size: u64, name: &str) -> Result<u64> {
    match round_up(size, SECTOR) {
        Some(0) => Err(Error::new(Kind::Invalid, format!("{name} is empty: it holds no image"))),
        Some(padded) if padded <= MAX_IMAGE => Ok(padded),
        _ => Err(Error::new(
            Kind::Unsupported,
            format!("{name} holds {size} bytes; images of more than 64 TiB are not served"),
        )),
    }
}

/// Reads all of `buf` at `offset` of `file`.
pub(super) fn read_exact(file: &File, buf: &mut [u8], offset: u64, name: &str) -> Result<()> {
    file.read_exact_at(buf, offset).map_err(|error| match error.kind() {
        std::io::ErrorKind::UnexpectedEof => Error::new(
            Kind::Corrupt,
            format!(
                "{name} ends before byte {}: it is truncated, or it was changed while it was read",
                offset + buf.len() as u64
            ),
        ),
        _ => Error::io(format!("reading {name} at offset {offset}"), error),
    })
}
