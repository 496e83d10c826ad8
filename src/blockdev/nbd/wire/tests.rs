//! Invariants checked: requests and replies are the protocol's bytes; statuses are merged, clipped and
//! bounded.

use super::*;

fn extent(len: u64, state: u32) -> Extent {
    Extent { len, hole: state & state::HOLE != 0, zero: state & state::ZERO != 0 }
}

fn status(extents: &[Extent], length: u64, limit: usize) -> Vec<(u32, u32)> {
    let mut output = b"before".to_vec();
    status_chunk(7, 9, extents, length, limit, &mut output);
    let chunk = &output[6..];
    let len = u32::from_be_bytes(chunk[16..20].try_into().unwrap()) as usize;
    assert_eq!(chunk.len(), CHUNK_HEADER + len);
    assert_eq!(chunk[..16], [0x66, 0x8e, 0x33, 0xef, 0, 1, 0, 5, 0, 0, 0, 0, 0, 0, 0, 7]);
    assert_eq!(chunk[20..24], [0, 0, 0, 9]);
    let word = |bytes: &[u8]| u32::from_be_bytes(bytes.try_into().unwrap());
    chunk[24..].chunks(8).map(|both| (word(&both[..4]), word(&both[4..]))).collect()
}

#[test]
fn requests_decode_by_the_table() {
    let header: [u8; REQUEST_HEADER] = [
        0x25, 0x60, 0x95, 0x13, 0x00, 0x01, 0x00, 0x01, 1, 2, 3, 4, 5, 6, 7, 8, 0, 0, 0, 1, 0, 0,
        0x10, 0, 0, 0, 0x20, 0,
    ];
    let request = Request::decode(&header).unwrap();
    assert_eq!(
        request,
        Request {
            flags: command_flag::FUA,
            command: Command::Write,
            cookie: 0x0102_0304_0506_0708,
            offset: 0x1_0000_1000,
            length: 0x2000,
        }
    );
    assert_eq!(request.payload(), 0x2000);
    for number in 0..=u16::MAX {
        let mut header = header;
        header[6..8].copy_from_slice(&number.to_be_bytes());
        let request = Request::decode(&header).unwrap();
        assert_eq!(number > 7, request.command == Command::Unknown(number));
        assert_eq!(number == 1, request.payload() > 0);
    }
    for bit in 0..32 {
        let mut header = header;
        header[bit / 8] ^= 1 << (bit % 8);
        assert!(Request::decode(&header).is_err(), "bit {bit} of the magic");
    }
}

#[test]
fn replies_encode_by_the_table() {
    let cookie = 0x1122_3344_5566_7788;
    assert_eq!(
        simple_reply(cookie, error::ENOSPC),
        [0x67, 0x44, 0x66, 0x98, 0, 0, 0, 28, 0x11, 0x22, 0x33, 0x44, 0x55, 0x66, 0x77, 0x88]
    );
    let head = |flags: u8, kind: [u8; 2], len: u8| {
        let mut head = vec![0x66, 0x8e, 0x33, 0xef, 0, flags, kind[0], kind[1]];
        head.extend(cookie.to_be_bytes());
        head.extend([0, 0, 0, len]);
        head
    };
    assert_eq!(none_chunk(cookie)[..], head(1, [0, 0], 0));
    let data = data_chunk(cookie, Place::Middle, 0x1234, 10);
    assert_eq!(data[..20], head(0, [0, 1], 18));
    assert_eq!(data[20..], [0, 0, 0, 0, 0, 0, 0x12, 0x34]);
    let hole = hole_chunk(cookie, Place::Last, 0x1234, 0x1000);
    assert_eq!(hole[..20], head(1, [0, 2], 12));
    assert_eq!(hole[20..], [0, 0, 0, 0, 0, 0, 0x12, 0x34, 0, 0, 0x10, 0]);
    let mut output = vec![];
    error_chunk(cookie, error::EIO, "bad", &mut output);
    assert_eq!(output[..20], head(1, [0x80, 1], 9));
    assert_eq!(output[20..], [0, 0, 0, 5, 0, 3, b'b', b'a', b'd']);
    output.clear();
    error_offset_chunk(cookie, Place::Middle, error::EIO, "bad", 512, &mut output);
    assert_eq!(output[..20], head(0, [0x80, 2], 17));
    assert_eq!(output[20..], [0, 0, 0, 5, 0, 3, b'b', b'a', b'd', 0, 0, 0, 0, 0, 0, 2, 0]);
}

#[test]
fn messages_fit_the_protocol() {
    let mut output = vec![];
    error_chunk(1, error::EIO, &"ä".repeat(5000), &mut output);
    assert_eq!(output.len(), CHUNK_HEADER + 6 + MAX_STRING);
    assert!(std::str::from_utf8(&output[CHUNK_HEADER + 6..]).is_ok());
    assert_eq!(displayable(&format!("x{}", "ä".repeat(5000))).len(), MAX_STRING - 1);
    assert_eq!(displayable("one\0two"), "one");
}

#[test]
fn statuses_merge_clip_and_stop() {
    let both = state::HOLE | state::ZERO;
    let four = [extent(4096, 0), extent(4096, 0), extent(8192, both), extent(512, 0)];
    assert_eq!(status(&four, 16896, 100), [(8192, 0), (8192, both), (512, 0)]);
    assert_eq!(status(&four, 10000, 100), [(8192, 0), (1808, both)], "clipped");
    assert_eq!(status(&four, 8192, 100), [(8192, 0)], "nothing past the range");
    assert_eq!(status(&four, 16896, 2), [(8192, 0), (8192, both)], "at the limit");
    assert_eq!(status(&four, 16896, 1), [(8192, 0)], "REQ_ONE is merged, too");
    assert_eq!(status(&four, 100, 1), [(100, 0)], "REQ_ONE stays inside the request");
    let long = [extent(1 << 33, both), extent(4096, 0)];
    assert_eq!(status(&long, u64::MAX, 100), [(0xffff_f000, both)], "nothing after a cut run");
    let sum = [extent(1 << 31, both), extent(1 << 31, both), extent(4096, 0)];
    assert_eq!(status(&sum, u64::MAX, 100), [(0xffff_f000, both)], "merged past 32 bits");
}
