//! Content that leaves the daemon, and overlays that come back: streams of [`parcel`].
//!
//! Invariants:
//! - What is exported of a replica is its content at one moment: one that clients have open is refused,
//!   and one that changes while it is read fails. Asked for "live", each block is as it was when it was
//!   read, and no moment is promised.
//! - An overlay is imported whole, or nothing is there of it.

use std::{
    io::{Error as IoError, ErrorKind, Read, Write},
    sync::Arc,
};

use axum::body::Bytes;
use serde_json::json;
use tokio::{runtime::Handle, sync::mpsc};

use super::{
    api::{ExportOptions, ReplicaView},
    event::Progress,
    events::Happened,
    exports::Exports,
    job::Job,
    service::Service,
};
use crate::{
    blockdev::{AnyDevice, Below, Device, Footing, Grain, Holder, Replica},
    catalog::{Name, NewReplica, OpenReplica, ReplicaStatus},
    cow::{Overlay, Provision, Watch, format::State},
    error::{Error, Kind, Result},
    image::parcel::{self, Header, Over, PIECE_MAX, Piece},
    io::{Io, Ring},
};

/// Bytes of a device whose extents are asked for at once.
const SPAN: u64 = 64 << 20;
/// Extents that are asked for at once.
const EXTENTS: usize = 4096;
/// Pieces that wait for a client who reads slowly.
const AHEAD: usize = 4;
/// Bytes of a piece of the answer.
const CHUNK: usize = 256 << 10;

/// An export that can begin.
pub struct Export {
    pub(super) service: Arc<Service>,
    pub(super) device: AnyDevice,
    /// What the stream begins with; over an image, only what the overlay holds is exported.
    pub(super) header: Header,
    /// Tells whether it changes, unless that may be.
    pub(super) watch: Option<Watch<Ring>>,
    /// What it is called.
    pub(super) what: String,
    pub(super) replica: Option<ReplicaStatus>,
}

impl Export {
    /// Writes the stream. Blocks; ends when nobody reads any more.
    pub fn run(self, out: Sender) {
        let _busy = match &self.replica {
            Some(it) => {
                let why = "it is being exported; wait for that, or interrupt it";
                match self.service.exports().begin(it.id, &it.name, why) {
                    Ok(busy) => Some(busy),
                    Err(error) => return self.failed(out, &error),
                }
            }
            None => None,
        };
        let done = parcel::Writer::new(out, &self.header).and_then(|mut writer| {
            let copied = Handle::current().block_on(self.copy(&mut writer));
            match copied {
                Ok(()) => writer.end().map(drop),
                Err(error) => {
                    tracing::warn!(what = %self.what, %error, "an export failed");
                    writer.fail(&error.to_string())
                }
            }
        });
        if let Err(error) = done {
            tracing::info!(what = %self.what, %error, "an export was given up");
        }
    }

    fn failed(&self, out: Sender, error: &Error) {
        let told = parcel::Writer::new(out, &self.header);
        // Nobody to hear it is fine.
        let _ = told.and_then(|writer| writer.fail(&error.to_string()));
    }

    async fn copy(&self, writer: &mut parcel::Writer<Sender>) -> Result<()> {
        let mut at = 0;
        while at < self.header.size {
            at = match (&self.device, &self.header.over) {
                (AnyDevice::Replica(replica), Some(_)) => {
                    self.copy_own(writer, replica, at).await?
                }
                _ => self.copy_all(writer, at).await?,
            };
            if self.watch.as_ref().is_some_and(Watch::has_changed) {
                let what = format!(
                    "{}: a client has written to it while it was exported: disconnect it, or export \
                     it --live",
                    self.what
                );
                return Err(Error::new(Kind::InUse, what));
            }
        }
        Ok(())
    }

    /// Copies what isn't zeros from `at` on, some of it; where that ends.
    async fn copy_all(&self, writer: &mut parcel::Writer<Sender>, at: u64) -> Result<u64> {
        let len = (self.header.size - at).min(SPAN);
        let mut extents = Vec::new();
        match &self.device {
            AnyDevice::Base(base) => {
                Device::<Ring>::extents(&**base, at, len, Grain::Zeros, EXTENTS, &mut extents);
            }
            AnyDevice::Replica(replica) => {
                replica.extents(at, len, Grain::Zeros, EXTENTS, &mut extents);
            }
        }
        let mut at = at;
        for extent in extents {
            let end = at + extent.len;
            if extent.holder != Holder::Nobody {
                self.copy_range(writer, at, end).await?;
            }
            at = end;
        }
        Ok(at)
    }

    /// Copies what the overlay holds at `at`.
    async fn copy_own(
        &self,
        writer: &mut parcel::Writer<Sender>,
        replica: &Replica<Ring>,
        at: u64,
    ) -> Result<u64> {
        let (state, end) = replica.overlay().own(at);
        let end = end.min(self.header.size).min(at + SPAN);
        match state {
            State::Base => {}
            State::Data => self.copy_range(writer, at, end).await?,
            State::Zero => writer.zero(at, end - at)?,
        }
        Ok(end)
    }

    async fn copy_range(
        &self,
        writer: &mut parcel::Writer<Sender>,
        from: u64,
        to: u64,
    ) -> Result<()> {
        let mut at = from;
        while at < to {
            let len = (to - at).min(PIECE_MAX as u64) as usize;
            let device = self.device.clone();
            let read = self.service.exports().run(move |ring| async move {
                let buf = ring.alloc(len);
                match device {
                    AnyDevice::Base(base) => Device::read(&*base, &ring, at, buf.clone()).await?,
                    AnyDevice::Replica(replica) => replica.read(&ring, at, buf.clone()).await?,
                }
                Ok(buf.to_vec())
            });
            writer.data(at, &read.await?)?;
            at += len as u64;
        }
        Ok(())
    }
}

/// Hands what is written to the answer's body.
pub struct Sender {
    pieces: mpsc::Sender<std::io::Result<Bytes>>,
    pending: Vec<u8>,
}

/// A writer, and the body that it fills.
pub fn body() -> (Sender, mpsc::Receiver<std::io::Result<Bytes>>) {
    let (pieces, receiver) = mpsc::channel(AHEAD);
    (Sender { pieces, pending: Vec::with_capacity(CHUNK) }, receiver)
}

impl Write for Sender {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.pending.extend_from_slice(bytes);
        if self.pending.len() >= CHUNK {
            self.flush()?;
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        let bytes = Bytes::from(std::mem::take(&mut self.pending));
        let gone = |_| IoError::new(ErrorKind::BrokenPipe, "the client has gone");
        // In a thread that may block, within a future that it runs.
        tokio::task::block_in_place(|| self.pieces.blocking_send(Ok(bytes))).map_err(gone)
    }
}

impl Exports {
    /// What of a replica's content is exported, and how.
    pub(super) async fn watch(
        &self,
        status: &ReplicaStatus,
        options: &ExportOptions,
        clients: &[String],
    ) -> Result<(Arc<Replica<Ring>>, Option<Watch<Ring>>)> {
        let name = &status.name;
        if !options.live && !clients.is_empty() {
            return Err(Error::new(
                Kind::InUse,
                format!(
                    "replica {name}: a client has it open ({}): disconnect it, or export it --live: \
                     then each block is as it is when it is read",
                    clients.join(", ")
                ),
            ));
        }
        let replica = self.open_for_work(status.clone()).await?;
        let watch = match options.live {
            true => None,
            false => {
                let watch = Watch::begin(replica.overlay());
                Some(watch.map_err(|error| error.within(format!("replica {name}")))?)
            }
        };
        Ok((replica, watch))
    }
}

/// The import of an overlay that can begin.
pub struct ImportOverlay {
    pub(super) service: Arc<Service>,
    pub(super) name: Name,
    pub(super) disk: Name,
}

impl ImportOverlay {
    /// Reads the stream to its end and makes the replica. Blocks.
    pub fn run(self, input: impl Read, job: &Job) -> Result<ReplicaView> {
        let object = format!("replica {}", self.name);
        let done = self.make(input, job);
        done.inspect_err(|error| self.service.events().failed(object, "import", error))
    }

    fn make(&self, input: impl Read, job: &Job) -> Result<ReplicaView> {
        let within = |error: Error| error.within(format!("replica {}", self.name));
        let mut reader = parcel::Reader::new(input).map_err(within)?;
        let header = reader.header().clone();
        let Some(over) = &header.over else {
            let what = "this is the content of a whole device: import it as an image";
            return Err(within(Error::new(Kind::Invalid, what)));
        };
        let image: Name = crate::catalog::Digest(over.digest).to_string().parse()?;
        let node = self.service.node();
        node.image(&image).map_err(|_| {
            within(Error::new(
                Kind::NotFound,
                format!(
                    "its image isn't on this node: it stands on {:?} ({image}, {} bytes, from {:?}): \
                     import that first",
                    over.name, over.size, over.source
                ),
            ))
        })?;
        let size = Some(header.size);
        let new = NewReplica { name: self.name.clone(), image, disk: self.disk.clone(), size };
        let status = node.create_filled(new, Overlay::<Ring>::blank, |files| {
            Handle::current().block_on(self.fill(files, &mut reader, job))
        })?;
        let message = format!("made on disk {} of an overlay from elsewhere", self.disk);
        let details = json!({ "id": status.id, "disk": self.disk, "digest": status.digest });
        let object = format!("replica {}", self.name);
        self.service.events().tell(Happened::ReplicaImported, object, message, details);
        Handle::current().block_on(self.service.replica(status.id.to_string().parse()?))
    }

    async fn fill(
        &self,
        files: OpenReplica,
        reader: &mut parcel::Reader<impl Read>,
        job: &Job,
    ) -> Result<()> {
        let exports = self.service.exports();
        let footing = exports.footing_of(files).await?;
        let replica = Arc::new(Replica::new(footing));
        loop {
            let piece = tokio::task::block_in_place(|| reader.piece())?;
            let Some(piece) = piece else { break };
            if job.cancel().load(std::sync::atomic::Ordering::Acquire) {
                return Err(Error::new(Kind::Cancelled, "given up: nothing was made"));
            }
            let to = replica.clone();
            exports
                .run(move |ring| async move {
                    match piece {
                        Piece::Data { offset, bytes } => {
                            let buf = ring.alloc(bytes.len());
                            buf.copy_from(&bytes);
                            to.write(&ring, offset, buf).await
                        }
                        Piece::Zero { offset, len } => {
                            to.write_zeroes(&ring, offset, len, Provision::Release).await
                        }
                    }
                })
                .await?;
            job.report(Progress {
                phase: "importing".to_owned(),
                done_bytes: reader.bytes(),
                total_bytes: None,
                source_bytes: reader.bytes(),
            });
        }
        exports.run(move |ring| async move { replica.overlay().close(&ring).await }).await
    }
}

impl Exports {
    /// What a replica that nobody sees yet stands on.
    async fn footing_of(&self, files: OpenReplica) -> Result<Footing<Ring>> {
        let base = match files.digest {
            Some(digest) => self.below(&files.disk, digest, &self.base(digest).await?)?,
            None => Below::NOTHING,
        };
        let (id, data, map) = self.overlay_files(files).await?;
        let overlay =
            self.run(move |ring| async move { Overlay::open(&ring, data, map, id, None).await });
        Ok(Footing { overlay: Arc::new(overlay.await?), base, rotational: false })
    }
}

/// What the header of an export says.
pub fn header(status: &ReplicaStatus, over: Option<(u64, String)>, size: u64) -> Header {
    let over = over.zip(status.digest).map(|((image_size, source), digest)| Over {
        digest: digest.0,
        size: image_size,
        name: status.image.first().map(Name::to_string).unwrap_or_default(),
        source,
    });
    Header { size, over }
}
