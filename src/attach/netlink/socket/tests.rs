//! Invariants checked, with this machine's kernel: an answer belongs to its request; a family that
//! is not there is told from an error; no other process is listened to; waits end.

use nix::sys::socket::getsockname;

use super::*;

const LIMIT: Duration = Duration::from_secs(5);

/// A socket; `None` where the tests run without generic netlink, which is said aloud.
fn opened() -> Option<Socket> {
    match Socket::open(LIMIT) {
        Ok(socket) => Some(socket),
        Err(error) => {
            assert!(matches!(error.kind(), Kind::Unsupported | Kind::Permission), "{error}");
            println!("SKIPPED: {error}");
            None
        }
    }
}

#[test]
fn families_are_asked_for_by_name() {
    let Some(mut socket) = opened() else { return };
    let control = socket.family("nlctrl").unwrap().expect("the family of families");
    assert_eq!(control, CONTROL);
    assert_eq!(socket.family("underlay-none").unwrap(), None);
    assert_eq!(socket.family("nlctrl").unwrap(), Some(control), "answers are not mixed up");
}

#[test]
fn refusals_carry_their_reason() {
    let Some(mut socket) = opened() else { return };
    let unknown = socket.request(Message::new(CONTROL, 250, CONTROL_VERSION), |_, _| Ok(()));
    let Err(Failure::Refused(refused)) = unknown else { panic!("{unknown:?}") };
    assert_eq!(refused.errno, Errno::EOPNOTSUPP);
}

#[test]
fn an_answer_given_up_is_not_taken_for_the_next() {
    let Some(mut socket) = opened() else { return };
    // Sent, and its answer left in the socket.
    let question = Message::new(CONTROL, GET_FAMILY, CONTROL_VERSION).string(FAMILY_NAME, "nlctrl");
    socket.send(&question.seal(77)).unwrap();
    assert_eq!(socket.family("underlay-none").unwrap(), None);
}

#[test]
fn waiting_for_news_ends() {
    let Some(mut socket) = opened() else { return };
    let start = Instant::now();
    assert_eq!(socket.receive(Duration::from_millis(50)).unwrap(), Heard::Nothing);
    assert_eq!(socket.receive(Duration::ZERO).unwrap(), Heard::Nothing);
    assert!(start.elapsed() < LIMIT);
}

#[test]
fn other_processes_are_not_listened_to() {
    let (Some(mut socket), Some(other)) = (opened(), opened()) else { return };
    let address: NetlinkAddr = getsockname(socket.descriptor.as_raw_fd()).unwrap();
    let forged = Message::new(CONTROL, 1, 2).seal(1);
    let parts = [IoSlice::new(&forged)];
    let none = MsgFlags::empty();
    match sendmsg(other.descriptor.as_raw_fd(), &parts, &[], none, Some(&address)) {
        Ok(_) => assert_eq!(socket.receive(Duration::from_millis(50)).unwrap(), Heard::Nothing),
        // The kernel keeps unprivileged processes from trying.
        Err(errno) => assert_eq!(errno, Errno::EPERM),
    }
}
