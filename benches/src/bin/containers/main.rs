//! Containers through real containerd: Inlay beside runc, in turns, on the host that this runs in.
//! Prints Markdown tables. `--help` says what can be measured.

mod backends;
mod idle;
mod together;

use std::fs;
use std::num::{NonZeroU64, NonZeroUsize};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use benches::table::{markdown, median, milliseconds};
use clap::{Parser, Subcommand};
use inlay_tests::harness::trace::{STAGES, Start};
use inlay_tests::harness::{HOME, Parts, Pss, Runtime, configure, containerd, unique};
use inlay_tests::images;

/// How long a started container may take to its first output.
const TRACE_LIMIT: Duration = Duration::from_secs(30);

#[derive(Parser)]
#[command(about = "Starts containers of Inlay and of runc in turns, and prints tables of what that took")]
struct Arguments {
    #[command(subcommand)]
    what: What,
}

#[derive(Subcommand)]
enum What {
    /// `ctr run --rm`, the stages of a cold start, memory and disk.
    Runs {
        #[arg(default_value = "10")]
        runs: NonZeroUsize,
    },
    /// One start at a time, by where its guest comes from.
    Backends {
        #[arg(default_value = "10")]
        rounds: NonZeroUsize,
    },
    /// What a container that sleeps takes of a processor.
    Idle {
        #[arg(default_value = "20")]
        seconds: NonZeroU64,
    },
    /// So many starts at once. A hundred sandboxes that boot take more memory than the nested host usually has: `--memory 8G`.
    Together(together::Order),
}

fn main() -> Result<()> {
    match Arguments::parse().what {
        What::Runs { runs } => one_by_one(runs.get()),
        What::Backends { rounds } => backends::run(rounds.get()),
        What::Idle { seconds } => idle::run(Duration::from_secs(seconds.get())),
        What::Together(order) => together::run(order),
    }
}

/// Measures whole lives of containers, and prints.
fn one_by_one(runs: usize) -> Result<()> {
    let parts = Parts::find();
    configure(&parts.configuration(""))?;

    // Once each, uncounted: the caches of a host that runs containers are warm.
    for runtime in [Runtime::Runc, Runtime::Inlay] {
        run(runtime)?;
    }
    fs::remove_file(trace()).context("No start was traced")?;

    let (mut runc, mut inlay) = (Vec::new(), Vec::new());
    for _ in 0..runs {
        runc.push(run(Runtime::Runc)?);
        inlay.push(run(Runtime::Inlay)?);
    }
    println!("### `ctr run --rm … echo .`, median of {runs} in turns\n");
    println!("{}", walls(runc, inlay));
    println!("### The stages of a cold start, medians of the same {runs}\n");
    println!("{}", stages(&Start::read(&trace())?));
    println!("### Memory and disk\n");
    print!("{}", memory_and_disk(&parts)?);
    Ok(())
}

/// The file to which starts write their times.
fn trace() -> PathBuf {
    Path::new(HOME).join("trace.jsonl")
}

/// The times of `count` starts since the file was removed, or of those that tell them in time. A container's first output may come a moment after its start.
fn traced(count: usize) -> Result<Vec<Start>> {
    let begun = Instant::now();
    loop {
        let starts = if trace().exists() { Start::read(&trace())? } else { Vec::new() };
        if starts.len() >= count {
            return Ok(starts);
        }
        if begun.elapsed() > TRACE_LIMIT {
            eprintln!("{} of {count} starts have told their times", starts.len());
            return Ok(starts);
        }
        thread::sleep(Duration::from_millis(10));
    }
}

/// The operator's command.
fn inlay(parts: &Parts, arguments: &[&str]) -> Result<()> {
    let output = Command::new(&parts.shim).args(arguments).output().context("Cannot run inlay")?;
    ensure!(output.status.success(), "inlay {arguments:?} has failed: {}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}

/// One container's whole life.
fn run(runtime: Runtime) -> Result<Duration> {
    let id = unique("bench");
    let output = containerd().ctr(&["run", "--rm", "--runtime", runtime.name(), images::BUSYBOX, &id, "echo", "."]);
    ensure!(output.status.success() && output.stdout == ".\n", "{} has failed: {output:#?}", runtime.name());
    Ok(output.wall)
}

fn walls(runc: Vec<Duration>, inlay: Vec<Duration>) -> String {
    let anchor = median(runc.iter().copied());
    let row = |name: &str, walls: Vec<Duration>| {
        let middle = median(walls.iter().copied());
        let least = walls.iter().min().copied().unwrap_or_default();
        let most = walls.iter().max().copied().unwrap_or_default();
        let ratio = format!("{:.2}", middle.as_secs_f64() / anchor.as_secs_f64());
        vec![name.to_owned(), milliseconds(middle), milliseconds(least), milliseconds(most), ratio]
    };
    let head = ["runtime", "median", "least", "most", "over runc"].map(String::from).to_vec();
    markdown(&[head, row("runc", runc), row("Inlay", inlay)])
}

fn stages(starts: &[Start]) -> String {
    let mut rows = vec![["stage", "median"].map(String::from).to_vec()];
    for (index, stage) in STAGES.iter().enumerate() {
        let time = median(starts.iter().filter_map(|start| start.stages().get(index).copied()));
        rows.push(vec![(*stage).to_owned(), milliseconds(time)]);
    }
    rows.push(vec!["T0→T4 until the agent answers".into(), milliseconds(median(starts.iter().map(Start::to_agent)))]);
    rows.push(vec!["T0→T6 until the first output".into(), milliseconds(median(starts.iter().map(Start::to_output)))]);
    markdown(&rows)
}

fn memory_and_disk(parts: &Parts) -> Result<String> {
    let id = unique("bench-idle");
    let ctr = |args: &[&str]| containerd().ctr(args);
    let args = ["run", "--detach", "--runtime", Runtime::Inlay.name(), images::BUSYBOX, &id, "sleep", "1000"];
    ensure!(ctr(&args).status.success(), "An idle container cannot be started");
    let pss = Pss::of(containerd().pid_of(&id)?)?;
    let free = ctr(&["task", "exec", "--exec-id", "free", &id, "free", "-k"]).ok().stdout;
    let numbers = free.lines().find(|line| line.starts_with("Mem:")).context("free printed no memory")?;
    let numbers: Vec<&str> = numbers.split_whitespace().collect();
    ctr(&["task", "delete", "--force", &id]);
    ctr(&["container", "delete", &id]);

    let size = |path: &Path| Ok::<_, anyhow::Error>(format!("{} bytes", fs::metadata(path)?.len()));
    let row = |what: &str, figure: String, budget: &str| vec![what.to_owned(), figure, budget.to_owned()];
    Ok(markdown(&[
        row("", "measured".into(), "budget"),
        row("PSS of the shim process without guest RAM", format!("{} KiB", pss.own), "12 MiB"),
        row("PSS of guest RAM, idle container", format!("{} KiB", pss.guest), ""),
        row("memory in the guest", format!("{} KiB", numbers.get(1).unwrap_or(&"?")), ""),
        row("used in the guest", format!("{} KiB", numbers.get(2).unwrap_or(&"?")), "25 MB"),
        row("guest kernel", size(&parts.kernel)?, "20 MB with the initrd"),
        row("minimal initrd", size(&parts.initrd)?, "6 MB"),
        row("inlay", size(&parts.shim)?, ""),
    ]))
}
