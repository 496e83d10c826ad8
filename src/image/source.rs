//! Where an image comes from: a file, standard input, a URL, or a stream that a caller hands in.

use std::{
    fmt,
    fs::{File, OpenOptions},
    io::{Read, Seek, SeekFrom},
    os::{
        fd::AsFd,
        unix::fs::{FileTypeExt, OpenOptionsExt},
    },
    path::PathBuf,
};

use nix::fcntl::OFlag;

use super::{fetch, stream::Incoming};
use crate::error::{Context, Error, Kind, Result};

/// Where the bytes of an image come from.
pub enum Source {
    /// A file, a block device or a pipe with a path.
    Path(PathBuf),
    /// Standard input of this process.
    Stdin,
    /// An http or https URL.
    Url(String),
    /// An open file; read from its start whatever its position, unless it is a pipe.
    File {
        /// How it is called in errors and records.
        name: String,
        /// Opened for reading.
        file: File,
    },
    /// Bytes that the caller delivers.
    Stream {
        /// How it is called in errors and records.
        name: String,
        /// Read to its end on a thread of its own, which a blocked read outlives an import by.
        reader: Box<dyn Read + Send>,
        /// How many bytes there will be, if that is known; anything else is an error.
        length: Option<u64>,
    },
}

/// How an opened source can be read.
pub(super) enum Opened {
    /// At any offset: `size` bytes of a regular file or block device.
    File { file: File, size: u64 },
    /// From front to back.
    Stream(Box<dyn FnOnce() -> Result<Incoming> + Send>),
}

impl Source {
    /// Reads a source as it is given on a command line: `-`, a URL, or a path.
    pub fn parse(text: &str) -> Result<Source> {
        let scheme = text.split_once("://").map(|(scheme, _)| scheme.to_ascii_lowercase());
        match scheme.as_deref() {
            _ if text.is_empty() => {
                Err(Error::new(Kind::Invalid, "the source is empty: give a path, a URL or -"))
            }
            _ if text == "-" => Ok(Source::Stdin),
            Some("http" | "https") => Ok(Source::Url(text.to_owned())),
            Some(scheme) if scheme.bytes().all(|b| b.is_ascii_alphanumeric()) => Err(Error::new(
                Kind::Unsupported,
                format!(
                    "sources of scheme {scheme:?} are not supported: give a path, - or an \
                     http(s) URL"
                ),
            )),
            _ => Ok(Source::Path(PathBuf::from(text))),
        }
    }

    /// How the source is called in errors and records: a path, a URL without secrets, or a name;
    /// on one line, whatever is in it.
    pub fn name(&self) -> String {
        let name = match self {
            Source::Path(path) => path.display().to_string(),
            Source::Stdin => "standard input".into(),
            Source::Url(url) => fetch::redacted(url),
            Source::File { name, .. } | Source::Stream { name, .. } => name.clone(),
        };
        let escaped =
            |c: char| if c.is_control() { c.escape_default().collect() } else { c.into() };
        name.chars().map(escaped).collect::<Vec<String>>().concat()
    }

    pub(super) fn open(self) -> Result<Opened> {
        let name = self.name();
        match self {
            Source::Path(path) => {
                let opened_name = name.clone();
                let opening = move || format!("opening {name}");
                if std::fs::metadata(&path).context(&opening)?.file_type().is_fifo() {
                    // Opening waits for a writer: that is the reading thread's to do.
                    return Ok(Opened::Stream(Box::new(move || {
                        let reader = Box::new(File::open(&path).context(opening)?);
                        Ok(Incoming { reader, length: None })
                    })));
                }
                // Some devices block when they are opened.
                let file = OpenOptions::new()
                    .read(true)
                    .custom_flags((OFlag::O_NONBLOCK | OFlag::O_NOCTTY).bits())
                    .open(&path)
                    .context(&opening)?;
                opened(file, &opened_name)
            }
            Source::Stdin => {
                let stdin = std::io::stdin().as_fd().try_clone_to_owned();
                opened(File::from(stdin.context(|| "opening standard input")?), &name)
            }
            Source::File { file, .. } => opened(file, &name),
            Source::Url(url) => Ok(Opened::Stream(Box::new(move || fetch::open(&url, &name)))),
            Source::Stream { reader, length, .. } => {
                Ok(Opened::Stream(Box::new(move || Ok(Incoming { reader, length }))))
            }
        }
    }
}

impl fmt::Debug for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Source({})", self.name())
    }
}

/// Sorts an open file into what can be read at any offset and what is a stream.
fn opened(mut file: File, name: &str) -> Result<Opened> {
    let kind = file.metadata().context(|| format!("examining {name}"))?.file_type();
    if kind.is_file() || kind.is_block_device() {
        // The size of a block device is where its end is; its metadata say 0.
        let size = file.seek(SeekFrom::End(0)).context(|| format!("measuring {name}"))?;
        return Ok(Opened::File { file, size });
    }
    if kind.is_fifo() || kind.is_socket() {
        let incoming = Incoming { reader: Box::new(file), length: None };
        return Ok(Opened::Stream(Box::new(|| Ok(incoming))));
    }
    let what = match () {
        () if kind.is_dir() => "a directory",
        () if kind.is_char_device() => "a character device",
        () => "no file",
    };
    Err(Error::new(
        Kind::Invalid,
        format!("{name} is {what}: give an image file, a block device, a pipe or a URL"),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sources_are_told_apart() {
        assert!(matches!(Source::parse("-"), Ok(Source::Stdin)));
        assert!(matches!(Source::parse("HTTPS://host/x"), Ok(Source::Url(_))));
        assert!(matches!(Source::parse("./a://b"), Ok(Source::Path(_))));
        assert!(matches!(Source::parse("disk.qcow2"), Ok(Source::Path(_))));
        assert_eq!(Source::parse("ftp://host/x").unwrap_err().kind(), Kind::Unsupported);
        assert_eq!(Source::parse("").unwrap_err().kind(), Kind::Invalid);
        assert_eq!(Source::Url("http://u:pw@h/x?sig=1".into()).name(), "http://h/x");
        assert_eq!(Source::Path("/a\nb\u{1b}[2J é".into()).name(), "/a\\nb\\u{1b}[2J é");
    }

    #[test]
    fn what_is_no_file_is_refused_by_what_it_is() {
        for (path, what) in [("/", "a directory"), ("/dev/zero", "a character device")] {
            let error = Source::Path(path.into()).open().err().unwrap();
            assert_eq!(error.kind(), Kind::Invalid);
            assert!(error.to_string().contains(what), "{error}");
        }
        let error = Source::Path("/nonexistent/x".into()).open().err().unwrap();
        assert_eq!(error.kind(), Kind::NotFound);
    }
}
