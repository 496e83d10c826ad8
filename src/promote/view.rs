//! An image as the replicas of one disk read it: counted, and with what was promoted to that disk in
//! front of a copy that lies elsewhere.

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
    time::Instant,
};

use arc_swap::ArcSwapOption;

use super::{
    cache::{Cache, Lease},
    demand::Demand,
};
use crate::{
    cow::{Base, run_all},
    error::Result,
    io::{Buf, Io},
    units::{self, Chunk},
};

/// What the replicas of one disk share of an image, beside its copy.
pub struct View<I: Io> {
    /// What they read.
    pub demand: Demand,
    cache: ArcSwapOption<Cache<I>>,
    /// The cache that was given up last.
    former: Mutex<Weak<Cache<I>>>,
}

impl<I: Io> View<I> {
    /// Of an image of `size` bytes, of which nothing is promoted yet.
    pub fn new(size: u64) -> View<I> {
        View {
            demand: Demand::new(size),
            cache: ArcSwapOption::empty(),
            former: Mutex::new(Weak::new()),
        }
    }

    /// The chunks that were promoted to this disk, if a cache is open for them.
    pub fn cache(&self) -> Option<Arc<Cache<I>>> {
        self.cache.load_full()
    }

    /// From now on chunks may be promoted to `cache`. It may be opened only where [`View::is_vacant`].
    pub fn set_cache(&self, cache: Arc<Cache<I>>) {
        debug_assert!(self.is_vacant(), "two caches on the same files");
        self.cache.store(Some(cache));
    }

    /// Gives the cache up, if there is one: from now on the copy is read.
    pub fn give_up(&self) -> Option<Arc<Cache<I>>> {
        let mut former = self.former();
        let cache = self.cache.swap(None)?;
        cache.close();
        *former = Arc::downgrade(&cache);
        Some(cache)
    }

    /// Whether a cache may be opened: there is none, and nobody reads, fills or empties the one that was
    /// given up before, whose files may be the same.
    pub fn is_vacant(&self) -> bool {
        let former = self.former();
        self.cache.load().is_none() && former.strong_count() == 0
    }

    fn former(&self) -> MutexGuard<'_, Weak<Cache<I>>> {
        // It is replaced as a whole.
        self.former.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Fills `buf` from `offset` of the image: from the cache what is there, the rest from `copy`.
    pub async fn read<B: Base<I>>(&self, io: &I, copy: &B, offset: u64, buf: Buf) -> Result<()> {
        // Held until the read has ended: nobody opens the files anew under it.
        let Some(cache) = self.cache() else {
            return self.read_copy(io, copy, offset, buf).await;
        };
        let chunks = Chunk::at(offset).0..units::chunks(offset + buf.len() as u64);
        if chunks.end - chunks.start == 1 {
            let lease = cache.lease(Chunk(chunks.start));
            return self.read_piece(io, copy, &cache, lease, offset, buf).await;
        }
        let cache = &*cache;
        let pieces = Pieces { cache, offset, end: offset + buf.len() as u64, next: None };
        run_all(pieces.map(|(at, len, lease)| {
            let start = (at - offset) as usize;
            let piece = buf.slice(start..start + len as usize);
            self.read_piece(io, copy, cache, lease, at, piece)
        }))
        .await
    }

    async fn read_piece<B: Base<I>>(
        &self,
        io: &I,
        copy: &B,
        cache: &Cache<I>,
        lease: Option<Lease<'_>>,
        offset: u64,
        buf: Buf,
    ) -> Result<()> {
        if let Some(lease) = lease {
            let (chunk, len, started) = (Chunk::at(offset), buf.len() as u64, Instant::now());
            if cache.read(io, lease, offset, buf.clone()).await.is_ok() {
                self.demand.read_cache(chunk, len, started.elapsed());
                return Ok(());
            }
        }
        self.read_copy(io, copy, offset, buf).await
    }

    async fn read_copy<B: Base<I>>(&self, io: &I, copy: &B, offset: u64, buf: Buf) -> Result<()> {
        let (len, started) = (buf.len() as u64, Instant::now());
        copy.read(io, offset, buf).await?;
        self.demand.read_copy(offset, len, started.elapsed());
        Ok(())
    }
}

/// A range cut where what answers it changes: a piece for each chunk that is cached, and one for each
/// run of chunks that isn't.
struct Pieces<'a, I: Io> {
    cache: &'a Cache<I>,
    offset: u64,
    end: u64,
    /// The lease on the chunk at `offset`, where the search for the end of a run has found one.
    next: Option<Lease<'a>>,
}

impl<'a, I: Io> Iterator for Pieces<'a, I> {
    type Item = (u64, u64, Option<Lease<'a>>);

    fn next(&mut self) -> Option<Self::Item> {
        let start = self.offset;
        if start >= self.end {
            return None;
        }
        let end_of = |offset| (Chunk(Chunk::at(offset).0 + 1)).offset().min(self.end);
        let lease = self.next.take().or_else(|| self.cache.lease(Chunk::at(start)));
        self.offset = end_of(start);
        while lease.is_none() && self.offset < self.end {
            self.next = self.cache.lease(Chunk::at(self.offset));
            if self.next.is_some() {
                break;
            }
            self.offset = end_of(self.offset);
        }
        Some((start, self.offset - start, lease))
    }
}

#[cfg(test)]
mod tests {
    //! Checked: whatever is cached, and whatever comes and goes meanwhile, a read is the image's content;
    //! and it is counted once in each chunk that it touches.

    use std::cell::Cell;

    use super::*;
    use crate::{
        catalog::Digest,
        io::sim::{End, Sim, SimFile, Task},
        promote::cache::entry,
        units::{Block, CHUNK},
    };

    const CHUNKS: u64 = 5;
    const SIZE: u64 = CHUNKS * CHUNK - 3584;

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

    fn content(offset: u64, len: usize) -> Vec<u8> {
        (offset..offset + len as u64).map(|at| (at >> 7 ^ at >> 16) as u8).collect()
    }

    #[test]
    fn reads_are_the_images_wherever_they_come_from() {
        let (mut far, mut near) = (0, 0);
        for seed in 0..60 {
            let sim = Sim::new(seed);
            let image = Image(sim.create(1, &content(0, SIZE as usize), SIZE));
            let data = sim.create(512, &[], CHUNKS * CHUNK);
            let digest = Digest([3; 32]);
            let table = sim.create(1, &entry::header(&digest, SIZE), entry::file_len(SIZE));
            let view = View::new(SIZE);
            let cache = Arc::new(Cache::new("test", data, table, digest, SIZE));
            view.set_cache(cache.clone());
            let cache = &cache;
            let touched = Cell::new(0);
            let mut tasks: Vec<Task> = vec![Box::pin(async {
                let mut rng = fastrand::Rng::with_seed(seed);
                for _ in 0..40 {
                    let chunk = Chunk(rng.u64(0..CHUNKS));
                    let bytes = Buf::from_bytes(&content(chunk.offset(), cache.len_of(chunk)));
                    cache.fill(&sim, &[(chunk, bytes)]).await.unwrap();
                    cache.withdraw(Chunk(rng.u64(0..CHUNKS)));
                    cache.sweep(&sim).await;
                }
            })];
            for reader in 0..3 {
                let (sim, view, image, touched) = (&sim, &view, &image, &touched);
                tasks.push(Box::pin(async move {
                    let mut rng = fastrand::Rng::with_seed(seed * 3 + reader);
                    for _ in 0..30 {
                        let offset = rng.u64(0..SIZE / 512) * 512;
                        let most = if rng.bool() { 64 } else { 2048 };
                        let len = (rng.u64(1..=most) * 512).min(SIZE - offset);
                        let buf = sim.alloc(len as usize);
                        view.read(sim, image, offset, buf.clone()).await.unwrap();
                        assert!(buf.to_vec() == content(offset, buf.len()), "{offset}, {len}");
                        let chunks = units::chunks(offset + len) - Chunk::at(offset).0;
                        touched.set(touched.get() + chunks);
                    }
                }));
            }
            assert!(matches!(sim.run(tasks, None), End::Done(_)));
            assert_eq!(cache.doubts(), 0);
            let touches = view.demand.take();
            let copy: u64 = touches.iter().map(|touch| u64::from(touch.copy)).sum();
            let cached: u64 = touches.iter().map(|touch| u64::from(touch.cache)).sum();
            assert_eq!(copy + cached, touched.get());
            far += copy;
            near += cached;
        }
        assert!(far > 1000 && near > 1000, "{far} {near}");
    }

    #[test]
    fn a_cache_follows_another_only_when_its_last_reader_has_left() {
        let sim = Sim::new(1);
        let image = Image(sim.create(1, &content(0, SIZE as usize), SIZE));
        let data = sim.create(512, &[], CHUNKS * CHUNK);
        let digest = Digest([3; 32]);
        let table = sim.create(1, &entry::header(&digest, SIZE), entry::file_len(SIZE));
        let view = View::new(SIZE);
        let open = || Arc::new(Cache::new("test", data, table, digest, SIZE));
        let fill = async |cache: &Cache<Sim>| {
            let bytes = Buf::from_bytes(&content(0, CHUNK as usize));
            cache.fill(&sim, &[(Chunk(0), bytes)]).await.unwrap();
        };
        let read = async || {
            let buf = sim.alloc(4096);
            view.read(&sim, &image, 0, buf.clone()).await.unwrap();
            assert!(buf.to_vec() == content(0, 4096));
        };
        let cached = || view.demand.take().iter().map(|touch| touch.cache).sum::<u32>();
        let first: Task = Box::pin(async {
            assert!(view.is_vacant());
            view.set_cache(open());
            fill(&view.cache().unwrap()).await;
            sim.set_hung(data, true);
            // The chunk is leased, and the disk doesn't answer.
            read().await;
        });
        let second: Task = Box::pin(async {
            while view.cache().is_none_or(|cache| cache.present().is_empty()) {
                sim.sleep(Default::default()).await;
            }
            while Arc::strong_count(&view.cache().unwrap()) < 3 {
                sim.sleep(Default::default()).await;
            }
            let former = view.give_up().unwrap();
            assert!(former.is_closed() && former.lease(Chunk(0)).is_none());
            // What was under way there makes nothing present any more.
            former.let_in(Chunk(0), &Buf::from_bytes(&content(0, CHUNK as usize)));
            assert!(former.present().is_empty());
            drop(former);
            assert!(view.cache().is_none() && !view.is_vacant());
            read().await;
            sim.set_hung(data, false);
            while !view.is_vacant() {
                sim.sleep(Default::default()).await;
            }
            assert_eq!(cached(), 1);
            // The reader, who was there all the time, has the new one.
            view.set_cache(open());
            fill(&view.cache().unwrap()).await;
            read().await;
            assert_eq!(cached(), 1);
        });
        assert!(matches!(sim.run(vec![first, second], None), End::Done(_)));
    }
}
