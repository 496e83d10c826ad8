//! Invariants checked: how the input is cut makes no difference; every option is answered exactly once
//! and in order, whatever became of the bytes of a real handshake; nothing panics or grows.
//!
//! The mutations take `SEED` and `ROUNDS` from the environment; a failure names the round.

use super::*;

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

/// Options that are due a reply: those before EXPORT_NAME that came whole or are absurdly long.
fn due(input: &[u8]) -> Vec<u32> {
    let mut due = vec![];
    let mut at = 4;
    while let Some(header) = input.get(at..at + 16)
        && matches!(input[..4], [0, 0, 0, 1 | 3])
    {
        let word = |at: usize| u32::from_be_bytes(header[at..at + 4].try_into().unwrap());
        let (option, len) = (word(8), word(12));
        at += 16 + len as usize;
        let absurd = len > MAX_DRAIN;
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

#[test]
fn mutations_are_survived_and_every_option_is_answered_once() {
    let originals: Vec<_> = recorded().into_iter().map(|(_, input)| input).collect();
    let seed = std::env::var("SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or(1);
    let rounds = std::env::var("ROUNDS").ok().and_then(|n| n.parse().ok()).unwrap_or(100_000);
    let (mut transmitted, mut closed) = (0, 0);
    for round in 0..rounds {
        let mut random = fastrand::Rng::with_seed(seed + round);
        let mut input = reordered(&originals, &mut random);
        for _ in 0..random.usize(..3) {
            mutate(&mut input, &originals, &mut random);
        }
        let once = serve(&input, || usize::MAX);
        let pieces = serve(&input, || random.usize(1..40));
        assert_eq!(pieces, once, "round {round} of seed {seed}");
        transmitted += u64::from(matches!(once.end, Some(Ok(_))));
        closed += u64::from(matches!(once.end, Some(Err(_))));
        let answered: Vec<_> = once.finals().into_iter().map(|(option, _)| option).collect();
        let used = &input[..input.len() - once.rest];
        assert_eq!(answered, due(used), "round {round} of seed {seed}");
        let tail = once.parse().1.len();
        assert!(tail == 0 || once.terms().flags != 0 && [10, 134].contains(&tail), "{tail}");
        assert!(once.output.len() <= 18 + 134 + answered.len() * 5000);
    }
    assert!(transmitted > rounds / 10 && closed > rounds / 10, "{transmitted} and {closed}");
}

/// A well-formed handshake of options from all the originals, their data slightly off at times.
fn reordered(originals: &[Vec<u8>], random: &mut fastrand::Rng) -> Vec<u8> {
    let flags = if random.u8(..8) == 0 { random.u32(..4) } else { 3 };
    let mut client = Client::new(flags);
    for _ in 0..random.usize(1..8) {
        let original = &originals[random.usize(..originals.len())];
        let starts = (4..original.len()).filter(|at| original[*at..].starts_with(b"IHAVEOPT"));
        let starts: Vec<_> = starts.collect();
        let start = starts[random.usize(..starts.len())];
        let word = |at: usize| u32::from_be_bytes(original[at..at + 4].try_into().unwrap());
        let (mut option, len) = (word(start + 8), word(start + 12) as usize);
        let mut data = original[start + 16..start + 16 + len].to_vec();
        if random.u8(..6) == 0 {
            option = random.u32(..13);
        }
        if random.u8(..4) == 0 {
            mutate(&mut data, originals, random);
        }
        client = client.option(option, &data);
    }
    client.0
}

fn mutate(input: &mut Vec<u8>, others: &[Vec<u8>], random: &mut fastrand::Rng) {
    if input.is_empty() {
        return;
    }
    let at = random.usize(..input.len());
    match random.u8(..8) {
        0 => input[at] ^= 1 << random.u8(..8),
        1 => input[at] = random.u8(..),
        2 => input.insert(at, random.u8(..)),
        3 => drop(input.remove(at)),
        4 => input.truncate(at),
        5 => {
            // A number where one may be: lengths, counts, options.
            let numbers = [0_u32, 1, 2, 4, 16, 256, 4096, 65536, 1 << 20, 1 << 31];
            let number = numbers[random.usize(..numbers.len())] + random.u32(..3);
            let number = number.wrapping_sub(1);
            let end = input.len().min(at + 4);
            input[at..end].copy_from_slice(&number.to_be_bytes()[..end - at]);
        }
        6 => {
            let other = &others[random.usize(..others.len())];
            input.truncate(at);
            input.extend(&other[random.usize(..other.len())..]);
        }
        _ => {
            let noise: Vec<u8> = (0..random.usize(..300)).map(|_| random.u8(..)).collect();
            input.splice(at..at, noise);
        }
    }
    input.truncate(64 << 10);
}
