//! The configuration half.

use std::io;
use std::sync::Arc;

use virtio_bindings::virtio_ids::VIRTIO_ID_MEM;

use super::PluggableMemory;
use super::handle::{MemHandle, Region, Shared};
use super::handler::Handler;
use crate::Subscriber;
use crate::virtio::queue::{RING_FEATURES, VirtQueue};
use crate::virtio::worker::QueueWorker;
use crate::virtio::{ActivateError, Activation, DeviceState, RestoreError, SaveError, VirtioDevice, config_space};

/// `VIRTIO_MEM_F_UNPLUGGED_INACCESSIBLE` (section 5.15.3): a driver keeps away from blocks that are
/// not plugged, and finds no memory there if it does not.
const F_UNPLUGGED_INACCESSIBLE: u64 = 1;

/// What errors call the device.
const NAME: &str = "pluggable memory";

/// Linux has one request at a time.
const QUEUE_SIZE: u16 = 16;

/// Smallest block: what the processor maps with one entry of a page directory.
pub const MIN_BLOCK_SIZE: u64 = 2 << 20;

/// Most blocks of a region: 128 KiB of bits, and 2 TiB of the smallest blocks.
pub const MAX_BLOCKS: u64 = 1 << 20;

/// How memory that can be plugged is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemConfig {
    /// Bytes that the guest can have at most, whole blocks.
    pub size: u64,
    /// Bytes of a block, a power of two from [`MIN_BLOCK_SIZE`].
    pub block_size: u64,
    /// Bytes that the guest is to have from the start, whole blocks.
    pub requested: u64,
    /// NUMA node that the guest puts the memory to.
    pub node: u16,
}

/// Why memory cannot be plugged.
#[derive(Debug, thiserror::Error)]
pub enum MemError {
    /// The block size is not a power of two, or too small.
    #[error("Blocks of {0} bytes are not possible: it must be a power of two from {MIN_BLOCK_SIZE} bytes")]
    BlockSize(u64),
    /// The region is empty, has a part of a block or too many.
    #[error("A region of {size} bytes is not possible: it must be 1 to {MAX_BLOCKS} blocks of {block_size} bytes")]
    Size {
        /// What was asked for.
        size: u64,
        /// Bytes of a block.
        block_size: u64,
    },
    /// The address is no multiple of the block size, or the region runs past the last address.
    #[error("A region of {size} bytes cannot be at {addr:#x}")]
    Address {
        /// Guest physical address.
        addr: u64,
        /// Bytes.
        size: u64,
    },
    /// More than the region has, or a part of a block.
    #[error("The guest cannot have {requested} bytes: the region has {size} in blocks of {block_size}")]
    Requested {
        /// What was asked for.
        requested: u64,
        /// What there is.
        size: u64,
        /// Bytes of a block.
        block_size: u64,
    },
    /// No event descriptor.
    #[error("Cannot make an event descriptor")]
    EventFd(#[source] io::Error),
}

impl MemConfig {
    /// Checks everything but the address.
    pub fn check(&self) -> Result<(), MemError> {
        let Self { size, block_size, requested, node } = *self;
        if !block_size.is_power_of_two() || block_size < MIN_BLOCK_SIZE {
            return Err(MemError::BlockSize(block_size));
        }
        let region = Region { addr: 0, size, block_size, node };
        if !size.is_multiple_of(block_size) || !(1..=MAX_BLOCKS).contains(&region.blocks(size)) {
            return Err(MemError::Size { size, block_size });
        }
        region.check_requested(requested)
    }
}

/// The configuration half of a memory device.
pub struct Mem {
    shared: Arc<Shared>,
    /// The driver was restored, and believes that nothing is wanted of it.
    unaware: bool,
}

impl Mem {
    /// Makes the device of a region at guest address `addr`. None of it is plugged yet.
    pub fn new(config: MemConfig, addr: u64, memory: Box<dyn PluggableMemory>) -> Result<(Self, MemHandle), MemError> {
        config.check()?;
        let MemConfig { size, block_size, requested, node } = config;
        if !addr.is_multiple_of(block_size) || addr.checked_add(size).is_none() {
            return Err(MemError::Address { addr, size });
        }
        let region = Region { addr, size, block_size, node };
        let shared = Arc::new(Shared::new(region, requested, memory).map_err(MemError::EventFd)?);
        Ok((Self { shared: Arc::clone(&shared), unaware: false }, MemHandle::new(shared)))
    }

    /// `block_size`, `node_id` with padding, `addr`, `region_size`, `usable_region_size` (all of
    /// it), `plugged_size`, `requested_size` (section 5.15.4).
    fn config_space(&self) -> Vec<u8> {
        let region = self.shared.region;
        let requested = self.shared.lock().requested;
        let fields = [
            region.block_size,
            region.node.into(),
            region.addr,
            region.size,
            region.size,
            self.shared.plugged(),
            requested,
        ];
        fields.into_iter().flat_map(u64::to_le_bytes).collect()
    }
}

impl VirtioDevice for Mem {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_MEM
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE]
    }

    fn features(&self) -> u64 {
        RING_FEATURES | 1 << F_UNPLUGGED_INACCESSIBLE
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        config_space::read(&self.config_space(), offset, data);
    }

    fn activate(&mut self, activation: Activation) -> Result<Subscriber, ActivateError> {
        let Activation { memory, queues, acked_features, interrupt } = activation;
        let queue = queues.into_iter().flatten().next().ok_or(ActivateError::QueueMissing(0))?;
        let queue = VirtQueue::new(queue, &memory, acked_features);
        let mut state = self.shared.lock();
        state.interrupt = Some(interrupt.clone());
        if std::mem::take(&mut self.unaware) && state.requested != 0 {
            interrupt.config_changed();
        }
        drop(state);
        Ok(Box::new(QueueWorker::new("mem", queue, Handler::new(Arc::clone(&self.shared)), interrupt)))
    }

    /// The blocks stay as they are (section 5.15.5.1): the next driver unplugs what it does not want.
    fn reset(&mut self) {
        self.shared.lock().interrupt = None;
    }

    /// Only while nothing is plugged and nothing wanted: what is in the blocks is in no snapshot.
    fn save(&self) -> Result<DeviceState, SaveError> {
        let state = self.shared.lock();
        let busy = |reason| SaveError::Busy { device: NAME.to_owned(), reason };
        if state.blocks.plugged() != 0 {
            return Err(busy("the guest has some of it"));
        }
        if state.requested != 0 {
            return Err(busy("the guest is asked to have some of it"));
        }
        DeviceState::encode(VIRTIO_ID_MEM, &self.shared.region)
    }

    /// The region is the one that was configured here, which must be where and what the guest was told.
    fn restore(&mut self, state: &DeviceState) -> Result<(), RestoreError> {
        let (saved, present): (Region, _) = (state.decode(VIRTIO_ID_MEM)?, self.shared.region);
        let pairs = [
            ("bytes", saved.size, present.size),
            ("as its address", saved.addr, present.addr),
            ("as the size of its blocks", saved.block_size, present.block_size),
            ("as its NUMA node", saved.node.into(), present.node.into()),
        ];
        if let Some((what, saved, present)) = pairs.into_iter().find(|(_, saved, present)| saved != present) {
            return Err(RestoreError::Pluggable { what, saved, present });
        }
        self.unaware = true;
        Ok(())
    }
}
