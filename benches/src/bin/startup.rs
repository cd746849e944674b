//! What a VMM adds to a machine's start: the smallest guest under a C program that makes nothing but the ioctls (the
//! floor), under Inlay's machine, under `inlay vm`, and under the monitors that `STRATOVIRT`, `FIRECRACKER` and `QEMU` name;
//! and what memory the programs take. Prints Markdown tables.
//!
//! ```text
//! startup [RUNS]
//! ```
//! The programs take turns, so that a busy moment of the host hits all of them.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use benches::guest::Guest;
use benches::peer::{MEMORY_MIB, Monitor};
use benches::process::{self, Run};
use benches::table::{markdown, median, milliseconds};
use inlay_tests::harness::Pss;

/// When a monitor's guest sleeps for certain.
const SETTLED: Duration = Duration::from_millis(1500);

const DEFAULT_RUNS: usize = 20;

/// A program that starts a machine.
struct Candidate {
    name: &'static str,
    program: PathBuf,
    arguments: Vec<OsString>,
    /// Whether it prints how long its guest's first instruction took, and ends with success. A monitor does neither.
    tells: bool,
    runs: Vec<Run>,
}

fn main() -> Result<()> {
    let runs = match std::env::args().nth(1) {
        Some(text) => text.parse().context("The number of runs is no number")?,
        None => DEFAULT_RUNS,
    };
    if let Err(error) = std::fs::OpenOptions::new().read(true).write(true).open("/dev/kvm") {
        println!("skipped: VMM start-up: /dev/kvm: {error}");
        return Ok(());
    }

    let directory = tempfile::tempdir().context("No temporary directory")?;
    let program = |name| -> Result<PathBuf> {
        let program = std::env::current_exe()?.with_file_name(name);
        ensure!(program.exists(), "{} is not built", program.display());
        Ok(program)
    };
    let inlay = program("inlay")?;
    // First: that each runs a guest that sleeps also shows that no time below is one of a refusal.
    let memory = memory(&inlay, directory.path())?;

    let guest = Guest::Ending.images().context("The guest cannot be written")?;
    let mut candidates = vec![
        Candidate::telling("floor: a C program, the ioctls alone", compile_floor(directory.path())?, vec![]),
        Candidate::telling("Inlay's machine", program("tiny_vm")?, vec![guest.elf.path().into()]),
    ];
    candidates.extend(Monitor::all(&inlay, &guest, directory.path())?.into_iter().map(Candidate::monitor));
    for _ in 0..runs {
        for candidate in &mut candidates {
            candidate.run()?;
        }
    }
    println!("{}", markdown(&rows(&candidates)?));
    println!("Medians of {runs} runs in turns; 1 vCPU, {MEMORY_MIB} MiB, a guest of three instructions.\n");
    println!("{memory}");
    println!("A machine with a QMP socket and no device, while its guest sleeps.");
    Ok(())
}

/// What each monitor costs beside its guest's memory.
fn memory(inlay: &Path, directory: &Path) -> Result<String> {
    let guest = Guest::Sleeping.images().context("The guest cannot be written")?;
    let mut rows = vec![["", "PSS without guest memory", "budget"].map(String::from).to_vec()];
    for monitor in Monitor::all(inlay, &guest, directory)? {
        let mut running = Running::start(&monitor)?;
        std::thread::sleep(SETTLED);
        ensure!(running.0.try_wait()?.is_none(), "{} does not run a guest that sleeps", monitor.name);
        let pss = Pss::of_monitor(running.0.id(), MEMORY_MIB << 10)?;
        let budget = if monitor.program == inlay { "4096 KiB" } else { "" };
        rows.push(vec![monitor.name.to_owned(), format!("{} KiB", pss.own), budget.to_owned()]);
    }
    Ok(markdown(&rows))
}

/// A process that does not outlive this.
struct Running(Child);

impl Running {
    fn start(monitor: &Monitor) -> Result<Self> {
        let mut command = Command::new(&monitor.program);
        command.args(&monitor.arguments).stdin(Stdio::null()).stdout(Stdio::null());
        Ok(Self(command.spawn().with_context(|| format!("{} cannot be run", monitor.program.display()))?))
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Candidate {
    fn telling(name: &'static str, program: PathBuf, arguments: Vec<OsString>) -> Self {
        Self { name, program, arguments, tells: true, runs: Vec::new() }
    }

    fn monitor(monitor: Monitor) -> Self {
        let Monitor { name, program, arguments } = monitor;
        Self { name, program, arguments, tells: false, runs: Vec::new() }
    }

    fn run(&mut self) -> Result<()> {
        let mut command = Command::new(&self.program);
        if !self.tells {
            command.stderr(Stdio::null());
        }
        let run = process::run(command.args(&self.arguments))
            .with_context(|| format!("{} cannot be run", self.program.display()))?;
        ensure!(run.success || !self.tells, "{} has failed: {}", self.name, run.output);
        self.runs.push(run);
        Ok(())
    }

    /// From the creation of the VM to the guest's first exit, as the program itself measured.
    fn first_instruction(&self) -> Result<String> {
        if !self.tells {
            return Ok(String::new());
        }
        let times = self.runs.iter().map(|run| Ok(Duration::from_nanos(run.output.trim().parse()?)));
        Ok(milliseconds(median(times.collect::<Result<Vec<_>>>()?)))
    }

    fn wall(&self) -> Duration {
        median(self.runs.iter().map(|run| run.wall))
    }

    fn cpu(&self) -> Duration {
        median(self.runs.iter().map(|run| run.cpu))
    }
}

fn rows(candidates: &[Candidate]) -> Result<Vec<Vec<String>>> {
    let floor = candidates.first().map(Candidate::wall).unwrap_or_default().as_secs_f64();
    let head = ["", "VM created to first instruction", "whole process", "over the floor", "CPU time"];
    let mut rows = vec![head.map(String::from).to_vec()];
    for candidate in candidates {
        rows.push(vec![
            candidate.name.to_owned(),
            candidate.first_instruction()?,
            milliseconds(candidate.wall()),
            format!("{:.2} times", candidate.wall().as_secs_f64() / floor),
            milliseconds(candidate.cpu()),
        ]);
    }
    Ok(rows)
}

fn compile_floor(directory: &Path) -> Result<PathBuf> {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("floor/floor.c");
    let program = directory.join("floor");
    let status = Command::new("cc")
        .args(["-O2", "-Wall", "-Werror", "-o"])
        .args([&program, &source])
        .status()
        .context("The C compiler cannot be run")?;
    ensure!(status.success(), "The C compiler has failed");
    Ok(program)
}
