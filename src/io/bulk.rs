//! Bulk writing on tokio-uring: large pieces, several in flight, in no particular order.
//!
//! For movers (import, later promotion and repair), not for the data path. The ring is the plain
//! kind: tokio-uring 0.5 hangs with DEFER_TASKRUN and panics on operations with many completions.
//!
//! What is written is synced as it goes, so that neither the page cache fills with dirty pages nor
//! the last sync takes minutes that can't be cut short.

use std::{cell::Cell, fs::File, io, ops::Range};

use tokio::sync::{Mutex, mpsc};
use tokio_uring::buf::BoundedBuf;

/// Writes in flight at once.
const DEPTH: usize = 16;
/// Entries of the ring: every write in flight has one, and a sync.
const ENTRIES: u32 = 64;
/// Bytes written between two syncs.
const SYNC_EVERY: usize = 256 << 20;

const _: () = assert!(DEPTH < ENTRIES as usize);

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

/// Writes the pieces that arrive until their channel closes, then returns; what was written last is
/// not synced. Buffers go to `spent` once written. The first error ends it, a sync's too, and the
/// channel closes.
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
        let work = Work {
            file: tokio_uring::fs::File::from_std(file),
            pieces: Mutex::new(pieces),
            unsynced: Cell::new(0),
            spent,
        };
        let lanes = (0..DEPTH).map(|_| work.lane());
        let outcome = futures_util::future::try_join_all(lanes).await;
        work.pieces.lock().await.close();
        outcome.map(|_| ())
    })
}

/// What the lanes share.
struct Work<F> {
    file: tokio_uring::fs::File,
    pieces: Mutex<mpsc::Receiver<Piece>>,
    /// Bytes written since the last sync began.
    unsynced: Cell<usize>,
    spent: F,
}

impl<F: Fn(Vec<u8>)> Work<F> {
    /// One write after the other, until there are no more pieces.
    async fn lane(&self) -> io::Result<()> {
        loop {
            let piece = self.pieces.lock().await.recv().await;
            let Some(Piece { mut buf, offset, runs }) = piece else { return Ok(()) };
            for run in runs {
                let at = offset + run.start as u64;
                self.unsynced.set(self.unsynced.get() + run.len());
                let (outcome, slice) = self.file.write_all_at(buf.slice(run), at).await;
                outcome?;
                buf = slice.into_inner();
            }
            (self.spent)(buf);
            // The other lanes go on writing meanwhile.
            if self.unsynced.get() >= SYNC_EVERY {
                self.unsynced.set(0);
                self.file.sync_data().await?;
            }
        }
    }
}

#[cfg(test)]
#[allow(clippy::single_range_in_vec_init)] // Runs are ranges.
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;

    #[test]
    fn runs_land_where_they_belong() {
        let file = tempfile::tempfile().unwrap();
        let (sender, receiver) = mpsc::channel(64);
        for i in 0..50_u8 {
            let runs = vec![0..4096, 8192..12288];
            let piece = Piece { buf: vec![i + 1; 16384], offset: u64::from(i) * 16384, runs };
            sender.blocking_send(piece).unwrap();
        }
        drop(sender);
        let spent = Cell::new(0);
        write_pieces(&file, receiver, |_| spent.set(spent.get() + 1)).unwrap();
        assert_eq!(spent.get(), 50);
        let mut found = vec![0; 16384];
        for i in 0..49_u8 {
            file.read_exact_at(&mut found, u64::from(i) * 16384).unwrap();
            let expected = |range: Range<usize>, byte: u8| found[range].iter().all(|b| *b == byte);
            assert!(expected(0..4096, i + 1) && expected(4096..8192, 0), "piece {i}");
            assert!(expected(8192..12288, i + 1) && expected(12288..16384, 0), "piece {i}");
        }
    }

    #[test]
    fn a_failed_write_is_told_and_closes_the_channel() {
        let file = File::open("/dev/null").unwrap();
        let (sender, receiver) = mpsc::channel(1);
        let sending = std::thread::spawn(move || {
            let piece = || Piece { buf: vec![1; 4096], offset: 0, runs: vec![0..4096] };
            (0..1000).all(|_| sender.blocking_send(piece()).is_ok())
        });
        let error = write_pieces(&file, receiver, drop).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EBADF));
        assert!(!sending.join().unwrap());
    }
}
