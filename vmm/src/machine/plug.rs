//! Devices that come and go while the machine runs.

use super::Machine;
use crate::hotplug::{HotplugError, Pluggable, SlotState};

impl Machine {
    /// Plugs a device into slot `index` of its kind, or the first that is vacant, and returns which it was. The guest
    /// may run meanwhile.
    pub fn plug(&self, index: Option<usize>, device: Pluggable) -> Result<usize, HotplugError> {
        self.slots.plug(index, device)
    }

    /// Takes the device `id` out of its slot. When this returns, what it had begun is done, and nothing of it is left in
    /// this process.
    pub fn unplug(&self, id: &str) -> Result<(), HotplugError> {
        self.slots.unplug(id)
    }

    /// What is in which slot.
    pub fn slots(&self) -> Vec<SlotState> {
        self.slots.states()
    }
}
