//! A chunk of one copy made sound again, from whatever else has it.

use std::{sync::Arc, sync::atomic::Ordering};

use super::{Copy, Sources};
use crate::{
    error::{Context, Error, Kind, Result},
    io::{Buf, Io},
    units::Chunk,
};

/// What a repair came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Repair {
    /// The disk has the chunk as it must be: what was read was wrong on its way.
    Sound,
    /// It was written anew, and reads as it must.
    Written,
}

impl<I: Io> Sources<I> {
    /// Makes a chunk of `copy` sound, by way of `file`: the copy's content, open for writing.
    ///
    /// # Errors
    /// `Unavailable` if nothing else has the chunk: nothing was written. Others if the disk doesn't take
    /// it or doesn't give it back as it was written: the copy has failed.
    pub async fn repair(
        &self,
        io: &I,
        copy: &Arc<Copy<I>>,
        chunk: Chunk,
        file: &I::File,
    ) -> Result<Repair> {
        if self.image.crc(chunk).is_none() || copy.examine(io, &self.image, chunk).await.is_ok() {
            return Ok(Repair::Sound);
        }
        let content = self.elsewhere(io, copy, chunk).await?;
        let what = || format!("image {}: writing chunk {} anew", self.image.name, chunk.0);
        // The bytes are those that readers must find: one who reads meanwhile finds old or new ones.
        io.write(file, content, chunk.offset()).await.context(what)?;
        io.sync(file).await.context(what)?;
        copy.examine(io, &self.image, chunk).await?;
        Ok(Repair::Written)
    }

    /// A chunk from anything but `copy`, verified.
    async fn elsewhere(&self, io: &I, copy: &Arc<Copy<I>>, chunk: Chunk) -> Result<Buf> {
        let buf = io.alloc(self.image.len_of(chunk));
        for other in self.copies().iter().filter(|other| !Arc::ptr_eq(other, copy)) {
            let read = other.read(io, &self.image, chunk.offset(), buf.clone()).await;
            if read.is_ok() && self.image.is(chunk, &buf) {
                return Ok(buf);
            }
        }
        if let Some(rescue) = self.rescue.get()
            && let Some(bytes) = rescue.chunk(chunk).await
            && bytes.len() == buf.len()
        {
            buf.copy_from(&bytes);
            if self.image.is(chunk, &buf) {
                self.counters.rescued.fetch_add(1, Ordering::Relaxed);
                return Ok(buf);
            }
        }
        let what = format!("image {}: nothing else has chunk {}", self.image.name, chunk.0);
        Err(Error::new(Kind::Unavailable, what))
    }
}
