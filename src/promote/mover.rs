//! Copies chunks from an image's copy into a cache.

use std::{pin::pin, time::Duration};

use futures_util::future::{Either, join_all, select};

use super::cache::{Cache, sum};
use crate::{
    cow::Base,
    error::{Error, Kind, Result},
    io::{Buf, Io},
    units::Chunk,
};

/// How long a read of the copy is waited for. What takes longer is read by replicas only: the mover has
/// other images' chunks to move, and space to give back.
pub const PATIENCE: Duration = Duration::from_secs(10);

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
    let read = copy.read(io, chunk.offset(), content.clone());
    match select(pin!(read), pin!(io.sleep(PATIENCE))).await {
        Either::Left((read, _)) => read?,
        Either::Right(_) => {
            let what = format!("chunk {}: its copy doesn't answer", chunk.0);
            return Err(Error::new(Kind::Unavailable, what));
        }
    }
    if sum(&content) != crc {
        let what =
            format!("chunk {} is not what was imported: run `underlay image verify`", chunk.0);
        return Err(Error::new(Kind::Corrupt, what));
    }
    Ok((chunk, content))
}

#[cfg(test)]
mod tests {
    //! Checked: a copy that doesn't answer is not waited for, and what comes of it late changes nothing.

    use super::*;
    use crate::{
        catalog::Digest,
        io::sim::{Sim, SimFile},
        promote::cache::entry,
        units::{Block, CHUNK},
    };

    const SIZE: u64 = 3 * CHUNK;

    struct Image(SimFile);

    impl Base<Sim> for Image {
        fn size(&self) -> u64 {
            SIZE
        }

        fn is_zero(&self, _: Block) -> bool {
            false
        }

        async fn read(&self, io: &Sim, offset: u64, buf: Buf) -> Result<()> {
            io.read(&self.0, buf, offset).await.unwrap();
            Ok(())
        }
    }

    #[test]
    fn a_copy_that_hangs_is_not_waited_for() {
        let sim = Sim::new(1);
        let copy = Image(sim.create(1, &vec![7; SIZE as usize], SIZE));
        let digest = Digest([3; 32]);
        let data = sim.create(1, &[], SIZE);
        let table = sim.create(1, &entry::header(&digest, SIZE), entry::file_len(SIZE));
        let cache = Cache::<Sim>::new("test", data, table, digest, SIZE);
        let crc = crc32fast::hash(&vec![7; CHUNK as usize]);
        let chunks = [(Chunk(0), crc), (Chunk(2), crc)];
        sim.set_hung(copy.0, true);
        let moved = sim.run_one(promote(&sim, &copy, &cache, &chunks), None);
        let (there, outcome) = moved.expect("it doesn't wait");
        assert_eq!((there, outcome.unwrap_err().kind()), (vec![], Kind::Unavailable));
        sim.set_hung(copy.0, false);
        assert_eq!((cache.stored(), cache.withdrawn()), (0, 0));
        // Time is the seed's: sooner or later the disk is faster.
        let there = (0..100).find_map(|_| {
            let (there, _) = sim.run_one(promote(&sim, &copy, &cache, &chunks), None)?;
            (there.len() == 2).then_some(there)
        });
        assert_eq!(there, Some(vec![Chunk(0), Chunk(2)]));
    }
}
