//! What the transport keeps behind its lock.

use event_manager::SubscriberId;
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_mmio::*;
use virtio_queue::{Queue, QueueT};

use super::queue_setup::QueueSetup;
use super::status::{Phase, Status};
use crate::virtio::VirtioDevice;

/// The registers that have a memory, and the device they belong to.
pub struct Registers {
    /// The configuration half.
    pub device: Box<dyn VirtioDevice>,
    /// Status, without what the device adds to it.
    pub status: Status,
    /// DeviceFeaturesSel.
    pub device_features_sel: u32,
    /// DriverFeaturesSel.
    pub driver_features_sel: u32,
    /// Both words of DriverFeatures.
    pub driver_features: u64,
    /// QueueSel.
    pub queue_sel: u32,
    /// The queues as the driver describes them.
    pub queues: Vec<QueueSetup>,
    /// The active half, while it is in the event loop.
    pub active: Option<SubscriberId>,
    /// The device is to be activated where it was parked.
    pub parked: bool,
    /// It is not to be activated now, whatever the driver does.
    pub held: bool,
}

impl Registers {
    /// The registers of `device` after a reset.
    pub fn new(device: Box<dyn VirtioDevice>) -> Self {
        let queues = device.queue_max_sizes().iter().copied().map(QueueSetup::new).collect();
        Self {
            device,
            status: Status::RESET,
            device_features_sel: 0,
            driver_features_sel: 0,
            driver_features: 0,
            queue_sel: 0,
            queues,
            active: None,
            parked: false,
            held: false,
        }
    }

    /// DeviceFeatures register.
    pub fn device_features(&self) -> u32 {
        feature_word(self.offered_features(), self.device_features_sel)
    }

    /// What the device offers, and what the transport adds to it.
    pub fn offered_features(&self) -> u64 {
        self.device.features() | (1 << VIRTIO_F_VERSION_1)
    }

    /// Whether FEATURES_OK may be set (section 3.1.1 and 6.1).
    pub fn features_acceptable(&self) -> bool {
        self.driver_features & !self.offered_features() == 0 && self.driver_features & (1 << VIRTIO_F_VERSION_1) != 0
    }

    /// DriverFeatures register.
    pub fn accept_features(&mut self, word: u32) {
        if !self.status.is(Phase::Driver) {
            return;
        }
        let word = u64::from(word);
        match self.driver_features_sel {
            0 => self.driver_features = (self.driver_features & !LOW_WORD) | word,
            1 => self.driver_features = (self.driver_features & LOW_WORD) | (word << 32),
            _ => {}
        }
    }

    /// The queue that QueueSel names.
    pub fn selected_queue(&self) -> Option<&QueueSetup> {
        self.queues.get(usize::try_from(self.queue_sel).ok()?)
    }

    /// The registers of the selected queue. Queues are set up between FEATURES_OK and DRIVER_OK, and a queue that is ready keeps its
    /// description (section 4.2.2.2).
    pub fn write_queue_register(&mut self, offset: u32, value: u32) {
        if !self.status.is(Phase::FeaturesOk) {
            return;
        }
        let Ok(index) = usize::try_from(self.queue_sel) else { return };
        let Some(queue) = self.queues.get_mut(index) else { return };
        if offset == VIRTIO_MMIO_QUEUE_READY {
            queue.ready = value == 1;
            return;
        }
        if queue.ready {
            return;
        }
        match offset {
            VIRTIO_MMIO_QUEUE_NUM => queue.size = value,
            VIRTIO_MMIO_QUEUE_DESC_LOW => set_low(&mut queue.descriptors, value),
            VIRTIO_MMIO_QUEUE_DESC_HIGH => set_high(&mut queue.descriptors, value),
            VIRTIO_MMIO_QUEUE_AVAIL_LOW => set_low(&mut queue.avail, value),
            VIRTIO_MMIO_QUEUE_AVAIL_HIGH => set_high(&mut queue.avail, value),
            VIRTIO_MMIO_QUEUE_USED_LOW => set_low(&mut queue.used, value),
            VIRTIO_MMIO_QUEUE_USED_HIGH => set_high(&mut queue.used, value),
            _ => {}
        }
    }

    /// Keeps where a parked device has come to in its queues.
    pub fn keep_places(&mut self, parked: Vec<Option<Queue>>) {
        for (setup, queue) in self.queues.iter_mut().zip(parked) {
            if let Some(queue) = queue {
                (setup.next_avail, setup.next_used) = (queue.next_avail(), queue.next_used());
            }
        }
    }

    /// Takes everything back to where it was when the machine was made. The active half is gone.
    pub fn reset(&mut self) {
        self.device.reset();
        self.status = Status::RESET;
        self.device_features_sel = 0;
        self.driver_features_sel = 0;
        self.driver_features = 0;
        self.queue_sel = 0;
        self.parked = false;
        for queue in &mut self.queues {
            *queue = QueueSetup::new(queue.max_size);
        }
    }
}

const LOW_WORD: u64 = 0xffff_ffff;

/// The `select`th 32 bits of a feature set; there are two words.
fn feature_word(features: u64, select: u32) -> u32 {
    let word = match select {
        0 => features & LOW_WORD,
        1 => features >> 32,
        _ => 0,
    };
    u32::try_from(word).unwrap_or_default()
}

fn set_low(address: &mut u64, value: u32) {
    *address = (*address & !LOW_WORD) | u64::from(value);
}

fn set_high(address: &mut u64, value: u32) {
    *address = (*address & LOW_WORD) | (u64::from(value) << 32);
}
