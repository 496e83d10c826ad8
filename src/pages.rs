//! Something for every chunk of an image, of which only what is used takes memory.

use std::sync::OnceLock;

use crate::units::Chunk;

/// Chunks that share a page: 32 MiB of an image.
const PER_PAGE: usize = 128;

/// A `T` for each chunk, made 128 at a time when the first of them is asked for. Reading needs no lock.
pub struct Pages<T> {
    pages: Box<[OnceLock<Box<[T]>>]>,
}

impl<T: Default> Pages<T> {
    /// For `chunks` chunks; 24 bytes a page until it is used.
    pub fn new(chunks: u64) -> Pages<T> {
        let count = (chunks as usize).div_ceil(PER_PAGE);
        Pages { pages: (0..count).map(|_| OnceLock::new()).collect() }
    }

    /// What there is for `chunk`; `None` where nothing of its page was made, or past the end.
    pub fn get(&self, chunk: Chunk) -> Option<&T> {
        let number = chunk.0 as usize;
        self.pages.get(number / PER_PAGE)?.get()?.get(number % PER_PAGE)
    }

    /// What there is for `chunk`, made if need be; `None` past the end.
    pub fn make(&self, chunk: Chunk) -> Option<&T> {
        let number = chunk.0 as usize;
        let page = self.pages.get(number / PER_PAGE)?;
        let page = page.get_or_init(|| (0..PER_PAGE).map(|_| T::default()).collect());
        page.get(number % PER_PAGE)
    }

    /// All that was made, in order of chunks.
    pub fn each(&self) -> impl Iterator<Item = (Chunk, &T)> {
        self.pages.iter().enumerate().flat_map(|(number, page)| {
            let first = (number * PER_PAGE) as u64;
            let made = page.get().map(|page| &page[..]).unwrap_or_default();
            made.iter().zip(first..).map(|(item, number)| (Chunk(number), item))
        })
    }
}
