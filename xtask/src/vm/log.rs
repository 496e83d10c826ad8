//! The log of a dm-log-writes device: what was written to a disk, in the order in which it became
//! durable, and the disk as it was at any point of it.
//!
//! All numbers are little endian, and sectors are of the size that the first sector tells:
//!
//! | sector | what |
//! |---|---|
//! | 0 | magic (8 bytes), version 1 (8), number of entries (8), bytes of a sector (4) |
//! | 1… | the entries, each a sector: where (8), how many sectors (8), flags (8), length of its text (8), the text of a mark |
//! | | after each but marks and discards, as many sectors of data |
//!
//! An entry that is neither a flush nor a mark nor forced (FUA) is logged when a flush has ended that
//! began after it had. So what stands between two flushes may have reached the disk before the
//! second, or not, each on its own: [`Disk`]s are built of all of it or of a part.

use std::collections::HashMap;
use std::fs::File;
use std::io::{Seek, SeekFrom, Write};
use std::os::unix::fs::FileExt;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use fastrand::Rng;

const MAGIC: u64 = 0x006a_7366_7773_6872;
const VERSION: u64 = 1;
const FLUSH: u64 = 1;
const FUA: u64 = 2;
const DISCARD: u64 = 4;
const MARK: u64 = 8;
/// Bytes of a page of a [`Disk`], and the least that a disk keeps or loses at a power cut here: file
/// systems do not all bear less.
const PAGE: u64 = 4096;
/// The most entries that a log of a test has.
const MAX_ENTRIES: u64 = 1 << 20;
/// The most that one request writes, in bytes.
const MAX_WRITE: u64 = 64 << 20;

/// A log, read from its device.
pub struct Log {
    device: File,
    /// What was logged, in order.
    pub entries: Vec<Entry>,
}

/// One request to the disk, or a mark.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// What it did, if it did anything beside a flush.
    pub kind: Kind,
    /// It came after a flush: what is logged before it was durable.
    pub flush: bool,
    /// It was durable as soon as it ended.
    pub forced: bool,
}

/// What an entry did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Nothing.
    Nothing,
    /// It wrote `len` bytes at `to`, which stand at `from` in the log.
    Write { to: u64, from: u64, len: u64 },
    /// It gave up `len` bytes at `at`.
    Discard { at: u64, len: u64 },
    /// The test has marked this point.
    Mark(String),
}

impl Log {
    /// Reads the log on `device`, which has been closed.
    pub fn open(device: &Path) -> Result<Log> {
        let file = File::open(device).with_context(|| format!("opening {}", device.display()))?;
        let entries = entries(&file).with_context(|| format!("the log on {}", device.display()))?;
        Ok(Log { device: file, entries })
    }

    /// Does to `disk` what entry `index` did; where it wrote, only the pages that `keep` says.
    pub fn apply(
        &self,
        index: usize,
        disk: &mut Disk,
        mut keep: impl FnMut() -> bool,
    ) -> Result<()> {
        match self.entries[index].kind {
            Kind::Nothing | Kind::Mark(_) => {}
            // What a discarded sector holds is up to the disk: here, zeros.
            Kind::Discard { at, len } => disk.discard(at, len),
            Kind::Write { to, from, len } => {
                let mut data = vec![0; usize::try_from(len)?];
                self.device.read_exact_at(&mut data, from).context("reading the log")?;
                let mut at = to;
                while at < to + len {
                    let end = ((at / PAGE + 1) * PAGE).min(to + len);
                    if keep() {
                        disk.write(at, &data[(at - to) as usize..(end - to) as usize]);
                    }
                    at = end;
                }
            }
        }
        Ok(())
    }

    /// The points at which a power cut is to be tried: after each entry that makes others durable.
    pub fn points(&self) -> Vec<usize> {
        let durable = |entry: &Entry| entry.flush || entry.forced;
        let all = self.entries.iter().enumerate();
        all.filter(|(_, entry)| durable(entry)).map(|(index, _)| index).collect()
    }

    /// The disk after a power cut while entry `point` was under way, if all that became durable
    /// before is in `before`: of what it and those since the last flush wrote, a random part.
    pub fn torn(&self, before: &Disk, since: usize, point: usize, rng: &mut Rng) -> Result<Disk> {
        let mut disk = before.clone();
        for index in since..=point {
            let forced = self.entries[index].forced && index < point;
            let most = rng.u8(1..=4);
            self.apply(index, &mut disk, || forced || rng.u8(..4) < most)?;
        }
        Ok(disk)
    }
}

fn entries(file: &File) -> Result<Vec<Entry>> {
    let head = numbers(file, 0)?;
    ensure!(head[0] == MAGIC, "it does not begin like one: {:#x}", head[0]);
    ensure!(head[1] == VERSION, "version {}, not {VERSION}", head[1]);
    let (count, sector) = (head[2], head[3] & u64::from(u32::MAX));
    ensure!(count <= MAX_ENTRIES, "{count} entries");
    ensure!(matches!(sector, 512 | 4096), "sectors of {sector} bytes");
    let mut at = sector;
    let mut entries = Vec::new();
    for number in 0..count {
        let [to, sectors, flags, text] = numbers(file, at)?;
        let (to, len) = match (to.checked_mul(sector), sectors.checked_mul(sector)) {
            (Some(to), Some(len)) if to.checked_add(len).is_some() => (to, len),
            _ => bail!("entry {number} writes {sectors} sectors at {to}"),
        };
        let from = at + sector;
        at = from;
        let kind = if flags & MARK != 0 {
            ensure!(text <= sector - 32, "entry {number} has a text of {text} bytes");
            let mut bytes = vec![0; usize::try_from(text)?];
            file.read_exact_at(&mut bytes, from - sector + 32).context("reading a mark")?;
            Kind::Mark(String::from_utf8(bytes).context("a mark is no text")?)
        } else if flags & DISCARD != 0 {
            Kind::Discard { at: to, len }
        } else if len == 0 {
            Kind::Nothing
        } else {
            ensure!(len <= MAX_WRITE, "entry {number} writes {len} bytes");
            at += len;
            Kind::Write { to, from, len }
        };
        entries.push(Entry { kind, flush: flags & FLUSH != 0, forced: flags & FUA != 0 });
    }
    Ok(entries)
}

/// Four numbers of 8 bytes.
fn numbers(file: &File, at: u64) -> Result<[u64; 4]> {
    let mut bytes = [0; 32];
    file.read_exact_at(&mut bytes, at).with_context(|| format!("it ends before byte {at}"))?;
    let mut numbers = [0; 4];
    for (number, bytes) in numbers.iter_mut().zip(bytes.chunks_exact(8)) {
        *number = u64::from_le_bytes(bytes.try_into()?);
    }
    Ok(numbers)
}

/// What a disk holds, in memory: zeros where nothing was written.
#[derive(Clone, Default)]
pub struct Disk {
    pages: HashMap<u64, std::rc::Rc<[u8]>>,
}

impl Disk {
    /// What `device` holds.
    pub fn read(device: &Path) -> Result<Disk> {
        let file = File::open(device).with_context(|| format!("opening {}", device.display()))?;
        let mut disk = Disk::default();
        let mut piece = vec![0; 1 << 20];
        let mut at = 0;
        loop {
            let read = file.read_at(&mut piece, at)?;
            if read == 0 {
                return Ok(disk);
            }
            disk.write(at, &piece[..read]);
            at += read as u64;
        }
    }

    /// How much of it holds something, in bytes.
    pub fn bytes(&self) -> u64 {
        self.pages.len() as u64 * PAGE
    }

    /// Writes it to a new file of `size` bytes, with holes where it holds nothing.
    pub fn save(&self, file: &Path, size: u64) -> Result<()> {
        let mut out = File::create(file).with_context(|| format!("creating {}", file.display()))?;
        out.set_len(size)?;
        for (page, bytes) in &self.pages {
            ensure!((page + 1) * PAGE <= size, "page {page} is beyond the disk's end");
            out.seek(SeekFrom::Start(page * PAGE))?;
            out.write_all(bytes)?;
        }
        Ok(())
    }

    fn write(&mut self, mut at: u64, mut data: &[u8]) {
        while !data.is_empty() {
            let (page, start) = (at / PAGE, (at % PAGE) as usize);
            let (now, rest) = data.split_at(data.len().min(PAGE as usize - start));
            if start == 0 && now.len() == PAGE as usize {
                if now.iter().all(|byte| *byte == 0) {
                    self.pages.remove(&page);
                } else {
                    self.pages.insert(page, now.into());
                }
            } else {
                let old = self.pages.get(&page);
                let mut bytes = old.map_or_else(|| vec![0; PAGE as usize], |old| old.to_vec());
                bytes[start..start + now.len()].copy_from_slice(now);
                self.pages.insert(page, bytes.into());
            }
            at += now.len() as u64;
            data = rest;
        }
    }

    fn discard(&mut self, at: u64, len: u64) {
        let whole = at.div_ceil(PAGE)..(at + len) / PAGE;
        if whole.end.saturating_sub(whole.start) > self.pages.len() as u64 {
            self.pages.retain(|page, _| !whole.contains(page));
        } else {
            whole.for_each(|page| drop(self.pages.remove(&page)));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A log as the kernel writes it: (sector, sectors, flags, text or data).
    fn log(name: &str, entries: &[(u64, u64, u64, &[u8])]) -> (std::path::PathBuf, Result<Log>) {
        let mut bytes = Vec::new();
        for number in [MAGIC, VERSION, entries.len() as u64, 512] {
            bytes.extend(number.to_le_bytes());
        }
        bytes.resize(512, 0);
        for (sector, sectors, flags, data) in entries {
            let text = if flags & MARK != 0 { data.len() as u64 } else { 0 };
            for number in [*sector, *sectors, *flags, text] {
                bytes.extend(number.to_le_bytes());
            }
            bytes.extend(*data);
            if flags & MARK == 0 {
                let at = bytes.len() - data.len();
                bytes.splice(at..at, vec![0; 480]);
            }
            bytes.resize(bytes.len().next_multiple_of(512), 0);
        }
        let file = std::env::temp_dir().join(format!("log-{name}-{}", std::process::id()));
        std::fs::write(&file, bytes).unwrap();
        let log = Log::open(&file);
        (file, log)
    }

    fn page(disk: &Disk, page: u64) -> u8 {
        disk.pages.get(&page).map_or(0, |bytes| bytes[0])
    }

    #[test]
    fn a_log_is_read_and_replayed() {
        let (file, log) = log(
            "read",
            &[
                (8, 8, 0, &[1; 4096]),
                (0, 0, FLUSH, &[]),
                (0, 0, MARK, b"f-1"),
                (17, 1, FUA, &[2; 512]),
                (8, 16, DISCARD, &[]),
                (0, 0, FLUSH, &[]),
            ],
        );
        let log = log.unwrap();
        assert_eq!(log.points(), [1, 3, 5]);
        assert_eq!(log.entries[2].kind, Kind::Mark("f-1".into()));
        let mut disk = Disk::default();
        for index in 0..4 {
            log.apply(index, &mut disk, || true).unwrap();
        }
        assert_eq!(page(&disk, 1), 1);
        assert_eq!((page(&disk, 2), disk.pages[&2][512], disk.pages[&2][1024]), (0, 2, 0));
        log.apply(4, &mut disk, || true).unwrap();
        assert!(disk.pages.is_empty());
        let saved = file.with_extension("saved");
        let mut disk = Disk::default();
        log.apply(0, &mut disk, || true).unwrap();
        disk.save(&saved, 16384).unwrap();
        assert_eq!(Disk::read(&saved).unwrap().pages, disk.pages);
        assert!(disk.save(&saved, 4096).is_err());
        for file in [file, saved] {
            std::fs::remove_file(file).unwrap();
        }
    }

    #[test]
    fn a_torn_disk_has_all_that_was_forced_and_a_part_of_the_rest() {
        let data = vec![1; 64 * 4096];
        let (file, log) =
            log("torn", &[(0, 512, 0, &data), (512, 8, FUA, &[2; 4096]), (0, 0, FLUSH, &[])]);
        let log = log.unwrap();
        let mut counts = std::collections::BTreeSet::new();
        for seed in 0..20 {
            let rng = &mut Rng::with_seed(seed);
            let disk = log.torn(&Disk::default(), 0, 2, rng).unwrap();
            assert_eq!(page(&disk, 64), 2);
            counts.insert(disk.pages.len());
        }
        assert!(counts.len() > 3, "{counts:?}");
        std::fs::remove_file(file).unwrap();
    }

    #[test]
    fn what_is_no_log_is_refused() {
        let bad: [(u64, u64, u64, &[u8]); 3] =
            [(u64::MAX, 8, 0, &[]), (0, 1 << 40, 0, &[]), (0, 8, 0, &[1; 100])];
        for (number, entry) in bad.into_iter().enumerate() {
            let (file, log) = log(&format!("bad{number}"), &[entry, (0, 0, FLUSH, &[])]);
            assert!(log.is_err(), "{entry:?}");
            std::fs::remove_file(file).unwrap();
        }
        assert!(Log::open(Path::new("/dev/null")).is_err());
    }
}
