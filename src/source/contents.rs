//! What is known of an image's chunks, whichever copy they are read from.

use std::ops::Range;

use crate::units::{BLOCKS_PER_CHUNK, Block, Chunk, round_down};

/// What is known of a chunk's content.
#[derive(Clone, Copy, Debug)]
pub struct Content {
    /// A bit for each block that holds nothing but zeros.
    pub zeros: u64,
    /// Its CRC-32.
    pub crc: u32,
}

/// Chunks whose contents share a page.
const PER_PAGE: u64 = 128;

/// What is known of all chunks. A page of zeros is nothing at all: a sparse terabyte costs 512 KiB.
pub(super) struct Contents(Box<[Option<Box<[Content]>>]>);

impl Contents {
    /// Of all chunks in order, and how many there are.
    pub(super) fn of(chunks: impl IntoIterator<Item = Content>) -> (Contents, u64) {
        let (mut pages, mut page, mut count) = (Vec::new(), Vec::new(), 0);
        let mut close = |page: &mut Vec<Content>| {
            let zero = page.iter().all(|content| content.zeros == u64::MAX);
            pages.push((!zero).then(|| page.as_slice().into()));
            page.clear();
        };
        for content in chunks {
            page.push(content);
            count += 1;
            if page.len() as u64 == PER_PAGE {
                close(&mut page);
            }
        }
        if !page.is_empty() {
            close(&mut page);
        }
        (Contents(pages.into()), count)
    }

    /// What is known of a chunk; `None` if it is zeros, or past the end.
    pub(super) fn get(&self, chunk: Chunk) -> Option<&Content> {
        let page = self.0.get((chunk.0 / PER_PAGE) as usize)?.as_ref()?;
        page.get((chunk.0 % PER_PAGE) as usize).filter(|content| content.zeros != u64::MAX)
    }

    /// Whether a block is known to be zeros.
    pub(super) fn is_zero(&self, block: Block) -> bool {
        let chunk = self.get(Chunk(block.0 / BLOCKS_PER_CHUNK));
        chunk.is_none_or(|chunk| chunk.zeros >> (block.0 % BLOCKS_PER_CHUNK) & 1 == 1)
    }

    /// Whether the first of `blocks` is zeros, and the end of those that are like it.
    pub(super) fn zero_run(&self, blocks: Range<u64>) -> (bool, u64) {
        let zero = self.is_zero(Block(blocks.start));
        let same = if zero { u64::MAX } else { 0 };
        let mut block = blocks.start;
        while block < blocks.end && self.is_zero(Block(block)) == zero {
            // A chunk that is all of a kind is one step.
            let chunk = self.get(Chunk(block / BLOCKS_PER_CHUNK));
            let zeros = chunk.map_or(u64::MAX, |chunk| chunk.zeros);
            let unit = if zeros == same { BLOCKS_PER_CHUNK } else { 1 };
            block = round_down(block, unit) + unit;
        }
        (zero, block.min(blocks.end))
    }
}
