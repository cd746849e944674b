//! Who carries out [`Operation`]s: the thread that asks, a pool of threads, or the kernel.
//!
//! An engine is made with its device and outlives resets by the driver, so that no thread, ring
//! or descriptor is made while a guest runs. Only the active half uses it, and leaves it idle.

mod inline;
mod threads;
mod uring;

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use seccomp::Confinement;
use vmm_sys_util::eventfd::EventFd;

use self::inline::Inline;
use self::threads::Threads;
use self::uring::Uring;
use super::config::EngineKind;
use super::image::Disk;
use super::operation::Operation;

/// Operations that one device has under way at most. More requests wait in their queues. It
/// bounds what a guest can make this process hold: see
/// [`MAX_PIECE`](super::transfer::MAX_PIECE).
pub(super) const MAX_IN_FLIGHT: u16 = 128;

/// An operation that is done.
#[derive(Debug)]
pub(super) struct Completion {
    /// What [`Engine::start`] was given.
    pub token: u16,
    pub result: io::Result<()>,
}

/// Carries out operations, at most [`MAX_IN_FLIGHT`] at a time.
pub(super) trait Engine: Send {
    /// Takes an operation under a `token` below [`MAX_IN_FLIGHT`] that no other has.
    fn start(&mut self, token: u16, operation: Operation);

    /// Hands over what was started: work begins here at the latest.
    fn submit(&mut self);

    /// Appends what is done to `completions`, without waiting.
    fn reap(&mut self, completions: &mut Vec<Completion>);

    /// Waits until everything that was started is done, and appends it to `completions`. After
    /// it nothing touches guest memory or the image.
    fn drain(&mut self, completions: &mut Vec<Completion>);

    /// Readable when there is something to reap; `None` when that is only so after `submit`.
    fn event(&self) -> Option<&EventFd>;
}

/// An engine as both halves of a device hold it. Only the active half locks it: without contention.
pub(super) type SharedEngine = Arc<Mutex<Box<dyn Engine>>>;

/// Locks an engine.
pub(super) fn lock(engine: &SharedEngine) -> MutexGuard<'_, Box<dyn Engine>> {
    engine.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Makes an engine for `disk`. The I/O ring works on raw images only.
pub(super) fn new(kind: EngineKind, disk: &Arc<Disk>, confinement: Confinement) -> io::Result<SharedEngine> {
    let engine: Box<dyn Engine> = match kind {
        EngineKind::Inline => Box::new(Inline::new(Arc::clone(disk))),
        EngineKind::Threads => Box::new(Threads::new(disk, confinement)?),
        EngineKind::IoUring => Box::new(Uring::new(disk)?),
    };
    Ok(Arc::new(Mutex::new(engine)))
}
