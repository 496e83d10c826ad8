//! The host's side: boots guests, listens, cuts the power where a test asks for it, keeps the tally.

use std::collections::VecDeque;
use std::fs;
use std::io::Write;
use std::path::PathBuf;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use fastrand::Rng;
use serde_json::Value;

use super::guest::LEDGER;
use super::initramfs;
use super::machine::{Cache, Drive, Machine};
use super::wire::{Event, State};
use super::{Boots, TESTS, Test};
use crate::image::{self, Kernel};
use crate::lab::Lab;
use crate::place::{self, Profile};
use crate::report::{Report, Unfit, note, say};
use crate::setup;
use crate::tool::tool;

/// How much longer than its own limit a test may take before the host ends the guest.
const GRACE: Duration = Duration::from_secs(30);
/// How often a guest is switched on until it comes up.
const STARTS: u32 = 3;
/// How long a guest may take to switch itself off.
const OFF: Duration = Duration::from_secs(30);
/// How long a test works between its word and the cut, in milliseconds.
const LIFE: std::ops::Range<u64> = 500..4000;
/// What the host must have.
const NEEDED: [&str; 5] = ["qemu-system-x86_64", "nbdkit", "cpio", "xz", "ldd"];
/// How long a build of the program may take.
const BUILD: Duration = Duration::from_secs(30 * 60);

/// What `cargo xtask vm` takes.
#[derive(clap::Args)]
pub struct Options {
    /// The tests to run; all of them otherwise
    tests: Vec<String>,
    /// Tell what tests there are
    #[arg(long)]
    list: bool,
    /// How often a test that asks for it loses its power
    #[arg(long, default_value_t = 3)]
    cuts: u64,
    /// Test the release build
    #[arg(long)]
    release: bool,
    /// Count each write of `power` and `marks` as flushed: proves that a cut loses what was not, and
    /// that the rig sees it (they must fail)
    #[arg(long)]
    overclaim: bool,
    /// The seed of what is written, and of when the power is cut
    #[arg(long, default_value_t = 1)]
    seed: u64,
}

impl Options {
    /// What `cargo xtask test` runs: everything, with the build that cargo has just made.
    pub fn everything() -> Options {
        Options {
            tests: Vec::new(),
            list: false,
            cuts: 3,
            release: false,
            overclaim: false,
            seed: 1,
        }
    }

    /// Prints what tests there are, if that was asked for.
    pub fn list(&self) -> bool {
        if self.list {
            TESTS.iter().for_each(|test| say(&format!("{:10} {}", test.name, test.about)));
        }
        self.list
    }

    /// Builds the program to be tested: the rig runs by itself, without `cargo test` before it.
    pub fn build(&self) -> Result<()> {
        build(self.profile())
    }

    fn profile(&self) -> Profile {
        if self.release { Profile::Release } else { Profile::Debug }
    }

    fn chosen(&self) -> Result<Vec<&'static Test>> {
        if self.tests.is_empty() {
            return Ok(TESTS.iter().collect());
        }
        let find = |name: &String| {
            let test = TESTS.iter().find(|test| test.name == name);
            test.ok_or_else(|| anyhow!("no test is called {name:?}; cargo xtask vm --list"))
        };
        self.tests.iter().map(find).collect()
    }
}

fn build(profile: Profile) -> Result<()> {
    let cargo = std::env::var("CARGO").unwrap_or_else(|_| "cargo".into());
    let words: &[&str] = if profile == Profile::Release { &["--release"] } else { &[] };
    let build = tool(cargo, ["build", "--quiet", "--bin", "underlay"]);
    build.args(words).within(&place::root()).limit(BUILD).run()
}

/// Runs a test that measures, in a boot of its own, on the release build. `words` go onto its
/// kernel's command line. Returns what it measured.
pub fn figures(lab: &Lab, test: &'static Test, words: &str) -> Result<Vec<Value>> {
    setup::need(&NEEDED)?;
    build(Profile::Release)?;
    let mut report = Report::default();
    let mut rig = Rig::new(lab, Profile::Release, &mut report)?;
    rig.words = format!(" {words}");
    let (mut tests, mut progress) = (VecDeque::from([test]), Progress::default());
    rig.once(&mut tests, &Options::everything(), &mut progress)?;
    if progress.spoilt {
        bail!("not all of it was measured");
    }
    Ok(progress.figures)
}

/// Runs the rig.
pub fn run(lab: &Lab, options: &Options, report: &mut Report) {
    // Where there is none to be had, nothing can be told.
    if let Err(error) = setup::need(&NEEDED).and_then(|()| image::kernel()) {
        return report.skip("vm", &format!("{error:#}"));
    }
    let started = Instant::now();
    let tests = options.chosen();
    let rig = tests.and_then(|tests| Ok((Rig::new(lab, options.profile(), &mut *report)?, tests)));
    match rig {
        Ok((mut rig, tests)) => rig.all(&tests, options),
        Err(error) => report.broken("vm", &error),
    }
    note(&format!("vm: {:.0} s in all", started.elapsed().as_secs_f64()));
}

struct Rig<'a> {
    lab: &'a Lab,
    dir: PathBuf,
    kernel: Kernel,
    initrd: PathBuf,
    report: &'a mut Report,
    boots: u64,
    /// More words for the kernel's command line.
    words: String,
}

/// How one run of the guest ended, as far as the host listened.
enum Heard {
    /// All of its tests are over.
    Done,
    /// The power may be cut.
    Ready,
}

/// What one boot has told so far.
#[derive(Default)]
struct Progress {
    /// The test that runs now, and since when.
    current: Option<(String, Instant)>,
    ledger: String,
    /// What was measured.
    figures: Vec<Value>,
    /// A test has failed, and the guest switches itself off.
    spoilt: bool,
}

impl<'a> Rig<'a> {
    fn new(lab: &'a Lab, profile: Profile, report: &'a mut Report) -> Result<Rig<'a>> {
        let (started, kernel) = (Instant::now(), image::kernel()?);
        let dir = lab.dir("vm")?;
        let initrd = initramfs::build(&dir, &kernel, &profile.underlay())?;
        let mib = fs::metadata(&initrd)?.len() >> 20;
        note(&format!("vm: initramfs of {mib} MiB in {:.1} s", started.elapsed().as_secs_f64()));
        Ok(Rig { lab, dir, kernel, initrd, report, boots: 0, words: String::new() })
    }

    fn all(&mut self, tests: &[&'static Test], options: &Options) {
        let shared = tests.iter().copied().filter(|test| test.boots == Boots::Shared);
        self.shared(shared.collect(), options);
        for test in tests {
            if let Boots::Cut(cache) = test.boots
                && let Err(error) = self.cut(test, cache, options)
            {
                self.report.broken(&format!("vm: {}", test.name), &error);
            }
        }
    }

    /// Runs tests in one boot, and those after one that fails in another.
    fn shared(&mut self, mut tests: VecDeque<&'static Test>, options: &Options) {
        while !tests.is_empty() {
            let mut progress = Progress::default();
            let before = tests.len();
            let outcome = self.once(&mut tests, options, &mut progress);
            let left = format!("the guest left {} tests undone", tests.len());
            let error = match outcome {
                Err(error) => error,
                Ok(()) if tests.len() < before => continue,
                Ok(()) => anyhow!(left),
            };
            // Without a test to blame, another boot would end as this one.
            let Some((name, _)) = progress.current else {
                return self.report.broken("vm", &error);
            };
            self.report.broken(&format!("vm: {name}"), &error);
            while tests.pop_front().is_some_and(|test| test.name != name) {}
        }
    }

    fn once(
        &mut self,
        tests: &mut VecDeque<&'static Test>,
        options: &Options,
        progress: &mut Progress,
    ) -> Result<()> {
        let names: Vec<_> = tests.iter().map(|test| test.name).collect();
        let most = tests.iter().map(|test| test.disks.len()).max().unwrap_or(0);
        let mut drives = Vec::new();
        for at in 0..most {
            let sizes = tests.iter().filter_map(|test| test.disks.get(at)).map(|disk| disk.size);
            drives.push(self.drive(at, sizes.max().unwrap_or(0), Cache::Plain)?);
        }
        let (names, seed) = (names.join(","), options.seed);
        let overclaim = u8::from(options.overclaim);
        let words =
            format!("underlay.tests={names} underlay.seed={seed} underlay.overclaim={overclaim}");
        let words = words + &self.words;
        let mut machine = self.boot(&drives, &words)?;
        match self.listen(&mut machine, tests, progress) {
            Ok(_) => machine.off(OFF),
            Err(error) => Err(error),
        }
    }

    /// Runs a test that loses its power again and again.
    fn cut(&mut self, test: &'static Test, cache: Cache, options: &Options) -> Result<()> {
        let mut rng = Rng::with_seed(options.seed);
        let mut drives = Vec::new();
        for (at, disk) in test.disks.iter().enumerate() {
            drives.push(self.drive(at, disk.size, cache)?);
        }
        let ledger = self.dir.join("ledger");
        fs::write(&ledger, "")?;
        let (name, file) = (LEDGER.to_string(), self.dir.join("ledger.drive"));
        drives.push(Drive { name, file: file.clone(), cache: Cache::Plain });
        for phase in 0..=options.cuts {
            let told = fs::read(&ledger)?;
            // The lines, and as many more line ends as make whole sectors: at least one.
            let mut whole = told;
            whole.resize((whole.len() / 512 + 1) * 512, b'\n');
            fs::write(&file, whole)?;
            let last = u8::from(phase == options.cuts);
            let (name, seed) = (test.name, options.seed);
            let overclaim = u8::from(options.overclaim);
            let words = format!(
                "underlay.tests={name} underlay.phase={phase} underlay.last={last} \
                 underlay.seed={seed} underlay.overclaim={overclaim}"
            );
            let mut machine = self.boot(&drives, &words)?;
            let mut progress = Progress::default();
            let heard = self.listen(&mut machine, &mut VecDeque::from([test]), &mut progress)?;
            if let Heard::Done = heard {
                // A failed check has told so.
                if last == 0 && !progress.spoilt {
                    bail!("the test ended after {phase} of {} power cuts", options.cuts);
                }
                return machine.off(OFF);
            }
            thread::sleep(Duration::from_millis(rng.u64(LIFE)));
            for event in machine.cut()? {
                self.heard(event, &mut progress)?;
            }
            let mut file = fs::File::options().append(true).open(&ledger)?;
            file.write_all(progress.ledger.as_bytes()).context("keeping the ledger")?;
        }
        bail!("the test did not end after the last power cut")
    }

    /// Switches a guest on, once more if it doesn't get to its driver: the emulator now and then trips
    /// over code that a kernel patches while it starts, and nothing of ours has run by then.
    fn boot(&mut self, drives: &[Drive], words: &str) -> Result<Machine> {
        for _ in 1..STARTS {
            let mut machine = self.start(drives, words)?;
            let Err(error) = machine.up() else { return Ok(machine) };
            note(&format!("vm: boot {}: {error:#}; {}", self.boots, machine.last_words()));
            note("vm: once more");
        }
        let mut machine = self.start(drives, words)?;
        machine.up()?;
        Ok(machine)
    }

    fn start(&mut self, drives: &[Drive], words: &str) -> Result<Machine> {
        self.boots += 1;
        let name = format!("boot{}", self.boots);
        let system = (&self.kernel, self.initrd.as_path());
        Machine::boot(self.lab, &self.dir, &name, system, drives, words)
    }

    fn drive(&self, at: usize, size: u64, cache: Cache) -> Result<Drive> {
        let name = format!("disk{at}");
        let file = self.dir.join(format!("{name}.raw"));
        if file.exists() {
            fs::remove_file(&file)?;
        }
        initramfs::drive(&file, size)?;
        Ok(Drive { name, file, cache })
    }

    /// Listens until the guest is done or ready; tests that are over leave `tests`.
    fn listen(
        &mut self,
        machine: &mut Machine,
        tests: &mut VecDeque<&'static Test>,
        progress: &mut Progress,
    ) -> Result<Heard> {
        loop {
            let limit = tests.front().map_or(GRACE, |test| test.limit + GRACE);
            let since = progress.current.as_ref().map_or_else(Instant::now, |(_, since)| *since);
            let events = match machine.events(since + limit) {
                Ok(events) => events,
                Err(error) => {
                    note(&format!("vm: boot {}: {}", self.boots, machine.last_words()));
                    // It had told of a failed test, and then switched itself off.
                    return if progress.spoilt { Ok(Heard::Done) } else { Err(error) };
                }
            };
            let mut ready = false;
            for event in events {
                match &event {
                    Event::Done => return Ok(Heard::Done),
                    Event::Ready => ready = true,
                    Event::End(name) => tests.retain(|test| test.name != name),
                    _ => {}
                }
                self.heard(event, progress)?;
            }
            if ready {
                return Ok(Heard::Ready);
            }
        }
    }

    fn heard(&mut self, event: Event, progress: &mut Progress) -> Result<()> {
        match event {
            Event::Up(seconds) => note(&format!("vm: boot {}: up in {seconds:.1} s", self.boots)),
            Event::Begin(name) => progress.current = Some((name, Instant::now())),
            Event::Check { name, state, detail, seconds } => {
                let outcome = match state {
                    State::Ok => Ok(detail),
                    State::Failed => Err(anyhow!(detail)),
                    State::Skipped => Err(Unfit(detail).into()),
                };
                self.report.outcome(&format!("vm: {name}"), outcome, seconds);
            }
            Event::Ledger(line) => {
                progress.ledger.push_str(&line);
                progress.ledger.push('\n');
            }
            Event::Figure(value) => {
                note(&format!("vm: {value}"));
                progress.figures.push(value);
            }
            Event::End(name) => {
                if let Some((_, since)) = progress.current.take() {
                    note(&format!("vm: {name}: {:.1} s", since.elapsed().as_secs_f64()));
                }
            }
            Event::Spoilt => progress.spoilt = true,
            Event::Ready | Event::Done => {}
        }
        Ok(())
    }
}
