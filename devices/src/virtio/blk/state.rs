//! What a drive remembers in a snapshot.

use serde::{Deserialize, Serialize};

/// Beside queues and features. Requests that were under way are done when this is taken.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct BlkState {
    /// The driver's choice: completed writes may be in a cache.
    pub writeback: bool,
    /// The capacity that the driver knows.
    pub sectors: u64,
}
