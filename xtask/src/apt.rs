//! Debian packages, installed or only unpacked, without changing an apt source of the machine.
//!
//! Another suite (backports, or the next release) is reached through a private list of sources
//! beneath `target/rig/cache/apt`: the mirror is the machine's own, the key its own Debian keyring.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};

use crate::place;
use crate::report::note;
use crate::tool::{NO_ARGS, Tool, find, tool};

/// How long apt may take to fetch and unpack.
const LIMIT: Duration = Duration::from_secs(900);
/// Where Debian keeps its archive keys: the older name and the newer.
const KEYRINGS: [&str; 2] = [
    "/usr/share/keyrings/debian-archive-keyring.gpg",
    "/usr/share/keyrings/debian-archive-keyring.pgp",
];

/// The packages of the Debian machine that this runs on.
pub struct Apt {
    /// The mirror that the machine itself uses.
    pub mirror: String,
    /// The machine's release.
    pub codename: String,
    keyring: &'static str,
    sudo: bool,
}

impl Apt {
    /// Looks at the machine; fails with the reason if packages can't be had here.
    pub fn here() -> Result<Apt> {
        let mut apt = Apt::unprivileged()?;
        if !nix::unistd::geteuid().is_root() {
            let sudo = tool("sudo", ["-n", "true"]).outcome();
            if !sudo.is_ok_and(|outcome| outcome.code == 0) {
                bail!("neither root nor a sudo that asks nothing");
            }
            apt.sudo = true;
        }
        Ok(apt)
    }

    /// The same for one who only downloads.
    pub fn unprivileged() -> Result<Apt> {
        let release = fs::read_to_string("/etc/os-release").context("reading /etc/os-release")?;
        let field = |key: &str| {
            let line = release.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix('='));
            line.map(|value| value.trim_matches('"').to_string()).unwrap_or_default()
        };
        if field("ID") != "debian" || find("apt-get").is_none() {
            bail!("this is not Debian but {}", field("PRETTY_NAME"));
        }
        let keyring = KEYRINGS.into_iter().find(|file| Path::new(file).exists());
        let keyring = keyring.ok_or_else(|| anyhow!("no Debian keyring in /usr/share/keyrings"))?;
        let codename = field("VERSION_CODENAME");
        let mirror = mirror(&codename)?;
        Ok(Apt { mirror, codename, keyring, sudo: false })
    }

    /// Installs packages from the machine's own sources.
    pub fn install(&self, packages: &[&str]) -> Result<()> {
        note(&format!("setup: apt-get install {}", packages.join(" ")));
        if self.apt_get(&[]).args(["-s", "install"]).args(packages).outcome()?.code != 0 {
            self.apt_get(&[]).args(["update"]).run()?;
        }
        self.apt_get(&[]).args(["install"]).args(packages).run()
    }

    /// Installs `package` so that `kept` stays installed: from the machine's own sources if that
    /// can be, from its backports otherwise.
    pub fn install_beside(&self, package: &str, kept: &str) -> Result<()> {
        let keeps = |options: &[String]| -> Result<bool> {
            let plan = self.apt_get(options).args(["-s", "install", package]).outcome()?;
            let removes = plan.stdout.lines().any(|line| line.starts_with("Remv "));
            let downgrades = plan.stdout.contains("DOWNGRADED");
            Ok(plan.code == 0 && !removes && !downgrades)
        };
        if !keeps(&[])? {
            self.apt_get(&[]).args(["update"]).run()?;
        }
        if keeps(&[])? {
            return self.install(&[package]);
        }
        let suite = format!("{}-backports", self.codename);
        note(&format!("setup: apt-get install {package} from {suite}, which keeps {kept}"));
        let mut options = self.sources(&suite, Own::Beside)?;
        self.apt_get(&options).args(["update"]).run()?;
        options.extend(["-t".to_string(), suite.clone()]);
        if !keeps(&options)? {
            bail!("installing {package} would remove or downgrade packages of this machine");
        }
        self.apt_get(&options).args(["install", package]).run()
    }

    /// The versions of `package` that `suite` has, newest first.
    pub fn versions(&self, suite: &str, package: &str) -> Result<Vec<String>> {
        let options = self.sources(suite, Own::Without)?;
        self.apt_get(&options).args(["update"]).run()?;
        let table = tool("apt-cache", &options).args(["madison", package]).out()?;
        let versions = table.lines().filter_map(|line| line.split('|').nth(1));
        Ok(versions.map(|version| version.trim().to_string()).collect())
    }

    /// Unpacks the newest `package` (or `package=version`) of `suite` beneath `into`, with those of its dependencies whose
    /// names `follow` accepts; installs nothing.
    pub fn unpack(
        &self,
        suite: &str,
        package: &str,
        follow: impl Fn(&str) -> bool,
        into: &Path,
    ) -> Result<Vec<String>> {
        let options = self.sources(suite, Own::Without)?;
        self.apt_get(&options).args(["update"]).run()?;
        let mut names = vec![package.to_string()];
        let mut at = 0;
        while let Some(name) = names.get(at) {
            let found = tool("apt-cache", &options).args(["depends", name]).out()?;
            let depends = found.lines().filter_map(|line| line.trim().strip_prefix("Depends: "));
            for depend in depends.filter(|depend| follow(depend)) {
                if !names.iter().any(|known| known == depend) {
                    names.push(depend.to_string());
                }
            }
            at += 1;
        }
        let debs = place::cache().join("apt").join(suite).join("debs");
        if debs.exists() {
            fs::remove_dir_all(&debs)?;
        }
        fs::create_dir_all(&debs)?;
        note(&format!("setup: apt-get download {} from {suite}", names.join(" ")));
        self.apt_get(&options).args(["download"]).args(&names).within(&debs).run()?;
        for deb in fs::read_dir(&debs)? {
            tool("dpkg", ["-x"]).args([deb?.path()]).args([into]).limit(LIMIT).run()?;
        }
        fs::remove_dir_all(&debs)?;
        Ok(names)
    }

    fn apt_get(&self, options: &[String]) -> Tool {
        let fixed = ["-y", "--no-install-recommends", "-o", "DPkg::Lock::Timeout=600"];
        let quiet = ["-o", "APT::Get::List-Cleanup=0", "-o", "Acquire::Retries=3"];
        let apt = if self.sudo {
            tool("sudo", ["-n", "env", "DEBIAN_FRONTEND=noninteractive", "apt-get"])
        } else {
            tool("apt-get", NO_ARGS).env("DEBIAN_FRONTEND", "noninteractive")
        };
        apt.args(fixed).args(quiet).args(options).limit(LIMIT)
    }

    /// Writes a private list of sources for `suite`; returns the options that make apt use it.
    fn sources(&self, suite: &str, own: Own) -> Result<Vec<String>> {
        let dir = place::cache().join("apt").join(suite);
        let parts = dir.join("parts");
        for made in [parts.clone(), dir.join("lists/partial"), dir.join("archives/partial")] {
            fs::create_dir_all(&made).with_context(|| format!("creating {}", made.display()))?;
        }
        if own == Own::Beside {
            for file in own_sources() {
                let name = file.file_name().ok_or_else(|| anyhow!("{file:?} has no name"))?;
                fs::copy(&file, parts.join(name))?;
            }
        }
        let text = format!(
            "Types: deb\nURIs: {}\nSuites: {suite}\nComponents: main\nSigned-By: {}\n",
            self.mirror, self.keyring
        );
        fs::write(parts.join("underlay-rig.sources"), text)?;
        let option = |key: &str, value: &Path| format!("{key}={}", value.display());
        let pairs = [
            option("Dir::Etc::sourcelist", Path::new("/dev/null")),
            option("Dir::Etc::sourceparts", &parts),
            option("Dir::State::lists", &dir.join("lists")),
            option("Dir::Cache::pkgcache", Path::new("")),
            option("Dir::Cache::srcpkgcache", Path::new("")),
        ];
        Ok(pairs.into_iter().flat_map(|pair| ["-o".to_string(), pair]).collect())
    }
}

/// Whether the machine's own sources stand beside the added suite.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Own {
    Beside,
    Without,
}

/// The machine's own lists of sources.
fn own_sources() -> Vec<PathBuf> {
    let mut files = vec![PathBuf::from("/etc/apt/sources.list")];
    if let Ok(parts) = fs::read_dir("/etc/apt/sources.list.d") {
        files.extend(parts.flatten().map(|entry| entry.path()));
    }
    files.retain(|file| {
        file.is_file() && file.extension().is_some_and(|end| end == "list" || end == "sources")
    });
    files
}

/// The mirror from which the machine gets `codename`, in either notation of apt.
fn mirror(codename: &str) -> Result<String> {
    for file in own_sources() {
        let text = fs::read_to_string(&file).unwrap_or_default();
        for paragraph in text.split("\n\n") {
            let field = |key: &str| {
                let line = paragraph.lines().find_map(|line| line.strip_prefix(key));
                line.map(str::trim).unwrap_or_default().to_string()
            };
            if field("Suites:").split_whitespace().any(|suite| suite == codename)
                && let Some(mirror) = field("URIs:").split_whitespace().next()
            {
                return Ok(mirror.to_string());
            }
        }
        for line in text.lines() {
            let mut words = line.split_whitespace().filter(|word| !word.contains('='));
            let words: Vec<_> = words.by_ref().filter(|word| !word.starts_with('[')).collect();
            if let ["deb", mirror, suite, ..] = words[..]
                && suite == codename
            {
                return Ok(mirror.to_string());
            }
        }
    }
    bail!("no apt source of this machine offers {codename}")
}
