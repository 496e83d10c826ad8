//! Images from whoever: qcow2, VMDK, raw, compressed. An import fails with an error that names the source, or gives
//! a copy whose content is what its table says.

use std::{
    fs::{self, File},
    io::{Cursor, Read, Write},
    sync::atomic::AtomicBool,
};

use fastrand::Rng;
use tempfile::TempDir;
use underlay::{
    Kind,
    image::{
        CHUNKS_FILE, ChunkTable, DATA_FILE, Format, ImportRequest, Source, import, qcow2_write,
        verify,
    },
};

use crate::{
    Case,
    mutator::{mutate, scribble},
};

/// Bytes of the images that are spoilt.
const SIZE: usize = 1 << 20;
/// Bytes of one that is served: a larger claim is fine if it holds little.
const CLUSTER: usize = 64 << 10;

pub fn start() -> Case {
    let originals = originals();
    Box::new(move |rng| {
        let mut bytes = originals[rng.usize(..originals.len())].clone();
        for _ in 0..rng.usize(1..5) {
            match rng.u8(..6) {
                0 => mutate(rng, &mut bytes, &originals, 4 << 20),
                // Where headers and tables are.
                1..4 => {
                    let end = bytes.len().min(512);
                    scribble(rng, &mut bytes[..end]);
                }
                _ => scribble(rng, &mut bytes),
            }
        }
        let packed = match rng.u8(..8) {
            0 => compressed(rng, &bytes),
            _ => bytes,
        };
        case(rng, packed);
    })
}

fn originals() -> Vec<Vec<u8>> {
    let mut content = vec![0; SIZE];
    let mut rng = Rng::with_seed(1);
    for start in [0, 3 * CLUSTER, 9 * CLUSTER + 512, SIZE - 4096] {
        rng.fill(&mut content[start..start + 4096]);
    }
    let mut written = qcow2_write::Writer::new(Cursor::new(Vec::new()), SIZE as u64);
    for (at, run) in content.chunks(CLUSTER).enumerate() {
        written.write((at * CLUSTER) as u64, run).unwrap();
    }
    let qcow2 = written.end().unwrap().into_inner();
    vec![
        qcow2,
        qcow2_by_hand(),
        vmdk_by_hand(),
        packed(&content, 0),
        packed(&content, 1),
        packed(&content, 2),
        content,
    ]
}

fn compressed(rng: &mut Rng, bytes: &[u8]) -> Vec<u8> {
    packed(bytes, rng.u8(..3))
}

fn packed(bytes: &[u8], how: u8) -> Vec<u8> {
    let mut packed = Vec::new();
    match how {
        0 => {
            let mut encoder = flate2::write::GzEncoder::new(packed, flate2::Compression::fast());
            encoder.write_all(bytes).unwrap();
            return encoder.finish().unwrap();
        }
        1 => liblzma::read::XzEncoder::new(bytes, 0).read_to_end(&mut packed).map(drop).unwrap(),
        _ => zstd::stream::copy_encode(bytes, &mut packed, 1).unwrap(),
    }
    packed
}

fn put(bytes: &mut [u8], at: usize, value: &[u8]) {
    bytes[at..at + value.len()].copy_from_slice(value);
}

/// A qcow2 of version 3: header, L1 table, L2 table with a cluster of data, one of zeros, a compressed one.
fn qcow2_by_hand() -> Vec<u8> {
    let mut bytes = vec![0; 5 * CLUSTER];
    put(&mut bytes, 0, b"QFI\xfb");
    put(&mut bytes, 4, &3_u32.to_be_bytes());
    put(&mut bytes, 20, &16_u32.to_be_bytes());
    put(&mut bytes, 24, &(SIZE as u64).to_be_bytes());
    put(&mut bytes, 36, &1_u32.to_be_bytes());
    put(&mut bytes, 40, &(CLUSTER as u64).to_be_bytes());
    put(&mut bytes, 96, &4_u32.to_be_bytes());
    put(&mut bytes, 100, &104_u32.to_be_bytes());
    put(&mut bytes, CLUSTER, &((2 * CLUSTER as u64) | (1 << 63)).to_be_bytes());
    put(&mut bytes, 2 * CLUSTER, &((3 * CLUSTER as u64) | (1 << 63)).to_be_bytes());
    put(&mut bytes, 2 * CLUSTER + 8, &1_u64.to_be_bytes());
    let mut deflated = flate2::write::DeflateEncoder::new(Vec::new(), flate2::Compression::fast());
    deflated.write_all(&[0xcd; CLUSTER]).unwrap();
    let deflated = deflated.finish().unwrap();
    let sectors = (deflated.len().div_ceil(512) - 1) as u64;
    let entry = (1 << 62) | (sectors << (62 - (16 - 8))) | (4 * CLUSTER) as u64;
    put(&mut bytes, 2 * CLUSTER + 16, &entry.to_be_bytes());
    put(&mut bytes, 3 * CLUSTER, &[0xab; CLUSTER]);
    put(&mut bytes, 4 * CLUSTER, &deflated);
    bytes
}

/// A sparse VMDK of one extent: header, descriptor, a grain directory with one table, one grain of data.
fn vmdk_by_hand() -> Vec<u8> {
    let sector = 512;
    let mut bytes = vec![0; 256 * sector];
    put(&mut bytes, 0, b"KDMV");
    put(&mut bytes, 4, &1_u32.to_le_bytes());
    put(&mut bytes, 8, &3_u32.to_le_bytes());
    put(&mut bytes, 12, &((SIZE / sector) as u64).to_le_bytes());
    put(&mut bytes, 20, &128_u64.to_le_bytes());
    put(&mut bytes, 28, &1_u64.to_le_bytes());
    put(&mut bytes, 36, &2_u64.to_le_bytes());
    put(&mut bytes, 44, &512_u32.to_le_bytes());
    put(&mut bytes, 48, &3_u64.to_le_bytes());
    put(&mut bytes, 56, &3_u64.to_le_bytes());
    put(&mut bytes, 64, &128_u64.to_le_bytes());
    put(&mut bytes, 73, b"\n \r\n");
    let text = "# Disk DescriptorFile\nversion=1\nCID=1\nparentCID=ffffffff\n\
                createType=\"monolithicSparse\"\nRW 2048 SPARSE \"image.vmdk\"\n";
    put(&mut bytes, sector, text.as_bytes());
    put(&mut bytes, 3 * sector, &4_u32.to_le_bytes());
    put(&mut bytes, 4 * sector + 4, &128_u32.to_le_bytes());
    put(&mut bytes, 128 * sector, &[0xef; CLUSTER]);
    bytes
}

fn case(rng: &mut Rng, bytes: Vec<u8>) {
    let dir = TempDir::new_in("/dev/shm").or_else(|_| TempDir::new()).unwrap();
    let formats = [Format::Auto, Format::Auto, Format::Qcow2, Format::Vmdk, Format::Raw];
    let format = formats[rng.usize(..formats.len())];
    let source = if rng.bool() {
        let path = dir.path().join("hostile.img");
        fs::write(&path, &bytes).unwrap();
        Source::Path(path)
    } else {
        let (name, length) = ("hostile.img".into(), Some(bytes.len() as u64));
        Source::Stream { name, reader: Box::new(Cursor::new(bytes)), length }
    };
    let into = dir.path().join("into");
    fs::create_dir(&into).unwrap();
    let request = ImportRequest { name: "an-image".into(), source, format, sha256: None };
    let never = AtomicBool::new(false);
    match import(request, &into, &|_| {}, &never) {
        Ok(imported) => {
            let data = File::open(into.join(DATA_FILE)).unwrap();
            let table = ChunkTable::load(&File::open(into.join(CHUNKS_FILE)).unwrap(), "chunks");
            let table = table.unwrap();
            assert_eq!((table.size(), table.digest()), (imported.size, imported.digest));
            assert_eq!(data.metadata().unwrap().len(), imported.size);
            let report = verify(&data, &table, "data", &|_| {}, &never).unwrap();
            assert!(report.is_sound(), "{report:?}");
        }
        Err(error) => {
            let text = error.to_string();
            let kinds = [Kind::Corrupt, Kind::Unsupported, Kind::Invalid];
            assert!(kinds.contains(&error.kind()), "{:?}: {text}", error.kind());
            assert!(text.contains("hostile.img") || text.contains("an-image"), "{text}");
        }
    }
}
