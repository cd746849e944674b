//! The network device as its transport sees it.

use std::sync::Arc;

use virtio_bindings::virtio_ids::VIRTIO_ID_NET;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6,
    VIRTIO_NET_F_GUEST_UFO, VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_HOST_UFO, VIRTIO_NET_F_MAC,
    VIRTIO_NET_F_MRG_RXBUF,
};

use super::engine::Engine;
use super::rx::Receiver;
use super::tap::Tap;
use crate::Subscriber;
use crate::virtio::queue::{RING_FEATURES, VirtQueue};
use crate::virtio::{ActivateError, Activation, DeviceState, RestoreError, SaveError, VirtioDevice, config_space};

const RX: usize = 0;
const TX: usize = 1;
const QUEUE_SIZES: [u16; 2] = [256, 256];

/// Guest features that the host must know of, and the `TUN_F_*` bit that says so. All but the
/// first build on it (section 5.1.3.1).
const OFFLOADS: [(u32, libc::c_uint); 4] = [
    (VIRTIO_NET_F_GUEST_CSUM, libc::TUN_F_CSUM),
    (VIRTIO_NET_F_GUEST_TSO4, libc::TUN_F_TSO4),
    (VIRTIO_NET_F_GUEST_TSO6, libc::TUN_F_TSO6),
    (VIRTIO_NET_F_GUEST_UFO, libc::TUN_F_UFO),
];

/// A network interface for the guest.
#[derive(Debug)]
pub struct NetConfig {
    /// The interface's name in the configuration, for messages.
    pub id: String,
    /// The host's end.
    pub tap: Tap,
    /// The guest's address.
    pub mac: [u8; 6],
}

/// The configuration half of a network device.
pub struct Net {
    id: String,
    tap: Arc<Tap>,
    mac: [u8; 6],
}

impl Net {
    /// Makes the device.
    pub fn new(config: NetConfig) -> Self {
        let NetConfig { id, tap, mac } = config;
        Self { id, tap: Arc::new(tap), mac }
    }

    /// The interface's name in the configuration.
    pub fn id(&self) -> &str {
        &self.id
    }
}

impl VirtioDevice for Net {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_NET
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        [
            VIRTIO_NET_F_MAC,
            VIRTIO_NET_F_MRG_RXBUF,
            VIRTIO_NET_F_CSUM,
            VIRTIO_NET_F_HOST_TSO4,
            VIRTIO_NET_F_HOST_TSO6,
            VIRTIO_NET_F_HOST_UFO,
            VIRTIO_NET_F_GUEST_CSUM,
            VIRTIO_NET_F_GUEST_TSO4,
            VIRTIO_NET_F_GUEST_TSO6,
            VIRTIO_NET_F_GUEST_UFO,
        ]
        .into_iter()
        .fold(RING_FEATURES, |features, bit| features | 1 << bit)
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        config_space::read(&self.mac, offset, data);
    }

    fn activate(&mut self, activation: Activation) -> Result<Subscriber, ActivateError> {
        let Activation { memory, mut queues, acked_features, interrupt } = activation;
        let mut take = |index: usize| {
            let queue = queues.get_mut(index).and_then(Option::take);
            let queue = queue.ok_or(ActivateError::QueueMissing(index))?;
            Ok(VirtQueue::new(queue, &memory, acked_features))
        };
        let (rx, tx) = (take(RX)?, take(TX)?);
        let offloads = offloads(acked_features);
        self.tap.set_offloads(offloads).map_err(ActivateError::Setup)?;
        let merge = acked_features & (1 << VIRTIO_NET_F_MRG_RXBUF) != 0;
        let receiver = Receiver::new(rx, Arc::clone(&self.tap), merge, offloads != 0);
        Ok(Box::new(Engine::new(receiver, tx, Arc::clone(&self.tap), interrupt)))
    }

    fn save(&self) -> Result<DeviceState, SaveError> {
        Ok(DeviceState::nothing())
    }

    fn restore(&mut self, state: &DeviceState) -> Result<(), RestoreError> {
        state.expect_nothing(VIRTIO_ID_NET)
    }
}

fn offloads(acked_features: u64) -> libc::c_uint {
    if acked_features & (1 << VIRTIO_NET_F_GUEST_CSUM) == 0 {
        return 0;
    }
    OFFLOADS
        .into_iter()
        .filter(|(feature, _)| acked_features & (1 << feature) != 0)
        .fold(0, |bits, (_, bit)| bits | bit)
}
