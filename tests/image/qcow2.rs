//! qcow2 as qemu-img and imago write it, compared with what they read out of it.

use std::{
    fs::File,
    path::Path,
    process::Command,
    time::{Duration, Instant},
};

use imago::{
    DenyImplicitOpenGate, FormatAccess, FormatCreateBuilder, FormatDriverBuilder, Storage,
    StorageCreateOptions, file::File as ImagoFile, qcow2::Qcow2,
};
use tempfile::TempDir;
use underlay::image::{Format, Source};

use crate::support::*;

/// Imports an image and compares it with the content and with what qemu-img reads.
fn check(image: &std::path::Path, expected: &[u8]) {
    let copy = import_file(image).unwrap();
    assert_eq!(copy.imported.format, Format::Qcow2);
    assert!(qemu_content(image, "qcow2") == expected, "qemu-img disagrees with the test");
    copy.check(expected);
}

#[test]
fn every_cluster_size_and_version() {
    if !have_qemu_img("every_cluster_size_and_version") {
        return;
    }
    let expected = content(30, (9 << 20) + 512);
    for bits in 9..=21 {
        for version in ["0.10", "1.1"] {
            for compressed in [false, true] {
                let dir = TempDir::new().unwrap();
                let options = format!("cluster_size={},compat={version}", 1 << bits);
                let mut args = vec!["-o", &options];
                args.extend(compressed.then_some("-c"));
                let image = converted(&dir, &expected, "qcow2", &args);
                let copy = import_file(&image).unwrap_or_else(|error| panic!("{args:?}: {error}"));
                copy.check(&expected);
            }
        }
    }
}

#[test]
fn zstd_subclusters_refcounts_and_preallocation() {
    if !have_qemu_img("zstd_subclusters_refcounts_and_preallocation") {
        return;
    }
    let expected = content(31, (6 << 20) + 4096);
    for (options, compressed) in [
        ("compression_type=zstd", true),
        ("compression_type=zstd,cluster_size=2M", true),
        ("compression_type=zstd,cluster_size=512", true),
        ("compression_type=zstd", false),
        ("extended_l2=on,cluster_size=16k", false),
        ("extended_l2=on,cluster_size=128k", false),
        ("extended_l2=on,cluster_size=2M", false),
        ("extended_l2=on,cluster_size=64k", true),
        ("refcount_bits=1", false),
        ("refcount_bits=64", false),
        ("lazy_refcounts=on", false),
        ("preallocation=metadata", false),
        ("preallocation=falloc", false),
        ("preallocation=full", false),
        ("preallocation=metadata,extended_l2=on,cluster_size=64k", false),
    ] {
        let dir = TempDir::new().unwrap();
        let mut args = vec!["-o", options];
        args.extend(compressed.then_some("-c"));
        let image = converted(&dir, &expected, "qcow2", &args);
        println!("{args:?}");
        check(&image, &expected);
    }
}

#[test]
fn zero_clusters_overwrites_and_snapshots() {
    if !have_qemu_img("zero_clusters_overwrites_and_snapshots") {
        return;
    }
    for options in ["cluster_size=64k", "cluster_size=64k,extended_l2=on", "cluster_size=2M"] {
        let dir = TempDir::new().unwrap();
        let mut expected = content(32, 8 << 20);
        let image = converted(&dir, &expected, "qcow2", &["-o", options]);
        let path = image.to_str().unwrap();
        qemu_img(&["snapshot", "-c", "before", path]);
        let writes = [
            "write -z 64k 128k",
            "write -z 1000k 2000k",
            "write -z -u 4M 1M",
            "discard 6M 2M",
            "write -P 171 123392 4608",
            "write -P 205 6M 100k",
        ];
        let mut command = Command::new("qemu-io");
        command.args(["-f", "qcow2"]);
        writes.iter().for_each(|write| {
            command.args(["-c", write]);
        });
        let output = command.arg(path).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        expected[64 << 10..192 << 10].fill(0);
        expected[1000 << 10..3000 << 10].fill(0);
        expected[4 << 20..5 << 20].fill(0);
        expected[6 << 20..8 << 20].fill(0);
        expected[123_392..128_000].fill(171);
        expected[6 << 20..(6 << 20) + (100 << 10)].fill(205);
        check(&image, &expected);
    }
}

#[test]
fn sizes_that_no_cluster_divides_and_resized_images() {
    if !have_qemu_img("sizes_that_no_cluster_divides_and_resized_images") {
        return;
    }
    for size in [512, 4096, 65_536 + 512, (1 << 20) - 512] {
        let dir = TempDir::new().unwrap();
        let mut expected = content(33, size);
        let image = converted(&dir, &expected, "qcow2", &[]);
        check(&image, &expected);
        qemu_img(&["resize", "-q", image.to_str().unwrap(), "+3M"]);
        expected.resize(size + (3 << 20), 0);
        check(&image, &expected);
        qemu_img(&["resize", "-q", "--shrink", image.to_str().unwrap(), "512"]);
        expected.truncate(512);
        check(&image, &expected);
    }
}

#[test]
fn a_dirty_image_is_read() {
    if !have_qemu_img("a_dirty_image_is_read") {
        return;
    }
    let dir = TempDir::new().unwrap();
    let expected = content(34, 2 << 20);
    let image = converted(&dir, &expected, "qcow2", &["-o", "lazy_refcounts=on"]);
    let mut bytes = std::fs::read(&image).unwrap();
    bytes[79] |= 1;
    std::fs::write(&image, &bytes).unwrap();
    import_file(&image).unwrap().check(&expected);
}

#[test]
fn sparse_terabytes_are_quick() {
    if !have_qemu_img("sparse_terabytes_are_quick") {
        return;
    }
    for options in ["", "cluster_size=2M", "preallocation=metadata"] {
        let dir = TempDir::new().unwrap();
        let image = dir.path().join("tera.qcow2");
        let path = image.to_str().unwrap();
        let options =
            format!("lazy_refcounts=off{}{options}", if options.is_empty() { "" } else { "," });
        qemu_img(&["create", "-q", "-f", "qcow2", "-o", &options, path, "1T"]);
        let write = ["-f", "qcow2", "-c", "write -P 7 700G 1M", path];
        assert!(Command::new("qemu-io").args(write).output().unwrap().status.success());
        let started = Instant::now();
        let copy = import_file(&image).unwrap();
        let took = started.elapsed();
        println!("1 TiB sparse qcow2 ({options}): {took:?}");
        assert!(took < Duration::from_secs(60), "{took:?}");
        assert_eq!(copy.table().data_bytes(), 1 << 20);
        assert_eq!(copy.imported.size, 1 << 40);
    }
}

/// An image that imago wrote. No other program is needed.
async fn write_by_imago(path: &Path, expected: &[u8]) -> std::io::Result<()> {
    let file = ImagoFile::create_open(StorageCreateOptions::new().filename(path)).await?;
    let image = Qcow2::<ImagoFile>::create_builder(file)
        .size(expected.len() as u64)
        .create_open(DenyImplicitOpenGate::default(), |image| Ok(Qcow2::builder(image).write(true)))
        .await?;
    let image = FormatAccess::new(image);
    for (i, piece) in expected.chunks(96 << 10).enumerate() {
        if piece.iter().any(|byte| *byte != 0) {
            image.write(piece, (i * (96 << 10)) as u64).await?;
        }
    }
    image.flush().await
}

/// What imago reads out of an image of `size` bytes.
async fn read_by_imago(path: &Path, size: usize) -> std::io::Result<Vec<u8>> {
    let file = ImagoFile::try_from(File::open(path)?)?;
    let image = Qcow2::<ImagoFile>::builder(file).open(DenyImplicitOpenGate::default()).await?;
    let mut found = vec![0; size];
    FormatAccess::new(image).read(&mut found[..], 0).await?;
    Ok(found)
}

#[test]
fn imago_agrees() {
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("imago.qcow2");
    let expected = content(35, (7 << 20) + 1536);
    runtime.block_on(write_by_imago(&path, &expected)).unwrap();
    import_file(&path).unwrap().check(&expected);
    import_as(Source::Path(path.clone()), Format::Qcow2).unwrap().check(&expected);
    assert!(runtime.block_on(read_by_imago(&path, expected.len())).unwrap() == expected);

    // Why imago does not do the importing: what a truncated file has lost, it reads as zeros.
    let half = std::fs::metadata(&path).unwrap().len() / 2;
    File::options().write(true).open(&path).unwrap().set_len(half).unwrap();
    let found = runtime.block_on(read_by_imago(&path, expected.len()));
    println!("half an image, read by imago: {:?}", found.map(|found| found == expected));
    assert!(import_file(&path).is_err());
}
