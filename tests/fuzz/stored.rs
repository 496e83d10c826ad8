//! What stands in files beside images and replicas, and in streams between nodes: chunk tables and exported
//! parcels, spoilt, and in most cases with the checksums that would make them right.

use std::{
    fs::File,
    io::{Cursor, Write},
    os::unix::fs::FileExt,
};

use fastrand::Rng;
use tempfile::tempfile;
use underlay::{
    Kind,
    image::{
        ChunkSum, ChunkTable, TableBuilder,
        parcel::{Header, Over, PIECE_MAX, Piece, Reader, Writer},
    },
    units::{CHUNK, Chunk},
};

use crate::{
    Case,
    mutator::{checksum, mutate, scribble},
};

const PAGE: usize = 4096;
/// Bytes of the image of the table: two pages of sums.
const SIZE: u64 = 100 * CHUNK + 512;
/// Bytes of a parcel's header, and of the head of each piece.
const HEADER: usize = 512;
const PIECE: usize = 32;

pub fn start() -> Case {
    let (table, parcels) = (table(), [parcel(true), parcel(false)]);
    Box::new(move |rng| match rng.bool() {
        true => load(rng, &table),
        false => unpack(rng, &parcels),
    })
}

fn table() -> Vec<u8> {
    let mut builder = TableBuilder::default();
    for chunk in [0, 3, 4, 90, 100] {
        let len = if chunk == 100 { 512 } else { CHUNK as usize };
        builder.set(Chunk(chunk), &ChunkSum::of(&vec![chunk as u8 + 1; len]));
    }
    let file = tempfile().unwrap();
    builder.finish(SIZE).store(&file, "a table").unwrap();
    let mut bytes = vec![0; file.metadata().unwrap().len() as usize];
    file.read_exact_at(&mut bytes, 0).unwrap();
    bytes
}

fn load(rng: &mut Rng, table: &[u8]) {
    let mut bytes = table.to_vec();
    for _ in 0..rng.usize(1..4) {
        let page = rng.usize(..bytes.len() / PAGE) * PAGE;
        let end = if rng.bool() { page + 128 } else { page + PAGE };
        scribble(rng, &mut bytes[page..end]);
    }
    if rng.u8(..8) == 0 {
        mutate(rng, &mut bytes, &[table.to_vec()], 64 << 10);
    }
    if rng.u8(..6) != 0 {
        seal_table(&mut bytes);
    }
    let file: File = tempfile().unwrap();
    { &file }.write_all(&bytes).unwrap();
    match ChunkTable::load(&file, "a table") {
        Ok(table) => {
            for chunk in (0..table.chunks().min(1000)).map(Chunk) {
                assert!(table.chunk_len(chunk) as u64 <= CHUNK);
                let _ = table.sum(chunk).map(|sum| sum.data_runs(table.chunk_len(chunk)));
            }
            assert!(table.data_bytes() <= table.size().next_multiple_of(PAGE as u64));
        }
        Err(error) => {
            assert!(matches!(error.kind(), Kind::Corrupt | Kind::Unsupported), "{error}");
            assert!(error.to_string().contains("a table"), "{error}");
        }
    }
}

/// Gives a table the checksums that it needs: `docs/chunk-table.md`.
fn seal_table(bytes: &mut [u8]) {
    let (mut stored, mut sums) = (0_u64, crc32fast::Hasher::new());
    for (number, page) in bytes.chunks_exact_mut(PAGE).skip(1).enumerate() {
        if page.iter().any(|byte| *byte != 0) {
            let crc = crc32fast::hash(&page[4..]);
            page[..4].copy_from_slice(&crc.to_le_bytes());
            sums.update(&(number as u64).to_le_bytes());
            sums.update(&page[..4]);
            stored += 1;
        }
    }
    if let Some(header) = bytes.get_mut(..PAGE) {
        header[72..80].copy_from_slice(&stored.to_le_bytes());
        header[80..84].copy_from_slice(&sums.finalize().to_le_bytes());
        let crc = crc32fast::hash(&header[..PAGE - 4]);
        header[PAGE - 4..].copy_from_slice(&crc.to_le_bytes());
    }
}

fn parcel(over: bool) -> Vec<u8> {
    let over = over.then(|| Over {
        digest: [7; 32],
        size: 4 << 20,
        name: "an-image".into(),
        source: "https://example.org/an-image.qcow2".into(),
    });
    let mut writer = Writer::new(Vec::new(), &Header { size: 8 << 20, over }).unwrap();
    writer.data(512, &[1; 3000]).unwrap();
    writer.zero(65536, 1 << 20).unwrap();
    writer.data(2 << 20, &[2; 70_000]).unwrap();
    writer.end().unwrap()
}

fn unpack(rng: &mut Rng, parcels: &[Vec<u8>]) {
    let mut bytes = parcels[rng.usize(..parcels.len())].clone();
    for _ in 0..rng.usize(1..4) {
        match rng.u8(..4) {
            0 => mutate(rng, &mut bytes, parcels, 256 << 10),
            1 if bytes.len() > HEADER => scribble(rng, &mut bytes[..HEADER]),
            2 if bytes.len() > HEADER + PIECE => scribble(rng, &mut bytes[HEADER..HEADER + PIECE]),
            _ => scribble(rng, &mut bytes),
        }
    }
    if rng.u8(..6) != 0 {
        seal(&mut bytes);
    }
    let mut reader = match Reader::new(Cursor::new(bytes)) {
        Ok(reader) => reader,
        Err(error) => return refused(&error),
    };
    let (size, mut at) = (reader.header().size, 0);
    loop {
        let (offset, len) = match reader.piece() {
            Ok(None) => return,
            Ok(Some(Piece::Data { offset, bytes })) => {
                assert!(bytes.len() <= PIECE_MAX);
                (offset, bytes.len() as u64)
            }
            Ok(Some(Piece::Zero { offset, len })) => (offset, len),
            Err(error) => return refused(&error),
        };
        assert!(offset >= at && len > 0 && offset.checked_add(len).is_some_and(|end| end <= size));
        at = offset + len;
    }
}

fn refused(error: &underlay::Error) {
    let kinds = [Kind::Corrupt, Kind::Unsupported, Kind::Invalid, Kind::Io, Kind::Unavailable];
    assert!(kinds.contains(&error.kind()), "{:?}: {error}", error.kind());
}

/// Gives the header and the first piece the checksums that they need.
fn seal(bytes: &mut [u8]) {
    if let Some(header) = bytes.get_mut(..HEADER) {
        checksum(header, 12);
    }
    let Some(head) = bytes.get(HEADER..HEADER + PIECE) else { return };
    let len = u64::from_le_bytes(head[24..32].try_into().unwrap());
    let held = if head[8..12] == [1, 0, 0, 0] { len } else { 0 };
    if let Some(end) = usize::try_from(held).ok().and_then(|held| held.checked_add(HEADER + PIECE))
        && let Some(piece) = bytes.get_mut(HEADER..end)
    {
        checksum(piece, 4);
    }
}
