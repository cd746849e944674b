//! Memory balloon (virtio 1.2 section 5.5): the guest gives memory back to the host.
//!
//! Three ways lead there. The host sets a target and the guest *inflates* by that much; the guest
//! *reports* what is free as it becomes free; or the host asks for *hints* about what is free right
//! now. Whatever the guest names is merged into runs, cut at the edges of memory and dropped from
//! the process (`reclaim`): a lie costs nobody but the guest its own pages.

mod config;
mod engine;
mod handle;
mod hinting;
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
