//! What a drive has done for its guest.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// What a request was about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RequestKind {
    /// Data to the guest.
    Read,
    /// Data from the guest.
    Write,
    /// Data made stable.
    Flush,
    /// Ranges discarded or zeroed.
    Erase,
}

/// Counters that only grow. Its clones count together, across resets of the driver and whatever takes the drive.
#[derive(Clone, Debug, Default)]
pub struct BlkMetrics(Arc<Counters>);

#[derive(Debug, Default)]
struct Counters {
    reads: Counter,
    writes: Counter,
    flushes: Counter,
    erasures: Counter,
}

#[derive(Debug, Default)]
struct Counter {
    operations: AtomicU64,
    bytes: AtomicU64,
    failed: AtomicU64,
}

/// One counter, read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RequestCount {
    /// Requests that succeeded.
    pub operations: u64,
    /// Bytes of their data.
    pub bytes: u64,
    /// Requests that failed on the host.
    pub failed: u64,
}

impl BlkMetrics {
    /// What there was of `kind`.
    pub fn count(&self, kind: RequestKind) -> RequestCount {
        let Counter { operations, bytes, failed } = self.counter(kind);
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        RequestCount { operations: read(operations), bytes: read(bytes), failed: read(failed) }
    }

    pub(super) fn done(&self, kind: RequestKind, bytes: u32) {
        let counter = self.counter(kind);
        counter.operations.fetch_add(1, Ordering::Relaxed);
        counter.bytes.fetch_add(bytes.into(), Ordering::Relaxed);
    }

    pub(super) fn failed(&self, kind: RequestKind) {
        self.counter(kind).failed.fetch_add(1, Ordering::Relaxed);
    }

    fn counter(&self, kind: RequestKind) -> &Counter {
        match kind {
            RequestKind::Read => &self.0.reads,
            RequestKind::Write => &self.0.writes,
            RequestKind::Flush => &self.0.flushes,
            RequestKind::Erase => &self.0.erasures,
        }
    }
}
