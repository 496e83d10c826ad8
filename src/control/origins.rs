//! The file that an image was imported from, as the last source of its chunks.
//!
//! Invariants:
//! - Only a file that somebody had the daemon import who may do all that the daemon may, and only as long
//!   as it is the same file, of the same length and time: what the file system or the image claims
//!   otherwise leads nowhere.
//! - A file that hangs holds up those who ask for it, for [`PATIENCE`], and [`AT_ONCE`] threads.

use std::{
    fs::OpenOptions, future::Future, os::unix::fs::OpenOptionsExt, pin::Pin, sync::Arc,
    time::Duration,
};

use tokio::{runtime::Handle, sync::Semaphore, time::timeout};

use crate::{
    catalog::{Digest, Node, Stamp},
    error::{Context, Error, Kind, Result},
    image::{Format, read_again},
    source::Rescue,
    units::{self, Chunk},
};

/// How long the file is waited for.
const PATIENCE: Duration = Duration::from_secs(10);
/// Chunks that are read of such files at once, on the node as a whole.
pub const AT_ONCE: usize = 4;

/// One source of chunks, and another that is asked for what the first can't give.
pub struct InTurn(pub Box<dyn Rescue>, pub Box<dyn Rescue>);

impl Rescue for InTurn {
    fn chunk(&self, chunk: Chunk) -> Pin<Box<dyn Future<Output = Option<Vec<u8>>> + Send>> {
        let (first, then) = (self.0.chunk(chunk), self.1.chunk(chunk));
        Box::pin(async move {
            match first.await {
                Some(bytes) => Some(bytes),
                None => then.await,
            }
        })
    }
}

/// The file that an image was imported from.
pub struct FromOrigin {
    /// Knows which file that is.
    pub node: Node,
    /// The image.
    pub digest: Digest,
    /// Its size in bytes.
    pub size: u64,
    /// Runs what may block.
    pub runtime: Handle,
    /// Places for those who read such files.
    pub room: Arc<Semaphore>,
}

impl Rescue for FromOrigin {
    fn chunk(&self, chunk: Chunk) -> Pin<Box<dyn Future<Output = Option<Vec<u8>>> + Send>> {
        let (node, digest, size) = (self.node.clone(), self.digest, self.size);
        let (runtime, room) = (self.runtime.clone(), self.room.clone());
        Box::pin(async move {
            // Whoever asks is no task of the runtime.
            let asked = runtime.spawn(async move {
                let read = async {
                    let permit = room.acquire_owned().await.ok()?;
                    let read = move || {
                        let _permit = permit;
                        read(&node, digest, size, chunk)
                    };
                    tokio::task::spawn_blocking(read).await.ok()
                };
                timeout(PATIENCE, read).await.ok().flatten()
            });
            match asked.await.ok().flatten()? {
                Ok(bytes) => Some(bytes),
                Err(error) => {
                    tracing::debug!(image = %digest, chunk = chunk.0, %error, "its source");
                    None
                }
            }
        })
    }
}

fn read(node: &Node, digest: Digest, size: u64, chunk: Chunk) -> Result<Vec<u8>> {
    let unknown = || Error::new(Kind::NotFound, "it is not known where the image came from");
    let origin = node.origin(digest)?.ok_or_else(unknown)?;
    // Neither a pipe nor a device may hold the open up.
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
        .open(&origin.path)
        .context(|| format!("opening {}", origin.path.display()))?;
    if Stamp::of(&file)? != origin.stamp {
        let what = format!("{} is another file now, or was changed", origin.path.display());
        return Err(Error::new(Kind::Corrupt, what));
    }
    let format: Format = origin.content.parse()?;
    let len = size.saturating_sub(chunk.offset()).min(units::CHUNK) as usize;
    read_again(file, origin.stamp.length, format, size, chunk.offset(), len)
}
