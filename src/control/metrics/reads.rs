//! What replicas read of their images: from a copy on their own disk, from one on another, from the
//! cache in between.

use std::fmt;

use super::{
    page::{About, Of, Page},
    snapshot::{Cached, Reads},
};

const LOCAL: About = About("local_reads", Of::Things, "Reads of a copy on the replica's own disk");
const LOCAL_BYTES: About = About("local_read", Of::Bytes, "Bytes read of such copies");
const LOCAL_TIME: About = About("local_read", Of::Seconds, "Time that such reads took");
const CROSS: About = About("cross_disk_reads", Of::Things, "Reads of a copy on another disk");
const CROSS_BYTES: About = About("cross_disk", Of::Bytes, "Bytes read of such copies");
const CROSS_TIME: About = About("cross_disk_read", Of::Seconds, "Time that such reads took");
const CACHE: About = About("cache_reads", Of::Things, "Reads that a cache answered");
const CACHE_BYTES: About = About("cache_read", Of::Bytes, "Bytes read from caches");
const CACHE_TIME: About = About("cache_read", Of::Seconds, "Time that reads from caches took");
const STORED: About = About("cache_stored", Of::Bytes, "Space that promoted chunks take");
const DROPPED: About = About(
    "cache_dropped",
    Of::Things,
    "Promoted chunks that could not be read, or were not what was stored",
);

pub(super) fn tell(page: &mut Page<'_>, reads: &[Reads]) -> fmt::Result {
    let local = || {
        let local = reads.iter().filter(|reads| reads.from == reads.to);
        local.map(|reads| ([("image", reads.image.as_str()), ("disk", &reads.to)], reads))
    };
    page.counter(LOCAL, local().map(|(labels, reads)| (labels, reads.copy.total())))?;
    page.counter(LOCAL_BYTES, local().map(|(labels, reads)| (labels, reads.copy_bytes)))?;
    page.latency(LOCAL_TIME, local().map(|(labels, reads)| (labels, &reads.copy)))?;
    let cross = || {
        let cross = reads.iter().filter(|reads| reads.from != reads.to);
        cross.map(|reads| {
            let Reads { image, from, to, .. } = reads;
            ([("image", image.as_str()), ("from", from), ("to", to)], reads)
        })
    };
    page.counter(CROSS, cross().map(|(labels, reads)| (labels, reads.copy.total())))?;
    page.counter(CROSS_BYTES, cross().map(|(labels, reads)| (labels, reads.copy_bytes)))?;
    page.latency(CROSS_TIME, cross().map(|(labels, reads)| (labels, &reads.copy)))?;
    let cached = || {
        reads.iter().filter_map(|reads| {
            let labels = [("image", reads.image.as_str()), ("disk", &reads.to)];
            Some((labels, reads.cache.as_ref()?))
        })
    };
    let each =
        |value: fn(&Cached) -> u64| cached().map(move |(labels, cached)| (labels, value(cached)));
    page.counter(CACHE, each(|cached| cached.reads.total()))?;
    page.counter(CACHE_BYTES, each(|cached| cached.read_bytes))?;
    page.latency(CACHE_TIME, cached().map(|(labels, cached)| (labels, &cached.reads)))?;
    page.gauge(STORED, each(|cached| cached.stored))?;
    page.counter(DROPPED, each(|cached| cached.dropped))
}
