//! VMDK: the kinds that are one file are read, those that name others are refused.

use tempfile::TempDir;
use underlay::{
    error::Kind,
    image::{Format, Source},
};

use crate::support::*;

#[test]
fn sparse_and_stream_optimized_images_are_read() {
    if !have_qemu_img("sparse_and_stream_optimized_images_are_read") {
        return;
    }
    for size in [512, 65_536, (40 << 20) + 512, (64 << 20) + 4096] {
        for kind in ["monolithicSparse", "streamOptimized"] {
            let dir = TempDir::new().unwrap();
            let expected = content(40, size);
            let options = format!("subformat={kind}");
            let image = converted(&dir, &expected, "vmdk", &["-o", &options]);
            let copy = import_file(&image).unwrap_or_else(|error| panic!("{kind} {size}: {error}"));
            assert_eq!(copy.imported.format, Format::Vmdk);
            // qemu-img rounds the size of some kinds up to whole grains.
            let mut expected = expected;
            expected.resize(copy.imported.size as usize, 0);
            assert!(qemu_content(&image, "vmdk") == expected, "{kind} {size}: qemu-img disagrees");
            copy.check(&expected);
        }
    }
}

#[test]
fn images_in_several_files_are_refused() {
    if !have_qemu_img("images_in_several_files_are_refused") {
        return;
    }
    for kind in ["monolithicFlat", "twoGbMaxExtentSparse", "twoGbMaxExtentFlat"] {
        let dir = TempDir::new().unwrap();
        let options = format!("subformat={kind}");
        let image = converted(&dir, &content(41, 1 << 20), "vmdk", &["-o", &options]);
        let error = import_file(&image).err().unwrap();
        assert_eq!(error.kind(), Kind::Unsupported, "{kind}: {error}");
        assert!(error.to_string().contains("names other files"), "{kind}: {error}");
    }
    // One part of a split image is not an image.
    let dir = TempDir::new().unwrap();
    let image =
        converted(&dir, &content(42, 1 << 20), "vmdk", &["-o", "subformat=twoGbMaxExtentSparse"]);
    let error = import_file(&image.with_file_name("image-s001.vmdk")).err().unwrap();
    assert!(error.to_string().contains("extent"), "{error}");
}

#[test]
fn a_descriptor_that_names_a_file_of_the_host_is_refused() {
    let dir = TempDir::new().unwrap();
    let text = "# Disk DescriptorFile\nversion=1\nCID=1\nparentCID=ffffffff\n\
                createType=\"monolithicFlat\"\nRW 4 FLAT \"/etc/passwd\" 0\n";
    let error = import_file(&file_with(&dir, "evil.vmdk", text.as_bytes())).err().unwrap();
    assert_eq!(error.kind(), Kind::Unsupported, "{error}");
}

#[test]
fn an_image_with_a_parent_is_refused() {
    if !have_qemu_img("an_image_with_a_parent_is_refused") {
        return;
    }
    let dir = TempDir::new().unwrap();
    let image = converted(&dir, &content(43, 1 << 20), "vmdk", &[]);
    let child = dir.path().join("child.vmdk");
    qemu_img(&[
        "create",
        "-q",
        "-f",
        "vmdk",
        "-b",
        image.to_str().unwrap(),
        "-F",
        "vmdk",
        child.to_str().unwrap(),
    ]);
    let error = import_file(&child).err().unwrap();
    assert!(error.to_string().contains("parent"), "{error}");
}

#[test]
fn truncated_anywhere_is_an_error() {
    if !have_qemu_img("vmdk truncated_anywhere_is_an_error") {
        return;
    }
    for kind in ["monolithicSparse", "streamOptimized"] {
        let dir = TempDir::new().unwrap();
        let expected = content(44, 2 << 20);
        let options = format!("subformat={kind}");
        let image = converted(&dir, &expected, "vmdk", &["-o", &options]);
        let bytes = std::fs::read(&image).unwrap();
        for step in 0..60 {
            let cut = bytes.len() * step / 60;
            let path = file_with(&dir, "cut.vmdk", &bytes[..cut]);
            // Cut within the header it is no VMDK any more, and raw content otherwise: name it.
            if let Ok(copy) = import_quickly(Source::Path(path), Format::Vmdk) {
                // Only the padding at the end may be lost.
                assert!(cut > bytes.len() * 3 / 4, "{kind} cut at {cut} of {} passed", bytes.len());
                copy.check(&expected);
            }
        }
    }
}

#[test]
fn every_flipped_byte_of_the_tables_is_an_error_or_harmless() {
    if !have_qemu_img("every_flipped_byte_of_the_tables_is_an_error_or_harmless") {
        return;
    }
    for kind in ["monolithicSparse", "streamOptimized"] {
        let dir = TempDir::new().unwrap();
        let expected = content(45, 300_032);
        let options = format!("subformat={kind}");
        let image = converted(&dir, &expected, "vmdk", &["-o", &options]);
        let bytes = std::fs::read(&image).unwrap();
        for at in (0..80).chain((80..bytes.len().min(6000)).step_by(13)) {
            let mut flipped = bytes.clone();
            flipped[at] ^= 1 << (at % 8);
            let path = file_with(&dir, "flipped.vmdk", &flipped);
            // Another size or grain size is another image: what counts is that nothing panics,
            // hangs or reads elsewhere.
            if let Ok(copy) = import_quickly(Source::Path(path), Format::Vmdk) {
                assert!(copy.imported.size <= 64 << 40);
            }
        }
    }
}
