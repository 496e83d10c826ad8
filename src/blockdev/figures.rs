//! What is counted of an export's requests: how many, how long they took, what they moved, how many
//! failed; for each front end apart.
//!
//! A request is recorded once, where its front end has the answer ready. It took as long as from its
//! arrival, all its data included, to that: neither a client that sends slowly nor one that doesn't
//! read its replies makes a disk look slow. A write that is to be durable at once takes its flush along.
//!
//! Invariant: recording takes no lock and allocates nothing; it adds to three counters.

use std::{
    sync::{
        Arc, OnceLock,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use crate::histogram::{Counts, Histogram};

/// By which way requests come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Front {
    /// NBD: clients on the socket, and the kernel's.
    Nbd,
    /// ublk.
    Ublk,
}

/// What a request asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Operation {
    /// To read.
    Read,
    /// To write.
    Write,
    /// To make durable what was written.
    Flush,
    /// To give up content.
    Discard,
    /// To zero.
    WriteZeroes,
}

/// The figures of one export, for as long as it has its name: shared by all who serve it.
#[derive(Default)]
pub struct Figures {
    nbd: OnceLock<Arc<Operations>>,
    ublk: OnceLock<Arc<Operations>>,
}

/// The figures of what came by one front end.
#[derive(Default)]
pub struct Operations([Figure; Operation::ALL.len()]);

/// The figures of one operation. Two of them share no cache line.
#[derive(Default)]
#[repr(align(64))]
struct Figure {
    bytes: AtomicU64,
    errors: AtomicU64,
    latency: Histogram,
}

/// One operation's figures as of now.
#[derive(Clone, Debug)]
pub struct Recorded {
    /// Bytes that it was about, where it succeeded.
    pub bytes: u64,
    /// How often it failed.
    pub errors: u64,
    /// How long it took, failed or not; its total says how often it was asked for.
    pub latency: Counts,
}

impl Front {
    /// All of them.
    pub const ALL: [Front; 2] = [Front::Nbd, Front::Ublk];

    /// As metrics call it.
    pub fn name(self) -> &'static str {
        match self {
            Front::Nbd => "nbd",
            Front::Ublk => "ublk",
        }
    }
}

impl Operation {
    /// All of them.
    pub const ALL: [Operation; 5] = [
        Operation::Read,
        Operation::Write,
        Operation::Flush,
        Operation::Discard,
        Operation::WriteZeroes,
    ];

    /// As metrics call it.
    pub fn name(self) -> &'static str {
        match self {
            Operation::Read => "read",
            Operation::Write => "write",
            Operation::Flush => "flush",
            Operation::Discard => "discard",
            Operation::WriteZeroes => "write_zeroes",
        }
    }
}

impl Figures {
    /// Where a front end records: to be asked for once a connection or queue.
    pub fn of(&self, front: Front) -> Arc<Operations> {
        self.slot(front).get_or_init(Arc::default).clone()
    }

    /// What was recorded of a front end; `None` if it never served the export.
    pub fn at(&self, front: Front) -> Option<&Operations> {
        self.slot(front).get().map(|operations| &**operations)
    }

    fn slot(&self, front: Front) -> &OnceLock<Arc<Operations>> {
        match front {
            Front::Nbd => &self.nbd,
            Front::Ublk => &self.ublk,
        }
    }
}

impl Operations {
    /// Counts a request about `bytes` bytes that took so long.
    pub fn record<T, E>(
        &self,
        operation: Operation,
        bytes: u64,
        took: Duration,
        served: &Result<T, E>,
    ) {
        let figure = &self.0[operation as usize];
        figure.latency.record(took);
        match served {
            Ok(_) => figure.bytes.fetch_add(bytes, Ordering::Relaxed),
            Err(_) => figure.errors.fetch_add(1, Ordering::Relaxed),
        };
    }

    /// The figures of one operation.
    pub fn recorded(&self, operation: Operation) -> Recorded {
        let figure = &self.0[operation as usize];
        Recorded {
            bytes: figure.bytes.load(Ordering::Relaxed),
            errors: figure.errors.load(Ordering::Relaxed),
            latency: figure.latency.counts(),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{hint::black_box, time::Instant};

    use nix::sys::{
        resource::{UsageWho, getrusage},
        time::TimeValLike,
    };

    use super::*;

    #[test]
    fn each_request_is_counted_once_where_it_belongs() {
        let figures = Figures::default();
        assert!(figures.at(Front::Nbd).is_none());
        let nbd = figures.of(Front::Nbd);
        nbd.record(Operation::Read, 4096, Duration::from_micros(100), &Ok::<_, ()>(()));
        nbd.record(Operation::Read, 512, Duration::from_micros(300), &Ok::<_, ()>(()));
        nbd.record(Operation::Write, 4096, Duration::from_millis(5), &Err::<(), _>("full"));
        // Another session on the same export adds to the same figures.
        figures.of(Front::Nbd).record(Operation::Flush, 0, Duration::ZERO, &Ok::<_, ()>(()));
        let told = |operation| {
            let told = figures.at(Front::Nbd).unwrap().recorded(operation);
            (told.latency.total(), told.bytes, told.errors, told.latency.nanos)
        };
        assert_eq!(told(Operation::Read), (2, 4608, 0, 400_000));
        assert_eq!(told(Operation::Write), (1, 0, 1, 5_000_000));
        assert_eq!(told(Operation::Flush), (1, 0, 0, 0));
        assert_eq!(told(Operation::Discard), (0, 0, 0, 0));
        assert!(figures.at(Front::Ublk).is_none());
    }

    #[test]
    fn names_are_in_the_order_of_their_numbers() {
        for (number, operation) in Operation::ALL.into_iter().enumerate() {
            assert_eq!(operation as usize, number);
        }
    }

    /// What a request pays: two looks at the clock and three counters. Measured by
    /// `cargo test --release --lib figures -- --ignored --nocapture`.
    #[test]
    #[ignore = "a measurement, not a check"]
    fn what_recording_costs() {
        const ROUNDS: u32 = 20_000_000;
        let figures = Figures::default();
        let work = |clocks: bool| {
            let nbd = figures.of(Front::Nbd);
            // Processor time: others may be at work on this machine.
            let used = || {
                let usage = getrusage(UsageWho::RUSAGE_THREAD).unwrap();
                let time = usage.user_time() + usage.system_time();
                Duration::from_micros(time.num_microseconds() as u64)
            };
            let began = used();
            for round in 0..ROUNDS {
                let arrived = clocks.then(|| black_box(Instant::now()));
                let took = arrived.map_or(Duration::from_nanos(round.into()), |it| it.elapsed());
                nbd.record(Operation::Read, 4096, took, &black_box(Ok::<_, ()>(())));
            }
            (used() - began).as_nanos() as f64 / f64::from(ROUNDS)
        };
        println!("the counters alone: {:.1} ns a request", work(false));
        println!("with two looks at the clock: {:.1} ns a request", work(true));
        let two = std::thread::scope(|scope| {
            let [one, other] = [(); 2].map(|()| scope.spawn(|| work(true)));
            f64::max(one.join().unwrap(), other.join().unwrap())
        });
        println!("two threads that do nothing else to one export: {two:.1} ns a request");
    }
}
