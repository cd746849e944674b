//! What was served, counted where it happens.

use std::sync::atomic::{AtomicU64, Ordering};

/// Counters of one machine's lazy memory, which only grow.
#[derive(Debug, Default)]
pub struct LazyMetrics {
    /// Faults that were served.
    pub faults: Counter,
    /// Nanoseconds from reading a fault to having served it, all together.
    pub fault_nanoseconds: Counter,
    /// Bytes that were copied into the guest's memory, for faults and ahead of them.
    pub bytes_copied: Counter,
    /// Pages of zeros that were given.
    pub zero_pages: Counter,
    /// Bytes that were given ahead of any fault because the working set has them.
    pub prefetched_bytes: Counter,
    /// Faults for pages of the working set that came before they were prefetched.
    pub working_set_late: Counter,
    /// Faults for pages that the working set does not have, where there is one.
    pub working_set_misses: Counter,
    /// Bytes that the guest has given back.
    pub removed_bytes: Counter,
    /// Times that the source failed: once, as the machine ends with it.
    pub source_errors: Counter,
}

impl LazyMetrics {
    /// The part of the pages needed so far that the working set had, from 0 to 1: of pages of `page` bytes. What was prefetched counts as
    /// needed; whether the guest has touched it, the kernel does not tell.
    #[allow(clippy::cast_precision_loss, reason = "a ratio for people")]
    pub fn hit_ratio(&self, page: u64) -> f64 {
        let hits = self.prefetched_bytes.get() / page + self.working_set_late.get();
        let all = hits + self.working_set_misses.get();
        if all == 0 { 0.0 } else { hits as f64 / all as f64 }
    }
}

/// A number that only grows.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// What it has come to.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }

    pub(super) fn add(&self, amount: u64) {
        self.0.fetch_add(amount, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hit_ratio_is_of_pages() {
        let metrics = LazyMetrics::default();
        assert!(metrics.hit_ratio(4096).abs() < f64::EPSILON);
        metrics.prefetched_bytes.add(2 * 4096);
        metrics.working_set_late.add(1);
        metrics.working_set_misses.add(1);
        assert!((metrics.hit_ratio(4096) - 0.75).abs() < f64::EPSILON);
    }
}
