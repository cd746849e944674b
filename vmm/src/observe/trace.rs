//! When a machine reached the stations of its start.

use std::sync::atomic::{AtomicU64, Ordering};

use devices::legacy::DebugPort;

/// Stations of a start, in nanoseconds of `CLOCK_MONOTONIC`. The numbers are those of a container
/// start: T0 and T4 to T6 lie outside the machine.
#[derive(Default)]
pub struct TracePoints {
    vm_created: AtomicU64,
    first_run: AtomicU64,
    debug_port: DebugPort,
}

impl TracePoints {
    /// T1: the KVM VM existed.
    pub fn vm_created(&self) -> Option<u64> {
        get(&self.vm_created)
    }

    /// T2: the first processor was about to run its first instruction.
    pub fn first_run(&self) -> Option<u64> {
        get(&self.first_run)
    }

    /// T3: the guest's init said on the debug port that it runs.
    pub fn guest_init(&self) -> Option<u64> {
        self.debug_port.user_space_at()
    }

    /// Now, on the clock of the stations.
    pub fn now() -> u64 {
        let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        // SAFETY: `now` is a timespec that the call fills; the clock exists on every Linux.
        unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &mut now) };
        // Neither is negative on a clock that counts from boot.
        now.tv_sec.cast_unsigned() * 1_000_000_000 + now.tv_nsec.cast_unsigned()
    }

    pub(crate) fn record_vm_created(&self) {
        self.vm_created.store(Self::now(), Ordering::Relaxed);
    }

    pub(crate) fn record_first_run(&self) {
        self.first_run.store(Self::now(), Ordering::Relaxed);
    }

    /// The port that tells T3.
    pub(crate) fn debug_port(&self) -> &DebugPort {
        &self.debug_port
    }
}

fn get(point: &AtomicU64) -> Option<u64> {
    Some(point.load(Ordering::Relaxed)).filter(|at| *at != 0)
}
