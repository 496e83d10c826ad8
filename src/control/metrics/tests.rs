//! Invariants checked: the page is well-formed OpenMetrics text; every metric of it is in
//! `docs/metrics.md` with its type and labels, and the other way round.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use nix::sys::{
    resource::{UsageWho, getrusage},
    time::TimeValLike,
};

use super::{snapshot::*, sources::Reading, *};
use crate::{
    blockdev::figures::{Front, Operation},
    catalog::NodeStatus,
    cow::Stats,
    source::{self, Figures},
};

const DOCUMENT: &str = include_str!("../../../docs/metrics.md");

/// Something of everything: `replicas` replicas on two disks, each with clients on both front ends.
fn snapshot(replicas: usize) -> Snapshot {
    let histogram = Histogram::default();
    for micros in (1..200).map(|step| step * step) {
        histogram.record(Duration::from_micros(micros));
    }
    let latency = Latency::of(&histogram.counts());
    let requests = || Requests { bytes: 4096, errors: 1, latency: latency.clone() };
    let disk = |name: &str| Disk {
        name: name.to_owned(),
        tier: "ssd",
        up: true,
        stored: 1 << 30,
        images: 1,
        replicas: 2,
        said: Some(Said { total: 1 << 40, free: 1 << 39, age: Duration::from_millis(3) }),
    };
    let replica = |number: usize| Replica {
        name: format!("vm-{number}"),
        disk: "b".to_owned(),
        image: "debian-12".to_owned(),
        up: true,
        size: 1 << 34,
        stored: Some(1 << 20),
        clients: 1,
        poisoned: false,
        overlay: Some(Stats {
            commits: 3,
            checkpoints: 1,
            copied_up: 7,
            punched: 9,
            pending: 2,
            map_bytes: 4096,
        }),
    };
    let export = |number: usize| Export {
        name: format!("replica/vm-{number}"),
        front: Front::ALL[number % 2],
        operations: Operation::ALL.map(|operation| (operation, requests())).into(),
    };
    let reads = |from: &str| Reads {
        image: "debian-12".to_owned(),
        from: from.to_owned(),
        to: "b".to_owned(),
        copy: latency.clone(),
        copy_bytes: 1 << 20,
        cache: (from == "a").then(|| Cached {
            reads: latency.clone(),
            read_bytes: 1 << 20,
            stored: 1 << 18,
            dropped: 1,
        }),
    };
    let served = Served { bytes: 4096, errors: 1, device: latency.clone(), queue: latency.clone() };
    let did = DeviceReads { reads: served.clone(), writes: served };
    Snapshot {
        uptime: Duration::from_secs(17),
        node: NodeStatus { saved_bytes: 1 << 30, ..NodeStatus::default() },
        connections: 2,
        connections_served: 5,
        replica_creation: latency.clone(),
        disks: vec![disk("a"), disk("b")],
        images: vec![Image {
            name: "debian-12".to_owned(),
            size: 1 << 31,
            stored: 1 << 30,
            copies: 1,
            replicas: replicas as u64,
            clients: 1,
        }],
        replicas: (0..replicas).map(replica).collect(),
        exports: (0..replicas).map(export).collect(),
        reads: vec![reads("a"), reads("b")],
        reading: Reading {
            images: vec![("debian-12".to_owned(), Figures { raced: 3, ..Figures::default() })],
            disks: vec![Arc::new(source::Disk::new("a", None, 64))],
            repaired: (2, 1),
            scrubbed: (1 << 20, 1),
            kept: [3, 1, 2],
            events: crate::control::events::Happened::ALL.map(|kind| (kind, 1)).into(),
        },
        promotion: Some(Promotion {
            rate_bytes: 1 << 25,
            disks: vec![PromotingDisk { disk: "b".to_owned(), ..PromotingDisk::default() }],
        }),
        probes: Some(Probes {
            up: true,
            runs: Some(1000),
            run_seconds: Some(0.25),
            dropped: 1,
            unresolved: 2,
            disks: vec![ProbedDisk {
                disk: "a".to_owned(),
                own: did.clone(),
                foreign: did,
                in_flight: Some(3),
                oldest_seconds: Some(0.5),
            }],
        }),
    }
}

/// A metric as it was told, or as the document has it.
#[derive(Debug, PartialEq, Eq)]
struct Metric {
    kind: String,
    labels: BTreeSet<String>,
}

/// Reads a page, and finds fault with what the format does not allow. Counters go by the name of
/// their samples.
fn parse(text: &str) -> BTreeMap<String, Metric> {
    let mut metrics = BTreeMap::new();
    let (mut name, mut kind, mut unit) = (String::new(), String::new(), String::new());
    let mut samples = BTreeSet::new();
    let body = text.strip_suffix("# EOF\n").expect("it ends with # EOF");
    for line in body.lines() {
        let words: Vec<&str> = line.split(' ').collect();
        match words[..] {
            ["#", "HELP", of, ..] => {
                name = of.to_owned();
                (kind, unit) = (String::new(), String::new());
                assert!(line.len() > 20 + of.len(), "{line}");
                assert!(!line.ends_with('.'), "{line}");
            }
            ["#", "TYPE", of, is] => {
                assert_eq!(of, name);
                kind = is.to_owned();
                let shown = if kind == "counter" { format!("{name}_total") } else { name.clone() };
                let metric = Metric { kind: kind.clone(), labels: BTreeSet::new() };
                assert!(metrics.insert(shown, metric).is_none(), "{name} comes twice");
            }
            ["#", "UNIT", of, is] => {
                assert_eq!(of, name);
                unit = is.to_owned();
                assert!(name.ends_with(&format!("_{unit}")), "{line}");
            }
            [sample, value] => {
                assert!(samples.insert(sample.to_owned()), "{sample} comes twice");
                assert!(value.parse::<f64>().is_ok(), "{line}");
                let (of, labels) = sample.split_once('{').unwrap_or((sample, ""));
                let suffix = of.strip_prefix(&name).expect("samples follow their own name");
                let fits = match kind.as_str() {
                    "counter" => suffix == "_total",
                    "gauge" => suffix.is_empty(),
                    "histogram" => ["_sum", "_count", "_bucket"].contains(&suffix),
                    other => panic!("{name}: type {other:?}"),
                };
                assert!(fits, "{line}: a sample of a {kind}");
                let shown = if kind == "counter" { of.to_owned() } else { name.clone() };
                let labels = labels.trim_end_matches('}').split(',').filter(|it| !it.is_empty());
                let keys = labels.map(|label| label.split_once('=').unwrap().0.to_owned());
                let keys = keys.filter(|key| key != "le" || suffix != "_bucket");
                metrics.get_mut(&shown).unwrap().labels.extend(keys);
            }
            _ => panic!("what is this: {line:?}"),
        }
        assert!(unit.is_empty() || !kind.is_empty());
        let seconds = name.ends_with("_seconds") || name.ends_with("_bytes");
        assert!(line.starts_with("# ") || seconds != unit.is_empty(), "{name} and its unit");
    }
    metrics
}

fn described() -> BTreeMap<String, Metric> {
    let rows = DOCUMENT
        .lines()
        .filter(|line| line.starts_with("| `underlay_") || line.starts_with("| `process_"));
    let row = |row: &str| {
        let cells: Vec<&str> = row.split('|').map(str::trim).collect();
        let [_, name, kind, labels, meaning, _] = cells[..] else { panic!("{row}") };
        assert!(meaning.len() > 10, "{row}");
        let labels = labels.split(',').map(|label| label.trim().trim_matches('`').to_owned());
        let labels = labels.filter(|label| !label.is_empty()).collect();
        (name.trim_matches('`').to_owned(), Metric { kind: kind.to_owned(), labels })
    };
    let all: Vec<_> = rows.map(row).collect();
    let metrics: BTreeMap<_, _> = all.into_iter().collect();
    let count = DOCUMENT.lines().filter(|line| line.starts_with("| `")).count();
    assert_eq!(metrics.len(), count, "each is listed once");
    metrics
}

#[test]
fn the_document_lists_what_is_told() {
    let told = parse(&snapshot(2).text().unwrap());
    let described = described();
    for (name, metric) in &told {
        let found = described.get(name).unwrap_or_else(|| {
            panic!("docs/metrics.md lacks {name}: {metric:?}");
        });
        assert_eq!(found, metric, "{name}: docs/metrics.md on the left");
    }
    for name in described.keys() {
        assert!(told.contains_key(name), "docs/metrics.md lists {name}, which nothing tells");
    }
}

#[test]
fn what_is_not_there_is_left_out() {
    let mut snapshot = snapshot(0);
    (snapshot.promotion, snapshot.probes) = (None, None);
    snapshot.disks.iter_mut().for_each(|disk| disk.said = None);
    snapshot.reads.clear();
    let told = parse(&snapshot.text().unwrap());
    for name in [
        "underlay_probes_up",
        "underlay_promotions_total",
        "underlay_disk_free_bytes",
        "underlay_replica_up",
        "underlay_cross_disk_reads_total",
    ] {
        assert!(!told.contains_key(name), "{name}");
    }
    assert!(told.contains_key("underlay_disk_up"));
    assert!(told.contains_key("process_open_fds"));
}

#[test]
fn histograms_add_up() {
    let text = snapshot(1).text().unwrap();
    let of = |start: &str| {
        let line = text.lines().find(|line| line.starts_with(start)).expect("it is there");
        line.rsplit_once(' ').unwrap().1.parse::<f64>().unwrap()
    };
    let labels = "export=\"replica/vm-0\",front=\"nbd\",op=\"read\"}";
    let name = "underlay_export_latency_seconds";
    assert_eq!(of(&format!("{name}_count{{{labels}")), 199.0);
    assert_eq!(of(&format!("{name}_bucket{{le=\"+Inf\",{labels}")), 199.0);
    assert!((of(&format!("{name}_sum{{{labels}")) - 2.6467).abs() < 1e-3);
    let buckets = text
        .lines()
        .filter(|line| line.starts_with(&format!("{name}_bucket")) && line.contains(labels));
    let counts: Vec<u64> =
        buckets.map(|line| line.rsplit_once(' ').unwrap().1.parse().unwrap()).collect();
    assert_eq!(counts.len(), 22);
    assert!(counts.is_sorted() && counts[0] == 4, "{counts:?}");
}

/// Measured by `cargo test --release --lib control::metrics -- --ignored --nocapture`.
#[test]
#[ignore = "a measurement, not a check"]
fn what_a_page_of_a_thousand_replicas_costs() {
    for round in 0..10 {
        let mut snapshot = snapshot(1000);
        // Guests read, write and flush; every other round they have not begun to.
        let busy = if round % 2 == 0 { 3 } else { 0 };
        for (_, requests) in snapshot.exports.iter_mut().flat_map(|it| &mut it.operations[busy..]) {
            requests.latency = Latency::default();
        }
        // Processor time: others may be at work on this machine.
        let used = || {
            let usage = getrusage(UsageWho::RUSAGE_THREAD).unwrap();
            let time = usage.user_time() + usage.system_time();
            Duration::from_micros(time.num_microseconds() as u64)
        };
        let began = used();
        let text = snapshot.text().unwrap();
        let took = used() - began;
        println!("{} lines, {} KiB: {took:?}", text.lines().count(), text.len() / 1024);
    }
}
