//! Invariants checked: a request whose serving panics is answered with an error, and costs neither
//! its session nor a worker.

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

const SIZE: u64 = 1 << 20;

/// A device with a bug: reads of its first half panic, at once or while one is under way.
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
        Ok(())
    }

    async fn write(&self, _: &Ring, _: u64, _: Buf) -> Result<()> {
        Ok(())
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

fn request(command: u16, cookie: u64, offset: u64, len: u32) -> Vec<u8> {
    let mut bytes = 0x2560_9513_u32.to_be_bytes().to_vec();
    bytes.extend([0, 0]);
    bytes.extend(command.to_be_bytes());
    bytes.extend(cookie.to_be_bytes());
    bytes.extend(offset.to_be_bytes());
    bytes.extend(len.to_be_bytes());
    bytes
}

#[test]
fn a_request_that_panics_is_answered_and_others_go_on() {
    let mut rings = Rings::start(1, Duration::ZERO).unwrap();
    let (mut client, server) = UnixStream::pair().unwrap();
    client.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    let (done, ended) = tokio::sync::oneshot::channel();
    let figures = Arc::<Operations>::default();
    let counted = figures.clone();
    rings.spawn(0, move |ring| async move {
        let terms = Terms::new(Buggy.info(), Headers::Simple, Contexts::default());
        let socket = Arc::new(server.into());
        let end = serve(ring, socket, Arc::new(Buggy), terms, Vec::new(), counted).await;
        let _ = done.send(matches!(end, End::Clean));
    });
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
