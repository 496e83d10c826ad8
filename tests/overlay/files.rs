//! The seam to the kernel on ordinary files with blocking calls: enough to let threads share an
//! overlay, and to measure what opening one costs.

use std::{
    fs::{File, OpenOptions},
    io::Result,
    ops::Range,
    os::unix::fs::FileExt,
    path::Path,
    sync::Arc,
};

use underlay::io::{Buf, Io};

#[derive(Clone)]
pub struct Files;

pub fn open(path: &Path) -> Arc<File> {
    let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path);
    Arc::new(file.expect("a file"))
}

impl Io for Files {
    type File = Arc<File>;

    fn alloc(&self, len: usize) -> Buf {
        Buf::heap(len)
    }

    fn align(&self, _: &Arc<File>) -> u64 {
        1
    }

    async fn read(&self, file: &Arc<File>, buf: Buf, offset: u64) -> Result<()> {
        let mut bytes = vec![0; buf.len()];
        let mut done = 0;
        while done < bytes.len() {
            match file.read_at(&mut bytes[done..], offset + done as u64)? {
                0 => break,
                count => done += count,
            }
        }
        buf.copy_from(&bytes);
        Ok(())
    }

    async fn write(&self, file: &Arc<File>, buf: Buf, offset: u64) -> Result<()> {
        file.write_all_at(&buf.to_vec(), offset)
    }

    async fn sync(&self, _: &Arc<File>) -> Result<()> {
        // No crash here; and a moment in which others can get in between.
        std::thread::yield_now();
        Ok(())
    }

    async fn punch(&self, file: &Arc<File>, range: Range<u64>) -> Result<()> {
        file.write_all_at(&vec![0; (range.end - range.start) as usize], range.start)
    }

    async fn zero(&self, file: &Arc<File>, range: Range<u64>) -> Result<()> {
        file.write_all_at(&vec![0; (range.end - range.start) as usize], range.start)
    }

    async fn set_len(&self, file: &Arc<File>, len: u64) -> Result<()> {
        file.set_len(len)
    }

    async fn sleep(&self, time: std::time::Duration) {
        std::thread::sleep(time);
    }

    async fn data_after(&self, file: &Arc<File>, offset: u64) -> Result<Option<Range<u64>>> {
        use nix::unistd::{Whence, lseek};
        let Ok(start) = lseek(file, offset as i64, Whence::SeekData) else { return Ok(None) };
        let end = lseek(file, start, Whence::SeekHole)?;
        Ok(Some(start as u64..end as u64))
    }
}
