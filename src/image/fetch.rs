//! Sources behind an http(s) URL.
//!
//! Redirects, waits and headers are bounded. The bytes are taken as they are sent: nothing is
//! unpacked on the way, because `--sha256` is of the file as it was published. An https URL is
//! never redirected to http.
//!
//! A download that breaks off is taken up where it ended, as long as the server can say that the
//! file is still the same one (a strong ETag or a Last-Modified, and `If-Range`). Otherwise its end
//! is the import's: two halves of different files make no image.

use std::{
    io::{self, Read},
    path::PathBuf,
    thread,
    time::Duration,
};

use ureq::{
    Agent, Body, BodyReader,
    config::AutoHeaderValue,
    http::{HeaderMap, Response, StatusCode, header},
    tls::{Certificate, PemItem, RootCerts, TlsConfig},
};

use super::stream::Incoming;
use crate::error::{Context, Error, Kind, Result};

const REDIRECTS: u32 = 8;
const CONNECT_TIMEOUT: Duration = Duration::from_secs(20);
const RESPONSE_TIMEOUT: Duration = Duration::from_secs(60);
/// A download that sends nothing for so long has failed.
const STALL_TIMEOUT: Duration = Duration::from_secs(60);
const MAX_HEADERS: usize = 64 << 10;
/// Waits before a broken download is asked for again; afresh after each byte that came.
const RETRIES: [Duration; 5] = [
    Duration::from_millis(100),
    Duration::from_secs(1),
    Duration::from_secs(2),
    Duration::from_secs(5),
    Duration::from_secs(10),
];

/// Opens `url` for reading; `name` stands for it in errors (see [`redacted`]).
pub(super) fn open(url: &str, name: &str) -> Result<Incoming> {
    let config = Agent::config_builder()
        .https_only(url.get(..8).is_some_and(|scheme| scheme.eq_ignore_ascii_case("https://")))
        .max_redirects(REDIRECTS)
        .max_redirects_will_error(true)
        .http_status_as_error(false)
        .user_agent(concat!("underlay/", env!("CARGO_PKG_VERSION")))
        .accept_encoding(AutoHeaderValue::None)
        .timeout_resolve(Some(CONNECT_TIMEOUT))
        .timeout_connect(Some(CONNECT_TIMEOUT))
        .timeout_recv_response(Some(RESPONSE_TIMEOUT))
        .timeout_per_read(Some(STALL_TIMEOUT))
        .max_response_header_size(MAX_HEADERS)
        .tls_config(TlsConfig::builder().root_certs(trusted_roots()?).build())
        .build();
    let agent = Agent::new_with_config(config);
    let response = agent.get(url).call().map_err(|error| {
        let (kind, remedy) = match &error {
            ureq::Error::BadUri(_) | ureq::Error::Http(_) => (Kind::Invalid, "check the URL"),
            ureq::Error::HostNotFound => (Kind::NotFound, "check the URL's host name"),
            ureq::Error::RequireHttpsOnly(_) => {
                (Kind::Permission, "the server redirects from https to http, which is refused")
            }
            ureq::Error::TooManyRedirects => (Kind::Io, "the server redirects too often"),
            _ => (Kind::Io, "check that the server answers, and try again"),
        };
        Error::caused(kind, format!("fetching {name} ({remedy})"), error)
    })?;
    let status = response.status();
    if status != StatusCode::OK {
        let kind = match status {
            StatusCode::NOT_FOUND | StatusCode::GONE => Kind::NotFound,
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => Kind::Permission,
            _ => Kind::Io,
        };
        return Err(Error::new(
            kind,
            format!("fetching {name}: the server answers {status}; check the URL"),
        ));
    }
    let length = response.body().content_length();
    let validator = validator(response.headers());
    let body = reader(response);
    let download = Download { agent, url: url.to_owned(), body, at: 0, length, validator };
    Ok(Incoming { reader: Box::new(download), length })
}

/// A download under way.
struct Download {
    agent: Agent,
    url: String,
    body: BodyReader<'static>,
    /// Bytes that were read.
    at: u64,
    length: Option<u64>,
    /// What names this very file, if the server has a name for it.
    validator: Option<String>,
}

/// What a server answers to the question for the rest of a file.
enum Rest {
    Here(BodyReader<'static>),
    /// The server was not reached, or could not serve: it may yet.
    NotNow,
    /// It is another file by now, or the server serves no parts.
    Never,
}

impl Download {
    fn rest(&self) -> Rest {
        let Some(validator) = &self.validator else { return Rest::Never };
        let request = self
            .agent
            .get(&self.url)
            .header(header::RANGE, format!("bytes={}-", self.at))
            .header(header::IF_RANGE, validator);
        let response = match request.call() {
            Ok(response) if response.status().is_server_error() => return Rest::NotNow,
            Ok(response) => response,
            Err(_) => return Rest::NotNow,
        };
        let range = response.headers().get(header::CONTENT_RANGE);
        let fits = range
            .and_then(|range| range.to_str().ok())
            .is_some_and(|range| range.starts_with(&format!("bytes {}-", self.at)));
        match response.status() {
            StatusCode::PARTIAL_CONTENT if fits => Rest::Here(reader(response)),
            _ => Rest::Never,
        }
    }
}

impl Read for Download {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let mut waits = RETRIES.iter();
        loop {
            let outcome = self.body.read(buf);
            match outcome {
                Ok(count) if count > 0 || self.length.is_none_or(|length| self.at >= length) => {
                    self.at += count as u64;
                    return Ok(count);
                }
                _ if buf.is_empty() => return Ok(0),
                _ => {}
            }
            // It broke off. What can't be taken up ends as it did.
            loop {
                let Some(wait) = waits.next() else { return outcome };
                thread::sleep(*wait);
                match self.rest() {
                    Rest::Here(body) => {
                        tracing::info!(at = self.at, "a download broke off and is taken up again");
                        self.body = body;
                        break;
                    }
                    Rest::NotNow => {}
                    Rest::Never => return outcome,
                }
            }
        }
    }
}

/// The body as it comes, however long.
fn reader(response: Response<Body>) -> BodyReader<'static> {
    response.into_body().into_with_config().limit(u64::MAX).reader()
}

/// What `If-Range` may name: a strong ETag, or the time of the last change.
fn validator(headers: &HeaderMap) -> Option<String> {
    let text = |name| headers.get(name).and_then(|value| value.to_str().ok()).map(str::to_owned);
    text(header::ETAG).filter(|tag| !tag.starts_with("W/")).or_else(|| text(header::LAST_MODIFIED))
}

/// The certificates that this host trusts; those built in where it has none of its own.
fn trusted_roots() -> Result<RootCerts> {
    // The way of OpenSSL: a variable, else where the distributions keep them.
    const BUNDLES: [&str; 3] = [
        "/etc/ssl/certs/ca-certificates.crt",
        "/etc/pki/tls/certs/ca-bundle.crt",
        "/etc/ssl/ca-bundle.pem",
    ];
    let told = std::env::var_os("SSL_CERT_FILE").map(PathBuf::from);
    let Some(path) = told.or_else(|| BUNDLES.iter().map(PathBuf::from).find(|path| path.exists()))
    else {
        return Ok(RootCerts::WebPki);
    };
    let what = format!("the trusted certificates in {}", path.display());
    let text = std::fs::read(&path).context(|| format!("reading {what} (see SSL_CERT_FILE)"))?;
    let certificates: Vec<Certificate<'static>> = ureq::tls::parse_pem(&text)
        .filter_map(|item| match item {
            Ok(PemItem::Certificate(certificate)) => Some(certificate),
            _ => None,
        })
        .collect();
    if certificates.is_empty() {
        return Err(Error::new(
            Kind::Invalid,
            format!("{what} are none: correct or unset SSL_CERT_FILE"),
        ));
    }
    Ok(RootCerts::new_with_certs(&certificates))
}

/// `url` as it may be shown and stored: without user, password, query and fragment.
pub(super) fn redacted(url: &str) -> String {
    let url = &url[..url.find(['?', '#']).unwrap_or(url.len())];
    let Some((scheme, rest)) = url.split_once("://") else { return url.to_owned() };
    let (host, path) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
    let host = host.rsplit_once('@').map_or(host, |(_, host)| host);
    format!("{scheme}://{host}{path}")
}

#[cfg(test)]
mod tests {
    use super::redacted;

    #[test]
    fn secrets_of_a_url_are_not_shown() {
        assert_eq!(redacted("https://u:p@w@host:8/a/b?token=1#x"), "https://host:8/a/b");
        assert_eq!(redacted("http://host"), "http://host");
        assert_eq!(redacted("http://host?key=/a@b"), "http://host");
    }
}
