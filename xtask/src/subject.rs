//! What a rig is pointed at: the daemon, or a stand-in made of qemu-nbd that proves the rig itself.
//!
//! The stand-in serves the same exports under the same names: `image/NAME` from the qcow2 itself,
//! `replica/NAME` from a qcow2 overlay on it. A rig must pass against it. With [`Against::Careless`]
//! its replicas are nbdkit's with a cache that keeps writes to itself and acknowledges flushes that
//! it never does: a rig that tests durability must fail then.

use std::fs;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use clap::ValueEnum;

use crate::daemon::Daemon;
use crate::lab::Lab;
use crate::place::Profile;
use crate::setup;
use crate::tool::{Process, tool};

/// What to point the rigs at.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Against {
    /// The daemon of this repository.
    Underlay,
    /// qemu-nbd on qcow2 overlays: proves that the rigs accept what is right.
    QemuNbd,
    /// Replicas on nbdkit, which ignores flushes: proves that the rigs notice what is wrong.
    Careless,
}

/// Something that serves one image and replicas of it.
pub enum Subject {
    /// The daemon.
    Underlay(Daemon),
    /// The stand-in.
    StandIn(StandIn),
}

impl Subject {
    /// Starts it with nothing to serve, on `disks`: (name, directory).
    pub fn start(
        lab: &Lab,
        dir: &Path,
        against: Against,
        disks: &[(&str, &Path)],
    ) -> Result<Subject> {
        if against != Against::Underlay {
            setup::need(&["qemu-nbd", "qemu-img", "nbdkit"])?;
            let disks = disks.iter().map(|(name, path)| (name.to_string(), path.to_path_buf()));
            let sockets = lab.socket("");
            return Ok(Subject::StandIn(StandIn {
                careless: against == Against::Careless,
                disks: disks.collect(),
                image: None,
                exports: Vec::new(),
                sockets,
                log: dir.join("qemu-nbd.log"),
            }));
        }
        let name = dir.file_name().and_then(|name| name.to_str()).unwrap_or("daemon");
        let daemon = Daemon::start(lab, dir, name, Profile::Debug, "")?;
        for (name, path) in disks {
            daemon.ok(&["disk", "add", text(path)?, "--name", name])?;
        }
        Ok(Subject::Underlay(daemon))
    }

    /// Brings the image in, onto `disk`.
    pub fn import(&mut self, source: &Path, name: &str, disk: &str) -> Result<()> {
        match self {
            Subject::Underlay(daemon) => {
                daemon.ok(&["image", "import", text(source)?, "--name", name, "--disk", disk])?;
                Ok(())
            }
            Subject::StandIn(stand_in) => stand_in.import(source, name, disk),
        }
    }

    /// Makes a replica of the image on `disk`.
    pub fn replica(&mut self, name: &str, image: &str, disk: &str) -> Result<()> {
        match self {
            Subject::Underlay(daemon) => {
                daemon.ok(&["replica", "create", name, "--image", image, "--disk", disk])?;
                Ok(())
            }
            Subject::StandIn(stand_in) => stand_in.replica(name, disk),
        }
    }

    /// The address of an export, as NBD clients take it.
    pub fn uri(&self, export: &str) -> String {
        format!("nbd+unix:///{export}?socket={}", self.socket(export).display())
    }

    /// The socket that serves an export.
    pub fn socket(&self, export: &str) -> PathBuf {
        match self {
            Subject::Underlay(daemon) => daemon.nbd().to_path_buf(),
            Subject::StandIn(stand_in) => stand_in.socket(export),
        }
    }

    /// Kills it as SIGKILL does.
    pub fn kill(&mut self) -> Result<()> {
        match self {
            Subject::Underlay(daemon) => daemon.kill(),
            Subject::StandIn(stand_in) => {
                stand_in.exports.iter_mut().try_for_each(|export| export.process.kill())
            }
        }
    }

    /// Ends it as SIGTERM does.
    pub fn stop(&mut self) -> Result<()> {
        match self {
            Subject::Underlay(daemon) => daemon.stop(),
            Subject::StandIn(stand_in) => stand_in
                .exports
                .iter_mut()
                .try_for_each(|export| export.process.terminate(Duration::from_secs(20)).map(drop)),
        }
    }

    /// Starts it again.
    pub fn restart(&mut self) -> Result<()> {
        match self {
            Subject::Underlay(daemon) => daemon.restart(),
            Subject::StandIn(stand_in) => stand_in.restart(),
        }
    }

    /// Fails if it is not well, or finds something inconsistent about its own files.
    pub fn healthy(&mut self) -> Result<()> {
        match self {
            Subject::Underlay(daemon) => {
                daemon.healthy()?;
                daemon.ok(&["fsck"]).map(drop)
            }
            Subject::StandIn(stand_in) => {
                for export in &mut stand_in.exports {
                    if !export.process.alive() {
                        bail!("{} is gone: {}", export.name, export.process.said());
                    }
                }
                Ok(())
            }
        }
    }
}

/// One qemu-nbd for each export.
pub struct StandIn {
    careless: bool,
    disks: Vec<(String, PathBuf)>,
    image: Option<PathBuf>,
    exports: Vec<Export>,
    sockets: PathBuf,
    log: PathBuf,
}

struct Export {
    name: String,
    file: PathBuf,
    process: Process,
}

impl StandIn {
    fn import(&mut self, source: &Path, name: &str, disk: &str) -> Result<()> {
        let file = self.disk(disk)?.join("image.qcow2");
        fs::copy(source, &file).context("copying the image")?;
        self.image = Some(file.clone());
        self.add(format!("image/{name}"), file)
    }

    fn replica(&mut self, name: &str, disk: &str) -> Result<()> {
        let base = self.image.clone().ok_or_else(|| anyhow!("no image was imported"))?;
        let file = self.disk(disk)?.join(format!("{name}.qcow2"));
        if self.careless {
            tool("qemu-img", ["convert", "-O", "raw"]).args([&base, &file]).run()?;
            return self.add(format!("replica/{name}"), file);
        }
        tool("qemu-img", ["create", "-q", "-f", "qcow2", "-F", "qcow2", "-b"])
            .args([&base, &file])
            .run()?;
        self.add(format!("replica/{name}"), file)
    }

    fn add(&mut self, name: String, file: PathBuf) -> Result<()> {
        let process = self.serve(&name, &file)?;
        self.exports.push(Export { name, file, process });
        Ok(())
    }

    fn restart(&mut self) -> Result<()> {
        for at in 0..self.exports.len() {
            let export = &self.exports[at];
            self.exports[at].process = self.serve(&export.name, &export.file)?;
        }
        Ok(())
    }

    fn serve(&self, name: &str, file: &Path) -> Result<Process> {
        let socket = self.socket(name);
        let _ = fs::remove_file(&socket);
        let replica = name.starts_with("replica/");
        let server = if self.careless && replica {
            tool("nbdkit", ["-f", "--filter=fua", "--filter=cache", "-e", name, "-U"])
                .args([&socket])
                .args(["file", "cache=unsafe", "fuamode=emulate"])
        } else {
            tool("qemu-nbd", ["-t", "-f", "qcow2", "-e", "64", "-x", name, "--discard=unmap"])
                .args(if replica { &["-k"][..] } else { &["-r", "-k"] })
                .args([&socket])
        };
        let mut process = server.args([file]).background(&self.log)?;
        process.until(Duration::from_secs(20), || UnixStream::connect(&socket).is_ok())?;
        Ok(process)
    }

    fn socket(&self, export: &str) -> PathBuf {
        self.sockets.join(format!("{}.sock", export.replace('/', "-")))
    }

    fn disk(&self, name: &str) -> Result<&Path> {
        let disk = self.disks.iter().find(|(known, _)| known == name);
        disk.map(|(_, path)| path.as_path()).ok_or_else(|| anyhow!("no disk {name}"))
    }
}

/// A path as text; those that the rig makes always are.
pub fn text(path: &Path) -> Result<&str> {
    path.to_str().with_context(|| format!("{} is not UTF-8", path.display()))
}
