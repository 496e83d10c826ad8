//! Requests that make no sense, or that share what they should not.

use std::net::Shutdown;

use crate::{
    IMAGE, SIZE, Target, content,
    nbd::{
        CACHE, Client, DF, EINVAL, ENOSPC, EPERM, FAST_ZERO, FLUSH, FUA, Message, NO_HOLE, READ,
        Replies, SEND_FAST_ZERO, TRIM, WRITE, ZEROES, request,
    },
    replies_to_reads,
};

#[test]
fn ranges_past_the_end_have_their_errors() {
    let target = Target::new();
    for replies in [Replies::Simple, Replies::Structured] {
        let mut client = Client::open(&target.socket, &target.writable, replies);
        let size = client.size;
        let past = [
            (size, 1),
            (size - 1, 2),
            (size - 4096, 8192),
            (size + (1 << 40), 512),
            (u64::MAX, 1),
            (u64::MAX - 511, 512),
            (u64::MAX - 511, 4096),
            (1 << 63, 4096),
        ];
        for (offset, len) in past {
            assert_eq!(client.read(offset, len), Err(EINVAL), "READ {len} at {offset}");
            let data = vec![1; len as usize];
            assert_eq!(client.write(0, offset, &data), Err(ENOSPC), "WRITE {len} at {offset}");
            assert_eq!(client.command(0, TRIM, offset, len), Err(EINVAL));
            assert_eq!(client.command(0, CACHE, offset, len), Err(EINVAL));
            assert_eq!(client.command(NO_HOLE, ZEROES, offset, len), Err(ENOSPC));
            if replies == Replies::Structured {
                assert_eq!(client.status(0, offset, len), Err(EINVAL));
            }
        }
        assert_eq!(client.write(0, size - 1, &[7]), Ok(()));
        assert_eq!(client.read(size - 2, 2), Ok(vec![0, 7]));
        assert_eq!(client.command(FUA, ZEROES, size - 1, 1), Ok(()));
        client.close();
    }
}

#[test]
fn read_only_exports_stay_as_they_are() {
    let target = Target::new();
    let mut client = Client::open(&target.socket, &target.read_only, Replies::Structured);
    assert_eq!(client.flags & 2, 2);
    for len in [1, 512, 4096, 1 << 20] {
        assert_eq!(client.write(FUA, 0, &vec![0xff; len]), Err(EPERM));
        assert_eq!(client.command(0, TRIM, 0, len as u32), Err(EPERM));
        assert_eq!(client.command(0, ZEROES, 0, len as u32), Err(EPERM));
    }
    assert_eq!(client.write(0, u64::MAX, &[0; 10]), Err(EPERM));
    assert_eq!(client.flush(), Ok(()));
    let image = content();
    for (at, run) in image.chunks(1 << 20).enumerate() {
        assert!(client.read((at as u64) << 20, run.len() as u32).unwrap() == run);
    }
    client.close();
}

#[test]
fn commands_and_flags_that_nobody_knows_are_refused() {
    let target = Target::new();
    for replies in [Replies::Simple, Replies::Structured] {
        let mut client = Client::open(&target.socket, &target.writable, replies);
        for command in (8..40).chain([255, 256, 0x100, 0x7fff, 0x8000, u16::MAX]) {
            assert_eq!(client.command(0, command, 0, 4096), Err(EINVAL), "command {command}");
        }
        for bit in 1..16 {
            let flag = 1 << bit;
            if flag == FAST_ZERO && client.flags & SEND_FAST_ZERO != 0 {
                continue;
            }
            for command in [FLUSH, TRIM, CACHE, ZEROES] {
                let len = if command == FLUSH { 0 } else { 4096 };
                if (command, flag) == (ZEROES, NO_HOLE) {
                    continue;
                }
                let answer = client.command(flag, command, IMAGE, len);
                assert_eq!(answer, Err(EINVAL), "command {command} with flag {flag:#x}");
            }
            assert_eq!(client.write(flag, 0, &[9; 512]), Err(EINVAL), "WRITE with {flag:#x}");
        }
        assert_eq!(client.read(0, 512).unwrap(), content()[..512]);
        client.close();
    }
    // After something that is no request, nothing can be understood any more.
    for bytes in [&[0; 28][..], &[0xff; 500], b"NBDMAGIC", &request(0, READ, 1, 0, 1)[1..]] {
        let mut client = target.writer();
        client.try_send(bytes);
        let _ = client.stream.shutdown(Shutdown::Write);
        assert_eq!(client.rest(), b"");
    }
    target.serves();
}

#[test]
fn lengths_of_nothing_and_of_too_much_are_answered() {
    let target = Target::new();
    let mut client = target.writer();
    // What becomes of a request of no bytes is left open; that it is answered is not.
    for command in [TRIM, CACHE, ZEROES] {
        assert!(matches!(client.command(0, command, 0, 0), Ok(()) | Err(EINVAL)));
    }
    assert!(matches!(client.read(0, 0), Ok(_) | Err(EINVAL)));
    assert!(matches!(client.write(0, 0, b""), Ok(()) | Err(EINVAL)));
    assert!(matches!(client.status(0, 0, 0), Err(EINVAL)));
    for len in [(32 << 20) + 1, 1 << 30, u32::MAX] {
        assert!(client.read(0, len).is_err(), "READ of {len} bytes");
        assert_eq!(client.command(0, CACHE, 0, len), Ok(()));
        assert_eq!(client.command(0, TRIM, SIZE - (5 << 30), len), Ok(()));
        assert_eq!(client.command(0, ZEROES, SIZE - (5 << 30), len), Ok(()));
    }
    assert_eq!(client.read(0, 32 << 20).unwrap().len(), 32 << 20);
    assert_eq!(client.write(0, IMAGE, &vec![5; 32 << 20]), Ok(()));
    assert!(client.read(IMAGE, 32 << 20).unwrap().iter().all(|byte| *byte == 5));
    client.close();
    // A longer payload is drained and refused, or the connection ends; nothing of it is written.
    let mut client = target.writer();
    let data = vec![6; 33 << 20];
    client.try_send(&request(0, WRITE, 1, IMAGE, data.len() as u32));
    if client.try_send(&data) {
        assert_eq!(client.done_reply(1), Err(EINVAL));
    }
    let mut client = target.writer();
    assert_eq!(client.read(IMAGE, 512).unwrap(), [5; 512]);
    // The header of one, and no more.
    let mut client = target.writer();
    client.try_send(&request(0, WRITE, 1, 0, u32::MAX));
    drop(client);
    target.serves();
}

#[test]
fn requests_may_share_a_cookie() {
    let target = Target::new();
    let mut client = target.writer();
    for _ in 0..50 {
        client.send(&request(0, READ, 5, 12345, 6789));
        client.send(&request(0, READ, u64::MAX, 1, 4096));
    }
    let range = |cookie| if cookie == 5 { (12345, 6789) } else { (1, 4096) };
    let ends = replies_to_reads(&mut client, 100, range);
    assert_eq!(ends.iter().filter(|cookie| **cookie == 5).count(), 50);
    client.close();
}

#[test]
fn one_content_chunk_if_asked_for() {
    let target = Target::new();
    let mut client = target.writer();
    for (offset, len) in [(0, 65536), (60_000, 65536), (1 << 20, 1 << 20), (777, 7 << 20)] {
        client.send(&request(DF, READ, 1, offset, len));
        let mut contents = 0;
        loop {
            let Message::Chunk { done, kind, payload, .. } = client.message() else {
                panic!("a simple reply to a READ");
            };
            if kind == 1 {
                contents += 1;
                let range = offset as usize..offset as usize + len as usize;
                assert!(payload[8..] == content()[range]);
            }
            assert!(kind < 2, "a chunk of type {kind}");
            if done {
                break;
            }
        }
        assert_eq!(contents, 1);
    }
    client.close();
}

#[test]
fn requests_that_stall_anywhere_hold_nobody_up() {
    let target = Target::new();
    let at = |stop: usize| IMAGE + stop as u64 * 512;
    let whole = |stop: usize| {
        let mut bytes = request(0, WRITE, stop as u64, at(stop), 512);
        bytes.extend([0x5a; 512]);
        bytes
    };
    let mut stalled: Vec<_> = (0..28)
        .chain((28..540).step_by(37))
        .map(|stop| {
            let mut client = target.writer();
            client.send(&whole(stop)[..stop]);
            (client, stop)
        })
        .collect();
    target.serves();
    // Every second one finds its way on, byte by byte; the others vanish, and with them what they began.
    let mut index = 0;
    let mut gone = vec![];
    stalled.retain(|(_, stop)| {
        index += 1;
        gone.extend((index % 2 == 1).then_some(*stop));
        index % 2 == 0
    });
    for (client, stop) in &mut stalled {
        for byte in &whole(*stop)[*stop..] {
            client.send(&[*byte]);
        }
        assert_eq!(client.done_reply(*stop as u64), Ok(()));
        assert_eq!(client.read(at(*stop), 512).unwrap(), [0x5a; 512]);
    }
    let mut client = target.writer();
    for stop in gone {
        assert_eq!(client.read(at(stop), 512).unwrap(), [0; 512], "{stop} bytes of a request");
    }
    client.close();
}
