//! Bulk writing on tokio-uring: large pieces, several in flight, in no particular order.
//!
//! For movers (import, later promotion and repair), not for the data path. The ring is the plain
//! kind: tokio-uring 0.5 hangs with DEFER_TASKRUN and panics on operations with many completions.

use std::{fs::File, io, ops::Range, rc::Rc, sync::Arc};

use tokio::sync::{Mutex, mpsc};
use tokio_uring::buf::BoundedBuf;

/// Writes in flight at once.
const DEPTH: usize = 16;
/// Entries of the ring: every write in flight has one.
const ENTRIES: u32 = 64;

const _: () = assert!(DEPTH <= ENTRIES as usize);

/// A buffer of which some runs are to be written; run `a..b` goes to `offset + a`.
#[derive(Debug)]
pub struct Piece {
    /// The content.
    pub buf: Vec<u8>,
    /// Where the first byte of `buf` belongs in the file.
    pub offset: u64,
    /// What of `buf` is to be written.
    pub runs: Vec<Range<usize>>,
}

/// Writes the pieces that arrive until their channel closes, then returns; the file is not synced.
/// Buffers go to `spent` once written. The first error ends it, and the channel closes.
///
/// Blocks its thread, which must not be one of an async runtime.
pub fn write_pieces(
    file: &File,
    pieces: mpsc::Receiver<Piece>,
    spent: impl Fn(Vec<u8>),
) -> io::Result<()> {
    let file = file.try_clone()?;
    let runtime = tokio_uring::Runtime::new(tokio_uring::builder().entries(ENTRIES))?;
    runtime.block_on(async {
        let file = Rc::new(tokio_uring::fs::File::from_std(file));
        let pieces = Arc::new(Mutex::new(pieces));
        let lanes = (0..DEPTH).map(|_| write_lane(file.clone(), pieces.clone(), &spent));
        let outcome = futures_util::future::try_join_all(lanes).await;
        pieces.lock().await.close();
        outcome.map(|_| ())
    })
}

/// One write after the other, until there are no more pieces.
async fn write_lane(
    file: Rc<tokio_uring::fs::File>,
    pieces: Arc<Mutex<mpsc::Receiver<Piece>>>,
    spent: &impl Fn(Vec<u8>),
) -> io::Result<()> {
    loop {
        let piece = pieces.lock().await.recv().await;
        let Some(Piece { mut buf, offset, runs }) = piece else { return Ok(()) };
        for run in runs {
            let at = offset + run.start as u64;
            let (outcome, slice) = file.write_all_at(buf.slice(run), at).await;
            outcome?;
            buf = slice.into_inner();
        }
        spent(buf);
    }
}
