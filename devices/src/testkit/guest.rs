//! A machine with one device, and the driver that brings it up.

use std::sync::Arc;

use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_mmio::*;
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::{HIGH_REGION, Ring, ThreadLoop, eventually, memory};
use crate::virtio::{Interrupt, MmioTransport, VirtioDevice, WriteLog};
use crate::{BusDevice, GuestMemory};

/// Status values on the way up (virtio 1.2 section 3.1.1).
const ACKNOWLEDGE: u32 = 1;
const DRIVER: u32 = 3;
const FEATURES_OK: u32 = 0xb;
const DRIVER_OK: u32 = 0xf;
const NEEDS_RESET: u32 = 0x40;

/// Where rings are put; the rest of the region below them is for buffers.
const RINGS: u64 = HIGH_REGION;

/// A machine with one device that the driver has not touched yet.
pub struct Guest {
    /// The transport under test. Dropped before the loop that its active half runs on.
    pub transport: Arc<MmioTransport>,
    /// The machine's memory; see [`super::memory`].
    pub memory: GuestMemory,
    /// The thread that the active half runs in.
    pub event_loop: Arc<ThreadLoop>,
    line: EventFd,
}

/// A device that works, and its rings.
pub struct Running {
    /// The machine.
    pub guest: Guest,
    /// One ring for each queue.
    pub rings: Vec<Ring>,
}

impl Guest {
    /// A machine with `device`.
    pub fn new(device: Box<dyn VirtioDevice>) -> Self {
        Self::with_memory(device, memory())
    }

    /// A machine with `device` and a memory that is there already.
    pub fn with_memory(device: Box<dyn VirtioDevice>, memory: GuestMemory) -> Self {
        Self::logging(device, memory, WriteLog::default())
    }

    /// The same, with `writes` for what the device writes.
    pub fn logging(device: Box<dyn VirtioDevice>, memory: GuestMemory, writes: WriteLog) -> Self {
        Self::assemble(device, memory, Arc::new(ThreadLoop::start()), writes)
    }

    /// A machine whose device shares its event loop with those of others.
    pub fn on_loop(device: Box<dyn VirtioDevice>, memory: GuestMemory, event_loop: Arc<ThreadLoop>) -> Self {
        Self::assemble(device, memory, event_loop, WriteLog::default())
    }

    fn assemble(
        device: Box<dyn VirtioDevice>,
        memory: GuestMemory,
        event_loop: Arc<ThreadLoop>,
        writes: WriteLog,
    ) -> Self {
        let line = EventFd::new(EFD_NONBLOCK).unwrap();
        let interrupt = Interrupt::new(line.try_clone().unwrap());
        let transport = MmioTransport::new(device, memory.clone(), event_loop.clone(), interrupt).unwrap();
        Self { transport: Arc::new(transport.noting(writes)), memory, event_loop, line }
    }

    /// Reads a 32-bit register.
    pub fn read(&self, register: u32) -> u32 {
        let mut data = [0; 4];
        self.transport.read(register.into(), &mut data);
        u32::from_le_bytes(data)
    }

    /// Writes a 32-bit register.
    pub fn write(&self, register: u32, value: u32) {
        self.transport.write(register.into(), &value.to_le_bytes());
    }

    /// Reads bytes of the device configuration space.
    pub fn read_config<const N: usize>(&self, offset: u32) -> [u8; N] {
        let mut data = [0; N];
        self.transport.read((VIRTIO_MMIO_CONFIG + offset).into(), &mut data);
        data
    }

    /// Writes bytes at any offset of the device's window, in one access.
    pub fn transport_write(&self, offset: u64, data: &[u8]) {
        self.transport.write(offset, data);
    }

    /// The status register.
    pub fn status(&self) -> u32 {
        self.read(VIRTIO_MMIO_STATUS)
    }

    /// Writes the status register and returns what it became.
    pub fn set_status(&self, status: u32) -> u32 {
        self.write(VIRTIO_MMIO_STATUS, status);
        self.status()
    }

    /// Feature bits that the device offers.
    pub fn offered_features(&self) -> u64 {
        let word = |select| {
            self.write(VIRTIO_MMIO_DEVICE_FEATURES_SEL, select);
            u64::from(self.read(VIRTIO_MMIO_DEVICE_FEATURES))
        };
        word(0) | word(1) << 32
    }

    /// Writes the driver's choice of features.
    pub fn accept_features(&self, features: u64) {
        for select in 0..2 {
            self.write(VIRTIO_MMIO_DRIVER_FEATURES_SEL, select);
            self.write(VIRTIO_MMIO_DRIVER_FEATURES, (features >> (32 * select)) as u32);
        }
    }

    /// Goes up to FEATURES_OK with the given device features; true when the device agrees.
    pub fn negotiate(&self, features: u64) -> bool {
        self.set_status(ACKNOWLEDGE);
        self.set_status(DRIVER);
        self.accept_features(features | 1 << VIRTIO_F_VERSION_1);
        self.set_status(FEATURES_OK) == FEATURES_OK
    }

    /// Where a test's ring for queue `index` is.
    pub fn ring(&self, index: u32, size: u16) -> Ring {
        Ring::new(&self.memory, RINGS + u64::from(index) * Ring::FOOTPRINT, size)
    }

    /// Describes `ring` to the device as queue `index` and marks it ready.
    pub fn set_up_queue(&self, index: u32, ring: &Ring) {
        self.write(VIRTIO_MMIO_QUEUE_SEL, index);
        self.write(VIRTIO_MMIO_QUEUE_NUM, ring.size.into());
        for (low, address) in [
            (VIRTIO_MMIO_QUEUE_DESC_LOW, ring.descriptors),
            (VIRTIO_MMIO_QUEUE_AVAIL_LOW, ring.avail),
            (VIRTIO_MMIO_QUEUE_USED_LOW, ring.used),
        ] {
            self.write(low, address as u32);
            self.write(low + 4, (address >> 32) as u32);
        }
        self.write(VIRTIO_MMIO_QUEUE_READY, 1);
    }

    /// Brings the device up with the given features and every queue at its largest size.
    pub fn start(self, features: u64) -> Running {
        self.start_with(features, |_, _| {})
    }

    /// Like [`start`](Self::start); `prepare` may fill the rings before DRIVER_OK.
    pub fn start_with(self, features: u64, prepare: impl FnOnce(&Self, &mut Vec<Ring>)) -> Running {
        let running = self.bring_up(features, prepare);
        assert_eq!(running.guest.status(), DRIVER_OK, "The device is active");
        running
    }

    /// Like [`start_with`](Self::start_with), for rings that may make the device give up at once.
    pub fn bring_up(self, features: u64, prepare: impl FnOnce(&Self, &mut Vec<Ring>)) -> Running {
        self.bring_up_some(features, |_| true, prepare)
    }

    /// Like [`start`](Self::start) with some queues left out; there is a ring for each all the same.
    pub fn start_queues(self, features: u64, enabled: &[u32]) -> Running {
        let running = self.bring_up_queues(features, enabled);
        assert_eq!(running.guest.status(), DRIVER_OK, "The device is active");
        running
    }

    /// Like [`start_queues`](Self::start_queues), for a choice that the device may not work with.
    pub fn bring_up_queues(self, features: u64, enabled: &[u32]) -> Running {
        self.bring_up_some(features, |index| enabled.contains(&index), |_, _| {})
    }

    fn bring_up_some(
        self,
        features: u64,
        enabled: impl Fn(u32) -> bool,
        prepare: impl FnOnce(&Self, &mut Vec<Ring>),
    ) -> Running {
        assert!(self.negotiate(features), "The device takes the features");
        let mut rings = Vec::new();
        for index in 0.. {
            self.write(VIRTIO_MMIO_QUEUE_SEL, index);
            let max_size = self.read(VIRTIO_MMIO_QUEUE_NUM_MAX);
            if max_size == 0 {
                break;
            }
            let ring = self.ring(index, u16::try_from(max_size).unwrap());
            if enabled(index) {
                self.set_up_queue(index, &ring);
            }
            rings.push(ring);
        }
        prepare(&self, &mut rings);
        self.set_status(DRIVER_OK);
        Running { guest: self, rings }
    }

    /// Notifies queue `index`.
    pub fn kick(&self, index: u32) {
        self.write(VIRTIO_MMIO_QUEUE_NOTIFY, index);
    }

    /// Takes a pending interrupt: its causes, 0 when there was none.
    pub fn take_interrupt(&self) -> u32 {
        if self.line.read().is_err() {
            return 0;
        }
        let causes = self.read(VIRTIO_MMIO_INTERRUPT_STATUS);
        self.write(VIRTIO_MMIO_INTERRUPT_ACK, causes);
        causes
    }

    /// Waits for an interrupt with one of `causes`.
    pub fn wait_interrupt(&self, causes: u32) {
        eventually("An interrupt", || self.take_interrupt() & causes != 0);
    }

    /// Waits until the device gave up on its driver.
    pub fn wait_needs_reset(&self) {
        eventually("DEVICE_NEEDS_RESET", || self.status() & NEEDS_RESET != 0);
        self.wait_interrupt(VIRTIO_MMIO_INT_CONFIG);
    }

    /// Writes bytes to guest memory.
    pub fn poke(&self, addr: u64, bytes: &[u8]) {
        self.memory.write_slice(bytes, GuestAddress(addr)).unwrap();
    }

    /// Reads bytes from guest memory.
    pub fn peek(&self, addr: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.memory.read_slice(&mut bytes, GuestAddress(addr)).unwrap();
        bytes
    }
}

impl Running {
    /// Saves the device, and goes on with `device` in another machine that has this one's memory.
    pub fn move_to(self, device: Box<dyn VirtioDevice>) -> Self {
        let Self { guest, rings } = self;
        guest.transport.park();
        let state = guest.transport.save().expect("A device that can be saved");
        let moved = Guest::with_memory(device, guest.memory.clone());
        moved.transport.restore(&state).expect("A device that takes the state");
        moved.transport.unpark();
        Self { guest: moved, rings }
    }

    /// Waits until queue `index` has `count` more used entries and returns them.
    pub fn wait_used(&mut self, index: usize, count: usize) -> Vec<(u16, u32)> {
        let ring = &mut self.rings[index];
        let mut entries = Vec::new();
        eventually("Used buffers", || {
            entries.extend(ring.take_used());
            entries.len() >= count
        });
        entries
    }
}
