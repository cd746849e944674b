//! Memory that is plugged and unplugged in blocks (virtio 1.2 section 5.15).
//!
//! The host says how much of a region the guest is to have; the guest's driver asks for blocks and
//! gives blocks back until that is so. This crate keeps the books and refuses what does not add up;
//! whoever makes the machine supplies the memory ([`PluggableMemory`]) and sees to it that blocks
//! that are not plugged cannot be reached.

mod blocks;
mod config;
mod handle;
mod handler;
mod request;
#[cfg(test)]
mod tests;

use std::io;

pub use blocks::MAX_RUNS;
pub use config::{MAX_BLOCKS, MIN_BLOCK_SIZE, Mem, MemConfig, MemError};
pub use handle::MemHandle;

/// The memory behind the region. Offsets and lengths are whole blocks of it.
pub trait PluggableMemory: Send + Sync {
    /// Lets the guest reach the blocks, which are empty.
    fn plug(&self, offset: u64, len: u64) -> io::Result<()>;

    /// Takes the blocks from the guest, and what is in them from the host.
    fn unplug(&self, offset: u64, len: u64) -> io::Result<()>;
}
