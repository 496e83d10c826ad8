//! Outside clients over TCP with TLS: libnbd's and qemu's, with GnuTLS on their side and rustls on ours.
//!
//! Invariants checked:
//! - what they read is the image's content, what they write to a replica is what is read back;
//! - a client without a certificate, or with one of another CA, or without TLS, gets nothing;
//! - a client that has a certificate does not take the server for another's.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};

use crate::daemon::Daemon;
use crate::lab::Lab;
use crate::place::{self, Profile};
use crate::report::Report;
use crate::subject::text;
use crate::tool::tool;
use crate::{pattern, setup};

/// Size of the image, in bytes.
const SIZE: u64 = (40 << 20) + 512;

/// Runs the rig.
pub fn run(lab: &Lab, report: &mut Report) {
    if let Err(error) = setup::need(&["qemu-img", "nbdinfo", "nbdcopy", "cmp", "openssl"]) {
        return report.skip("TLS", &format!("{error:#}"));
    }
    if let Err(error) = job(lab, report) {
        report.broken("TLS", &error);
    }
}

fn job(lab: &Lab, report: &mut Report) -> Result<()> {
    let bench = Bench::start(lab)?;
    report.check("TLS: libnbd reads an image, and writes a replica and reads it back", || {
        let (image, vm) =
            (bench.uri("nbds", "image/base", "pki"), bench.uri("nbds", "replica/vm", "pki"));
        let known = tool("nbdinfo", ["--json", &image]).out()?;
        ensure!(known.contains("\"TLS\": true"), "no TLS: {known}");
        tool("nbdcopy", [image.as_ref(), bench.out.as_os_str()]).run()?;
        tool("cmp", [&bench.raw, &bench.out]).run()?;
        let other = bench.dir.join("other.raw");
        pattern::noise(&other, SIZE, 9)?;
        tool("nbdcopy", [other.as_os_str(), vm.as_ref()]).run()?;
        tool("nbdcopy", [vm.as_ref(), bench.out.as_os_str()]).run()?;
        tool("cmp", [&other, &bench.out]).run()?;
        Ok(String::new())
    });
    report.check("TLS: qemu reads an image", || {
        let (host, port) = bench.address.rsplit_once(':').context("no port")?;
        ensure!(host == "127.0.0.1", "it listens at {host}");
        let secret =
            format!("tls-creds-x509,id=tls0,endpoint=client,dir={}", text(&bench.pki("pki"))?);
        let source =
            format!("driver=nbd,host=localhost,port={port},export=image/base,tls-creds=tls0");
        tool("qemu-img", ["convert", "--object", &secret, "--image-opts", &source, "-O", "raw"])
            .args([&bench.out])
            .run()?;
        tool("cmp", [&bench.raw, &bench.out]).run()?;
        Ok(String::new())
    });
    report.check("TLS: strangers get nothing", || {
        let strangers = [
            ("no TLS", bench.uri("nbd", "image/base", "pki")),
            ("another CA's client", bench.uri("nbds", "image/base", "strangers")),
            ("a client without a certificate", bench.uri("nbds", "image/base", "bare")),
            ("one who expects another server", bench.uri("nbds", "image/base", "wary")),
        ];
        for (who, uri) in strangers {
            let outcome = tool("nbdinfo", ["--size", &uri]).outcome()?;
            ensure!(outcome.code != 0, "{who} got in: {}", outcome.stdout);
        }
        Ok(String::new())
    });
    bench.daemon.ok(&["status"])?;
    let Bench { mut daemon, .. } = bench;
    daemon.stop()
}

struct Bench {
    daemon: Daemon,
    address: String,
    dir: PathBuf,
    raw: PathBuf,
    out: PathBuf,
}

impl Bench {
    fn start(lab: &Lab) -> Result<Bench> {
        let dir = lab.dir("tls")?;
        let [pki, strangers, bare, wary] =
            ["pki", "strangers", "bare", "wary"].map(|it| dir.join(it));
        certify(&pki)?;
        certify(&strangers)?;
        // The CA alone; and our client's certificate with another CA to judge servers by.
        fs::create_dir_all(&bare)?;
        fs::create_dir_all(&wary)?;
        let put = |from: &Path, to: &Path, name: &str| fs::copy(from.join(name), to.join(name));
        put(&strangers, &wary, "ca-cert.pem")?;
        put(&pki, &bare, "ca-cert.pem")?;
        put(&pki, &strangers, "ca-cert.pem")?;
        for name in ["client-cert.pem", "client-key.pem"] {
            put(&pki, &wary, name)?;
        }
        let file = |name: &str| -> Result<String> {
            Ok(format!("{:?}", text(&dir.join("pki").join(name))?))
        };
        let settings = format!(
            "probes = false\nnbd_listen = \"127.0.0.1:0\"\nnbd_certificate = {}\nnbd_key = {}\n\
             nbd_client_ca = {}\n",
            file("server-cert.pem")?,
            file("server-key.pem")?,
            file("ca-cert.pem")?
        );
        let daemon = Daemon::start(lab, &dir, "tls", Profile::Debug, &settings)?;
        let (raw, out, disk) = (dir.join("base.raw"), dir.join("out.raw"), dir.join("a"));
        pattern::image(&raw, SIZE, 5)?;
        fs::create_dir_all(&disk)?;
        daemon.ok(&["disk", "add", text(&disk)?, "--name=a"])?;
        daemon.ok(&["image", "import", text(&raw)?, "--name=base", "--format=raw"])?;
        daemon.ok(&["replica", "create", "vm", "--image=base", "--disk=a"])?;
        let status = daemon.json(&["status"])?;
        let address = status["daemon"]["nbd_address"].as_str().context("it does not listen")?;
        Ok(Bench { address: address.to_owned(), daemon, dir, raw, out })
    }

    fn pki(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    fn uri(&self, scheme: &str, export: &str, pki: &str) -> String {
        let port = self.address.rsplit(':').next().unwrap_or_default();
        let pki = self.pki(pki);
        format!("{scheme}://localhost:{port}/{export}?tls-certificates={}", pki.display())
    }
}

/// A CA and certificates of its own for both sides, made as the documentation says.
fn certify(dir: &Path) -> Result<()> {
    fs::create_dir_all(dir)?;
    let page = place::root().join("docs/tcp.md");
    let page = fs::read_to_string(&page).with_context(|| page.display().to_string())?;
    let script = page.split("```").nth(1).and_then(|block| block.strip_prefix("sh\n"));
    let script = script.context("docs/tcp.md shows no commands")?;
    let script = script.replace("node1.example.org", "localhost");
    tool("sh", ["-e", "-c", &script]).within(dir).run()
}
