//! TLS for clients that come over TCP: who may connect, and what carries their bytes to a session.
//!
//! ```text
//! client <== TLS over TCP ==> carry <-- a pair of sockets --> session, on a ring
//! ```
//!
//! A session serves plain bytes and knows nothing of TLS. Both sides show certificates: a client whose
//! certificate the client CA has not signed, or that has none, does not get as far as the first option.
//!
//! Invariants:
//! - A connection that is cut without TLS's own goodbye never looks like an orderly end of the client's words:
//!   the session's socket is closed, and whatever was half said is not done.
//! - Certificates that were renewed on disk count from the next connection on; if they can't be read, those
//!   that were read last do.

use std::{
    fs, io,
    os::unix::fs::{MetadataExt, PermissionsExt},
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
};

use arc_swap::ArcSwap;
use tokio::{
    io::{AsyncBufReadExt, AsyncRead, AsyncWrite, AsyncWriteExt, BufReader, copy_buf},
    net::{UnixStream, unix::OwnedWriteHalf},
};
use tokio_rustls::{
    TlsAcceptor,
    rustls::{
        RootCertStore, ServerConfig,
        crypto::ring,
        pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
        server::WebPkiClientVerifier,
    },
};

use crate::error::{Context, Error, Kind, Result};

/// Bytes that are carried at a time, each way.
const CARRIED: usize = 64 << 10;

/// The files that TLS needs, all PEM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TlsFiles {
    /// The server's certificate, and those between it and its CA.
    pub certificate: PathBuf,
    /// The key of that certificate; nobody but its owner and group may read it.
    pub key: PathBuf,
    /// The CA, or several, one of which must have signed a client's certificate.
    pub client_ca: PathBuf,
}

/// What is needed to take TLS clients.
pub struct Tls {
    files: TlsFiles,
    /// When those were changed that were read last.
    stamp: Mutex<Stamp>,
    config: ArcSwap<ServerConfig>,
}

/// When the files were changed, and which they are.
type Stamp = [(u64, i64, i64); 3];

impl Tls {
    /// Reads the files.
    ///
    /// # Errors
    /// `Invalid` for what is in them, `Permission` for a key that others may read.
    pub fn load(files: TlsFiles) -> Result<Tls> {
        let stamp = stamp(&files)?;
        let config = ArcSwap::new(read(&files)?);
        Ok(Tls { files, stamp: Mutex::new(stamp), config })
    }

    /// What shakes hands with the next client. Reads the files if they have changed; blocks for that, but only
    /// one caller at a time.
    pub fn acceptor(&self) -> TlsAcceptor {
        if let Ok(mut known) = self.stamp.try_lock()
            && let Err(error) = self.renew(&mut known)
        {
            tracing::warn!(%error, "the certificates of before go on");
        }
        TlsAcceptor::from(self.config.load_full())
    }

    fn renew(&self, known: &mut Stamp) -> Result<()> {
        let stamp = stamp(&self.files)?;
        if stamp != *known {
            self.config.store(read(&self.files)?);
            *known = stamp;
            tracing::info!(certificate = %self.files.certificate.display(), "renewed");
        }
        Ok(())
    }
}

/// Carries what client and session say to each other, until all that the session had to say is with the
/// client, or the client is gone.
pub async fn carry(client: impl AsyncRead + AsyncWrite, session: UnixStream) {
    let (from_client, mut to_client) = tokio::io::split(client);
    let (from_session, to_session) = session.into_split();
    let up = listen(from_client, to_session);
    let down = async {
        copy_buf(&mut BufReader::with_capacity(CARRIED, from_session), &mut to_client).await?;
        to_client.shutdown().await
    };
    tokio::pin!(up, down);
    let carried = tokio::select! {
        ended = &mut down => ended,
        // A client that has said all that it had to say may still wait for answers.
        ended = &mut up => match ended {
            Ok(()) => down.await,
            Err(error) => Err(error),
        },
    };
    if let Err(error) = carried {
        tracing::debug!(%error, "NBD client's TLS connection");
    }
}

/// Hands on what the client says, to its end. A session that takes nothing any more may still have answers to
/// give: what the client says then is heard by nobody.
///
/// # Errors
/// Those of the client's side: it is gone.
async fn listen(client: impl AsyncRead + Unpin, mut session: OwnedWriteHalf) -> io::Result<()> {
    let mut client = BufReader::with_capacity(CARRIED, client);
    let mut listens = true;
    loop {
        let said = client.fill_buf().await?;
        if said.is_empty() {
            break;
        }
        let len = said.len();
        listens = listens && session.write_all(said).await.is_ok();
        client.consume(len);
    }
    if listens {
        // One that has ended by itself is what is wanted.
        let _ = session.shutdown().await;
    }
    Ok(())
}

fn stamp(files: &TlsFiles) -> Result<Stamp> {
    let mut stamp = Stamp::default();
    for (path, stamp) in [&files.certificate, &files.key, &files.client_ca].iter().zip(&mut stamp) {
        let found = fs::metadata(path).context(|| shown(path))?;
        *stamp = (found.ino(), found.mtime(), found.mtime_nsec());
    }
    Ok(stamp)
}

fn read(files: &TlsFiles) -> Result<Arc<ServerConfig>> {
    let chain = certificates(&files.certificate)?;
    let mode = fs::metadata(&files.key).context(|| shown(&files.key))?.permissions().mode();
    if mode & 0o007 != 0 {
        let what = format!("{}: others may use it: `chmod o= ` it", shown(&files.key));
        return Err(Error::new(Kind::Permission, what));
    }
    let key = PrivateKeyDer::from_pem_file(&files.key).map_err(|error| bad(&files.key, error))?;
    let mut roots = RootCertStore::empty();
    for root in certificates(&files.client_ca)? {
        roots.add(root).map_err(|error| bad(&files.client_ca, error))?;
    }
    let provider = Arc::new(ring::default_provider());
    let verifier = WebPkiClientVerifier::builder_with_provider(roots.into(), provider.clone());
    let verifier = verifier.build().map_err(|error| bad(&files.client_ca, error))?;
    let config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|error| bad(&files.certificate, error))?
        .with_client_cert_verifier(verifier)
        .with_single_cert(chain, key)
        .map_err(|error| bad(&files.certificate, error))?;
    Ok(Arc::new(config))
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>> {
    let all = CertificateDer::pem_file_iter(path).and_then(Iterator::collect);
    let all: Vec<_> = all.map_err(|error| bad(path, error))?;
    match all.is_empty() {
        true => Err(bad(path, "there is no certificate in it")),
        false => Ok(all),
    }
}

fn bad(path: &Path, why: impl std::fmt::Display) -> Error {
    Error::new(Kind::Invalid, format!("{}: {why}", shown(path)))
}

fn shown(path: &Path) -> String {
    format!("TLS file {}", path.display())
}
