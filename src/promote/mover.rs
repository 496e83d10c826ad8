//! Copies chunks from an image's copy into a cache.

use futures_util::future::join_all;

use super::cache::{Cache, sum};
use crate::{
    cow::Base,
    error::{Error, Kind, Result},
    io::{Buf, Io},
    units::Chunk,
};

/// Reads `chunks` from `copy`, all at the same time, compares each with the CRC-32 that it must have, and
/// stores those that are right in `cache`. Returns which are there now, and the first error.
pub async fn promote<I: Io, B: Base<I>>(
    io: &I,
    copy: &B,
    cache: &Cache<I>,
    chunks: &[(Chunk, u32)],
) -> (Vec<Chunk>, Result<()>) {
    let reads =
        chunks.iter().map(|(chunk, crc)| read(io, copy, cache.len_of(*chunk), *chunk, *crc));
    let mut outcome = Ok(());
    let mut whole: Vec<(Chunk, Buf)> = Vec::new();
    for read in join_all(reads).await {
        match read {
            Ok(chunk) => whole.push(chunk),
            Err(error) => outcome = outcome.and(Err(error)),
        }
    }
    outcome = outcome.and(cache.fill(io, &whole).await);
    let there = |chunk: &Chunk| cache.lease(*chunk).is_some();
    (whole.into_iter().map(|(chunk, _)| chunk).filter(there).collect(), outcome)
}

async fn read<I: Io, B: Base<I>>(
    io: &I,
    copy: &B,
    len: usize,
    chunk: Chunk,
    crc: u32,
) -> Result<(Chunk, Buf)> {
    let content = io.alloc(len);
    copy.read(io, chunk.offset(), content.clone()).await?;
    if sum(&content) != crc {
        let what =
            format!("chunk {} is not what was imported: run `underlay image verify`", chunk.0);
        return Err(Error::new(Kind::Corrupt, what));
    }
    Ok((chunk, content))
}
