//! Another device behind the same registers.

use std::mem;

use tracing::error;
use virtio_bindings::virtio_config::{VIRTIO_F_VERSION_1, VIRTIO_TRANSPORT_F_END, VIRTIO_TRANSPORT_F_START};

use super::registers::Registers;
use super::{DriverOkError, MmioTransport};
use crate::virtio::VirtioDevice;

/// Feature bits that say how queues look in memory (virtio 1.2 section 6). All others say what requests a device takes, and a
/// device says for itself that it does not take one.
const RING_FEATURE_BITS: u64 = (1 << VIRTIO_TRANSPORT_F_END) - (1 << VIRTIO_TRANSPORT_F_START);

/// Why a device cannot take the place of another. The other is still there.
#[derive(Debug, thiserror::Error)]
pub enum ReplaceError {
    /// The driver is one for devices of another kind.
    #[error("A device of type {new} cannot stand for one of type {old}")]
    Type {
        /// What is there.
        old: u32,
        /// What should be.
        new: u32,
    },
    /// The driver has found other queues.
    #[error("A device with queues of {new:?} entries cannot stand for one with queues of {old:?}")]
    Queues {
        /// What is there.
        old: Vec<u16>,
        /// What should be.
        new: Vec<u16>,
    },
    /// The driver uses queues in a way that the device does not know.
    #[error("The device does not offer the ring features {0:#x}, which the driver uses")]
    RingFeatures(u64),
    /// The event loop has ended, and with it all devices.
    #[error("The event loop does not give up the device")]
    EventLoop(#[source] event_manager::Error),
    /// The device does not work.
    #[error(transparent)]
    Activate(#[from] DriverOkError),
}

impl MmioTransport {
    /// Puts `device` in the place of the one behind these registers and tells the driver that the configuration has changed. What
    /// the old device had begun is finished; what it had not is for the new one. The driver keeps the features that it has
    /// negotiated, as far as the new device knows them.
    ///
    /// Must not be called from the event loop's thread.
    pub fn replace(&self, device: Box<dyn VirtioDevice>) -> Result<(), ReplaceError> {
        let mut registers = self.lock();
        fits(&registers, &*device)?;
        let active = registers.active.is_some();
        if active {
            self.take_queues(&mut registers)?;
        }
        let mut old = mem::replace(&mut registers.device, device);
        old.reset();
        if active && let Err(reason) = self.resume(&mut registers) {
            registers.device = old;
            if let Err(error) = self.resume(&mut registers) {
                let error = &error as &dyn std::error::Error;
                error!(device = self.device_type, error, "The old device does not work any more either");
                self.interrupt.needs_reset();
            }
            return Err(reason.into());
        }
        if registers.status.has_driver() {
            self.interrupt.config_changed();
        }
        Ok(())
    }

    /// Parks the active half and keeps where it has come to in its queues.
    fn take_queues(&self, registers: &mut Registers) -> Result<(), ReplaceError> {
        let Some(id) = registers.active.take() else { return Ok(()) };
        let active = self.event_loop.remove(id).map_err(ReplaceError::EventLoop)?;
        registers.keep_places(active.park());
        Ok(())
    }

    fn resume(&self, registers: &mut Registers) -> Result<(), DriverOkError> {
        registers.active = Some(self.try_activate(registers)?);
        Ok(())
    }
}

fn fits(registers: &Registers, device: &dyn VirtioDevice) -> Result<(), ReplaceError> {
    let (old, new) = (registers.device.device_type(), device.device_type());
    if old != new {
        return Err(ReplaceError::Type { old, new });
    }
    let (old, new) = (registers.device.queue_max_sizes(), device.queue_max_sizes());
    if old != new {
        return Err(ReplaceError::Queues { old: old.to_vec(), new: new.to_vec() });
    }
    let offered = device.features() | 1 << VIRTIO_F_VERSION_1;
    let missing = registers.driver_features & RING_FEATURE_BITS & !offered;
    if missing != 0 {
        return Err(ReplaceError::RingFeatures(missing));
    }
    Ok(())
}
