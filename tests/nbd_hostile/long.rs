//! Requests of more data than the server moves at once: they come in pieces, and nobody may notice.

use std::collections::HashMap;

use nix::sys::resource::{Resource, getrlimit, setrlimit};

use crate::{
    IMAGE, Target, content,
    daemon::Daemon,
    nbd::{Client, FUA, Message, READ, Replies, WRITE, request},
    replies_to_reads, wait_until,
};

/// The most bytes that a request can be about.
const MOST: u32 = 32 << 20;
/// Bytes at the replica's start that are looked at.
const SEEN: u64 = 80 << 20;

#[test]
fn they_do_what_short_ones_do() {
    let target = Target::new();
    let mut random = fastrand::Rng::with_seed(6);
    let mut model = content();
    model.resize(SEEN as usize, 0);
    for replies in [Replies::Simple, Replies::Structured] {
        let mut client = Client::open(&target.socket, &target.writable, replies);
        for round in 0..12 {
            let len = random.u32(1 << 19..=if round % 4 == 0 { MOST } else { 3 << 20 });
            let offset = random.u64(0..SEEN - u64::from(len));
            let range = offset as usize..offset as usize + len as usize;
            if round % 2 == 0 {
                random.fill(&mut model[range.clone()]);
                let flags = if round % 4 == 0 { FUA } else { 0 };
                assert_eq!(client.write(flags, offset, &model[range]), Ok(()), "round {round}");
            } else {
                assert!(client.read(offset, len).unwrap() == model[range], "round {round}");
            }
        }
        client.close();
    }
    let mut client = target.writer();
    for at in (0..SEEN).step_by(1 << 20) {
        assert!(client.read(at, 1 << 20).unwrap() == model[at as usize..][..1 << 20], "at {at}");
    }
    client.close();
}

#[test]
fn simple_replies_to_several_at_once_are_each_in_one() {
    let target = Target::new();
    let mut client = Client::open(&target.socket, &target.writable, Replies::Simple);
    let ranges: HashMap<u64, (u64, u32)> = (0..40)
        .map(|index| match index % 4 {
            0 => (index, (index * 777, 5 << 20)),
            1 => (index, (index * 512, (1 << 19) + 1)),
            _ => (index, (index * 4096, 4096)),
        })
        .collect();
    for (cookie, (offset, len)) in &ranges {
        client.send(&request(0, READ, *cookie, *offset, *len));
    }
    let content = content();
    let mut seen = Vec::new();
    while seen.len() < ranges.len() {
        let Message::Simple { error: 0, cookie } = client.message() else {
            panic!("what is no simple reply, or an error");
        };
        let (offset, len) = ranges[&cookie];
        assert!(client.take(len as usize) == content[offset as usize..][..len as usize]);
        seen.push(cookie);
    }
    seen.sort_unstable();
    assert_eq!(seen, (0..40).collect::<Vec<_>>());
    client.close();
}

#[test]
fn chunks_of_several_at_once_make_each_whole() {
    let target = Target::new();
    let mut client = target.writer();
    let range = |cookie: u64| match cookie % 3 {
        0 => (cookie * 777, 5 << 20),
        1 => (3 << 20, (9 << 20) + cookie as u32),
        _ => (cookie * 512, 4096),
    };
    for cookie in 0..30 {
        client.send(&request(0, READ, cookie, range(cookie).0, range(cookie).1));
    }
    replies_to_reads(&mut client, 30, range);
    client.close();
}

#[test]
fn who_goes_within_one_leaves_sectors_old_or_new() {
    let target = Target::new();
    target.serves();
    let files = target.daemon.as_ref().map(Daemon::files);
    let mut random = fastrand::Rng::with_seed(8);
    for round in 1..20_u8 {
        let at = IMAGE + (u64::from(round) << 22);
        let mut client = target.writer();
        client.send(&request(FUA, WRITE, 1, at, 4 << 20));
        let sent = random.usize(1 << 19..4 << 20);
        client.send(&vec![round; sent]);
        drop(client);
        let mut client = target.writer();
        let data = client.read(at, 4 << 20).unwrap();
        for (index, sector) in data.chunks(512).enumerate() {
            assert!(sector.iter().all(|byte| *byte == sector[0]), "sector {index} is half new");
            assert!(sector[0] == 0 || sector[0] == round && (index + 1) * 512 <= sent);
        }
        client.close();
    }
    if let (Some(daemon), Some(files)) = (&target.daemon, files) {
        wait_until("connections that are gone stay open", || daemon.files() <= files + 4);
    }
    target.serves();
}

#[test]
fn a_thousand_at_once_have_little_in_memory() {
    let target = Target::new();
    let Some(daemon) = &target.daemon else { return };
    let (_, most) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    setrlimit(Resource::RLIMIT_NOFILE, most, most).unwrap();
    target.serves();
    let mut honest = target.writer();
    let before = daemon.memory();
    let hoards: Vec<Client> = (0..1000)
        .map(|index| {
            let mut client = target.writer();
            if index % 2 == 0 {
                // Eight of them, and none of the replies is read.
                (0..8).for_each(|cookie| client.send(&request(0, READ, cookie, 0, MOST)));
            } else {
                client.send(&request(0, WRITE, 1, 1 << 30, MOST));
                client.send(&[1; 1000]);
            }
            client
        })
        .collect();
    for index in 0..20 {
        assert_eq!(honest.write(FUA, IMAGE + index * 4096, &[index as u8; 4096]), Ok(()));
        assert_eq!(honest.read(IMAGE + index * 4096, 4096).unwrap(), [index as u8; 4096]);
        assert!(honest.read(0, IMAGE as u32).unwrap() == content());
    }
    let grown = daemon.memory().saturating_sub(before);
    println!("{} MiB for a thousand requests of 32 MiB", grown >> 20);
    // A MiB for each, half a GiB for all together, and what receives and holds a session.
    assert!(grown < 1800 << 20, "{} MiB", grown >> 20);
    drop(hoards);
    wait_until("memory stays in use", || daemon.memory() < before + (512 << 20));
    honest.close();
    target.serves();
}
