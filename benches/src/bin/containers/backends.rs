//! One container at a time, by where its guest comes from: booted, or restored with each kind of memory.

use std::fs;
use std::iter;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Result, ensure};
use benches::table::{markdown, median, milliseconds};
use inlay_tests::harness::trace::{STAGES, Start, now};
use inlay_tests::harness::{Parts, Pss, Runtime, configure, containerd, unique};
use inlay_tests::images;

use crate::{inlay, trace, traced};

/// When a container that does nothing has come to rest.
const REST: Duration = Duration::from_secs(10);
/// Between two looks at a sandbox's memory.
const LOOK: Duration = Duration::from_millis(20);

/// Where the guest comes from.
#[derive(Clone, Copy, PartialEq)]
enum Backend {
    Runc,
    Booted,
    Mapped,
    /// Without a working set.
    Faults,
    /// With one.
    Lazy,
    Pool,
}

/// What the starts of one kind have cost.
#[derive(Default)]
struct Figures {
    walls: Vec<Duration>,
    starts: Vec<Start>,
    /// When the agent had answered, in a start that is not counted.
    answered: Option<Pss>,
    /// When its container has just been started.
    started: Vec<Pss>,
    /// Some time later.
    rested: Option<Pss>,
}

/// Measures so many starts of each kind, in turns there and back, and prints a table.
pub fn run(rounds: usize) -> Result<()> {
    let parts = Parts::find();
    let mut all: Vec<_> = Backend::ALL.iter().map(|backend| (*backend, Figures::default())).collect();
    for (backend, figures) in &mut all {
        // Makes the template, and is not counted.
        figures.answered = watched_round(&parts, *backend)?;
    }
    for number in 1..=rounds {
        // There and back, as a start is slower after one whose memory came page by page.
        for index in 0..all.len() {
            let index = if number % 2 == 0 { all.len() - 1 - index } else { index };
            let (backend, figures) = &mut all[index];
            round(&parts, *backend, figures, number == rounds)?;
        }
        eprintln!("{number} of {rounds} rounds");
    }
    println!("### Where a guest comes from, medians of {rounds} starts in turns\n");
    println!("{}", markdown(&rows(&all)));
    println!(
        "Private: memory of the guest that the host has for this sandbox alone: in one start when the agent has answered, when `ctr run --detach` \
         has returned, and 10 s later.\n"
    );
    println!("### Their stages, medians of the same\n");
    println!("{}", markdown(&stages(&all)));
    Ok(())
}

fn round(parts: &Parts, backend: Backend, figures: &mut Figures, rest: bool) -> Result<()> {
    configure(&format!("{}\n{}", parts.configuration(""), backend.factory(backend.memory())))?;
    if let Some(directory) = backend.templates() {
        // What a template has recorded depends on the memory that it was made for.
        if !Path::new(directory).exists() {
            let recorded = if backend == Backend::Faults { "mapped" } else { backend.memory() };
            configure(&format!("{}\n{}", parts.configuration(""), backend.factory(recorded)))?;
            inlay(parts, &["template", "create", "default"])?;
            configure(&format!("{}\n{}", parts.configuration(""), backend.factory(backend.memory())))?;
        }
    }
    if backend == Backend::Pool {
        inlay(parts, &["pool", "fill"])?;
    }
    // There may be none.
    let _ = fs::remove_file(trace());

    let id = unique("backend");
    let script = "echo .; exec sleep 10000";
    let runtime = if backend == Backend::Runc { Runtime::Runc } else { Runtime::Inlay };
    let started =
        containerd().ctr(&["run", "--detach", "--runtime", runtime.name(), images::BUSYBOX, &id, "sh", "-c", script]);
    ensure!(started.status.success(), "{} has failed: {started:#?}", backend.name());
    figures.walls.push(started.wall);
    if backend == Backend::Pool {
        // The next spare is not this start's.
        inlay(parts, &["pool", "drain"])?;
    }
    if backend != Backend::Runc {
        let pid = containerd().pid_of(&id)?;
        figures.started.push(Pss::of(pid)?);
        if rest {
            thread::sleep(REST);
            figures.rested = Some(Pss::of(pid)?);
        }
        figures.starts.extend(traced(1)?);
    }
    containerd().ctr(&["task", "delete", "--force", &id]).ok();
    containerd().ctr(&["container", "delete", &id]).ok();
    Ok(())
}

/// A round whose sandbox is looked at all the time: what it took when its agent had answered, and there was no container yet.
fn watched_round(parts: &Parts, backend: Backend) -> Result<Option<Pss>> {
    let over = AtomicBool::new(false);
    let mut figures = Figures::default();
    let (played, looks) = thread::scope(|scope| {
        let watcher = scope.spawn(|| look_until(&over, &parts.shim));
        let played = round(parts, backend, &mut figures, false);
        over.store(true, Ordering::Relaxed);
        (played, watcher.join())
    });
    played?;
    let looks = looks.unwrap_or_default();
    let answer = figures.starts.first().map(|start| start.coming_up().end);
    Ok(answer.and_then(|answer| looks.iter().find(|(begun, _)| *begun >= answer)).map(|(_, pss)| *pss))
}

/// The memory of whatever process of `program` has a guest, as often as that can be read, with the time of each look.
fn look_until(over: &AtomicBool, program: &Path) -> Vec<(u64, Pss)> {
    let mut looks = Vec::new();
    while !over.load(Ordering::Relaxed) {
        let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
        let pids = processes.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
        for pid in pids.filter(|pid: &u32| fs::read_link(format!("/proc/{pid}/exe")).is_ok_and(|exe| exe == program)) {
            let begun = now();
            // Whose process ends meanwhile has none.
            looks.extend(Pss::of(pid).ok().filter(|pss| pss.guest > 0).map(|pss| (begun, pss)));
        }
        thread::sleep(LOOK);
    }
    looks
}

fn rows(all: &[(Backend, Figures)]) -> Vec<Vec<String>> {
    let head = [
        "",
        "`ctr run --detach`",
        "over runc",
        "T0→T4",
        "over booted",
        "T4→T5",
        "T0→T6",
        "faults",
        "ahead",
        "private at T4",
        "started",
        "at rest",
        "the process's own",
    ];
    let wall = |figures: &Figures| median(figures.walls.iter().copied());
    let to_agent = |figures: &Figures| median(figures.starts.iter().map(Start::to_agent));
    let of = |backend| all.iter().find(|(other, _)| *other == backend).map(|(_, figures)| figures);
    let (runc, booted) = (of(Backend::Runc).map(wall), of(Backend::Booted).map(to_agent));
    let over = |time: Duration, anchor: Option<Duration>| {
        anchor.map_or_else(String::new, |anchor| format!("{:.2}", time.as_secs_f64() / anchor.as_secs_f64()))
    };
    let mut rows = vec![head.map(String::from).to_vec()];
    for (backend, figures) in all {
        let mut row = vec![backend.name().to_owned(), milliseconds(wall(figures)), over(wall(figures), runc)];
        if *backend != Backend::Runc {
            let kib = |of: fn(&Pss) -> u64| middle(figures.started.iter().map(of)).map_or_else(String::new, kib);
            let memory = || figures.starts.iter().filter_map(|start| start.memory);
            row.extend([
                milliseconds(to_agent(figures)),
                over(to_agent(figures), booted),
                milliseconds(median(figures.starts.iter().map(|start| start.stages()[4]))),
                milliseconds(median(figures.starts.iter().map(Start::to_output))),
                middle(memory().map(|memory| memory.faults)).map_or_else(String::new, |faults| faults.to_string()),
                middle(memory().map(|memory| memory.prefetched_bytes >> 10)).map_or_else(String::new, self::kib),
                figures.answered.map_or_else(String::new, |pss| self::kib(pss.guest_private)),
                kib(|pss| pss.guest_private),
                figures.rested.map_or_else(String::new, |pss| self::kib(pss.guest_private)),
                kib(|pss| pss.own),
            ]);
        }
        row.resize(head.len(), String::new());
        rows.push(row);
    }
    rows
}

/// A line for each stage, and a column for each kind. What is restored has no T3: all until its agent answers is T3→T4.
fn stages(all: &[(Backend, Figures)]) -> Vec<Vec<String>> {
    let traced: Vec<_> = all.iter().filter(|(backend, _)| *backend != Backend::Runc).collect();
    let head = traced.iter().map(|(backend, _)| backend.name().to_owned());
    let mut rows = vec![iter::once(String::new()).chain(head).collect()];
    rows.extend(STAGES.iter().enumerate().map(|(stage, name)| {
        let of = |figures: &Figures| median(figures.starts.iter().map(|start| start.stages()[stage]));
        let times = traced.iter().map(|(_, figures)| milliseconds(of(figures)));
        iter::once((*name).to_owned()).chain(times).collect()
    }));
    rows
}

fn middle(numbers: impl Iterator<Item = u64>) -> Option<u64> {
    let mut numbers: Vec<u64> = numbers.collect();
    numbers.sort_unstable();
    numbers.get(numbers.len() / 2).copied()
}

fn kib(number: u64) -> String {
    format!("{number} KiB")
}

impl Backend {
    const ALL: [Self; 6] = [Self::Runc, Self::Booted, Self::Mapped, Self::Faults, Self::Lazy, Self::Pool];

    fn name(self) -> &'static str {
        match self {
            Self::Runc => "runc",
            Self::Booted => "Inlay, booted",
            Self::Mapped => "restored, mapped",
            Self::Faults => "restored, lazy without a working set",
            Self::Lazy => "restored, lazy with one",
            Self::Pool => "from the pool, mapped",
        }
    }

    /// `template_memory`
    fn memory(self) -> &'static str {
        if matches!(self, Self::Faults | Self::Lazy) { "lazy" } else { "mapped" }
    }

    /// Where its template is, for those that are restored.
    fn templates(self) -> Option<&'static str> {
        match self {
            Self::Runc | Self::Booted => None,
            Self::Mapped | Self::Pool => Some("/run/inlay-templates/mapped"),
            Self::Faults => Some("/run/inlay-templates/faults"),
            Self::Lazy => Some("/run/inlay-templates/lazy"),
        }
    }

    fn factory(self, memory: &str) -> String {
        let Some(directory) = self.templates() else { return String::new() };
        let spares = u8::from(self == Self::Pool);
        format!(
            "[factory]\nenable_template = true\ntemplate_path = \"{directory}\"\ntemplate_memory = \"{memory}\"\npool_size = {spares}\n"
        )
    }
}
