//! The NBD handshake: what real clients sent, mutated. How it is cut makes no difference, every option is answered
//! once and in order, and what is said stays within its bounds.

use fastrand::Rng;
use underlay::{
    Error, Kind,
    blockdev::{
        Info,
        nbd::{Ending, Handshake, Negotiated, Offer, Secrecy, Step},
    },
};

use crate::{Case, mutator::mutate};

/// Bytes of input at most.
const MOST: usize = 64 << 10;
/// From so many bytes on, an option is not read to its end.
const ABSURD: u32 = 1 << 20;
/// The types of replies that end an option's answer: ACK, and errors.
const ACK: u32 = 1;

/// What the server made of its input.
#[derive(Debug, PartialEq, Eq)]
struct Told {
    output: Vec<u8>,
    /// The last step; `None` if it waits for more.
    end: Option<Result<Negotiated, String>>,
    /// Bytes of the input that it took.
    used: usize,
}

pub fn start() -> Case {
    let originals = recorded();
    let (mut cases, mut transmitted, mut closed) = (0, 0, 0);
    Box::new(move |rng| {
        let mut input = reordered(rng, &originals);
        for _ in 0..rng.usize(..3) {
            mutate(rng, &mut input, &originals, MOST);
        }
        let once = serve(&input, || usize::MAX);
        assert_eq!(serve(&input, || rng.usize(1..40)), once, "cut in pieces");
        let (answered, tail) = answers(&once.output[18..]);
        assert_eq!(answered, due(&input[..once.used]));
        // The answer to EXPORT_NAME, with zeros behind it or without.
        assert!(
            tail == 0 || matches!(once.end, Some(Ok(_))) && [10, 134].contains(&tail),
            "{tail}"
        );
        assert!(once.output.len() <= 18 + 134 + answered.len() * 5000);
        cases += 1;
        transmitted += usize::from(matches!(once.end, Some(Ok(_))));
        closed += usize::from(matches!(once.end, Some(Err(_))));
        let mixed = transmitted > cases / 10 && closed > cases / 10;
        assert!(cases % 10_000 > 0 || mixed, "of {cases}: {transmitted} and {closed}");
    })
}

fn recorded() -> Vec<Vec<u8>> {
    let text = include_str!("../fixtures/nbd/handshakes.txt");
    let lines = text.lines().filter(|line| !line.starts_with('#'));
    let bytes = |hex: &str| {
        let byte = |at: usize| u8::from_str_radix(&hex[at..at + 2], 16).unwrap();
        (0..hex.len()).step_by(2).map(byte).collect()
    };
    lines.map(|line| bytes(line.split_once(' ').unwrap().1)).collect()
}

fn word(bytes: &[u8], at: usize) -> u32 {
    u32::from_be_bytes(bytes[at..at + 4].try_into().unwrap())
}

/// A well-formed handshake of options from all the originals, their data slightly off at times.
fn reordered(rng: &mut Rng, originals: &[Vec<u8>]) -> Vec<u8> {
    let flags = if rng.u8(..8) == 0 { rng.u32(..4) } else { 3 };
    let mut input = flags.to_be_bytes().to_vec();
    for _ in 0..rng.usize(1..8) {
        let original = &originals[rng.usize(..originals.len())];
        let starts = (4..original.len()).filter(|at| original[*at..].starts_with(b"IHAVEOPT"));
        let starts: Vec<_> = starts.collect();
        let start = starts[rng.usize(..starts.len())];
        let (mut option, len) = (word(original, start + 8), word(original, start + 12) as usize);
        let mut data = original[start + 16..start + 16 + len].to_vec();
        if rng.u8(..6) == 0 {
            option = rng.u32(..13);
        }
        if rng.u8(..4) == 0 {
            mutate(rng, &mut data, originals, MOST);
        }
        input.extend(b"IHAVEOPT");
        input.extend(option.to_be_bytes());
        input.extend((data.len() as u32).to_be_bytes());
        input.extend(data);
    }
    input
}

fn open(name: &str) -> underlay::Result<Info> {
    let info = Info { size: 3 << 30, read_only: false, rotational: false };
    match name {
        "replica/vm1" => Ok(info),
        "image/a" => Ok(Info { read_only: true, rotational: true, ..info }),
        "locked" => Err(Error::new(Kind::Locked, "it is locked")),
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
            if let Step::Open { name } = &step {
                let offer = open(name).map(|info| Offer { info, description: "a test" });
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
    Told { output, end, used }
}

/// The options whose answers came to an end, in their order, and how many bytes are no reply.
fn answers(mut output: &[u8]) -> (Vec<u32>, usize) {
    let mut options = vec![];
    while output.starts_with(&[0, 3, 0xe8, 0x89, 4, 0x55, 0x65, 0xa9]) {
        let (option, kind, len) = (word(output, 8), word(output, 12), word(output, 16) as usize);
        if kind == ACK || kind >> 31 == 1 {
            options.push(option);
        }
        output = &output[20 + len..];
    }
    (options, output.len())
}

/// Options that are due a reply: those before EXPORT_NAME that came whole or are absurdly long.
fn due(input: &[u8]) -> Vec<u32> {
    let mut due = vec![];
    let mut at = 4;
    while let Some(header) = input.get(at..at + 16)
        && matches!(input[..4], [0, 0, 0, 1 | 3])
    {
        let (option, len) = (word(header, 8), word(header, 12));
        at += 16 + len as usize;
        let absurd = len > ABSURD;
        if header[..8] != *b"IHAVEOPT" || option == 1 || at > input.len() && !absurd {
            break;
        }
        due.push(option);
        if absurd {
            break;
        }
    }
    due
}
