//! Fuzzing: whatever a client sends or a disk holds, there is an answer or an error that fits, and neither a panic,
//! a hang nor memory without a bound. Each [`Target`] mutates what real clients sent and real files hold.
//!
//! `cargo test` gives it some seconds. Longer, by `cargo xtask fuzz` or
//!
//! ```text
//! cargo test --test fuzz -- [TARGET] --seconds 600 --seed 7
//! cargo test --test fuzz -- TARGET --case 1234        # the one case that failed
//! ```

#![allow(clippy::unwrap_used, reason = "a case that meets what it did not expect fails")]

mod handshake;
mod image;
mod mutator;
mod overlay;
mod session;
mod stored;

use std::{
    collections::VecDeque,
    fs,
    panic::{AssertUnwindSafe, catch_unwind},
    process::exit,
    sync::{
        Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use fastrand::Rng;

/// Does one case, of the generator's.
type Case = Box<dyn FnMut(&mut Rng)>;

/// Something that takes bytes from whoever.
struct Target {
    name: &'static str,
    /// What is done once before all cases.
    start: fn() -> Case,
}

const TARGETS: [Target; 5] = [
    Target { name: "handshake", start: handshake::start },
    Target { name: "session", start: session::start },
    Target { name: "overlay", start: overlay::start },
    Target { name: "image", start: image::start },
    Target { name: "stored", start: stored::start },
];

/// How many of them run at a time.
const THREADS: usize = 2;
/// How long one case may take: far longer than any needs, even on a machine that does other things.
const HANG: Duration = Duration::from_secs(60);
/// What the process may have in memory at most, in bytes.
const MEMORY: u64 = 2 << 30;

struct Options {
    seconds: u64,
    seed: u64,
    case: Option<u64>,
    only: Vec<String>,
}

fn main() {
    let options = options();
    let chosen = |target: &&Target| {
        options.only.is_empty()
            || options.only.iter().any(|only| target.name.contains(only.as_str()))
    };
    let targets: VecDeque<&Target> = TARGETS.iter().filter(chosen).collect();
    let time = Duration::from_secs(options.seconds);
    let each = time * THREADS.min(targets.len().max(1)) as u32 / targets.len().max(1) as u32;
    let (left, options) = (&Mutex::new(targets), &options);
    thread::scope(|scope| {
        for _ in 0..THREADS {
            scope.spawn(move || {
                loop {
                    let next = left.lock().unwrap().pop_front();
                    let Some(target) = next else { return };
                    run(target, options, each);
                }
            });
        }
    });
}

fn options() -> Options {
    let mut options = Options { seconds: 8, seed: 1, case: None, only: Vec::new() };
    let mut args = std::env::args().skip(1);
    while let Some(arg) = args.next() {
        let mut number = || match args.next().and_then(|text| text.parse().ok()) {
            Some(number) => number,
            None => fail(&format!("fuzz: {arg} needs a number")),
        };
        match &*arg {
            "--seconds" => options.seconds = number(),
            "--seed" => options.seed = number(),
            "--case" => options.case = Some(number()),
            // What cargo passes on to every test.
            flag if flag.starts_with('-') => {}
            target => options.only.push(target.to_owned()),
        }
    }
    options
}

fn run(target: &Target, options: &Options, time: Duration) {
    let name = target.name;
    let mut one = (target.start)();
    let mut cases = Rng::with_seed(options.seed);
    let (started, mut count) = (Instant::now(), 0);
    let now = || started.elapsed().as_millis() as u64;
    // The case that runs, and since when.
    let (current, since, over) = (AtomicU64::new(0), AtomicU64::new(0), AtomicBool::new(false));
    thread::scope(|scope| {
        scope.spawn(|| {
            while !over.load(Ordering::Relaxed) {
                thread::sleep(Duration::from_millis(100));
                let (case, since) =
                    (current.load(Ordering::Relaxed), since.load(Ordering::Relaxed));
                if now().saturating_sub(since) > HANG.as_millis() as u64 {
                    fail(&format!("fuzz {name}: case {case} hangs"));
                }
                let memory = memory();
                if memory > MEMORY {
                    fail(&format!(
                        "fuzz {name}: {} MiB, at case {case} or another's",
                        memory >> 20
                    ));
                }
            }
        });
        while started.elapsed() < time || count == 0 {
            let case = options.case.unwrap_or_else(|| cases.u64(..));
            current.store(case, Ordering::Relaxed);
            since.store(now(), Ordering::Relaxed);
            let mut rng = Rng::with_seed(case);
            if catch_unwind(AssertUnwindSafe(|| one(&mut rng))).is_err() {
                let again = format!("cargo xtask fuzz {name} --case {case}");
                fail(&format!("fuzz {name}: case {case} failed: {again}"));
            }
            count += 1;
            if options.case.is_some() {
                break;
            }
        }
        over.store(true, Ordering::Relaxed);
    });
    println!("fuzz {name}: {count} cases in {:.1} s", started.elapsed().as_secs_f64());
}

/// Bytes that this process has in memory.
fn memory() -> u64 {
    let pages = fs::read_to_string("/proc/self/statm").unwrap();
    pages.split(' ').nth(1).unwrap().parse::<u64>().unwrap() * 4096
}

/// Ends the process, whatever its other threads do.
fn fail(why: &str) -> ! {
    eprintln!("{why}");
    exit(1)
}
