//! The configuration half.

use std::io;
use std::num::NonZeroU32;
use std::sync::Arc;

use virtio_bindings::virtio_ids::VIRTIO_ID_BALLOON;

use super::engine::Engine;
use super::handle::{BalloonHandle, Shared};
use super::layout::QUEUES;
use crate::Subscriber;
use crate::virtio::queue::RING_FEATURES;
use crate::virtio::{ActivateError, Activation, DeviceState, RestoreError, SaveError, VirtioDevice, config_space};

/// Feature bits (section 5.5.3). `MUST_TELL_HOST` is not offered: a page that the guest takes
/// back comes back when it is touched. Neither is `PAGE_POISON`: what comes back is zero, or what
/// a file has there, and never a pattern of the guest's.
pub const F_STATS_VQ: u64 = 1;
const F_DEFLATE_ON_OOM: u64 = 2;
pub const F_REPORTING: u64 = 5;

/// Linux sends one request at a time; it reports free pages only where a queue has 32 entries.
const QUEUE_SIZE: u16 = 128;

/// Offset of `actual` in the configuration space, and the end of it (section 5.5.4).
const ACTUAL: usize = 4;
const ACTUAL_END: usize = 8;

/// How a balloon is made.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct BalloonConfig {
    /// How much the guest is to give back from the start, in bytes.
    pub target: u64,
    /// Whether the guest may take memory back by itself before it kills a process for lack of it.
    pub deflate_on_oom: bool,
    /// Whether the guest reports pages as they become free.
    pub free_page_reporting: bool,
    /// Seconds between reports of statistics; without, the guest reports once, at its start.
    pub stats_interval: Option<NonZeroU32>,
}

/// The configuration half of a balloon.
pub struct Balloon {
    shared: Arc<Shared>,
    features: u64,
}

impl Balloon {
    /// Makes a balloon for a guest with `memory` bytes. Fails when no event descriptor can be made.
    pub fn new(config: &BalloonConfig, memory: u64) -> io::Result<(Self, BalloonHandle)> {
        let mut features = RING_FEATURES | 1 << F_STATS_VQ;
        let options = [(config.deflate_on_oom, F_DEFLATE_ON_OOM), (config.free_page_reporting, F_REPORTING)];
        for (_, bit) in options.into_iter().filter(|(wanted, _)| *wanted) {
            features |= 1 << bit;
        }
        let shared = Arc::new(Shared::new(config, memory)?);
        let handle = BalloonHandle::new(Arc::clone(&shared));
        Ok((Self { shared, features }, handle))
    }
}

impl VirtioDevice for Balloon {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_BALLOON
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE; QUEUES]
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn discards_memory(&self) -> bool {
        true
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        config_space::read(&self.shared.config_space(), offset, data);
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        let mut space = self.shared.config_space();
        for (byte, at) in data.iter().zip(offset..) {
            let at = usize::try_from(at).unwrap_or(usize::MAX);
            if let Some(target) = space.get_mut(at).filter(|_| (ACTUAL..ACTUAL_END).contains(&at)) {
                *target = *byte;
            }
        }
        if let Some(actual) = space.get(ACTUAL..ACTUAL_END).and_then(|bytes| bytes.try_into().ok()) {
            self.shared.set_actual(u32::from_le_bytes(actual));
        }
    }

    fn activate(&mut self, activation: Activation) -> Result<Subscriber, ActivateError> {
        let interrupt = activation.interrupt.clone();
        let engine = Engine::new(activation, Arc::clone(&self.shared))?;
        self.shared.activated(interrupt);
        Ok(Box::new(engine))
    }

    fn reset(&mut self) {
        self.shared.deactivated();
    }

    fn save(&self) -> Result<DeviceState, SaveError> {
        DeviceState::encode(VIRTIO_ID_BALLOON, &self.shared.size())
    }

    fn restore(&mut self, state: &DeviceState) -> Result<(), RestoreError> {
        let (target, actual) = state.decode(VIRTIO_ID_BALLOON)?;
        self.shared.set_size(target, actual);
        Ok(())
    }
}
