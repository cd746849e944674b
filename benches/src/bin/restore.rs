//! A machine that is built and one that is restored from a snapshot, up to the guest's first instruction, in turns in one
//! process. Then how long a running machine stands still while it is saved. Prints Markdown tables.
//!
//! ```text
//! restore [RUNS]
//! ```

use std::fs::OpenOptions;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use benches::guest;
use benches::table::{markdown, median, milliseconds};
use vmm::{
    BalloonConfig, BootConfig, Copied, ExitReason, Machine, MachineConfig, MemoryConfig, RngConfig, TracePoints,
    VsockConfig,
};

const DEFAULT_RUNS: usize = 20;

/// What a machine that is saved while it runs has in use.
const TOUCHED_MIB: u32 = 64;

/// How long a guest may take to say that it waits.
const PATIENCE: Duration = Duration::from_secs(10);

/// A way to a machine.
struct Candidate<'a> {
    name: &'static str,
    make: Box<dyn Fn() -> Result<Machine> + 'a>,
    starts: Vec<Start>,
}

/// Times from the call on.
struct Start {
    vm_created: Duration,
    made: Duration,
    first_run: Duration,
    first_instruction: Duration,
}

fn main() -> Result<()> {
    let runs = match std::env::args().nth(1) {
        Some(text) => text.parse().context("The number of runs is no number")?,
        None => DEFAULT_RUNS,
    };
    if let Err(error) = OpenOptions::new().read(true).write(true).open("/dev/kvm") {
        println!("skipped: restore: /dev/kvm: {error}");
        return Ok(());
    }

    let directory = tempfile::tempdir().context("No temporary directory")?;
    let place = |name: &str| directory.path().join(name);
    save(&place("bare"), None, bare)?;
    save(&place("devices"), None, with_devices)?;
    save(&place("difference"), Some(&place("whole")), bare)?;
    let kernel = guest::write()?;
    let restored = |name, configure: fn(&Path) -> MachineConfig| {
        let directory = place(name);
        move || Ok(Machine::restore(configure(Path::new("")), &directory)?)
    };
    let candidate = |name, make| Candidate { name, make, starts: Vec::new() };
    let mut candidates = [
        candidate("built", Box::new(|| Ok(Machine::build(bare(kernel.path()))?)) as Box<dyn Fn() -> Result<Machine>>),
        candidate("restored", Box::new(restored("bare", bare))),
        candidate("restored, a difference over a whole one", Box::new(restored("difference", bare))),
        candidate("built, with vsock, rng and balloon", Box::new(|| Ok(Machine::build(with_devices(kernel.path()))?))),
        candidate("restored, with vsock, rng and balloon", Box::new(restored("devices", with_devices))),
    ];
    for _ in 0..runs {
        for candidate in &mut candidates {
            candidate.start()?;
        }
    }
    print!("{}", markdown(&rows(&candidates)));
    println!();
    println!("Medians of {runs} in turns; 1 vCPU, 128 MiB, a guest of a few instructions.");
    println!();
    print!("{}", markdown(&stand_still(&place("running"), runs)?));
    println!();
    println!("Medians of {runs} in turns of a machine that runs with {TOUCHED_MIB} MiB of 128 in use.");
    Ok(())
}

/// How long a running machine stands still for a snapshot, and how long that takes.
fn stand_still(directory: &Path, runs: usize) -> Result<Vec<Vec<String>>> {
    let kernel = guest::write_touching(TOUCHED_MIB)?;
    let machine = Machine::build(bare(kernel.path()))?;
    machine.start()?;
    wait_until_it_waits(&machine)?;
    let (mut still, mut whole, mut live) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..runs {
        let begin = Instant::now();
        machine.snapshot(directory)?;
        machine.resume()?;
        still.push(begin.elapsed());
        let begin = Instant::now();
        let taken = machine.snapshot_live(directory)?;
        ensure!(matches!(taken.copied, Copied::Running { .. }), "Its memory cannot be protected: {taken:?}");
        whole.push(begin.elapsed());
        live.push(taken.stood_still);
    }
    let row = |name: &str, still: &[Duration], all: &[Duration]| {
        vec![name.to_owned(), milliseconds(median(still.iter().copied())), milliseconds(median(all.iter().copied()))]
    };
    let head = ["", "stands still", "all is on the disk"].map(String::from).to_vec();
    Ok(vec![head, row("saved, then resumed", &still, &still), row("saved while it runs", &live, &whole)])
}

fn wait_until_it_waits(machine: &Machine) -> Result<()> {
    let begin = Instant::now();
    while machine.console_tail() != b"w" {
        ensure!(begin.elapsed() < PATIENCE, "The guest that waits does not say so");
        std::thread::yield_now();
    }
    Ok(())
}

fn bare(kernel: &Path) -> MachineConfig {
    let boot = BootConfig { kernel: kernel.into(), initrd: None, cmdline: String::new() };
    MachineConfig::new("tiny", MemoryConfig::from_mib(128), boot)
}

fn with_devices(kernel: &Path) -> MachineConfig {
    let mut config = bare(kernel);
    config.vsock = Some(VsockConfig { guest_cid: 3, uds_path: None });
    config.rng = Some(RngConfig::default());
    config.balloon = Some(BalloonConfig::default());
    config
}

/// Saves a guest that waits, and releases it in its snapshot; as a difference to one in `whole`, where that is given.
fn save(directory: &Path, whole: Option<&Path>, configure: fn(&Path) -> MachineConfig) -> Result<()> {
    let kernel = guest::write_waiting()?;
    let machine = Machine::build(configure(kernel.path()))?;
    machine.track_writes()?;
    machine.start()?;
    wait_until_it_waits(&machine)?;
    match whole {
        None => machine.snapshot(directory)?,
        Some(whole) => {
            machine.snapshot(whole)?;
            machine.resume()?;
            machine.snapshot_diff(directory, whole)?;
        }
    }
    let memory = OpenOptions::new().write(true).open(whole.unwrap_or(directory).join("memory"))?;
    Ok(memory.write_all_at(&[1], guest::RELEASE)?)
}

impl Candidate<'_> {
    fn start(&mut self) -> Result<()> {
        let begin = TracePoints::now();
        let machine = (self.make)()?;
        let made = TracePoints::now();
        machine.start()?;
        let reason = machine.wait();
        ensure!(reason == ExitReason::TripleFault, "{}: {reason}", self.name);
        let trace = machine.trace();
        let (Some(vm_created), Some(first_run), Some(said)) =
            (trace.vm_created(), trace.first_run(), trace.guest_init())
        else {
            bail!("{}: the guest said nothing", self.name)
        };
        let since = |at: u64| Duration::from_nanos(at.saturating_sub(begin));
        self.starts.push(Start {
            vm_created: since(vm_created),
            made: since(made),
            first_run: since(first_run),
            first_instruction: since(said),
        });
        Ok(())
    }

    fn median(&self, time: fn(&Start) -> Duration) -> Duration {
        median(self.starts.iter().map(time))
    }
}

fn rows(candidates: &[Candidate]) -> Vec<Vec<String>> {
    let head = ["", "VM created", "machine made", "KVM_RUN", "first instruction told of"];
    let mut rows = vec![head.map(String::from).to_vec()];
    for candidate in candidates {
        let times: [fn(&Start) -> Duration; 4] =
            [|start| start.vm_created, |start| start.made, |start| start.first_run, |start| start.first_instruction];
        let times = times.map(|time| milliseconds(candidate.median(time)));
        rows.push([vec![candidate.name.to_owned()], times.to_vec()].concat());
    }
    rows
}
