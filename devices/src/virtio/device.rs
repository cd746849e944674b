//! The contract between a virtio device and its transport.

use std::io;

use virtio_queue::Queue;
use vmm_sys_util::eventfd::EventFd;

use crate::virtio::state::{DeviceState, RestoreError, SaveError};
use crate::virtio::{Interrupt, WriteLog};
use crate::{GuestMemory, Subscriber};

/// The configuration half of a virtio device.
///
/// ```text
///            driver writes status                DRIVER_OK
///   reset ─────────────────────────▶ configured ───────────▶ active
///     ▲   (features, config space)                activate()   │
///     │                                                        │ guest error: Interrupt::needs_reset
///     └────────────────────────────────────────────────────────┘
///        driver writes 0: the transport takes the active half out of its loop, then reset()
///
///   active ──ActiveHalf::park()──▶ parked ──activate()──▶ active     save() only here
/// ```
///
/// The transport enforces the order (virtio 1.2 section 3.1.1): a device never sees `activate`
/// twice without a `reset` or a `park` between, and features are final when `activate` is called.
pub trait VirtioDevice: Send {
    /// Device type (virtio 1.2 section 5), such as 2 for a block device.
    fn device_type(&self) -> u32;

    /// Largest size of each queue; its length is the number of queues.
    fn queue_max_sizes(&self) -> &[u16];

    /// Device feature bits that are offered. The transport adds `VIRTIO_F_VERSION_1`.
    fn features(&self) -> u64;

    /// Reads the device configuration space (section 4.2.2.2). Bytes past its end stay zero.
    fn read_config(&self, offset: u64, data: &mut [u8]);

    /// Writes the device configuration space. What is not writable is ignored.
    fn write_config(&mut self, offset: u64, data: &[u8]) {
        let _ = (offset, data);
    }

    /// Whether all that the device writes to guest memory is written by its queues' [`VirtQueue`]s, or to buffers that
    /// came from them; else nobody knows what another process or the host's kernel has written.
    ///
    /// [`VirtQueue`]: crate::virtio::queue::VirtQueue
    fn writes_are_known(&self) -> bool {
        true
    }

    /// Whether the device takes pages of guest memory away, with what is in them, as a balloon does.
    fn discards_memory(&self) -> bool {
        false
    }

    /// Makes the active half. It must look at its queues once when its loop calls `init`: the
    /// driver may have filled them before it set `DRIVER_OK`.
    fn activate(&mut self, activation: Activation) -> Result<Subscriber, ActivateError>;

    /// Goes back to the state before `activate`. The active half is already out of its loop.
    fn reset(&mut self) {}

    /// What a snapshot needs beside queues and features. Called while the device is parked or not
    /// active. A device that does not say how it is saved cannot be.
    fn save(&self) -> Result<DeviceState, SaveError> {
        Err(SaveError::Unsupported { device_type: self.device_type() })
    }

    /// Takes over what [`save`](Self::save) returned in another process. `activate` follows when
    /// the guest's driver had brought the device up.
    fn restore(&mut self, state: &DeviceState) -> Result<(), RestoreError> {
        let _ = state;
        Err(RestoreError::Unsupported { device_type: self.device_type() })
    }
}

/// What a device gets at `DRIVER_OK`.
pub struct Activation {
    /// The guest's memory.
    pub memory: GuestMemory,
    /// Every queue that the device has, in order; those that the driver did not enable are `None`.
    pub queues: Vec<Option<ActiveQueue>>,
    /// Feature bits that the driver accepted, a subset of the offered ones.
    pub acked_features: u64,
    /// How to tell the driver.
    pub interrupt: Interrupt,
}

/// A queue that was checked against guest memory and frozen at `DRIVER_OK`.
pub struct ActiveQueue {
    /// The split virtqueue.
    pub queue: Queue,
    /// Readable when the driver notified this queue (an ioeventfd).
    pub kick: EventFd,
    /// Where it is noted what the device may write.
    pub writes: WriteLog,
}

/// Why a device could not be activated. The transport then sets `DEVICE_NEEDS_RESET`.
#[derive(Debug, thiserror::Error)]
pub enum ActivateError {
    /// The driver left out a queue that the device cannot work without.
    #[error("Queue {0} is required but the driver did not enable it")]
    QueueMissing(usize),
    /// A descriptor or thread that the active half needs could not be made.
    #[error("Cannot set up the active half of the device")]
    Setup(#[source] io::Error),
}
