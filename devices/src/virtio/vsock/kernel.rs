//! A vsock device whose connections are the host kernel's: vhost-vsock. They end in `AF_VSOCK`
//! sockets that any program of the host can have.

use std::sync::Arc;

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use tracing::{error, warn};
use virtio_bindings::virtio_ids::VIRTIO_ID_VSOCK;
use virtio_queue::Queue;

use super::{FIRST_GUEST_CID, LAST_GUEST_CID, QUEUE_SIZES, VsockError};
use crate::virtio::kernel_vhost::{KernelRings, KernelVhost};
use crate::virtio::queue::RING_FEATURES;
use crate::virtio::{ActivateError, Activation, Interrupt, VirtioDevice, config_space};
use crate::{ActiveHalf, Subscriber};

/// Receive and transmit queue. The event queue stays here and is never used: the kernel has no
/// events, and such a device is not restored.
const DATA_QUEUES: usize = 2;

/// How a vsock device is made that the host's kernel serves.
#[derive(Debug)]
pub struct KernelVsockConfig {
    /// The guest's context id, 3 to 2^32 - 2, which no other guest of the host may have.
    pub guest_cid: u64,
    /// The host's vhost-vsock.
    pub vhost: KernelVhost,
}

/// The configuration half.
pub struct KernelVsock {
    guest_cid: u64,
    vhost: Arc<KernelVhost>,
}

impl KernelVsock {
    /// Makes the device and takes its context id.
    pub fn new(config: KernelVsockConfig) -> Result<Self, VsockError> {
        let KernelVsockConfig { guest_cid, vhost } = config;
        if !(FIRST_GUEST_CID..=LAST_GUEST_CID).contains(&guest_cid) {
            return Err(VsockError::GuestCid(guest_cid));
        }
        vhost.set_guest_cid(guest_cid)?;
        Ok(Self { guest_cid, vhost: Arc::new(vhost) })
    }
}

impl VirtioDevice for KernelVsock {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_VSOCK
    }

    fn writes_are_known(&self) -> bool {
        false
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    /// Only streams, as without the kernel: see [`Vsock`](super::Vsock).
    fn features(&self) -> u64 {
        RING_FEATURES & self.vhost.supported(RING_FEATURES)
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        config_space::read(&self.guest_cid.to_le_bytes(), offset, data);
    }

    fn activate(&mut self, activation: Activation) -> Result<Subscriber, ActivateError> {
        let Activation { memory, queues, acked_features, interrupt } = activation;
        let mut data = Vec::new();
        for (index, queue) in queues.into_iter().take(DATA_QUEUES).enumerate() {
            data.push(queue.ok_or(ActivateError::QueueMissing(index))?);
        }
        let rings = KernelRings::new(Arc::clone(&self.vhost), &memory, acked_features, data, &interrupt);
        let rings = rings.map_err(ActivateError::Setup)?;
        rings.serve(None).map_err(ActivateError::Setup)?;
        Ok(Box::new(Active { rings: Some(rings), interrupt }))
    }
}

/// The active half: the kernel works, and this waits for it to fail.
struct Active {
    rings: Option<KernelRings>,
    interrupt: Interrupt,
}

impl MutEventSubscriber for Active {
    fn init(&mut self, ops: &mut EventOps) {
        let Some(rings) = &self.rings else { return };
        if let Err(reason) = ops.add(Events::new(rings.error(), EventSet::IN)) {
            error!(device = "vsock", %reason, "The event loop cannot watch the device");
            self.rings = None;
            self.interrupt.needs_reset();
        }
    }

    fn process(&mut self, _events: Events, ops: &mut EventOps) {
        let Some(rings) = self.rings.take() else { return };
        warn!(device = "vsock", "The kernel cannot go on with a queue; the device stops until the driver resets it");
        let _ = ops.remove(Events::empty(rings.error()));
        self.interrupt.needs_reset();
    }
}

impl ActiveHalf for Active {
    fn park(self: Box<Self>) -> Vec<Option<Queue>> {
        self.rings.map(KernelRings::park).unwrap_or_default()
    }
}
