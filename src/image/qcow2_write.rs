//! Writing a qcow2 image, version 3: standing alone, not compressed, clusters of 64 KiB.
//!
//! Content comes in order, so that each cluster is written once and one L2 table is in memory. The
//! header comes last: a file that is not whole is no image.
//!
//! ```text
//!   header | L1 table | clusters and L2 tables as they come | refcount blocks | refcount table
//! ```

use std::{
    io::{Seek, SeekFrom, Write},
    mem,
};

use crate::error::{Context, Error, Kind, Result};

const CLUSTER_BITS: u32 = 16;
const CLUSTER: u64 = 1 << CLUSTER_BITS;
/// Entries of an L2 table.
const L2: u64 = CLUSTER / 8;
/// Clusters whose references a refcount block counts, 16 bits each.
const COUNTED: u64 = CLUSTER / 2;
/// "No other refers to it": on every entry of ours.
const COPIED: u64 = 1 << 63;
const HEADER_LENGTH: u32 = 104;

/// Writes an image into a file.
pub struct Writer<W> {
    file: W,
    size: u64,
    l1: Vec<u64>,
    /// The L2 table under way, and which it is.
    l2: Vec<u64>,
    l2_index: u64,
    /// The cluster under way, and which it is.
    cluster: Vec<u8>,
    index: u64,
    dirty: bool,
    /// The next free cluster of the file.
    next: u64,
}

impl<W: Write + Seek> Writer<W> {
    /// Begins an image of `size` bytes in an empty file.
    pub fn new(file: W, size: u64) -> Writer<W> {
        let entries = size.div_ceil(CLUSTER * L2).max(1);
        Writer {
            file,
            size,
            l1: vec![0; entries as usize],
            l2: vec![0; L2 as usize],
            l2_index: 0,
            cluster: vec![0; CLUSTER as usize],
            index: 0,
            dirty: false,
            next: 1 + (entries * 8).div_ceil(CLUSTER),
        }
    }

    /// Adds content; offsets only grow.
    pub fn write(&mut self, offset: u64, bytes: &[u8]) -> Result<()> {
        if offset / CLUSTER < self.index || offset + bytes.len() as u64 > self.size {
            return Err(Error::new(Kind::OutOfRange, "content out of order"));
        }
        let (mut offset, mut bytes) = (offset, bytes);
        while !bytes.is_empty() {
            self.turn_to(offset / CLUSTER)?;
            let within = (offset % CLUSTER) as usize;
            let count = bytes.len().min(CLUSTER as usize - within);
            self.cluster[within..within + count].copy_from_slice(&bytes[..count]);
            self.dirty = true;
            (offset, bytes) = (offset + count as u64, &bytes[count..]);
        }
        Ok(())
    }

    /// Writes what describes the content; the file, not synced.
    pub fn end(mut self) -> Result<W> {
        self.put_cluster()?;
        self.put_l2()?;
        let (first, blocks, table) = refcounts(self.next);
        let total = self.next + blocks + table;
        for block in 0..blocks {
            let counted = total.saturating_sub(block * COUNTED).min(COUNTED) as usize;
            let mut counts = vec![0; CLUSTER as usize];
            counts[..2 * counted].chunks_exact_mut(2).for_each(|count| count[1] = 1);
            self.put(first + block, &counts)?;
        }
        let offsets: Vec<u64> = (0..blocks).map(|block| (first + block) * CLUSTER).collect();
        self.put(first + blocks, &padded(&offsets))?;
        let l1 = mem::take(&mut self.l1);
        self.put(1, &padded(&l1))?;
        let header = self.header(l1.len() as u32, first + blocks, table as u32);
        self.put(0, &header)?;
        self.file.flush().context(what)?;
        Ok(self.file)
    }

    fn header(&self, l1_entries: u32, table_at: u64, table: u32) -> Vec<u8> {
        let mut header = Vec::with_capacity(CLUSTER as usize);
        let mut put = |bytes: &[u8]| header.extend(bytes);
        put(b"QFI\xfb");
        put(&3u32.to_be_bytes());
        // No backing file.
        put(&[0; 12]);
        put(&CLUSTER_BITS.to_be_bytes());
        put(&self.size.to_be_bytes());
        // Not encrypted.
        put(&[0; 4]);
        put(&l1_entries.to_be_bytes());
        put(&CLUSTER.to_be_bytes());
        put(&(table_at * CLUSTER).to_be_bytes());
        put(&table.to_be_bytes());
        // No snapshots; no features.
        put(&[0; 12 + 24]);
        // References are counted in 2^4 bits.
        put(&4u32.to_be_bytes());
        put(&HEADER_LENGTH.to_be_bytes());
        header.resize(CLUSTER as usize, 0);
        header
    }

    /// Makes `index` the cluster under way.
    fn turn_to(&mut self, index: u64) -> Result<()> {
        if index == self.index {
            return Ok(());
        }
        self.put_cluster()?;
        if index / L2 != self.l2_index {
            self.put_l2()?;
            self.l2_index = index / L2;
        }
        self.index = index;
        Ok(())
    }

    fn put_cluster(&mut self) -> Result<()> {
        if mem::take(&mut self.dirty) {
            let cluster = mem::take(&mut self.cluster);
            // Zeros need no place.
            if cluster.iter().any(|byte| *byte != 0) {
                let at = self.take();
                self.put(at, &cluster)?;
                self.l2[(self.index % L2) as usize] = (at * CLUSTER) | COPIED;
            }
            self.cluster = cluster;
            self.cluster.fill(0);
        }
        Ok(())
    }

    fn put_l2(&mut self) -> Result<()> {
        if self.l2.iter().any(|entry| *entry != 0) {
            let at = self.take();
            let table = padded(&self.l2);
            self.put(at, &table)?;
            self.l1[self.l2_index as usize] = (at * CLUSTER) | COPIED;
            self.l2.fill(0);
        }
        Ok(())
    }

    fn take(&mut self) -> u64 {
        self.next += 1;
        self.next - 1
    }

    fn put(&mut self, cluster: u64, bytes: &[u8]) -> Result<()> {
        self.file.seek(SeekFrom::Start(cluster * CLUSTER)).context(what)?;
        self.file.write_all(bytes).context(what)
    }
}

/// Where the refcount blocks begin behind `used` clusters, how many they are, and how many clusters
/// their table takes: they count themselves, too.
fn refcounts(used: u64) -> (u64, u64, u64) {
    let (mut blocks, mut table) = (1, 1);
    loop {
        let needed = (used + blocks + table).div_ceil(COUNTED);
        let entries = (needed * 8).div_ceil(CLUSTER);
        if (needed, entries) == (blocks, table) {
            return (used, blocks, table);
        }
        (blocks, table) = (needed.max(blocks), entries.max(table));
        if (used + blocks + table).div_ceil(COUNTED) <= blocks
            && (blocks * 8).div_ceil(CLUSTER) <= table
        {
            return (used, blocks, table);
        }
    }
}

/// Entries of a table, in whole clusters.
fn padded(entries: &[u64]) -> Vec<u8> {
    let mut bytes: Vec<u8> = entries.iter().flat_map(|entry| entry.to_be_bytes()).collect();
    bytes.resize(bytes.len().next_multiple_of(CLUSTER as usize), 0);
    bytes
}

fn what() -> &'static str {
    "writing the image"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refcounts_count_themselves() {
        for used in [1, 2, COUNTED - 3, COUNTED - 2, COUNTED - 1, COUNTED, 5 * COUNTED - 6, 1 << 30]
        {
            let (first, blocks, table) = refcounts(used);
            assert_eq!(first, used);
            assert!(blocks * COUNTED >= used + blocks + table, "{used}");
            assert!(table * CLUSTER >= blocks * 8, "{used}");
        }
    }
}
