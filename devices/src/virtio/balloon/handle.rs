//! The balloon as the host sees it, and what both halves share for that.

use std::io;
use std::num::NonZeroU32;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::{BalloonConfig, GuestStats, PAGE_SIZE};
use crate::virtio::Interrupt;

/// Why the balloon does not do what it was asked for.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum BalloonError {
    /// More than the guest has.
    #[error("A balloon of {target} bytes does not fit into a guest of {memory} bytes")]
    Target {
        /// What was asked for.
        target: u64,
        /// What the guest has.
        memory: u64,
    },
}

/// What host, configuration half and active half know of each other.
pub(super) struct Shared {
    /// Size of the guest's memory in bytes.
    memory: u64,
    state: Mutex<State>,
    /// For the host: the guest changed something that it may want to know.
    changed: EventFd,
    /// For the active half: the interval is another.
    interval_changed: EventFd,
}

struct State {
    /// `num_pages`.
    target: u32,
    /// `actual` as the guest wrote it.
    actual: u32,
    stats: Option<GuestStats>,
    interval: Option<NonZeroU32>,
    /// There while a driver works with the device.
    interrupt: Option<Interrupt>,
}

impl Shared {
    pub(super) fn new(config: &BalloonConfig, memory: u64) -> io::Result<Self> {
        let event = || EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC);
        let state = State {
            target: pages(config.target.min(memory)),
            actual: 0,
            stats: None,
            interval: config.stats_interval,
            interrupt: None,
        };
        Ok(Self { memory, state: Mutex::new(state), changed: event()?, interval_changed: event()? })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Plain numbers: a panic elsewhere leaves them as good as they were.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// `num_pages`, `actual` (section 5.5.4).
    pub(super) fn config_space(&self) -> Vec<u8> {
        let state = self.lock();
        [state.target, state.actual].into_iter().flat_map(u32::to_le_bytes).collect()
    }

    pub(super) fn set_actual(&self, actual: u32) {
        self.lock().actual = actual;
        self.tell_host();
    }

    /// Pages that the guest is to give back, and that it says it has.
    pub(super) fn size(&self) -> (u32, u32) {
        let state = self.lock();
        (state.target, state.actual)
    }

    /// Takes over what [`size`](Self::size) said in another process.
    pub(super) fn set_size(&self, target: u32, actual: u32) {
        let mut state = self.lock();
        (state.target, state.actual) = (target.min(pages(self.memory)), actual);
    }

    pub(super) fn activated(&self, interrupt: Interrupt) {
        self.lock().interrupt = Some(interrupt);
    }

    /// The driver is gone, and with it what it said.
    pub(super) fn deactivated(&self) {
        let mut state = self.lock();
        state.interrupt = None;
        state.actual = 0;
        state.stats = None;
    }

    pub(super) fn interval(&self) -> Option<NonZeroU32> {
        self.lock().interval
    }

    pub(super) fn interval_changed(&self) -> &EventFd {
        &self.interval_changed
    }

    pub(super) fn set_stats(&self, stats: GuestStats) {
        self.lock().stats = Some(stats);
    }

    fn tell_host(&self) {
        // A full counter is readable already.
        let _ = self.changed.write(1);
    }
}

fn tell_driver(state: &State) {
    if let Some(interrupt) = &state.interrupt {
        interrupt.config_changed();
    }
}

/// Whole pages of so many bytes.
fn pages(bytes: u64) -> u32 {
    u32::try_from(bytes.div_euclid(PAGE_SIZE)).unwrap_or(u32::MAX)
}

/// A handle on a machine's balloon.
#[derive(Clone)]
pub struct BalloonHandle {
    shared: Arc<Shared>,
}

impl BalloonHandle {
    pub(super) fn new(shared: Arc<Shared>) -> Self {
        Self { shared }
    }

    /// Asks the guest to give `bytes` back in all, rounded down to pages. A driver that comes later
    /// finds the wish waiting; none is bound to follow it.
    pub fn set_target(&self, bytes: u64) -> Result<(), BalloonError> {
        if bytes > self.shared.memory {
            return Err(BalloonError::Target { target: bytes, memory: self.shared.memory });
        }
        let mut state = self.shared.lock();
        state.target = pages(bytes);
        tell_driver(&state);
        Ok(())
    }

    /// What the guest was asked for, in bytes.
    pub fn target(&self) -> u64 {
        u64::from(self.shared.lock().target).saturating_mul(PAGE_SIZE)
    }

    /// What the guest says that it has given back, in bytes: never more than it has.
    pub fn actual(&self) -> u64 {
        u64::from(self.shared.lock().actual).saturating_mul(PAGE_SIZE).min(self.shared.memory)
    }

    /// Size of the guest's memory without a balloon, in bytes.
    pub fn memory(&self) -> u64 {
        self.shared.memory
    }

    /// Whether a driver works with the device.
    pub fn is_active(&self) -> bool {
        self.shared.lock().interrupt.is_some()
    }

    /// The guest's last report, if there was one.
    pub fn stats(&self) -> Option<GuestStats> {
        self.shared.lock().stats
    }

    /// Changes the seconds between reports; `None` stops them.
    pub fn set_stats_interval(&self, seconds: Option<NonZeroU32>) {
        self.shared.lock().interval = seconds;
        // A full counter is readable already.
        let _ = self.shared.interval_changed.write(1);
    }

    /// Readable when the guest changed the size of the balloon. Whoever waits for it reads it.
    pub fn changed(&self) -> &EventFd {
        &self.shared.changed
    }
}
