//! Streams: pipes, compression around any format, members and frames in a row, damage.

use std::{
    io::{self, Cursor, Read, Write},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    thread,
    time::{Duration, Instant},
};

use flate2::{Compression, write::GzEncoder};
use tempfile::TempDir;
use underlay::{
    error::Kind,
    image::{Format, Source},
};

use crate::support::*;

type Packer = fn(&[u8]) -> Vec<u8>;

const PACKERS: [(&str, Packer); 3] = [("gz", gzip), ("xz", xz), ("zst", zstd)];

pub fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

fn xz(bytes: &[u8]) -> Vec<u8> {
    let mut packed = Vec::new();
    liblzma::read::XzEncoder::new(bytes, 0).read_to_end(&mut packed).unwrap();
    packed
}

/// With a checksum, as the command-line tool makes it.
fn zstd(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = zstd::Encoder::new(Vec::new(), 1).unwrap();
    encoder.include_checksum(true).unwrap();
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

fn stream(bytes: Vec<u8>) -> Source {
    let length = Some(bytes.len() as u64);
    Source::Stream { name: "a stream".into(), reader: Box::new(Cursor::new(bytes)), length }
}

#[test]
fn raw_streams_of_all_sizes() {
    for (seed, size) in [1, 512, CHUNK, CHUNK + 700, 6 << 20].into_iter().enumerate() {
        let expected = content(seed as u64, size);
        let copy = import_auto(stream(expected.clone())).unwrap();
        copy.check(&expected);
        assert_eq!(copy.imported.source_sha256, Some(sha256(&expected)));
    }
}

#[test]
fn a_pipe_is_read_as_it_comes() {
    let (reader, mut writer) = io::pipe().unwrap();
    let expected = content(9, 3 << 20);
    let sent = expected.clone();
    let feeding = thread::spawn(move || {
        for piece in sent.chunks(10_007) {
            writer.write_all(piece).unwrap();
        }
    });
    let file = std::fs::File::from(std::os::fd::OwnedFd::from(reader));
    let copy = import_auto(Source::File { name: "pipe".into(), file }).unwrap();
    feeding.join().unwrap();
    copy.check(&expected);
}

#[test]
fn a_named_pipe_waits_for_its_writer() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("pipe");
    nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
    let expected = content(19, 1 << 20);
    let (sent, to) = (expected.clone(), path.clone());
    let feeding = thread::spawn(move || {
        thread::sleep(Duration::from_millis(200));
        std::fs::write(to, sent).unwrap();
    });
    import_file(&path).unwrap().check(&expected);
    feeding.join().unwrap();
}

#[test]
fn compression_is_taken_off_files_and_streams() {
    let dir = TempDir::new().unwrap();
    let expected = content(10, (3 << 20) + 512);
    for (name, pack) in PACKERS {
        let packed = pack(&expected);
        let path = file_with(&dir, name, &packed);
        let copy = import_with(
            Source::Path(path),
            Format::Auto,
            Some(sha256(&packed)),
            &AtomicBool::new(false),
        )
        .unwrap();
        copy.check(&expected);
        assert_eq!(copy.imported.source_sha256, Some(sha256(&packed)), "{name}");
        import_auto(stream(packed)).unwrap().check(&expected);
    }
}

#[test]
fn members_streams_and_frames_in_a_row_are_one_image() {
    let expected = content(11, 2 << 20);
    let (first, second) = expected.split_at(700_001);
    for (name, pack) in PACKERS {
        let packed = [pack(first), pack(second)].concat();
        let copy = import_auto(stream(packed)).unwrap_or_else(|error| panic!("{name}: {error}"));
        copy.check(&expected);
    }
    // zstd writes skippable frames before, between and after.
    let skippable = [&[0x50, 0x2a, 0x4d, 0x18, 4, 0, 0, 0][..], b"skip"].concat();
    let packed = [skippable.clone(), zstd(first), skippable.clone(), zstd(second), skippable];
    import_auto(stream(packed.concat())).unwrap().check(&expected);
    // xz pads streams with zeros.
    let packed = [xz(first), vec![0; 8], xz(second), vec![0; 4]].concat();
    import_auto(stream(packed)).unwrap().check(&expected);
}

#[test]
fn damaged_and_cut_compression_is_an_error_everywhere() {
    let expected = content(12, 600_000);
    for (name, pack) in PACKERS {
        let packed = pack(&expected);
        for step in 1..40 {
            let cut = packed.len() * step / 40;
            let error = import_auto(stream(packed[..cut].to_vec())).err();
            let error = error.unwrap_or_else(|| panic!("{name} cut at {cut} passed"));
            assert_eq!(error.kind(), Kind::Corrupt, "{name} cut at {cut}: {error}");
            assert!(error.to_string().contains("a stream"), "{error}");
        }
        let error = import_auto(stream(packed[..packed.len() - 1].to_vec())).err();
        assert!(error.is_some(), "{name} without its last byte passed");
        for step in 0..40 {
            let mut packed = packed.clone();
            let at = 8 + (packed.len() - 9) * step / 40;
            packed[at] ^= 0x10;
            // A flip may hit what no decoder reads; it must not change the content unnoticed.
            match import_auto(stream(packed)) {
                Ok(copy) => copy.check(&expected),
                Err(error) => assert_eq!(error.kind(), Kind::Corrupt, "{name}: {error}"),
            }
        }
    }
}

#[test]
fn trailing_garbage_after_gzip_is_an_error() {
    let mut packed = gzip(&content(13, 100_000));
    packed.extend_from_slice(b"garbage");
    let error = import_auto(stream(packed)).err().unwrap();
    assert_eq!(error.kind(), Kind::Corrupt, "{error}");
}

#[test]
fn what_is_compressed_twice_or_no_image_is_told() {
    let expected = content(14, 100_000);
    let error = import_auto(stream(zstd(&gzip(&expected)))).err().unwrap();
    assert!(error.to_string().contains("compressed twice"), "{error}");
    let copy = import_as(stream(zstd(&gzip(&expected))), Format::Raw).unwrap();
    copy.check(&gzip(&expected));

    let mut tar = vec![0; 10240];
    tar[257..262].copy_from_slice(b"ustar");
    for (bytes, what) in [
        (tar, "tar"),
        (b"PK\x03\x04......".to_vec(), "zip"),
        (b"<!DOCTYPE html><html>".to_vec(), "HTML"),
        (b"vhdxfile".to_vec(), "VHDX"),
    ] {
        let error = import_auto(stream(bytes.clone())).err().unwrap();
        assert_eq!(error.kind(), Kind::Unsupported);
        assert!(error.to_string().contains(what), "{error}");
        import_as(stream(bytes.clone()), Format::Raw).unwrap().check(&bytes);
    }
    for packed in [gzip(b""), xz(b""), zstd(b""), Vec::new()] {
        let error = import_auto(stream(packed)).err().unwrap();
        assert_eq!(error.kind(), Kind::Invalid, "{error}");
    }
}

#[test]
fn a_stream_shorter_or_longer_than_told_is_refused() {
    for told in [99_999, 100_001] {
        let source = Source::Stream {
            name: "liar".into(),
            reader: Box::new(Cursor::new(content(15, 100_000))),
            length: Some(told),
        };
        let error = import_auto(source).err().unwrap();
        assert_eq!(error.kind(), Kind::Corrupt);
        assert!(error.to_string().contains("100000 of"), "{error}");
    }
}

struct Failing(usize);

impl Read for Failing {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        if self.0 == 0 {
            return Err(io::Error::from_raw_os_error(libc::EIO));
        }
        let count = buf.len().min(self.0);
        buf[..count].fill(3);
        self.0 -= count;
        Ok(count)
    }
}

#[test]
fn a_source_that_fails_is_told_with_its_own_error() {
    for bytes in [0, 100, 1_000_000] {
        let reader = Box::new(Failing(bytes));
        let source = Source::Stream { name: "sick disk".into(), reader, length: None };
        let error = import_auto(source).err().unwrap();
        assert_eq!(error.kind(), Kind::Io);
        assert!(error.to_string().contains("sick disk"), "{error}");
    }
}

#[test]
fn a_silent_source_does_not_hold_up_a_cancellation() {
    let (reader, writer) = io::pipe().unwrap();
    let file = std::fs::File::from(std::os::fd::OwnedFd::from(reader));
    let cancel = Arc::new(AtomicBool::new(false));
    let canceller = cancel.clone();
    thread::spawn(move || {
        thread::sleep(Duration::from_millis(200));
        canceller.store(true, Relaxed);
    });
    let started = Instant::now();
    let source = Source::File { name: "silent".into(), file };
    let error = import_with(source, Format::Auto, None, &cancel).err().unwrap();
    assert_eq!(error.kind(), Kind::Cancelled, "{error}");
    assert!(started.elapsed() < Duration::from_secs(2));
    drop(writer);
}

#[test]
fn a_qcow2_stream_that_is_refused_is_not_stored_first() {
    let mut head = crate::hostile::handmade();
    head[72 + 7] |= 1 << 2;
    // What follows would never end.
    let endless = Cursor::new(head).chain(io::repeat(7));
    let source = Source::Stream { name: "endless".into(), reader: Box::new(endless), length: None };
    let error = import_auto(source).err().unwrap();
    assert_eq!(error.kind(), Kind::Unsupported);
    assert!(error.to_string().contains("another file"), "{error}");
}

#[test]
fn a_qcow2_stream_is_stored_first_and_leaves_nothing() {
    if !have_qemu_img("a_qcow2_stream_is_stored_first") {
        return;
    }
    let dir = TempDir::new().unwrap();
    let expected = content(16, 5 << 20);
    let image = std::fs::read(converted(&dir, &expected, "qcow2", &["-c"])).unwrap();
    for (name, packed) in [("plain", image.clone()), ("gz", gzip(&image)), ("xz", xz(&image))] {
        let copy = import_with(
            stream(packed.clone()),
            Format::Auto,
            Some(sha256(&packed)),
            &AtomicBool::new(false),
        )
        .unwrap();
        copy.check(&expected);
        let mut left: Vec<_> =
            std::fs::read_dir(copy.dir.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
        left.sort();
        assert_eq!(left, ["chunks", "data"], "{name}");
    }
}
