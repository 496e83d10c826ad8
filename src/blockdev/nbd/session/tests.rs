//! Invariants checked: a request whose serving panics is answered with an error, and costs neither
//! its session nor a worker; what fails within a long request fails all of it, and is told if it still can be.

use std::{
    io::{Read, Write},
    os::unix::net::UnixStream,
    time::Duration,
};

use super::*;
use crate::{
    blockdev::{Grain, Holder, Info, Provision},
    io::rings::Rings,
};

const SIZE: u64 = 64 << 20;

/// A device with a bug: reads of its first half panic, at once or while one is under way. Its last quarter
/// can't be read or written.
struct Buggy;

impl Device<Ring> for Buggy {
    fn info(&self) -> Info {
        Info { size: SIZE, read_only: false, rotational: false }
    }

    async fn read(&self, _: &Ring, offset: u64, buf: Buf) -> Result<()> {
        if offset < SIZE / 4 {
            panic!("a bug at {offset}");
        }
        futures_util::future::ready(()).await;
        std::future::poll_fn(|context| {
            context.waker().wake_by_ref();
            Poll::Ready(())
        })
        .await;
        assert!(offset >= SIZE / 2, "a later bug");
        buf.fill(7);
        works(offset, &buf)
    }

    async fn write(&self, _: &Ring, offset: u64, buf: Buf) -> Result<()> {
        works(offset, &buf)
    }

    async fn flush(&self, _: &Ring) -> Result<()> {
        Ok(())
    }

    async fn discard(&self, _: &Ring, _: u64, _: u64) -> Result<()> {
        Ok(())
    }

    async fn write_zeroes(&self, _: &Ring, _: u64, _: u64, _: Provision) -> Result<()> {
        Ok(())
    }

    async fn prefetch(&self, _: &Ring, _: u64, _: u64) -> Result<()> {
        Ok(())
    }

    fn extents(&self, _: u64, len: u64, _: Grain, _: usize, extents: &mut Vec<Extent>) {
        extents.push(Extent { len, holder: Holder::Base });
    }
}

fn works(offset: u64, buf: &Buf) -> Result<()> {
    match offset + buf.len() as u64 > SIZE / 4 * 3 {
        true => Err(Error::new(Kind::Io, "a bad place")),
        false => Ok(()),
    }
}

fn request(command: u16, cookie: u64, offset: u64, len: u32) -> Vec<u8> {
    let mut bytes = 0x2560_9513_u32.to_be_bytes().to_vec();
    bytes.extend([0, 0]);
    bytes.extend(command.to_be_bytes());
    bytes.extend(cookie.to_be_bytes());
    bytes.extend(offset.to_be_bytes());
    bytes.extend(len.to_be_bytes());
    bytes
}

/// A session with `Buggy`: its client's end, how it ended, what it counted.
struct Running {
    client: UnixStream,
    ended: tokio::sync::oneshot::Receiver<bool>,
    figures: Arc<Operations>,
    rings: Rings,
}

fn start(headers: Headers) -> Running {
    let rings = Rings::start(1, Duration::ZERO).unwrap();
    let (client, server) = UnixStream::pair().unwrap();
    client.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    let (done, ended) = tokio::sync::oneshot::channel();
    let figures = Arc::<Operations>::default();
    let counted = figures.clone();
    rings.spawn(0, move |ring| async move {
        let terms = Terms::new(Buggy.info(), headers, Contexts::default());
        let socket = Arc::new(server.into());
        let share = Share::of(&Arc::default());
        let end = serve(ring, socket, Arc::new(Buggy), terms, Vec::new(), counted, share).await;
        let _ = done.send(matches!(end, End::Clean));
    });
    Running { client, ended, figures, rings }
}

#[test]
fn a_request_that_panics_is_answered_and_others_go_on() {
    let Running { mut client, ended, figures, mut rings } = start(Headers::Simple);
    // More of them than there may be workers, or credit.
    let count = 3 * MAX_REQUESTS as u64;
    for cookie in 0..count {
        let offset = [0, SIZE / 4, SIZE / 2][cookie as usize % 3];
        client.write_all(&request(0, cookie, offset, 512)).unwrap();
        let mut header = [0; 16];
        client.read_exact(&mut header).unwrap();
        assert_eq!(header[8..], cookie.to_be_bytes());
        let error = if cookie % 3 < 2 { 5 } else { 0_u32 };
        assert_eq!(header[4..8], error.to_be_bytes(), "request {cookie}");
        if error == 0 {
            let mut data = [0; 512];
            client.read_exact(&mut data).unwrap();
            assert_eq!(data, [7; 512]);
        }
    }
    client.write_all(&request(2, count, 0, 0)).unwrap();
    assert!(ended.blocking_recv().unwrap(), "it ended as it should");
    let reads = figures.recorded(Operation::Read);
    assert_eq!(reads.latency.total(), count);
    assert_eq!((reads.errors, reads.bytes), (count / 3 * 2, count / 3 * 512));
    assert!(rings.stop(Duration::from_secs(5)));
}

/// Where a range begins whose first five pieces are sound.
const TORN: u64 = SIZE / 4 * 3 - (5 << 19);

#[test]
fn a_long_read_that_fails_is_told_so_or_ends_its_connection() {
    let Running { mut client, ended, figures, mut rings } = start(Headers::Structured);
    client.write_all(&request(0, 1, TORN, 4 << 20)).unwrap();
    let mut data = 0;
    loop {
        let mut head = [0; 20];
        client.read_exact(&mut head).unwrap();
        let mut payload =
            vec![0; u32::from_be_bytes([head[16], head[17], head[18], head[19]]) as usize];
        client.read_exact(&mut payload).unwrap();
        match head[4..8] {
            [0, 0, 0, 1] => {
                assert_eq!(payload[..8], (TORN + data).to_be_bytes());
                data += payload.len() as u64 - 8;
            }
            [0, 1, 0x80, 1] => {
                assert_eq!(payload[..4], [0, 0, 0, 5]);
                break;
            }
            _ => panic!("a chunk that begins with {head:?}"),
        }
    }
    assert_eq!(data, 5 << 19, "what could be read");
    client.write_all(&request(2, 2, 0, 0)).unwrap();
    assert!(ended.blocking_recv().unwrap(), "others go on");
    assert_eq!(figures.recorded(Operation::Read).errors, 1);
    assert!(rings.stop(Duration::from_secs(5)));

    // Who knows no chunks is told so as long as nothing is sent, and what fits is not sent before it is read.
    let Running { mut client, ended, figures, mut rings } = start(Headers::Simple);
    client.write_all(&request(0, 1, TORN, 4 << 20)).unwrap();
    let mut header = [0; 16];
    client.read_exact(&mut header).unwrap();
    assert_eq!(header[..8], [0x67, 0x44, 0x66, 0x98, 0, 0, 0, 5]);
    client.write_all(&request(0, 1, TORN, 9 << 20)).unwrap();
    client.write_all(&request(0, 2, SIZE / 2, 4096)).unwrap();
    let mut reply = Vec::new();
    // What the client has not sent yet may make its end a reset.
    let _ = client.read_to_end(&mut reply);
    assert!(reply.len() >= 16 && reply.len() < 9 << 20, "{} bytes", reply.len());
    assert_eq!(reply[..8], [0x67, 0x44, 0x66, 0x98, 0, 0, 0, 0]);
    assert!(reply[16..].iter().all(|byte| *byte == 7));
    let _ = ended.blocking_recv().unwrap();
    assert_eq!(figures.recorded(Operation::Read).errors, 2);
    assert!(rings.stop(Duration::from_secs(5)));
}

#[test]
fn a_long_write_that_fails_anywhere_fails() {
    let Running { mut client, ended, figures, mut rings } = start(Headers::Simple);
    for (cookie, (offset, len, error)) in
        [(TORN, 5 << 19, 0_u8), (TORN, 4 << 20, 5), (0, 7 << 20, 0), (SIZE - (9 << 20), 9 << 20, 5)]
            .into_iter()
            .enumerate()
    {
        client.write_all(&request(1, cookie as u64, offset, len)).unwrap();
        client.write_all(&vec![1; len as usize]).unwrap();
        let mut header = [0; 16];
        client.read_exact(&mut header).unwrap();
        assert_eq!(header[4..8], [0, 0, 0, error], "{len} bytes at {offset}");
        assert_eq!(header[8..], (cookie as u64).to_be_bytes());
    }
    client.write_all(&request(2, 9, 0, 0)).unwrap();
    assert!(ended.blocking_recv().unwrap());
    let writes = figures.recorded(Operation::Write);
    assert_eq!((writes.latency.total(), writes.errors), (4, 2));
    assert!(rings.stop(Duration::from_secs(5)));
}
