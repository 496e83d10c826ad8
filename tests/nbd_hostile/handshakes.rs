//! Clients that stall, lie or hurry in the handshake.

use std::{
    io::ErrorKind, io::Read, io::Write, net::Shutdown, os::unix::net::UnixStream, time::Duration,
};

use nix::sys::resource::{Resource, getrlimit, setrlimit};

use crate::{
    Target, content,
    nbd::{
        Client, EINVAL, PATIENCE, READ, Replies, go, handshake, option, request, set_allocation,
    },
    replies_to_reads, wait_until,
};

#[test]
fn handshakes_that_stall_anywhere_hold_nobody_up() {
    let target = Target::new();
    let all = handshake(&target.writable);
    let mut stalled: Vec<_> = (0..=all.len())
        .map(|stop| {
            let mut client = target.connect();
            client.send(&all[..stop]);
            (client, stop)
        })
        .collect();
    target.serves();
    // Every second one finds its way on, byte by byte; the others vanish.
    let mut index = 0;
    stalled.retain(|_| {
        index += 1;
        index % 2 == 0
    });
    for (client, stop) in &mut stalled {
        for byte in &all[*stop..] {
            client.send(&[*byte]);
        }
        assert_eq!(client.option_reply(), (8, 1, vec![]));
        assert_eq!(client.option_reply().1, 4);
        assert_eq!(client.option_reply(), (10, 1, vec![]));
        client.take_go();
        client.replies = Replies::Structured;
        assert_eq!(client.read(8192, 512).unwrap(), content()[8192..8704]);
    }
    target.serves();
}

#[test]
fn clients_that_never_negotiate_lose_their_places() {
    let target = Target::new();
    target.serves();
    let (_, most) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    setrlimit(Resource::RLIMIT_NOFILE, most, most).unwrap();
    // More than the server takes at once, at three places of the handshake, and one honest client
    // behind them all.
    let all = handshake(&target.writable);
    let silent: Vec<_> = (0..1100)
        .map(|index| {
            let mut stream = UnixStream::connect(&target.socket).unwrap();
            stream.write_all(&all[..[0, 10, 20][index % 3]]).unwrap();
            stream
        })
        .collect();
    if let Some(daemon) = &target.daemon {
        daemon.run(&["status"]);
        daemon.replica("more", "base", "16M");
    }
    target.serves();
    if let Some(daemon) = &target.daemon {
        let mut client = Client::open(&target.socket, "replica/more", Replies::Simple);
        assert_eq!(client.read(0, 512).unwrap(), content()[..512]);
        client.close();
        wait_until("silent clients keep their places", || daemon.files() < 100);
    }
    for mut stream in silent {
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut bytes = vec![];
        let ended = stream.read_to_end(&mut bytes);
        assert!(
            ended.is_ok() || ended.is_err_and(|error| error.kind() == ErrorKind::ConnectionReset)
        );
    }
}

#[test]
fn handshakes_make_sense_or_end() {
    let target = Target::new();
    let long = |number: u32, len: u32| {
        let mut bytes = option(number, b"");
        let at = bytes.len() - 4;
        bytes[at..].copy_from_slice(&len.to_be_bytes());
        bytes
    };
    for number in [1, 3, 6, 7, 8, 9, 10, 99] {
        for len in [1 << 24, 1 << 31, u32::MAX - 15, u32::MAX] {
            let mut client = target.connect();
            client.send(&[0, 0, 0, 3]);
            client.send(&long(number, len));
            let rest = client.rest();
            assert!(rest.len() < 1000, "option {number} of {len} bytes: {} bytes", rest.len());
        }
    }
    // A name longer than its option, and more queries than there are bytes.
    for (number, data) in [(7, &b"\xff\xff\xff\xffname\0\0"[..]), (6, b"\0\0\x10\x01name\0\0")] {
        let mut client = target.connect();
        client.send(&[&[0, 0, 0, 3][..], &option(number, data), &option(2, b"")].concat());
        assert_eq!(client.option_reply().1, (1 << 31) + 3);
        assert_eq!(client.option_reply(), (2, 1, vec![]));
        client.rest();
    }
    for bytes in [&[0xff; 4][..], &[0; 20], b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", &[0, 0, 0, 3, 7]]
    {
        let mut client = target.connect();
        client.send(bytes);
        client.stream.shutdown(Shutdown::Write).unwrap();
        client.rest();
    }
    // Contexts without structured replies: refused, and BLOCK_STATUS as well.
    let mut client = target.connect();
    client.send(&[&[0, 0, 0, 3][..], &set_allocation(&target.writable)].concat());
    assert_eq!(client.option_reply().1, (1 << 31) + 3);
    client.send(&go(&target.writable));
    client.take_go();
    assert_eq!(client.status(0, 0, 4096), Err(EINVAL));
    target.serves();
}

#[test]
fn requests_may_follow_the_last_option_at_once() {
    let target = Target::new();
    let mut all = handshake(&target.writable);
    for index in 0..3 {
        all.extend(request(0, READ, index, 4096 * index, 4096));
    }
    for cut in [all.len(), all.len() - 84, all.len() - 60, 10] {
        let mut client = target.connect();
        client.send(&all[..cut]);
        std::thread::sleep(Duration::from_millis(20));
        client.send(&all[cut..]);
        for _ in 0..3 {
            client.option_reply();
        }
        client.take_go();
        client.replies = Replies::Structured;
        let cookies = replies_to_reads(&mut client, 3, |cookie| (cookie * 4096, 4096));
        assert_eq!(cookies.len(), 3);
    }
}
