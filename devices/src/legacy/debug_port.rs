//! The port by which a guest says how far its start has come.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::BusDevice;

/// The I/O port; one byte wide. A PC shows what is written to it on its front panel, if any.
pub const DEBUG_PORT: u16 = 0x80;

/// "The guest's user space runs."
const USER_SPACE: u8 = 0x41;

/// Remembers when the guest's user space first said that it runs. Clones share what they know, so
/// one can be on the bus while another is asked.
#[derive(Clone, Default)]
pub struct DebugPort {
    /// `CLOCK_MONOTONIC` in nanoseconds; 0 while nothing came.
    user_space_at: Arc<AtomicU64>,
}

impl DebugPort {
    /// A port that nothing was written to.
    pub fn new() -> Self {
        Self::default()
    }

    /// When the guest's user space came up: `CLOCK_MONOTONIC` in nanoseconds.
    pub fn user_space_at(&self) -> Option<u64> {
        match self.user_space_at.load(Ordering::Relaxed) {
            0 => None,
            at => Some(at),
        }
    }
}

impl BusDevice for DebugPort {
    fn read(&self, _offset: u64, _data: &mut [u8]) {}

    fn write(&self, offset: u64, data: &[u8]) {
        if offset == 0 && data == [USER_SPACE] && self.user_space_at().is_none() {
            let now = monotonic_ns();
            let _ = self.user_space_at.compare_exchange(0, now, Ordering::Relaxed, Ordering::Relaxed);
        }
    }
}

fn monotonic_ns() -> u64 {
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `now` is a timespec that lives through the call, which cannot fail for this clock.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &mut now) };
    let seconds = u64::try_from(now.tv_sec).unwrap_or_default();
    let nanoseconds = u64::try_from(now.tv_nsec).unwrap_or_default();
    seconds.saturating_mul(1_000_000_000).saturating_add(nanoseconds)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_mark_counts() {
        let port = DebugPort::new();
        let on_bus = port.clone();
        on_bus.write(0, &[0x40]);
        on_bus.write(1, &[USER_SPACE]);
        on_bus.write(0, &[USER_SPACE, 0]);
        assert_eq!(port.user_space_at(), None);

        let before = monotonic_ns();
        on_bus.write(0, &[USER_SPACE]);
        let first = port.user_space_at().unwrap();
        assert!((before..=monotonic_ns()).contains(&first));
        on_bus.write(0, &[USER_SPACE]);
        assert_eq!(port.user_space_at(), Some(first));
    }
}
