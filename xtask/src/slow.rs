//! A disk whose reads can be made slow while it runs: a file behind a small NBD server of our own, which
//! waits before it answers a read, behind FUSE and a loop device. (`nbdkit`'s delay is fixed at its start.)
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

/// Serves `file` on standard input, until the client leaves. Reads take as many milliseconds longer as
/// the file `delay` says.
pub fn serve(file: &Path, delay: &Path) -> Result<()> {
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
        let (file, output, delay) = (file.clone(), output.clone(), delay.to_owned());
        thread::spawn(move || {
            let done = match command {
                0 => {
                    thread::sleep(asked(&delay));
                    file.read_exact_at(&mut data, offset)
                }
                1 => file.write_all_at(&data, offset),
                _ => file.sync_data(),
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

fn asked(delay: &Path) -> Duration {
    let millis = fs::read_to_string(delay).ok().and_then(|text| text.trim().parse().ok());
    Duration::from_millis(millis.unwrap_or(0))
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

/// A mounted ext4 disk whose reads can be slowed, and whose device can be pulled.
pub struct SlowDisk {
    /// Where it is mounted.
    pub path: PathBuf,
    fuse: PathBuf,
    delay: PathBuf,
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
        let (fuse, path) = (dir.join(format!("{name}.fuse")), dir.join(name));
        for made in [&fuse, &path] {
            fs::create_dir_all(made)?;
        }
        let (file, delay) = (fuse.join("disk"), dir.join(format!("{name}.delay")));
        fs::write(&delay, "0")?;
        let own = std::env::current_exe()?;
        let mut server = tool("nbdfuse", [text(&file)?, "--command", text(&own)?, "slow-disk"])
            .args([&backing, &delay])
            .background(&dir.join(format!("{name}.nbdfuse.log")))?;
        server.until(Duration::from_secs(10), || file.exists())?;
        // Past the page cache: what was read once must be slow again.
        let device = tool("losetup", ["--find", "--show", "--direct-io=on"]).args([&file]).out()?;
        let disk = SlowDisk { path, fuse, delay, device: device.trim().to_owned(), server };
        tool("mount", [&disk.device]).args([&disk.path]).run()?;
        Ok(disk)
    }

    /// From now on every read takes `millis` longer.
    pub fn slow_by(&self, millis: u64) -> Result<()> {
        // In one step: the server reads it at any time.
        let new = self.delay.with_extension("new");
        fs::write(&new, millis.to_string())?;
        fs::rename(&new, &self.delay).map_err(|error| anyhow!(error))
    }

    /// Pulls the device: every request fails from now on.
    pub fn pull(&mut self) -> Result<()> {
        self.server.kill()
    }
}

impl Drop for SlowDisk {
    fn drop(&mut self) {
        // Each step is tried: where the device is gone, only some of them can succeed.
        let _ = self.slow_by(0);
        let _ = tool("umount", ["-l".as_ref(), self.path.as_os_str()]).outcome();
        let _ = tool("losetup", ["-d", &self.device]).outcome();
        let _ = self.server.kill();
        let _ = tool("umount", ["-l".as_ref(), self.fuse.as_os_str()]).outcome();
    }
}
