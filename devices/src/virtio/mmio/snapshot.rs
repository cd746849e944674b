//! A transport at rest: parked, saved, restored.

use super::queue_setup::QueueSetup;
use super::registers::Registers;
use super::status::{Phase, Status};
use super::{MmioTransport, error};
use crate::virtio::state::{RestoreError, SaveError, TransportState};

impl MmioTransport {
    /// Takes the active half out of its loop and keeps the places that it came to in its queues.
    /// When this returns nothing touches guest memory on the device's behalf.
    ///
    /// The vCPUs must be stopped. Must not be called from the event loop's thread.
    pub fn park(&self) {
        let mut registers = self.lock();
        let Some(id) = registers.active.take() else { return };
        registers.parked = true;
        match self.event_loop.remove(id) {
            Ok(active) => registers.keep_places(active.park()),
            Err(reason) => {
                // Only when the loop has ended, and the machine with it.
                error!(device = self.device_type, %reason, "The event loop does not give up the device");
            }
        }
    }

    /// Keeps a device that is parked so while the vCPUs run, until [`release`](Self::release): nobody unparks it, and a driver that resets it
    /// and brings it up again waits for its answers.
    pub fn hold(&self) {
        self.lock().held = true;
    }

    /// Lets a device go on that was held.
    pub fn release(&self) {
        self.lock().held = false;
        self.unpark();
    }

    /// Lets a device that was parked or restored go on where it was. Does nothing to others.
    pub fn unpark(&self) {
        let mut registers = self.lock();
        if registers.held || !std::mem::take(&mut registers.parked) {
            return;
        }
        if !self.interrupt.reset_needed() {
            self.activate(&mut registers);
        }
        if self.interrupt.pending() != 0 {
            // It may have been on its way when the machine was saved. One too many is harmless: the
            // driver finds out what it is for in the interrupt status.
            let _ = self.interrupt.line().write(1);
        }
    }

    /// What another process needs to go on with the device, which must be parked or not active.
    pub fn save(&self) -> Result<TransportState, SaveError> {
        let registers = self.lock();
        let device_type = self.device_type;
        if registers.active.is_some() {
            return Err(SaveError::Active { device_type });
        }
        Ok(TransportState {
            device_type,
            status: registers.status.bits(),
            needs_reset: self.interrupt.reset_needed(),
            device_features_sel: registers.device_features_sel,
            driver_features_sel: registers.driver_features_sel,
            driver_features: registers.driver_features,
            queue_sel: registers.queue_sel,
            interrupt_status: self.interrupt.pending(),
            config_generation: self.interrupt.config_generation(),
            queues: registers.queues.iter().map(QueueSetup::save).collect(),
            device: registers.device.save()?,
        })
    }

    /// Makes a fresh device what was saved. It stays parked until [`unpark`](Self::unpark). After an
    /// error it is as it was, but for what its own half may have taken over.
    pub fn restore(&self, state: &TransportState) -> Result<(), RestoreError> {
        let mut registers = self.lock();
        let status = self.check(&registers, state)?;
        let queues = registers.queues.iter().zip(&state.queues);
        let queues: Vec<_> = queues.map(|(fresh, saved)| QueueSetup::restored(fresh.max_size, saved)).collect();
        if status.is(Phase::DriverOk) {
            for (index, queue) in queues.iter().enumerate().filter(|(_, queue)| queue.ready) {
                queue.build(&self.memory).map_err(|source| RestoreError::Queue { index, source })?;
            }
        }
        registers.device.restore(&state.device)?;
        registers.status = status;
        registers.device_features_sel = state.device_features_sel;
        registers.driver_features_sel = state.driver_features_sel;
        registers.driver_features = state.driver_features;
        registers.queue_sel = state.queue_sel;
        registers.queues = queues;
        registers.parked = status.is(Phase::DriverOk);
        self.interrupt.restore(state.interrupt_status, state.needs_reset, state.config_generation);
        Ok(())
    }

    fn check(&self, registers: &Registers, state: &TransportState) -> Result<Status, RestoreError> {
        let (saved, present) = (state.device_type, self.device_type);
        if saved != present {
            return Err(RestoreError::DeviceType { saved, present });
        }
        if registers.status != Status::RESET {
            return Err(RestoreError::InUse { device_type: present });
        }
        let status = Status::from_bits(state.status).ok_or(RestoreError::Status(state.status))?;
        let missing = state.driver_features & !registers.offered_features();
        // Before FEATURES_OK a driver may have written anything.
        if missing != 0 && status.has_features() {
            return Err(RestoreError::Features(missing));
        }
        let (saved, present) = (state.queues.len(), registers.queues.len());
        if saved != present {
            return Err(RestoreError::QueueCount { saved, present });
        }
        Ok(status)
    }
}
