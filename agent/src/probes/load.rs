//! Loading: the object, the offsets of this kernel, the sizes of maps; then attaching.

use std::fs;
use std::io;
use std::os::fd::AsFd;

use aya::maps::{Map, MapError};
use aya::programs::BtfTracePoint;
use aya::programs::tp_btf::BtfTracePointLinkId;
use aya::{Btf, EbpfLoader, Endianness};
use underlay_agent_ebpf as layout;

use super::sets::Sets;
use super::{BIO_COMPLETE, PROGRAMS, Probes, program, refused};
use crate::error::{Error, Result};
use crate::kernel::{self, Tracepoint};
use crate::sys::{Plain, Table};

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
    let types = kernel::types()?;
    let offsets = Plain(kernel::offsets(&types)?);
    let types = Btf::parse(types.bytes(), Endianness::default());
    let types = types.map_err(|error| refused("reading the kernel's BTF".into(), &error))?;
    let (shards, alone) = shards()?;
    let mut loader = EbpfLoader::new();
    loader.btf(Some(&types));
    loader.override_global("OFFSETS", &offsets, true);
    loader.override_global("SHARDS", &shards, true);
    loader.override_global("ALONE", &alone, true);
    loader.map_max_entries("COUNTERS", slots * (shards + 1));
    let mut ebpf = loader.load(object).map_err(|error| refused("loading maps".into(), &error))?;

    for (name, tracepoint) in PROGRAMS {
        let loaded = program(&mut ebpf, name)?.load(tracepoint.name, &types);
        loaded.map_err(|error| refused(format!("loading program {name}"), &error))?;
    }
    for (name, tracepoint) in PROGRAMS.into_iter().filter(|program| !BIO_COMPLETE.contains(program))
    {
        attach(program(&mut ebpf, name)?, &tracepoint)?;
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
        shards: shards + 1,
        ends: Vec::new(),
        account: None,
    })
}

/// Attaches one program to its tracepoint.
pub(super) fn attach(program: &mut BtfTracePoint, to: &Tracepoint) -> Result<BtfTracePointLinkId> {
    let attached = program.attach();
    attached.map_err(|error| refused(format!("attaching to tracepoint {}", to.name), &error))
}

/// One shard for each possible processor, up to the most; a power of two, so that a mask finds it. And 1 if
/// each has its own.
fn shards() -> Result<(u32, u32)> {
    let processors = aya::util::nr_cpus()
        .map_err(|(what, source)| Error::io(format!("counting processors ({what})"), source))?;
    let processors = u32::try_from(processors).unwrap_or(u32::MAX);
    let shards = processors.clamp(1, layout::SHARDS).next_power_of_two();
    // Where their numbers have gaps, two may share.
    let listed = fs::read_to_string("/sys/devices/system/cpu/possible").unwrap_or_default();
    let gaps = listed.contains(',') || !listed.starts_with('0');
    Ok((shards, u32::from(processors <= shards && !gaps)))
}
