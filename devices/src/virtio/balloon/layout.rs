//! Which queue is which.

use super::config::{F_REPORTING, F_STATS_VQ};
use crate::virtio::ActiveQueue;

/// Queue numbers (section 5.5.2). 3 is that of free page hinting.
pub const INFLATE: usize = 0;
pub const DEFLATE: usize = 1;
const STATS: usize = 2;
const REPORTS: usize = 4;
/// Most queues that there can be.
pub const QUEUES: usize = 5;

/// The numbers of the queues whose features were negotiated.
#[derive(Debug, PartialEq, Eq)]
pub struct Layout {
    pub stats: Option<usize>,
    pub reports: Option<usize>,
}

impl Layout {
    /// Finds out which numbers the driver uses.
    ///
    /// By the specification a queue keeps its number when those before it are not there. Linux
    /// before 6.11 gives it the next free one instead, as QEMU does, and later versions try one
    /// after the other: the queues that were enabled tell which it is.
    pub fn new(acked_features: u64, enabled: &[bool]) -> Self {
        let negotiated = |bit: u64| acked_features & (1 << bit) != 0;
        let wanted = [(F_STATS_VQ, STATS), (F_REPORTING, REPORTS)];
        let is_enabled = |index: &usize| enabled.get(*index).copied().unwrap_or_default();
        let as_specified = wanted.iter().all(|(bit, index)| !negotiated(*bit) || is_enabled(index));
        let mut next_free = STATS;
        let [stats, reports] = wanted.map(|(bit, specified)| {
            if !negotiated(bit) {
                return None;
            }
            let compact = next_free;
            next_free = next_free.saturating_add(1);
            Some(if as_specified { specified } else { compact })
        });
        Self { stats, reports }
    }

    /// Whether each queue is there.
    pub fn enabled(queues: &[Option<ActiveQueue>]) -> Vec<bool> {
        queues.iter().map(Option::is_some).collect()
    }
}
