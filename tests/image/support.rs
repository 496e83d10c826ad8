//! What the tests share: content that looks like disks, imports into temporary directories, and the
//! comparison of what came out.

use std::{
    fs::File,
    os::unix::fs::{FileExt, MetadataExt, PermissionsExt},
    path::{Path, PathBuf},
    process::Command,
    sync::atomic::AtomicBool,
};

use sha2::{Digest as _, Sha256};
use tempfile::TempDir;
pub use underlay::image::sha256;
use underlay::{
    Result,
    catalog::Digest,
    image::{ChunkTable, Format, ImportRequest, Imported, Source, import, verify},
};

pub const BLOCK: usize = 4096;
pub const CHUNK: usize = 256 << 10;

/// An import's directory and what it gave.
pub struct Copy {
    pub dir: TempDir,
    pub imported: Imported,
}

/// Disk-like content of `size` bytes from `seed`: zeros, text that compresses, noise, in pieces of
/// all sizes.
pub fn content(seed: u64, size: usize) -> Vec<u8> {
    let mut random = fastrand::Rng::with_seed(seed);
    let mut bytes = vec![0; size];
    let mut at = 0;
    while at < size {
        let unit = [512, BLOCK, 64 << 10, CHUNK][random.usize(0..4)];
        let len = (unit * random.usize(1..5)).min(size - at);
        let piece = &mut bytes[at..at + len];
        match random.u8(0..4) {
            0 | 1 => {}
            2 => random.fill(piece),
            _ => {
                let word = random.u64(..).to_le_bytes();
                piece.iter_mut().zip(word.iter().cycle()).for_each(|(byte, from)| *byte = *from);
            }
        }
        at += len;
    }
    // Whatever the seed: something at either end, so that the size is told by the content.
    bytes[0] = 1;
    bytes[size - 1] = 2;
    bytes
}

/// Imports a source in the given format.
pub fn import_as(source: Source, format: Format) -> Result<Copy> {
    import_with(source, format, None, &AtomicBool::new(false))
}

/// Imports a source whose format is to be found out.
pub fn import_auto(source: Source) -> Result<Copy> {
    import_as(source, Format::Auto)
}

/// Imports a file whose format is to be found out.
pub fn import_file(path: &Path) -> Result<Copy> {
    import_auto(Source::Path(path.to_owned()))
}

/// Imports into memory where that can be had: for the many imports that need no disk.
pub fn import_quickly(source: Source, format: Format) -> Result<Copy> {
    let dir = TempDir::new_in("/dev/shm").or_else(|_| TempDir::new()).unwrap();
    import_into(dir, source, format, None, &AtomicBool::new(false))
}

pub fn import_with(
    source: Source,
    format: Format,
    sha256: Option<Digest>,
    cancel: &AtomicBool,
) -> Result<Copy> {
    import_into(TempDir::new().unwrap(), source, format, sha256, cancel)
}

fn import_into(
    dir: TempDir,
    source: Source,
    format: Format,
    sha256: Option<Digest>,
    cancel: &AtomicBool,
) -> Result<Copy> {
    let request = ImportRequest { name: "test-image".into(), source, format, sha256 };
    let imported = import(request, dir.path(), &|_| {}, cancel)?;
    Ok(Copy { dir, imported })
}

impl Copy {
    pub fn data(&self) -> File {
        File::open(self.dir.path().join("data")).unwrap()
    }

    pub fn table(&self) -> ChunkTable {
        let chunks = File::open(self.dir.path().join("chunks")).unwrap();
        ChunkTable::load(&chunks, "chunks").unwrap()
    }

    /// Everything that must hold of an import of `expected`.
    pub fn check(&self, expected: &[u8]) {
        let mut expected = expected.to_vec();
        expected.resize(expected.len().next_multiple_of(512), 0);
        let data = self.data();
        let metadata = data.metadata().unwrap();
        assert_eq!(metadata.size(), expected.len() as u64);
        assert_eq!(metadata.permissions().mode() & 0o777, 0o400);
        let mut found = vec![0; expected.len()];
        data.read_exact_at(&mut found, 0).unwrap();
        if let Some(at) = (0..found.len()).find(|at| found[*at] != expected[*at]) {
            panic!("byte {at} differs: {:#x}, not {:#x}", found[at], expected[at]);
        }
        assert_eq!(self.imported.size, expected.len() as u64);
        assert_eq!(self.imported.digest, reference_digest(&expected));

        let blocks = expected.chunks(BLOCK).filter(|block| block.iter().any(|byte| *byte != 0));
        let needed = (blocks.count() * BLOCK) as u64;
        let table = self.table();
        assert_eq!(table.digest(), self.imported.digest);
        assert_eq!(table.data_bytes(), needed);
        // A file system may add a block for its own bookkeeping.
        let stored = metadata.blocks() * 512;
        assert!(stored <= needed + 64 * 1024, "{stored} bytes stored for {needed} of data");

        let report = verify(&data, &table, "data", &|_| {}, &AtomicBool::new(false)).unwrap();
        assert!(report.is_sound(), "{report:?}");
    }
}

/// The digest as the documentation has it, from the whole content.
pub fn reference_digest(content: &[u8]) -> Digest {
    let mut hasher = Sha256::new_with_prefix((content.len() as u64).to_le_bytes());
    content.chunks(CHUNK).for_each(|chunk| hasher.update(Sha256::digest(chunk)));
    Digest(hasher.finalize().into())
}

/// Writes `bytes` into a file of `dir`.
pub fn file_with(dir: &TempDir, name: &str, bytes: &[u8]) -> PathBuf {
    let path = dir.path().join(name);
    std::fs::write(&path, bytes).unwrap();
    path
}

/// Whether `qemu-img` is there; says so if it isn't.
pub fn have_qemu_img(test: &str) -> bool {
    let there = Command::new("qemu-img").arg("--version").output().is_ok();
    if !there {
        eprintln!("SKIPPED {test}: qemu-img is not installed (Debian: qemu-utils)");
    }
    there
}

/// Runs `qemu-img`, which must succeed.
pub fn qemu_img(args: &[&str]) {
    let output = Command::new("qemu-img").args(args).output().unwrap();
    assert!(
        output.status.success(),
        "qemu-img {args:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
}

/// An image of `content` made by `qemu-img convert -O FORMAT ARGS…`.
pub fn converted(dir: &TempDir, content: &[u8], format: &str, args: &[&str]) -> PathBuf {
    let raw = file_with(dir, "content.raw", content);
    let image = dir.path().join(format!("image.{format}"));
    let mut all = vec!["convert", "-f", "raw", "-O", format];
    all.extend_from_slice(args);
    all.extend([raw.to_str().unwrap(), image.to_str().unwrap()]);
    qemu_img(&all);
    image
}

/// What `qemu-img` reads out of an image.
pub fn qemu_content(image: &Path, format: &str) -> Vec<u8> {
    let raw = image.with_extension("out");
    qemu_img(&[
        "convert",
        "-f",
        format,
        "-O",
        "raw",
        image.to_str().unwrap(),
        raw.to_str().unwrap(),
    ]);
    std::fs::read(raw).unwrap()
}
