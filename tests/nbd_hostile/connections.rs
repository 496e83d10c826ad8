//! Connections that break, stall, or outlive the daemon.

use std::{
    io::{Read, Write},
    net::Shutdown,
    os::unix::net::UnixStream,
    time::Duration,
};

use nix::sys::resource::{Resource, getrlimit, setrlimit};

use crate::{
    IMAGE, Target,
    daemon::Daemon,
    nbd::{Client, DISC, FUA, PATIENCE, READ, Replies, TRIM, WRITE, handshake, request},
    replies_to_reads, wait_until,
};

#[test]
fn half_closed_connections_are_answered_and_closed() {
    let target = Target::new();
    // Nothing more comes from the client: what it asked for is still answered, or not, but no hang.
    for count in [1, 10, 100] {
        let mut client = target.writer();
        for index in 0..count {
            client.send(&request(0, READ, index, index * 4096, 4096));
        }
        client.stream.shutdown(Shutdown::Write).unwrap();
        let bytes = client.rest();
        assert!(bytes.len() as u64 <= count * (4096 + 64));
    }
    // The client can't be answered any more: no SIGPIPE, no endless retry.
    for count in [1, 100] {
        let mut client = target.writer();
        client.stream.shutdown(Shutdown::Read).unwrap();
        for index in 0..count {
            client.try_send(&request(0, READ, index, 0, 65536));
        }
    }
    target.serves();
}

#[test]
fn disconnect_finishes_what_is_under_way() {
    let target = Target::new();
    let mut client = target.writer();
    let count = 64;
    for index in 0..count {
        client.send(&request(0, READ, index, index * 512, 4096));
    }
    client.send(&request(0, DISC, 99, 0, 0));
    let cookies = replies_to_reads(&mut client, count as usize, |cookie| (cookie * 512, 4096));
    assert_eq!(cookies.len(), count as usize);
    assert_eq!(client.rest(), b"");
    target.serves();
}

#[test]
fn replies_that_nobody_reads_cost_little() {
    let target = Target::new();
    target.serves();
    let before = target.daemon.as_ref().map(|daemon| (daemon.memory(), daemon.files()));
    let mut greedy: Vec<_> = (0..8).map(|_| target.writer()).collect();
    for client in &mut greedy {
        // The server may stop reading before it has taken them all: that is its right.
        client.stream.set_write_timeout(Some(Duration::from_millis(500))).unwrap();
        for index in 0..400 {
            let at = (index % 7) << 20;
            if client.stream.write_all(&request(0, READ, index, at, 1 << 20)).is_err() {
                break;
            }
        }
    }
    target.serves();
    if let (Some(daemon), Some((memory, _))) = (&target.daemon, before) {
        let grown = daemon.memory().saturating_sub(memory);
        assert!(grown < 384 << 20, "{} MiB for 3200 MiB of replies", grown >> 20);
    }
    drop(greedy);
    target.serves();
    if let (Some(daemon), Some((_, files))) = (&target.daemon, before) {
        wait_until("connections that are gone stay open", || daemon.files() <= files + 2);
    }
}

#[test]
fn clients_that_vanish_leave_nothing_behind() {
    let target = Target::new();
    target.serves();
    let before = target.daemon.as_ref().map(Daemon::files);
    for round in 0..400 {
        let mut client = target.connect();
        match round % 4 {
            0 => (),
            1 => client.send(&handshake(&target.writable)[..round % 100]),
            2 => client.send(&handshake(&target.writable)),
            _ => {
                client.send(&handshake(&target.writable));
                client.try_send(&request(0, READ, 1, 0, 1 << 20));
            }
        }
    }
    target.serves();
    if let (Some(daemon), Some(files)) = (&target.daemon, before) {
        wait_until("connections that are gone stay open", || daemon.files() <= files + 2);
    }
}

#[test]
fn writes_cut_short_are_not_applied_and_whole_ones_are_whole() {
    let target = Target::new();
    let mut random = fastrand::Rng::with_seed(7);
    for round in 0..30_u8 {
        // One write comes whole, and then one that breaks off somewhere. Each round has its own
        // place: what a client left behind without an answer may still be under way.
        let at = IMAGE + (u64::from(round) << 18);
        let mut client = target.writer();
        let stop = random.usize(..65536);
        client.send(&request(0, WRITE, 1, at, 65536));
        client.send(&[round + 1; 65536]);
        client.send(&request(0, WRITE, 2, at + 65536, 65536));
        client.send(&vec![0xee; stop]);
        if round % 2 == 0 {
            assert_eq!(client.done_reply(1), Ok(()));
        }
        drop(client);
        let mut client = target.writer();
        let data = client.read(at, 2 << 16).unwrap();
        let (first, second) = data.split_at(65536);
        assert!(second.iter().all(|byte| *byte == 0), "round {round}: {stop} bytes of a write");
        if round % 2 == 0 {
            assert!(first.iter().all(|byte| *byte == round + 1));
        }
    }
    // Many at once, and gone before any answer: each sector is all old or all new.
    let at = 2 * IMAGE;
    let mut client = target.writer();
    for index in 0..200 {
        client.send(&request(0, WRITE, index, at + (index << 12), 4096));
        client.send(&[0xcc; 4096]);
    }
    drop(client);
    target.serves();
    let mut client = target.writer();
    let data = client.read(at, 200 << 12).unwrap();
    assert!(data.chunks(512).all(|sector| sector.iter().all(|byte| *byte == sector[0])));
    client.close();
}

#[test]
fn connections_see_one_device() {
    let target = Target::new();
    let mut clients: Vec<_> = (0..4).map(|_| target.writer()).collect();
    assert_eq!(clients[0].flags >> 8 & 1, 1, "CAN_MULTI_CONN");
    for round in 0..40_u8 {
        let (writer, reader) = (usize::from(round % 4), usize::from((round + 1) % 4));
        assert_eq!(clients[writer].write(0, 777, &[round; 5000]), Ok(()));
        assert_eq!(clients[reader].read(777, 5000).unwrap(), [round; 5000]);
        assert_eq!(clients[reader].flush(), Ok(()));
    }
}

#[test]
fn clients_that_stay_do_not_hold_up_the_end() {
    let mut target = Target::new();
    let Some(mut daemon) = target.daemon.take() else { return };
    let silent: Vec<_> = (0..20).map(|_| target.connect()).collect();
    let mut idle = target.writer();
    assert_eq!(idle.write(0, 4096, b"kept"), Ok(()));
    let mut greedy = target.writer();
    for index in 0..100 {
        greedy.try_send(&request(0, READ, index, 0, 1 << 20));
    }
    let took = daemon.terminate();
    assert!(took < Duration::from_secs(15), "{took:?}");
    drop((silent, idle, greedy));
    daemon.spawn();
    let mut client = target.writer();
    assert_eq!(client.read(4096, 4).unwrap(), b"kept");
    client.close();
}

#[test]
fn clients_that_are_in_go_on_while_others_wait_for_a_place() {
    /// Connections that are served at once.
    const PLACES: usize = 1024;
    let target = Target::new();
    let Some(daemon) = &target.daemon else { return };
    let (_, most) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    setrlimit(Resource::RLIMIT_NOFILE, most, most).unwrap();
    let mut first = target.writer();
    assert_eq!(first.write(0, IMAGE + 4096, b"first"), Ok(()));
    let files = daemon.files();
    let mut idle: Vec<_> = (1..PLACES).map(|_| target.writer()).collect();
    // There is no place left: the kernel holds whoever comes now, unanswered.
    let mut late = UnixStream::connect(&target.socket).unwrap();
    late.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
    let mut greeting = [0; 18];
    assert!(late.read_exact(&mut greeting).is_err(), "a place too many");
    for (index, client) in idle.iter_mut().enumerate().step_by(101) {
        assert_eq!(client.write(0, IMAGE + (1 << 20) + index as u64 * 512, &[7; 512]), Ok(()));
    }
    assert_eq!(first.read(IMAGE + 4096, 5).unwrap(), b"first");
    let memory = daemon.memory();
    assert!(memory < 512 << 20, "{} MiB for idle clients", memory >> 20);
    // The first who goes makes room.
    idle.pop();
    late.set_read_timeout(Some(PATIENCE)).unwrap();
    late.read_exact(&mut greeting).unwrap();
    assert_eq!(&greeting[..8], b"NBDMAGIC");
    drop((idle, late));
    wait_until("connections that are gone stay open", || daemon.files() <= files + 2);
    assert_eq!(first.flush(), Ok(()));
    target.serves();
}

#[test]
fn a_replica_goes_and_grows_beneath_clients_that_vanish() {
    let target = Target::new();
    let Some(daemon) = &target.daemon else { return };
    let files = daemon.files();
    for round in 0..12_u64 {
        daemon.replica("brief", "base", "16M");
        let mut client = Client::open(&target.socket, "replica/brief", Replies::Structured);
        // It reads no reply, so that at last the server takes no more.
        client.stream.set_write_timeout(Some(Duration::from_millis(100))).unwrap();
        for index in 0..100 {
            let mut asked = request(0, WRITE, index, index << 16, 65536);
            asked.extend([round as u8; 65536]);
            asked.extend(request(FUA, TRIM, index, index << 16, 4096));
            asked.extend(request(0, READ, index, 0, 1 << 18));
            if client.stream.write_all(&asked).is_err() {
                break;
            }
        }
        if round % 2 == 0 {
            daemon.run(&["replica", "resize", "brief", &format!("{}M", 32 + round)]);
        }
        drop(client);
        // It is in use until the last of its requests has ended, and that is soon.
        wait_until("a replica stays in use", || daemon.does(&["replica", "rm", "brief"]));
    }
    wait_until("files of removed replicas stay open", || daemon.files() <= files + 2);
    target.serves();
}
