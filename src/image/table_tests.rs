//! Invariants checked: the bytes of the format (golden), that a table reads back as it was stored
//! and costs nothing for zeros, and that no flipped byte, lost page or impossible claim passes.

use std::io::Write;

use super::*;
use crate::image::sha256;

const MIB: u64 = 1 << 20;

/// 24 MiB and a half of a block: 97 chunks on two pages, data in chunks 0, 3 and the last.
fn sample() -> ChunkTable {
    let size = 24 * MIB + 2048;
    let mut builder = TableBuilder::default();
    let mut content = vec![0; CHUNK as usize];
    content[4096..8192].fill(7);
    builder.set(Chunk(3), &ChunkSum::of(&content));
    content.fill(1);
    builder.set(Chunk(0), &ChunkSum::of(&content));
    builder.set(Chunk(5), &ChunkSum::of_zeros(CHUNK as usize));
    builder.set(Chunk(96), &ChunkSum::of(&content[..2048]));
    builder.finish(size)
}

fn stored(table: &ChunkTable) -> File {
    let file = tempfile::tempfile().unwrap();
    table.store(&file, "chunks").unwrap();
    file
}

fn load(bytes: &[u8]) -> Result<ChunkTable> {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(bytes).unwrap();
    ChunkTable::load(&file, "chunks of image x")
}

fn bytes_of(file: &File) -> Vec<u8> {
    let mut bytes = vec![0; file.metadata().unwrap().len() as usize];
    file.read_exact_at(&mut bytes, 0).unwrap();
    bytes
}

#[test]
fn a_table_reads_back_as_it_was_stored() {
    let table = sample();
    let loaded = ChunkTable::load(&stored(&table), "chunks").unwrap();
    assert_eq!(loaded, table);
    assert_eq!(loaded.compute_digest(), table.digest());
    assert_eq!(loaded.data_bytes(), (64 + 1 + 1) * 4096);
    let data: Vec<_> =
        (0..loaded.chunks()).map(Chunk).filter(|chunk| !loaded.is_zero(*chunk)).collect();
    assert_eq!(data, [Chunk(0), Chunk(3), Chunk(96)]);
    assert_eq!(loaded.next_data(Chunk(1)), Some(Chunk(3)));
    assert_eq!(loaded.next_data(Chunk(4)), Some(Chunk(96)));
    assert_eq!(loaded.next_data(Chunk(97)), None);
    assert_eq!(loaded.sum(Chunk(3)).unwrap().zeros, !2);
    assert_eq!(loaded.sum(Chunk(4)), Some(ChunkSum::of_zeros(CHUNK as usize)));
    assert_eq!(loaded.sum(Chunk(97)), None);
    assert_eq!((loaded.chunk_len(Chunk(96)), loaded.chunk_len(Chunk(97))), (2048, 0));
}

#[test]
fn the_bytes_are_those_of_version_1() {
    let bytes = bytes_of(&stored(&sample()));
    assert_eq!(bytes.len(), 3 * 4096);
    assert_eq!(bytes[..8], *b"UNDLCHNK");
    assert_eq!(le32(&bytes, 8), 1);
    assert_eq!(le64(&bytes, 16), 24 * MIB + 2048);
    assert_eq!(le64(&bytes, 24), 97);
    assert_eq!(le64(&bytes, 64), 66);
    assert_eq!(le64(&bytes, 72), 2);
    // Chunk 3 is the fourth entry of page 0: its mask, its CRC, its SHA-256.
    let entry = &bytes[4096 + 16 + 3 * 48..][..48];
    assert_eq!(le64(entry, 0), 2);
    let mut content = vec![0; CHUNK as usize];
    content[4096..8192].fill(7);
    assert_eq!(le32(entry, 8), crc32fast::hash(&content));
    assert_eq!(entry[16..], sha256(&content).0);
    assert_eq!(
        sha256(&bytes).to_string(),
        "064afabccdb032e6751c077127f932aa86474c1885705e669b26ff1430f45679",
        "the format changed: give it a new version"
    );
}

#[test]
fn the_digest_is_the_documented_one() {
    // SHA-256(size, SHA-256 of chunk 0, SHA-256 of chunk 1), computed elsewhere (Python's hashlib).
    let mut builder = TableBuilder::default();
    builder.set(Chunk(0), &ChunkSum::of(&vec![b'a'; CHUNK as usize]));
    builder.set(Chunk(1), &ChunkSum::of(&[b'b'; 512]));
    assert_eq!(
        builder.finish(CHUNK + 512).digest().to_string(),
        "bd29b46304cd6d9e8dbb7d30580f01355dbcc416ced90e51c359e30035c4269a"
    );
    assert_eq!(
        TableBuilder::default().finish(CHUNK + 512).digest().to_string(),
        "619864a4056d05f6b8b8651d32b33033da4b426b61c44b5ba736c193bdae5d02"
    );
}

#[test]
fn every_flipped_byte_is_noticed() {
    let table = sample();
    let good = bytes_of(&stored(&table));
    for at in 0..good.len() {
        let mut bytes = good.clone();
        bytes[at] ^= 1 << (at % 8);
        let error = load(&bytes).expect_err(&format!("byte {at}"));
        assert!(matches!(error.kind(), Kind::Corrupt | Kind::Unsupported), "{at}: {error}");
        assert!(error.to_string().contains("chunks of image x"), "{error}");
    }
}

#[test]
fn lost_swapped_and_cut_pages_are_noticed() {
    let good = bytes_of(&stored(&sample()));
    for page in 0..3 {
        let mut bytes = good.clone();
        bytes[page * 4096..(page + 1) * 4096].fill(0);
        assert_eq!(load(&bytes).unwrap_err().kind(), Kind::Corrupt, "page {page} lost");
    }
    let mut swapped = good[..4096].to_vec();
    swapped.extend_from_slice(&good[8192..]);
    swapped.extend_from_slice(&good[4096..8192]);
    assert_eq!(load(&swapped).unwrap_err().kind(), Kind::Corrupt);
    for length in [0, 1, 4095, 4096, 8192, 12287] {
        assert_eq!(load(&good[..length]).unwrap_err().kind(), Kind::Corrupt, "{length} bytes");
    }
    // A page of another table of the same shape, with a right checksum of its own.
    let mut other = TableBuilder::default();
    other.set(Chunk(0), &ChunkSum::of(&[9; 4096]));
    let other = bytes_of(&stored(&other.finish(24 * MIB + 2048)));
    let mut mixed = good.clone();
    mixed[4096..8192].copy_from_slice(&other[4096..8192]);
    assert_eq!(load(&mixed).unwrap_err().kind(), Kind::Corrupt);
}

#[test]
fn impossible_claims_with_right_checksums_are_refused() {
    let sealed = |mut bytes: Vec<u8>| {
        let crc = crc32fast::hash(&bytes[4100..8192]);
        bytes[4096..4100].copy_from_slice(&crc.to_le_bytes());
        bytes
    };
    let good = bytes_of(&stored(&sample()));
    // Chunk 1 is zeros, yet has a CRC.
    let mut bytes = good.clone();
    bytes[4096 + 16 + 48 + 8] = 1;
    let error = load(&sealed(bytes)).unwrap_err();
    assert!(error.to_string().contains("chunk of zeros"), "{error}");

    let header = |change: &dyn Fn(&mut Vec<u8>)| {
        let mut bytes = good.clone();
        change(&mut bytes);
        let crc = crc32fast::hash(&bytes[..4092]);
        bytes[4092..4096].copy_from_slice(&crc.to_le_bytes());
        load(&bytes).unwrap_err()
    };
    for size in [0, 1, MAX_IMAGE + 512, u64::MAX, u64::MAX - 511] {
        let error = header(&|bytes| bytes[16..24].copy_from_slice(&size.to_le_bytes()));
        assert_eq!(error.kind(), Kind::Corrupt, "size {size}: {error}");
    }
    let error = header(&|bytes| bytes[8] = 2);
    assert_eq!(error.kind(), Kind::Unsupported);
    assert!(error.to_string().contains("version 2"), "{error}");
}

#[test]
fn a_sparse_terabyte_costs_next_to_nothing() {
    let mut builder = TableBuilder::default();
    builder.set(Chunk(4 * MIB - 1), &ChunkSum::of(&[1; CHUNK as usize]));
    let table = builder.finish(1 << 40);
    let file = stored(&table);
    assert!(file.metadata().unwrap().blocks() * 512 <= 64 << 10);
    let loaded = ChunkTable::load(&file, "chunks").unwrap();
    assert_eq!(loaded, table);
    assert_eq!(loaded.next_data(Chunk(0)), Some(Chunk(4 * MIB - 1)));
}
