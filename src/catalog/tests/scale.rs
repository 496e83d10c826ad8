//! Invariants checked: opening a node, and making a replica, take the time they may.

use std::time::{Duration, Instant};

use super::*;
use crate::catalog::record::{self, Base, FORMAT, RefRecord, ReplicaRecord};

/// Ten disks of ten images and two hundred replicas each: two thousand in all, written without the
/// syncs that making them one by one would take.
#[test]
fn two_thousand_replicas_open_in_well_under_a_second() {
    let names: Vec<String> = (0..10).map(|i| format!("d{i}")).collect();
    let (bench, node) = Bench::with(&names.iter().map(String::as_str).collect::<Vec<_>>());
    for (i, disk) in names.iter().enumerate() {
        for image in 0..10 {
            let image = format!("image-{}", i * 10 + image);
            import(&node, Some(disk), &image, image.as_bytes()).unwrap();
        }
    }
    let images = node.images();
    let disks = node.disks();
    for (i, disk) in disks.iter().enumerate() {
        for number in 0..200 {
            let image = &images[(i * 7 + number) % images.len()];
            let id = Uuid::new_v4();
            let vm = name(&format!("vm-{i}-{number}"));
            let at = disks.iter().find(|disk| disk.name == image.copies[0].disk).unwrap();
            let dir = bench.home(disk.name.as_str()).join("replicas").join(id.to_string());
            fs::create_dir(&dir).unwrap();
            fs::write(dir.join("map"), b"map").unwrap();
            fs::File::create(dir.join("data")).unwrap().set_len(1 << 40).unwrap();
            let base = Base {
                digest: image.digest,
                size: image.size,
                name: image.names[0].clone(),
                disk: at.id,
                disk_name: at.name.clone(),
            };
            let record = ReplicaRecord {
                format: FORMAT,
                id,
                name: vm.clone(),
                size: 1 << 40,
                image: Some(base),
                epoch: 0,
                moving_to: None,
                created: 0,
            };
            fs::write(dir.join("replica.json"), record::bytes(&record).unwrap()).unwrap();
            let reference = RefRecord {
                format: FORMAT,
                replica: id,
                name: vm,
                disk: disk.id,
                disk_name: disk.name.clone(),
                size: 1 << 40,
                created: 0,
            };
            let refs = image.copies[0].path.join("refs").join(format!("{id}.json"));
            fs::write(refs, record::bytes(&reference).unwrap()).unwrap();
        }
    }
    drop(node);
    let start = Instant::now();
    let node = bench.open();
    let opened = start.elapsed();
    let start = Instant::now();
    assert_eq!(node.replicas().len(), 2000);
    let listed = start.elapsed();
    let start = Instant::now();
    assert_eq!(node.status().replicas, 2000);
    let told = start.elapsed();
    println!("open {opened:?}, list {listed:?}, status {told:?}");
    assert_eq!(node.images().iter().map(|image| image.users.len()).sum::<usize>(), 2000);
    // Several times what a loaded machine takes: a change of order would show.
    assert!(opened < Duration::from_secs(5), "{opened:?}");
    assert!(listed < Duration::from_secs(5), "{listed:?}");
}

/// A figure rather than a limit: what a sync takes is the disk's affair.
#[test]
fn making_a_replica_takes_the_same_whatever_its_size() {
    let (_bench, node) = Bench::with(&["a", "b"]);
    import(&node, Some("a"), "debian", b"content!").unwrap();
    let mut times = Vec::new();
    for i in 0..20u64 {
        let size = if i % 2 == 0 { 1 << 20 } else { 8 << 40 };
        let new = NewReplica {
            name: name(&format!("vm{i}")),
            image: name("debian"),
            disk: name("b"),
            size: Some(size),
        };
        let start = Instant::now();
        let made = node.create_replica(new, |_, _| vec![1; 272 << 10]).unwrap();
        times.push(start.elapsed());
        assert!(made.stored_bytes < 1 << 20, "{}", made.stored_bytes);
    }
    times.sort();
    println!("create: median {:?}, worst {:?}", times[10], times[19]);
}
