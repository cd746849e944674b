//! Entropy device (virtio 1.2 section 5.4): fills what the guest offers from `/dev/urandom`.

mod engine;
#[cfg(test)]
mod tests;

use std::fs::File;
use std::io;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use virtio_bindings::virtio_ids::VIRTIO_ID_RNG;

use crate::Subscriber;
use crate::virtio::queue::{RING_FEATURES, VirtQueue};
use crate::virtio::rate_limiter::{Budget, RateLimiter, RateLimits};
use crate::virtio::{ActivateError, Activation, DeviceState, RestoreError, SaveError, VirtioDevice};
use engine::Engine;

const QUEUE_SIZE: u16 = 64;

/// Bytes that one request gets at most, whatever it asks for: a guest must not buy minutes of
/// host time with one buffer. The specification lets a device fill a part of a buffer only.
pub const MAX_REQUEST: u32 = 64 << 10;

/// The configuration half of an entropy device.
pub struct Rng {
    /// Opened once, before privileges are dropped.
    source: Arc<File>,
    /// What is left of the limits; a reset does not fill it.
    budget: Arc<Mutex<Budget>>,
}

impl Rng {
    /// Makes the device, which gives no more than `limits`. Fails when `/dev/urandom` cannot be opened.
    pub fn new(limits: RateLimits) -> io::Result<Self> {
        let budget = Arc::new(Mutex::new(Budget::new(limits, Instant::now())));
        Ok(Self { source: Arc::new(File::open("/dev/urandom")?), budget })
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
        let limiter = RateLimiter::new(Arc::clone(&self.budget)).map_err(ActivateError::Setup)?;
        Ok(Box::new(Engine::new(queue, Arc::clone(&self.source), limiter, interrupt)))
    }

    fn save(&self) -> Result<DeviceState, SaveError> {
        Ok(DeviceState::nothing())
    }

    fn restore(&mut self, state: &DeviceState) -> Result<(), RestoreError> {
        state.expect_nothing(VIRTIO_ID_RNG)
    }
}
