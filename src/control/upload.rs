//! The body of a request as a stream for code that blocks.
//!
//! Invariants:
//! - A few pieces are held in memory, however much faster the client is than the reader.
//! - A body that ends early is an error to the reader, never the end of the content.
//! - Once nobody reads any more, what the client still sends is taken and dropped for a while: it
//!   is busy sending, and would miss the answer if the connection broke under it.

use std::{
    io::{Error, ErrorKind, Read, Result},
    time::Duration,
};

use axum::body::{Body, Bytes};
use tokio::{sync::mpsc, time::timeout};
use tokio_stream::StreamExt;

/// Pieces in memory; hyper's are at most some 400 KiB.
const PIECES: usize = 4;
/// How long a client that was answered early may go on sending.
const PATIENCE: Duration = Duration::from_secs(10);

/// Reads a body from a thread that may block.
pub struct Reader {
    pieces: mpsc::Receiver<Result<Bytes>>,
    rest: Bytes,
    ended: bool,
}

/// Starts to take `body` in.
pub fn reader(body: Body) -> Reader {
    let (sender, pieces) = mpsc::channel(PIECES);
    tokio::spawn(async move {
        let mut stream = body.into_data_stream();
        while let Some(piece) = stream.next().await {
            let last = piece.is_err();
            let piece = piece.map_err(|error| {
                Error::new(ErrorKind::ConnectionReset, format!("the client stopped: {error}"))
            });
            if sender.send(piece).await.is_err() {
                return drain(stream).await;
            }
            if last {
                return;
            }
        }
        // An empty piece says that the body is whole.
        let _ = sender.send(Ok(Bytes::new())).await;
    });
    Reader { pieces, rest: Bytes::new(), ended: false }
}

/// Takes what the client of a refused upload still sends.
pub fn refuse(body: Body) {
    tokio::spawn(drain(body.into_data_stream()));
}

async fn drain(mut stream: axum::body::BodyDataStream) {
    let _ = timeout(PATIENCE, async { while let Some(Ok(_)) = stream.next().await {} }).await;
}

impl Read for Reader {
    fn read(&mut self, buf: &mut [u8]) -> Result<usize> {
        while self.rest.is_empty() && !self.ended {
            match self.pieces.blocking_recv() {
                Some(piece) => {
                    self.rest = piece?;
                    self.ended = self.rest.is_empty();
                }
                None => return Err(ErrorKind::UnexpectedEof.into()),
            }
        }
        let count = buf.len().min(self.rest.len());
        buf[..count].copy_from_slice(&self.rest.split_to(count));
        Ok(count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn read_all(body: Body) -> Result<Vec<u8>> {
        let mut reader = reader(body);
        tokio::task::spawn_blocking(move || {
            let mut bytes = Vec::new();
            reader.read_to_end(&mut bytes).map(|_| bytes)
        })
        .await?
    }

    #[tokio::test]
    async fn a_body_is_read_whole_or_fails() {
        let pieces = ["one ", "two ", "three"];
        let body = Body::from_stream(tokio_stream::iter(pieces.map(Ok::<_, Error>)));
        assert_eq!(read_all(body).await.unwrap(), b"one two three");
        assert_eq!(read_all(Body::empty()).await.unwrap(), b"");
        let broken = [Ok("one "), Err(Error::from(ErrorKind::BrokenPipe))];
        let body = Body::from_stream(tokio_stream::iter(broken));
        assert!(read_all(body).await.is_err(), "an early end is no end");
    }
}
