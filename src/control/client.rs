//! The client of the control API: HTTP over the service's Unix socket.
//!
//! Errors that the service answers with come back as what they were: same kind, same words. One
//! connection serves one request.

use std::{io::ErrorKind, path::PathBuf, time::Duration};

use http_body_util::{BodyExt, Either, Full, StreamBody, combinators::BoxBody};
use hyper::{
    Method, Request, Response, StatusCode,
    body::{Bytes, Frame, Incoming},
};
use hyper_util::rt::TokioIo;
use serde::{
    Serialize,
    de::{DeserializeOwned, IgnoredAny},
};
use tokio::{net::UnixStream, sync::mpsc, time::timeout};
use tokio_stream::{StreamExt, wrappers::ReceiverStream};

use crate::{
    control::{
        event::{Event, Progress, Refusal},
        upload,
    },
    error::{Context, Error, Kind, Result},
};

/// Bytes that an answer may have: an inventory of a hundred thousand replicas fits.
const ANSWER_MAX: usize = 256 << 20;
/// Bytes that a line of a streamed answer may have.
const LINE_MAX: usize = 16 << 20;
/// How long an answer may take to begin. Streamed work answers at once and then tells its progress.
const PATIENCE: Duration = Duration::from_secs(120);

type Body = Either<Full<Bytes>, BoxBody<Bytes, std::io::Error>>;

/// Speaks to the service at a socket.
#[derive(Clone, Debug)]
pub struct Client {
    socket: PathBuf,
}

/// Content that is sent as it comes.
pub struct Upload {
    /// Its pieces; it ends when their sender is dropped.
    pub content: mpsc::Receiver<std::io::Result<Vec<u8>>>,
    /// How many bytes there will be, if that is known.
    pub length: Option<u64>,
}

impl Client {
    /// A client of the service whose control socket is `socket`. Connects with each request.
    pub fn new(socket: impl Into<PathBuf>) -> Client {
        Client { socket: socket.into() }
    }

    /// Where the service is looked for.
    pub fn socket(&self) -> &std::path::Path {
        &self.socket
    }

    /// What is at `path`.
    pub async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T> {
        self.answer(self.send(request(Method::GET, path, nothing())?).await?).await
    }

    /// Removes what is at `path`.
    pub async fn delete<T: DeserializeOwned>(&self, path: &str) -> Result<T> {
        self.answer(self.send(request(Method::DELETE, path, nothing())?).await?).await
    }

    /// Does `path` with `body`.
    pub async fn post<T: DeserializeOwned>(&self, path: &str, body: &impl Serialize) -> Result<T> {
        self.answer(self.send(request(Method::POST, path, json(body)?)?).await?).await
    }

    /// Does `path` with `body`, which takes its time and tells its progress.
    pub async fn post_streamed<T: DeserializeOwned>(
        &self,
        path: &str,
        body: &impl Serialize,
        progress: impl FnMut(Progress),
    ) -> Result<T> {
        let response = self.send(request(Method::POST, path, json(body)?)?).await?;
        self.events(response, progress).await
    }

    /// Puts content at `path`. The service answers while it still reads.
    pub async fn upload<T: DeserializeOwned>(
        &self,
        path: &str,
        upload: Upload,
        progress: impl FnMut(Progress),
    ) -> Result<T> {
        let frames = ReceiverStream::new(upload.content)
            .map(|piece| piece.map(|bytes| Frame::data(Bytes::from(bytes))));
        let body = Either::Right(BodyExt::boxed(StreamBody::new(frames)));
        let mut request = request(Method::PUT, path, body)?;
        if let Some(length) = upload.length {
            request.headers_mut().insert("content-length", length.into());
        }
        let response = self.send(request).await?;
        self.events(response, progress).await
    }

    /// What is told at `path` in lines, each to `heard`: until it wants no more, or the daemon stops.
    pub async fn follow<T: DeserializeOwned>(
        &self,
        path: &str,
        mut heard: impl FnMut(T) -> Result<bool>,
    ) -> Result<()> {
        let response = self.send(request(Method::GET, path, nothing())?).await?;
        let hear = |line| Ok((!heard(line)?).then_some(()));
        self.lines(response, hear).await.map(|_| ())
    }

    /// The content at `path`, as it comes: to be read by a thread that may block.
    pub async fn download(&self, path: &str) -> Result<upload::Reader> {
        let response = self.send(request(Method::GET, path, nothing())?).await?;
        if !response.status().is_success() {
            self.answer::<()>(response).await?;
            return Err(self.broken("a refusal without words"));
        }
        Ok(upload::reader(axum::body::Body::new(response.into_body())))
    }

    async fn send(&self, request: Request<Body>) -> Result<Response<Incoming>> {
        let stream =
            UnixStream::connect(&self.socket).await.map_err(|error| self.unreachable(error))?;
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
            .await
            .map_err(|error| self.broken(error))?;
        // Ends when the answer has been read or the sender is dropped.
        tokio::spawn(async move {
            if let Err(error) = connection.await {
                tracing::debug!(%error, "control connection");
            }
        });
        match timeout(PATIENCE, sender.send_request(request)).await {
            Ok(Ok(response)) => Ok(response),
            Ok(Err(error)) => Err(self.broken(error)),
            Err(_) => Err(Error::new(
                Kind::Unavailable,
                format!(
                    "the daemon at {} did not answer in {} s; see its log and `underlay status`",
                    self.socket.display(),
                    PATIENCE.as_secs()
                ),
            )),
        }
    }

    async fn answer<T: DeserializeOwned>(&self, response: Response<Incoming>) -> Result<T> {
        let status = response.status();
        let body = http_body_util::Limited::new(response.into_body(), ANSWER_MAX)
            .collect()
            .await
            .map_err(|error| self.broken(error))?
            .to_bytes();
        if !status.is_success() {
            return Err(refusal(status, &body));
        }
        serde_json::from_slice(&body).map_err(|error| self.broken(error))
    }

    async fn events<T: DeserializeOwned>(
        &self,
        response: Response<Incoming>,
        mut progress: impl FnMut(Progress),
    ) -> Result<T> {
        let hear = |event: Event<T>| match event {
            Event::Progress(at) => {
                progress(at);
                Ok(None)
            }
            Event::Done(result) => Ok(Some(result)),
            Event::Error(error) => Err(error.into()),
        };
        let ended = self.lines(response, hear).await?;
        ended.ok_or_else(|| self.broken("the answer ended early: the daemon was stopped"))
    }

    /// Hands each line of an answer to `hear`, until that has what it wants; `None` if it never has.
    async fn lines<L: DeserializeOwned, T>(
        &self,
        response: Response<Incoming>,
        mut hear: impl FnMut(L) -> Result<Option<T>>,
    ) -> Result<Option<T>> {
        if !response.status().is_success() {
            self.answer::<IgnoredAny>(response).await?;
            return Err(self.broken("a refusal without words"));
        }
        let mut body = response.into_body();
        let mut pending = Vec::new();
        while let Some(frame) = body.frame().await {
            let frame = frame.map_err(|error| self.broken(error))?;
            pending.extend_from_slice(frame.data_ref().map_or(&[][..], |data| data));
            while let Some(end) = pending.iter().position(|byte| *byte == b'\n') {
                let line = serde_json::from_slice::<L>(&pending[..end])
                    .map_err(|error| self.broken(error))?;
                pending.drain(..=end);
                if let Some(wanted) = hear(line)? {
                    return Ok(Some(wanted));
                }
            }
            if pending.len() > LINE_MAX {
                return Err(self.broken("a line of the answer is too long"));
            }
        }
        Ok(None)
    }

    fn unreachable(&self, error: std::io::Error) -> Error {
        let socket = self.socket.display();
        let remedy = match error.kind() {
            ErrorKind::NotFound | ErrorKind::ConnectionRefused => {
                "no daemon listens there: start it with `underlay serve` (or `systemctl start \
                 underlay`), or name its socket with --socket or UNDERLAY_SOCKET"
            }
            ErrorKind::PermissionDenied => {
                "you may not connect: ask as the daemon's user, or join the group that owns the \
                 socket"
            }
            _ => "the daemon can't be reached",
        };
        let kind = match error.kind() {
            ErrorKind::PermissionDenied => Kind::Permission,
            _ => Kind::Unavailable,
        };
        Error::new(kind, format!("{socket}: {remedy} ({error})"))
    }

    fn broken(&self, error: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Error {
        let context = format!("talking to the daemon at {}", self.socket.display());
        Error::caused(Kind::Unavailable, context, error)
    }
}

/// `text` as one segment of a path or one value of a query.
pub fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) {
            escaped.push(byte.into());
        } else {
            escaped.push_str(&format!("%{byte:02X}"));
        }
    }
    escaped
}

fn request(method: Method, path: &str, body: Body) -> Result<Request<Body>> {
    Request::builder()
        .method(method)
        .uri(path)
        .header("host", "underlay")
        .header("content-type", "application/json")
        .body(body)
        .map_err(|error| Error::caused(Kind::Invalid, format!("asking for {path}"), error))
}

fn nothing() -> Body {
    Either::Left(Full::default())
}

fn json(body: &impl Serialize) -> Result<Body> {
    let bytes = serde_json::to_vec(body).map_err(std::io::Error::from).context(|| "a request")?;
    Ok(Either::Left(Full::new(bytes.into())))
}

/// The error that an answer of another status tells.
fn refusal(status: StatusCode, body: &[u8]) -> Error {
    match serde_json::from_slice::<Refusal>(body) {
        Ok(refusal) => refusal.error.into(),
        Err(_) => Error::new(
            Kind::Unavailable,
            format!("the daemon answered {status}; is it of the same version as this program?"),
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_escaped_for_paths() {
        assert_eq!(escape("debian-12.qcow2"), "debian-12.qcow2");
        assert_eq!(escape("a/b ?\n%ü"), "a%2Fb%20%3F%0A%25%C3%BC");
    }

    #[tokio::test]
    async fn a_daemon_that_is_not_there_is_told() {
        let directory = tempfile::tempdir().unwrap();
        let client = Client::new(directory.path().join("none.sock"));
        let error = client.get::<()>("/v1/status").await.unwrap_err();
        assert_eq!(error.kind(), Kind::Unavailable);
        assert!(error.to_string().contains("underlay serve"), "{error}");
    }
}
