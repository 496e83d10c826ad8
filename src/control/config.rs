//! The service's configuration: a TOML file whose every key has a default.
//!
//! Unknown keys are errors, so that a misspelt one does not go unnoticed. Options of the command
//! line win over the file.

use std::{fs, io::Read, net::SocketAddr, path::Path, path::PathBuf};

use serde::Deserialize;

use crate::{
    blockdev::nbd::TlsFiles,
    catalog::{COPIES_MAX, Placement},
    control::paths::Paths,
    error::{Context, Error, Kind, Result},
    source::Verify,
};

/// Bytes a configuration file may have.
const FILE_MAX: u64 = 1 << 20;
/// Where the metrics listen when only a port is given.
const LOOPBACK: &str = "127.0.0.1";

/// How `underlay serve` runs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// The state directory: which disks the node knows.
    pub state: PathBuf,
    /// The control socket.
    pub socket: PathBuf,
    /// The NBD socket.
    pub nbd_socket: PathBuf,
    /// Where NBD is served over TCP too; `None` for nowhere.
    pub nbd_tcp: Option<NbdTcp>,
    /// The group that may connect to both sockets besides the owner; empty for the daemon's own.
    pub socket_group: String,
    /// Where metrics are served; `None` for nowhere.
    pub metrics: Option<SocketAddr>,
    /// The log filter, as RUST_LOG understands it.
    pub log: String,
    /// I/O threads, each with a ring; 0 for as many as there are processors, up to a bound.
    pub threads: usize,
    /// Microseconds that an I/O thread with a deep queue looks for completions before it sleeps.
    pub poll_us: u64,
    /// Whether reads of images go through the page cache, shared by all replicas.
    pub image_io: Caching,
    /// Whether overlays go through the page cache.
    pub overlay_io: Caching,
    /// When chunks of images are compared with their sums as they are read.
    pub verify_reads: Verify,
    /// Whether what no copy can give is read from the file that the image was imported from.
    pub read_sources: bool,
    /// Seconds that a disk has to answer well before it is believed to be.
    pub clean_seconds: u64,
    /// How many copies of an image are wanted where nobody said.
    pub copies: u64,
    /// Which disks images are placed on before others.
    pub placement: Placement,
    /// Seconds that a lost copy is waited for before another is made.
    pub rebuild_after_seconds: u64,
    /// MiB a second at which that is done.
    pub rebuild_mib: u64,
    /// In so many days each copy is read whole and compared with its sums; 0: never.
    pub scrub_days: u64,
    /// MiB a second at which that is done.
    pub scrub_mib: u64,
    /// Percent of each disk that promoted chunks may take, unless the disk says otherwise; 0: none.
    pub cache_percent: u64,
    /// MiB a second that promotion may write to each disk.
    pub promote_mib: u64,
    /// Whether to start the agent with the probes.
    pub probes: bool,
    /// Seconds that a stopping daemon gives its clients to finish.
    pub stop_seconds: u64,
}

/// How NBD is served over TCP.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NbdTcp {
    /// Where to listen.
    pub address: SocketAddr,
    /// Who is let in by TLS; `None`: whoever comes, and all can be read on the way.
    pub tls: Option<TlsFiles>,
}

/// How files of one kind are read and written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Caching {
    /// Through the page cache.
    Cached,
    /// Past it (O_DIRECT), where the file system can.
    Direct,
}

/// The file as it is written: every key optional.
#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct File {
    state: Option<PathBuf>,
    socket: Option<PathBuf>,
    nbd_socket: Option<PathBuf>,
    nbd_listen: Option<String>,
    nbd_certificate: Option<PathBuf>,
    nbd_key: Option<PathBuf>,
    nbd_client_ca: Option<PathBuf>,
    nbd_insecure: Option<bool>,
    socket_group: Option<String>,
    metrics: Option<String>,
    log: Option<String>,
    threads: Option<usize>,
    poll_us: Option<u64>,
    image_io: Option<Caching>,
    overlay_io: Option<Caching>,
    verify_reads: Option<Verify>,
    read_sources: Option<bool>,
    clean_seconds: Option<u64>,
    copies: Option<u64>,
    placement: Option<Placement>,
    rebuild_after_seconds: Option<u64>,
    rebuild_mib: Option<u64>,
    scrub_days: Option<u64>,
    scrub_mib: Option<u64>,
    cache_percent: Option<u64>,
    promote_mib: Option<u64>,
    probes: Option<bool>,
    stop_seconds: Option<u64>,
}

impl File {
    /// How NBD is served over TCP: by TLS, or else in so many words without.
    fn nbd_tcp(&self) -> Result<Option<NbdTcp>> {
        let files = [
            ("nbd_certificate", &self.nbd_certificate),
            ("nbd_key", &self.nbd_key),
            ("nbd_client_ca", &self.nbd_client_ca),
        ]
        .map(|(key, file)| (key, file.clone().filter(|file| !file.as_os_str().is_empty())));
        let invalid = |what: &str| Err(Error::new(Kind::Invalid, what.to_owned()));
        let insecure = self.nbd_insecure.unwrap_or(false);
        let given = files.iter().any(|(_, file)| file.is_some());
        let address = match self.nbd_listen.as_deref() {
            None | Some("") if given || insecure => {
                return invalid("nbd_listen says where NBD is served over TCP: give an address");
            }
            None | Some("") => return Ok(None),
            Some(text) => address(text)?,
        };
        for (key, file) in &files {
            match file {
                Some(path) if !path.is_absolute() => {
                    return invalid(&format!("{key} is {path:?}: give a path that starts with /"));
                }
                _ => {}
            }
        }
        let tls = match (files.map(|(_, file)| file), insecure) {
            ([None, None, None], true) => None,
            ([Some(certificate), Some(key), Some(client_ca)], false) => {
                Some(TlsFiles { certificate, key, client_ca })
            }
            (_, true) => {
                return invalid("nbd_insecure is for NBD without TLS: leave the certificates out");
            }
            (_, false) => {
                return invalid(
                    "NBD over TCP needs nbd_certificate, nbd_key and nbd_client_ca; or nbd_insecure = \
                     true, which lets in whoever comes, and shows everything to whoever listens",
                );
            }
        };
        Ok(Some(NbdTcp { address, tls }))
    }
}

impl Config {
    /// The defaults for a service at `paths`.
    pub fn at(paths: &Paths) -> Config {
        Config {
            state: paths.state.clone(),
            socket: paths.socket.clone(),
            nbd_socket: paths.nbd_socket.clone(),
            nbd_tcp: None,
            socket_group: String::new(),
            metrics: None,
            log: "info".to_owned(),
            threads: 0,
            poll_us: 400,
            image_io: Caching::Cached,
            overlay_io: Caching::Direct,
            verify_reads: Verify::First,
            read_sources: true,
            clean_seconds: 60,
            copies: 1,
            placement: Placement::Pool,
            rebuild_after_seconds: 60,
            rebuild_mib: 64,
            scrub_days: 30,
            scrub_mib: 16,
            cache_percent: 5,
            promote_mib: 64,
            probes: true,
            stop_seconds: 20,
        }
    }

    /// The defaults for `paths`, changed by the file at `path`.
    pub fn read(path: &Path, paths: &Paths) -> Result<Config> {
        let mut text = String::new();
        fs::File::open(path)
            .and_then(|file| file.take(FILE_MAX + 1).read_to_string(&mut text))
            .context(|| format!("reading configuration {}", path.display()))?;
        if text.len() as u64 > FILE_MAX {
            return Err(Error::new(
                Kind::Invalid,
                format!("configuration {} is larger than 1 MiB", path.display()),
            ));
        }
        Config::parse(&text, paths)
            .map_err(|error| error.within(format_args!("configuration {}", path.display())))
    }

    fn parse(text: &str, paths: &Paths) -> Result<Config> {
        let file: File = toml::from_str(text).map_err(|error| {
            let line = error.span().map_or(1, |span| text[..span.start].matches('\n').count() + 1);
            Error::new(Kind::Invalid, format!("line {line}: {}", error.message()))
        })?;
        let default = Config::at(paths);
        let nbd_tcp = file.nbd_tcp()?;
        let config = Config {
            state: file.state.unwrap_or(default.state),
            socket: file.socket.unwrap_or(default.socket),
            nbd_socket: file.nbd_socket.unwrap_or(default.nbd_socket),
            nbd_tcp,
            socket_group: file.socket_group.unwrap_or(default.socket_group),
            metrics: match file.metrics.as_deref() {
                None | Some("") => default.metrics,
                Some(text) => Some(address(text)?),
            },
            log: file.log.unwrap_or(default.log),
            threads: file.threads.unwrap_or(default.threads),
            poll_us: file.poll_us.unwrap_or(default.poll_us),
            image_io: file.image_io.unwrap_or(default.image_io),
            overlay_io: file.overlay_io.unwrap_or(default.overlay_io),
            verify_reads: file.verify_reads.unwrap_or(default.verify_reads),
            read_sources: file.read_sources.unwrap_or(default.read_sources),
            clean_seconds: file.clean_seconds.unwrap_or(default.clean_seconds),
            copies: file.copies.unwrap_or(default.copies),
            placement: file.placement.unwrap_or(default.placement),
            rebuild_after_seconds: file
                .rebuild_after_seconds
                .unwrap_or(default.rebuild_after_seconds),
            rebuild_mib: file.rebuild_mib.unwrap_or(default.rebuild_mib),
            scrub_days: file.scrub_days.unwrap_or(default.scrub_days),
            scrub_mib: file.scrub_mib.unwrap_or(default.scrub_mib),
            cache_percent: file.cache_percent.unwrap_or(default.cache_percent),
            promote_mib: file.promote_mib.unwrap_or(default.promote_mib),
            probes: file.probes.unwrap_or(default.probes),
            stop_seconds: file.stop_seconds.unwrap_or(default.stop_seconds),
        };
        for (key, path) in [
            ("state", &config.state),
            ("socket", &config.socket),
            ("nbd_socket", &config.nbd_socket),
        ] {
            if !path.is_absolute() {
                return Err(Error::new(
                    Kind::Invalid,
                    format!("{key} is {path:?}: give a path that starts with /"),
                ));
            }
        }
        if config.threads > 1024 || config.poll_us > 100_000 || config.stop_seconds > 3600 {
            return Err(Error::new(
                Kind::Invalid,
                "threads is at most 1024, poll_us at most 100000 and stop_seconds at most 3600",
            ));
        }
        if config.clean_seconds > 86_400
            || config.scrub_days > 3650
            || !(1..=1 << 20).contains(&config.scrub_mib)
        {
            let what = "clean_seconds is at most 86400, scrub_days at most 3650, scrub_mib from 1 to 1048576";
            return Err(Error::new(Kind::Invalid, what));
        }
        if !(1..=u64::from(COPIES_MAX)).contains(&config.copies)
            || config.rebuild_after_seconds > 7 * 86_400
            || !(1..=1 << 20).contains(&config.rebuild_mib)
        {
            let what = "copies is from 1 to 16, rebuild_after_seconds at most 604800, rebuild_mib from 1 to \
                        1048576";
            return Err(Error::new(Kind::Invalid, what));
        }
        if config.cache_percent > 90 || !(1..=1 << 20).contains(&config.promote_mib) {
            let what = "cache_percent is at most 90, promote_mib from 1 to 1048576";
            return Err(Error::new(Kind::Invalid, what));
        }
        Ok(config)
    }
}

/// An address to listen on: `127.0.0.1:9500`, or a port alone for the loopback.
pub fn address(text: &str) -> Result<SocketAddr> {
    let full = if text.bytes().all(|b| b.is_ascii_digit()) {
        format!("{LOOPBACK}:{text}")
    } else {
        text.to_owned()
    };
    full.parse().map_err(|_| {
        Error::new(
            Kind::Invalid,
            format!(
                "metrics address {:?} is not understood: write ADDRESS:PORT or a port, as in \
                 127.0.0.1:9500",
                text.chars().take(60).collect::<String>()
            ),
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHIPPED: &str = include_str!("../../packaging/underlay.toml");

    #[test]
    fn the_shipped_file_says_the_defaults() {
        let system = Paths::system();
        assert_eq!(Config::parse(SHIPPED, &system).unwrap(), Config::at(&system));
        assert_eq!(Config::parse("", &system).unwrap(), Config::at(&system));
    }

    #[test]
    fn the_shipped_file_names_every_key() {
        // A key that serde knows and the file does not show would be a hidden one: serde lists
        // them all when it meets an unknown one.
        let error = toml::from_str::<File>("nonsense = 1").unwrap_err().to_string();
        let expected = error.split("expected one of").nth(1).expect("serde lists the keys");
        let keys: Vec<_> = expected.split('`').skip(1).step_by(2).collect();
        assert!(keys.len() >= 10, "{error}");
        for key in keys {
            let shown = SHIPPED.lines().any(|line| line.starts_with(&format!("{key} = ")));
            assert!(shown, "packaging/underlay.toml does not show {key}");
        }
    }

    #[test]
    fn mistakes_are_told_by_key_and_line() {
        let system = Paths::system();
        for (text, told) in [
            ("log = \"info\"\nmetrix = 1", "metrix"),
            ("log = \"info\"\nmetrix = 1", "line 2"),
            ("threads = \"many\"", "line 1"),
            ("threads = 100000", "1024"),
            ("poll_us = 1000000", "100000"),
            ("cache_percent = 91", "90"),
            ("promote_mib = 0", "1048576"),
            ("overlay_io = \"quick\"", "quick"),
            ("metrics = \"nowhere\"", "nowhere"),
            ("socket = \"underlay.sock\"", "socket"),
            ("state =", "line 1"),
            ("nbd_listen = \"10809\"", "nbd_certificate"),
            (
                "nbd_listen = \"10809\"\nnbd_key = \"/k\"\nnbd_insecure = true",
                "leave the certificates",
            ),
            ("nbd_insecure = true", "nbd_listen"),
            ("nbd_key = \"/k\"", "nbd_listen"),
            ("nbd_listen = \"10809\"\nnbd_key = \"k\"\n", "nbd_key"),
        ] {
            let error = Config::parse(text, &system).unwrap_err().to_string();
            assert!(error.contains(told), "{text}: {error}");
        }
        let config = Config::parse("metrics = \"9500\"", &system).unwrap();
        assert_eq!(config.metrics, Some("127.0.0.1:9500".parse().unwrap()));
        let open = "nbd_listen = \"[::]:10809\"\nnbd_insecure = true";
        let tcp = Config::parse(open, &system).unwrap().nbd_tcp.unwrap();
        assert!(tcp.address == "[::]:10809".parse().unwrap() && tcp.tls.is_none());
        let files = "nbd_certificate = \"/c\"\nnbd_key = \"/k\"\nnbd_client_ca = \"/a\"";
        let config = Config::parse(&format!("nbd_listen = \"10809\"\n{files}"), &system).unwrap();
        assert_eq!(config.nbd_tcp.unwrap().tls.unwrap().key, PathBuf::from("/k"));
    }
}
