//! The virtio-MMIO transport, version 2 (virtio 1.2 section 4.2).
//!
//! A machine makes one [`MmioTransport`] per device, puts it on its bus behind a window of
//! [`WINDOW_SIZE`] bytes, wires each of its [`kicks`](MmioTransport::kicks) as an ioeventfd on
//! [`QUEUE_NOTIFY`] with the queue's index as datamatch (32 bits), and the line of its
//! [`interrupt`](MmioTransport::interrupt) as an irqfd (edge-triggered).

mod queue_setup;
mod registers;
mod replace;
mod snapshot;
mod status;
#[cfg(test)]
mod tests;

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use event_manager::SubscriberId;
use libc::EFD_CLOEXEC;
use tracing::{debug, error};
use virtio_bindings::virtio_config::VIRTIO_CONFIG_S_NEEDS_RESET;
use virtio_bindings::virtio_mmio::*;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::virtio::{ActivateError, Activation, ActiveQueue, Interrupt, VirtioDevice, WriteLog};
use crate::{BusDevice, EventLoop, GuestMemory};
pub use queue_setup::QueueSetupError;
use registers::Registers;
pub use replace::ReplaceError;
use status::{Phase, Status, Transition};

/// Bytes of guest physical address space that a device takes.
pub const WINDOW_SIZE: u64 = 0x1000;

/// Offset of the QueueNotify register: where ioeventfds belong.
pub const QUEUE_NOTIFY: u64 = VIRTIO_MMIO_QUEUE_NOTIFY as u64;

/// MagicValue register: "virt".
const MAGIC: u32 = 0x7472_6976;
/// Version register: not the legacy interface.
const VERSION: u32 = 2;
/// VendorID register: "INLA".
const VENDOR: u32 = 0x414c_4e49;
/// SHMLen and SHMBase when there is no such region (section 4.2.2.1).
const NO_SHARED_MEMORY: u32 = u32::MAX;
/// Offset of the device configuration space.
const CONFIG: u64 = VIRTIO_MMIO_CONFIG as u64;

/// A virtio device on the memory bus.
pub struct MmioTransport {
    device_type: u32,
    interrupt: Interrupt,
    kicks: Vec<EventFd>,
    memory: GuestMemory,
    writes: WriteLog,
    event_loop: Arc<dyn EventLoop>,
    /// Never taken by an active half: a vCPU holds it while it waits for the event loop.
    registers: Mutex<Registers>,
}

/// Why a device does not work with the queues that its driver has set up.
#[derive(Debug, thiserror::Error)]
pub enum DriverOkError {
    /// A queue is not what the specification says.
    #[error("Queue {index} cannot be used")]
    Queue {
        /// Which.
        index: usize,
        /// Why.
        #[source]
        source: QueueSetupError,
    },
    /// There are too many descriptors.
    #[error("The notification descriptor of a queue cannot be duplicated")]
    Kick(#[source] io::Error),
    /// The device says no.
    #[error("The device cannot be activated")]
    Device(#[source] ActivateError),
    /// The event loop has ended.
    #[error("The event loop does not take the device")]
    EventLoop(#[source] event_manager::Error),
}

impl MmioTransport {
    /// Puts `device` behind a transport. Its active half will run on `event_loop`.
    ///
    /// Fails when no event descriptor can be made for a queue.
    pub fn new(
        device: Box<dyn VirtioDevice>,
        memory: GuestMemory,
        event_loop: Arc<dyn EventLoop>,
        interrupt: Interrupt,
    ) -> io::Result<Self> {
        let device_type = device.device_type();
        let registers = Registers::new(device);
        let kicks =
            registers.queues.iter().map(|_| EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)).collect::<io::Result<_>>()?;
        let registers = Mutex::new(registers);
        Ok(Self { device_type, interrupt, kicks, memory, writes: WriteLog::default(), event_loop, registers })
    }

    /// Has it noted in `writes` what the device writes to guest memory.
    pub fn noting(self, writes: WriteLog) -> Self {
        Self { writes, ..self }
    }

    /// Whether all that is written on the device's behalf is noted: see [`VirtioDevice::writes_are_known`].
    pub fn writes_are_known(&self) -> bool {
        self.lock().device.writes_are_known()
    }

    /// Whether the device takes pages of guest memory away: see [`VirtioDevice::discards_memory`].
    pub fn discards_memory(&self) -> bool {
        self.lock().device.discards_memory()
    }

    /// Device type (section 5), such as 2 for a block device.
    pub fn device_type(&self) -> u32 {
        self.device_type
    }

    /// Largest size of each queue.
    pub fn queue_max_sizes(&self) -> Vec<u16> {
        self.lock().device.queue_max_sizes().to_vec()
    }

    /// One notification descriptor for each queue, in order. Non-blocking.
    pub fn kicks(&self) -> &[EventFd] {
        &self.kicks
    }

    /// How the device interrupts the guest.
    pub fn interrupt(&self) -> &Interrupt {
        &self.interrupt
    }

    /// Resets the device, as a driver does by writing 0 to the status register: when this returns
    /// its active half is gone and nothing touches guest memory on its behalf any more.
    ///
    /// Must not be called from the event loop's thread.
    pub fn reset(&self) {
        self.reset_locked(&mut self.lock());
    }

    fn lock(&self) -> MutexGuard<'_, Registers> {
        // A panic elsewhere must not become one here; registers have no invariant that a panic
        // half-way could break for anyone but the guest.
        self.registers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn read_register(&self, offset: u32) -> u32 {
        match offset {
            VIRTIO_MMIO_MAGIC_VALUE => MAGIC,
            VIRTIO_MMIO_VERSION => VERSION,
            VIRTIO_MMIO_DEVICE_ID => self.device_type,
            VIRTIO_MMIO_VENDOR_ID => VENDOR,
            // Read on each interrupt: no lock.
            VIRTIO_MMIO_INTERRUPT_STATUS => self.interrupt.pending(),
            VIRTIO_MMIO_CONFIG_GENERATION => self.interrupt.config_generation(),
            VIRTIO_MMIO_STATUS => self.status(),
            VIRTIO_MMIO_SHM_LEN_LOW
            | VIRTIO_MMIO_SHM_LEN_HIGH
            | VIRTIO_MMIO_SHM_BASE_LOW
            | VIRTIO_MMIO_SHM_BASE_HIGH => NO_SHARED_MEMORY,
            VIRTIO_MMIO_DEVICE_FEATURES => self.lock().device_features(),
            VIRTIO_MMIO_QUEUE_NUM_MAX => self.lock().selected_queue().map_or(0, |queue| u32::from(queue.max_size)),
            VIRTIO_MMIO_QUEUE_READY => self.lock().selected_queue().map_or(0, |queue| u32::from(queue.ready)),
            _ => 0,
        }
    }

    fn write_register(&self, offset: u32, value: u32) {
        match offset {
            VIRTIO_MMIO_QUEUE_NOTIFY => self.notify(value),
            VIRTIO_MMIO_INTERRUPT_ACK => self.interrupt.acknowledge(value),
            VIRTIO_MMIO_STATUS => self.write_status(value),
            VIRTIO_MMIO_DEVICE_FEATURES_SEL => self.lock().device_features_sel = value,
            VIRTIO_MMIO_DRIVER_FEATURES_SEL => self.lock().driver_features_sel = value,
            VIRTIO_MMIO_DRIVER_FEATURES => self.lock().accept_features(value),
            VIRTIO_MMIO_QUEUE_SEL => self.lock().queue_sel = value,
            _ => self.lock().write_queue_register(offset, value),
        }
    }

    /// A notification that came as an exit, where no ioeventfd is wired.
    fn notify(&self, queue: u32) {
        if let Some(kick) = usize::try_from(queue).ok().and_then(|index| self.kicks.get(index)) {
            // A full counter means that the notification is already on its way.
            let _ = kick.write(1);
        }
    }

    fn status(&self) -> u32 {
        let needs_reset = if self.interrupt.reset_needed() { VIRTIO_CONFIG_S_NEEDS_RESET } else { 0 };
        self.lock().status.bits() | needs_reset
    }

    fn write_status(&self, value: u32) {
        let mut registers = self.lock();
        match registers.status.transition(value) {
            Transition::Reset => self.reset_locked(&mut registers),
            Transition::Fail => {
                self.deactivate(&mut registers);
                registers.parked = false;
                registers.status = registers.status.failed();
            }
            // The driver reads the register back to learn whether its choice is accepted.
            Transition::Advance(Phase::FeaturesOk) if !registers.features_acceptable() => {
                debug!(
                    device = self.device_type,
                    features = registers.driver_features,
                    "The driver's choice of features is not acceptable"
                );
            }
            Transition::Advance(phase) => {
                registers.status = Status::at(phase);
                if phase == Phase::DriverOk {
                    self.activate(&mut registers);
                }
            }
            Transition::None => {
                debug!(device = self.device_type, value, "A status write means nothing");
            }
        }
    }

    fn activate(&self, registers: &mut Registers) {
        if registers.held {
            registers.parked = true;
            return;
        }
        match self.try_activate(registers) {
            Ok(id) => registers.active = Some(id),
            Err(reason) => {
                self.interrupt.complaints().tell(self.device_type, &reason, "The device is not activated");
                self.interrupt.needs_reset();
            }
        }
    }

    fn try_activate(&self, registers: &mut Registers) -> Result<SubscriberId, DriverOkError> {
        let mut queues = Vec::with_capacity(registers.queues.len());
        for (index, (setup, kick)) in registers.queues.iter().zip(&self.kicks).enumerate() {
            if !setup.ready {
                queues.push(None);
                continue;
            }
            let queue = setup.build(&self.memory).map_err(|source| DriverOkError::Queue { index, source })?;
            let kick = kick.try_clone().map_err(DriverOkError::Kick)?;
            queues.push(Some(ActiveQueue { queue, kick, writes: self.writes.clone() }));
        }
        let activation = Activation {
            memory: self.memory.clone(),
            queues,
            // A device that took the place of another may know fewer.
            acked_features: registers.driver_features & registers.offered_features(),
            interrupt: self.interrupt.clone(),
        };
        let active = registers.device.activate(activation).map_err(DriverOkError::Device)?;
        self.event_loop.add(active).map_err(DriverOkError::EventLoop)
    }

    /// Takes the active half out of its loop and drops it.
    fn deactivate(&self, registers: &mut Registers) {
        let Some(id) = registers.active.take() else { return };
        if let Err(reason) = self.event_loop.remove(id) {
            // Only when the loop has ended, and then nothing runs on it.
            error!(device = self.device_type, %reason, "The event loop does not give up the device");
        }
    }

    fn reset_locked(&self, registers: &mut Registers) {
        self.deactivate(registers);
        registers.reset();
        self.interrupt.reset();
        for kick in &self.kicks {
            // Not readable is what is wanted.
            let _ = kick.read();
        }
    }
}

impl BusDevice for MmioTransport {
    fn read(&self, offset: u64, data: &mut [u8]) {
        match Access::of(offset, data.len()) {
            Access::Register(register) => {
                data.copy_from_slice(&self.read_register(register).to_le_bytes());
            }
            Access::Config(offset) => self.lock().device.read_config(offset, data),
            Access::Undefined => {}
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        match Access::of(offset, data.len()) {
            Access::Register(register) => {
                if let Ok(value) = data.try_into() {
                    self.write_register(register, u32::from_le_bytes(value));
                }
            }
            Access::Config(offset) => {
                let mut registers = self.lock();
                // Not before a driver is there, and not after it gave up (section 3.1.1).
                if registers.status.has_driver() {
                    registers.device.write_config(offset, data);
                }
            }
            Access::Undefined => {}
        }
    }
}

/// What an access means (section 4.2.2.2: registers are 32 bits wide and aligned).
enum Access {
    Register(u32),
    /// Offset in the device configuration space.
    Config(u64),
    Undefined,
}

impl Access {
    fn of(offset: u64, width: usize) -> Self {
        if let Some(offset) = offset.checked_sub(CONFIG) {
            return match width {
                1 | 2 | 4 | 8 => Self::Config(offset),
                _ => Self::Undefined,
            };
        }
        match u32::try_from(offset) {
            Ok(register) if width == 4 && register.is_multiple_of(4) => Self::Register(register),
            _ => Self::Undefined,
        }
    }
}
