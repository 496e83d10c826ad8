//! Loading: the object, the offsets of this kernel, the sizes of maps; then attaching.

use std::io;
use std::os::fd::AsFd;

use aya::EbpfLoader;
use aya::maps::{Map, MapError};
use aya::programs::TracePoint;
use aya::programs::trace_point::TracePointLinkId;
use underlay_agent_ebpf as layout;

use super::sets::Sets;
use super::{BIO_COMPLETE, PROGRAMS, Probes, program, refused};
use crate::error::{Error, Result};
use crate::sys::{Plain, Table};
use crate::tracefs;

#[cfg(embedded)]
static OBJECT: Option<&[u8]> = Some(aya::include_bytes_aligned!(env!("UNDERLAY_PROBES_OBJECT")));
#[cfg(not(embedded))]
static OBJECT: Option<&[u8]> = None;

/// Whether this agent was built with the programs.
pub fn embedded() -> bool {
    OBJECT.is_some()
}

/// See [`Probes::load`].
pub(super) fn load(slots: u32) -> Result<Probes> {
    let object = OBJECT.ok_or(Error::NotBuilt)?;
    let slots = slots.clamp(1, layout::SLOTS);
    let tracefs = tracefs::find()?;
    let globals = [
        ("BIO_QUEUE", tracefs::BIO_QUEUE),
        ("BIO_SPLIT", tracefs::BIO_SPLIT),
        ("BIO_COMPLETE", tracefs::BIO_COMPLETE),
        ("RQ_ISSUE", tracefs::RQ_ISSUE),
        ("RQ_REQUEUE", tracefs::RQ_REQUEUE),
        ("RQ_COMPLETE", tracefs::RQ_COMPLETE),
    ];
    let fields = globals.map(|(name, tracepoint)| (name, tracefs::fields(&tracefs, &tracepoint)));
    let mut offsets = Vec::with_capacity(fields.len());
    for (name, fields) in fields {
        offsets.push((name, Plain(fields?)));
    }
    let shards = shards()?;
    let mut loader = EbpfLoader::new();
    for (name, fields) in &offsets {
        loader.override_global(name, fields, true);
    }
    loader.override_global("SHARDS", &shards, true);
    loader.map_max_entries("COUNTERS", slots * shards);
    let mut ebpf = loader.load(object).map_err(|error| refused("loading maps".into(), &error))?;

    for (name, _) in PROGRAMS {
        let loaded = program(&mut ebpf, name)?.load();
        loaded.map_err(|error| refused(format!("loading program {name}"), &error))?;
    }
    // Completion first: a request whose issue is seen will then be seen to end.
    for (name, tracepoint) in PROGRAMS.into_iter().rev().filter(|program| *program != BIO_COMPLETE)
    {
        attach(program(&mut ebpf, name)?, tracepoint)?;
    }
    let mut map = |name: &str| {
        let missing = || Error::Refused {
            what: format!("map {name}"),
            problem: "not in the embedded object; build it again: cargo xtask build-ebpf".into(),
        };
        ebpf.take_map(name).ok_or_else(missing)
    };
    let flights = match map("FLIGHTS")? {
        Map::Array(data) => Table::map(data.fd().as_fd()),
        _ => Err(io::Error::other("not an array; build it again: cargo xtask build-ebpf")),
    };
    let wrong = |error: MapError| refused("opening a map".into(), &error);
    Ok(Probes {
        watched: Sets::new(map("WATCHED")?.try_into().map_err(wrong)?, "device"),
        owners: Sets::new(map("OWNERS")?.try_into().map_err(wrong)?, "process"),
        tgids: Vec::new(),
        flights: flights.map_err(|error| Error::io("mapping the table of requests", error))?,
        counters: map("COUNTERS")?.try_into().map_err(wrong)?,
        losses: map("LOSSES")?.try_into().map_err(wrong)?,
        ring: map("TOUCHES")?.try_into().map_err(wrong)?,
        ebpf,
        slots,
        shards,
        ends: None,
        account: None,
    })
}

/// Attaches one program to its tracepoint.
pub(super) fn attach(program: &mut TracePoint, tracepoint: &str) -> Result<TracePointLinkId> {
    let attached = program.attach("block", tracepoint);
    attached.map_err(|error| refused(format!("attaching to tracepoint {tracepoint}"), &error))
}

/// One shard for each possible processor, up to the most; a power of two, so that a mask finds it.
fn shards() -> Result<u32> {
    let processors = aya::util::nr_cpus()
        .map_err(|(what, source)| Error::io(format!("counting processors ({what})"), source))?;
    let processors = u32::try_from(processors).unwrap_or(layout::SHARDS);
    Ok(processors.clamp(1, layout::SHARDS).next_power_of_two().min(layout::SHARDS))
}
