//! A machine restored by mapping its memory and by bringing it page by page: up to the guest's first instruction, up to
//! having read some MiB, and what that takes of memory of its own. In turns in one process. Prints Markdown tables.
//!
//! ```text
//! lazy [RUNS]
//! ```

use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use benches::guest;
use benches::table::{markdown, median, milliseconds};
use vmm::memory::source::index::DEFAULT_CHUNK;
use vmm::memory::source::pack::pack;
use vmm::memory::source::{ChunkFile, ChunkIndex, ChunkedSource};
use vmm::memory::uffd::Uffd;
use vmm::{
    BootConfig, ExitReason, LazyConfig, Machine, MachineConfig, MemoryConfig, RestoreMemory, TracePoints, WorkingSet,
};

const DEFAULT_RUNS: usize = 20;

/// Bytes of the template's memory.
const MEMORY_MIB: u32 = 128;

/// What the guest reads, in MiB.
const TOUCHED: [u32; 2] = [4, 32];

/// How long a guest may take to say that it waits.
const PATIENCE: Duration = Duration::from_secs(10);

/// A saved guest, and what can be made of it.
struct Template {
    directory: tempfile::TempDir,
    index: Arc<ChunkIndex>,
    chunks: File,
    working_set: WorkingSet,
}

/// A way for memory to come.
struct Candidate<'a> {
    name: &'static str,
    memory: Box<dyn Fn() -> Result<RestoreMemory> + 'a>,
    starts: Vec<Start>,
}

/// Times from the call on, and what was taken at the end.
struct Start {
    made: Duration,
    first_instruction: Duration,
    touched: Duration,
    anonymous: u64,
    faults: u64,
}

fn main() -> Result<()> {
    let runs = match std::env::args().nth(1) {
        Some(text) => text.parse().context("The number of runs is no number")?,
        None => DEFAULT_RUNS,
    };
    if let Err(error) = OpenOptions::new().read(true).write(true).open("/dev/kvm") {
        println!("skipped: lazy: /dev/kvm: {error}");
        return Ok(());
    }
    if let Err(error) = Uffd::open() {
        println!("skipped: lazy: {error}");
        return Ok(());
    }
    for mib in TOUCHED {
        measure(mib, runs)?;
    }
    println!(
        "Medians of {runs} in turns; 1 vCPU, {MEMORY_MIB} MiB, page cache warm, chunks of {} KiB.",
        DEFAULT_CHUNK >> 10
    );
    Ok(())
}

fn measure(mib: u32, runs: usize) -> Result<()> {
    let template = Template::new(mib)?;
    let lazily = |lazy| Ok(RestoreMemory::Lazy(lazy));
    let candidate = |name, memory| Candidate { name, memory, starts: Vec::new() };
    let set = || Some(template.working_set.clone());
    let mut candidates = [
        candidate(
            "mapped",
            Box::new(|| Ok(RestoreMemory::Mapped { written: None })) as Box<dyn Fn() -> Result<RestoreMemory>>,
        ),
        candidate("lazy", Box::new(|| lazily(LazyConfig::default()))),
        candidate(
            "lazy, with working set",
            Box::new(|| lazily(LazyConfig { working_set: set(), ..LazyConfig::default() })),
        ),
        candidate("lazy, of chunks", Box::new(|| lazily(template.chunked()?))),
        candidate(
            "lazy, of chunks, with working set",
            Box::new(|| lazily(LazyConfig { working_set: set(), ..template.chunked()? })),
        ),
    ];
    for _ in 0..runs {
        for candidate in &mut candidates {
            candidate.start(template.directory.path())?;
        }
    }
    println!("### A guest that reads {mib} MiB\n");
    println!("{}", markdown(&rows(&candidates)));
    Ok(())
}

fn config(kernel: &Path) -> MachineConfig {
    let boot = BootConfig { kernel: kernel.into(), initrd: None, cmdline: String::new() };
    MachineConfig::new("tiny", MemoryConfig::from_mib(MEMORY_MIB), boot)
}

impl Template {
    /// Saves a guest that waits, releases it in its snapshot, packs the memory, and records what it needs.
    fn new(mib: u32) -> Result<Self> {
        let directory = tempfile::tempdir().context("No temporary directory")?;
        let kernel = guest::write_touching(mib)?;
        let machine = Machine::build(config(kernel.path()))?;
        machine.start()?;
        let begin = Instant::now();
        while machine.console_tail() != b"w" {
            ensure!(begin.elapsed() < PATIENCE, "The guest that waits does not say so");
            std::thread::yield_now();
        }
        machine.snapshot(directory.path())?;
        let path = directory.path().join("memory");
        OpenOptions::new().write(true).open(&path)?.write_all_at(&[1], guest::RELEASE)?;
        let mut chunks = tempfile::tempfile()?;
        let index = Arc::new(pack(File::open(&path)?, &mut chunks, DEFAULT_CHUNK)?);

        let lazy = RestoreMemory::Lazy(LazyConfig { record: true, ..LazyConfig::default() });
        let machine = Machine::restore_with(config(Path::new("")), directory.path(), lazy)?;
        machine.start()?;
        ensure!(machine.wait() == ExitReason::TripleFault, "The guest does not end as it should");
        let working_set = machine.lazy_memory().context("The machine is not lazy")?.working_set();
        Ok(Self { directory, index, chunks, working_set })
    }

    fn chunked(&self) -> Result<LazyConfig> {
        let store = ChunkFile::new(self.chunks.try_clone()?, &self.index)?;
        let source = ChunkedSource::new(Arc::clone(&self.index), store, None)?;
        Ok(LazyConfig { source: Some(Box::new(source)), ..LazyConfig::default() })
    }
}

impl Candidate<'_> {
    fn start(&mut self, directory: &Path) -> Result<()> {
        let before = anonymous()?;
        let begin = TracePoints::now();
        let machine = Machine::restore_with(config(Path::new("")), directory, (self.memory)()?)?;
        let made = TracePoints::now();
        machine.start()?;
        let reason = machine.wait();
        let end = TracePoints::now();
        ensure!(reason == ExitReason::TripleFault, "{}: {reason}", self.name);
        let Some(said) = machine.trace().guest_init() else { bail!("{}: the guest said nothing", self.name) };
        let since = |at: u64| Duration::from_nanos(at.saturating_sub(begin));
        self.starts.push(Start {
            made: since(made),
            first_instruction: since(said),
            touched: since(end),
            anonymous: anonymous()?.saturating_sub(before),
            faults: machine.lazy_memory().map_or(0, |lazy| lazy.metrics().faults.get()),
        });
        Ok(())
    }

    fn median(&self, time: fn(&Start) -> Duration) -> String {
        milliseconds(median(self.starts.iter().map(time)))
    }

    fn median_number(&self, number: fn(&Start) -> u64) -> u64 {
        let mut numbers: Vec<_> = self.starts.iter().map(number).collect();
        numbers.sort_unstable();
        numbers.get(numbers.len().saturating_sub(1) / 2).copied().unwrap_or_default()
    }
}

/// KiB of memory that this process shares with nobody.
fn anonymous() -> Result<u64> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).context("No RssAnon")?;
    Ok(line.trim().trim_end_matches(" kB").parse()?)
}

fn rows(candidates: &[Candidate]) -> Vec<Vec<String>> {
    let head = ["", "machine made", "first instruction told of", "all read", "faults served", "memory of its own"];
    let mut rows = vec![head.map(String::from).to_vec()];
    for candidate in candidates {
        rows.push(vec![
            candidate.name.to_owned(),
            candidate.median(|start| start.made),
            candidate.median(|start| start.first_instruction),
            candidate.median(|start| start.touched),
            candidate.median_number(|start| start.faults).to_string(),
            format!("{} KiB", candidate.median_number(|start| start.anonymous)),
        ]);
    }
    rows
}
