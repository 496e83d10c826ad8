//! Invariants checked: requests and replies are the protocol's bytes; statuses are merged, clipped and
//! bounded.

use super::*;
use crate::blockdev::Holder;

const SIMPLE: Answer = Answer { headers: Headers::Simple, cookie: 7, offset: 0x1234 };
const STRUCTURED: Answer = Answer { headers: Headers::Structured, ..SIMPLE };
const EXTENDED: Answer = Answer { headers: Headers::Extended, ..SIMPLE };

fn extent(len: u64, holder: Holder) -> Extent {
    Extent { len, holder }
}

fn status(extents: &[Extent], length: u64, limit: usize) -> Vec<(u32, u32)> {
    let mut output = b"before".to_vec();
    let of = Context::Allocation;
    STRUCTURED.status(Place::Last, of, extents, length, limit, &mut output);
    let chunk = &output[6..];
    let len = u32::from_be_bytes(chunk[16..20].try_into().unwrap()) as usize;
    assert_eq!(chunk.len(), 20 + len);
    assert_eq!(chunk[..16], [0x66, 0x8e, 0x33, 0xef, 0, 1, 0, 5, 0, 0, 0, 0, 0, 0, 0, 7]);
    assert_eq!(chunk[20..24], [0, 0, 0, 1]);
    let word = |bytes: &[u8]| u32::from_be_bytes(bytes.try_into().unwrap());
    chunk[24..].chunks(8).map(|both| (word(&both[..4]), word(&both[4..]))).collect()
}

/// The same with extended headers, by who holds what.
fn holders(extents: &[Extent], length: u64, limit: usize) -> Vec<(u64, u64)> {
    let mut output = b"before".to_vec();
    EXTENDED.status(Place::Middle, Context::Source, extents, length, limit, &mut output);
    let chunk = &output[6..];
    let head = [0x6e, 0x8a, 0x27, 0x8c, 0, 0, 0, 6, 0, 0, 0, 0, 0, 0, 0, 7];
    assert_eq!((&chunk[..16], &chunk[16..24]), (&head[..], &[0, 0, 0, 0, 0, 0, 0x12, 0x34][..]));
    let long = |bytes: &[u8]| u64::from_be_bytes(bytes.try_into().unwrap());
    assert_eq!(chunk.len() as u64, 32 + long(&chunk[24..32]));
    assert_eq!(chunk[32..36], [0, 0, 0, 2]);
    let count = u32::from_be_bytes(chunk[36..40].try_into().unwrap()) as usize;
    assert_eq!(chunk.len(), 40 + 16 * count);
    chunk[40..].chunks(16).map(|both| (long(&both[..8]), long(&both[8..]))).collect()
}

#[test]
fn requests_decode_by_the_table() {
    let header: [u8; REQUEST_HEADER] = [
        0x25, 0x60, 0x95, 0x13, 0x00, 0x01, 0x00, 0x01, 1, 2, 3, 4, 5, 6, 7, 8, 0, 0, 0, 1, 0, 0,
        0x10, 0, 0, 0, 0x20, 0, 0xff, 0xff, 0xff, 0xff,
    ];
    let wanted = Request {
        flags: command_flag::FUA,
        command: Command::Write,
        cookie: 0x0102_0304_0506_0708,
        offset: 0x1_0000_1000,
        length: 0x2000,
        payload: 0x2000,
    };
    for headers in [Headers::Simple, Headers::Structured] {
        assert_eq!((Request::decode(headers, &header), headers.request()), (Ok(wanted), 28));
    }
    let compact = |header: &_| Request::decode(Headers::Structured, header);
    for number in 0..=u16::MAX {
        let mut header = header;
        header[6..8].copy_from_slice(&number.to_be_bytes());
        let request = compact(&header).unwrap();
        assert_eq!(number > 7, request.command == Command::Unknown(number));
        assert_eq!(number == 1, request.payload > 0);
    }
    for bit in 0..32 {
        let mut header = header;
        header[bit / 8] ^= 1 << (bit % 8);
        assert!(compact(&header).is_err(), "bit {bit} of the magic");
    }
    // Extended: another magic, 64 bits of length, and a payload where the flag says so.
    assert!(Request::decode(Headers::Extended, &header).is_err());
    let mut header = header;
    header[..4].copy_from_slice(&[0x21, 0xe4, 0x1c, 0x71]);
    assert!(compact(&header).is_err());
    header[24..].copy_from_slice(&0x1_0000_2000_u64.to_be_bytes());
    let length = 0x1_0000_2000;
    let extended = |header: &_| Request::decode(Headers::Extended, header);
    assert_eq!(extended(&header), Ok(Request { length, payload: length, ..wanted }));
    header[7] = 4;
    let trim = Request { command: Command::Trim, length, payload: 0, ..wanted };
    assert_eq!(extended(&header), Ok(trim));
    header[5] |= 1 << 5;
    let flags = command_flag::FUA | command_flag::PAYLOAD_LEN;
    assert_eq!(extended(&header), Ok(Request { flags, payload: length, ..trim }));
    header[7] = 1;
    assert_eq!(extended(&header), Ok(Request { flags, length, payload: length, ..wanted }));
    assert_eq!(Headers::Extended.request(), 32);
}

#[test]
fn replies_encode_by_the_table() {
    let cookie = [0, 0, 0, 0, 0, 0, 0, 7];
    let simple = |error: u8| [&[0x67, 0x44, 0x66, 0x98, 0, 0, 0, error][..], &cookie].concat();
    let structured = |kind: [u8; 2], len: u8, rest: &[u8]| {
        let head = [0x66, 0x8e, 0x33, 0xef, 0, 1, kind[0], kind[1]];
        [&head[..], &cookie, &[0, 0, 0, len], rest].concat()
    };
    let offset = [0, 0, 0, 0, 0, 0, 0x12, 0x34];
    let extended = |kind: [u8; 2], len: u8, rest: &[u8]| {
        let head = [0x6e, 0x8a, 0x27, 0x8c, 0, 1, kind[0], kind[1]];
        [&head[..], &cookie, &offset, &[0, 0, 0, 0, 0, 0, 0, len], rest].concat()
    };
    assert_eq!(SIMPLE.done()[..], simple(0));
    assert_eq!(STRUCTURED.done()[..], structured([0, 0], 0, &[]));
    assert_eq!(EXTENDED.done()[..], extended([0, 0], 0, &[]));
    assert_eq!(SIMPLE.data(Place::Last, 0x1234, 10)[..], simple(0));
    assert_eq!(STRUCTURED.data(Place::Last, 0x1234, 10)[..], structured([0, 1], 18, &offset));
    assert_eq!(EXTENDED.data(Place::Last, 0x1234, 10)[..], extended([0, 1], 18, &offset));
    let hole = [&offset[..], &[0, 0, 0, 10]].concat();
    assert_eq!(STRUCTURED.hole(Place::Last, 0x1234, 10)[..], structured([0, 2], 12, &hole));
    assert_eq!(EXTENDED.hole(Place::Last, 0x1234, 10)[..], extended([0, 2], 12, &hole));
    let failure = |answer: Answer| {
        let mut output = vec![];
        answer.failure(error::ENOSPC, "bad", &mut output);
        output
    };
    let said = [0, 0, 0, 28, 0, 3, b'b', b'a', b'd'];
    assert_eq!(failure(SIMPLE), simple(28));
    assert_eq!(failure(STRUCTURED), structured([0x80, 1], 9, &said));
    assert_eq!(failure(EXTENDED), extended([0x80, 1], 9, &said));
}

#[test]
fn messages_fit_the_protocol() {
    let mut output = vec![];
    STRUCTURED.failure(error::EIO, &"ä".repeat(5000), &mut output);
    assert_eq!(output.len(), 20 + 6 + MAX_STRING);
    assert!(std::str::from_utf8(&output[26..]).is_ok());
    assert_eq!(displayable(&format!("x{}", "ä".repeat(5000))).len(), MAX_STRING - 1);
    assert_eq!(displayable("one\0two"), "one");
}

#[test]
fn statuses_merge_clip_and_stop() {
    use Holder::{Base, Cache, Nobody, Overlay};
    let both = 3;
    let four =
        [extent(4096, Overlay), extent(4096, Base), extent(8192, Nobody), extent(512, Cache)];
    assert_eq!(status(&four, 16896, 100), [(8192, 0), (8192, both), (512, 0)]);
    assert_eq!(status(&four, 10000, 100), [(8192, 0), (1808, both)], "clipped");
    assert_eq!(status(&four, 8192, 100), [(8192, 0)], "nothing past the range");
    assert_eq!(status(&four, 16896, 2), [(8192, 0), (8192, both)], "at the limit");
    assert_eq!(status(&four, 16896, 1), [(8192, 0)], "REQ_ONE is merged, too");
    assert_eq!(status(&four, 100, 1), [(100, 0)], "REQ_ONE stays inside the request");
    let long = [extent(1 << 33, Nobody), extent(4096, Base)];
    assert_eq!(status(&long, u64::MAX, 100), [(0xffff_f000, both)], "nothing after a cut run");
    let sum = [extent(1 << 31, Nobody), extent(1 << 31, Nobody), extent(4096, Base)];
    assert_eq!(status(&sum, u64::MAX, 100), [(0xffff_f000, both)], "merged past 32 bits");

    assert_eq!(holders(&four, 16896, 100), [(4096, 1), (4096, 2), (8192, 0), (512, 3)]);
    assert_eq!(holders(&long, u64::MAX, 100), [(1 << 33, 0), (4096, 2)], "64 bits are enough");
    assert_eq!(holders(&sum, u64::MAX, 1), [(1 << 32, 0)]);
}
