//! A disk that can be made ill while it runs: slow, failing, silent, gone. A file behind a small NBD server
//! of our own, behind FUSE and a loop device. (`nbdkit`'s delay is fixed at its start.)
//!
//! The server (`cargo xtask slow-disk`, on the socket that is its standard input) knows what libnbd needs
//! and no more: fixed newstyle, NBD_OPT_GO, simple replies. Every request is served by a thread of its own,
//! so that waiting requests wait at the same time, as on a disk with a queue.

use std::fs::{self, File, OpenOptions};
use std::io::{ErrorKind, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail, ensure};

use crate::subject::text;
use crate::tool::{Process, tool};

const NBDMAGIC: u64 = 0x4e42_444d_4147_4943;
const IHAVEOPT: u64 = 0x4948_4156_454f_5054;
const OPTION_REPLY: u64 = 0x3_e889_0455_65a9;
const OPT_GO: u32 = 7;
const REP_ACK: u32 = 1;
const REP_INFO: u32 = 3;
const REP_UNSUPPORTED: u32 = 1 << 31 | 1;
const REQUEST: u32 = 0x2560_9513;
const SIMPLE_REPLY: u32 = 0x6744_6698;
/// HAS_FLAGS and SEND_FLUSH.
const FLAGS: u16 = 1 | 4;
/// The longest option or request, in bytes.
const LONGEST: u32 = 64 << 20;

/// What a disk suffers from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Illness {
    /// Nothing.
    None,
    /// So many milliseconds longer take so many percent of its reads.
    Slow(u64, u32),
    /// So many percent of its reads fail.
    Fails(u32),
    /// It answers nothing.
    Silent,
}

impl Illness {
    fn write(self) -> String {
        match self {
            Illness::None => "well".to_owned(),
            Illness::Slow(millis, percent) => format!("slow {millis} {percent}"),
            Illness::Fails(percent) => format!("fails {percent}"),
            Illness::Silent => "silent".to_owned(),
        }
    }

    fn read(path: &Path) -> Illness {
        let text = fs::read_to_string(path).unwrap_or_default();
        let words: Vec<&str> = text.split_whitespace().collect();
        let number = |at: usize| words.get(at).and_then(|word| word.parse().ok()).unwrap_or(0_u32);
        match words.first() {
            Some(&"slow") => Illness::Slow(number(1).into(), number(2)),
            Some(&"fails") => Illness::Fails(number(1)),
            Some(&"silent") => Illness::Silent,
            _ => Illness::None,
        }
    }
}

/// Serves `file` on standard input, until the client leaves; what it suffers from the file `illness` says.
pub fn serve(file: &Path, illness: &Path) -> Result<()> {
    let stream = UnixStream::from(std::io::stdin().as_fd().try_clone_to_owned()?);
    let file = OpenOptions::new().read(true).write(true).open(file).context("opening the file")?;
    let file = Arc::new(file);
    let mut input = stream.try_clone()?;
    negotiate(&mut input, file.metadata()?.len())?;
    let output = Arc::new(Mutex::new(stream));
    loop {
        let mut head = [0; 28];
        match input.read_exact(&mut head) {
            Err(error) if error.kind() == ErrorKind::UnexpectedEof => return Ok(()),
            other => other.context("reading a request")?,
        }
        ensure!(u32::from_be_bytes(head[0..4].try_into()?) == REQUEST, "no request");
        let command = u16::from_be_bytes(head[6..8].try_into()?);
        let cookie: [u8; 8] = head[8..16].try_into()?;
        let offset = u64::from_be_bytes(head[16..24].try_into()?);
        let len = u32::from_be_bytes(head[24..28].try_into()?);
        ensure!(len <= LONGEST, "a request of {len} bytes");
        let mut data = vec![0; len as usize];
        match command {
            0 | 3 => {}
            1 => input.read_exact(&mut data)?,
            2 => return Ok(()),
            _ => bail!("a request that was not offered: {command}"),
        }
        let (file, output, illness) = (file.clone(), output.clone(), illness.to_owned());
        thread::spawn(move || {
            let done = match command {
                0 => suffer(&illness).and_then(|()| file.read_exact_at(&mut data, offset)),
                _ => {
                    while Illness::read(&illness) == Illness::Silent {
                        thread::sleep(Duration::from_millis(20));
                    }
                    if command == 1 { file.write_all_at(&data, offset) } else { file.sync_data() }
                }
            };
            let mut reply = Vec::with_capacity(16 + data.len());
            reply.extend(SIMPLE_REPLY.to_be_bytes());
            reply.extend(if done.is_ok() { 0u32 } else { 5 }.to_be_bytes());
            reply.extend(cookie);
            if command == 0 && done.is_ok() {
                reply.extend(data);
            }
            // A client that left waits for no answer.
            let _ = output.lock().map(|mut output| output.write_all(&reply));
        });
    }
}

/// What a read suffers; an error if it fails of it.
fn suffer(illness: &Path) -> std::io::Result<()> {
    loop {
        match Illness::read(illness) {
            Illness::Silent => thread::sleep(Duration::from_millis(20)),
            Illness::Slow(millis, percent) if fastrand::u32(..100) < percent => {
                thread::sleep(Duration::from_millis(millis));
                return Ok(());
            }
            Illness::Fails(percent) if fastrand::u32(..100) < percent => {
                return Err(ErrorKind::Other.into());
            }
            _ => return Ok(()),
        }
    }
}

fn negotiate(stream: &mut UnixStream, size: u64) -> Result<()> {
    let mut hello = Vec::new();
    hello.extend(NBDMAGIC.to_be_bytes());
    hello.extend(IHAVEOPT.to_be_bytes());
    hello.extend(3u16.to_be_bytes());
    stream.write_all(&hello)?;
    let mut flags = [0; 4];
    stream.read_exact(&mut flags)?;
    loop {
        let mut head = [0; 16];
        stream.read_exact(&mut head)?;
        ensure!(u64::from_be_bytes(head[0..8].try_into()?) == IHAVEOPT, "no option");
        let option = u32::from_be_bytes(head[8..12].try_into()?);
        let len = u32::from_be_bytes(head[12..16].try_into()?);
        ensure!(len <= LONGEST, "an option of {len} bytes");
        stream.read_exact(&mut vec![0; len as usize])?;
        let mut reply = |kind: u32, body: &[u8]| -> Result<()> {
            let mut message = Vec::new();
            message.extend(OPTION_REPLY.to_be_bytes());
            message.extend(option.to_be_bytes());
            message.extend(kind.to_be_bytes());
            message.extend(u32::try_from(body.len())?.to_be_bytes());
            message.extend(body);
            Ok(stream.write_all(&message)?)
        };
        if option != OPT_GO {
            reply(REP_UNSUPPORTED, &[])?;
            continue;
        }
        let mut info = vec![0, 0];
        info.extend(size.to_be_bytes());
        info.extend(FLAGS.to_be_bytes());
        reply(REP_INFO, &info)?;
        reply(REP_ACK, &[])?;
        return Ok(());
    }
}

/// A mounted ext4 disk that can be made ill, and whose device can be pulled.
pub struct SlowDisk {
    /// Where it is mounted.
    pub path: PathBuf,
    fuse: PathBuf,
    illness: PathBuf,
    device: String,
    server: Process,
}

impl SlowDisk {
    /// Makes the disk `name` of `size` bytes (sparse) in `dir`, and mounts it at `dir/name`.
    pub fn new(dir: &Path, name: &str, size: u64) -> Result<SlowDisk> {
        let backing = dir.join(format!("{name}.disk"));
        File::create(&backing)?.set_len(size)?;
        tool("mkfs.ext4", ["-q", "-F", "-m", "0"])
            .args(["-E", "lazy_itable_init=0,lazy_journal_init=0"])
            .args([&backing])
            .run()?;
        SlowDisk::plug(dir, name)
    }

    /// Mounts the disk `name` of `dir`, which was made earlier, and is gone since.
    pub fn plug(dir: &Path, name: &str) -> Result<SlowDisk> {
        let backing = dir.join(format!("{name}.disk"));
        let (fuse, path) = (dir.join(format!("{name}.fuse")), dir.join(name));
        for made in [&fuse, &path] {
            fs::create_dir_all(made)?;
        }
        let (file, illness) = (fuse.join("disk"), dir.join(format!("{name}.illness")));
        fs::write(&illness, Illness::None.write())?;
        let own = std::env::current_exe()?;
        let mut server = tool("nbdfuse", [text(&file)?, "--command", text(&own)?, "slow-disk"])
            .args([&backing, &illness])
            .background(&dir.join(format!("{name}.nbdfuse.log")))?;
        server.until(Duration::from_secs(10), || file.exists())?;
        // Past the page cache: what was read once must be slow again.
        let device = tool("losetup", ["--find", "--show", "--direct-io=on"]).args([&file]).out()?;
        let disk = SlowDisk { path, fuse, illness, device: device.trim().to_owned(), server };
        tool("mount", [&disk.device]).args([&disk.path]).run()?;
        Ok(disk)
    }

    /// From now on every read takes `millis` longer.
    pub fn slow_by(&self, millis: u64) -> Result<()> {
        self.suffers(Illness::Slow(millis, 100))
    }

    /// From now on it suffers from this.
    pub fn suffers(&self, illness: Illness) -> Result<()> {
        // In one step: the server reads it at any time.
        let new = self.illness.with_extension("new");
        fs::write(&new, illness.write())?;
        fs::rename(&new, &self.illness).map_err(|error| anyhow!(error))
    }

    /// Pulls the device: every request fails from now on.
    pub fn pull(&mut self) -> Result<()> {
        self.server.kill()
    }
}

impl Drop for SlowDisk {
    fn drop(&mut self) {
        // Each step is tried: where the device is gone, only some of them can succeed.
        let _ = self.suffers(Illness::None);
        let _ = tool("umount", ["-l".as_ref(), self.path.as_os_str()]).outcome();
        let _ = tool("losetup", ["-d", &self.device]).outcome();
        let _ = self.server.kill();
        let _ = tool("umount", ["-l".as_ref(), self.fuse.as_os_str()]).outcome();
    }
}
