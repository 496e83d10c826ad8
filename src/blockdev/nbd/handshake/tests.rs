//! Invariants checked: replies are those of the protocol's text, byte for byte; input and output stay
//! within their bounds; how the input is cut makes no difference. What holds whatever the bytes are,
//! `tests/fuzz` has.

use super::*;
use crate::blockdev::nbd::{Context, wire::flag};

const SIZE: u64 = 3 << 30;
const FLAGS: u16 = 0b1101_0110_1101;

/// A client's side of a handshake, put together.
#[derive(Clone)]
struct Client(Vec<u8>);

impl Client {
    fn new(flags: u32) -> Client {
        Client(flags.to_be_bytes().to_vec())
    }

    fn option(mut self, option: u32, data: &[u8]) -> Client {
        self.0.extend(b"IHAVEOPT");
        self.0.extend(option.to_be_bytes());
        self.0.extend((data.len() as u32).to_be_bytes());
        self.0.extend(data);
        self
    }

    /// INFO (6) and GO (7).
    fn choose(self, option: u32, name: &str, wants: &[u16]) -> Client {
        let mut data = string(name);
        data.extend((wants.len() as u16).to_be_bytes());
        wants.iter().for_each(|want| data.extend(want.to_be_bytes()));
        self.option(option, &data)
    }

    /// LIST_META_CONTEXT (9) and SET_META_CONTEXT (10).
    fn contexts(self, option: u32, name: &str, queries: &[&str]) -> Client {
        let mut data = string(name);
        data.extend((queries.len() as u32).to_be_bytes());
        queries.iter().for_each(|query| data.extend(string(query)));
        self.option(option, &data)
    }
}

fn string(text: &str) -> Vec<u8> {
    [&(text.len() as u32).to_be_bytes(), text.as_bytes()].concat()
}

/// A reply to an option: the option, the reply's type, its payload.
type Reply = (u32, u32, Vec<u8>);

/// What a server made of its input.
#[derive(Debug, PartialEq, Eq)]
struct Told {
    output: Vec<u8>,
    /// What the last step was: `None` if it waits for more.
    end: Option<Result<Negotiated, String>>,
    /// Bytes of the input that were not used.
    rest: usize,
}

impl Told {
    /// Everything after the greeting: replies, and what is none: the answer to EXPORT_NAME.
    fn parse(&self) -> (Vec<Reply>, &[u8]) {
        let mut rest = &self.output[18..];
        let mut replies = vec![];
        while rest.starts_with(&[0, 3, 0xe8, 0x89, 4, 0x55, 0x65, 0xa9]) {
            let word = |at: usize| u32::from_be_bytes(rest[at..at + 4].try_into().unwrap());
            let (option, kind, len) = (word(8), word(12), word(16) as usize);
            replies.push((option, kind, rest[20..20 + len].to_vec()));
            rest = &rest[20 + len..];
        }
        (replies, rest)
    }

    fn replies(&self) -> Vec<Reply> {
        let (replies, rest) = self.parse();
        assert!(rest.is_empty(), "{rest:?} after the replies");
        replies
    }

    /// The replies that end the answer to an option.
    fn finals(&self) -> Vec<(u32, u32)> {
        let replies = self.parse().0.into_iter().map(|(option, kind, _)| (option, kind));
        replies.filter(|(_, kind)| *kind == reply::ACK || kind >> 31 == 1).collect()
    }

    fn terms(&self) -> Terms {
        self.end.as_ref().expect("an end").as_ref().expect("transmission").terms
    }
}

fn open(name: &str) -> Result<Info> {
    let info = Info { size: SIZE, read_only: false, rotational: false };
    match name {
        "replica/vm1" => Ok(info),
        "image/a" => Ok(Info { read_only: true, rotational: true, ..info }),
        "locked" => Err(Error::new(Kind::Locked, "replica locked is locked")),
        "permission" => Err(Error::new(Kind::Permission, "not you")),
        "unsupported" => Err(Error::new(Kind::Unsupported, "not here")),
        "unavailable" => Err(Error::new(Kind::Unavailable, "not now")),
        name => Err(Error::new(Kind::NotFound, format!("no export {name}"))),
    }
}

/// A handshake with a server of two exports; `cut` says how long the next piece of the input is.
fn serve(input: &[u8], mut cut: impl FnMut() -> usize) -> Told {
    let mut output = vec![];
    let mut handshake = Handshake::new(Secrecy::Plain, &mut output);
    let (mut used, mut end) = (0, None);
    'pieces: while used < input.len() {
        let until = input.len().min(used.saturating_add(cut()));
        loop {
            let (taken, mut step) = handshake.feed(&input[used..until], &mut output);
            used += taken;
            assert!(handshake.buffer.capacity() <= 2 * MAX_OPTION as usize);
            if let Step::Open { name } = &step {
                let opened = open(name);
                let offer = opened.map(|info| Offer { info, description: "a test" });
                step = handshake.opened(offer, &mut output);
                if matches!(step, Step::Read) {
                    continue;
                }
            }
            match step {
                Step::Read => break assert_eq!(used, until, "Read leaves nothing"),
                Step::List => {
                    let exports = [("replica/vm1", "a replica"), ("image/a", "")];
                    handshake.listed(exports, &mut output);
                }
                Step::Open { .. } => panic!("an open is no answer to an open"),
                Step::StartTls => panic!("TLS is not due"),
                Step::Transmit(negotiated) => end = Some(Ok(negotiated)),
                Step::Close(Ending::Aborted) => end = Some(Err("aborted".into())),
                Step::Close(Ending::Failed(error)) => end = Some(Err(error.to_string())),
            }
            if end.is_some() {
                break 'pieces;
            }
        }
    }
    Told { output, end, rest: input.len() - used }
}

fn whole(client: &Client) -> Told {
    serve(&client.0, || usize::MAX)
}

fn recorded() -> Vec<(&'static str, Vec<u8>)> {
    let text = include_str!("../../../../tests/fixtures/nbd/handshakes.txt");
    let lines = text.lines().filter(|line| !line.starts_with('#'));
    lines
        .map(|line| {
            let (name, hex) = line.split_once(' ').unwrap();
            let byte = |at: usize| u8::from_str_radix(&hex[at..at + 2], 16).unwrap();
            (name, (0..hex.len()).step_by(2).map(byte).collect())
        })
        .collect()
}

#[test]
fn go_answers_byte_for_byte() {
    let told = whole(&Client::new(3).choose(7, "image/a", &[3, 1, 2, 99]));
    let greeting = b"NBDMAGICIHAVEOPT\0\x03";
    assert_eq!(told.output[..18], greeting[..]);
    // READ_ONLY and ROTATIONAL; neither TRIM, WRITE_ZEROES nor (without structured replies) DF.
    let flags = 0b101_0001_1111_u16;
    let export = [&[0, 0][..], &SIZE.to_be_bytes(), &flags.to_be_bytes()].concat();
    let sizes = [0, 3, 0, 0, 0, 1, 0, 0, 0x10, 0, 2, 0, 0, 0];
    let expected = [
        (7, reply::INFO, export),
        (7, reply::INFO, b"\0\x01image/a".to_vec()),
        (7, reply::INFO, b"\0\x02a test".to_vec()),
        (7, reply::INFO, sizes.to_vec()),
        (7, reply::ACK, vec![]),
    ];
    assert_eq!(told.replies(), expected);
    let terms = Terms { flags, headers: Headers::Simple, contexts: Contexts::default() };
    assert_eq!(told.end, Some(Ok(Negotiated { name: "image/a".into(), terms })));
}

#[test]
fn info_gives_what_go_gives_and_goes_on() {
    let client = Client::new(3).option(8, b"").choose(6, "replica/vm1", &[3, 2]);
    let told = whole(&client.clone().choose(7, "replica/vm1", &[3, 2]));
    let kinds = |option: u32| -> Vec<_> {
        let replies = told.replies().into_iter().filter(|reply| reply.0 == option);
        replies.map(|(_, kind, payload)| (kind, payload)).collect()
    };
    assert_eq!(kinds(6), kinds(7));
    assert_eq!(kinds(6).len(), 4);
    assert_eq!(told.terms().flags, FLAGS | flag::SEND_DF);
    assert_eq!(whole(&client).end, None, "INFO alone enters nothing");
}

#[test]
fn export_name_is_answered_without_a_header() {
    let expected = [&SIZE.to_be_bytes()[..], &FLAGS.to_be_bytes()].concat();
    for (flags, zeroes) in [(0, 124), (1, 124), (2, 0), (3, 0)] {
        let told = whole(&Client::new(flags).option(1, b"replica/vm1"));
        assert_eq!(told.output[18..28], expected[..]);
        assert_eq!(told.output[28..], vec![0; zeroes][..], "client flags {flags}");
        assert_eq!(told.end.as_ref().unwrap().as_ref().unwrap().name, "replica/vm1");
    }
    let bad = [&b"nobody"[..], b"", b"\xff", b"a\0", &[b'x'; 4096], &[b'x'; 4097]];
    for name in bad {
        let told = whole(&Client::new(3).option(1, name));
        assert_eq!(told.output.len(), 18, "no reply to {name:?}");
        assert!(matches!(told.end, Some(Err(_))));
    }
}

#[test]
fn transmission_begins_after_the_last_option() {
    for client in
        [Client::new(3).choose(7, "replica/vm1", &[]), Client::new(3).option(1, b"replica/vm1")]
    {
        let input = [&client.0[..], &[0x25, 0x60, 0x95, 0x13, 0]].concat();
        for cut in 1..=input.len() {
            let told = serve(&input, || cut);
            assert!(told.end.is_some_and(|end| end.is_ok()));
            assert!(told.rest >= 5, "the request was touched in pieces of {cut}");
        }
    }
}

#[test]
fn list_tells_all_exports() {
    let told = whole(&Client::new(3).option(3, b"x").option(3, b"").option(2, b"bye"));
    let replies = told.replies();
    assert_eq!((replies[0].0, replies[0].1), (3, reply::ERR_INVALID));
    let expected = [
        (3, reply::SERVER, b"\0\0\0\x0breplica/vm1a replica".to_vec()),
        (3, reply::SERVER, b"\0\0\0\x07image/a".to_vec()),
        (3, reply::ACK, vec![]),
        (2, reply::ACK, vec![]),
    ];
    assert_eq!(replies[1..], expected);
    assert_eq!(told.end, Some(Err("aborted".into())));
}

#[test]
fn a_listing_ends_at_its_bound() {
    let mut output = vec![];
    let mut handshake = Handshake::new(Secrecy::Plain, &mut output);
    let client = Client::new(3).option(3, b"").0;
    assert!(matches!(handshake.feed(&client, &mut output), (20, Step::List)));
    let name = "n".repeat(MAX_STRING);
    output.clear();
    handshake.listed(std::iter::repeat_n((&*name, &*name), 1_000_000), &mut output);
    assert!(output.len() <= MAX_LISTING);
    let last = "too many exports to list";
    assert!(output.ends_with(last.as_bytes()));
}

#[test]
fn contexts_hold_for_the_last_set_and_its_export_only() {
    let (a, b) = ("replica/vm1", "image/a");
    let set = |name, queries| Client::new(3).option(8, b"").contexts(10, name, queries);
    let allocation = &["qemu:dirty", "base:allocation", "base:allocation", ""][..];
    let long = vec![0; MAX_OPTION as usize + 1];
    let table = [
        (set(a, allocation), true, "set"),
        (set(a, &[]), false, "no query selects nothing"),
        (set(a, &["base:"]), false, "wildcards don't select"),
        (set(a, &["base:allocation "]), false, "names are exact"),
        (set(b, allocation), false, "set for another export"),
        (set(b, allocation).contexts(10, a, allocation), true, "set again"),
        (set(a, allocation).contexts(10, b, allocation), false, "replaced"),
        (set(a, allocation).contexts(10, a, &[]), false, "emptied"),
        (set(a, allocation).option(10, b"garbage"), false, "replaced by a failure"),
        (set(a, allocation).option(10, &long), false, "replaced by one too long"),
        (set(a, allocation).contexts(9, a, &[]), true, "LIST changes nothing"),
        (set(a, allocation).option(5, b"").option(12, b""), true, "nor do refused options"),
        (set(a, allocation).option(11, b""), true, "nor do extended headers"),
        (set(a, allocation).choose(7, "nobody", &[]), true, "nor does a GO that fails"),
        (set(a, allocation).choose(6, b, &[]), true, "nor does INFO"),
        (Client::new(3).contexts(10, a, allocation).option(8, b""), false, "set too early"),
    ];
    for (client, chosen, what) in table {
        let told = whole(&client.choose(7, a, &[]));
        let contexts = told.terms().contexts;
        assert_eq!(contexts.has(Context::Allocation), chosen, "{what}");
        assert!(!contexts.has(Context::Source), "{what}");
    }
    let told = whole(&set(a, allocation));
    let expected = (10, reply::META_CONTEXT, b"\0\0\0\x01base:allocation".to_vec());
    assert_eq!(told.replies()[1..], [expected, (10, reply::ACK, vec![])], "one for two queries");
}

#[test]
fn contexts_are_listed_by_wildcard_and_by_name() {
    let list = |queries| {
        let told = whole(&Client::new(3).option(8, b"").contexts(9, "any", queries));
        told.replies()[1..].iter().map(|(_, kind, data)| (*kind, data.clone())).collect::<Vec<_>>()
    };
    let all = [
        (reply::META_CONTEXT, b"\0\0\0\0base:allocation".to_vec()),
        (reply::META_CONTEXT, b"\0\0\0\0x-underlay:source".to_vec()),
        (reply::ACK, vec![]),
    ];
    let one = [all[0].clone(), all[2].clone()];
    assert_eq!(list(&[]), all);
    assert_eq!(list(&["base:"]), one);
    assert_eq!(list(&["x:y", "base:", "base:allocation"]), one);
    assert_eq!(list(&["x-underlay:"]), all[1..]);
    assert_eq!(list(&["x-underlay:source", "base:"]), all);
    assert_eq!(list(&["x:y", "base", "base:none", "underlay"]), all[2..]);
    let told = whole(&Client::new(3).contexts(9, "any", &[]));
    assert_eq!(told.finals(), [(9, reply::ERR_INVALID)], "without structured replies");
}

#[test]
fn extended_headers_take_the_place_of_structured_replies() {
    let (a, both) = ("replica/vm1", &["x-underlay:source", "base:allocation"][..]);
    let extended = |client: Client| {
        let told = whole(&client.contexts(10, a, both).choose(7, a, &[]));
        (told.terms(), told.finals())
    };
    for client in [Client::new(3), Client::new(3).option(8, b"")] {
        let (terms, _) = extended(client.option(11, b""));
        assert_eq!((terms.headers, terms.contexts), (Headers::Extended, Contexts::all()));
        assert_eq!(terms.flags, FLAGS | flag::SEND_DF | flag::BLOCK_STATUS_PAYLOAD);
    }
    // There is no way back, and no old way on.
    let (terms, finals) = extended(Client::new(3).option(11, b"").option(8, b""));
    assert_eq!((terms.headers, finals[1]), (Headers::Extended, (8, reply::ERR_EXT_HEADER_REQD)));
    let blunt = whole(&Client::new(3).option(11, b"").option(1, a.as_bytes()));
    assert!(blunt.end.unwrap().is_err());
    let (terms, finals) = extended(Client::new(3).option(8, b"").option(11, b"x"));
    assert_eq!((terms.headers, finals[1]), (Headers::Structured, (11, reply::ERR_INVALID)));
}

#[test]
fn refused_options_leave_the_next_one_readable() {
    let known = [3, 6, 7, 8, 9, 10, 11];
    for option in (0..40).chain([1 << 31, u32::MAX]).filter(|option| ![1, 2].contains(option)) {
        for len in [0, 1, 5, 4096, MAX_OPTION, MAX_OPTION + 1, MAX_DRAIN] {
            let data = vec![0xff; len as usize];
            let told = whole(&Client::new(3).option(option, &data).option(3, b""));
            let wanted = match option {
                3 | 8 | 11 if len == 0 => reply::ACK,
                _ if !known.contains(&option) => reply::ERR_UNSUP,
                _ if len > MAX_OPTION => reply::ERR_TOO_BIG,
                _ => reply::ERR_INVALID,
            };
            assert_eq!(told.finals(), [(option, wanted), (3, reply::ACK)], "{option}, {len} bytes");
        }
    }
}

#[test]
fn options_too_long_to_read_end_the_connection_at_once() {
    for option in (0..16).chain([u32::MAX]) {
        for len in [MAX_DRAIN + 1, 1 << 31, u32::MAX - 15, u32::MAX] {
            let mut client = Client::new(3).option(option, b"");
            let at = client.0.len() - 4;
            client.0[at..].copy_from_slice(&len.to_be_bytes());
            let told = whole(&client);
            assert!(matches!(told.end, Some(Err(_))), "option {option} of {len} bytes");
            let expected = if option == 1 { vec![] } else { vec![(option, reply::ERR_TOO_BIG)] };
            assert_eq!(told.finals(), expected);
        }
    }
}

#[test]
fn names_are_bounded() {
    for option in [6, 7] {
        let finals = |name: &str| whole(&Client::new(3).choose(option, name, &[])).finals();
        assert_eq!(finals(&"x".repeat(4096)), [(option, reply::ERR_UNKNOWN)]);
        assert_eq!(finals(&"x".repeat(4097)), [(option, reply::ERR_TOO_BIG)]);
        assert_eq!(finals("a\0b"), [(option, reply::ERR_INVALID)]);
        assert_eq!(finals(""), [(option, reply::ERR_UNKNOWN)]);
    }
}

#[test]
fn failures_to_open_are_told_apart() {
    let table = [
        ("nobody", reply::ERR_UNKNOWN, "no export nobody"),
        ("locked", reply::ERR_UNKNOWN, "replica locked is locked"),
        ("permission", reply::ERR_POLICY, "not you"),
        ("unsupported", reply::ERR_PLATFORM, "not here"),
        ("unavailable", reply::ERR_SHUTDOWN, "not now"),
    ];
    for (name, kind, message) in table {
        let told = whole(&Client::new(3).choose(7, name, &[3]).choose(7, "replica/vm1", &[]));
        assert_eq!(told.replies()[0], (7, kind, message.as_bytes().to_vec()));
        assert!(told.end.is_some_and(|end| end.is_ok()), "the client may choose again");
    }
}

#[test]
fn client_flags_and_magics_are_checked() {
    for bit in 2..32 {
        let told = whole(&Client::new(3 | 1 << bit).option(2, b""));
        assert!(told.end.is_some_and(|end| end.unwrap_err().contains("client flags")), "bit {bit}");
    }
    let told = whole(&Client::new(0).option(3, b""));
    assert!(told.end.is_some_and(|end| end.unwrap_err().contains("without fixed newstyle")));
    for bit in 0..64 {
        let mut client = Client::new(3).option(2, b"");
        client.0[4 + bit / 8] ^= 1 << (bit % 8);
        let told = whole(&client);
        assert!(told.end.is_some_and(|end| end.unwrap_err().contains("begins with")), "bit {bit}");
    }
}

#[test]
fn endless_handshakes_end() {
    let mut many = Client::new(3);
    for _ in 0..=MAX_OPTIONS {
        many = many.option(99, b"");
    }
    let told = whole(&many);
    assert_eq!(told.finals().len(), MAX_OPTIONS as usize);
    assert!(matches!(told.end, Some(Err(_))));
    let mut long = Client::new(3);
    let data = vec![0; MAX_DRAIN as usize];
    for _ in 0..=MAX_HANDSHAKE / u64::from(MAX_DRAIN) {
        long = long.option(99, &data);
    }
    assert!(matches!(whole(&long).end, Some(Err(_))));
}

#[test]
fn before_tls_nothing_is_told_or_opened() {
    let due = || {
        let mut output = vec![];
        let handshake = Handshake::new(Secrecy::Due, &mut output);
        (handshake, output)
    };
    let told = |output: Vec<u8>| Told { output, end: None, rest: 0 }.finals();
    let (mut handshake, mut output) = due();
    let long = vec![0; MAX_OPTION as usize + 1];
    let early = Client::new(3)
        .option(3, b"")
        .choose(6, "replica/vm1", &[])
        .choose(7, "replica/vm1", &[])
        .option(8, b"")
        .contexts(9, "replica/vm1", &[])
        .contexts(10, "replica/vm1", &["base:allocation"])
        .option(99, b"")
        .option(7, &long)
        .option(5, b"x");
    let input = early.clone().option(5, b"").option(3, b"").0;
    let (used, step) = handshake.feed(&input, &mut output);
    assert!(matches!(step, Step::StartTls));
    assert_eq!(input.len() - used, 16, "what lies behind STARTTLS is not taken in");
    let mut wanted: Vec<_> =
        [3, 6, 7, 8, 9, 10, 99, 7].iter().map(|option| (*option, reply::ERR_TLS_REQD)).collect();
    wanted.extend([(5, reply::ERR_INVALID), (5, reply::ACK)]);
    assert_eq!(told(output), wanted);

    // Behind TLS all is as it is without, but that there is no second.
    let mut output = vec![0; 18];
    let after = Client(vec![]).option(5, b"").choose(7, "replica/vm1", &[]).0;
    assert!(matches!(handshake.feed(&after, &mut output), (_, Step::Open { .. })));
    assert_eq!(told(output), [(5, reply::ERR_INVALID)]);

    let (mut handshake, mut output) = due();
    let abort = Client::new(3).option(2, b"").0;
    let (_, step) = handshake.feed(&abort, &mut output);
    assert!(matches!(step, Step::Close(Ending::Aborted)));
    let (mut handshake, mut output) = due();
    let blunt = Client::new(3).option(1, b"replica/vm1").0;
    let (_, step) = handshake.feed(&blunt, &mut output);
    assert!(matches!(step, Step::Close(Ending::Failed(_))) && output.len() == 18);
    // Where it is not due there is none.
    assert_eq!(whole(&Client::new(3).option(5, b"")).finals(), [(5, reply::ERR_UNSUP)]);
}

#[test]
fn memory_grows_with_bytes_that_came_only() {
    let mut output = vec![];
    let mut handshake = Handshake::new(Secrecy::Plain, &mut output);
    let mut header = Client::new(3).option(7, b"").0;
    let at = header.len() - 4;
    header[at..].copy_from_slice(&MAX_OPTION.to_be_bytes());
    let _ = handshake.feed(&header, &mut output);
    assert!(handshake.buffer.capacity() < 100);
}

#[test]
fn real_clients_get_what_they_need() {
    let mut transmitting = 0;
    for (name, input) in recorded() {
        let told = serve(&input, || usize::MAX);
        assert_eq!(told.rest, 0, "{name}");
        match told.end.unwrap_or_else(|| panic!("{name} is left waiting")) {
            Ok(negotiated) => {
                transmitting += 1;
                assert_eq!(negotiated.name, "replica/vm1");
                let maps = ["qemu-img", "nbdcopy"].contains(&name);
                assert_eq!(!negotiated.terms.contexts.is_empty(), maps, "{name}");
            }
            Err(why) => assert_eq!((why.as_str(), name.contains("list")), ("aborted", true)),
        }
    }
    assert_eq!(transmitting, 7);
}

#[test]
fn cuts_make_no_difference() {
    for (name, input) in recorded() {
        let input = [&input[..], b"and a request"].concat();
        let once = serve(&input, || usize::MAX);
        for cut in 1..input.len() {
            let mut pieces = [cut, usize::MAX].into_iter().cycle();
            let twice = serve(&input, || pieces.next().unwrap_or(1));
            assert_eq!(twice, once, "{name} cut at {cut}");
            assert_eq!(serve(&input, || cut), once, "{name} in pieces of {cut}");
        }
    }
}
