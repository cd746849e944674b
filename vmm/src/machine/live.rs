//! Writing a machine to a directory while its guest runs: it stands still for a moment, and goes on while its memory is copied.

use std::fs::File;
use std::path::Path;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use seccomp::Confinement;

use devices::GuestMemory;
use devices::virtio::{MmioTransport, WriteLog};

use super::snapshot::Parked;
use super::{Hardware, Machine, RunState};
use crate::memory::lazy::pages::Layout;
use crate::memory::uffd::{UffdError, Writes};
use crate::snapshot::live::{
    self, AtRest, Contents, Copier, CopierThread, CopyError, Copying, Progress, Protection, Still, Untouched,
};
use crate::snapshot::{Draft, MEMORY, MachineState, SnapshotError, describe_memory, dirty};
use crate::vcpu::Control;

/// A snapshot that was taken of a machine that runs.
#[derive(Debug)]
pub struct LiveSnapshot {
    /// How long the guest's processors were kept out of the guest.
    pub stood_still: Duration,
    /// How its memory was copied.
    pub copied: Copied,
}

/// How memory was copied for a [`LiveSnapshot`].
#[derive(Debug)]
pub enum Copied {
    /// While the guest ran on.
    Running {
        /// How often somebody had to wait until a page was copied that was to be written.
        waits: u64,
    },
    /// What the guest had written since it was restored while it stood still, the rest from the snapshot that it was restored from: the host
    /// cannot make writes to its memory wait.
    Written {
        /// Why not.
        reason: UffdError,
    },
    /// All while the guest stood still, likewise.
    Still {
        /// Why not.
        reason: UffdError,
    },
}

impl Machine {
    /// Writes the machine as it is now to `directory`, as [`snapshot`](Self::snapshot) does, and lets it go on meanwhile: it stands still
    /// until its devices and processors are saved and its memory is protected, and whoever wants to write to a page after that waits until
    /// that is copied. Returns when all is on the disk. A machine that did not run does not run after it either.
    ///
    /// Memory that cannot be protected, as that of files on a disk, is copied before the guest goes on; of a restored machine what it has
    /// written. [`LiveSnapshot::copied`] says so. Drives are not copied, and go on changing with the guest.
    ///
    /// After an error there is no snapshot, and the guest has lost nothing. While this is under way other snapshots are refused, and
    /// [`stop`](Self::stop) ends it. Devices that take memory away from the guest, such as a balloon, do not until it is done.
    pub fn snapshot_live(&self, directory: &Path) -> Result<LiveSnapshot, SnapshotError> {
        self.snapshot_in(self.begin_live()?, directory)
    }

    /// Leave for a [`snapshot_live`](Self::snapshot_live), which is under way from here on: it can be given up before it was called.
    pub(crate) fn begin_live(&self) -> Result<Turn, SnapshotError> {
        self.live.begin()
    }

    /// A [`snapshot_live`](Self::snapshot_live) whose turn was taken before.
    pub(crate) fn snapshot_in(&self, turn: Turn, directory: &Path) -> Result<LiveSnapshot, SnapshotError> {
        self.expect_alive(self.state() != RunState::Ended)?;
        let draft = Draft::begin(directory)?;
        let (file, path) = draft.open(MEMORY)?;
        let failed = |error| match error {
            SnapshotError::Copy(CopyError::Write(source)) => SnapshotError::write(&path)(source),
            SnapshotError::Copy(CopyError::Stopped) if self.state() == RunState::Ended => SnapshotError::Gone,
            error => error,
        };
        let moment = self.copy_moment(&turn.progress, &file).map_err(failed)?;
        // Nothing of what follows is the machine's.
        turn.copied();
        let memory =
            describe_memory(&file, moment.state.memory_size).and_then(|memory| file.sync_all().map(|()| memory));
        let memory = memory.map_err(SnapshotError::write(&path))?;
        let identity = self.publish(draft, directory, &moment.state, memory, None)?;
        if let Some(noted) = moment.noted {
            noted.forget();
            let mut hardware = self.hardware.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some(hardware) = hardware.as_mut() {
                hardware.base = Some(identity);
            }
        }
        Ok(LiveSnapshot { stood_still: moment.stood_still, copied: moment.copied })
    }

    /// How many bytes of memory a [`snapshot_live`](Self::snapshot_live) that is under way has copied, and of how many; none is under way where
    /// this is `None`. All are copied some time before it returns.
    pub fn live_progress(&self) -> Option<(u64, u64)> {
        self.live.progress()
    }

    /// Gives up a [`snapshot_live`](Self::snapshot_live) whose memory is being copied. Does nothing where there is none, or where all is copied.
    pub fn cancel_live_snapshot(&self) {
        self.live.hurry();
    }

    /// The state of a moment, with all that was in memory then in `file`.
    fn copy_moment(&self, progress: &Arc<Progress>, file: &File) -> Result<Moment, SnapshotError> {
        if let Some(lazy) = &self.lazy {
            // A page that is not there yet cannot be protected.
            lazy.complete()?;
        }
        let target = Target::new(self.guest_memory()?, file, progress)?;
        let way = match Protection::prepare(Arc::clone(&target.layout)) {
            Ok(protection) => {
                let thread = CopierThread::start(self.live.confinement);
                Ok((protection, thread.map_err(|error| CopyError::Thread(Some(error)))?))
            }
            Err(reason) => Err(reason),
        };
        let moment = self.live.moment();
        let ran = self.state() == RunState::Running;
        let begin = Instant::now();
        self.expect_alive(self.control.pause())?;
        let captured = self.capture(&target, way);
        if ran {
            // Unless it has ended meanwhile.
            let _ = self.control.run();
        }
        let stood_still = begin.elapsed();
        drop(moment);
        let Captured { state, noted, copying } = captured?;
        let copied = match copying {
            Way::Running(copying, held) => {
                copying.wait()?;
                drop(held);
                Copied::Running { waits: progress.waits.load(Ordering::Relaxed) }
            }
            Way::Written(reason, mut rest) => {
                rest.run()?;
                Copied::Written { reason }
            }
            Way::Still(reason) => Copied::Still { reason },
        };
        Ok(Moment { stood_still, state, noted, copied })
    }

    /// Saves what is not memory, and sees to it that what is in memory will be copied. Processors stand still; devices do until this returns.
    fn capture(
        &self,
        target: &Target,
        way: Result<(Protection, CopierThread), UffdError>,
    ) -> Result<Captured, SnapshotError> {
        let mut hardware = self.hardware.lock().unwrap_or_else(PoisonError::into_inner);
        let hardware = hardware.as_mut().ok_or(SnapshotError::Gone)?;
        if !hardware.writes.is_kept() {
            // Devices go on after this, whatever comes of it.
            hardware.base = None;
        }
        let parked = Parked::new(hardware.transports.clone());
        // Saving makes KVM write to guest memory.
        let state = self.save_state(hardware, &parked)?;
        let noted = hardware.writes.is_kept().then(|| Noted::take(hardware)).transpose()?;
        let copying = match (way, &hardware.template) {
            (Ok((protection, thread)), _) => {
                let at_rest = AtRest::of(&target.memory)?;
                protection.protect()?;
                let held = Held::new(&hardware.transports, Arc::clone(&self.control));
                // Devices may write to memory when they go on: the thread must be at work.
                Way::Running(thread.begin(target.copier(protection, at_rest)?)?, held)
            }
            (Err(reason), Some(template)) => {
                let (written, untouched) = AtRest::over(&target.memory, Arc::clone(template))?;
                target.copier(Still, written)?.run()?;
                Way::Written(reason, target.copier(Still, untouched)?)
            }
            (Err(reason), None) => {
                target.copier(Still, AtRest::of(&target.memory)?)?.run()?;
                Way::Still(reason)
            }
        };
        Ok(Captured { state, noted, copying })
    }

    pub(super) fn guest_memory(&self) -> Result<GuestMemory, SnapshotError> {
        let hardware = self.hardware.lock().unwrap_or_else(PoisonError::into_inner);
        hardware.as_ref().map(|hardware| hardware.memory.clone()).ok_or(SnapshotError::Gone)
    }
}

/// What a snapshot is made of, beside the memory that was copied.
struct Moment {
    stood_still: Duration,
    state: MachineState,
    noted: Option<Noted>,
    copied: Copied,
}

/// What was found while the guest stood still.
struct Captured {
    state: MachineState,
    noted: Option<Noted>,
    copying: Way,
}

enum Way {
    Running(Copying, Held),
    Written(UffdError, Copier<Still, Untouched>),
    Still(UffdError),
}

/// From where to where memory is copied.
struct Target {
    memory: GuestMemory,
    layout: Arc<Layout>,
    file: File,
    progress: Arc<Progress>,
}

impl Target {
    fn new(memory: GuestMemory, file: &File, progress: &Arc<Progress>) -> Result<Self, CopyError> {
        let layout = live::layout(&memory).map_err(CopyError::Read)?;
        let length = layout.length;
        let file = file.set_len(length).and_then(|()| file.try_clone()).map_err(CopyError::Write)?;
        progress.total.store(length, Ordering::Relaxed);
        Ok(Self { memory, layout, file, progress: Arc::clone(progress) })
    }

    fn copier<W: Writes, C: Contents>(&self, writes: W, contents: C) -> Result<Copier<W, C>, CopyError> {
        let file = self.file.try_clone().map_err(CopyError::Write)?;
        Ok(Copier::new(writes, contents, Arc::clone(&self.layout), file, Arc::clone(&self.progress)))
    }
}

/// Devices that take nothing away from the guest until this is dropped: what they take could not be copied any more.
struct Held {
    transports: Vec<Arc<MmioTransport>>,
    control: Arc<Control>,
}

impl Held {
    fn new(transports: &[Arc<MmioTransport>], control: Arc<Control>) -> Self {
        let takers = transports.iter().filter(|transport| transport.discards_memory());
        let transports: Vec<_> = takers.cloned().collect();
        transports.iter().for_each(|transport| transport.hold());
        Self { transports, control }
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        if self.control.state() != RunState::Ended {
            self.transports.iter().for_each(|transport| transport.release());
        }
    }
}

/// What was noted of writes before the moment: dropped, it is noted again, for it is in no snapshot.
struct Noted {
    log: WriteLog,
    pages: Vec<Vec<u64>>,
}

impl Noted {
    fn take(hardware: &Hardware) -> Result<Self, SnapshotError> {
        use vm_memory::GuestMemory as _;
        dirty::collect(&hardware.vm, &hardware.memory, &hardware.writes)?;
        let log = hardware.writes.clone();
        let pages = (0..hardware.memory.num_regions()).map(|region| log.pages(region)).collect();
        log.clear();
        Ok(Self { log, pages })
    }

    fn forget(mut self) {
        self.pages.clear();
    }
}

impl Drop for Noted {
    fn drop(&mut self) {
        self.pages.iter().enumerate().for_each(|(region, pages)| self.log.add(region, pages));
    }
}

/// The one snapshot of a running machine that can be under way.
pub(super) struct Live {
    confinement: Confinement,
    /// Held while the guest stands still, or is told to: whoever else pauses it or lets it run does so before or after. Taken before the
    /// lock of the hardware.
    moment: Mutex<()>,
    stage: Mutex<Stage>,
    changed: Condvar,
}

enum Stage {
    Idle,
    /// The machine's memory is needed.
    Copying(Arc<Progress>),
    /// It is not any more.
    Writing(Arc<Progress>),
}

impl Live {
    pub fn new(confinement: Confinement) -> Self {
        Self { confinement, moment: Mutex::new(()), stage: Mutex::new(Stage::Idle), changed: Condvar::new() }
    }

    /// Waits until the guest does not stand still for a snapshot.
    pub fn moment(&self) -> MutexGuard<'_, ()> {
        self.moment.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Fails while one is under way.
    pub fn expect_idle(&self) -> Result<(), SnapshotError> {
        match *self.lock() {
            Stage::Idle => Ok(()),
            _ => Err(SnapshotError::Live),
        }
    }

    /// Nobody shall wait for memory to be copied any more.
    pub fn hurry(&self) {
        if let Stage::Copying(progress) = &*self.lock() {
            progress.stop();
        }
    }

    /// Waits until memory is not needed. Call [`hurry`](Self::hurry) first.
    pub fn wait_until_copied(&self) {
        let copying = |stage: &mut Stage| matches!(stage, Stage::Copying(_));
        drop(self.changed.wait_while(self.lock(), copying).unwrap_or_else(PoisonError::into_inner));
    }

    fn progress(&self) -> Option<(u64, u64)> {
        match &*self.lock() {
            Stage::Idle => None,
            Stage::Copying(progress) | Stage::Writing(progress) => {
                Some((progress.done.load(Ordering::Relaxed), progress.total.load(Ordering::Relaxed)))
            }
        }
    }

    fn begin(self: &Arc<Self>) -> Result<Turn, SnapshotError> {
        let mut stage = self.lock();
        if !matches!(*stage, Stage::Idle) {
            return Err(SnapshotError::Live);
        }
        let progress = Arc::new(Progress::default());
        *stage = Stage::Copying(Arc::clone(&progress));
        Ok(Turn { live: Arc::clone(self), progress })
    }

    fn set(&self, stage: Stage) {
        *self.lock() = stage;
        self.changed.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, Stage> {
        self.stage.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Leave to take a snapshot, until this is dropped.
pub(crate) struct Turn {
    live: Arc<Live>,
    progress: Arc<Progress>,
}

impl Turn {
    fn copied(&self) {
        self.live.set(Stage::Writing(Arc::clone(&self.progress)));
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        self.live.set(Stage::Idle);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_turn_can_be_given_up_before_it_is_used() {
        let live = Arc::new(Live::new(Confinement::Off));
        live.expect_idle().expect("idle");
        let turn = live.begin().expect("a turn");
        assert!(matches!(live.begin(), Err(SnapshotError::Live)));
        live.hurry();
        assert!(turn.progress.is_stopped());
        drop(turn);
        live.expect_idle().expect("idle again");
        assert!(!live.begin().expect("a new turn").progress.is_stopped());
    }
}
