//! What is left of a device in a snapshot.

use serde::{Deserialize, Serialize};

use crate::virtio::mmio::QueueSetupError;

/// What a device has beside its queues and features, in a form of its own.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceState(Vec<u8>);

impl DeviceState {
    /// Of a device that remembers nothing.
    pub fn nothing() -> Self {
        Self::default()
    }

    /// Encodes a device's own type.
    pub fn encode<T: Serialize>(device_type: u32, state: &T) -> Result<Self, SaveError> {
        postcard::to_stdvec(state).map(Self).map_err(|source| SaveError::Encode { device_type, source })
    }

    /// Decodes a device's own type, which must take up all there is.
    pub fn decode<'a, T: Deserialize<'a>>(&'a self, device_type: u32) -> Result<T, RestoreError> {
        let failed = |source| RestoreError::Decode { device_type, source };
        match postcard::take_from_bytes(&self.0).map_err(failed)? {
            (state, []) => Ok(state),
            _ => Err(failed(postcard::Error::DeserializeBadEncoding)),
        }
    }

    /// Checks that the device remembered nothing.
    pub fn expect_nothing(&self, device_type: u32) -> Result<(), RestoreError> {
        self.decode::<()>(device_type)
    }
}

/// A device behind its transport.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TransportState {
    /// Device type (virtio 1.2 section 5).
    pub device_type: u32,
    /// The status register, without `DEVICE_NEEDS_RESET`.
    pub status: u32,
    /// Whether the device has given up on its driver.
    pub needs_reset: bool,
    /// DeviceFeaturesSel.
    pub device_features_sel: u32,
    /// DriverFeaturesSel.
    pub driver_features_sel: u32,
    /// Both words of DriverFeatures.
    pub driver_features: u64,
    /// QueueSel.
    pub queue_sel: u32,
    /// InterruptStatus.
    pub interrupt_status: u32,
    /// ConfigGeneration.
    pub config_generation: u32,
    /// The queues, in order.
    pub queues: Vec<QueueState>,
    /// The device's own state.
    pub device: DeviceState,
}

/// A queue as its driver has set it up, and how far the device has come with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueueState {
    /// QueueNum.
    pub size: u32,
    /// QueueReady.
    pub ready: bool,
    /// QueueDesc, guest physical.
    pub descriptors: u64,
    /// QueueDriver, guest physical.
    pub avail: u64,
    /// QueueDevice, guest physical.
    pub used: u64,
    /// The place in the available ring that the device looks at next.
    pub next_avail: u16,
    /// The place in the used ring that the device fills next.
    pub next_used: u16,
}

/// Why a device cannot be saved.
#[derive(Debug, thiserror::Error)]
pub enum SaveError {
    /// Its active half is at work.
    #[error("The virtio device of type {device_type} is not parked")]
    Active {
        /// Device type.
        device_type: u32,
    },
    /// It has state that lives outside this process, or was never taught to.
    #[error("The virtio device of type {device_type} cannot be saved")]
    Unsupported {
        /// Device type.
        device_type: u32,
    },
    /// The guest holds something of it that another process cannot be given.
    #[error("The {device} cannot be saved while {reason}")]
    Busy {
        /// Its name.
        device: String,
        /// What the guest holds.
        reason: &'static str,
    },
    /// Its state does not encode.
    #[error("The state of the virtio device of type {device_type} cannot be encoded")]
    Encode {
        /// Device type.
        device_type: u32,
        /// Why.
        #[source]
        source: postcard::Error,
    },
}

/// Why a device does not take a saved state.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// A device of another kind.
    #[error("The snapshot has a virtio device of type {saved} where the machine has one of type {present}")]
    DeviceType {
        /// In the snapshot.
        saved: u32,
        /// In the machine.
        present: u32,
    },
    /// It was never taught to.
    #[error("The virtio device of type {device_type} cannot be restored")]
    Unsupported {
        /// Device type.
        device_type: u32,
    },
    /// A status that no driver can have brought it to.
    #[error("The device status {0:#x} is not possible")]
    Status(u32),
    /// Features that this device does not have.
    #[error("The guest uses device features {0:#x}, which this device does not have")]
    Features(u64),
    /// Another number of queues.
    #[error("The device has {present} queues, the one in the snapshot has {saved}")]
    QueueCount {
        /// In the snapshot.
        saved: usize,
        /// In the machine.
        present: usize,
    },
    /// A queue that this device cannot work with.
    #[error("Queue {index} of the snapshot cannot be used")]
    Queue {
        /// Its index.
        index: usize,
        /// Why.
        #[source]
        source: QueueSetupError,
    },
    /// The device is in use.
    #[error("The virtio device of type {device_type} has a driver already")]
    InUse {
        /// Device type.
        device_type: u32,
    },
    /// The guest knows of sectors that the drive does not have.
    #[error("Drive {drive} has {present} sectors, the one in the snapshot has {saved}")]
    Capacity {
        /// The drive's name.
        drive: String,
        /// In the snapshot.
        saved: u64,
        /// In the machine.
        present: u64,
    },
    /// The guest knows of other pluggable memory.
    #[error("The pluggable memory has {present} {what}, the one in the snapshot has {saved}")]
    Pluggable {
        /// Of what.
        what: &'static str,
        /// In the snapshot.
        saved: u64,
        /// In the machine.
        present: u64,
    },
    /// The device's own state means nothing to it.
    #[error("The state of the virtio device of type {device_type} is malformed")]
    Decode {
        /// Device type.
        device_type: u32,
        /// Why.
        #[source]
        source: postcard::Error,
    },
}
