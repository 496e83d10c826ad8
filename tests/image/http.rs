//! Sources behind http, served by a small server on the loopback device: good answers, redirects,
//! errors, connections that break, lengths that lie, servers that fall silent.

use std::{
    io::{BufRead, BufReader, Write},
    net::{TcpListener, TcpStream},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed},
    },
    thread,
    time::{Duration, Instant},
};

use underlay::{
    error::Kind,
    image::{Format, Source},
};

use crate::{streams::gzip, support::*};

/// Serves every request with what `answer` writes for its path; returns the server's URL.
fn serve(answer: impl Fn(&str, &mut TcpStream) + Send + Sync + 'static) -> String {
    serve_requests(move |path, _, stream| answer(path, stream))
}

/// The same, for answers that depend on the request's headers.
fn serve_requests(
    answer: impl Fn(&str, &[String], &mut TcpStream) + Send + Sync + 'static,
) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let answer = Arc::new(answer);
    thread::spawn(move || {
        for stream in listener.incoming() {
            let answer = answer.clone();
            thread::spawn(move || {
                let mut stream = stream.unwrap();
                let mut reader = BufReader::new(stream.try_clone().unwrap());
                let mut request = String::new();
                reader.read_line(&mut request).unwrap();
                let path = request.split(' ').nth(1).unwrap_or("/").to_owned();
                let mut line = String::new();
                let mut headers = Vec::new();
                while reader.read_line(&mut line).is_ok() && line.trim() != "" {
                    headers.push(line.trim().to_ascii_lowercase());
                    line.clear();
                }
                answer(&path, &headers, &mut stream);
            });
        }
    });
    url
}

fn ok(stream: &mut TcpStream, length: usize, body: &[u8]) {
    let _ =
        write!(stream, "HTTP/1.1 200 OK\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n");
    let _ = stream.write_all(body);
}

fn url(base: &str, path: &str) -> Source {
    Source::parse(&format!("{base}{path}")).unwrap()
}

#[test]
fn images_are_downloaded_through_redirects() {
    let expected = content(60, (5 << 20) + 512);
    let body = expected.clone();
    let packed = gzip(&expected);
    let sum = sha256(&packed);
    let base = serve(move |path, stream| match path {
        "/a" => {
            let _ = write!(
                stream,
                "HTTP/1.1 302 Found\r\nLocation: /b\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
            );
        }
        "/b" => ok(stream, body.len(), &body),
        "/gz" => ok(stream, packed.len(), &packed),
        "/encoded" => {
            // As servers do that take a .gz file for an encoding.
            let _ = write!(
                stream,
                "HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Encoding: gzip\r\nContent-Length: {}\r\n\r\n",
                packed.len()
            );
            let _ = stream.write_all(&packed);
        }
        "/chunked" => {
            let _ = write!(
                stream,
                "HTTP/1.1 200 OK\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n"
            );
            for piece in body.chunks(77_777) {
                let _ = write!(stream, "{:x}\r\n", piece.len());
                let _ = stream.write_all(piece);
                let _ = stream.write_all(b"\r\n");
            }
            let _ = stream.write_all(b"0\r\n\r\n");
        }
        _ => unreachable!("{path}"),
    });
    import_auto(url(&base, "/a")).unwrap().check(&expected);
    import_auto(url(&base, "/chunked")).unwrap().check(&expected);
    for path in ["/gz", "/encoded"] {
        let cancel = AtomicBool::new(false);
        let copy = import_with(url(&base, path), Format::Auto, Some(sum), &cancel).unwrap();
        copy.check(&expected);
        assert_eq!(copy.imported.source, format!("{base}{path}"));
    }
}

#[test]
fn answers_that_are_no_image_are_errors() {
    let base = serve(|path, stream| {
        let status = match path {
            "/404" => "404 Not Found",
            "/403" => "403 Forbidden",
            "/500" => "500 Oh",
            "/206" => "206 Partial Content",
            _ => {
                let _ = write!(
                    stream,
                    "HTTP/1.1 302 Found\r\nLocation: {path}x\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
                );
                return;
            }
        };
        let _ =
            write!(stream, "HTTP/1.1 {status}\r\nContent-Length: 2\r\nConnection: close\r\n\r\nno");
    });
    for (path, kind, word) in [
        ("/404", Kind::NotFound, "404"),
        ("/403", Kind::Permission, "403"),
        ("/500", Kind::Io, "500"),
        ("/206", Kind::Io, "206"),
        ("/loop", Kind::Io, "redirect"),
    ] {
        let error = import_auto(url(&base, path)).err().unwrap();
        assert_eq!(error.kind(), kind, "{error}");
        assert!(error.to_string().contains(word) && error.to_string().contains(&base), "{error}");
    }
    // Nobody listens there any more.
    let closed = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let error = import_auto(url(&format!("http://{closed}"), "/x")).err().unwrap();
    assert_eq!(error.kind(), Kind::Io, "{error}");
    let error = import_auto(url("http://", "/")).err().unwrap();
    assert!(matches!(error.kind(), Kind::Invalid | Kind::Io), "{error}");
}

#[test]
fn connections_that_break_are_errors() {
    let expected = content(61, 3 << 20);
    let body = expected.clone();
    let base = serve(move |path, stream| match path {
        "/half" => ok(stream, body.len(), &body[..body.len() / 2]),
        "/nothing" => ok(stream, body.len(), b""),
        "/chunked" => {
            let _ = write!(
                stream,
                "HTTP/1.1 200 OK\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n100000\r\n"
            );
            let _ = stream.write_all(&body[..1000]);
        }
        "/close" => {}
        _ => {
            let _ = stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Le");
        }
    });
    for path in ["/half", "/nothing", "/chunked", "/close", "/header"] {
        let error = import_auto(url(&base, path)).err().unwrap_or_else(|| panic!("{path} passed"));
        assert!(matches!(error.kind(), Kind::Io | Kind::Corrupt), "{path}: {error}");
        assert!(error.to_string().contains(&base), "{path}: {error}");
    }
}

/// A server of one file that sends a megabyte a connection; its ETag by the path.
fn tired_server(body: Vec<u8>) -> String {
    let asked = AtomicUsize::new(0);
    serve_requests(move |path, headers, stream| {
        let round = asked.fetch_add(1, Relaxed);
        let tag = match path {
            "/same" => "\"v1\"".to_owned(),
            "/weak" => "W/\"v1\"".to_owned(),
            _ => format!("\"v{round}\""),
        };
        let value = |name: &str| headers.iter().find_map(|h| h.strip_prefix(name));
        let from = value("range: bytes=")
            .filter(|_| value("if-range: ") == Some(&tag.to_lowercase()))
            .and_then(|range| range.strip_suffix('-')?.parse::<usize>().ok());
        let (status, at) = match from {
            Some(at) => ("206 Partial Content", at),
            None => ("200 OK", 0),
        };
        let _ = write!(
            stream,
            "HTTP/1.1 {status}\r\nConnection: close\r\nETag: {tag}\r\nContent-Range: bytes {at}-{}/{}\r\n\
             Content-Length: {}\r\n\r\n",
            body.len() - 1,
            body.len(),
            body.len() - at
        );
        let _ = stream.write_all(&body[at..body.len().min(at + (1 << 20))]);
    })
}

#[test]
fn a_download_that_breaks_off_is_taken_up_again() {
    let expected = content(63, (4 << 20) + 777);
    let sum = sha256(&expected);
    let base = tired_server(expected.clone());
    let cancel = AtomicBool::new(false);
    let copy = import_with(url(&base, "/same"), Format::Auto, Some(sum), &cancel).unwrap();
    copy.check(&expected);
    // Another file under the same URL, or one that may be another, is not its second half.
    for path in ["/weak", "/changing"] {
        let error = import_auto(url(&base, path)).err().unwrap();
        assert!(matches!(error.kind(), Kind::Io | Kind::Corrupt), "{path}: {error}");
    }
}

#[test]
fn a_length_that_lies_low_is_caught_by_the_digest() {
    let expected = content(62, 1 << 20);
    let sum = sha256(&expected);
    let base = serve(move |_, stream| ok(stream, expected.len() / 2, &expected));
    let cancel = AtomicBool::new(false);
    let error = import_with(url(&base, "/"), Format::Auto, Some(sum), &cancel).err().unwrap();
    assert_eq!(error.kind(), Kind::Corrupt, "{error}");
    assert!(error.to_string().contains(&sum.to_string()), "{error}");
}

#[test]
fn a_silent_server_does_not_hold_up_a_cancellation() {
    let base = serve(|path, stream| {
        if path == "/body" {
            ok(stream, 1 << 20, &[1; 1000]);
        }
        thread::sleep(Duration::from_secs(30));
    });
    for path in ["/body", "/header"] {
        let cancel = Arc::new(AtomicBool::new(false));
        let canceller = cancel.clone();
        thread::spawn(move || {
            thread::sleep(Duration::from_millis(300));
            canceller.store(true, Relaxed);
        });
        let started = Instant::now();
        let error = import_with(url(&base, path), Format::Auto, None, &cancel).err().unwrap();
        assert_eq!(error.kind(), Kind::Cancelled, "{error}");
        assert!(started.elapsed() < Duration::from_secs(3), "{path}");
    }
}
