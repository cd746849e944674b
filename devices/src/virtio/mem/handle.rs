//! The region as the host sees it, and what both halves share for that.

use std::io;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::blocks::Blocks;
use super::{MemError, PluggableMemory};
use crate::virtio::Interrupt;
use crate::virtio::complaints::Complaints;

/// Where the region is and what it is made of: all that a snapshot has of it.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(super) struct Region {
    pub(super) addr: u64,
    pub(super) size: u64,
    pub(super) block_size: u64,
    pub(super) node: u16,
}

impl Region {
    /// Whole blocks of so many bytes.
    pub(super) fn blocks(&self, bytes: u64) -> u64 {
        bytes.checked_div(self.block_size).unwrap_or_default()
    }

    /// Offset and length of blocks in bytes.
    pub(super) fn bytes(&self, blocks: &Range<u64>) -> (u64, u64) {
        let count = blocks.end.saturating_sub(blocks.start);
        (blocks.start.saturating_mul(self.block_size), count.saturating_mul(self.block_size))
    }

    /// Whether the guest can have so many bytes.
    pub(super) fn check_requested(&self, requested: u64) -> Result<(), MemError> {
        if requested > self.size || !requested.is_multiple_of(self.block_size) {
            return Err(MemError::Requested { requested, size: self.size, block_size: self.block_size });
        }
        Ok(())
    }
}

/// What host, configuration half and active half know of each other.
pub(super) struct Shared {
    pub(super) region: Region,
    pub(super) memory: Box<dyn PluggableMemory>,
    pub(super) complaints: Complaints,
    state: Mutex<State>,
    /// For the host: the guest has plugged or unplugged something.
    changed: EventFd,
}

pub(super) struct State {
    pub(super) blocks: Blocks,
    pub(super) requested: u64,
    /// There while a driver works with the device.
    pub(super) interrupt: Option<Interrupt>,
}

impl Shared {
    pub(super) fn new(region: Region, requested: u64, memory: Box<dyn PluggableMemory>) -> io::Result<Self> {
        let blocks = Blocks::new(region.blocks(region.size));
        let state = Mutex::new(State { blocks, requested, interrupt: None });
        let complaints = Complaints::default();
        Ok(Self { region, memory, complaints, state, changed: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)? })
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        // The books are written after the memory has changed, in one go.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn plugged(&self) -> u64 {
        self.lock().blocks.plugged().saturating_mul(self.region.block_size)
    }

    pub(super) fn tell_host(&self) {
        // A full counter is readable already.
        let _ = self.changed.write(1);
    }
}

/// A handle on a machine's memory that can be plugged.
#[derive(Clone)]
pub struct MemHandle {
    shared: Arc<Shared>,
}

impl MemHandle {
    pub(super) fn new(shared: Arc<Shared>) -> Self {
        Self { shared }
    }

    /// Asks the guest to have `bytes` of the region, whole blocks. A guest may be slow to follow, or
    /// unable to: what it uses it cannot give back.
    pub fn set_requested(&self, bytes: u64) -> Result<(), MemError> {
        self.shared.region.check_requested(bytes)?;
        let mut state = self.shared.lock();
        state.requested = bytes;
        if let Some(interrupt) = &state.interrupt {
            interrupt.config_changed();
        }
        Ok(())
    }

    /// What the guest was asked to have, in bytes.
    pub fn requested(&self) -> u64 {
        self.shared.lock().requested
    }

    /// What it has, in bytes.
    pub fn plugged(&self) -> u64 {
        self.shared.plugged()
    }

    /// What it can have at most, in bytes.
    pub fn size(&self) -> u64 {
        self.shared.region.size
    }

    /// Size of a block in bytes.
    pub fn block_size(&self) -> u64 {
        self.shared.region.block_size
    }

    /// Guest physical address of the region.
    pub fn address(&self) -> u64 {
        self.shared.region.addr
    }

    /// NUMA node that the guest puts the memory to.
    pub fn node(&self) -> u16 {
        self.shared.region.node
    }

    /// Readable when the guest has plugged or unplugged something. Whoever waits for it reads it.
    pub fn changed(&self) -> &EventFd {
        &self.shared.changed
    }
}
