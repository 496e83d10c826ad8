//! Verification: exactly the damaged chunks are found, wherever they are.

use std::{
    fs::{File, Permissions},
    os::unix::fs::{FileExt, PermissionsExt},
    sync::atomic::AtomicBool,
};

use tempfile::TempDir;
use underlay::image::{VerifyReport, verify};

use crate::support::*;

fn writable(copy: &Copy) -> File {
    let path = copy.dir.path().join("data");
    std::fs::set_permissions(&path, Permissions::from_mode(0o600)).unwrap();
    File::options().read(true).write(true).open(path).unwrap()
}

fn report(copy: &Copy) -> VerifyReport {
    verify(&copy.data(), &copy.table(), "data", &|_| {}, &AtomicBool::new(false)).unwrap()
}

#[test]
fn each_damaged_chunk_is_found_and_no_other() {
    let dir = TempDir::new().unwrap();
    let size = 20 * CHUNK + 1536;
    let mut expected = content(20, size);
    // Chunks 9 and 10 are a hole, 12 is data throughout.
    expected[9 * CHUNK..11 * CHUNK].fill(0);
    expected[12 * CHUNK..13 * CHUNK].fill(9);
    let copy = import_file(&file_with(&dir, "raw", &expected)).unwrap();
    assert!(report(&copy).is_sound());
    let data = writable(&copy);
    for chunk in 0..21 {
        let at = (chunk * CHUNK + 1000) as u64;
        let mut old = [0];
        data.read_exact_at(&mut old, at).unwrap();
        data.write_all_at(&[old[0] ^ 1], at).unwrap();
        let found = report(&copy);
        assert_eq!(found.bad, [chunk as u64]);
        assert!(!found.is_sound() && found.digest_matches && found.size_matches);
        data.write_all_at(&old, at).unwrap();
    }
    assert!(report(&copy).is_sound());
}

#[test]
fn a_copy_cut_short_or_grown_is_not_sound() {
    let dir = TempDir::new().unwrap();
    let expected = vec![5; 5 * CHUNK];
    let copy = import_file(&file_with(&dir, "raw", &expected)).unwrap();
    let data = writable(&copy);
    data.set_len((3 * CHUNK + 100) as u64).unwrap();
    let found = report(&copy);
    assert_eq!(found.bad, [3, 4]);
    assert!(!found.size_matches);
    data.set_len((6 * CHUNK) as u64).unwrap();
    assert_eq!(report(&copy).bad, [3, 4]);
    let copy = import_file(&file_with(&dir, "raw", &expected)).unwrap();
    writable(&copy).set_len((6 * CHUNK) as u64).unwrap();
    let found = report(&copy);
    assert!(found.bad.is_empty() && !found.size_matches && !found.is_sound());
}

#[test]
fn random_damage_is_found_as_a_model_says() {
    let dir = TempDir::new().unwrap();
    let mut random = fastrand::Rng::with_seed(0x5eed);
    let expected = content(21, 40 * CHUNK);
    let copy = import_file(&file_with(&dir, "raw", &expected)).unwrap();
    let data = writable(&copy);
    let mut damaged = expected.clone();
    for round in 0..50 {
        let at = random.usize(0..damaged.len());
        let bytes = vec![random.u8(..); random.usize(1..5000).min(damaged.len() - at)];
        damaged[at..at + bytes.len()].copy_from_slice(&bytes);
        data.write_all_at(&bytes, at as u64).unwrap();
        let bad: Vec<u64> = (0..40)
            .filter(|c| damaged[c * CHUNK..(c + 1) * CHUNK] != expected[c * CHUNK..(c + 1) * CHUNK])
            .map(|c| c as u64)
            .collect();
        assert_eq!(report(&copy).bad, bad, "round {round}");
    }
}

#[test]
fn holes_are_not_read() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("sparse");
    let file = File::create(&path).unwrap();
    file.set_len(1 << 40).unwrap();
    file.write_all_at(b"here", 77 << 30).unwrap();
    let copy = import_file(&path).unwrap();
    let found = report(&copy);
    assert!(found.is_sound());
    assert_eq!(found.bytes, CHUNK as u64);
    assert_eq!(found.chunks, (1 << 40) / CHUNK as u64);
}
