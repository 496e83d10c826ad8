//! A small NBD client: enough to write to a replica and read it back, over a Unix socket.
//!
//! The demonstration goes the way that a virtual machine goes, and needs no tool for it.

use std::path::Path;

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::UnixStream,
};

use crate::error::{Context, Error, Kind, Result};

const INIT_MAGIC: &[u8; 8] = b"NBDMAGIC";
const OPTION_MAGIC: &[u8; 8] = b"IHAVEOPT";
const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
const OPTION_GO: u32 = 7;
const REPLY_ACK: u32 = 1;
const REPLY_INFO: u32 = 3;
const REPLY_ERROR: u32 = 1 << 31;
const INFO_EXPORT: u16 = 0;
/// Fixed newstyle, and no zeroes.
const CLIENT_FLAGS: u32 = 3;
const REQUEST_MAGIC: u32 = 0x2560_9513;
const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
/// Bytes of an option's reply that are taken.
const REPLY_MAX: u32 = 64 << 10;

#[derive(Clone, Copy)]
enum Command {
    Read = 0,
    Write = 1,
    Disconnect = 2,
    Flush = 3,
}

/// A connection to one export.
pub struct Connection {
    stream: UnixStream,
    export: String,
    size: u64,
    cookie: u64,
}

impl Connection {
    /// Attaches to an export.
    pub async fn open(socket: &Path, export: &str) -> Result<Connection> {
        let stream = UnixStream::connect(socket)
            .await
            .context(|| format!("connecting to {}", socket.display()))?;
        let mut connection = Connection { stream, export: export.to_owned(), size: 0, cookie: 0 };
        connection.shake_hands().await?;
        Ok(connection)
    }

    /// Bytes of the export.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Reads all of `bytes` from `offset`.
    pub async fn read(&mut self, offset: u64, bytes: &mut [u8]) -> Result<()> {
        self.request(Command::Read, offset, bytes.len()).await?;
        self.reply().await?;
        let reading = format!("reading {}", self.export);
        self.stream.read_exact(bytes).await.context(|| reading)?;
        Ok(())
    }

    /// Writes `bytes` at `offset`.
    pub async fn write(&mut self, offset: u64, bytes: &[u8]) -> Result<()> {
        self.request(Command::Write, offset, bytes.len()).await?;
        let writing = format!("writing to {}", self.export);
        self.stream.write_all(bytes).await.context(|| writing)?;
        self.reply().await
    }

    /// Makes durable what was written.
    pub async fn flush(&mut self) -> Result<()> {
        self.request(Command::Flush, 0, 0).await?;
        self.reply().await
    }

    /// Says goodbye.
    pub async fn close(mut self) -> Result<()> {
        self.request(Command::Disconnect, 0, 0).await
    }

    async fn shake_hands(&mut self) -> Result<()> {
        let greeting = self.take::<18>().await?;
        if &greeting[..8] != INIT_MAGIC || &greeting[8..16] != OPTION_MAGIC {
            return Err(self.garbled("greeting"));
        }
        let name = self.export.as_bytes();
        let length = name.len() as u32;
        let mut hello = CLIENT_FLAGS.to_be_bytes().to_vec();
        hello.extend_from_slice(OPTION_MAGIC);
        hello.extend_from_slice(&OPTION_GO.to_be_bytes());
        hello.extend_from_slice(&(length + 6).to_be_bytes());
        hello.extend_from_slice(&length.to_be_bytes());
        hello.extend_from_slice(name);
        // No information is asked for; the size comes unasked.
        hello.extend_from_slice(&0u16.to_be_bytes());
        self.send(&hello).await?;
        loop {
            let header = self.take::<20>().await?;
            let word = |at: usize| {
                u32::from_be_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]])
            };
            let (kind, length) = (word(12), word(16));
            let magic = u64::from(word(0)) << 32 | u64::from(word(4));
            if magic != OPTION_REPLY_MAGIC || length > REPLY_MAX {
                return Err(self.garbled("reply to an option"));
            }
            let mut payload = vec![0; length as usize];
            let reading = format!("attaching to {}", self.export);
            self.stream.read_exact(&mut payload).await.context(|| reading)?;
            match kind {
                REPLY_ACK => return Ok(()),
                REPLY_INFO if payload.len() >= 10 && payload[..2] == INFO_EXPORT.to_be_bytes() => {
                    let size =
                        payload[2..10].iter().fold(0, |sum, byte| sum << 8 | u64::from(*byte));
                    self.size = size;
                }
                kind if kind & REPLY_ERROR != 0 => {
                    let why = String::from_utf8_lossy(&payload).into_owned();
                    let what = format!("attaching to {}: refused: {why}", self.export);
                    return Err(Error::new(Kind::NotFound, what));
                }
                _ => {}
            }
        }
    }

    async fn request(&mut self, command: Command, offset: u64, length: usize) -> Result<()> {
        self.cookie += 1;
        let mut header = [0; 28];
        header[..4].copy_from_slice(&REQUEST_MAGIC.to_be_bytes());
        header[6..8].copy_from_slice(&(command as u16).to_be_bytes());
        header[8..16].copy_from_slice(&self.cookie.to_be_bytes());
        header[16..24].copy_from_slice(&offset.to_be_bytes());
        header[24..].copy_from_slice(&(length as u32).to_be_bytes());
        self.send(&header).await
    }

    async fn reply(&mut self) -> Result<()> {
        let reply = self.take::<16>().await?;
        if reply[..4] != SIMPLE_REPLY_MAGIC.to_be_bytes() || reply[8..] != self.cookie.to_be_bytes()
        {
            return Err(self.garbled("reply"));
        }
        match u32::from_be_bytes([reply[4], reply[5], reply[6], reply[7]]) {
            0 => Ok(()),
            code => Err(Error::io(
                format!("a request to {}", self.export),
                std::io::Error::from_raw_os_error(code as i32),
            )),
        }
    }

    async fn take<const N: usize>(&mut self) -> Result<[u8; N]> {
        let mut bytes = [0; N];
        let reading = format!("talking to {}", self.export);
        self.stream.read_exact(&mut bytes).await.context(|| reading)?;
        Ok(bytes)
    }

    async fn send(&mut self, bytes: &[u8]) -> Result<()> {
        let sending = format!("talking to {}", self.export);
        self.stream.write_all(bytes).await.context(|| sending)
    }

    fn garbled(&self, what: &str) -> Error {
        Error::new(Kind::Corrupt, format!("{}: the server's {what} makes no sense", self.export))
    }
}
