//! A small NBD client of our own, for what outside clients don't tell: the moment when a write or a
//! flush was acknowledged, the time that an export takes to open, the exact error code of a refusal.
//!
//! One request at a time; fixed newstyle, NBD_OPT_GO, simple replies. It trusts nothing that the
//! server says about lengths.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

/// How long an answer may take before the test fails.
const PATIENCE: Duration = Duration::from_secs(60);
/// The most that an option reply of a sane server holds, in bytes.
const MAX_OPTION_REPLY: u32 = 64 << 10;
/// How much one request of [`Client::read_all`] reads, in bytes.
const PIECE: usize = 1 << 20;

const NBDMAGIC: u64 = 0x4e42_444d_4147_4943;
const IHAVEOPT: u64 = 0x4948_4156_454f_5054;
const OPTION_REPLY: u64 = 0x3_e889_0455_65a9;
const OPT_GO: u32 = 7;
const REP_ACK: u32 = 1;
const REP_INFO: u32 = 3;
const INFO_EXPORT: u16 = 0;
const REQUEST: u32 = 0x2560_9513;
const SIMPLE_REPLY: u32 = 0x6744_6698;

/// The server acknowledges this request only when it is on stable storage.
pub const FUA: u16 = 1;
pub const READ: u16 = 0;
pub const WRITE: u16 = 1;
pub const DISCONNECT: u16 = 2;
pub const FLUSH: u16 = 3;
pub const TRIM: u16 = 4;
pub const WRITE_ZEROES: u16 = 6;

/// EPERM in the protocol's words.
pub const EPERM: u32 = 1;
/// EIO in the protocol's words.
pub const EIO: u32 = 5;
/// EINVAL in the protocol's words.
pub const EINVAL: u32 = 22;
/// ENOSPC in the protocol's words.
pub const ENOSPC: u32 = 28;

/// A connection to one export.
pub struct Client {
    stream: UnixStream,
    size: u64,
    cookie: u64,
}

/// Why a request brought no success.
#[derive(Debug)]
pub enum Failure {
    /// The server answered with this error code.
    Refused(u32),
    /// The connection is gone, or spoke nonsense.
    Lost(anyhow::Error),
}

impl From<Failure> for anyhow::Error {
    fn from(failure: Failure) -> anyhow::Error {
        match failure {
            Failure::Refused(code) => anyhow::anyhow!("the server answered with error {code}"),
            Failure::Lost(error) => error,
        }
    }
}

/// A request's header, of the shorter kind.
pub fn request(command: u16, flags: u16, cookie: u64, offset: u64, len: u32) -> Vec<u8> {
    let mut header = Vec::with_capacity(28);
    header.extend(REQUEST.to_be_bytes());
    header.extend(flags.to_be_bytes());
    header.extend(command.to_be_bytes());
    header.extend(cookie.to_be_bytes());
    header.extend(offset.to_be_bytes());
    header.extend(len.to_be_bytes());
    header
}

impl Client {
    /// Connects to `export` behind the Unix socket.
    pub fn open(socket: &Path, export: &str) -> Result<Client> {
        let stream = UnixStream::connect(socket)
            .with_context(|| format!("connecting to {}", socket.display()))?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        let mut client = Client { stream, size: 0, cookie: 0 };
        client.negotiate(export).with_context(|| {
            format!("opening export {:?}", export.chars().take(80).collect::<String>())
        })?;
        Ok(client)
    }

    /// The connection, to say anything by it.
    pub fn stream(&mut self) -> &mut UnixStream {
        &mut self.stream
    }

    /// The size of the export, in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Reads into `buf` from `offset`.
    pub fn read(&mut self, offset: u64, buf: &mut [u8]) -> Result<(), Failure> {
        self.request(READ, 0, offset, buf.len(), &[])?;
        self.stream.read_exact(buf).context("reading data").map_err(Failure::Lost)
    }

    /// The first `len` bytes of the export, read in pieces that every server grants.
    pub fn read_all(&mut self, len: u64) -> Result<Vec<u8>> {
        let mut all = vec![0; usize::try_from(len)?];
        for (part, buf) in all.chunks_mut(PIECE).enumerate() {
            self.read((part * PIECE) as u64, buf)?;
        }
        Ok(all)
    }

    /// Writes `data` at `offset`.
    pub fn write(&mut self, offset: u64, data: &[u8], flags: u16) -> Result<(), Failure> {
        self.request(WRITE, flags, offset, data.len(), data)
    }

    /// Makes durable what was acknowledged before, on this connection or another.
    pub fn flush(&mut self) -> Result<(), Failure> {
        self.request(FLUSH, 0, 0, 0, &[])
    }

    /// Writes zeros.
    pub fn zero(&mut self, offset: u64, len: usize, flags: u16) -> Result<(), Failure> {
        self.request(WRITE_ZEROES, flags, offset, len, &[])
    }

    /// Gives the range up.
    pub fn trim(&mut self, offset: u64, len: usize, flags: u16) -> Result<(), Failure> {
        self.request(TRIM, flags, offset, len, &[])
    }

    fn request(
        &mut self,
        command: u16,
        flags: u16,
        offset: u64,
        len: usize,
        data: &[u8],
    ) -> Result<(), Failure> {
        let code = self.exchange(command, flags, offset, len, data).map_err(Failure::Lost)?;
        if code == 0 { Ok(()) } else { Err(Failure::Refused(code)) }
    }

    fn exchange(
        &mut self,
        command: u16,
        flags: u16,
        offset: u64,
        len: usize,
        data: &[u8],
    ) -> Result<u32> {
        self.cookie += 1;
        let mut message = request(command, flags, self.cookie, offset, u32::try_from(len)?);
        message.extend(data);
        self.stream.write_all(&message).context("sending a request")?;
        ensure!(self.u32()? == SIMPLE_REPLY, "not a simple reply");
        let code = self.u32()?;
        ensure!(self.u64()? == self.cookie, "a reply to something else");
        Ok(code)
    }

    fn negotiate(&mut self, export: &str) -> Result<()> {
        ensure!(self.u64()? == NBDMAGIC, "not an NBD server");
        ensure!(self.u64()? == IHAVEOPT, "not newstyle");
        let flags = self.u16()?;
        ensure!(flags & 3 == 3, "not fixed newstyle without zeroes: flags {flags:#x}");
        let mut message = Vec::new();
        message.extend(3u32.to_be_bytes());
        message.extend(IHAVEOPT.to_be_bytes());
        message.extend(OPT_GO.to_be_bytes());
        message.extend(u32::try_from(export.len() + 6)?.to_be_bytes());
        message.extend(u32::try_from(export.len())?.to_be_bytes());
        message.extend(export.as_bytes());
        message.extend(0u16.to_be_bytes());
        self.stream.write_all(&message).context("sending NBD_OPT_GO")?;
        loop {
            ensure!(self.u64()? == OPTION_REPLY, "not an option reply");
            ensure!(self.u32()? == OPT_GO, "a reply to another option");
            let kind = self.u32()?;
            let len = self.u32()?;
            ensure!(len <= MAX_OPTION_REPLY, "an option reply of {len} bytes");
            let mut body = vec![0; len as usize];
            self.stream.read_exact(&mut body).context("reading an option reply")?;
            match kind {
                REP_ACK => return Ok(()),
                REP_INFO if body.len() == 12 && body[..2] == INFO_EXPORT.to_be_bytes() => {
                    self.size = u64::from_be_bytes(body[2..10].try_into()?);
                }
                REP_INFO => {}
                _ => bail!("refused ({kind:#x}): {}", String::from_utf8_lossy(&body)),
            }
        }
    }

    fn u16(&mut self) -> Result<u16> {
        let mut bytes = [0; 2];
        self.stream.read_exact(&mut bytes).context("the server hung up")?;
        Ok(u16::from_be_bytes(bytes))
    }

    fn u32(&mut self) -> Result<u32> {
        let mut bytes = [0; 4];
        self.stream.read_exact(&mut bytes).context("the server hung up")?;
        Ok(u32::from_be_bytes(bytes))
    }

    fn u64(&mut self) -> Result<u64> {
        let mut bytes = [0; 8];
        self.stream.read_exact(&mut bytes).context("the server hung up")?;
        Ok(u64::from_be_bytes(bytes))
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        // A farewell; the server may be gone already.
        let mut message = [0; 28];
        message[..4].copy_from_slice(&REQUEST.to_be_bytes());
        message[6..8].copy_from_slice(&DISCONNECT.to_be_bytes());
        let _ = self.stream.write_all(&message);
    }
}
