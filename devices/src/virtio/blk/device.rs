//! The block device as its transport sees it.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use seccomp::Confinement;
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_MQ,
    VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_TOPOLOGY, VIRTIO_BLK_F_WRITE_ZEROES, VIRTIO_BLK_ID_BYTES,
};
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;
use vm_memory::ByteValued;

use super::config::{
    BlkConfig, BlkError, BlkErrorKind, ConfigSpace, EngineKind, MAX_BLOCK_SIZE, MAX_DISCARD_SECTORS,
    MAX_DISCARD_SEGMENTS, MAX_WRITE_ZEROES_SECTORS, MAX_WRITE_ZEROES_SEGMENTS, SECTOR_SIZE, WRITEBACK_OFFSET,
};
use super::engine::{self, SharedEngine};
use super::image::Disk;
use super::metrics::BlkMetrics;
use super::request::Requests;
use super::state::BlkState;
use super::worker::Worker;
use crate::Subscriber;
use crate::virtio::queue::RING_FEATURES;
use crate::virtio::rate_limiter::{Budget, RateLimiter};
use crate::virtio::{
    ActivateError, Activation, DeviceState, Interrupt, RestoreError, SaveError, VirtioDevice, config_space,
};

/// The configuration half of a block device.
pub struct Blk {
    id: String,
    disk: Arc<Disk>,
    engine: SharedEngine,
    metrics: BlkMetrics,
    serial: [u8; VIRTIO_BLK_ID_BYTES as usize],
    queue_sizes: Vec<u16>,
    config: ConfigSpace,
    /// What the guest may still do: a driver's reset does not give it more.
    budget: Option<Arc<Mutex<Budget>>>,
    /// Whether completed writes need a flush to be stable. The driver can change it.
    writeback: Arc<AtomicBool>,
    active: Arc<Mutex<Option<Interrupt>>>,
}

/// What the host does with a drive while a guest has it. Usable from any thread.
#[derive(Clone)]
pub struct BlkControl {
    disk: Arc<Disk>,
    active: Arc<Mutex<Option<Interrupt>>>,
}

impl BlkControl {
    /// Takes the size of the image as it is now for the capacity, and tells the driver. Returns
    /// the capacity in bytes.
    ///
    /// What the guest has under way beyond a smaller capacity fails.
    pub fn refresh_capacity(&self) -> io::Result<u64> {
        let sectors = self.disk.refresh()?;
        if let Some(interrupt) = &*self.active.lock().unwrap_or_else(PoisonError::into_inner) {
            interrupt.config_changed();
        }
        Ok(sectors.saturating_mul(SECTOR_SIZE.into()))
    }
}

impl Blk {
    /// Makes the device, its engine included. Its capacity is the size of the image at this
    /// moment in whole sectors. `confinement` is for the engine's threads.
    pub fn new(config: BlkConfig, confinement: Confinement) -> Result<Self, BlkError> {
        let id = config.id.clone();
        Self::build(config, confinement).map_err(|kind| BlkError { id, kind })
    }

    fn build(config: BlkConfig, confinement: Confinement) -> Result<Self, BlkErrorKind> {
        config.check()?;
        let disk = Arc::new(Disk::open(config.file, config.format, config.read_only, config.direct)?);
        let needed = disk.granularity();
        let block = config.logical_block_size.unwrap_or(needed);
        if block < needed {
            return Err(BlkErrorKind::DirectBlockSize { wanted: block, needed });
        }
        if disk.sectors() < u64::from(block / SECTOR_SIZE) {
            return Err(BlkErrorKind::Empty(block));
        }
        if config.engine == EngineKind::IoUring && disk.file().is_none() {
            return Err(BlkErrorKind::EngineFormat);
        }
        let engine = engine::new(config.engine, &disk, confinement)
            .map_err(|source| BlkErrorKind::Engine(config.engine, source))?;
        let mut serial = [0; VIRTIO_BLK_ID_BYTES as usize];
        for (target, source) in serial.iter_mut().zip(config.serial.bytes()) {
            *target = source;
        }
        let limits = config.limits;
        let budget = (!limits.is_unlimited()).then(|| Arc::new(Mutex::new(Budget::new(limits, Instant::now()))));
        Ok(Self {
            id: config.id,
            config: config_space(config.queues, config.queue_size, block),
            queue_sizes: vec![config.queue_size; config.queues.into()],
            engine,
            metrics: config.metrics,
            budget,
            serial,
            writeback: Arc::new(AtomicBool::new(true)),
            active: Arc::default(),
            disk,
        })
    }

    /// The drive's name.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// A handle on the drive that outlives giving the device to its transport.
    pub fn control(&self) -> BlkControl {
        BlkControl { disk: Arc::clone(&self.disk), active: Arc::clone(&self.active) }
    }

    fn set_active(&self, interrupt: Option<Interrupt>) {
        *self.active.lock().unwrap_or_else(PoisonError::into_inner) = interrupt;
    }
}

/// The configuration space, without what changes.
fn config_space(queues: u16, queue_size: u16, block: u32) -> ConfigSpace {
    // The kernel of the host works in pages whatever the block is.
    let physical_block_exp = MAX_BLOCK_SIZE.ilog2().saturating_sub(block.ilog2());
    let blocks_per_page = MAX_BLOCK_SIZE >> block.ilog2();
    ConfigSpace {
        // A chain may be as long as the queue, and header and status take a descriptor each
        // (section 5.2.6.1).
        seg_max: u32::from(queue_size).saturating_sub(2).into(),
        blk_size: block.into(),
        physical_block_exp: u8::try_from(physical_block_exp).unwrap_or_default(),
        min_io_size: u16::try_from(blocks_per_page).unwrap_or(1).into(),
        num_queues: queues.into(),
        max_discard_sectors: MAX_DISCARD_SECTORS.into(),
        max_discard_seg: MAX_DISCARD_SEGMENTS.into(),
        discard_sector_alignment: (MAX_BLOCK_SIZE / SECTOR_SIZE).into(),
        max_write_zeroes_sectors: MAX_WRITE_ZEROES_SECTORS.into(),
        max_write_zeroes_seg: MAX_WRITE_ZEROES_SEGMENTS.into(),
        write_zeroes_may_unmap: 1,
        ..ConfigSpace::default()
    }
}

impl VirtioDevice for Blk {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_BLOCK
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn features(&self) -> u64 {
        let access = if self.disk.read_only() {
            1 << VIRTIO_BLK_F_RO
        } else {
            1 << VIRTIO_BLK_F_DISCARD | 1 << VIRTIO_BLK_F_WRITE_ZEROES
        };
        RING_FEATURES
            | 1 << VIRTIO_BLK_F_SEG_MAX
            | 1 << VIRTIO_BLK_F_BLK_SIZE
            | 1 << VIRTIO_BLK_F_FLUSH
            | 1 << VIRTIO_BLK_F_TOPOLOGY
            | 1 << VIRTIO_BLK_F_CONFIG_WCE
            | 1 << VIRTIO_BLK_F_MQ
            | access
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let writeback = u8::from(self.writeback.load(Ordering::Acquire));
        let config = ConfigSpace { capacity: self.disk.sectors().into(), writeback, ..self.config };
        config_space::read(config.as_slice(), offset, data);
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        // Nothing else is the driver's to write (section 5.2.5.1).
        if let (WRITEBACK_OFFSET, [value @ (0 | 1)]) = (offset, data) {
            self.writeback.store(*value == 1, Ordering::Release);
        }
    }

    fn activate(&mut self, activation: Activation) -> Result<Subscriber, ActivateError> {
        if activation.queues.first().is_none_or(Option::is_none) {
            return Err(ActivateError::QueueMissing(0));
        }
        let features = activation.acked_features;
        let accepted = |feature: u32| features & (1 << feature) != 0;
        // A driver that does not flush expects completed writes to be stable, and one that cannot
        // choose gets what it can flush (section 5.2.5.2).
        if !accepted(VIRTIO_BLK_F_CONFIG_WCE) || !accepted(VIRTIO_BLK_F_FLUSH) {
            self.writeback.store(accepted(VIRTIO_BLK_F_FLUSH), Ordering::Release);
        }
        let limiter = self.budget.clone().map(RateLimiter::new).transpose().map_err(ActivateError::Setup)?;
        let requests = Requests::new(Arc::clone(&self.disk), self.serial, Arc::clone(&self.writeback), features);
        let interrupt = activation.interrupt.clone();
        let worker = Worker::new(activation, requests, Arc::clone(&self.engine), self.metrics.clone(), limiter);
        self.set_active(Some(interrupt));
        Ok(Box::new(worker))
    }

    fn reset(&mut self) {
        self.set_active(None);
        self.writeback.store(true, Ordering::Release);
    }
    fn save(&self) -> Result<DeviceState, SaveError> {
        let state = BlkState { writeback: self.writeback.load(Ordering::Acquire), sectors: self.disk.sectors() };
        DeviceState::encode(VIRTIO_ID_BLOCK, &state)
    }

    fn restore(&mut self, state: &DeviceState) -> Result<(), RestoreError> {
        let BlkState { writeback, sectors: saved } = state.decode(VIRTIO_ID_BLOCK)?;
        let present = self.disk.sectors();
        if present < saved {
            return Err(RestoreError::Capacity { drive: self.id.clone(), saved, present });
        }
        self.writeback.store(writeback, Ordering::Release);
        Ok(())
    }
}
