//! Outside clients, each against a reference file: qemu's, libnbd's, fio, a kernel file system.
//!
//! Invariants checked, on the image and on a replica:
//! - every client reads exactly the reference's bytes, however it cuts its requests;
//! - a map never calls zero what is not, and finds the large holes;
//! - whatever a client writes is read back by another: patterns, zeroes, unaligned pieces, whole
//!   disks, a file system with files on it;
//! - the image refuses writes; nothing that happens to one replica shows in another or in the image;
//! - all of it is still there after a restart.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use fastrand::Rng;
use serde_json::Value;

use crate::lab::{Lab, loop_disks};
use crate::nbd::{Client, EINVAL, EPERM, Failure};
use crate::report::Report;
use crate::subject::{Against, Subject, text};
use crate::tool::{json, tool};
use crate::{pattern, setup};

/// The size of the image, in bytes: its last block is not whole, its last chunk neither.
const SIZE: u64 = (96 << 20) + 3 * 512;
/// A hole at least so long must be found by a map.
const HOLE: u64 = 1 << 20;
/// How many files go onto the file system.
const FILES: u64 = 200;
/// How many random operations qemu-io gets.
const OPERATIONS: usize = 400;

/// Runs the rig.
pub fn run(lab: &Lab, against: Against, seed: u64, report: &mut Report) {
    let programs = ["qemu-img", "qemu-io", "nbdinfo", "nbdcopy", "nbdsh", "fio", "cmp"];
    if let Err(error) = setup::need(&programs) {
        return report.skip("clients", &format!("{error:#}"));
    }
    if let Err(error) = job(lab, against, seed, report) {
        report.broken("clients", &error);
    }
}

fn job(lab: &Lab, against: Against, seed: u64, report: &mut Report) -> Result<()> {
    let dir = lab.dir("clients")?;
    let (raw, qcow2) = (dir.join("base.raw"), dir.join("base.qcow2"));
    pattern::image(&raw, SIZE, seed)?;
    tool("qemu-img", ["convert", "-c", "-O", "qcow2"]).args([&raw, &qcow2]).run()?;
    let disks = ["a", "b"].map(|name| (name, dir.join(name)));
    for (_, path) in &disks {
        fs::create_dir_all(path)?;
    }
    let disks = disks.each_ref().map(|(name, path)| (*name, path.as_path()));
    let mut subject = Subject::start(lab, &dir, against, &disks)?;
    subject.import(&qcow2, "base", "a")?;
    for replica in ["still", "io", "sh", "fio", "copy", "fs"] {
        subject.replica(replica, "base", "b")?;
    }
    for export in ["image/base", "replica/still"] {
        let bench = Bench { dir: &dir, uri: subject.uri(export), reference: raw.clone(), export };
        reading(&bench, report);
    }
    report.check("clients: image/base refuses writes", || refuses(&subject, against));

    let bench = |export| -> Result<Bench> {
        let reference = dir.join("reference.raw");
        tool("cp", ["--sparse=always"]).args([&raw, &reference]).run()?;
        Ok(Bench { dir: &dir, uri: subject.uri(export), reference, export })
    };
    let io = bench("replica/io")?;
    report.check("clients: qemu-io patterns", || qemu_io(&io, seed));
    let kept = dir.join("kept.raw");
    fs::copy(&io.reference, &kept)?;
    report.check("clients: nbdsh, unaligned at every small offset", || nbdsh(&subject, &raw));
    report.check("clients: fio --verify", || fio(&dir, &subject.uri("replica/fio")));
    report
        .check("clients: nbdcopy onto a replica and back", || copy(&bench("replica/copy")?, seed));
    let name = "clients: nbdfuse + loop + mkfs + fsck";
    match fuse_ready() {
        Err(error) => report.skip(name, &format!("{error:#}")),
        Ok(()) => {
            report.check(name, || fuse(&dir, &subject.uri("replica/fs")));
        }
    }
    report.check("clients: after a restart, what was written is there, the rest untouched", || {
        subject.stop()?;
        subject.restart()?;
        subject.healthy()?;
        compare(&subject.uri("replica/io"), &kept)?;
        compare(&subject.uri("replica/still"), &raw)?;
        compare(&subject.uri("image/base"), &raw)?;
        Ok(String::new())
    });
    subject.stop()
}

/// One export and the file that it must equal.
struct Bench<'a> {
    dir: &'a Path,
    uri: String,
    reference: PathBuf,
    export: &'a str,
}

fn reading(bench: &Bench, report: &mut Report) {
    let name = |what: &str| format!("clients: {} {what}", bench.export);
    let out = bench.dir.join("out");
    report.check(&name("qemu-img compare"), || {
        compare(&bench.uri, &bench.reference)?;
        Ok(String::new())
    });
    report.check(&name("qemu-img convert to raw and to qcow2"), || {
        for format in ["raw", "qcow2"] {
            tool("qemu-img", ["convert", "-f", "raw", "-O", format, &bench.uri])
                .args([&out])
                .run()?;
            tool("qemu-img", ["compare", "-F", format, "-f", "raw"])
                .args([&bench.reference, &out])
                .run()?;
        }
        Ok(String::new())
    });
    report.check(&name("qemu-img map"), || {
        let map = tool("qemu-img", ["map", "-f", "raw", "--output=json", &bench.uri]).out()?;
        let zero = |extent: &Value| Some(extent["zero"].as_bool()? || !extent["data"].as_bool()?);
        map_agrees(&json(&map)?, ("start", "length"), zero, &bench.reference)
    });
    report.check(&name("nbdinfo --map"), || {
        let map = tool("nbdinfo", ["--map", "--json", &bench.uri]).out()?;
        let zero = |extent: &Value| Some(extent["type"].as_u64()? & 2 != 0);
        map_agrees(&json(&map)?, ("offset", "length"), zero, &bench.reference)
    });
    report.check(&name("nbdinfo --map=x-underlay:source"), || {
        let args = ["--map=x-underlay:source", "--json", &bench.uri];
        let map = tool("nbdinfo", args).out()?;
        let zero = |extent: &Value| Some(extent["type"].as_u64()? == 0);
        map_agrees(&json(&map)?, ("offset", "length"), zero, &bench.reference)
    });
    report.check(&name("nbdinfo"), || info(bench));
    report.check(&name("nbdcopy to a file and to a pipe"), || {
        tool("nbdcopy", [bench.uri.as_ref(), out.as_os_str()]).run()?;
        tool("cmp", [&bench.reference, &out]).run()?;
        tool("nbdcopy", [&bench.uri, "-"]).into_file(&out)?;
        tool("cmp", [&bench.reference, &out]).run()?;
        Ok(String::new())
    });
}

fn compare(uri: &str, reference: &Path) -> Result<()> {
    let same = tool("qemu-img", ["compare", "-f", "raw", "-F", "raw", uri]).args([reference]);
    same.run().with_context(|| format!("{uri} is not {}", reference.display()))
}

fn info(bench: &Bench) -> Result<String> {
    let info = json(&tool("nbdinfo", ["--json", &bench.uri]).out()?)?;
    let export = &info["exports"][0];
    ensure!(export["export-size"] == SIZE, "size {} is not {SIZE}", export["export-size"]);
    let read_only = bench.export.starts_with("image/");
    let flags = [
        ("is_read_only", read_only),
        ("can_flush", true),
        ("can_multi_conn", true),
        ("can_fua", !read_only),
        ("can_trim", !read_only),
        ("can_zero", !read_only),
    ];
    for (flag, want) in flags {
        // An image may well offer what only writers want; a replica must.
        if (want || flag == "is_read_only") && export[flag] != want {
            bail!("{flag} is {}, not {want}", export[flag]);
        }
    }
    let contexts = export["contexts"].to_string();
    ensure!(contexts.contains("base:allocation"), "no base:allocation but {contexts}");
    ensure!(contexts.contains("x-underlay:source"), "no x-underlay:source but {contexts}");
    Ok(String::new())
}

/// A map must cover the reference without gap or overlap, call zero only what is, and know holes.
fn map_agrees(
    map: &Value,
    (start, length): (&str, &str),
    zero: impl Fn(&Value) -> Option<bool>,
    reference: &Path,
) -> Result<String> {
    let all = fs::read(reference)?;
    let extents = map.as_array().context("a map is a list")?;
    let (mut at, mut zeroes, mut unseen) = (0, 0, 0u64);
    for extent in extents {
        let from = extent[start].as_u64().context("an extent without start")?;
        let len = extent[length].as_u64().context("an extent without length")?;
        ensure!(from == at && len > 0, "extent at {from} of {len} bytes, after {at}");
        at += len;
        let content = all.get(usize::try_from(from)?..usize::try_from(at)?);
        let content = content.with_context(|| format!("extent at {from} ends beyond the end"))?;
        if zero(extent).with_context(|| format!("not an extent: {extent}"))? {
            zeroes += len;
            if let Some(byte) = content.iter().position(|byte| *byte != 0) {
                bail!("byte {} is called zero and is not", from + byte as u64);
            }
        } else {
            // Whole aligned MiBs of zeros within what is called data: holes that were not found.
            let lead = (from.next_multiple_of(HOLE) - from).min(len);
            let holes = content[usize::try_from(lead)?..].chunks_exact(1 << 20);
            unseen += holes.filter(|hole| hole.iter().all(|byte| *byte == 0)).count() as u64;
        }
    }
    ensure!(at == all.len() as u64, "the map ends at {at}, not {}", all.len());
    ensure!(zeroes > 0 && unseen == 0, "{unseen} MiB of holes are called data");
    Ok(format!("{} extents, {} MiB zero", extents.len(), zeroes >> 20))
}

fn refuses(subject: &Subject, against: Against) -> Result<String> {
    // The protocol says EPERM; qemu-nbd, not ours to judge, says EINVAL.
    let want = if against == Against::Underlay { EPERM } else { EINVAL };
    let mut client = Client::open(&subject.socket("image/base"), "image/base")?;
    let tries = [
        ("write", client.write(0, &[1; 4096], 0)),
        ("write zeroes", client.zero(0, 4096, 0)),
        ("trim", client.trim(0, 4096, 0)),
    ];
    for (what, outcome) in tries {
        match outcome {
            Err(Failure::Refused(code)) => {
                ensure!(code == want, "{what}: error {code}, not {want}")
            }
            Err(Failure::Lost(error)) => bail!("{what}: {error:#}"),
            Ok(()) => bail!("{what} was accepted"),
        }
    }
    let uri = subject.uri("image/base");
    let outcome = tool("qemu-io", ["-f", "raw", "-c", "write -P 1 0 4096", &uri]).outcome()?;
    ensure!(outcome.code != 0, "qemu-io could write to an image");
    Ok(String::new())
}

/// Random operations through one qemu-io, the same on the reference file, then a comparison.
fn qemu_io(bench: &Bench, seed: u64) -> Result<String> {
    let mut rng = Rng::with_seed(seed ^ 0x10);
    let file = File::options().write(true).open(&bench.reference)?;
    let mut commands = String::new();
    for number in 0..OPERATIONS {
        let unit = [1, 512, 4096, 65536][rng.usize(..4)];
        let at = rng.u64(..SIZE / unit) * unit;
        let len = (rng.u64(1..=64) * unit).min(SIZE - at).min(1 << 20);
        let byte = u8::try_from(number % 255)? + 1;
        let fua = ["", "-f "][rng.usize(..2)];
        match rng.u8(..8) {
            0 | 1 => {
                file.write_all_at(&vec![0; usize::try_from(len)?], at)?;
                let unmap = ["", "-u "][rng.usize(..2)];
                commands += &format!("write {fua}-z {unmap}{at} {len}\n");
            }
            2 => commands += "flush\n",
            _ => {
                file.write_all_at(&vec![byte; usize::try_from(len)?], at)?;
                commands += &format!("write {fua}-P {byte} {at} {len}\n");
                commands += &format!("read -P {byte} {at} {len}\n");
            }
        }
    }
    let said = tool("qemu-io", ["-f", "raw", &bench.uri]).input(commands).out()?;
    if let Some(line) = said.lines().find(|line| line.contains("verification failed")) {
        bail!("{line}");
    }
    compare(&bench.uri, &bench.reference)?;
    Ok(format!("{OPERATIONS} operations"))
}

/// Reads, writes, zeroes and trims at every alignment, through libnbd, against a bytearray.
const UNALIGNED: &str = r#"
import random, os
random.seed(7)
size = h.get_size()
model = bytearray(open(os.environ["REFERENCE"], "rb").read())
assert len(model) == size, (len(model), size)
def check(at, n):
    got = h.pread(n, at)
    assert got == model[at:at+n], "reading %d bytes at %d" % (n, at)
offsets = list(range(0, 20)) + [511, 512, 513, 4095, 4096, 4097, 8191, 8193, 262143, 262144, 262145]
lengths = [1, 2, 511, 512, 513, 4095, 4096, 4097, 8192, 12289]
for at in offsets:
    for n in lengths:
        for place in (at, (32 << 20) + at, size - at - n):
            check(place, n)
count = 0
for at in offsets:
    for n in lengths:
        for place in ((3 << 20) + at, size - at - n):
            kind = random.randrange(6)
            flags = random.choice((0, nbd.CMD_FLAG_FUA))
            if kind == 0:
                h.zero(n, place, flags | random.choice((0, nbd.CMD_FLAG_NO_HOLE)))
                model[place:place+n] = bytes(n)
            elif kind == 1:
                before = model[place:place+n]
                h.trim(n, place, flags)
                after = h.pread(n, place)
                for i in range(n):
                    assert after[i] in (0, before[i]), "trim at %d left %d" % (place + i, after[i])
                model[place:place+n] = after
            else:
                data = random.randbytes(n)
                h.pwrite(data, place, flags)
                model[place:place+n] = data
            check(max(0, place - 600), min(n + 1200, size - max(0, place - 600)))
            count += 1
for bad, n in ((size, 1), (size - 1, 2), (1 << 62, 512)):
    for what in ("pread", "pwrite", "zero", "trim"):
        try:
            h.set_strict_mode(0)
            if what == "pread": h.pread(n, bad)
            elif what == "pwrite": h.pwrite(bytes(n), bad)
            else: getattr(h, what)(n, bad)
        except nbd.Error as error:
            want = ("EINVAL",) if what in ("pread", "trim") else ("ENOSPC", "EINVAL")
            assert error.errno in want, "%s past the end: %s" % (what, error.errno)
        else:
            raise Exception("%s past the end was accepted" % what)
h.flush()
at = 0
while at < size:
    n = min(1 << 20, size - at)
    check(at, n)
    at += n
print("%d writes" % count)
"#;

fn nbdsh(subject: &Subject, raw: &Path) -> Result<String> {
    let uri = subject.uri("replica/sh");
    // Not by the name nbdsh: that takes the first python3 of PATH, which need not be Debian's.
    let shell = tool("/usr/bin/python3", ["-m", "nbd", "-u", &uri, "-c", UNALIGNED]);
    let said = shell.env("REFERENCE", raw).out()?;
    Ok(said.trim().to_string())
}

fn fio(dir: &Path, uri: &str) -> Result<String> {
    let output = dir.join("fio.json");
    let load = tool("fio", ["--name=verify", "--ioengine=nbd", "--rw=randrw", "--verify=crc32c"])
        .args(["--bsrange=512-64k", "--bs_unaligned=0", "--iodepth=16", "--size=90m"])
        .args(["--verify_fatal=1", "--verify_backlog=512", "--fsync=64", "--randseed=9"])
        .args(["--output-format=json", "--blockalign=512"])
        .args([format!("--uri={uri}"), format!("--output={}", output.display())]);
    // It leaves files of its own where it runs.
    load.within(dir).limit(Duration::from_secs(300)).run()?;
    let said = fs::read_to_string(&output)?;
    let report = json(&said[said.find('{').context("fio printed no JSON")?..])?;
    let job = &report["jobs"][0];
    ensure!(job["error"] == 0, "fio: error {}", job["error"]);
    Ok(format!("{} reads, {} writes", job["read"]["total_ios"], job["write"]["total_ios"]))
}

fn copy(bench: &Bench, seed: u64) -> Result<String> {
    pattern::image(&bench.reference, SIZE, seed ^ 0xc0)?;
    let back = bench.dir.join("back");
    // Without --destination-is-zero nbdcopy must write zeros over what the base holds.
    tool("nbdcopy", ["--flush", text(&bench.reference)?, &bench.uri]).run()?;
    tool("nbdcopy", [bench.uri.as_ref(), back.as_os_str()]).run()?;
    tool("cmp", [&bench.reference, &back]).run()?;
    compare(&bench.uri, &bench.reference)?;
    Ok(String::new())
}

fn fuse_ready() -> Result<()> {
    loop_disks()?;
    setup::need(&["nbdfuse", "mkfs.ext4", "e2fsck", "losetup"])?;
    ensure!(Path::new("/dev/fuse").exists(), "this kernel offers no FUSE (/dev/fuse)");
    Ok(())
}

/// The replica as a file, the file as a disk, a file system on it, files in that; then all of it
/// once more, from the start.
fn fuse(dir: &Path, uri: &str) -> Result<String> {
    let mount = dir.join("mnt");
    fs::create_dir_all(&mount)?;
    let made = as_disk(dir, uri, |device| {
        tool("mkfs.ext4", ["-q", "-F", device]).run()?;
        tool("mount", [device]).args([&mount]).run()?;
        for number in 0..FILES {
            let place = mount.join(format!("d{}", number % 7));
            fs::create_dir_all(&place)?;
            pattern::noise(&place.join(format!("f{number}")), 997 * (number + 1), number)?;
        }
        for number in (0..FILES).step_by(3) {
            fs::remove_file(mount.join(format!("d{}/f{number}", number % 7)))?;
        }
        digests(&mount)
    })?;
    let found = as_disk(dir, uri, |device| {
        tool("e2fsck", ["-fn", device]).run()?;
        let header = tool("dumpe2fs", ["-h", device]).out()?;
        ensure!(!header.contains("needs_recovery"), "the journal is dirty");
        tool("mount", ["-o", "ro", device]).args([&mount]).run()?;
        digests(&mount)
    })?;
    ensure!(found == made, "the files are not those that were written");
    Ok(format!("{} files", found.lines().count()))
}

/// Lends `job` a loop device whose content is the export's; what `job` mounts is unmounted.
fn as_disk<T>(dir: &Path, uri: &str, job: impl FnOnce(&str) -> Result<T>) -> Result<T> {
    let (fuse, mount) = (dir.join("fuse"), dir.join("mnt"));
    fs::create_dir_all(&fuse)?;
    let file = fuse.join("disk");
    let mut server = tool("nbdfuse", [text(&file)?, uri]).background(&dir.join("nbdfuse.log"))?;
    server.until(Duration::from_secs(10), || {
        file.metadata().is_ok_and(|found| found.len() == SIZE)
    })?;
    let device = tool("losetup", ["--find", "--show"]).args([&file]).out()?;
    let outcome = job(device.trim());
    // Each step is tried whatever became of those before it: the next user needs a clean place.
    let steps = [
        if mounted(&mount)? { tool("umount", [&mount]).run() } else { Ok(()) },
        tool("losetup", ["-d", device.trim()]).run(),
        tool("umount", [&fuse]).run(),
        server.wait(Duration::from_secs(20)).map(drop),
    ];
    let outcome = outcome?;
    steps.into_iter().collect::<Result<()>>()?;
    Ok(outcome)
}

fn mounted(path: &Path) -> Result<bool> {
    let table = fs::read_to_string("/proc/self/mountinfo")?;
    Ok(table.lines().any(|line| line.split(' ').nth(4).is_some_and(|at| Path::new(at) == path)))
}

/// A line of digest and name for every file of the test beneath `mount`, in order of names.
fn digests(mount: &Path) -> Result<String> {
    let mut files = Vec::new();
    for place in (0..7).map(|number| mount.join(format!("d{number}"))) {
        files.extend(fs::read_dir(place)?.flatten().map(|entry| entry.path()));
    }
    files.sort();
    tool("sha256sum", &files).out()
}
