//! Invariants checked: requests are these bytes exactly; whatever the kernel sends is read or
//! refused, never a panic, and always to an end.

use super::*;

/// A message from the kernel: header, then `data`.
fn raw(kind: u16, flags: u16, sequence: u32, data: &[u8]) -> Vec<u8> {
    let mut bytes = ((HEADER + data.len()) as u32).to_ne_bytes().to_vec();
    bytes.extend(kind.to_ne_bytes());
    bytes.extend(flags.to_ne_bytes());
    bytes.extend(sequence.to_ne_bytes());
    bytes.extend([0; 4]);
    bytes.extend(data);
    bytes.resize(aligned(bytes.len()), 0);
    bytes
}

fn attribute(kind: u16, data: &[u8]) -> Vec<u8> {
    let mut bytes = ((ATTRIBUTE + data.len()) as u16).to_ne_bytes().to_vec();
    bytes.extend(kind.to_ne_bytes());
    bytes.extend(data);
    bytes.resize(aligned(bytes.len()), 0);
    bytes
}

fn one(datagram: &[u8]) -> Result<Received<'_>, Malformed> {
    let mut all = messages(datagram);
    let first = all.next().expect("a message");
    assert_eq!(all.next(), None, "one message");
    first
}

#[test]
#[cfg(target_endian = "little")]
fn a_question_for_a_family_is_these_bytes() {
    let message = Message::new(CONTROL, GET_FAMILY, CONTROL_VERSION).string(FAMILY_NAME, "nbd");
    let expected = [
        28, 0, 0, 0, 16, 0, 5, 0, 7, 0, 0, 0, 0, 0, 0, 0, // length, family, flags, sequence
        3, 2, 0, 0, // command, version
        8, 0, 2, 0, b'n', b'b', b'd', 0,
    ];
    assert_eq!(message.seal(7), expected);
}

#[test]
#[cfg(target_endian = "little")]
fn nested_attributes_count_what_they_hold() {
    let message = Message::new(30, 1, 1)
        .nested(7, |list| list.nested(1, |item| item.u32(1, 5)).nested(1, |item| item.u32(1, 6)));
    let expected = [
        28, 0, 7, 0x80, // the list
        12, 0, 1, 0x80, 8, 0, 1, 0, 5, 0, 0, 0, // an item
        12, 0, 1, 0x80, 8, 0, 1, 0, 6, 0, 0, 0,
    ];
    assert_eq!(message.seal(1)[HEADER + GENERIC..], expected);
}

#[test]
fn strings_are_padded_and_the_padding_is_not_counted() {
    let sealed = Message::new(30, 1, 1).string(10, "image/a").u32(1, 9).seal(1);
    let attributes = Attributes::new(&sealed[HEADER + GENERIC..]);
    assert_eq!(attributes.find(10), Ok(Some(&b"image/a\0"[..])));
    assert_eq!(attributes.u32(1), Ok(Some(9)));
    assert_eq!(attributes.u32(2), Ok(None));
    assert!(attributes.u32(10).is_err(), "eight bytes are no u32");
}

#[test]
fn acknowledgements_say_done_or_why_not() {
    let done = raw(ERROR, CAPPED, 3, &[0; 20]);
    assert_eq!(one(&done), Ok(Received::Ack { sequence: 3, result: Ok(()) }));

    let mut data = (-libc::EBUSY).to_ne_bytes().to_vec();
    data.extend([0; HEADER]);
    let refused = |message: Option<&str>| Received::Ack {
        sequence: 4,
        result: Err(Refused { errno: Errno::EBUSY, message: message.map(str::to_owned) }),
    };
    assert_eq!(one(&raw(ERROR, CAPPED, 4, &data)), Ok(refused(None)));
    let mut words = data.clone();
    words.extend(attribute(2, &[9; 4]));
    words.extend(attribute(ACK_MESSAGE, b"in use\0"));
    assert_eq!(one(&raw(ERROR, CAPPED | ACK_TLVS, 4, &words)), Ok(refused(Some("in use"))));
    assert_eq!(one(&raw(ERROR, CAPPED, 4, &words)), Ok(refused(None)), "no words announced");
}

#[test]
fn words_are_found_behind_the_whole_request_too() {
    let request = Message::new(30, 1, 1).u32(1, 3).seal(4);
    let mut data = (-libc::EINVAL).to_ne_bytes().to_vec();
    data.extend(&request);
    data.extend(attribute(ACK_MESSAGE, b"no\0"));
    let Ok(Received::Ack { result: Err(refused), .. }) = one(&raw(ERROR, ACK_TLVS, 4, &data))
    else {
        panic!("a refusal");
    };
    assert_eq!(refused.to_string(), "Invalid argument (no)");
    // A request that claims to be longer than all there is: still a refusal, without words.
    data[4..8].copy_from_slice(&u32::MAX.to_ne_bytes());
    let Ok(Received::Ack { result: Err(refused), .. }) = one(&raw(ERROR, ACK_TLVS, 4, &data))
    else {
        panic!("a refusal");
    };
    assert_eq!(refused.message, None);
}

#[test]
fn a_refusal_with_an_impossible_code_is_still_one() {
    for code in [1, 22, i32::MIN, i32::MAX, -100_000] {
        let datagram = raw(ERROR, CAPPED, 1, &code.to_ne_bytes());
        let received = one(&datagram);
        assert!(matches!(received, Ok(Received::Ack { result: Err(_), .. })), "{received:?}");
    }
}

#[test]
fn wrong_lengths_are_refused_and_end_the_datagram() {
    let short = raw(ERROR, 0, 1, &[0, 0]);
    assert!(one(&short).is_err(), "an acknowledgement of two bytes");
    let headless = raw(30, 0, 1, &[5, 1]);
    assert!(one(&headless).is_err(), "half a generic header");
    for claimed in [0, 1, 15, 41, u32::MAX] {
        let mut bytes = raw(30, 0, 1, &[0; 24]);
        bytes[..4].copy_from_slice(&claimed.to_ne_bytes());
        assert!(one(&bytes).is_err(), "{claimed}");
    }
    for claimed in [0u16, 3, 13, u16::MAX] {
        let mut bytes = attribute(1, &[0; 8]);
        bytes[..2].copy_from_slice(&claimed.to_ne_bytes());
        let mut attributes = Attributes::new(&bytes);
        assert!(attributes.next().is_some_and(|first| first.is_err()), "{claimed}");
        assert_eq!(attributes.next(), None, "nothing after it");
    }
    assert!(Attributes::new(&[1, 2, 3]).u32(1).is_err(), "less than a header");
}

#[test]
fn what_says_nothing_is_passed_over() {
    let mut datagram = raw(NOOP, 0, 0, &[]);
    datagram.extend(raw(OVERRUN, 0, 0, &[0; 4]));
    datagram.extend(raw(30, 0, 0, &[4, 1, 0, 0]));
    datagram.extend(raw(DONE, 2, 0, &[0; 4]));
    let Ok(Received::Data { family: 30, command: 4, sequence: 0, .. }) = one(&datagram) else {
        panic!("the news");
    };
}

/// What a kernel answers for the family nbd.
fn family_answer() -> Vec<u8> {
    let mut data = vec![1, 2, 0, 0];
    data.extend(attribute(FAMILY_NAME, b"nbd\0"));
    data.extend(attribute(FAMILY_ID, &37u16.to_ne_bytes()));
    data.extend(attribute(99, b"of a later kernel"));
    data.extend(attribute(7 | NESTED, &attribute(1 | NESTED, &attribute(2, &12u32.to_ne_bytes()))));
    raw(CONTROL, 0, 5, &data)
}

#[test]
fn families_are_found_among_unknown_attributes() {
    let answer = family_answer();
    let Ok(Received::Data { attributes, .. }) = one(&answer) else { panic!("an answer") };
    assert_eq!(family_of(attributes), Ok(Some(37)));
    assert_eq!(family_of(Attributes::new(&[])), Ok(None));
    assert!(family_of(Attributes::new(&attribute(FAMILY_ID, &[1]))).is_err());
}

#[test]
fn mutated_and_truncated_answers_never_panic_and_always_end() {
    let seed = fastrand::u64(..);
    println!("seed {seed}");
    let mut random = fastrand::Rng::with_seed(seed);
    let mut words = (-libc::EINVAL).to_ne_bytes().to_vec();
    words.extend([7; HEADER]);
    words.extend(attribute(ACK_MESSAGE, b"why\0"));
    let mut datagram = family_answer();
    datagram.extend(raw(ERROR, CAPPED | ACK_TLVS, 5, &words));
    for _ in 0..20_000 {
        let mut bytes = datagram.clone();
        bytes.truncate(random.usize(..=bytes.len()));
        for _ in 0..random.usize(..4) {
            if let Some(at) = random.usize(..datagram.len()).checked_rem(bytes.len()) {
                bytes[at] = random.u8(..);
            }
        }
        let mut seen = 0;
        for received in messages(&bytes) {
            seen += 1;
            if let Ok(Received::Data { attributes, .. }) = received {
                let _ = family_of(attributes);
                assert!(attributes.count() <= bytes.len() / ATTRIBUTE + 1);
            }
        }
        assert!(seen <= bytes.len() / HEADER + 1, "{seen} messages");
    }
}
