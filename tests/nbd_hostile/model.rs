//! What is written at any offset is read, and told by BLOCK_STATUS.

use crate::{
    IMAGE, Target, content,
    nbd::{Client, FUA, Message, NO_HOLE, REQ_ONE, Replies, TRIM, WRITE, ZEROES, request},
};

#[test]
fn any_offset_and_length_agrees_with_a_model() {
    let target = Target::new();
    let mut model = content();
    model.resize(IMAGE as usize + (1 << 20), 0);
    for replies in [Replies::Structured, Replies::Simple] {
        let mut client = Client::open(&target.socket, &target.writable, replies);
        // Around a block's, a chunk's and the image's end.
        let mut fill = 0_u8;
        for edge in [4096, 65536 + 4096, 262_144, IMAGE] {
            let offsets = (0..9).chain([255, 256, 511, 512, 513, 4095]);
            for before in offsets {
                for len in [1, 2, 511, 512, 513, 4095, 4096, 4097] {
                    let at = edge - before;
                    let range = at as usize..at as usize + len;
                    fill = fill.wrapping_add(1);
                    assert_eq!(client.write(0, at, &vec![fill; len]), Ok(()));
                    model[range.clone()].fill(fill);
                    let around = range.start.saturating_sub(600)..range.end + 600;
                    let data = client.read(around.start as u64, around.len() as u32).unwrap();
                    assert!(data == model[around], "{len} bytes written at {at}");
                }
            }
        }
        let mut random = fastrand::Rng::with_seed(11);
        for step in 0..1500 {
            let at = random.usize(..model.len() - 1);
            let len = match random.u8(..4) {
                0 => random.usize(1..16),
                1 => random.usize(1..1024),
                2 => 4096 * random.usize(1..8),
                _ => random.usize(1..100_000),
            };
            let range = at..model.len().min(at + len);
            let (at, len) = (at as u64, range.len() as u32);
            let flags = if random.u8(..20) == 0 { FUA } else { 0 };
            match random.u8(..10) {
                0..4 => {
                    let data: Vec<u8> =
                        std::iter::repeat_with(|| random.u8(..)).take(len as usize).collect();
                    assert_eq!(client.write(flags, at, &data), Ok(()));
                    model[range].copy_from_slice(&data);
                }
                4 | 5 => {
                    let hole = if random.bool() { NO_HOLE } else { 0 };
                    assert_eq!(client.command(flags | hole, ZEROES, at, len), Ok(()));
                    model[range].fill(0);
                }
                6 => {
                    assert_eq!(client.command(flags, TRIM, at, len), Ok(()));
                    let now = client.read(at, len).unwrap();
                    let kept = now.iter().zip(&model[range.clone()]);
                    assert!(
                        kept.into_iter().all(|(now, was)| now == was || *now == 0),
                        "step {step}"
                    );
                    model[range].copy_from_slice(&now);
                }
                7 => assert_eq!(client.flush(), Ok(())),
                _ => assert!(client.read(at, len).unwrap() == model[range], "step {step}"),
            }
        }
        for (index, run) in model.chunks(1 << 20).enumerate() {
            let data = client.read((index as u64) << 20, run.len() as u32).unwrap();
            assert!(data == run, "MiB {index} at the end");
        }
        client.close();
    }
}

#[test]
fn statuses_cover_any_range_and_agree_with_reads() {
    let target = Target::new();
    let mut client = target.writer();
    // Every second block for 40 MiB: more extents than one answer should hold.
    let (from, blocks) = (IMAGE, 10_240_u64);
    let batch = 64;
    for first in (0..blocks).step_by(2 * batch) {
        for index in (first..first + 2 * batch as u64).step_by(2) {
            client.send(&request(0, WRITE, index, from + index * 4096, 4096));
            client.send(&[1; 4096]);
        }
        for _ in 0..batch {
            let message = client.message();
            let done = matches!(
                message,
                Message::Simple { error: 0, .. } | Message::Chunk { kind: 0, .. }
            );
            assert!(done, "{message:?}");
        }
    }
    let size = client.size;
    for flags in [0, REQ_ONE] {
        for (start, end) in
            [(0, size), (from + 1, from + 513), (from + 4095, from + 4098), (size - 1, size)]
        {
            let mut at: u64 = start;
            let mut asked = 0;
            while at < end && asked < 50 {
                let len = u32::try_from(end - at).unwrap_or(u32::MAX);
                let extents = client.status(flags, at, len).unwrap();
                assert!(extents.len() <= 1 << 20 && extents.iter().all(|extent| extent.0 > 0));
                let before: u64 =
                    extents[..extents.len() - 1].iter().map(|extent| u64::from(extent.0)).sum();
                assert!(before < u64::from(len), "all but the last lie in the range");
                if flags == REQ_ONE {
                    assert!(extents.len() == 1 && extents[0].0 <= len);
                }
                for (len, state) in extents {
                    if state & 2 == 2 {
                        // A sample of what reads as zeros, from both ends of it.
                        for at in [at, at + u64::from(len) - u64::from(len.min(65536))] {
                            let data = client.read(at, len.min(65536)).unwrap();
                            assert!(data.iter().all(|byte| *byte == 0), "zeros at {at}");
                        }
                    }
                    at += u64::from(len);
                }
                asked += 1;
            }
            assert!(at >= end || flags == REQ_ONE, "{asked} answers got from {start} to {at} only");
        }
    }
    // The written blocks are told as data, the ones between as holes of zeros.
    let extents = client.status(0, from, 16 * 4096).unwrap();
    assert!(
        extents.iter().enumerate().all(|(index, (_, state))| (index % 2 == 1) == (state & 2 == 2))
    );
    client.close();
}
