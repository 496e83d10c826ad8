//! Invariants checked: a cache whose header is not its own is made anew; the cache of an image that may
//! come back is nobody's to remove.

use std::{fs, os::unix::fs::FileExt};

use nix::fcntl::OFlag;

use super::*;
use crate::{catalog::CacheShape, units::BLOCK};

const IMAGE: &[u8] = &[7; 8192];

fn shape() -> CacheShape {
    let digest = digest(IMAGE);
    CacheShape { digest, size: IMAGE.len() as u64, header: digest.0.to_vec(), table: 2 * BLOCK }
}

#[test]
fn a_cache_is_opened_only_with_its_own_header() {
    let (bench, node) = Bench::with(&["a"]);
    let open = || node.open_cache(&name("a"), &shape(), OFlag::empty()).unwrap();
    let first = |data: &fs::File| {
        let mut byte = [0];
        data.read_exact_at(&mut byte, 0).unwrap();
        byte[0]
    };
    open().data.write_all_at(&[1], 0).unwrap();
    assert_eq!(first(&open().data), 1, "it stays");
    // As a crash leaves it before it was ever written back, and as another image's.
    for header in [[0; 32], [9; 32]] {
        let table = bench.home("a").join("cache").join(digest(IMAGE).to_string()).join("chunks");
        let table = fs::OpenOptions::new().write(true).open(table).unwrap();
        table.write_all_at(&header, 0).unwrap();
        let anew = open();
        assert_eq!(first(&anew.data), 0, "what was there belongs to nobody");
        anew.data.write_all_at(&[1], 0).unwrap();
        assert_eq!(first(&open().data), 1, "it has its header again");
    }
}

#[test]
fn an_image_is_gone_only_if_nothing_can_bring_it_back() {
    let (bench, node) = Bench::with(&["a", "b"]);
    let id = digest(IMAGE);
    assert!(node.is_image_gone(id));
    import(&node, Some("a"), "debian", IMAGE).unwrap();
    assert_eq!((node.is_image_gone(id), node.image_size(id)), (false, Some(8192)));
    drop(node);
    // The disk of its only copy is away, whether somebody stands on it or not.
    fs::rename(bench.path("a"), bench.path("lost")).unwrap();
    let node = bench.open();
    assert_eq!((node.is_image_gone(id), node.image_size(id)), (false, None));
    fs::rename(bench.path("lost"), bench.path("a")).unwrap();
    bench.add(&node, "a").unwrap();
    create(&node, "vm1", "debian", "b").unwrap();
    drop(node);
    // All known disks are there, but a replica stands on it.
    fs::rename(bench.path("a"), bench.path("lost")).unwrap();
    let node = bench.open();
    node.remove_disk(&name("a")).unwrap();
    assert!(!node.is_image_gone(id));
    node.remove_replica(&name("vm1")).unwrap();
    assert!(node.is_image_gone(id));
}

#[test]
fn a_damaged_copy_is_no_reason_to_forget_its_cache() {
    let (bench, node) = Bench::with(&["a"]);
    import(&node, Some("a"), "debian", IMAGE).unwrap();
    drop(node);
    let data = bench.home("a").join("images").join(digest(IMAGE).to_string()).join("data");
    fs::remove_file(data).unwrap();
    let node = bench.open();
    assert!(!node.is_image_gone(digest(IMAGE)));
}
