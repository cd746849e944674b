//! Persistent memory (virtio 1.2 section 5.19): a file of the host as memory of the guest.
//!
//! The guest reads and writes the memory by itself; the device only says where it is and makes what
//! was written durable. Whoever makes the machine maps the file, and maps it read-only where the
//! guest must not write: what this device says to the driver keeps nobody from anything.

mod engine;
#[cfg(test)]
mod tests;

use std::fs::File;
use std::sync::Arc;

use virtio_bindings::virtio_ids::VIRTIO_ID_PMEM;

use crate::Subscriber;
use crate::virtio::queue::{RING_FEATURES, VirtQueue};
use crate::virtio::{ActivateError, Activation, DeviceState, RestoreError, SaveError, VirtioDevice, config_space};
use engine::Engine;

const QUEUE_SIZE: u16 = 64;

/// How a persistent memory is made.
#[derive(Debug)]
pub struct PmemConfig {
    /// Its name, for messages.
    pub id: String,
    /// What is in it, open for reading, and for writing unless it is read-only. Nobody may make it
    /// shorter while the machine lives.
    pub file: File,
    /// Whether the guest cannot write.
    pub read_only: bool,
}

/// The configuration half of a persistent memory.
pub struct Pmem {
    addr: u64,
    size: u64,
    /// What is made durable; nothing where nothing can be written.
    file: Option<Arc<File>>,
}

impl Pmem {
    /// The device of `size` bytes of memory at guest address `addr`, where `file` is mapped. Without
    /// a file there is nothing to be made durable.
    pub fn new(addr: u64, size: u64, file: Option<File>) -> Self {
        Self { addr, size, file: file.map(Arc::new) }
    }
}

impl VirtioDevice for Pmem {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_PMEM
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE]
    }

    fn features(&self) -> u64 {
        RING_FEATURES
    }

    /// `start` and `size` (section 5.19.4).
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let space: Vec<u8> = [self.addr, self.size].into_iter().flat_map(u64::to_le_bytes).collect();
        config_space::read(&space, offset, data);
    }

    fn activate(&mut self, activation: Activation) -> Result<Subscriber, ActivateError> {
        let Activation { memory, queues, acked_features, interrupt } = activation;
        let queue = queues.into_iter().flatten().next().ok_or(ActivateError::QueueMissing(0))?;
        let queue = VirtQueue::new(queue, &memory, acked_features);
        Ok(Box::new(Engine::new(queue, self.file.clone(), interrupt)))
    }

    fn save(&self) -> Result<DeviceState, SaveError> {
        Ok(DeviceState::nothing())
    }

    fn restore(&mut self, state: &DeviceState) -> Result<(), RestoreError> {
        state.expect_nothing(VIRTIO_ID_PMEM)
    }
}
