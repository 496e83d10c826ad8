//! qcow2 images made to hurt: dependencies, encryption, truncation, flipped bytes, absurd claims.

use std::{
    path::PathBuf,
    time::{Duration, Instant},
};

use tempfile::TempDir;
use underlay::{
    Error,
    error::Kind,
    image::{Format, Source},
};

use crate::support::*;

/// A qcow2 of version 3 with clusters of 64 KiB made by hand: header, L1 table, L2 table, data.
/// 1 MiB large; the first cluster is data (0xab), the second zeros by flag, the rest unallocated.
pub fn handmade() -> Vec<u8> {
    const CLUSTER: usize = 64 << 10;
    let mut bytes = vec![0; 4 * CLUSTER];
    let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
    put(0, b"QFI\xfb");
    put(4, &3_u32.to_be_bytes());
    put(20, &16_u32.to_be_bytes());
    put(24, &(1_u64 << 20).to_be_bytes());
    put(36, &1_u32.to_be_bytes());
    put(40, &(CLUSTER as u64).to_be_bytes());
    put(96, &4_u32.to_be_bytes());
    put(100, &104_u32.to_be_bytes());
    put(CLUSTER, &((2 * CLUSTER as u64) | (1 << 63)).to_be_bytes());
    put(2 * CLUSTER, &((3 * CLUSTER as u64) | (1 << 63)).to_be_bytes());
    put(2 * CLUSTER + 8, &1_u64.to_be_bytes());
    put(3 * CLUSTER, &[0xab; CLUSTER]);
    bytes
}

fn handmade_content() -> Vec<u8> {
    let mut content = vec![0; 1 << 20];
    content[..64 << 10].fill(0xab);
    content
}

fn import_bytes(bytes: &[u8]) -> underlay::Result<Copy> {
    let dir = TempDir::new().unwrap();
    import_quickly(Source::Path(file_with(&dir, "hostile.qcow2", bytes)), Format::Qcow2)
}

fn changed(change: impl FnOnce(&mut Vec<u8>)) -> underlay::Result<Copy> {
    let mut bytes = handmade();
    change(&mut bytes);
    import_bytes(&bytes)
}

fn put(bytes: &mut [u8], at: usize, value: &[u8]) {
    bytes[at..at + value.len()].copy_from_slice(value);
}

#[track_caller]
fn refused(result: underlay::Result<Copy>, kind: Kind, word: &str) -> Error {
    let error = result.err().expect("was imported");
    let text = error.to_string();
    assert_eq!(error.kind(), kind, "{text}");
    assert!(text.contains(word) && text.contains("hostile.qcow2"), "{text}");
    error
}

#[test]
fn the_handmade_image_is_good_before_it_is_spoilt() {
    import_bytes(&handmade()).unwrap().check(&handmade_content());
}

#[test]
fn dependencies_and_encryption_are_refused_by_name() {
    let backing = |bytes: &mut Vec<u8>| {
        put(bytes, 8, &4096_u64.to_be_bytes());
        put(bytes, 16, &11_u32.to_be_bytes());
        put(bytes, 4096, b"/etc/passwd");
    };
    let error = refused(changed(backing), Kind::Unsupported, "/etc/passwd");
    assert!(error.to_string().contains("qemu-img convert"), "{error}");
    // A name that lies nowhere, or is absurdly long, is refused all the same.
    for (at, len) in [(u64::MAX, 11_u32), (4096, u32::MAX), (1 << 40, 1)] {
        let backing = |bytes: &mut Vec<u8>| {
            put(bytes, 8, &at.to_be_bytes());
            put(bytes, 16, &len.to_be_bytes());
        };
        refused(changed(backing), Kind::Unsupported, "backing file");
    }
    let features = |bits: u64| move |bytes: &mut Vec<u8>| put(bytes, 72, &bits.to_be_bytes());
    refused(changed(features(1 << 2)), Kind::Unsupported, "another file");
    refused(changed(features(1 << 1)), Kind::Corrupt, "marked as corrupt");
    refused(changed(features(1 << 5)), Kind::Unsupported, "0x20");
    refused(changed(features(1 << 63)), Kind::Unsupported, "features");
    changed(features(1)).unwrap().check(&handmade_content());
    for method in [1_u32, 2, 77] {
        let encrypt = |bytes: &mut Vec<u8>| put(bytes, 32, &method.to_be_bytes());
        refused(changed(encrypt), Kind::Unsupported, "encrypted");
    }
}

#[test]
fn a_real_backing_file_is_never_opened() {
    if !have_qemu_img("a_real_backing_file_is_never_opened") {
        return;
    }
    let dir = TempDir::new().unwrap();
    let secret = file_with(&dir, "secret", &[0x53; 1 << 20]);
    let image = dir.path().join("thief.qcow2");
    let (secret, path) = (secret.to_str().unwrap(), image.to_str().unwrap());
    qemu_img(&["create", "-q", "-f", "qcow2", "-b", secret, "-F", "raw", path]);
    let error = import_file(&image).err().unwrap();
    assert_eq!(error.kind(), Kind::Unsupported);
    assert!(error.to_string().contains(secret), "{error}");

    let data = dir.path().join("data-file.raw");
    let options = format!("data_file={}", data.display());
    let image = dir.path().join("external.qcow2");
    qemu_img(&["create", "-q", "-f", "qcow2", "-o", &options, image.to_str().unwrap(), "1M"]);
    let error = import_file(&image).err().unwrap();
    assert!(error.to_string().contains("another file"), "{error}");
    // Under the name of a compressed stream, too.
    let packed = crate::streams::gzip(&std::fs::read(&image).unwrap());
    assert!(import_file(&file_with(&dir, "packed.gz", &packed)).is_err());
}

#[test]
fn absurd_headers_cost_neither_time_nor_memory() {
    let started = Instant::now();
    for bits in [0_u32, 8, 22, 31, 32, 63, 64, u32::MAX] {
        let change = |bytes: &mut Vec<u8>| put(bytes, 20, &bits.to_be_bytes());
        refused(changed(change), Kind::Corrupt, "clusters");
    }
    for size in [(64_u64 << 40) + 1, 1 << 62, u64::MAX] {
        let change = |bytes: &mut Vec<u8>| put(bytes, 24, &size.to_be_bytes());
        refused(changed(change), Kind::Unsupported, "64 TiB");
    }
    let change = |bytes: &mut Vec<u8>| put(bytes, 24, &0_u64.to_be_bytes());
    refused(changed(change), Kind::Invalid, "empty");
    // The largest size with an L1 table to match that isn't there.
    let change = |bytes: &mut Vec<u8>| {
        put(bytes, 24, &(64_u64 << 40).to_be_bytes());
        put(bytes, 36, &u32::MAX.to_be_bytes());
    };
    refused(changed(change), Kind::Corrupt, "truncated");
    // Small clusters need an L1 table that is larger than anybody reads.
    let change = |bytes: &mut Vec<u8>| {
        put(bytes, 20, &9_u32.to_be_bytes());
        put(bytes, 24, &(64_u64 << 40).to_be_bytes());
        put(bytes, 36, &u32::MAX.to_be_bytes());
    };
    refused(changed(change), Kind::Corrupt, "32 MiB");
    let change = |bytes: &mut Vec<u8>| put(bytes, 36, &0_u32.to_be_bytes());
    refused(changed(change), Kind::Corrupt, "L1 table");
    for at in [1_u64 << 62, !0xffff, 1 << 40] {
        let change = |bytes: &mut Vec<u8>| put(bytes, 40, &at.to_be_bytes());
        refused(changed(change), Kind::Corrupt, "truncated");
    }
    for version in [0_u32, 1, 4, u32::MAX] {
        let change = |bytes: &mut Vec<u8>| put(bytes, 4, &version.to_be_bytes());
        refused(changed(change), Kind::Unsupported, "version");
    }
    assert!(started.elapsed() < Duration::from_secs(20));
}

#[test]
fn tables_that_point_astray_are_refused() {
    const L1: usize = 64 << 10;
    const L2: usize = 128 << 10;
    let entry =
        |at: usize, value: u64| move |bytes: &mut Vec<u8>| put(bytes, at, &value.to_be_bytes());
    refused(changed(entry(L1, 1 << 40)), Kind::Corrupt, "truncated");
    refused(changed(entry(L1, (128 << 10) + 512)), Kind::Corrupt, "misaligned");
    refused(changed(entry(L1, 0x00ff_ffff_ffff_fe00)), Kind::Corrupt, "misaligned");
    refused(changed(entry(L1, 0x00ff_ffff_ffff_0000)), Kind::Corrupt, "truncated");
    refused(changed(entry(L2, 4 << 16)), Kind::Corrupt, "truncated");
    refused(changed(entry(L2, (3 << 16) + 512)), Kind::Corrupt, "misaligned");
    // Compressed clusters: past the end, and of what is no deflated data.
    refused(changed(entry(L2, 1 << 62 | 1 << 40)), Kind::Corrupt, "truncated");
    refused(changed(entry(L2, 1 << 62 | 3 << 16)), Kind::Corrupt, "compressed cluster");
    // The L1 table as its own L2 table: whatever is read, nothing goes round in circles.
    let _ = changed(entry(L1, 64 << 10));
    // Every cluster in the same place is a strange image, but an image.
    let copy = changed(|bytes| {
        (0..16).for_each(|i| put(bytes, L2 + 8 * i, &(3_u64 << 16).to_be_bytes()));
    });
    copy.unwrap().check(&[0xab; 1 << 20]);
    // A zero flag in version 2, which doesn't have it.
    let change = |bytes: &mut Vec<u8>| put(bytes, 4, &2_u32.to_be_bytes());
    refused(changed(change), Kind::Corrupt, "version 2");
}

#[test]
fn every_flipped_header_byte_is_an_error_or_the_right_content() {
    for at in 0..112 {
        for bit in 0..8 {
            match changed(|bytes| bytes[at] ^= 1 << bit) {
                Err(error) => assert!(error.to_string().contains("hostile.qcow2"), "{error}"),
                // qcow2 has no checksums: another size, or subclusters, make another good image.
                Ok(copy) if (24..32).contains(&at) || (at, bit) == (79, 4) => {
                    assert_ne!(copy.imported.digest, reference_digest(&handmade_content()));
                }
                Ok(copy) => copy.check(&handmade_content()),
            }
        }
    }
}

#[test]
fn flipped_table_bytes_never_panic() {
    for table in [64 << 10, 128 << 10] {
        for at in table..table + 24 {
            for bit in 0..8 {
                let _ = changed(|bytes| bytes[at] ^= 1 << bit);
            }
        }
    }
}

#[test]
fn truncated_anywhere_is_an_error() {
    let bytes = handmade();
    for cut in (0..bytes.len()).step_by(4099).chain([1, 71, 72, 103, 104, bytes.len() - 1]) {
        assert!(import_bytes(&bytes[..cut]).is_err(), "cut at {cut} passed");
    }
    if !have_qemu_img("truncated_anywhere_is_an_error") {
        return;
    }
    let expected = content(50, 3 << 20);
    for args in
        [&["-c"][..], &[], &["-c", "-o", "compression_type=zstd"], &["-o", "cluster_size=4k"]]
    {
        let dir = TempDir::new().unwrap();
        let image = converted(&dir, &expected, "qcow2", args);
        let bytes = std::fs::read(&image).unwrap();
        let mut passed = Vec::new();
        for step in 0..100 {
            let cut = bytes.len() * step / 100;
            if let Ok(copy) = import_bytes(&bytes[..cut]) {
                // What was lost wasn't needed: reference counts, padding.
                copy.check(&expected);
                passed.push(cut);
            }
        }
        println!("{args:?}: {} bytes; cuts that lost nothing: {passed:?}", bytes.len());
        assert!(passed.len() < 50, "{args:?}: {passed:?}");
    }
}

#[test]
fn random_damage_never_panics_or_hangs() {
    let paths: Vec<PathBuf> = if have_qemu_img("random_damage_never_panics_or_hangs") {
        let dir = TempDir::new().unwrap().keep();
        let expected = content(51, 600_000 / 512 * 512);
        [
            ("a", &["-c"][..]),
            ("b", &["-o", "extended_l2=on,cluster_size=16k"]),
            ("c", &["-c", "-o", "compression_type=zstd"]),
        ]
        .into_iter()
        .map(|(name, args)| {
            let work = TempDir::new().unwrap();
            let path = dir.join(name);
            std::fs::copy(converted(&work, &expected, "qcow2", args), &path).unwrap();
            path
        })
        .collect()
    } else {
        Vec::new()
    };
    let mut images: Vec<Vec<u8>> = paths.iter().map(|path| std::fs::read(path).unwrap()).collect();
    if let Some(dir) = paths.first().and_then(|path| path.parent()) {
        std::fs::remove_dir_all(dir).unwrap();
    }
    images.push(handmade());
    let mut random = fastrand::Rng::with_seed(0xbad);
    let mut refused = 0;
    for round in 0..300 {
        let mut bytes = images[round % images.len()].clone();
        let l1 = table_at(&bytes, 40);
        let l2 = table_at(&bytes, l1);
        for _ in 0..random.usize(1..6) {
            // Most of it where it hurts: header, tables, first cluster.
            let start = [0, l1, l2, l2, random.usize(0..bytes.len())][random.usize(0..5)];
            let at = (start + random.usize(0..128)).min(bytes.len() - 1);
            bytes[at] = random.u8(..);
        }
        // Sizes beyond a few GiB only cost time here.
        bytes[24..28].fill(0);
        refused += usize::from(import_bytes(&bytes).is_err());
    }
    println!("{refused} of 300 damaged images were refused");
    assert!(refused > 100, "{refused}");
}

/// Where the table is that the entry at `at` points to.
fn table_at(bytes: &[u8], at: usize) -> usize {
    let entry = u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap());
    (entry & 0x00ff_ffff_ffff_fe00) as usize
}

#[test]
fn a_hostile_table_can_be_given_up() {
    use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
    // 32 MiB of L1 entries, all of the same L2 table, all of whose clusters are zeros by flag: two
    // thousand million of them to look at. Giving up must not wait for them.
    const CLUSTER: usize = 4096;
    let tables = 4 << 20;
    let mut bytes = handmade()[..112].to_vec();
    bytes.resize(CLUSTER + 8 * tables + CLUSTER, 0);
    let l2 = CLUSTER + 8 * tables;
    put(&mut bytes, 20, &12_u32.to_be_bytes());
    put(&mut bytes, 24, &((tables * 512 * CLUSTER) as u64).to_be_bytes());
    put(&mut bytes, 36, &(tables as u32).to_be_bytes());
    put(&mut bytes, 40, &(CLUSTER as u64).to_be_bytes());
    for i in 0..tables {
        put(&mut bytes, CLUSTER + 8 * i, &(l2 as u64).to_be_bytes());
    }
    for i in 0..512 {
        put(&mut bytes, l2 + 8 * i, &1_u64.to_be_bytes());
    }
    let dir = TempDir::new().unwrap();
    let path = file_with(&dir, "slow.qcow2", &bytes);
    let cancel = AtomicBool::new(false);
    let started = Instant::now();
    let result = std::thread::scope(|scope| {
        scope.spawn(|| {
            std::thread::sleep(Duration::from_millis(500));
            cancel.store(true, Relaxed);
        });
        import_with(Source::Path(path), Format::Qcow2, None, &cancel)
    });
    assert_eq!(result.err().unwrap().kind(), Kind::Cancelled);
    assert!(started.elapsed() < Duration::from_secs(5), "{:?}", started.elapsed());
}
