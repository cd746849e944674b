//! Nothing behind a device's registers: a drive of no sectors, an interface without a cable.
//!
//! A driver that has found such a device stays with it, and works with the device that takes its place; see
//! [`MmioTransport::replace`](crate::virtio::MmioTransport::replace).

#[cfg(test)]
mod tests;

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use tracing::error;
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_S_IOERR,
};
use virtio_bindings::virtio_ids::{VIRTIO_ID_BLOCK, VIRTIO_ID_NET};
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6,
    VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_F_STATUS,
};
use virtio_queue::Queue;

use crate::virtio::complaints::STOPS;
use crate::virtio::queue::{Chain, QueueError, RING_FEATURES, VirtQueue};
use crate::virtio::{
    ActivateError, Activation, DeviceState, Interrupt, RestoreError, SaveError, VirtioDevice, config_space,
};
use crate::{ActiveHalf, GuestMemory, Subscriber};

/// Data segments of one request, and the drive's block, which Linux reads but once: those of any drive that comes.
const SEG_MAX: u32 = 254;
const BLOCK_SIZE: u32 = 512;

/// The queue of an interface whose buffers are for frames from the host (virtio 1.2 section 5.1.2).
const RX: usize = 0;

/// The configuration half of a device that is not there. It has no address and no serial number of its own.
pub struct Vacant {
    device_type: u32,
    queue_sizes: Vec<u16>,
    features: u64,
    config: Vec<u8>,
}

impl Vacant {
    /// A drive of no sectors with these queues.
    pub fn blk(queue_sizes: &[u16]) -> Self {
        // Section 5.2.4: capacity (64 bits), size_max, seg_max, geometry, blk_size.
        let config = [0, 0, 0, SEG_MAX, 0, BLOCK_SIZE].into_iter().flat_map(u32::to_le_bytes).collect();
        let features = [VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_FLUSH];
        Self::new(VIRTIO_ID_BLOCK, queue_sizes, &features, config)
    }

    /// An interface that no frame comes from, with these queues. The guest's driver chooses its address.
    pub fn net(queue_sizes: &[u16]) -> Self {
        let features = [
            VIRTIO_NET_F_STATUS,
            VIRTIO_NET_F_MRG_RXBUF,
            VIRTIO_NET_F_CSUM,
            VIRTIO_NET_F_HOST_TSO4,
            VIRTIO_NET_F_HOST_TSO6,
            VIRTIO_NET_F_GUEST_CSUM,
            VIRTIO_NET_F_GUEST_TSO4,
            VIRTIO_NET_F_GUEST_TSO6,
        ];
        // Section 5.1.4: mac, status (no link), max_virtqueue_pairs.
        Self::new(VIRTIO_ID_NET, queue_sizes, &features, vec![0, 0, 0, 0, 0, 0, 0, 0, 1, 0])
    }

    fn new(device_type: u32, queue_sizes: &[u16], features: &[u32], config: Vec<u8>) -> Self {
        let features = features.iter().fold(RING_FEATURES, |features, bit| features | 1 << bit);
        Self { device_type, queue_sizes: queue_sizes.to_vec(), features, config }
    }
}

impl VirtioDevice for Vacant {
    fn device_type(&self) -> u32 {
        self.device_type
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        config_space::read(&self.config, offset, data);
    }

    fn save(&self) -> Result<DeviceState, SaveError> {
        Ok(DeviceState::nothing())
    }

    fn restore(&mut self, state: &DeviceState) -> Result<(), RestoreError> {
        state.expect_nothing(self.device_type)
    }

    fn activate(&mut self, activation: Activation) -> Result<Subscriber, ActivateError> {
        let Activation { memory, queues, acked_features, interrupt } = activation;
        let take = |active| VirtQueue::new(active, &memory, acked_features);
        let queues = queues.into_iter().map(|active| active.map(take)).collect();
        Ok(Box::new(Refuser { device_type: self.device_type, queues, interrupt }))
    }
}

/// The active half: every request fails, every frame is lost.
struct Refuser {
    device_type: u32,
    queues: Vec<Option<VirtQueue>>,
    interrupt: Interrupt,
}

impl Refuser {
    /// The queue, unless its buffers wait for frames that never come.
    fn served(&mut self, index: usize) -> Option<&mut VirtQueue> {
        if self.device_type == VIRTIO_ID_NET && index == RX {
            return None;
        }
        self.queues.get_mut(index)?.as_mut()
    }

    fn serve(&mut self, index: usize, ops: &mut EventOps) {
        let refuse = if self.device_type == VIRTIO_ID_BLOCK { fail } else { lose };
        let Some(queue) = self.served(index) else { return };
        match queue.serve(refuse) {
            Ok(true) => self.interrupt.used_buffers(),
            Ok(false) => {}
            Err(reason) => {
                let _ = ops.remove(Events::empty(queue.kick()));
                self.interrupt.complaints().tell("vacant", &reason, STOPS);
                self.interrupt.needs_reset();
            }
        }
    }
}

/// Answers a block request, whose last byte is its status (section 5.2.6).
fn fail(memory: &GuestMemory, chain: &Chain) -> Result<u32, QueueError> {
    let writable = chain.writable();
    let data = writable.len().checked_sub(1).ok_or_else(|| chain.malformed())?;
    let (_, status) = writable.split_at(data).ok_or_else(|| chain.malformed())?;
    status.write(memory, &[u8::try_from(VIRTIO_BLK_S_IOERR).unwrap_or(u8::MAX)])?;
    Ok(1)
}

fn lose(_: &GuestMemory, _: &Chain) -> Result<u32, QueueError> {
    Ok(0)
}

impl MutEventSubscriber for Refuser {
    fn init(&mut self, ops: &mut EventOps) {
        for index in 0..self.queues.len() {
            let Some(queue) = self.served(index) else { continue };
            let token = u32::try_from(index).unwrap_or(u32::MAX);
            if let Err(reason) = ops.add(Events::with_data(queue.kick(), token, EventSet::IN)) {
                error!(device = "vacant", %reason, "The event loop cannot watch a queue");
                self.interrupt.needs_reset();
                return;
            }
            self.serve(index, ops);
        }
    }

    fn process(&mut self, events: Events, ops: &mut EventOps) {
        self.serve(usize::try_from(events.data()).unwrap_or(usize::MAX), ops);
    }
}

impl ActiveHalf for Refuser {
    /// Nothing is in flight between two calls.
    fn park(self: Box<Self>) -> Vec<Option<Queue>> {
        self.queues.into_iter().map(|queue| queue.map(|queue| queue.park(0))).collect()
    }
}
