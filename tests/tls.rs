//! Invariants checked: over TCP nothing is served before TLS, and nobody without a certificate of the client CA
//! gets through it; what a client reads and writes through it is what it reads and writes without; a connection
//! that is cut, or says something in the clear where it must not, does no harm; renewed certificates count.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{
    fs,
    io::{Read, Write},
    net::{Shutdown, TcpStream},
    os::unix::fs::PermissionsExt,
    path::Path,
    sync::Arc,
};

#[path = "support/nbd.rs"]
mod nbd;
#[path = "support/node.rs"]
mod node;

use nbd::{PATIENCE, READ, WRITE, go, option, request};
use nix::sys::signal::Signal;
use node::{Daemon, until};
use rcgen::{
    BasicConstraints, CertificateParams, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    date_time_ymd,
};
use tokio_rustls::rustls::{
    ClientConfig, ClientConnection, RootCertStore, StreamOwned,
    crypto::ring,
    pki_types::{CertificateDer, PrivateKeyDer, ServerName, pem::PemObject},
};

const SIZE: usize = 1 << 20;

/// A CA, and whom it has signed.
struct Authority {
    pem: String,
    issuer: Issuer<'static, KeyPair>,
}

/// A certificate and its key, PEM.
#[derive(Clone)]
struct Identity {
    certificate: String,
    key: String,
}

impl Authority {
    fn new() -> Authority {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(vec![]).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let pem = params.self_signed(&key).unwrap().pem();
        Authority { pem, issuer: Issuer::new(params, key) }
    }

    fn signs(&self, name: &str, usage: ExtendedKeyUsagePurpose, year: i32) -> Identity {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(vec![name.to_owned()]).unwrap();
        params.extended_key_usages = vec![usage];
        params.not_after = date_time_ymd(year, 1, 1);
        let certificate = params.signed_by(&key, &self.issuer).unwrap().pem();
        Identity { certificate, key: key.serialize_pem() }
    }

    fn server(&self) -> Identity {
        self.signs("localhost", ExtendedKeyUsagePurpose::ServerAuth, 2999)
    }

    fn client(&self) -> Identity {
        self.signs("client", ExtendedKeyUsagePurpose::ClientAuth, 2999)
    }
}

/// Puts the server's files where its configuration says.
fn install(dir: &Path, server: &Identity, ca: &Authority) {
    let write = |name: &str, text: &str| {
        // As a whole: they are read while they are renewed.
        let (new, place) = (dir.join("new"), dir.join(name));
        fs::write(&new, text).unwrap();
        fs::set_permissions(&new, fs::Permissions::from_mode(0o600)).unwrap();
        fs::rename(new, place).unwrap();
    };
    write("cert.pem", &server.certificate);
    write("key.pem", &server.key);
    write("ca.pem", &ca.pem);
}

/// A daemon that serves TLS, with an image `base` and a replica `vm`.
fn start(server: &Identity, ca: &Authority) -> (Daemon, Vec<u8>) {
    let mut daemon = Daemon::with_disks();
    let content: Vec<u8> = (0..SIZE).map(|at| (at / 5) as u8).collect();
    daemon.import("base", &content);
    daemon.ok(&["replica", "create", "vm", "--image", "base", "--disk", "b"]);
    install(daemon.dir.path(), server, ca);
    let file = |name| daemon.path(name).display().to_string();
    let files = ["cert.pem", "key.pem", "ca.pem"].map(file);
    let config = format!(
        "nbd_listen = \"127.0.0.1:0\"\nnbd_certificate = {:?}\nnbd_key = {:?}\nnbd_client_ca = {:?}\n",
        files[0], files[1], files[2]
    );
    daemon.configure(&config);
    daemon.stop();
    daemon.restart();
    (daemon, content)
}

fn dial(daemon: &Daemon) -> TcpStream {
    let address = daemon.json(&["status"])["daemon"]["nbd_address"].as_str().unwrap().to_owned();
    let stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream
}

/// Reads a reply to an option: its type and data.
fn reply(stream: &mut impl Read) -> std::io::Result<(u32, Vec<u8>)> {
    let mut head = [0; 20];
    stream.read_exact(&mut head)?;
    let word = |at: usize| u32::from_be_bytes(head[at..at + 4].try_into().unwrap());
    let mut data = vec![0; word(16) as usize];
    stream.read_exact(&mut data)?;
    Ok((word(12), data))
}

/// A connection that has said that it wants TLS.
fn willing(daemon: &Daemon) -> TcpStream {
    let mut stream = dial(daemon);
    stream.read_exact(&mut [0; 18]).unwrap();
    stream.write_all(&[vec![0, 0, 0, 3], option(5, b"")].concat()).unwrap();
    assert_eq!(reply(&mut stream).unwrap(), (1, vec![]));
    stream
}

type Secured = StreamOwned<ClientConnection, TcpStream>;

/// Puts TLS over a connection; whether it holds is seen when it is used.
fn secured(stream: TcpStream, ca: &Authority, identity: Option<&Identity>) -> Secured {
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_slice(ca.pem.as_bytes()).unwrap()).unwrap();
    let config = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots);
    let config = match identity {
        None => config.with_no_client_auth(),
        Some(identity) => {
            let chain = CertificateDer::from_pem_slice(identity.certificate.as_bytes()).unwrap();
            let key = PrivateKeyDer::from_pem_slice(identity.key.as_bytes()).unwrap();
            config.with_client_auth_cert(vec![chain], key).unwrap()
        }
    };
    let name = ServerName::try_from("localhost").unwrap();
    StreamOwned::new(ClientConnection::new(Arc::new(config), name).unwrap(), stream)
}

/// Chooses an export; what is said next are requests.
fn choose(stream: &mut (impl Read + Write), export: &str) -> std::io::Result<()> {
    stream.write_all(&go(export))?;
    while reply(stream)?.0 != 1 {}
    Ok(())
}

fn connect(daemon: &Daemon, ca: &Authority, identity: &Identity, export: &str) -> Secured {
    let mut stream = secured(willing(daemon), ca, Some(identity));
    choose(&mut stream, export).unwrap();
    stream
}

/// The error of a simple reply.
fn answer(stream: &mut impl Read) -> u32 {
    let mut head = [0; 16];
    stream.read_exact(&mut head).unwrap();
    u32::from_be_bytes(head[4..8].try_into().unwrap())
}

fn read(stream: &mut (impl Read + Write), offset: usize, len: usize) -> Vec<u8> {
    stream.write_all(&request(0, READ, 7, offset as u64, len as u32)).unwrap();
    assert_eq!(answer(stream), 0);
    let mut bytes = vec![0; len];
    stream.read_exact(&mut bytes).unwrap();
    bytes
}

#[test]
fn what_is_read_and_written_is_the_same_by_tls() {
    let ca = Authority::new();
    let (mut daemon, mut content) = start(&ca.server(), &ca);
    let client = ca.client();
    let mut stream = connect(&daemon, &ca, &client, "replica/vm");
    assert_eq!(read(&mut stream, 0, SIZE), content);
    let shown = daemon.json(&["replica", "inspect", "vm"])["clients"].to_string();
    assert!(shown.contains("127.0.0.1:") && shown.contains("(TLS)"), "{shown}");
    assert!(daemon.ok(&["status"]).contains("127.0.0.1:"));

    // Many requests at once, answered in any order; each writes its own place.
    let mut said = Vec::new();
    for at in 0..64_usize {
        let bytes = vec![at as u8 ^ 0x5a; 4096];
        content[at * 8192..at * 8192 + 4096].copy_from_slice(&bytes);
        said.extend(request(0, WRITE, at as u64, at as u64 * 8192, 4096));
        said.extend(bytes);
    }
    stream.write_all(&said).unwrap();
    (0..64).for_each(|_| assert_eq!(answer(&mut stream), 0));
    assert_eq!(read(&mut stream, 0, SIZE), content);

    // Who has said its last may still wait for the answer.
    let mut last = connect(&daemon, &ca, &client, "replica/vm");
    last.write_all(&request(0, READ, 1, 4096, 4096)).unwrap();
    last.conn.send_close_notify();
    last.flush().unwrap();
    last.sock.shutdown(Shutdown::Write).unwrap();
    assert_eq!(answer(&mut last), 0);
    let mut rest = Vec::new();
    last.read_to_end(&mut rest).unwrap();
    assert_eq!(rest, content[4096..8192]);

    // At the daemon's end what is under way is answered, whatever is said meanwhile; then TLS says goodbye.
    let many: Vec<u8> = (0..64).flat_map(|at| request(0, READ, at, at * 4096, 4096)).collect();
    stream.write_all(&many).unwrap();
    assert_eq!(answer(&mut stream), 0);
    stream.read_exact(&mut [0; 4096]).unwrap();
    daemon.signal(Signal::SIGTERM);
    let mut answered = 1;
    let ended = loop {
        // It may be gone already.
        let _ = stream.write_all(&request(0, READ, 99, 0, 4096)).and_then(|()| stream.flush());
        let mut reply = [0; 16 + 4096];
        match stream.read_exact(&mut reply) {
            Ok(()) => answered += 1,
            Err(error) => break error,
        }
    };
    assert!(answered >= 64, "{answered} were answered, then {ended}");
    assert_eq!(daemon.ended(), Some(0));
}

#[test]
fn nobody_without_a_certificate_of_the_ca_gets_in() {
    let (ca, other) = (Authority::new(), Authority::new());
    let (daemon, content) = start(&ca.server(), &ca);
    let strangers = [
        None,
        Some(other.client()),
        Some(ca.signs("client", ExtendedKeyUsagePurpose::ClientAuth, 2020)),
        Some(ca.signs("client", ExtendedKeyUsagePurpose::ServerAuth, 2999)),
    ];
    for (at, stranger) in strangers.iter().enumerate() {
        let mut stream = secured(willing(&daemon), &ca, stranger.as_ref());
        assert!(choose(&mut stream, "image/base").is_err(), "stranger {at}");
    }
    // Nor without TLS, whatever is said.
    let mut stream = dial(&daemon);
    stream.read_exact(&mut [0; 18]).unwrap();
    stream.write_all(&[vec![0, 0, 0, 3], option(3, b""), go("image/base")].concat()).unwrap();
    for _ in 0..2 {
        assert_eq!(reply(&mut stream).unwrap().0, (1 << 31) + 5);
    }
    // An export that is named the old way gets no answer at all.
    stream.write_all(&option(1, b"image/base")).unwrap();
    assert_eq!(stream.read(&mut [0; 1]).unwrap(), 0);
    let client = ca.client();
    assert_eq!(read(&mut connect(&daemon, &ca, &client, "image/base"), 0, SIZE), content);
}

#[test]
fn what_is_said_in_the_clear_is_never_taken_for_secret() {
    let ca = Authority::new();
    let (daemon, _) = start(&ca.server(), &ca);
    let mut stream = dial(&daemon);
    stream.read_exact(&mut [0; 18]).unwrap();
    // An option behind STARTTLS, as somebody on the way would put it there.
    let words = [vec![0, 0, 0, 3], option(5, b""), go("image/base")].concat();
    stream.write_all(&words).unwrap();
    let mut rest = Vec::new();
    // It may be reset, with what was not read.
    let _ = stream.read_to_end(&mut rest);
    assert!(rest.len() <= 20, "{rest:?}");
    until("a word of it", || daemon.log().contains("in the clear behind STARTTLS"));

    // What is no TLS behind it ends the connection, too.
    let mut stream = willing(&daemon);
    stream.write_all(&go("image/base")).unwrap();
    let mut rest = Vec::new();
    let _ = stream.read_to_end(&mut rest);
    assert!(!rest.windows(8).any(|it| it == [0, 3, 0xe8, 0x89, 4, 0x55, 0x65, 0xa9]), "{rest:?}");
}

#[test]
fn a_connection_that_is_cut_does_no_harm() {
    let ca = Authority::new();
    let (daemon, content) = start(&ca.server(), &ca);
    let client = ca.client();
    let files = || fs::read_dir(format!("/proc/{}/fd", daemon.pid())).unwrap().count();
    drop(connect(&daemon, &ca, &client, "replica/vm"));
    until("an end", || {
        daemon.json(&["replica", "inspect", "vm"])["clients"] == serde_json::json!([])
    });
    let before = files();
    for round in 0..20 {
        let mut stream = connect(&daemon, &ca, &client, "replica/vm");
        // Half of a request, and no goodbye.
        let said = request(0, WRITE, 1, 0, 4096);
        stream.write_all(&[&said[..], &[0xff; 1000]].concat()).unwrap();
        stream.flush().unwrap();
        match round % 2 {
            0 => stream.sock.shutdown(Shutdown::Both).unwrap(),
            _ => drop(stream),
        }
    }
    until("an end", || {
        daemon.json(&["replica", "inspect", "vm"])["clients"] == serde_json::json!([])
    });
    until("as few files", || files() <= before);
    let mut stream = connect(&daemon, &ca, &client, "replica/vm");
    assert_eq!(read(&mut stream, 0, SIZE), content, "nothing was written by halves");
}

#[test]
fn renewed_certificates_count_from_the_next_connection_on() {
    let (old, new) = (Authority::new(), Authority::new());
    let (daemon, content) = start(&old.server(), &old);
    let mut early = connect(&daemon, &old, &old.client(), "image/base");
    install(daemon.dir.path(), &new.server(), &new);
    let mut late = connect(&daemon, &new, &new.client(), "image/base");
    assert_eq!(read(&mut late, 0, SIZE), content);
    assert_eq!(read(&mut early, 0, SIZE), content, "who is in stays in");
    let mut stream = secured(willing(&daemon), &new, Some(&old.client()));
    assert!(choose(&mut stream, "image/base").is_err());
    // What can't be read changes nothing.
    fs::write(daemon.path("cert.pem"), "no certificate").unwrap();
    connect(&daemon, &new, &new.client(), "image/base");
    assert!(daemon.log().contains("the certificates of before go on"));
}

#[test]
fn what_is_wrong_with_the_files_is_told_at_the_start() {
    let ca = Authority::new();
    let (mut daemon, _) = start(&ca.server(), &ca);
    daemon.stop();
    let refused = |daemon: &Daemon, told: &str| {
        let output = daemon.command().output().unwrap();
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success() && text.contains(told), "{told}: {text}");
    };
    let key = daemon.path("key.pem");
    fs::set_permissions(&key, fs::Permissions::from_mode(0o644)).unwrap();
    refused(&daemon, "others may use it");
    fs::set_permissions(&key, fs::Permissions::from_mode(0o600)).unwrap();
    fs::write(&key, ca.server().key).unwrap();
    refused(&daemon, "cert.pem");
    fs::remove_file(&key).unwrap();
    refused(&daemon, "key.pem");
    install(daemon.dir.path(), &ca.server(), &ca);
    fs::write(daemon.path("ca.pem"), "").unwrap();
    refused(&daemon, "ca.pem");
}

#[test]
fn without_tls_it_has_to_be_said_in_so_many_words() {
    let mut daemon = Daemon::with_disks();
    let content = vec![7; SIZE];
    daemon.import("base", &content);
    daemon.stop();
    daemon.configure("nbd_listen = \"127.0.0.1:0\"\n");
    let output = daemon.command().output().unwrap();
    assert!(String::from_utf8_lossy(&output.stderr).contains("nbd_insecure"), "{output:?}");
    daemon.configure("nbd_listen = \"127.0.0.1:0\"\nnbd_insecure = true\n");
    daemon.restart();
    let mut stream = dial(&daemon);
    stream.read_exact(&mut [0; 18]).unwrap();
    stream.write_all(&[0, 0, 0, 3]).unwrap();
    choose(&mut stream, "image/base").unwrap();
    assert_eq!(read(&mut stream, 0, SIZE), content);
}
