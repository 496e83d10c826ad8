//! The demonstration's own image: a GPT disk whose one partition holds an ext4 file system where
//! mke2fs is installed, and a pattern where it is not.

use std::{
    fs::{self, File},
    io::Write,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use crate::error::{Context, Result};

/// Bytes of the image.
pub const SIZE: u64 = 192 << 20;
/// Where the partition begins, in bytes.
const START: u64 = 1 << 20;
/// Bytes behind the partition, for the second table.
const TAIL: u64 = 1 << 20;
const SECTOR: u64 = 512;
/// Entries in the partition table, and bytes of one.
const ENTRIES: usize = 128;
const ENTRY: usize = 128;
/// Bytes of files in the file system: what an image holds that cannot be packed away.
const PAYLOAD: usize = 40 << 20;
/// "Linux filesystem", in the byte order of the disk.
const LINUX: [u8; 16] = guid(0x0fc6_3daf, 0x8483, 0x4772, 0x8e79_3d69_d847_7de4);
const DISK_ID: [u8; 16] = guid(0x756e_6465, 0x726c, 0x4179, 0x8000_0000_0000_0001);
const PARTITION_ID: [u8; 16] = guid(0x756e_6465, 0x726c, 0x4179, 0x8000_0000_0000_0002);

/// What the image came to hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content {
    /// A file system with files.
    Ext4,
    /// A pattern: there is no mke2fs here.
    Pattern,
}

/// Makes the image at `path`; `scratch` is a directory for files on their way into it.
pub fn make(path: &Path, scratch: &Path) -> Result<Content> {
    let making = || format!("making the image {}", path.display());
    let file = File::create_new(path).context(making)?;
    file.set_len(SIZE).context(making)?;
    let content = match mke2fs() {
        Some(tool) if fill(&tool, path, scratch)? => Content::Ext4,
        _ => {
            let block: Vec<u8> = noise(PAYLOAD);
            file.write_all_at(&block, START).context(making)?;
            Content::Pattern
        }
    };
    // Last: mke2fs leaves the first MiB alone, but would not have to.
    write_gpt(&file).context(making)?;
    file.sync_all().context(making)?;
    Ok(content)
}

/// Makes a file system in the partition. False if the tool does not want to.
fn fill(tool: &Path, image: &Path, scratch: &Path) -> Result<bool> {
    let root = scratch.join("root");
    let making = || format!("making files in {}", root.display());
    for directory in ["etc", "boot", "usr/lib"] {
        fs::create_dir_all(root.join(directory)).context(making)?;
    }
    let release = "NAME=\"Underlay demo\"\nID=underlay-demo\nVERSION_ID=1\n";
    fs::write(root.join("etc/os-release"), release).context(making)?;
    fs::write(root.join("etc/hostname"), "demo\n").context(making)?;
    let mut payload = File::create(root.join("usr/lib/payload.bin")).context(making)?;
    payload.write_all(&noise(PAYLOAD)).context(making)?;
    let status = Command::new(tool)
        .args(["-q", "-F", "-t", "ext4", "-L", "demo-root", "-O", "^has_journal", "-E"])
        .arg(format!("offset={START},hash_seed={}", "756e6465-726c-4179-8000-000000000003"))
        .args(["-U", "756e6465-726c-4179-8000-000000000004", "-d"])
        .arg(&root)
        .arg(image)
        .arg(format!("{}k", (SIZE - START - TAIL) >> 10))
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .context(|| format!("running {}", tool.display()))?;
    fs::remove_dir_all(&root).context(|| format!("removing {}", root.display()))?;
    Ok(status.success())
}

/// Where mke2fs is; ordinary users don't have /sbin in their PATH.
fn mke2fs() -> Option<PathBuf> {
    crate::cli::doctor::tool("mke2fs")
}

fn write_gpt(file: &File) -> std::io::Result<()> {
    let last = SIZE / SECTOR - 1;
    let table = (ENTRIES * ENTRY) as u64 / SECTOR;
    let mut entries = vec![0; ENTRIES * ENTRY];
    entries[..16].copy_from_slice(&LINUX);
    entries[16..32].copy_from_slice(&PARTITION_ID);
    entries[32..40].copy_from_slice(&(START / SECTOR).to_le_bytes());
    entries[40..48].copy_from_slice(&((SIZE - TAIL) / SECTOR - 1).to_le_bytes());
    for (at, unit) in "root".encode_utf16().enumerate() {
        entries[56 + 2 * at..58 + 2 * at].copy_from_slice(&unit.to_le_bytes());
    }
    let header = |own: u64, other: u64, entries_at: u64| {
        let mut sector = [0; SECTOR as usize];
        sector[..8].copy_from_slice(b"EFI PART");
        sector[8..12].copy_from_slice(&0x0001_0000u32.to_le_bytes());
        sector[12..16].copy_from_slice(&92u32.to_le_bytes());
        sector[24..32].copy_from_slice(&own.to_le_bytes());
        sector[32..40].copy_from_slice(&other.to_le_bytes());
        sector[40..48].copy_from_slice(&(2 + table).to_le_bytes());
        sector[48..56].copy_from_slice(&(last - table - 1).to_le_bytes());
        sector[56..72].copy_from_slice(&DISK_ID);
        sector[72..80].copy_from_slice(&entries_at.to_le_bytes());
        sector[80..84].copy_from_slice(&(ENTRIES as u32).to_le_bytes());
        sector[84..88].copy_from_slice(&(ENTRY as u32).to_le_bytes());
        sector[88..92].copy_from_slice(&crc32fast::hash(&entries).to_le_bytes());
        let own_sum = crc32fast::hash(&sector[..92]);
        sector[16..20].copy_from_slice(&own_sum.to_le_bytes());
        sector
    };
    // The protective record: one partition of type 0xee over all of the disk.
    let mut protective = [0; SECTOR as usize];
    protective[446..462]
        .copy_from_slice(&[0, 0, 2, 0, 0xee, 0xff, 0xff, 0xff, 1, 0, 0, 0, 0, 0, 0, 0]);
    protective[458..462].copy_from_slice(&(last as u32).to_le_bytes());
    protective[510..].copy_from_slice(&[0x55, 0xaa]);
    file.write_all_at(&protective, 0)?;
    file.write_all_at(&header(1, last, 2), SECTOR)?;
    file.write_all_at(&entries, 2 * SECTOR)?;
    file.write_all_at(&entries, (last - table) * SECTOR)?;
    file.write_all_at(&header(last, 1, last - table), last * SECTOR)
}

/// Bytes that do not compress, the same in every run.
fn noise(len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    fastrand::Rng::with_seed(0x1a7e).fill(&mut bytes);
    bytes
}

const fn guid(a: u32, b: u16, c: u16, d: u64) -> [u8; 16] {
    let (a, b, c, d) = (a.to_le_bytes(), b.to_le_bytes(), c.to_le_bytes(), d.to_be_bytes());
    [a[0], a[1], a[2], a[3], b[0], b[1], c[0], c[1], d[0], d[1], d[2], d[3], d[4], d[5], d[6], d[7]]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_image_is_a_disk_that_others_understand() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("demo.raw");
        let content = make(&path, directory.path()).unwrap();
        let bytes = fs::read(&path).unwrap();
        assert_eq!(bytes.len() as u64, SIZE);
        assert_eq!(&bytes[512..520], b"EFI PART");
        let mut header = bytes[512..604].to_vec();
        let sum = u32::from_le_bytes(header[16..20].try_into().unwrap());
        header[16..20].fill(0);
        assert_eq!(crc32fast::hash(&header), sum);
        if content == Content::Ext4 {
            assert_eq!(bytes[START as usize + 1080..][..2], [0x53, 0xef], "ext4's magic");
        }
        if let Some(sfdisk) = crate::cli::doctor::tool("sfdisk") {
            let out = Command::new(sfdisk).arg("--verify").arg(&path).output().unwrap();
            assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
        }
        if let Some(e2fsck) = crate::cli::doctor::tool("e2fsck")
            && content == Content::Ext4
        {
            let image = format!("{}?offset={START}", path.display());
            let out = Command::new(e2fsck).args(["-fn", &image]).output().unwrap();
            assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stdout));
        }
    }
}
