//! Sources behind an http(s) URL.
//!
//! Redirects, waits and headers are bounded. The bytes are taken as they are sent: nothing is
//! unpacked on the way, because `--sha256` is of the file as it was published. An https URL is
//! never redirected to http.

use std::{path::PathBuf, time::Duration};

use ureq::{
    Agent,
    config::AutoHeaderValue,
    http::{StatusCode, header},
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
    let response = Agent::new_with_config(config).get(url).call().map_err(|error| {
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
    if let Some(encoding) = response.headers().get(header::CONTENT_ENCODING)
        && encoding != "identity"
    {
        // Servers that mark a .gz file so send the file itself, which is what is wanted.
        tracing::debug!(?encoding, url = name, "content encoding is left to the importer");
    }
    let body = response.into_body();
    let length = body.content_length();
    let reader = body.into_with_config().limit(u64::MAX).reader();
    Ok(Incoming { reader: Box::new(reader), length })
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
