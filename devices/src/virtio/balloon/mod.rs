//! Memory balloon (virtio 1.2 section 5.5): the guest gives memory back to the host.
//!
//! Two ways lead there. The host sets a target and the guest *inflates* by that much; or the guest
//! *reports* what is free as it becomes free. Whatever the guest names is merged into runs, cut at
//! the edges of memory and dropped from the process (`reclaim`): a lie costs nobody but the guest its
//! own pages.
//!
//! Free page *hinting* (section 5.5.6.5) is not offered. Linux takes hinted pages back when memory is
//! short, without telling and before the device has come to them, so to drop one is to drop what the
//! guest has written since. Reported pages are the guest's again only when the device has used the report.

mod config;
mod engine;
mod handle;
mod inflate;
mod layout;
mod reclaim;
mod stats;
#[cfg(test)]
mod tests;

pub use config::{Balloon, BalloonConfig};
pub use handle::{BalloonError, BalloonHandle};
pub use inflate::MAX_PAGES_PER_REQUEST;
pub use stats::{GuestStats, MAX_STATS};

/// Size of a page of the balloon, whatever the size of the guest's (section 5.5.6).
pub const PAGE_SIZE: u64 = 4096;
