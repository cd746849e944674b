//! The block device as its transport sees it.

use std::fs::File;
use std::io;
use std::sync::Arc;

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_ID_BYTES,
};
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;
use vm_memory::{ByteValued, Le32, Le64};

use super::disk::Disk;
use super::request::RequestHandler;
use crate::Subscriber;
use crate::virtio::queue::{RING_FEATURES, VirtQueue};
use crate::virtio::worker::QueueWorker;
use crate::virtio::{ActivateError, Activation, DeviceState, RestoreError, SaveError, VirtioDevice, config_space};

/// Bytes of a sector, the unit of every position and length on the wire (section 5.2.4).
pub(super) const SECTOR_SIZE: u32 = 512;

/// One request queue.
const QUEUE_SIZE: u16 = 256;

/// Data segments of one request: a chain may be as long as the queue, and header and status take
/// a descriptor each (section 5.2.6.1).
const SEG_MAX: u32 = QUEUE_SIZE as u32 - 2;

/// The configuration space up to `blk_size` (section 5.2.4).
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct ConfigSpace {
    capacity: Le64,
    size_max: Le32,
    seg_max: Le32,
    geometry: Le32,
    blk_size: Le32,
}

// SAFETY: five integers without padding between or after them; any bytes are valid.
unsafe impl ByteValued for ConfigSpace {}

/// A drive for the guest.
#[derive(Debug)]
pub struct BlkConfig {
    /// The drive's name, for messages.
    pub id: String,
    /// A raw image file or a block device, open for reading, and for writing unless `read_only`.
    pub file: File,
    /// Whether the guest may only read.
    pub read_only: bool,
    /// What the guest reads as the drive's serial number; cut to 20 bytes.
    pub serial: String,
}

/// Why a drive cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum BlkError {
    /// The size of the file or device cannot be read.
    #[error("Cannot tell the size of drive {id}")]
    Size {
        /// The drive's name.
        id: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// There is not one whole sector.
    #[error("Drive {id} is smaller than a sector of 512 bytes")]
    Empty {
        /// The drive's name.
        id: String,
    },
}

/// The configuration half of a block device.
pub struct Blk {
    disk: Arc<Disk>,
    id: String,
    serial: [u8; VIRTIO_BLK_ID_BYTES as usize],
    config: ConfigSpace,
}

impl Blk {
    /// Makes the device. Its capacity is the size of the file at this moment in whole sectors.
    pub fn new(config: BlkConfig) -> Result<Self, BlkError> {
        let BlkConfig { id, file, read_only, serial } = config;
        let disk = match Disk::new(file, read_only) {
            Ok(disk) if disk.sectors() == 0 => return Err(BlkError::Empty { id }),
            Ok(disk) => Arc::new(disk),
            Err(source) => return Err(BlkError::Size { id, source }),
        };
        let mut serial_bytes = [0; VIRTIO_BLK_ID_BYTES as usize];
        for (target, source) in serial_bytes.iter_mut().zip(serial.bytes()) {
            *target = source;
        }
        let config = ConfigSpace {
            capacity: disk.sectors().into(),
            seg_max: SEG_MAX.into(),
            blk_size: SECTOR_SIZE.into(),
            ..ConfigSpace::default()
        };
        Ok(Self { disk, id, serial: serial_bytes, config })
    }

    /// The drive's name.
    pub fn id(&self) -> &str {
        &self.id
    }
}

impl VirtioDevice for Blk {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_BLOCK
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE]
    }

    fn features(&self) -> u64 {
        let read_only = if self.disk.read_only() { 1 << VIRTIO_BLK_F_RO } else { 0 };
        RING_FEATURES | 1 << VIRTIO_BLK_F_SEG_MAX | 1 << VIRTIO_BLK_F_BLK_SIZE | 1 << VIRTIO_BLK_F_FLUSH | read_only
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        config_space::read(self.config.as_slice(), offset, data);
    }

    fn activate(&mut self, activation: Activation) -> Result<Subscriber, ActivateError> {
        let Activation { memory, queues, acked_features, interrupt } = activation;
        let queue = queues.into_iter().flatten().next().ok_or(ActivateError::QueueMissing(0))?;
        let queue = VirtQueue::new(queue, &memory, acked_features);
        // A driver that does not flush expects completed writes to be stable (section 5.2.6.2).
        let write_through = acked_features & (1 << VIRTIO_BLK_F_FLUSH) == 0;
        let handler = RequestHandler::new(Arc::clone(&self.disk), self.serial, write_through);
        Ok(Box::new(QueueWorker::new("blk", queue, handler, interrupt)))
    }

    fn save(&self) -> Result<DeviceState, SaveError> {
        Ok(DeviceState::nothing())
    }

    fn restore(&mut self, state: &DeviceState) -> Result<(), RestoreError> {
        state.expect_nothing(VIRTIO_ID_BLOCK)
    }
}
