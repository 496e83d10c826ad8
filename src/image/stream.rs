//! Sources that can only be read from front to back: pipes, downloads, compressed files.
//!
//! A pump thread reads the source, hashes the bytes as they were published, and hands them over a
//! bounded queue; whoever reads the [`Stream`] decompresses. The pump is on its own so that a
//! source that blocks (a silent peer, an idle pipe) never keeps a cancelled import waiting: the
//! reader leaves, and the pump ends with its next read.

use std::{
    io::{self, BufReader, Cursor, Read},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
        mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel},
    },
    thread,
    time::Duration,
};

use sha2::{Digest as _, Sha256};

use super::pipeline::locked;
use crate::{
    catalog::Digest,
    error::{Error, Kind, Result},
};

/// Bytes asked of a source at a time.
const READ: usize = 256 << 10;
/// Reads that may wait in the queue.
const QUEUE: usize = 16;
/// How often a reader that waits looks whether it was cancelled.
const TICK: Duration = Duration::from_millis(50);
/// Bytes looked at to tell what a stream holds; the furthest magic is tar's, at 257.
pub(super) const HEAD: usize = 512;
/// Memory that an xz decoder may take, in bytes: `xz -9` needs 65 MiB.
const XZ_MEMORY: u64 = 256 << 20;
/// Window of a zstd frame that is accepted, as a power of two: `zstd --long` uses 27.
const ZSTD_WINDOW_LOG: u32 = 27;

/// A source that was opened for reading.
pub(super) struct Incoming {
    pub reader: Box<dyn Read + Send>,
    /// Its length in bytes, where it is known beforehand.
    pub length: Option<u64>,
}

/// How far a stream has come; shared with whoever reports progress.
#[derive(Debug, Default)]
pub(super) struct Received {
    bytes: AtomicU64,
    /// 0 while it isn't known.
    total: AtomicU64,
}

impl Received {
    /// Bytes read of the source.
    pub(super) fn bytes(&self) -> u64 {
        self.bytes.load(Relaxed)
    }

    /// The source's length in bytes, where it is known.
    pub(super) fn total(&self) -> Option<u64> {
        Some(self.total.load(Relaxed)).filter(|total| *total != 0)
    }
}

/// The bytes of a source as they come, compressed or not.
pub(super) struct Stream<'a> {
    packets: Receiver<Packet>,
    current: Cursor<Vec<u8>>,
    outcome: Outcome<'a>,
}

/// How a stream ended, kept apart from it because decoders swallow the stream and pass on its
/// errors as they please.
#[derive(Clone)]
pub(super) struct Outcome<'a> {
    end: Arc<Mutex<End>>,
    cancel: &'a AtomicBool,
}

#[derive(Default)]
enum End {
    #[default]
    NotYet,
    /// All of the source was read; its SHA-256.
    Whole(Digest),
    Failed(Option<Error>),
}

enum Packet {
    Bytes(Vec<u8>),
    End(Digest),
    Failed(Error),
}

/// What compression surrounds a stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Compression {
    None,
    Gzip,
    Xz,
    Zstd,
}

impl<'a> Stream<'a> {
    /// Starts the pump: `open` runs on its thread, so that connecting may block too.
    pub(super) fn start(
        open: impl FnOnce() -> Result<Incoming> + Send + 'static,
        name: &str,
        received: Arc<Received>,
        cancel: &'a AtomicBool,
    ) -> Result<Stream<'a>> {
        let (packets, queue) = sync_channel(QUEUE);
        let named = name.to_owned();
        thread::Builder::new()
            .name("import-source".into())
            .spawn(move || {
                // The reader is gone when it was cancelled: nobody is left to be told.
                let _ = pump(open, &named, &received, &packets)
                    .unwrap_or_else(|error| packets.send(Packet::Failed(error)));
            })
            .map_err(|error| Error::io("starting a thread for the import", error))?;
        let outcome = Outcome { end: Arc::default(), cancel };
        Ok(Stream { packets: queue, current: Cursor::default(), outcome })
    }

    /// How the stream ends, for when it has.
    pub(super) fn outcome(&self) -> Outcome<'a> {
        self.outcome.clone()
    }

    /// Waits for more of the source; `false` at its end.
    fn receive(&mut self) -> io::Result<bool> {
        loop {
            if self.outcome.cancel.load(Relaxed) {
                return Err(io::Error::other("cancelled"));
            }
            match &*locked(&self.outcome.end) {
                End::NotYet => {}
                End::Whole(_) => return Ok(false),
                End::Failed(_) => return Err(io::Error::other("the source failed")),
            }
            let end = match self.packets.recv_timeout(TICK) {
                Ok(Packet::Bytes(bytes)) => {
                    self.current = Cursor::new(bytes);
                    return Ok(true);
                }
                Ok(Packet::End(digest)) => End::Whole(digest),
                Ok(Packet::Failed(error)) => End::Failed(Some(error)),
                Err(RecvTimeoutError::Timeout) => continue,
                Err(RecvTimeoutError::Disconnected) => End::Failed(None),
            };
            *locked(&self.outcome.end) = end;
        }
    }
}

impl Read for Stream<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        loop {
            let count = self.current.read(buf)?;
            if count > 0 || buf.is_empty() || !self.receive()? {
                return Ok(count);
            }
        }
    }
}

impl Outcome<'_> {
    /// The error to report for `error`, which came out of a decoder of `compression`: a
    /// cancellation, the source's own failure, or else what the decoder found.
    pub(super) fn explain(&self, name: &str, compression: Compression, error: io::Error) -> Error {
        if self.cancel.load(Relaxed) {
            return cancelled();
        }
        if let End::Failed(failure) = &mut *locked(&self.end) {
            return failure.take().unwrap_or_else(|| {
                Error::new(Kind::Io, format!("reading {name} failed, as was told before"))
            });
        }
        match compression {
            Compression::None => Error::io(format!("reading {name}"), error),
            _ => Error::caused(
                Kind::Corrupt,
                format!(
                    "the {} data of {name} is damaged or cut short: get the file again",
                    compression.name()
                ),
                error,
            ),
        }
    }

    /// The SHA-256 of the source's bytes, if all of them were read.
    pub(super) fn digest(&self) -> Option<Digest> {
        match *locked(&self.end) {
            End::Whole(digest) => Some(digest),
            _ => None,
        }
    }
}

/// The error of work that its caller gave up.
pub(super) fn cancelled() -> Error {
    Error::new(Kind::Cancelled, "cancelled")
}

impl Compression {
    /// Told by the first bytes of a stream.
    pub(super) fn detect(head: &[u8]) -> Compression {
        match head {
            [0x1f, 0x8b, 0x08, ..] => Compression::Gzip,
            [0xfd, b'7', b'z', b'X', b'Z', 0, ..] => Compression::Xz,
            [0x28, 0xb5, 0x2f, 0xfd, ..] => Compression::Zstd,
            // A skippable frame, as parallel compressors write it before the first real one.
            [0x50..=0x5f, 0x2a, 0x4d, 0x18, ..] => Compression::Zstd,
            _ => Compression::None,
        }
    }

    pub(super) fn name(self) -> &'static str {
        match self {
            Compression::None => "plain",
            Compression::Gzip => "gzip",
            Compression::Xz => "xz",
            Compression::Zstd => "zstd",
        }
    }

    /// The decompressed stream; all members, streams and frames of it.
    pub(super) fn decoder<'r>(
        self,
        compressed: impl Read + Send + 'r,
    ) -> io::Result<Box<dyn Read + Send + 'r>> {
        let compressed = BufReader::with_capacity(READ, compressed);
        Ok(match self {
            Compression::None => Box::new(compressed),
            Compression::Gzip => Box::new(flate2::bufread::MultiGzDecoder::new(compressed)),
            Compression::Xz => {
                let flags = liblzma::stream::CONCATENATED;
                let decoder = liblzma::stream::Stream::new_stream_decoder(XZ_MEMORY, flags)?;
                Box::new(liblzma::bufread::XzDecoder::new_stream(compressed, decoder))
            }
            Compression::Zstd => {
                let mut decoder = zstd::stream::read::Decoder::with_buffer(compressed)?;
                decoder.window_log_max(ZSTD_WINDOW_LOG)?;
                Box::new(decoder)
            }
        })
    }
}

/// Takes up to [`HEAD`] bytes off `reader`; fewer only when it ends before.
pub(super) fn take_head(reader: &mut impl Read) -> io::Result<Vec<u8>> {
    let mut head = Vec::new();
    reader.take(HEAD as u64).read_to_end(&mut head)?;
    Ok(head)
}

/// Reads until `buf` is full or the reader ends; returns how much there was.
pub(super) fn fill(reader: &mut impl Read, buf: &mut [u8]) -> io::Result<usize> {
    let mut filled = 0;
    while filled < buf.len() {
        match reader.read(&mut buf[filled..]) {
            Ok(0) => break,
            Ok(count) => filled += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(filled)
}

type Sent = Result<(), std::sync::mpsc::SendError<Packet>>;

/// Reads the source to its end, or until nobody takes its packets any more.
fn pump(
    open: impl FnOnce() -> Result<Incoming>,
    name: &str,
    received: &Received,
    packets: &SyncSender<Packet>,
) -> Result<Sent> {
    let Incoming { mut reader, length } = open()?;
    received.total.store(length.unwrap_or(0), Relaxed);
    let mut hasher = Sha256::new();
    let mut total = 0_u64;
    loop {
        let mut bytes = vec![0; READ];
        let count = fill(&mut reader, &mut bytes)
            .map_err(|error| Error::io(format!("reading {name} after {total} bytes"), error))?;
        if count == 0 {
            break;
        }
        bytes.truncate(count);
        hasher.update(&bytes);
        total += count as u64;
        received.bytes.store(total, Relaxed);
        if let Err(gone) = packets.send(Packet::Bytes(bytes)) {
            return Ok(Err(gone));
        }
    }
    match length {
        Some(length) if length != total => Err(Error::new(
            Kind::Corrupt,
            format!("{name} ended after {total} of {length} bytes: import it again"),
        )),
        _ => Ok(packets.send(Packet::End(Digest(hasher.finalize().into())))),
    }
}
