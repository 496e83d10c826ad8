//! What the programs rely on in the running kernel: what its block tracepoints carry, and where the members
//! lie that they read. All of it comes from the kernel's own description (BTF).
//!
//! Invariant: [`Offsets`] that are handed out have every member, of the size that the programs load.

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

use underlay_agent_ebpf::Offsets;

use crate::btf::{Btf, Id, Shape};
use crate::error::{Error, Result};

/// Where a kernel describes itself.
const PATH: &str = "/sys/kernel/btf/vmlinux";
/// Longest description that is read, in bytes; real ones have 4 to 12 MB.
const LONGEST: u64 = 256 << 20;

/// A tracepoint of the block layer, and what it hands to a program.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tracepoint {
    /// Its name.
    pub name: &'static str,
    arguments: &'static [Argument],
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Argument {
    /// A pointer to this structure.
    To(&'static str),
    Number,
}

const BIO: Argument = Argument::To("bio");
const REQUEST: Argument = Argument::To("request");
const QUEUE: Argument = Argument::To("request_queue");

/// A bio is submitted.
pub const BIO_QUEUE: Tracepoint = Tracepoint { name: "block_bio_queue", arguments: &[BIO] };
/// A bio is split in two.
pub const BIO_SPLIT: Tracepoint =
    Tracepoint { name: "block_split", arguments: &[BIO, Argument::Number] };
/// A bio has ended.
pub const BIO_COMPLETE: Tracepoint =
    Tracepoint { name: "block_bio_complete", arguments: &[QUEUE, BIO] };
/// A request goes to the device.
pub const RQ_ISSUE: Tracepoint = Tracepoint { name: "block_rq_issue", arguments: &[REQUEST] };
/// A request comes back, to be issued again.
pub const RQ_REQUEUE: Tracepoint = Tracepoint { name: "block_rq_requeue", arguments: &[REQUEST] };
/// A request is done, or a part of it: its status, and of how many bytes.
pub const RQ_COMPLETE: Tracepoint = Tracepoint {
    name: "block_rq_complete",
    arguments: &[REQUEST, Argument::Number, Argument::Number],
};
const ALL: [Tracepoint; 6] =
    [BIO_QUEUE, BIO_SPLIT, BIO_COMPLETE, RQ_ISSUE, RQ_REQUEUE, RQ_COMPLETE];

/// The running kernel's description of itself.
pub fn types() -> Result<Btf> {
    types_at(Path::new(PATH))
}

fn types_at(path: &Path) -> Result<Btf> {
    let mut bytes = Vec::new();
    let read = File::open(path).and_then(|file| file.take(LONGEST).read_to_end(&mut bytes));
    match read {
        Ok(_) => {}
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return Err(Error::NoBtf { path: path.into() });
        }
        Err(source) => return Err(Error::Unreadable { path: path.into(), source }),
    }
    let wrong = |problem| Error::Layout { what: path.display().to_string(), problem };
    Btf::parse(bytes).map_err(wrong)
}

/// Looks at every tracepoint, and finds the members.
pub fn offsets(btf: &Btf) -> Result<Offsets> {
    for tracepoint in &ALL {
        arguments(btf, tracepoint)?;
    }
    let bio = Struct::argument(btf, &BIO_QUEUE)?;
    let request = Struct::argument(btf, &RQ_ISSUE)?;
    let (bio_bdev, bdev) = bio.pointer("bi_bdev")?;
    let (request_queue, queue) = request.pointer("q")?;
    let (queue_disk, disk) = queue.pointer("disk")?;
    let (at, place) = bio.part("bi_iter")?;
    Ok(Offsets {
        bio_next: bio.pointer("bi_next")?.0,
        bio_bdev,
        bio_opf: bio.number("bi_opf", 4)?,
        bio_status: bio.number("bi_status", 1)?,
        bio_sector: at + place.number("bi_sector", 8)?,
        bio_size: at + place.number("bi_size", 4)?,
        bio_private: bio.pointer("bi_private")?.0,
        bdev_dev: bdev.number("bd_dev", 4)?,
        request_queue,
        request_opf: request.number("cmd_flags", 4)?,
        request_bytes: request.number("__data_len", 4)?,
        request_sector: request.number("__sector", 8)?,
        request_bio: request.pointer("bio")?.0,
        queue_disk,
        disk_major: disk.number("major", 4)?,
        disk_minor: disk.number("first_minor", 4)?,
    })
}

/// What a tracepoint hands to a program, if it is what the program expects.
fn arguments(btf: &Btf, tracepoint: &Tracepoint) -> Result<Vec<Id>> {
    let name = tracepoint.name;
    let known = btf.typedef(&format!("btf_trace_{name}")).ok_or(Error::NoTracepoint { name })?;
    let parameters = match btf.shape(known) {
        Shape::Pointer(function) => match btf.shape(function) {
            Shape::Function(function) => btf.parameters(function),
            _ => None,
        },
        _ => None,
    };
    // The first is the kernel's own.
    let given: Vec<Id> = parameters.unwrap_or_default().into_iter().skip(1).collect();
    let fits = |(wanted, id): (&Argument, &Id)| match (wanted, btf.shape(*id)) {
        (Argument::To(name), Shape::Pointer(to)) => btf.is_called(to, name),
        (Argument::Number, Shape::Number(_)) => true,
        _ => false,
    };
    if given.len() == tracepoint.arguments.len()
        && tracepoint.arguments.iter().zip(&given).all(fits)
    {
        return Ok(given);
    }
    let texts: Vec<String> = given.iter().map(|id| btf.text(*id)).collect();
    let problem = format!("it carries ({}), which is not known", texts.join(", "));
    Err(Error::Layout { what: format!("tracepoint {name}"), problem })
}

/// A structure of the kernel.
struct Struct<'a> {
    btf: &'a Btf,
    id: Id,
}

impl<'a> Struct<'a> {
    /// What a tracepoint's first argument points at.
    fn argument(btf: &'a Btf, tracepoint: &Tracepoint) -> Result<Struct<'a>> {
        let first = arguments(btf, tracepoint)?.first().map(|id| btf.shape(*id));
        match first {
            Some(Shape::Pointer(id)) => Ok(Struct { btf, id }),
            _ => Err(Error::NoTracepoint { name: tracepoint.name }),
        }
    }

    /// Where a pointer lies, and what it points at.
    fn pointer(&self, name: &str) -> Result<(u64, Struct<'a>)> {
        match self.member(name)? {
            (offset, Shape::Pointer(id)) => Ok((offset, Struct { btf: self.btf, id })),
            _ => Err(self.wrong(name, "is no pointer")),
        }
    }

    /// Where a structure within this one lies.
    fn part(&self, name: &str) -> Result<(u64, Struct<'a>)> {
        match self.member(name)? {
            (offset, Shape::Struct(id)) => Ok((offset, Struct { btf: self.btf, id })),
            _ => Err(self.wrong(name, "is no structure")),
        }
    }

    /// Where a number of `size` bytes lies.
    fn number(&self, name: &str, size: u32) -> Result<u64> {
        match self.member(name)? {
            (offset, Shape::Number(found)) if found == size => Ok(offset),
            (_, Shape::Number(found)) => {
                Err(self.wrong(name, &format!("has {found} bytes, not {size}")))
            }
            _ => Err(self.wrong(name, "is no number")),
        }
    }

    fn member(&self, name: &str) -> Result<(u64, Shape)> {
        // A pointer leads to a structure, perhaps by another name.
        let id = match self.btf.shape(self.id) {
            Shape::Struct(id) => id,
            _ => self.id,
        };
        let member = self.btf.member(id, name).ok_or_else(|| self.wrong(name, "is missing"))?;
        Ok((member.offset, self.btf.shape(member.of)))
    }

    fn wrong(&self, name: &str, problem: &str) -> Error {
        let what = format!("structure {}", self.btf.text(self.id));
        Error::Layout { what, problem: format!("its member {name} {problem}") }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::btf::tests::Writer;

    /// A kernel with what the programs read, but for what `change` does to names and sizes.
    fn kernel(change: impl Fn(&str) -> Option<&'static str>) -> Btf {
        let mut writer = Writer::default();
        let [byte, int, long] =
            [("u8", 1), ("int", 4), ("long", 8)].map(|(name, size)| writer.number(name, size));
        let nothing = writer.pointer(0);
        let name = |name: &'static str| change(name).unwrap_or(name);
        let disk = writer.structure("gendisk", &[("major", int, 0), ("first_minor", int, 4)]);
        let disk = writer.pointer(disk);
        let queue = writer.structure("request_queue", &[(name("disk"), disk, 40)]);
        let queue = writer.pointer(queue);
        let bdev = writer.structure("block_device", &[("bd_dev", int, 52)]);
        let bdev = writer.pointer(bdev);
        let size = if change("bi_size").is_some() { long } else { int };
        let place = writer.structure("bvec_iter", &[("bi_sector", long, 0), ("bi_size", size, 8)]);
        let bio = writer.structure(
            "bio",
            &[
                ("bi_next", nothing, 0),
                ("bi_bdev", bdev, 8),
                ("bi_opf", int, 16),
                ("bi_status", byte, 25),
                ("bi_iter", place, 32),
                ("bi_private", nothing, 64),
            ],
        );
        let bio = writer.pointer(bio);
        let request = writer.structure(
            "request",
            &[
                ("q", queue, 0),
                ("cmd_flags", int, 24),
                ("__data_len", int, 44),
                ("__sector", long, 48),
                ("bio", bio, 56),
            ],
        );
        let request = writer.pointer(request);
        for tracepoint in &ALL {
            let mut given = vec![nothing];
            given.extend(tracepoint.arguments.iter().map(|argument| match argument {
                Argument::To("bio") => bio,
                Argument::To("request") => request,
                Argument::To(_) => queue,
                Argument::Number => int,
            }));
            // As it was before 5.11.
            if change(tracepoint.name) == Some("with queue") {
                given.insert(1, queue);
            }
            let function = writer.function(&given);
            let pointer = writer.pointer(function);
            if change(tracepoint.name) != Some("gone") {
                writer.typedef(&format!("btf_trace_{}", tracepoint.name), pointer);
            }
        }
        Btf::parse(writer.bytes()).unwrap()
    }

    #[test]
    fn every_member_is_found() {
        let found = offsets(&kernel(|_| None)).unwrap();
        assert_eq!((found.bio_bdev, found.bio_sector, found.bio_size), (8, 32, 40));
        assert_eq!((found.bdev_dev, found.queue_disk, found.disk_minor), (52, 40, 4));
        assert_eq!((found.request_bytes, found.request_bio), (44, 56));
    }

    #[test]
    fn a_kernel_that_the_programs_cannot_use_is_refused_by_what_it_lacks() {
        let said = |change: fn(&str) -> Option<&'static str>| {
            let error = offsets(&kernel(change)).unwrap_err();
            (error.kind(), error.to_string())
        };
        let (kind, text) = said(|name| (name == "block_rq_issue").then_some("with queue"));
        assert!(kind == "layout" && text.contains("block_rq_issue"), "{text}");
        assert!(text.contains("(request_queue *, request *)"), "{text}");
        let (kind, text) = said(|name| (name == "block_split").then_some("gone"));
        assert!(kind == "no_tracepoint" && text.contains("block_split"), "{text}");
        let (_, text) = said(|name| (name == "disk").then_some("rq_disk"));
        assert!(text.contains("request_queue: its member disk is missing"), "{text}");
        let (_, text) = said(|name| (name == "bi_size").then_some("long"));
        assert!(text.contains("bvec_iter: its member bi_size has 8 bytes, not 4"), "{text}");
    }

    #[test]
    fn a_kernel_without_a_description_is_told_from_one_that_cannot_be_read() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("vmlinux");
        assert_eq!(types_at(&file).err().unwrap().kind(), "no_btf");
        std::fs::write(&file, "BTF").unwrap();
        assert_eq!(types_at(&file).err().unwrap().kind(), "layout");
        assert_eq!(types_at(dir.path()).err().unwrap().kind(), "unreadable");
    }

    #[test]
    fn this_kernel_is_understood_if_it_describes_itself() {
        match types() {
            Ok(types) => drop(offsets(&types).unwrap()),
            Err(error) => println!("skipped: {error}"),
        }
    }
}
