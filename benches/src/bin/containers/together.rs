//! Containers that are started at once: runc, sandboxes that boot, sandboxes that are restored from a template.

use std::fs;
use std::num::NonZeroUsize;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use benches::table::{markdown, median, milliseconds};
use clap::Args;
use inlay_tests::harness::trace::Start;
use inlay_tests::harness::{HostState, Parts, Runtime, configure, containerd, unique};
use inlay_tests::images;

use crate::{inlay, trace, traced};

/// containerd gives a shim 2 s to say which FIFOs its container has, and `ctr` leaves them where no answer comes by then.
const REMOVED_AT_ONCE: usize = 10;
/// The template of the usual configuration file.
const TEMPLATE: &str = "default";

/// Where the guest comes from.
#[derive(Clone, Copy, PartialEq)]
enum Kind {
    Runc,
    Booted,
    Restored,
}

impl Kind {
    fn name(self) -> &'static str {
        match self {
            Self::Runc => "runc",
            Self::Booted => "Inlay, booted",
            Self::Restored => "Inlay, restored",
        }
    }

    fn runtime(self) -> Runtime {
        if self == Self::Runc { Runtime::Runc } else { Runtime::Inlay }
    }
}

/// What so many starts at once have cost, over all rounds.
#[derive(Default)]
struct Figures {
    walls: Vec<Duration>,
    removals: Vec<Duration>,
    starts: Vec<Start>,
    failed: usize,
}

/// How many of what. Kinds take turns, round by round, until each has had its rounds.
#[derive(Args)]
pub struct Order {
    /// Rounds of runc; 0 leaves it out, as it does with the others.
    #[arg(long, default_value = "3")]
    runc: usize,
    /// Rounds of sandboxes that boot.
    #[arg(long, default_value = "3")]
    booted: usize,
    /// Rounds of sandboxes that are restored.
    #[arg(long, default_value = "3")]
    restored: usize,
    /// How many at once; one after the other, where there are several.
    #[arg(default_values = ["1", "10", "100"])]
    counts: Vec<NonZeroUsize>,
}

/// Measures and prints. Fails if a start has failed.
pub fn run(order: Order) -> Result<()> {
    let kinds = [(Kind::Runc, order.runc), (Kind::Booted, order.booted), (Kind::Restored, order.restored)];
    let kinds: Vec<_> = kinds.into_iter().filter(|(_, rounds)| *rounds > 0).collect();
    let most = kinds.iter().map(|(_, rounds)| *rounds).max().context("No rounds are asked for")?;
    let parts = Parts::find();
    // Once each, uncounted.
    for (kind, _) in &kinds {
        prepare(&parts, *kind)?;
        crate::run(kind.runtime())?;
    }
    let mut rows = vec![head()];
    let mut failed = 0;
    for count in order.counts {
        let mut all: Vec<_> = kinds.iter().map(|(kind, rounds)| (*kind, *rounds, Figures::default())).collect();
        for number in 0..most {
            for (kind, _, figures) in all.iter_mut().filter(|(_, rounds, _)| number < *rounds) {
                prepare(&parts, *kind)?;
                round(*kind, count.get(), figures)?;
            }
        }
        let anchor = all.iter().find(|(kind, ..)| *kind == Kind::Runc);
        let anchor = anchor.map(|(.., figures)| median(figures.walls.iter().copied()));
        rows.extend(all.iter().map(|(kind, _, figures)| row(*kind, count.get(), figures, anchor)));
        failed += all.iter().map(|(.., figures)| figures.failed).sum::<usize>();
    }
    println!("### So many `ctr run --detach` at once, medians of rounds in turns\n");
    println!("{}", markdown(&rows));
    if order.restored > 0 {
        inlay(&parts, &["template", "remove", TEMPLATE])?;
    }
    ensure!(failed == 0, "{failed} starts have failed");
    Ok(())
}

/// The configuration of this kind, and its template.
fn prepare(parts: &Parts, kind: Kind) -> Result<()> {
    let factory = format!("[factory]\nenable_template = {}\n", kind == Kind::Restored);
    configure(&format!("{}\n{factory}", parts.configuration("")))?;
    if kind == Kind::Restored {
        inlay(parts, &["template", "create", TEMPLATE, "--if-needed"])?;
    }
    let _ = fs::remove_file(trace());
    Ok(())
}

/// Starts so many at once, and removes them. Nothing may be left of Inlay's.
fn round(kind: Kind, count: usize, figures: &mut Figures) -> Result<()> {
    let before = HostState::take();
    let ids: Vec<String> = (0..count).map(|_| unique("together")).collect();
    let begun = Instant::now();
    let started = all(&ids, |id| {
        let script = "echo .; exec sleep 10000";
        ctr(&["run", "--detach", "--runtime", kind.runtime().name(), images::BUSYBOX, id, "sh", "-c", script])
    })?;
    figures.walls.push(begun.elapsed());
    for (id, output) in ids.iter().zip(&started).filter(|(_, output)| !output.status.success()) {
        figures.failed += 1;
        eprintln!("{} failed: {}\n{}", kind.name(), String::from_utf8_lossy(&output.stderr).trim(), log_of(id)?);
    }
    if kind != Kind::Runc {
        figures.starts.extend(traced(started.iter().filter(|output| output.status.success()).count())?);
    }
    let begun = Instant::now();
    let mut removed = Vec::new();
    for ids in ids.chunks(REMOVED_AT_ONCE) {
        removed.extend(all(ids, |id| ctr(&["task", "delete", "--force", id]))?);
        removed.extend(all(ids, |id| ctr(&["container", "delete", id]))?);
    }
    figures.removals.push(begun.elapsed());
    for output in removed.iter().filter(|output| !output.status.success()) {
        eprintln!("{} not removed: {}", kind.name(), String::from_utf8_lossy(&output.stderr).trim());
    }
    eprintln!("{count} at once, {}: {:.1} s", kind.name(), figures.walls.last().map_or(0.0, Duration::as_secs_f64));
    containerd().collect_garbage();
    if kind != Kind::Runc {
        HostState::assert_settles(&before);
    }
    Ok(())
}

fn all(ids: &[String], command: impl Fn(&str) -> Command) -> Result<Vec<Output>> {
    let children = ids.iter().map(|id| command(id).spawn().context("Cannot run ctr"));
    let children = children.collect::<Result<Vec<_>>>()?;
    children.into_iter().map(|child| child.wait_with_output().context("Cannot wait for ctr")).collect()
}

fn ctr(arguments: &[&str]) -> Command {
    let mut command = containerd().command();
    command.args(arguments).stdout(Stdio::null()).stderr(Stdio::piped());
    command
}

/// What the sandbox has logged: why its machine has ended, if it has.
fn log_of(id: &str) -> Result<String> {
    let path = containerd().log();
    let text = fs::read(&path).with_context(|| format!("Cannot read {}", path.display()))?;
    let (text, mark) = (String::from_utf8_lossy(&text), format!("sandbox={id} "));
    let lines = text.lines().filter(|line| line.contains(&mark) && !line.contains("level=debug"));
    Ok(lines.collect::<Vec<_>>().join("\n"))
}

fn head() -> Vec<String> {
    [
        "at once",
        "",
        "rounds",
        "failed",
        "all started",
        "least",
        "most",
        "over runc",
        "turn→T4",
        "T0→T4",
        "T0→T6",
        "all removed",
    ]
    .map(String::from)
    .to_vec()
}

fn row(kind: Kind, count: usize, figures: &Figures, anchor: Option<Duration>) -> Vec<String> {
    let middle = median(figures.walls.iter().copied());
    let of_starts = |time: fn(&Start) -> Duration| match figures.starts.as_slice() {
        [] => String::new(),
        starts => milliseconds(median(starts.iter().map(time))),
    };
    vec![
        count.to_string(),
        kind.name().to_owned(),
        figures.walls.len().to_string(),
        figures.failed.to_string(),
        milliseconds(middle),
        milliseconds(figures.walls.iter().min().copied().unwrap_or_default()),
        milliseconds(figures.walls.iter().max().copied().unwrap_or_default()),
        anchor.map_or_else(String::new, |anchor| format!("{:.2}", middle.as_secs_f64() / anchor.as_secs_f64())),
        of_starts(Start::turn_to_agent),
        of_starts(Start::to_agent),
        of_starts(Start::to_output),
        milliseconds(median(figures.removals.iter().copied())),
    ]
}
