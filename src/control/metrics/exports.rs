//! What clients asked of exports, by front end and operation.

use std::fmt;

use super::{
    page::{About, Of, Page},
    snapshot::{Export, Requests},
};
use crate::blockdev::figures::Operation;

const OPERATIONS: About = About("export_operations", Of::Things, "Requests that were answered");
const BYTES: About =
    About("export", Of::Bytes, "Bytes that requests were about, of those that succeeded");
const ERRORS: About = About("export_errors", Of::Things, "Requests that failed");
const LATENCY: About =
    About("export_latency", Of::Seconds, "Time from a request's arrival until its answer is ready");

pub(super) fn tell(page: &mut Page<'_>, exports: &[Export]) -> fmt::Result {
    let all = || {
        exports.iter().flat_map(|export| {
            let each = export.operations.iter();
            each.map(move |(operation, requests)| (labels(export, *operation), requests))
        })
    };
    let each = |value: fn(&Requests) -> u64| {
        all().map(move |(labels, requests)| (labels, value(requests)))
    };
    page.counter(OPERATIONS, each(|requests| requests.latency.total()))?;
    page.counter(BYTES, each(|requests| requests.bytes))?;
    page.counter(ERRORS, each(|requests| requests.errors))?;
    // Of what was never asked for, that there was none is told above.
    let asked = all().filter(|(_, requests)| requests.latency.total() > 0);
    page.latency(LATENCY, asked.map(|(labels, requests)| (labels, &requests.latency)))
}

fn labels(export: &Export, operation: Operation) -> [(&'static str, &str); 3] {
    [("export", &export.name), ("front", export.front.name()), ("op", operation.name())]
}
