//! Entropy device (virtio 1.2 section 5.4): fills what the guest offers from `/dev/urandom`.

#[cfg(test)]
mod tests;

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;

use tracing::debug;
use virtio_bindings::virtio_ids::VIRTIO_ID_RNG;

use crate::virtio::queue::{Chain, QueueError, RING_FEATURES, VirtQueue};
use crate::virtio::worker::{ChainHandler, QueueWorker};
use crate::virtio::{ActivateError, Activation, DeviceState, RestoreError, SaveError, VirtioDevice};
use crate::{GuestMemory, Subscriber};

const QUEUE_SIZE: u16 = 64;

/// Bytes that one request gets at most, whatever it asks for: a guest must not buy minutes of
/// host time with one buffer. The specification lets a device fill a part of a buffer only.
pub const MAX_REQUEST: u32 = 64 << 10;

/// The configuration half of an entropy device.
pub struct Rng {
    /// Opened once, before privileges are dropped.
    source: Arc<File>,
}

impl Rng {
    /// Makes the device. Fails when `/dev/urandom` cannot be opened.
    pub fn new() -> io::Result<Self> {
        Ok(Self { source: Arc::new(File::open("/dev/urandom")?) })
    }
}

impl VirtioDevice for Rng {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_RNG
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE]
    }

    fn features(&self) -> u64 {
        RING_FEATURES
    }

    fn read_config(&self, _offset: u64, _data: &mut [u8]) {}

    fn activate(&mut self, activation: Activation) -> Result<Subscriber, ActivateError> {
        let Activation { memory, queues, acked_features, interrupt } = activation;
        let queue = queues.into_iter().flatten().next().ok_or(ActivateError::QueueMissing(0))?;
        let queue = VirtQueue::new(queue, &memory, acked_features);
        let handler = Entropy { source: Arc::clone(&self.source) };
        Ok(Box::new(QueueWorker::new("rng", queue, handler, interrupt)))
    }

    fn save(&self) -> Result<DeviceState, SaveError> {
        Ok(DeviceState::nothing())
    }

    fn restore(&mut self, state: &DeviceState) -> Result<(), RestoreError> {
        state.expect_nothing(VIRTIO_ID_RNG)
    }
}

struct Entropy {
    source: Arc<File>,
}

impl ChainHandler for Entropy {
    fn handle(&mut self, memory: &GuestMemory, chain: &Chain) -> Result<u32, QueueError> {
        let wanted = chain.writable();
        let len = wanted.len().min(MAX_REQUEST);
        let (part, _) = wanted.split_at(len).ok_or_else(|| chain.malformed())?;
        let filled = part.buffers(memory)?.read_from(self.source.as_fd()).unwrap_or_else(|error| {
            debug!(%error, "No entropy can be read");
            0
        });
        Ok(u32::try_from(filled).unwrap_or(len))
    }
}
