//! Bad input, as a user, a client, a file or a bit may bring it: a clear error, nothing lost.
//!
//! Invariants checked, none of which needs root:
//! - names with slashes, dots, newlines, 4,000 characters are refused by every command and by NBD;
//! - an image that is truncated, garbage, leads to other files, or isn't what its digest says, is
//!   refused with its name, and nothing of it stays;
//! - a disk, or a state, serves one daemon: the second is told so, the first notices nothing;
//! - a map file with a flipped bit is refused with the replica's name, or what was written is read.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use fastrand::Rng;

use crate::daemon::Daemon;
use crate::lab::Lab;
use crate::nbd::Client;
use crate::place::Profile;
use crate::report::Report;
use crate::subject::text;
use crate::tool::tool;
use crate::{pattern, setup};

/// Size of the images here, in bytes.
const SIZE: u64 = 4 << 20;
/// Replicas whose maps are damaged, each in another byte, after a clean stop; as many after a kill.
const DAMAGED: usize = 400;

/// Runs the rig.
pub fn run(lab: &Lab, seed: u64, report: &mut Report) {
    if let Err(error) = setup::need(&["qemu-img"]) {
        return report.skip("hostile", &format!("{error:#}"));
    }
    report.check("hostile: names", || names(lab));
    report.check("hostile: images", || images(lab));
    report.check("hostile: a second daemon", || second_daemon(lab));
    for end in [End::Stop, End::Kill] {
        let name = format!("hostile: maps with a flipped bit, after a {end:?} (seed {seed})");
        report.check(&name, || damaged_maps(lab, end, seed));
    }
}

/// A daemon with the disk `disk` in a directory, and the image `base` on it.
pub fn node(lab: &Lab, name: &str) -> Result<(PathBuf, Daemon)> {
    let dir = lab.dir(name)?;
    let disk = dir.join("disk");
    fs::create_dir_all(&disk)?;
    pattern::image(&dir.join("base.raw"), SIZE, 3)?;
    let daemon = Daemon::start(lab, &dir, name, Profile::Debug, "")?;
    daemon.ok(&["disk", "add", text(&disk)?, "--name", "disk"])?;
    daemon.ok(&["image", "import", text(&dir.join("base.raw"))?, "--name", "base"])?;
    Ok((dir, daemon))
}

fn names(lab: &Lab) -> Result<String> {
    let (dir, mut daemon) = node(lab, "names")?;
    let long = "x".repeat(4000);
    let bad = [
        "a/b",
        "../../etc",
        "/etc/passwd",
        ".",
        "..",
        "",
        " ",
        "a b",
        "a\nb",
        "\n",
        "a\tb",
        "a\u{7f}",
        "é",
        "\u{202e}x",
        "-rf",
        "%2e%2e",
        "replica/x",
        "a\\b",
        "*",
        "$(id)",
        long.as_str(),
    ];
    let image = dir.join("base.raw");
    for name in bad {
        let option = format!("--name={name}");
        let shown =
            if name.len() < 100 && name.chars().all(|c| c.is_ascii_graphic()) { name } else { "" };
        let extra = dir.join("extra");
        fs::create_dir_all(&extra)?;
        daemon.refused(&["disk", "add", text(&extra)?, &option], &[shown])?;
        daemon.refused(&["image", "import", text(&image)?, &option], &[shown])?;
        let create = ["replica", "create", "--image=base", "--disk=disk", "--", name];
        daemon.refused(&create, &[shown])?;
        for noun in ["image", "replica", "disk"] {
            daemon.refused(&[noun, "inspect", "--", name], &[])?;
        }
        daemon.refused(&["replica", "rm", "--", name], &[])?;
        for export in [name.to_string(), format!("replica/{name}"), format!("image/{name}")] {
            if Client::open(daemon.nbd(), &export).is_ok() {
                bail!("NBD serves an export called {export:?}");
            }
        }
        daemon.healthy()?;
    }
    let status = daemon.json(&["status"])?;
    let count = |what: &str| status[what].as_array().map(Vec::len);
    ensure!(count("disks") == Some(1), "disks: {}", status["disks"]);
    ensure!(count("images") == Some(1), "images: {}", status["images"]);
    ensure!(count("replicas") == Some(0), "replicas: {}", status["replicas"]);
    ensure!(fs::read_dir(dir.join("extra"))?.count() == 0, "a refused disk was written to");
    daemon.stop()?;
    Ok(format!("{} names", bad.len()))
}

fn images(lab: &Lab) -> Result<String> {
    let (dir, mut daemon) = node(lab, "images")?;
    let raw = dir.join("base.raw");
    let file = |name: &str| dir.join(name);
    let qcow2 = file("whole.qcow2");
    tool("qemu-img", ["convert", "-c", "-O", "qcow2"]).args([&raw, &qcow2]).run()?;
    let whole = fs::read(&qcow2)?;
    let mut bad: Vec<(PathBuf, &[&str])> = Vec::new();
    for part in [1, 7, 20, 50, 80, 95, 99] {
        let cut = file(&format!("cut-{part}.qcow2"));
        fs::write(&cut, &whole[..whole.len() * part / 100])?;
        bad.push((cut, &[]));
    }
    for (name, content) in [("empty", &b""[..]), ("magic.qcow2", b"QFI\xfb")] {
        fs::write(file(name), content)?;
        bad.push((file(name), &[]));
    }
    for (program, end) in [("gzip", "gz"), ("xz", "xz"), ("zstd", "zst")] {
        let (packed, cut) = (file("packed"), file(&format!("cut.{end}")));
        tool(program, ["-1", "-c"]).args([&raw]).into_file(&packed)?;
        let packed = fs::read(&packed)?;
        fs::write(&cut, &packed[..packed.len() * 2 / 3])?;
        bad.push((cut, &[]));
    }
    // A random header: a qcow2 by its magic and version, nonsense otherwise.
    let mut noise = b"QFI\xfb\0\0\0\x03".to_vec();
    noise.resize(1 << 20, 0);
    Rng::with_seed(8).fill(&mut noise[8..]);
    fs::write(file("noise.qcow2"), noise)?;
    bad.push((file("noise.qcow2"), &[]));
    let leads = file("backed.qcow2");
    tool("qemu-img", ["create", "-q", "-f", "qcow2", "-u", "-b", "/etc/passwd", "-F", "raw"])
        .args([leads.as_os_str(), "4M".as_ref()])
        .run()?;
    bad.push((leads, &[]));
    let outside = file("outside.qcow2");
    let option = format!("data_file={}", file("data.raw").display());
    tool("qemu-img", ["create", "-q", "-f", "qcow2", "-o", &option])
        .args([outside.as_os_str(), "4M".as_ref()])
        .run()?;
    bad.push((outside, &[]));
    bad.push((file("is-not-there"), &[]));
    bad.push((file("disk"), &[]));
    bad.push((
        raw.clone(),
        &["--sha256=0000000000000000000000000000000000000000000000000000000000000000"],
    ));
    bad.push((raw.clone(), &["--sha256=12345"]));
    bad.push((raw.clone(), &["--format=qcow2"]));
    bad.push((raw.clone(), &["--disk=nowhere"]));
    for (source, options) in &bad {
        let mut import = vec!["image", "import", text(source)?, "--name=bad"];
        import.extend(*options);
        let name = source.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        // Where the option is what is bad, that is what the error must name.
        let named = if options.is_empty() { name } else { "" };
        daemon.refused(&import, &[named])?;
        let list = daemon.json(&["image", "list"])?.to_string();
        ensure!(!list.contains("\"bad\""), "after {import:?} the image is there: {list}");
        let left = fs::read_dir(dir.join("disk/underlay/images"))?.count();
        ensure!(left == 1, "after {import:?} there are {left} directories of images, not 1");
    }
    daemon.refused(&["image", "import", text(&raw)?, "--name=base"], &["base"]).or_else(|_| {
        // The same content under the same name once more may also simply be done already.
        daemon.ok(&["image", "import", text(&raw)?, "--name=base"]).map(|_| String::new())
    })?;
    daemon.ok(&["image", "verify", "base"])?;
    daemon.stop()?;
    Ok(format!("{} bad sources", bad.len()))
}

fn second_daemon(lab: &Lab) -> Result<String> {
    let (dir, mut daemon) = node(lab, "first")?;
    let twin = daemon.twin(lab, "twin")?;
    let said = twin.said();
    ensure!(twin.code == 1, "a second daemon on one state ended with {}: {said}", twin.code);
    ensure!(!said.contains("panicked"), "{said}");
    let mut other = Daemon::start(lab, &dir, "other", Profile::Debug, "")?;
    let disk = dir.join("disk");
    let said = other.refused(&["disk", "add", text(&disk)?, "--name", "mine"], &[text(&disk)?])?;
    let clear = ["used by", "in use", "another", "locked"];
    ensure!(clear.iter().any(|word| said.contains(word)), "not clear that it is taken: {said}");
    other.stop()?;
    daemon.healthy()?;
    daemon.ok(&["replica", "create", "vm", "--image=base", "--disk=disk"])?;
    Client::open(daemon.nbd(), "replica/vm")?.write(0, &[1; 512], 0)?;
    daemon.stop()?;
    Ok(String::new())
}

/// How the daemon ended before the maps were damaged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    /// By SIGTERM: the maps were written whole.
    Stop,
    /// By SIGKILL: the journals hold what is newest.
    Kill,
}

fn damaged_maps(lab: &Lab, end: End, seed: u64) -> Result<String> {
    let (dir, mut daemon) = node(lab, "maps")?;
    for at in 0..DAMAGED {
        let (name, option) = (format!("vm{at}"), "--image=base");
        daemon.ok(&["replica", "create", &name, option, "--disk=disk"])?;
    }
    let mut content = fs::read(dir.join("base.raw"))?;
    content[8192..28_192].fill(7);
    content[1 << 20..(1 << 20) + (1 << 16)].fill(0);
    content[2 << 20..(2 << 20) + 4096].fill(9);
    for at in 0..DAMAGED {
        let mut client = Client::open(daemon.nbd(), &format!("replica/vm{at}"))?;
        client.write(8192, &[7; 20_000], 0)?;
        client.zero(1 << 20, 1 << 16, 0)?;
        client.flush()?;
        client.write(2 << 20, &[9; 4096], 0)?;
        client.flush()?;
    }
    let list = daemon.json(&["replica", "list"])?;
    match end {
        End::Stop => daemon.stop()?,
        End::Kill => daemon.kill()?,
    }
    let replicas = list.as_array().context("replica list is no list")?;
    let mut rng = Rng::with_seed(seed);
    let mut damage = Vec::new();
    for (at, replica) in replicas.iter().enumerate() {
        let id = replica["id"].as_str().context("a replica without id")?;
        let name = replica["name"].as_str().context("a replica without name")?;
        let map = dir.join("disk/underlay/replicas").join(id).join("map");
        damage.push((name.to_string(), flip(&map, at, &mut rng)?));
    }
    daemon.restart()?;
    let (mut refused, mut whole) = (0, 0);
    for (name, byte) in &damage {
        let export = format!("replica/{name}");
        match Client::open(daemon.nbd(), &export) {
            Err(error) => {
                let said = format!("{error:#}");
                ensure!(said.contains(name.as_str()), "byte {byte}: does not name {name}: {said}");
                refused += 1;
            }
            Ok(mut client) => {
                let found = client.read_all(SIZE).with_context(|| format!("byte {byte}"))?;
                if let Some(differs) = pattern::differ(&found, &content) {
                    bail!("byte {byte} of the map of {name} flipped: byte {differs} reads wrong");
                }
                whole += 1;
            }
        }
        daemon.healthy()?;
    }
    daemon.ok(&["status"])?;
    daemon.stop()?;
    ensure!(refused > 0 && whole > 0, "{refused} refused, {whole} read: something is not tested");
    Ok(format!("{} flips: {refused} refused, {whole} read whole", damage.len()))
}

/// Flips one bit of the map: three of four in bytes that hold something, spread over all of them,
/// the fourth anywhere.
fn flip(map: &Path, number: usize, rng: &mut Rng) -> Result<u64> {
    let bytes = fs::read(map).with_context(|| format!("reading {}", map.display()))?;
    let held: Vec<_> = (0..bytes.len()).filter(|at| bytes[*at] != 0).collect();
    let at = match number % 4 {
        0 => rng.usize(..bytes.len()),
        _ => held[number * held.len() / DAMAGED],
    };
    let byte = bytes[at] ^ (1 << rng.u8(..8));
    let file = File::options().write(true).open(map)?;
    file.write_all_at(&[byte], at as u64)?;
    file.sync_all()?;
    Ok(at as u64)
}
