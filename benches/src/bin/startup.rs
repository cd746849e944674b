//! What a VMM adds to a machine's start: the smallest guest under a C program that makes nothing
//! but the ioctls (the floor), and under Inlay's machine. Prints a Markdown table.
//!
//! ```text
//! startup [RUNS]
//! ```
//! The programs take turns, so that a busy moment of the host hits all of them.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use benches::process::{self, Run};
use benches::table::{markdown, median, milliseconds};

const DEFAULT_RUNS: usize = 20;

/// A program that starts a machine.
struct Candidate {
    name: &'static str,
    program: PathBuf,
    arguments: Vec<PathBuf>,
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
    let guest = benches::guest::write().context("The guest cannot be written")?;
    let tiny_vm = std::env::current_exe()?.with_file_name("tiny_vm");
    ensure!(tiny_vm.exists(), "{} is not built", tiny_vm.display());
    let candidate = |name, program, arguments| Candidate { name, program, arguments, runs: Vec::new() };
    let mut candidates = [
        candidate("floor: a C program, the ioctls alone", compile_floor(directory.path())?, vec![]),
        candidate("Inlay's machine", tiny_vm, vec![guest.path().to_owned()]),
    ];
    for _ in 0..runs {
        for candidate in &mut candidates {
            candidate.run()?;
        }
    }
    print!("{}", markdown(&rows(&candidates)?));
    println!();
    println!("Medians of {runs} runs in turns; 1 vCPU, 128 MiB, a guest of three instructions.");
    Ok(())
}

impl Candidate {
    fn run(&mut self) -> Result<()> {
        let run = process::run(Command::new(&self.program).args(&self.arguments))
            .with_context(|| format!("{} cannot be run", self.program.display()))?;
        ensure!(run.success, "{} has failed: {}", self.name, run.output);
        self.runs.push(run);
        Ok(())
    }

    /// From the creation of the VM to the guest's first exit, as the program itself measured.
    fn first_instruction(&self) -> Result<Duration> {
        let times = self.runs.iter().map(|run| Ok(Duration::from_nanos(run.output.trim().parse()?)));
        Ok(median(times.collect::<Result<Vec<_>>>()?))
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
            milliseconds(candidate.first_instruction()?),
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
