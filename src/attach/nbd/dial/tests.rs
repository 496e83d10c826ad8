//! Invariants checked: against our own server's handshake, size and flags come over and not a
//! byte of what follows is taken; against hostile servers, an error in bounded time and memory.

use std::{os::unix::net::UnixListener, thread};

use super::*;
use crate::blockdev::{
    Info,
    nbd::{Handshake, Offer, Step},
};

const INFO: Info = Info { size: 12 << 20, read_only: false, rotational: false };

/// Serves one handshake as our server does; `extra` follows it at once.
fn serve(mut stream: UnixStream, extra: &[u8]) {
    let mut output = Vec::new();
    let mut handshake = Handshake::new(&mut output);
    let mut input = [0; 4096];
    let mut filled = 0;
    loop {
        stream.write_all(&output).unwrap();
        output.clear();
        let (used, mut step) = handshake.feed(&input[..filled], &mut output);
        input.copy_within(used..filled, 0);
        filled -= used;
        if let Step::Open { name } = step {
            let offer = match name.as_str() {
                "replica/vm1" => Ok(Offer { info: INFO, description: "a replica" }),
                _ => Err(Error::new(Kind::NotFound, format!("no {name} on this node"))),
            };
            step = handshake.opened(offer, &mut output);
        }
        match step {
            Step::Read if output.is_empty() => match stream.read(&mut input[filled..]).unwrap() {
                0 => return,
                read => filled += read,
            },
            Step::Transmit(_) => {
                output.extend(extra);
                return stream.write_all(&output).unwrap();
            }
            Step::Close(_) => return,
            Step::Read | Step::List | Step::Open { .. } => (),
        }
    }
}

/// What a client makes of a server that sends `bytes` and then nothing.
fn against(bytes: &[u8], limit: Duration) -> Result<(u64, u16)> {
    let (client, mut server) = UnixStream::pair().unwrap();
    let bytes = bytes.to_vec();
    let sender = thread::spawn(move || {
        // The client may have hung up long before the end.
        let _ = server.write_all(&bytes);
        // Held open until the client is done: silence, not an end.
        let _ = server.read_to_end(&mut Vec::new());
    });
    let outcome = shake_hands(&client, "replica/vm1", Instant::now() + limit);
    drop(client);
    sender.join().unwrap();
    outcome
}

fn greeting() -> Vec<u8> {
    let mut bytes = GREETING.to_be_bytes().to_vec();
    bytes.extend(OPTION_MAGIC.to_be_bytes());
    bytes.extend([0, 3]);
    bytes
}

fn answer(kind: u32, data: &[u8]) -> Vec<u8> {
    let mut bytes = OPTION_REPLY_MAGIC.to_be_bytes().to_vec();
    bytes.extend(option::GO.to_be_bytes());
    bytes.extend(kind.to_be_bytes());
    bytes.extend((data.len() as u32).to_be_bytes());
    bytes.extend(data);
    bytes
}

fn export_info() -> Vec<u8> {
    let mut data = vec![0, 0];
    data.extend(INFO.size.to_be_bytes());
    data.extend([0, 0x6d]);
    data
}

const SOON: Duration = Duration::from_millis(200);
const LATE: Duration = Duration::from_secs(20);

#[test]
fn our_own_server_is_understood_to_the_byte() {
    let (client, server) = UnixStream::pair().unwrap();
    let served = thread::spawn(move || serve(server, b"what follows"));
    let (size, flags) = shake_hands(&client, "replica/vm1", Instant::now() + LATE).unwrap();
    assert_eq!(size, INFO.size);
    assert_ne!(flags & flag::SEND_FLUSH, 0);
    assert_eq!(flags & flag::READ_ONLY, 0);
    assert_eq!(flags & flag::SEND_DF, 0, "structured replies were not asked for");
    served.join().unwrap();
    assert_eq!(client.read_timeout().unwrap(), None, "the kernel would inherit it");
    assert_eq!(client.write_timeout().unwrap(), None);
    let mut rest = String::new();
    (&client).read_to_string(&mut rest).unwrap();
    assert_eq!(rest, "what follows");
}

#[test]
fn several_connections_are_dialled_by_path() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("nbd.sock");
    let listener = UnixListener::bind(&path).unwrap();
    let served = thread::spawn(move || {
        for _ in 0..3 {
            serve(listener.accept().unwrap().0, &[]);
        }
        // The fourth client asks for what is not there.
        serve(listener.accept().unwrap().0, &[]);
    });
    let links = Links::dial(&path, "replica/vm1", 3).unwrap();
    assert_eq!((links.count(), links.size(), links.read_only()), (3, INFO.size, false));
    let missing = Links::dial(&path, "replica/none", 1).unwrap_err();
    assert_eq!(missing.kind(), Kind::NotFound);
    assert!(missing.to_string().contains("no replica/none on this node"), "{missing}");
    served.join().unwrap();

    let gone = Links::dial(&path, "replica/vm1", 1).unwrap_err();
    assert_eq!(gone.kind(), Kind::Unavailable, "{gone}");
    let nowhere = Links::dial(&directory.path().join("none"), "replica/vm1", 1).unwrap_err();
    assert!(nowhere.to_string().contains("is the daemon running?"), "{nowhere}");
    for count in [0, 17] {
        assert_eq!(Links::dial(&path, "x", count).unwrap_err().kind(), Kind::Invalid);
    }
    let long = Links::dial(Path::new(&"x".repeat(200)), "x", 1).unwrap_err();
    assert!(long.to_string().contains("connecting to the NBD server"), "{long}");
}

#[test]
fn a_daemon_that_stops_in_the_handshake_is_worth_another_try() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("nbd.sock");
    let listener = UnixListener::bind(&path).unwrap();
    let stopping = thread::spawn(move || {
        // One client is taken and reset with its hello unread, one is closed on, one is still in
        // the queue when the listener goes.
        let (mut stream, _) = listener.accept().unwrap();
        stream.write_all(&greeting()).unwrap();
        let mut first = [0];
        stream.read_exact(&mut first).unwrap();
        drop(stream);
        drop(listener.accept().unwrap());
        thread::sleep(Duration::from_millis(50));
    });
    for _ in 0..3 {
        let error = Links::dial(&path, "replica/vm1", 1).unwrap_err();
        assert_eq!(error.kind(), Kind::Unavailable, "{error}");
    }
    stopping.join().unwrap();
}

#[test]
fn the_hello_is_these_bytes() {
    let mut expected = vec![0, 0, 0, 3];
    expected.extend(b"IHAVEOPT");
    expected.extend([0, 0, 0, 7, 0, 0, 0, 8, 0, 0, 0, 2]);
    expected.extend(b"ab");
    expected.extend([0, 0]);
    assert_eq!(hello(3, "ab"), expected);
}

#[test]
fn servers_that_are_none_are_refused() {
    let kind = |bytes: &[u8]| against(bytes, SOON).unwrap_err().kind();
    assert_eq!(kind(b"SSH-2.0-OpenSSH_9.2p1 Debian"), Kind::Corrupt);
    let mut old = greeting();
    old[17] = 0;
    assert_eq!(kind(&old), Kind::Corrupt, "not fixed newstyle");
    assert_eq!(kind(&greeting()[..10]), Kind::Unavailable, "half a greeting, then silence");
    assert_eq!(kind(&greeting()), Kind::Unavailable, "silence");
}

#[test]
fn replies_that_make_no_sense_are_refused() {
    let kind = |replies: &[Vec<u8>]| {
        let mut bytes = greeting();
        replies.iter().for_each(|reply| bytes.extend(reply));
        against(&bytes, LATE).unwrap_err().kind()
    };
    let mut huge = answer(reply::INFO, &[]);
    huge[16..].copy_from_slice(&u32::MAX.to_be_bytes());
    assert_eq!(kind(&[huge]), Kind::Corrupt, "4 GiB of reply");
    let mut other = answer(reply::ACK, &[]);
    other[11] = 3;
    assert_eq!(kind(&[other]), Kind::Corrupt, "a reply to an option that was not sent");
    let mut magic = answer(reply::ACK, &[]);
    magic[0] ^= 1;
    assert_eq!(kind(&[magic]), Kind::Corrupt);
    assert_eq!(kind(&[answer(reply::ACK, &[])]), Kind::Corrupt, "no size");
    assert_eq!(kind(&[answer(reply::INFO, &export_info()[..11])]), Kind::Corrupt);
    let endless = vec![answer(reply::INFO, &export_info()); 100];
    assert_eq!(kind(&endless), Kind::Corrupt, "information without end");
    let unknown = answer(reply::ERR_UNKNOWN, b"no such export");
    assert_eq!(kind(&[unknown]), Kind::NotFound);
    assert_eq!(kind(&[answer(reply::ERR_SHUTDOWN, &[])]), Kind::Unavailable);
    assert_eq!(kind(&[answer(77, &[])]), Kind::Invalid);
}

#[test]
fn unknown_information_is_passed_over() {
    let mut bytes = greeting();
    bytes.extend(answer(reply::INFO, &[0, 9, 1, 2, 3]));
    bytes.extend(answer(reply::INFO, &[]));
    bytes.extend(answer(reply::INFO, &export_info()));
    bytes.extend(answer(reply::ACK, &[]));
    assert_eq!(against(&bytes, LATE).unwrap(), (INFO.size, 0x6d));
}

#[test]
fn names_too_long_for_the_protocol_are_not_sent() {
    let (client, _server) = UnixStream::pair().unwrap();
    let outcome = shake_hands(&client, &"x".repeat(MAX_STRING + 1), Instant::now() + SOON);
    assert_eq!(outcome.unwrap_err().kind(), Kind::Invalid);
}

#[test]
fn a_server_that_sends_byte_by_byte_does_not_prolong_the_handshake() {
    let (client, mut server) = UnixStream::pair().unwrap();
    let dripping = thread::spawn(move || {
        for byte in greeting() {
            if server.write_all(&[byte]).is_err() {
                return;
            }
            thread::sleep(Duration::from_millis(50));
        }
    });
    let start = Instant::now();
    let outcome = shake_hands(&client, "x", start + SOON);
    assert_eq!(outcome.unwrap_err().kind(), Kind::Unavailable);
    assert!(start.elapsed() < SOON * 4, "{:?}", start.elapsed());
    drop(client);
    dripping.join().unwrap();
}
