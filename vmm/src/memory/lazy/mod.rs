//! Guest memory whose pages come from a template when they are asked for, and some of them before.
//!
//! | room | what |
//! | --- | --- |
//! | [`pages`] | where memory is in this process, and sets of its pages |
//! | [`fill`] | pages from the source into memory |
//! | [`handler`] | the thread: messages of the kernel, who waits, what is brought ahead |
//! | [`guard`] | what happens when pages cannot be provided any more |
//! | [`metrics`] | counters |
//!
//! ```text
//! start() ─▶ serving ── every page is there ──▶ complete: ordinary memory, no thread
//!               ├───── source or thread fails ─▶ lost: the machine ends, nobody waits
//!               └───── stop() ────────────────▶ stopped
//! ```

mod fill;
mod guard;
mod handler;
mod metrics;
pub(crate) mod pages;
mod thread;

#[cfg(test)]
mod tests;

use std::io;
use std::ops::Range;
use std::os::unix::fs::MetadataExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{SyncSender, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use seccomp::{Confinement, Role};
use vm_memory::{GuestMemory as _, GuestMemoryRegion};
use vmm_sys_util::eventfd::EventFd;

use devices::GuestMemory;

use super::backing::page_size;
use super::source::Source;
use super::uffd::{Uffd, UffdError};
use super::working_set::WorkingSet;
use super::{MemoryError, PAGE_SIZE};

pub use fill::Loss;
pub use guard::{GuardError, MAX_SPANS, POISON};
pub use metrics::{Counter, LazyMetrics};
pub use pages::PageSet;

use guard::Guard;
use pages::Layout;

/// How guest memory comes from a template.
#[derive(Debug, Default)]
pub struct LazyConfig {
    /// What is in it; the memory file of the snapshot where there is none.
    pub source: Option<Box<dyn Source>>,
    /// What is brought before it is asked for.
    pub working_set: Option<WorkingSet>,
    /// Whether what is asked for is recorded.
    pub record: bool,
    /// Whether the rest is brought too.
    pub fill: Fill,
}

/// Whether memory is brought that nobody has asked for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Fill {
    /// Only when all of it is needed, as for a snapshot.
    #[default]
    Off,
    /// A little at a time, as long as the guest asks for pages.
    Background {
        /// At most so many, in steps of 256 KiB for each hundredth of a second.
        bytes_per_second: u64,
    },
    /// The same until all is there, whatever the guest does: from a source that may go away.
    All {
        /// As above.
        bytes_per_second: u64,
    },
}

/// Why memory cannot come lazily.
#[derive(Debug, thiserror::Error)]
pub enum LazyError {
    /// The host does not let this process serve faults.
    #[error(transparent)]
    Uffd(#[from] UffdError),
    /// Its loss cannot be prepared for.
    #[error(transparent)]
    Guard(#[from] GuardError),
    /// The source has another length.
    #[error("The template has a memory of {present} bytes, the machine one of {expected}")]
    Length {
        /// Of the source.
        present: u64,
        /// Of the guest's memory.
        expected: u64,
    },
    /// The file behind guest memory has something in it.
    #[error("The file behind guest memory is not empty: what is in it would hide the template")]
    NotEmpty,
    /// The file behind guest memory cannot be had twice.
    #[error("Cannot use the file behind guest memory")]
    Backing(#[source] io::Error),
    /// The memory itself.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// No event descriptor could be made.
    #[error("Cannot make an event descriptor")]
    Event(#[source] io::Error),
    /// No thread could be made.
    #[error("Cannot start the thread that serves page faults")]
    Thread(#[source] io::Error),
    /// It was lost.
    #[error("{0}")]
    Lost(String),
    /// It was stopped.
    #[error("The machine was stopped while its memory was being brought")]
    Stopped,
}

/// The thread that serves a memory's faults.
pub struct LazyMemory {
    shared: Arc<Shared>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

/// What is known of a lazy memory, as long as anybody wants to know.
#[derive(Clone)]
pub struct LazyHandle(Arc<Record>);

impl LazyMemory {
    /// From now on the pages of `memory`, of which none has been touched, come from `source` as the rest of `config` says.
    pub fn start(
        memory: &GuestMemory,
        source: Box<dyn Source>,
        config: LazyConfig,
        confinement: Confinement,
    ) -> Result<Self, LazyError> {
        let layout = layout(memory)?;
        let present = source.length();
        if present != layout.length {
            return Err(LazyError::Length { present, expected: layout.length });
        }
        let uffd = Uffd::open()?;
        let guard = Guard::new(&layout)?;
        let mut zero_pages = true;
        for span in layout.spans() {
            let (start, length) = (usize::try_from(span.host), usize::try_from(span.length));
            zero_pages &= uffd.register(start.unwrap_or_default(), length.unwrap_or_default())?;
        }
        let shared = Shared::new(uffd, layout, guard, config.working_set.clone())?;
        let shared = Arc::new(shared);
        let body = thread::Body::new(Arc::clone(&shared), source, config, zero_pages);
        let thread = seccomp::spawn(confinement, Role::Uffd, Role::Uffd.name().to_owned(), move || body.run());
        let thread = Mutex::new(Some(thread.map_err(LazyError::Thread)?));
        Ok(Self { shared, thread })
    }

    /// Calls `end` with the reason when the memory is lost, before anybody who waits for it goes on. It must see to it that no processor
    /// enters the guest again. Fails when the memory has been lost already.
    pub fn on_loss(&self, end: impl Fn(&str) + Send + Sync + 'static) -> Result<(), LazyError> {
        let mut state = self.shared.lock();
        if let Stage::Lost(reason) = &state.stage {
            return Err(LazyError::Lost(reason.clone()));
        }
        state.end = Some(Arc::new(end));
        Ok(())
    }

    /// The reason why the memory was lost, if it was.
    pub fn lost(&self) -> Option<String> {
        match &self.shared.lock().stage {
            Stage::Lost(reason) => Some(reason.clone()),
            _ => None,
        }
    }

    /// Brings all of it, and returns when it is there: then it is memory like any other.
    pub fn complete(&self) -> Result<(), LazyError> {
        let (done, all_there) = sync_channel(1);
        match &mut *self.shared.lock() {
            State { stage: Stage::Serving, completions, .. } => completions.push(done),
            state => return state.outcome(),
        }
        self.shared.record.completion_wanted.store(true, Ordering::Release);
        self.shared.wake_thread();
        // The other end is dropped when the stage has changed.
        let _ = all_there.recv();
        self.shared.lock().outcome()
    }

    /// To ask for figures, and for what was recorded.
    pub fn handle(&self) -> LazyHandle {
        LazyHandle(Arc::clone(&self.shared.record))
    }

    /// The machine ends: a source that waits for somebody gives up, which loses the memory. Others go on, as processors and devices may
    /// need them to come to their end.
    pub fn hurry(&self) {
        // Written once or twice: it cannot be full.
        let _ = self.shared.ended.write(1);
    }

    /// Ends the thread. Who still waits for pages goes on with whatever is there: to be called when nobody is left who could.
    pub fn stop(&self) {
        self.hurry();
        self.shared.stop();
        let thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(thread) = thread {
            // An error is a panic, which its own message has told.
            let _ = thread.join();
        }
        drop(self.shared.guard.lock().unwrap_or_else(PoisonError::into_inner).take());
    }
}

impl Drop for LazyMemory {
    fn drop(&mut self) {
        self.stop();
    }
}

impl LazyHandle {
    /// What was served so far.
    pub fn metrics(&self) -> &LazyMetrics {
        &self.0.metrics
    }

    /// The working set that the machine was started with, and after it what was asked for since, in that order. Without the latter where it
    /// is not recorded.
    pub fn working_set(&self) -> WorkingSet {
        let recorded = self.0.recorded.lock().unwrap_or_else(PoisonError::into_inner);
        self.0.working_set.merge(&recorded).unwrap_or_else(|_| recorded.clone())
    }

    /// Bytes of a page of the memory: what is given at the least.
    pub fn page_size(&self) -> u64 {
        self.0.page_size
    }
}

/// What outlives the machine with those who ask for it.
struct Record {
    metrics: LazyMetrics,
    page_size: u64,
    /// What was brought ahead.
    working_set: WorkingSet,
    /// What was asked for.
    recorded: Mutex<WorkingSet>,
    /// Whether somebody waits until all is there.
    completion_wanted: AtomicBool,
}

impl Record {
    fn new(layout: &Layout, set: Option<WorkingSet>) -> Self {
        let none = WorkingSet::new(layout.length);
        Self {
            metrics: LazyMetrics::default(),
            page_size: layout.unit,
            working_set: set.unwrap_or_else(|| none.clone()),
            recorded: Mutex::new(none),
            completion_wanted: AtomicBool::new(false),
        }
    }

    fn note(&self, range: Range<u64>) {
        // Past its limit it is left out.
        self.recorded.lock().unwrap_or_else(PoisonError::into_inner).push(range);
    }
}

/// What the thread and everybody else have in common.
struct Shared {
    uffd: Uffd,
    layout: Arc<Layout>,
    /// Gone once nobody is left who could touch the memory.
    guard: Mutex<Option<Guard>>,
    /// Wakes the thread.
    wake: EventFd,
    /// Readable once the machine has ended.
    ended: Arc<EventFd>,
    record: Arc<Record>,
    state: Mutex<State>,
}

/// What ends the machine, with the reason.
type OnLoss = Arc<dyn Fn(&str) + Send + Sync>;

struct State {
    stage: Stage,
    end: Option<OnLoss>,
    /// Who waits until all is there.
    completions: Vec<SyncSender<()>>,
}

enum Stage {
    Serving,
    Complete,
    Lost(String),
    Stopped,
}

impl State {
    /// What becomes of somebody who waited for all memory.
    fn outcome(&self) -> Result<(), LazyError> {
        match &self.stage {
            Stage::Complete => Ok(()),
            Stage::Lost(reason) => Err(LazyError::Lost(reason.clone())),
            Stage::Serving | Stage::Stopped => Err(LazyError::Stopped),
        }
    }
}

impl Shared {
    fn new(uffd: Uffd, layout: Layout, guard: Guard, set: Option<WorkingSet>) -> Result<Self, LazyError> {
        let event = || EventFd::new(libc::EFD_CLOEXEC | libc::EFD_NONBLOCK).map_err(LazyError::Event);
        let record = Record::new(&layout, set);
        Ok(Self {
            uffd,
            layout: Arc::new(layout),
            guard: Mutex::new(Some(guard)),
            wake: event()?,
            ended: Arc::new(event()?),
            record: Arc::new(record),
            state: Mutex::new(State { stage: Stage::Serving, end: None, completions: Vec::new() }),
        })
    }

    fn is_serving(&self) -> bool {
        matches!(self.lock().stage, Stage::Serving)
    }

    /// Leaves the stage of serving, once; false when that has happened already.
    fn leave(&self, stage: Stage) -> bool {
        let mut state = self.lock();
        let first = matches!(state.stage, Stage::Serving);
        if first {
            state.stage = stage;
        }
        first
    }

    /// Every page is there: from now on this is ordinary memory.
    fn finish(&self) {
        for span in self.layout.spans() {
            let (start, length) = (usize::try_from(span.host), usize::try_from(span.length));
            if let Err(error) = self.uffd.unregister(start.unwrap_or_default(), length.unwrap_or_default()) {
                // Closing does the same.
                tracing::debug!(%error, "Memory that is complete cannot be unregistered");
            }
        }
        self.close();
        self.leave(Stage::Complete);
        self.lock().completions.clear();
    }

    /// Nobody can provide the memory any more. The machine has ended when this returns, and nobody waits.
    fn lose(&self, loss: &Loss) {
        let reason = sentence(loss);
        // Whoever calls `on_loss` later finds the reason.
        if !self.leave(Stage::Lost(reason.clone())) {
            return;
        }
        let end = self.lock().end.clone();
        if let Some(end) = end {
            end(&reason);
        }
        let guard = self.guard.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(Err(error)) = guard.as_ref().map(Guard::sever) {
            // Devices would go on with zeros, and write them to their files.
            tracing::error!(%error, reason, "Guest memory is lost and cannot be taken away from devices: the process ends");
            std::process::abort();
        }
        self.close();
        self.lock().completions.clear();
    }

    fn stop(&self) {
        self.leave(Stage::Stopped);
        self.close();
        self.wake_thread();
        self.lock().completions.clear();
    }

    fn close(&self) {
        if let Err(error) = self.uffd.close() {
            tracing::error!(%error, "A userfaultfd cannot be closed");
        }
    }

    fn wake_thread(&self) {
        // Fails when it is full: then it is readable.
        let _ = self.wake.write(1);
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// An error with its causes.
fn sentence(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text
}

/// The mappings of `memory`, if nothing is in them yet.
fn layout(memory: &GuestMemory) -> Result<Layout, LazyError> {
    let mut unit = PAGE_SIZE;
    for region in memory.iter() {
        let Some(file) = region.file_offset() else { continue };
        let failed = |source| MemoryError::File { size: region.len(), source };
        let status = file.file().metadata().map_err(failed)?;
        if status.blocks() > 0 {
            return Err(LazyError::NotEmpty);
        }
        unit = unit.max(page_size(file.file()).map_err(failed)?);
    }
    Ok(Layout::of(memory, unit).ok_or(MemoryError::Size { size: 0 })?)
}
