//! Device-to-driver notifications of the MMIO transport (virtio 1.2 section 4.2.3.4).

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use virtio_bindings::virtio_mmio::{VIRTIO_MMIO_INT_CONFIG, VIRTIO_MMIO_INT_VRING};
use vmm_sys_util::eventfd::EventFd;

use crate::virtio::complaints::Complaints;

/// The interrupt line of one device, shared by its transport and its active half.
///
/// The event descriptor is wired to the guest by whoever built the machine (a KVM irqfd).
#[derive(Clone)]
pub struct Interrupt {
    shared: Arc<Shared>,
}

struct Shared {
    /// InterruptStatus register.
    pending: AtomicU32,
    /// `DEVICE_NEEDS_RESET`: the one bit of the device status register that the device sets. It is
    /// apart from the others so that setting it cannot race with the driver's writes.
    reset_needed: AtomicBool,
    /// ConfigGeneration register.
    config_generation: AtomicU32,
    /// Somebody outside this process writes to the line.
    lent: AtomicBool,
    line: EventFd,
    complaints: Complaints,
}

impl Interrupt {
    /// An idle interrupt that is delivered by writing to `line`.
    pub fn new(line: EventFd) -> Self {
        Self {
            shared: Arc::new(Shared {
                pending: AtomicU32::new(0),
                reset_needed: AtomicBool::new(false),
                config_generation: AtomicU32::new(0),
                lent: AtomicBool::new(false),
                line,
                complaints: Complaints::default(),
            }),
        }
    }

    /// What the log is told about the driver.
    pub fn complaints(&self) -> &Complaints {
        &self.shared.complaints
    }

    /// The descriptor that carries the interrupt to the guest.
    pub fn line(&self) -> &EventFd {
        &self.shared.line
    }

    /// Lends the line to somebody who writes to it when used buffers were added, and does not tell of it here: until
    /// the next reset the driver is told to look at its queues at every interrupt.
    pub fn lend_line(&self) -> io::Result<EventFd> {
        let line = self.shared.line.try_clone()?;
        self.shared.lent.store(true, Ordering::Release);
        Ok(line)
    }

    /// Used buffers were added to a queue.
    pub fn used_buffers(&self) {
        self.raise(VIRTIO_MMIO_INT_VRING);
    }

    /// The configuration space changed.
    pub fn config_changed(&self) {
        self.shared.config_generation.fetch_add(1, Ordering::AcqRel);
        self.raise(VIRTIO_MMIO_INT_CONFIG);
    }

    /// The driver did something that the device cannot go on after (section 2.1.2).
    pub fn needs_reset(&self) {
        self.shared.reset_needed.store(true, Ordering::Release);
        self.config_changed();
    }

    /// InterruptStatus register.
    pub fn pending(&self) -> u32 {
        let lent = if self.shared.lent.load(Ordering::Acquire) { VIRTIO_MMIO_INT_VRING } else { 0 };
        self.shared.pending.load(Ordering::Acquire) | lent
    }

    /// InterruptACK register: the bits in `acked` are no longer pending.
    pub fn acknowledge(&self, acked: u32) {
        self.shared.pending.fetch_and(!acked, Ordering::AcqRel);
    }

    /// Whether `DEVICE_NEEDS_RESET` is set.
    pub fn reset_needed(&self) -> bool {
        self.shared.reset_needed.load(Ordering::Acquire)
    }

    /// Forgets what is pending, as a device reset does.
    pub fn reset(&self) {
        self.shared.pending.store(0, Ordering::Release);
        self.shared.lent.store(false, Ordering::Release);
        self.shared.reset_needed.store(false, Ordering::Release);
    }

    /// Takes over what was saved. Nothing is raised.
    pub fn restore(&self, pending: u32, reset_needed: bool, config_generation: u32) {
        self.shared.pending.store(pending, Ordering::Release);
        self.shared.reset_needed.store(reset_needed, Ordering::Release);
        self.shared.config_generation.store(config_generation, Ordering::Release);
    }

    /// ConfigGeneration register.
    pub fn config_generation(&self) -> u32 {
        self.shared.config_generation.load(Ordering::Acquire)
    }

    fn raise(&self, cause: u32) {
        self.shared.pending.fetch_or(cause, Ordering::AcqRel);
        // A full counter means that an interrupt is already on its way.
        let _ = self.shared.line.write(1);
    }
}
