//! What a VMM adds to a machine's start: the smallest guest under a C program that makes nothing
//! but the ioctls (the floor), under Inlay's machine, and under `inlay vm`, whose memory is measured as well. Prints
//! Markdown tables.
//!
//! ```text
//! startup [RUNS]
//! ```
//! The programs take turns, so that a busy moment of the host hits all of them.

use std::ffi::OsString;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use benches::process::{self, Run};
use benches::table::{markdown, median, milliseconds};
use inlay_tests::harness::Pss;

const DEFAULT_RUNS: usize = 20;

/// A program that starts a machine.
struct Candidate {
    name: &'static str,
    program: PathBuf,
    arguments: Vec<OsString>,
    /// Reports the guest's triple fault as a failure, and no times.
    reports_fault: bool,
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
    let program = |name| -> Result<PathBuf> {
        let program = std::env::current_exe()?.with_file_name(name);
        ensure!(program.exists(), "{} is not built", program.display());
        Ok(program)
    };
    let candidate = |name, program, arguments, reports_fault| Candidate {
        name,
        program,
        arguments,
        reports_fault,
        runs: Vec::new(),
    };
    let mut candidates = [
        candidate("floor: a C program, the ioctls alone", compile_floor(directory.path())?, vec![], false),
        candidate("Inlay's machine", program("tiny_vm")?, vec![guest.path().into()], false),
        candidate("inlay vm, confined", program("inlay")?, vm(guest.path(), &[]), true),
    ];
    for _ in 0..runs {
        for candidate in &mut candidates {
            candidate.run()?;
        }
    }
    print!("{}", markdown(&rows(&candidates)?));
    println!();
    println!("Medians of {runs} runs in turns; 1 vCPU, 128 MiB, a guest of three instructions.");
    println!();
    let pss = memory(&program("inlay")?)?;
    println!(
        "PSS of `inlay vm` without guest RAM, a second after the guest sleeps: {} KiB (budget 4096 KiB).",
        pss.own
    );
    Ok(())
}

/// The command line of a machine.
fn vm(kernel: &Path, more: &[&str]) -> Vec<OsString> {
    let words = ["vm", "-machine", "microvm,dump-guest-core=off", "-m", "128"].iter().chain(more).map(OsString::from);
    words.chain(["-kernel".into(), kernel.into()]).collect()
}

/// What a machine that has nothing to do takes, with a QMP socket and no device.
fn memory(inlay: &Path) -> Result<Pss> {
    let (directory, guest) = (tempfile::tempdir()?, benches::guest::write_sleeper()?);
    let qmp = format!("unix:{},server,nowait", directory.path().join("qmp").display());
    let mut child = Command::new(inlay)
        .args(vm(guest.path(), &["-serial", "stdio", "-qmp", &qmp]))
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()?;
    let mut said = [0];
    child.stdout.as_mut().context("The guest has no console")?.read_exact(&mut said)?;
    std::thread::sleep(Duration::from_secs(1));
    let pss = Pss::of(child.id());
    child.kill()?;
    child.wait()?;
    pss
}

impl Candidate {
    fn run(&mut self) -> Result<()> {
        let mut command = Command::new(&self.program);
        if self.reports_fault {
            command.stderr(Stdio::null());
        }
        let run = process::run(command.args(&self.arguments))
            .with_context(|| format!("{} cannot be run", self.program.display()))?;
        ensure!(run.success != self.reports_fault, "{} has failed: {}", self.name, run.output);
        self.runs.push(run);
        Ok(())
    }

    /// From the creation of the VM to the guest's first exit, as the program itself measured.
    fn first_instruction(&self) -> Result<String> {
        if self.reports_fault {
            return Ok("-".into());
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
